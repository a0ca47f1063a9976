"""Packed matrices: products, lookups and their gradients against float64 by the definition, on
every kernel variant that runs here."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import threading
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

import foldprune
from foldprune import Packed, TensorError, TensorTypeError, _core

Array = np.ndarray[Any, np.dtype[Any]]

VARIANTS = [name for name, (compiled, runs) in _core.isas().items() if compiled and runs]
DTYPES = ["float32", "float16", "bfloat16", "int8"]
METHODS = ["vector", "sparse", "dense"]
MANY = ["sparse", "dense"]  # of the derivatives, which have no kernel for few tokens
# rows and columns around whole tiles of 64
SHAPES = [(1, 1), (3, 64), (64, 65), (63, 130), (130, 63), (200, 321), (64, 64)]
TOKENS = [1, 2, 3, 4, 5, 16, 17, 64, 95, 97, 200]


def test_every_variant_that_this_processor_runs_is_in_the_build() -> None:
    for name, (compiled, runs) in _core.isas().items():
        assert compiled or not runs, f"{name} runs here but was not compiled in"


def matrix(rows: int, cols: int, density: float = 0.3, seed: int = 0) -> Array:
    """float64 with zeros; the magnitudes of a linear layer's weights."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, cols))
    return np.where(rng.random((rows, cols)) < density, w, 0.0)


