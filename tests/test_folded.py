"""Attention over folded heads against its definition in float64, and the method of nodes against
the exact one."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference_attention as reference
from test_core import variant

import foldprune
from foldprune import NodesState, TensorError, TensorTypeError, _core, folded_attention

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ISAS = [name for name, (compiled, _) in _core.isas().items() if compiled]

# batch, heads, kv_heads, n, m, d
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (2, 4, 2, 37, 53, 5),
    (1, 2, 1, 64, 256, 8),
    (1, 3, 3, 65, 257, 7),
    (1, 4, 1, 130, 700, 16),
    (2, 2, 2, 300, 100, 3),
    (1, 2, 1, 513, 513, 4),
]


def problem(
    sizes: tuple[int, ...], rank: int, dtype: Any = np.float32, seed: int = 0, spread: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random q, k, v; as a projection leaves them: (batch, length, heads, size), transposed."""
    batch, heads, kv_heads, n, m, d = sizes
    rng = np.random.default_rng([seed, rank, *sizes])
    shapes = [(batch, n, heads, rank), (batch, m, kv_heads, rank), (batch, m, kv_heads, d)]
    q, k, v = (rng.standard_normal(shape).astype(dtype).transpose(0, 2, 1, 3) for shape in shapes)
    return q, (k * dtype(spread)), v


def masks(batch: int, m: int) -> list[np.ndarray | None]:
    rng = np.random.default_rng(m)
    some = rng.random((batch, m)) < 0.6
    late = np.zeros((batch, m), bool)
    late[:, m - m // 3 :] = True
    one = np.zeros((batch, m), bool)
    one[0, m // 2] = True  # in a batch of two, the second sees nothing
    return [None, some, late, one, np.zeros((batch, m), bool)]


def tolerance(dtype: Any) -> float:
    return 3e-6 if np.dtype(dtype) == np.float32 else 3e-13


def close(got: np.ndarray, expected: np.ndarray, tol: float) -> None:
    assert got.shape == expected.shape
    assert np.isfinite(got).all()
    if got.size:
        assert np.abs(got - expected).max() <= tol * max(1.0, np.abs(expected).max())


def close_lse(got: np.ndarray, expected: np.ndarray, tol: float) -> None:
    blind = expected == -np.inf
    assert np.array_equal(got == -np.inf, blind)
    close(got[~blind], expected[~blind], tol)


# ---- exact --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 2, 5, 32])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_exact(sizes, rank, causal, dtype):
    q, k, v = problem(sizes, rank, dtype)
    scale = 0.7
    for mask in masks(sizes[0], sizes[4]):
        expected, expected_lse = reference.attention(q, k, v, scale, causal, mask)
        out, lse, nodes = _core.attention(q, k, v, scale, causal, mask, "exact", 1e-6, 2)
        assert out.dtype == dtype and not nodes.any()
        close(out, expected, tolerance(dtype))
        close_lse(lse, expected_lse, tolerance(dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("method", ["exact", "nodes"])
def test_variants_and_threads_give_the_same_bytes(isa, method):
    isa = variant(isa)
    # enough work for three threads
    q, k, v = problem((2, 4, 2, 400, 1333, 73), 1)
    dout = np.random.default_rng(1).standard_normal((2, 4, 400, 73), np.float32)
    mask = masks(2, 1333)[1]
    for causal in (False, True):
        args = (1.0, causal, mask)
        first = _core.attention(q, k, v, *args, method, 1e-6, 1, "scalar")
        for threads in (1, 2, 3, 7):
            again = _core.attention(q, k, v, *args, method, 1e-6, threads, isa)
            assert all(x.tobytes() == y.tobytes() for x, y in zip(first, again, strict=True))
        gradients = _core.attention_backward(dout, q, k, v, *first, *args, 1, "scalar")
        for threads in (1, 2, 5):
            again = _core.attention_backward(dout, q, k, v, *first, *args, threads, isa)
            assert all(x.tobytes() == y.tobytes() for x, y in zip(gradients, again, strict=True))


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("n, m", [(0, 0), (0, 5), (5, 0), (3, 4)])
@pytest.mark.parametrize("causal", [False, True])
def test_empty(n, m, causal, rank):
    for batch, heads, d in [(2, 2, 3), (0, 2, 3), (2, 2, 0), (1, 0, 3)]:
        q, k, v = problem((batch, heads, max(heads, 1), n, m, d), rank)
        if heads == 0:
            k, v = k[:, :1], v[:, :1]
        out = folded_attention(q, k, v, causal=causal)
        assert out.shape == (batch, heads, n, d)
        assert m > 0 or not out.any()


def test_huge_logits_do_not_overflow():
    for rank in (1, 3):
        q, k, v = problem((1, 2, 1, 70, 300, 4), rank, spread=1e4)
        for method in ("exact", "auto"):
            out = folded_attention(q, k, v, scale=50.0, method=method)
            expected, _ = reference.attention(q * np.float32(50), k, v)
            # float32 logits of 1e6 are good to 0.06: weights to a few percent, never NaN
            assert np.isfinite(out).all()
            assert np.abs(out - expected).max() < (1e-5 if rank == 1 else 0.3)
    out = folded_attention(q[..., :1] * np.float32(1e30), k[..., :1] * np.float32(1e4), v)
    assert np.isfinite(out).all()


def test_large_offsets():
    """Only differences of keys count; queries may be far from zero."""
    for method in ("exact", "nodes"):
        q, k, v = problem((1, 1, 1, 200, 400, 4), 1)
        expected, _ = reference.attention(q, k + np.float32(1000), v)
        close(folded_attention(q, k + np.float32(1000), v, method=method), expected, 1e-5)
        q, k = q / 8 + np.float32(100), k / 8
        expected, _ = reference.attention(q, k, v)
        close(folded_attention(q, k, v, method=method), expected, 1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [0, 1, 2])
@pytest.mark.parametrize("method, rank", [("exact", 1), ("nodes", 1), ("exact", 2)])
def test_not_finite_is_never_hidden(method, rank, name, value):
    """Just the rows that the definition makes NaN or infinite are, the others are right."""
    arrays = [x.copy() for x in problem((1, 1, 1, 40, 80, 3), rank)]
    arrays[name][0, 0, 7, 0] = value
    with np.errstate(invalid="ignore"):
        expected, _ = reference.attention(*arrays)
    out = folded_attention(*arrays, method=method)
    finite = np.isfinite(expected)
    assert not finite.all() and np.array_equal(np.isfinite(out), finite)
    assert np.abs(out[finite] - expected[finite]).max(initial=0) < 1e-5


# ---- nodes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [*SIZES, (1, 4, 2, 1500, 1500, 6)], ids=str)
def test_nodes(sizes, causal, dtype):
    q, k, v = problem(sizes, 1, dtype)
    tol = 1e-6 if dtype == np.float32 else 1e-12
    for mask in masks(sizes[0], sizes[4]):
        expected, expected_lse = reference.attention(q, k, v, 0.8, causal, mask)
        out, lse, _ = _core.attention(q, k, v, 0.8, causal, mask, "nodes", tol, 2)
        close(out, expected, 5 * tol)
        close_lse(lse, expected_lse, 5 * tol)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("largest", [1, 5, 20, 60])
@pytest.mark.parametrize("kind", ["normal", "uniform", "two", "few", "heavy"])
def test_nodes_reach_the_tolerance(kind, largest, causal):
    """Over ranges of a * b and distributions of keys, among them ones whose F has steps."""
    rng = np.random.default_rng(largest)
    shape = (1, 2, 700, 1)
    k = {
        "normal": lambda: rng.standard_normal(shape),
        "uniform": lambda: rng.uniform(-1, 1, shape),
        "two": lambda: rng.choice([-1.0, 1.0], shape) + 0.01 * rng.standard_normal(shape),
        "few": lambda: rng.choice([-1.0, -0.2, 0.0, 0.9], shape, p=[0.3, 0.1, 0.001, 0.599]),
        "heavy": lambda: rng.standard_t(2, shape),
    }[kind]()
    q, v = rng.standard_normal(shape), rng.standard_normal((1, 2, 700, 8))
    q *= largest / (np.abs(q).max() * np.abs(k).max())
    for dtype, tol in ((np.float32, 1e-6), (np.float64, 1e-6), (np.float64, 1e-10)):
        given = [x.astype(dtype) for x in (q, k, v)]
        expected, _ = reference.attention(*given, 1.0, causal)
        out = folded_attention(*given, causal=causal, method="nodes", tol=tol)
        limit = 1e-5 if dtype == np.float32 else tol
        assert np.abs(out - expected).max() <= limit * np.abs(v).max()


@pytest.mark.parametrize("causal", [False, True])
def test_wide_ranges_fall_back(causal):
    for spread in (100.0, 1e4, 1e8):
        q, k, v = problem((1, 2, 1, 300, 300, 4), 1, spread=spread)
        out, _, nodes = _core.attention(q, k, v, 1.0, causal, None, "nodes", 1e-6, 2)
        assert not nodes.any()
        close(out, reference.attention(q, k, v, 1.0, causal)[0], 1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_constant_queries_and_keys(causal):
    q, k, v = problem((1, 2, 1, 400, 500, 4), 1)
    dout = np.random.default_rng(2).standard_normal((1, 2, 400, 4), np.float32)
    for a, b in ((np.full_like(q, 0.8), k), (q, np.full_like(k, -3.0)), (q * 0, k * 0)):
        out, lse, nodes = _core.attention(a, b, v, 1.0, causal, None, "nodes", 1e-6, 2)
        assert nodes.all()
        close(out, reference.attention(a, b, v, 1.0, causal)[0], 1e-5)
        got = _core.attention_backward(dout, a, b, v, out, lse, nodes, 1.0, causal, None, 2)
        for x, y in zip(got, reference.gradients(dout, a, b, v, 1.0, causal), strict=True):
            close(x, y, 2e-5)


def test_auto_uses_nodes_where_they_are_faster():
    small, large = problem((1, 1, 1, 32, 32, 4), 1), problem((1, 1, 1, 2000, 2000, 4), 1)
    assert not _core.attention(*small)[2].any()
    assert _core.attention(*large)[2].all()
    assert not _core.attention(*large, method="exact")[2].any()
    assert _core.attention(*small, method="nodes")[2].all()
    assert not _core.attention(*problem((1, 1, 1, 2000, 2000, 4), 2))[2].any()
    uniform = problem((1, 1, 1, 2000, 2000, 4), 0)
    close(
        folded_attention(*uniform, causal=True), reference.attention(*uniform, 1.0, True)[0], 1e-6
    )


# ---- backward -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("method, rank", [("exact", 0), ("exact", 1), ("exact", 5), ("nodes", 1)])
@pytest.mark.parametrize("sizes", [*SIZES, (1, 2, 1, 700, 2400, 4)], ids=str)
def test_gradients(sizes, method, rank, causal, dtype):
    q, k, v = problem(sizes, rank, dtype)
    rng = np.random.default_rng(3)
    dout = rng.standard_normal((*q.shape[:3], v.shape[3])).astype(dtype)
    tol = 1e-6 if dtype == np.float32 else 1e-12
    for mask in masks(sizes[0], sizes[4]):
        out, lse, nodes = _core.attention(q, k, v, 0.8, causal, mask, method, tol, 2)
        got = _core.attention_backward(dout, q, k, v, out, lse, nodes, 0.8, causal, mask, 2)
        expected = reference.gradients(dout, q, k, v, 0.8, causal, mask)
        for x, y in zip(got, expected, strict=True):
            assert x.dtype == dtype
            close(x, y, 30 * tol)


@pytest.mark.parametrize("method, rank", [("exact", 2), ("nodes", 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_finite_differences(method, rank, causal):
    q, k, v = problem((1, 2, 1, 150, 170, 3), rank, np.float64)
    rng = np.random.default_rng(4)
    dout, mask = rng.standard_normal((1, 2, 150, 3)), rng.random((1, 170)) < 0.8
    args = (0.9, causal, mask)
    forward = _core.attention(q, k, v, *args, method, 1e-12)
    gradients = _core.attention_backward(dout, q, k, v, *forward, *args)
    for i in range(3):
        for _ in range(3):
            inputs = [q, k, v]
            step = rng.standard_normal(inputs[i].shape)
            value = []
            for sign in (1, -1):
                inputs[i] = (q, k, v)[i] + sign * 1e-5 * step
                value.append((reference.attention(*inputs, *args)[0] * dout).sum())
            expected = (value[0] - value[1]) / 2e-5
            assert (gradients[i] * step).sum() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_torch(rank, causal):
    torch = pytest.importorskip("torch")
    arrays = problem((2, 3, 3, 90, 90, 5), rank)
    dout = np.random.default_rng(5).standard_normal((2, 3, 90, 5), np.float32)
    tensors = [torch.from_numpy(np.ascontiguousarray(x)).requires_grad_() for x in arrays]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *tensors, is_causal=causal, scale=0.6
    )
    expected.backward(torch.from_numpy(dout))
    for method in ("exact", "auto", "nodes") if rank == 1 else ("exact",):
        forward = _core.attention(*arrays, 0.6, causal, None, method)
        close(forward[0], expected.detach().numpy(), 1e-5)
        got = _core.attention_backward(dout, *arrays, *forward, 0.6, causal)
        for x, tensor in zip(got, tensors, strict=True):
            close(x, tensor.grad.numpy(), 3e-5)


def test_backward_takes_nothing_that_forward_cannot_have_given():
    q, k, v = problem((1, 1, 1, 40, 40, 3), 1)
    out, lse, nodes = _core.attention(q, k, v, method="nodes")
    for wrong in (-16, 5, 272, 1 << 30):
        with pytest.raises(ValueError):
            _core.attention_backward(out, q, k, v, out, lse, np.full_like(nodes, wrong))
    with pytest.raises(ValueError):
        _core.attention_backward(out[:, :, 1:], q, k, v, out, lse, nodes)
    with pytest.raises(ValueError):
        _core.attention_backward(out, q, k, v, out, lse[:, :, 1:].copy(), nodes)
    with pytest.raises(TypeError):
        _core.attention_backward(out, q, k, v, out, lse.astype(np.float32), nodes)


# ---- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.dtype("f2"), BFLOAT16])
def test_halves_are_computed_in_float32(dtype):
    arrays = [x.astype(dtype) for x in problem((1, 4, 2, 40, 50, 6), 3)]
    out = folded_attention(*arrays, scale=0.5, causal=True)
    assert out.dtype == dtype
    wide = [x.astype(np.float32) for x in arrays]
    assert np.array_equal(out, folded_attention(*wide, scale=0.5, causal=True).astype(dtype))


def test_views_are_read_where_they_are():
    batch, m, heads, d = 2, 30, 3, 8
    x = np.random.default_rng(0).standard_normal((batch, m, heads * d)).astype(np.float32)
    v = x.reshape(batch, m, heads, d).transpose(0, 2, 1, 3)
    assert foldprune.folded._rows(v) is v
    q, k, _ = problem((batch, heads, heads, 10, m, d), 1)
    expected = folded_attention(q, k, np.ascontiguousarray(v))
    assert np.array_equal(folded_attention(q, k, v), expected)
    joined = expected.transpose(0, 2, 1, 3).reshape(batch, 10, heads * d)
    assert np.shares_memory(joined, expected)
    # and every other layout is copied
    for other in (v[..., ::-1], v[:, :, ::-1], np.asfortranarray(v)):
        assert np.array_equal(
            folded_attention(q, k, other), folded_attention(q, k, np.ascontiguousarray(other))
        )
    broadcast = np.broadcast_to(v[:, :, :1], v.shape)
    assert np.allclose(folded_attention(q, k, broadcast), v[:, :, :1], atol=1e-6)


def test_bad_arguments():
    q, k, v = problem((2, 4, 2, 5, 6, 3), 1)
    for error, match, call in [
        (TensorTypeError, "q: expected a NumPy array", ([1.0], k, v)),
        (TensorTypeError, "q: expected float32", (q.astype(int), k, v)),
        (TensorTypeError, "k is float64 and q is float32", (q, k.astype(float), v)),
        (TensorError, "q: expected .* 3 dimensions", (q[0], k, v)),
        (TensorError, "k and v", (q, k[:, :, 1:], v)),
        (TensorError, "batch sizes 2 and 1", (q, k[:1], v[:1])),
        (TensorError, "sizes 1 and 2", (q, np.concatenate([k, k], axis=3), v)),
        (TensorError, "4 heads, k has 3", (q, np.concatenate([k, k[:, :1]], 1), v[:, [0, 1, 1]])),
        (TensorError, "at least one head", (q, k[:, :0], v[:, :0])),
    ]:
        with pytest.raises(error, match=match):
            folded_attention(*call)
    wide = problem((2, 4, 2, 5, 6, 3), 2)
    for error, match, arrays, options in [
        (TensorError, "one dimension, q has 2", wide, {"method": "nodes"}),
        (TensorError, "method='fast'", (q, k, v), {"method": "fast"}),
        (TensorError, "tol=0", (q, k, v), {"tol": 0}),
        (TensorError, "tol=nan", (q, k, v), {"tol": np.nan}),
        (TensorError, "scale=inf", (q, k, v), {"scale": np.inf}),
        (TensorTypeError, "scale='1'", (q, k, v), {"scale": "1"}),
        (TensorTypeError, "key_mask", (q, k, v), {"key_mask": np.ones((2, 6))}),
        (TensorError, "key_mask", (q, k, v), {"key_mask": np.ones((2, 5), bool)}),
        (ValueError, "threads", (q, k, v), {"threads": 0}),
    ]:
        with pytest.raises(error, match=match):
            folded_attention(*arrays, **options)


def test_core_refuses_what_it_cannot_read():
    q, k, v = problem((2, 4, 2, 5, 6, 3), 2)
    for call in [
        (q[..., ::-1], k, v),
        (q, k, v[:, :, ::-1]),
        (q, k, np.broadcast_to(v[:, :, :1], v.shape)),
        (q, k[:, :, 1:], v),
        (q, k, v, 1.0, False, np.ones((2, 5), bool)),
        (q, k, v, 1.0, False, None, "nodes"),
        (q, k, v, 1.0, False, None, "other"),
        (q, k, v, np.nan),
    ]:
        with pytest.raises(ValueError):
            _core.attention(*call)
    with pytest.raises(TypeError):
        _core.attention(q, k.astype(float), v)


# ---- decoding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_state_gives_attention_to_all_keys_so_far(dtype, masked):
    q, k, v = problem((2, 4, 2, 90, 90, 5), 1, dtype)
    mask = np.random.default_rng(6).random((2, 90)) < 0.7 if masked else None
    bound, tol = float(np.abs(q).max()), 1e-6 if dtype == np.float32 else 1e-11
    first = None if mask is None else mask[:, :30]
    state = NodesState(k[:, :, :30], v[:, :, :30], -bound, bound, key_mask=first, tol=tol)
    size = state.nbytes
    for i in range(30, 90):
        own = None if mask is None else mask[:, i : i + 1]
        state.append(k[:, :, i : i + 1], v[:, :, i : i + 1], key_mask=own)
        so_far = None if mask is None else mask[:, : i + 1]
        expected, _ = reference.attention(
            q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], 1.0, False, so_far
        )
        close(state.attend(q[:, :, i : i + 1]), expected, 10 * tol)
    assert state.nbytes == size and state.length == 90
    assert size == 2 * 2 * 8 * (state.nodes * (5 + 2) + 5)
    everything = folded_attention(q, k, v, key_mask=mask, method="exact")
    close(state.attend(q), everything, 10 * tol)


def test_state_does_not_tire():
    """Ten thousand tokens one by one: rounding does not add up."""
    q, k, v = problem((1, 1, 1, 8, 10000, 4), 1)
    state = NodesState(k[:, :, :64], v[:, :, :64], -4, 4)
    for i in range(64, 10000):
        state.append(k[:, :, i : i + 1], v[:, :, i : i + 1], threads=1)
    close(state.attend(q), reference.attention(q, k, v)[0], 2e-6)


def test_state_without_keys_and_with_one_query():
    q, k, v = problem((1, 2, 1, 1, 40, 3), 1)
    empty = NodesState(k[:, :, :0], v[:, :, :0], -5, 5)
    assert not empty.attend(q).any() and empty.length == 0
    empty.append(k, v)
    close(empty.attend(q), reference.attention(q, k, v)[0], 1e-5)
    same = np.full_like(q, 0.3)
    point = NodesState(k, v, np.float32(0.3), np.float32(0.3))
    close(point.attend(same), reference.attention(same, k, v)[0], 1e-5)


def test_state_refuses_what_it_cannot_answer():
    q, k, v = problem((1, 2, 1, 3, 40, 3), 1)
    state = NodesState(k, v, -4, 4, nodes=64)
    with pytest.raises(TensorError, match=r"outside low \.\. high"):
        state.attend(q + np.float32(10))
    with pytest.raises(TensorError, match=r"outside low \.\. high"):
        state.attend(q * np.float32(np.nan))
    before = [x.tobytes() for x in state._arrays]
    with pytest.raises(TensorError, match="more nodes"):
        state.append(k * np.float32(100), v)
    with pytest.raises(TensorError, match="NaN"):
        state.append(k * np.float32(np.nan), v)
    with pytest.raises(TensorError, match="NaN"):
        state.append(k, v * np.float32(np.inf))
    assert [x.tobytes() for x in state._arrays] == before and state.length == 40
    with pytest.raises(TensorError, match="as the state began"):
        state.append(k.astype(float), v.astype(float))
    with pytest.raises(TensorTypeError, match="the state's"):
        state.attend(q.astype(float))
    with pytest.raises(TensorError, match="a multiple of 1"):
        state.attend(np.concatenate([q, q], axis=3))
    # two clusters of keys: F has a step that 16 nodes cannot follow, though the range allows them
    steps = np.where(np.arange(40) % 2, 1.2, -1.2).astype(np.float32).reshape(1, 1, 40, 1)
    few = NodesState(steps, v, -4, 4, nodes=16)
    with pytest.raises(TensorError, match="do not reach"):
        few.attend(q)
    for options, match in [
        ({"nodes": 20}, "multiple of 16"),
        ({"nodes": 512}, "multiple of 16"),
        ({"tol": -1.0}, "tol"),
    ]:
        with pytest.raises(TensorError, match=match):
            NodesState(k, v, -4, 4, **options)
    with pytest.raises(TensorError, match="low is above high"):
        NodesState(k, v, 1, -1)
    with pytest.raises(TensorError, match="finite"):
        NodesState(k, v, -np.inf, 1)
    with pytest.raises(TensorError, match="narrow low"):
        NodesState(k, v, -1000, 1000)