def normal(*shape: int, seed: int = 1, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def close(found: Array, expected: Array, terms: int) -> None:
    """Sums of that many products of order one in float32."""
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert np.abs(found - expected).max(initial=0) < 2e-6 * (10 + terms)


# ---- making -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, (0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_unpack_is_the_matrix(shape: tuple[int, int], dtype: str) -> None:
    w = matrix(*shape).astype(np.dtype(bfloat16 if dtype == "bfloat16" else dtype))
    packed = foldprune.pack(w)
    assert packed.shape == shape
    assert packed.dtype == w.dtype
    assert packed.values.size == np.count_nonzero(w)
    for threads in (1, 2, 5):
        assert packed.unpack(threads).tobytes() == w.tobytes()


def test_mask_says_what_is_kept() -> None:
    w, mask = normal(70, 90), matrix(70, 90) != 0
    w[mask.nonzero()[0][0], mask.nonzero()[1][0]] = 0  # a zero that is kept
    packed = foldprune.pack(w, mask)
    assert packed.values.size == mask.sum()
    assert np.array_equal(packed.unpack(), np.where(mask, w, 0))


def test_int8_rounds_to_a_127th_of_each_rows_largest() -> None:
    w = matrix(90, 150).astype(np.float32)
    w[7] = 0
    w[8] *= 1e-3
    packed = foldprune.pack(w, dtype="int8")
    step = np.abs(w).max(axis=1, keepdims=True) / 127
    assert packed.scale is not None
    assert np.array_equal(packed.scale, step[:, 0])
    assert np.all(np.abs(packed.unpack() - w) <= step * 0.5001)
    assert packed.nbytes < 0.4 * w.nbytes


def test_int8_of_subnormal_rows_is_zero_and_finite() -> None:
    w = np.full((2, 3), 1e-42, np.float32)
    assert np.all(np.isfinite(foldprune.pack(w, dtype="int8").unpack()))


def test_memory_is_values_and_a_bit_a_weight() -> None:
    packed = foldprune.pack(matrix(1024, 1024).astype(np.float32))
    assert packed.nbytes <= 4 * packed.values.size + 1024 * 1024 / 8 + 8 * 257
    assert packed.nbytes < 0.34 * 4 * 1024 * 1024
    assert packed.density == packed.values.size / 1024**2


def test_other_strides_pack_the_same() -> None:
    w = matrix(100, 80).astype(np.float32)
    wide = np.zeros((100, 160), np.float32)
    wide[:, ::2] = w
    for view in (np.asfortranarray(w), wide[:, ::2], w[::-1, ::-1][::-1, ::-1]):
        assert np.array_equal(foldprune.pack(view).values, foldprune.pack(w).values)


def test_pickle_and_copy() -> None:
    for dtype in DTYPES:
        packed = foldprune.pack(matrix(65, 129).astype(np.float32), dtype=dtype)
        for other in (pickle.loads(pickle.dumps(packed)), copy.deepcopy(packed)):
            assert other.unpack().tobytes() == packed.unpack().tobytes()
            assert other.nbytes == packed.nbytes


# ---- products -----------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_of_the_definition(isa: str, method: str, dtype: str) -> None:
    for rows, cols in SHAPES:
        packed = foldprune.pack(matrix(rows, cols).astype(np.float32), dtype=dtype)
        w, bias = packed.unpack().astype(np.float64), normal(rows, seed=2)
        for tokens in TOKENS:
            x = normal(tokens, cols)
            for b in (None, bias):
                expected = x.astype(np.float64) @ w.T + (0 if b is None else b)
                close(_core.matmul(packed._core, x, b, 2, method, isa), expected, cols)


@pytest.mark.parametrize("isa", VARIANTS)
@pytest.mark.parametrize("density", [0.0, 0.01, 0.3, 0.97, 1.0])
def test_densities(isa: str, density: float) -> None:
    packed = foldprune.pack(matrix(150, 270, density).astype(np.float32))
    w, x = packed.unpack().astype(np.float64), normal(33, 270)
    for method in METHODS:
        close(_core.matmul(packed._core, x, None, 1, method, isa), x @ w.T, 270)
    dy = normal(33, 150)
    for method in MANY:
        close(_core.matmul_backward(packed._core, dy, 1, method, isa), dy @ w, 150)
        found = _core.matmul_gradient(packed._core, dy, x, 1, method, isa)
        close(found, kept(packed, dy.astype(np.float64).T @ x), 33)


def kept(packed: Packed, dense: Array) -> Array:
    """The elements of a dense matrix where the packed one keeps some, in its order."""
    rows, cols, mask, offset, *_ = packed._core
    return _core.packed_fill((rows, cols, mask, offset, None, None), np.ascontiguousarray(dense))


@pytest.mark.parametrize("isa", VARIANTS)
@pytest.mark.parametrize("method", MANY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_derivatives_are_those_of_the_definition(isa: str, method: str, dtype: str) -> None:
    for rows, cols in SHAPES:
        packed = foldprune.pack(matrix(rows, cols).astype(np.float32), dtype=dtype)
        w = packed.unpack().astype(np.float64)
        for tokens in TOKENS:
            x, dy = normal(tokens, cols), normal(tokens, rows, seed=3)
            close(_core.matmul_backward(packed._core, dy, 2, method, isa), dy @ w, rows)
            if dtype != "int8":
                found = _core.matmul_gradient(packed._core, dy, x, 2, method, isa)
                close(found, kept(packed, dy.astype(np.float64).T @ x), tokens)


def test_int8_values_have_no_gradient() -> None:
    packed = foldprune.pack(matrix(8, 8).astype(np.float32), dtype="int8")
    with pytest.raises(TypeError):
        _core.matmul_gradient(packed._core, normal(3, 8), normal(3, 8))


def test_float64_goes_through_the_specification() -> None:
    packed = foldprune.pack(matrix(70, 200))
    w = packed.unpack()
    for tokens in TOKENS:
        x, dy = normal(tokens, 200, dtype=np.float64), normal(tokens, 70, dtype=np.float64)
        bias = normal(70, dtype=np.float64)
        assert np.allclose(_core.matmul(packed._core, x, bias, 2), x @ w.T + bias, atol=1e-11)
        assert np.allclose(_core.matmul_backward(packed._core, dy, 2), dy @ w, atol=1e-11)
        found = _core.matmul_gradient(packed._core, dy, x, 2)
        assert np.allclose(found, kept(packed, dy.T @ x), atol=1e-11)


@pytest.mark.parametrize("threads", [2, 40])  # each with tiles of its own; too many for that
def test_many_tokens(threads: int) -> None:
    packed = foldprune.pack(matrix(70, 100).astype(np.float32))
    w = packed.unpack().astype(np.float64)
    x, dy = normal(2500, 100), normal(2500, 70)
    for method in METHODS:
        close(_core.matmul(packed._core, x, None, threads, method), x @ w.T, 100)
    close(_core.matmul_backward(packed._core, dy, threads), dy @ w, 70)
    found = _core.matmul_gradient(packed._core, dy, x, threads)
    close(found, kept(packed, dy.astype(np.float64).T @ x), 2500)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("tokens", [40, 300])  # in one part, in two
def test_blocks_of_the_dense_products(dtype: str, tokens: int) -> None:
    """Two by two of them, that are not whole."""
    packed = foldprune.pack(matrix(700, 500).astype(np.float32), dtype=dtype)
    w, x, dy = packed.unpack().astype(np.float64), normal(tokens, 500), normal(tokens, 700)
    close(_core.matmul(packed._core, x, None, 3, "dense"), x @ w.T, 500)
    close(_core.matmul_backward(packed._core, dy, 3, "dense"), dy @ w, 700)
    if dtype != "int8":
        found = _core.matmul_gradient(packed._core, dy, x, 3, "dense")
        close(found, kept(packed, dy.astype(np.float64).T @ x), tokens)


@pytest.mark.parametrize("isa", VARIANTS)
def test_bytes_do_not_depend_on_threads(isa: str) -> None:
    for dtype in DTYPES:
        packed = foldprune.pack(matrix(700, 500).astype(np.float32), dtype=dtype)
        x, dy = normal(170, 500), normal(170, 700)

        def results(
            threads: int, packed: Packed = packed, x: Array = x, dy: Array = dy
        ) -> list[bytes]:
            out = [_core.matmul(packed._core, x, None, threads, m, isa) for m in METHODS]
            out += [_core.matmul_backward(packed._core, dy, threads, m, isa) for m in MANY]
            if packed.dtype != np.int8:
                out += [_core.matmul_gradient(packed._core, dy, x, threads, m, isa) for m in MANY]
            return [array.tobytes() for array in out]

        assert results(1) == results(2) == results(7)


@pytest.mark.parametrize("isa", VARIANTS)
@pytest.mark.parametrize("density", [0.3, 0.6])  # of the latter, few tokens meet expanded rows
def test_a_token_is_the_same_in_any_company(isa: str, density: float) -> None:
    packed = foldprune.pack(matrix(130, 140, density).astype(np.float32))
    x = normal(120, 140)
    together = _core.matmul(packed._core, x, None, 1, "sparse", isa)
    alone = [_core.matmul(packed._core, x[i : i + 1], None, 1, "sparse", isa) for i in (0, 50, 119)]
    assert np.array_equal(together[[0, 50, 119]], np.concatenate(alone))


def test_choice() -> None:
    core = foldprune.pack(matrix(256, 256).astype(np.float32))._core
    assert _core.matmul_choice(core, 1) == "vector"
    assert _core.matmul_choice(core, 512) == "sparse"
    nearly_dense = foldprune.pack(matrix(256, 256, 0.95).astype(np.float32))._core
    assert _core.matmul_choice(nearly_dense, 512) == "dense"
    for product in ("backward", "gradient"):
        assert _core.matmul_choice(core, 512, product) == "sparse"
        assert _core.matmul_choice(nearly_dense, 1, product) == "sparse"
        assert _core.matmul_choice(nearly_dense, 512, product) == "dense"
    with pytest.raises(ValueError, match="product"):
        _core.matmul_choice(core, 512, "outer")
    for call in (_core.matmul_backward, _core.matmul_gradient):
        with pytest.raises(ValueError):
            arguments = (normal(4, 256),) * (1 + (call is _core.matmul_gradient))
            call(core, *arguments, 1, "vector")


# ---- lookups ------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", VARIANTS)
@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
def test_lookups_are_rows(isa: str, dtype: str) -> None:
    packed = foldprune.pack(matrix(150, 130), dtype=dtype)
    ids = np.array([0, 149, 63, 64, 64, 5, 0])
    found = _core.packed_lookup(packed._core, ids, 2, isa)
    assert found.tobytes() == packed.unpack()[ids].tobytes()


@pytest.mark.parametrize("isa", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_of_lookups_add_up(isa: str, dtype: str) -> None:
    packed = foldprune.pack(matrix(150, 130), dtype=dtype)
    ids = np.random.default_rng(4).integers(0, 150, 500)
    drows = normal(500, 130, dtype=dtype)
    for ignored in (-1, int(ids[0])):
        dense = np.zeros((150, 130))
        chosen = ids != ignored
        np.add.at(dense, ids[chosen], drows[chosen].astype(np.float64))
        found = [
            _core.packed_lookup_gradient(packed._core, ids, drows, ignored, t, isa) for t in (1, 3)
        ]
        assert np.allclose(
            found[0], kept(packed, dense), atol=1e-5 if dtype == "float32" else 1e-12
        )
        assert found[0].tobytes() == found[1].tobytes()


def test_ids_out_of_range() -> None:
    packed = foldprune.pack(matrix(5, 70).astype(np.float32))
    for bad in (-1, 5, 2**62):
        with pytest.raises(ValueError):
            _core.packed_lookup(packed._core, np.array([0, bad]))
        with pytest.raises(ValueError):
            _core.packed_lookup_gradient(packed._core, np.array([bad]), normal(1, 70), -1)


# ---- what users call ----------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (7,), (2, 3), (0,), (2, 0, 3), (1, 1, 1, 40)])
def test_packed_matmul_takes_any_leading_dimensions(lead: tuple[int, ...]) -> None:
    packed = foldprune.pack(matrix(70, 90).astype(np.float32))
    x, bias = normal(*lead, 90), normal(70)
    y = foldprune.packed_matmul(x, packed, bias=bias)
    assert y.shape == (*lead, 70)
    close(y, x @ packed.unpack().astype(np.float64).T + bias, 90)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_matrices_without_elements(shape: tuple[int, int]) -> None:
    packed = foldprune.pack(np.zeros(shape, np.float32))
    y = foldprune.packed_matmul(normal(3, shape[1]), packed)
    assert y.shape == (3, shape[0])
    assert not y.any()


@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
def test_half_precision_activations(dtype: Any) -> None:
    packed = foldprune.pack(matrix(70, 90).astype(dtype))
    x = normal(20, 90, dtype=dtype)
    y = foldprune.packed_matmul(x, packed, bias=normal(70, dtype=dtype))
    assert y.dtype == dtype
    expected = x.astype(np.float64) @ packed.unpack().astype(np.float64).T
    expected += normal(70, dtype=dtype).astype(np.float64)
    assert np.abs(y.astype(np.float64) - expected).max() < 0.01 * np.abs(expected).max()


def test_other_strides_of_x() -> None:
    packed = foldprune.pack(matrix(70, 90).astype(np.float32))
    x = normal(90, 20).T
    assert np.array_equal(
        foldprune.packed_matmul(x, packed), foldprune.packed_matmul(np.ascontiguousarray(x), packed)
    )
    wide = normal(20, 180)[:, ::2]
    assert np.array_equal(
        foldprune.packed_matmul(wide, packed), foldprune.packed_matmul(wide.copy(), packed)
    )
    unaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(20, 90)
    assert np.array_equal(
        foldprune.packed_matmul(unaligned, packed),
        foldprune.packed_matmul(unaligned.copy(), packed),
    )


def test_bad_matrices() -> None:
    w = np.eye(4, dtype=np.float32)
    with pytest.raises(TensorTypeError, match="NumPy array"):
        foldprune.pack([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(TensorError, match="two dimensions"):
        foldprune.pack(w[0])
    for bad in (w.astype(int), w.astype(complex), w.astype(">f4"), w.astype(object)):
        with pytest.raises(TensorTypeError, match="expected float32"):
            foldprune.pack(bad)
    for value in (np.nan, np.inf):
        with pytest.raises(TensorError, match="NaN or infinite"):
            foldprune.pack(np.where(w == 1, value, w).astype(np.float32))
    with pytest.raises(TensorError, match="range of float16"):
        foldprune.pack(w * 1e6, dtype="float16")
    for dtype in ("int4", np.int32, "float8", object()):
        with pytest.raises(TensorTypeError, match="expected float32, float64"):
            foldprune.pack(w, dtype=dtype)
    with pytest.raises(TensorError, match=r"mask: shape \(3, 4\)"):
        foldprune.pack(w, np.ones((3, 4), bool))
    with pytest.raises(TensorTypeError, match="boolean"):
        foldprune.pack(w, np.ones((4, 4), np.uint8))


def test_bad_products() -> None:
    packed = foldprune.pack(matrix(70, 90).astype(np.float32))
    x = normal(3, 90)
    with pytest.raises(TensorError, match="last dimension must be 90"):
        foldprune.packed_matmul(x[:, :89], packed)
    with pytest.raises(TensorError, match="last dimension must be 90"):
        foldprune.packed_matmul(np.array(1, np.float32), packed)
    with pytest.raises(TensorTypeError, match="cast x"):
        foldprune.packed_matmul(x.astype(np.float64), packed)
    with pytest.raises(TensorTypeError, match="cast x"):
        foldprune.packed_matmul(x, foldprune.pack(matrix(70, 90)))
    with pytest.raises(TensorTypeError, match="cast x"):
        foldprune.packed_matmul(x.astype(int), packed)
    with pytest.raises(TensorError, match=r"bias: expected shape \(70,\)"):
        foldprune.packed_matmul(x, packed, bias=normal(90))
    with pytest.raises(TensorTypeError, match="bias"):
        foldprune.packed_matmul(x, packed, bias=[0.0])  # type: ignore[arg-type]
    with pytest.raises(TensorTypeError, match=r"foldprune\.pack"):
        foldprune.packed_matmul(x, packed.unpack())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threads"):
        foldprune.packed_matmul(x, packed, threads=0)


def test_parts_that_do_not_fit() -> None:
    p = foldprune.pack(matrix(70, 90).astype(np.float32))
    with pytest.raises(TensorError, match="mask: expected uint64"):
        Packed((70, 90), p.mask[:-1], p.values)
    with pytest.raises(TensorError, match="mask: expected uint64"):
        Packed((70, 90), p.mask.view(np.int64), p.values)
    with pytest.raises(TensorError, match="the mask keeps"):
        Packed((70, 90), p.mask, p.values[:-1])
    stray = p.mask.copy()
    stray[-1] |= np.uint64(1) << np.uint64(63)  # column 127 of 90
    with pytest.raises(TensorError, match="past the last column"):
        Packed((70, 90), stray, p.values)
    with pytest.raises(TensorError, match="scale"):
        Packed((70, 90), p.mask, p.values, np.ones(70, np.float32))
    with pytest.raises(TensorError, match="scale"):
        Packed((70, 90), p.mask, p.values.astype(np.int8), np.ones(7, np.float32))
    with pytest.raises(TensorTypeError, match="values"):
        Packed((70, 90), p.mask, p.values.astype(np.int32))
    with pytest.raises(ValueError, match="read-only"):
        p.mask[0] = 0


# ---- the pool of threads ------------------------------------------------------------------------


def _product(_: int = 0) -> bytes:
    packed = foldprune.pack(matrix(300, 200).astype(np.float32))
    return foldprune.packed_matmul(normal(100, 200), packed, threads=4).tobytes()


def test_calls_from_many_threads_at_once() -> None:
    expected, found = _product(), []

    def work() -> None:
        found.extend(_product() for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 160


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork"
)
def test_a_forked_process_has_a_pool_of_its_own() -> None:
    expected = _product()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_product, range(4)) == [expected] * 4
