"""The C core's pruning and packing against references."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

import foldprune  # noqa: F401  (loads the library that _core is linked to)
from foldprune import _core

DTYPES = {
    "float32": np.dtype("f4"),
    "float64": np.dtype("f8"),
    "float16": np.dtype("f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
SHAPES = [(1, 1), (1, 7), (9, 1), (3, 5), (7, 8), (16, 16), (13, 63), (65, 129), (301, 257)]
# more than one chunk of work for two threads
LARGE = (700, 301)


def variant(isa: str) -> str:
    """The name, if it can be tried here. What the processor has must have been compiled."""
    compiled, supported = _core.isas()[isa]
    if not supported:
        pytest.skip(f"this processor has no {isa}")
    assert compiled, f"{isa} is supported here but was not compiled"
    return isa


def matrix(shape: tuple[int, ...], dtype: Any, kind: str = "normal", seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, *shape])
    x = rng.standard_normal(shape)
    if kind == "zeros":
        x[rng.random(shape) < 0.7] = 0.0
        x[rng.random(shape) < 0.2] = -0.0
    elif kind == "equal":
        x[:] = np.where(x < 0, -0.75, 0.75)
    elif kind == "few":
        x = np.round(2 * x) / 4
    elif kind == "wide":
        x = x * 10.0 ** rng.integers(-6, 4, shape)
    return x.astype(dtype)


KINDS = ["normal", "zeros", "equal", "few", "wide"]


def counts(n: int) -> list[int]:
    return sorted({0, 1, n // 3, n // 2, n - 1, n} & set(range(n + 1)))


def masks(scored: list[tuple[np.ndarray, float, Any]], k: int, **options: Any) -> list[np.ndarray]:
    """The masks of one selection, as bits."""
    score, ties = _core.select(scored, k, **options)
    out = []
    for one in scored:
        mask, used = _core.mask_threshold(one, score, ties, **options)
        ties -= used
        out.append(mask)
    assert ties == 0
    return out


# ---- selection and masks ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_selection_removes_the_lowest(dtype, kind):
    for shape in SHAPES:
        x = matrix(shape, DTYPES[dtype], kind)
        for k in counts(x.size):
            (mask,) = masks([(x, 1.0, None)], k)
            (want,) = reference.keep_lowest_removed([reference.scores(x)], k)
            assert np.array_equal(mask, reference.bits(want)), (shape, k)
            assert _core.mask_count(mask, x.size) == x.size - k


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_weigh_the_scores(dtype):
    rng = np.random.default_rng(3)
    for shape in SHAPES:
        x = matrix(shape, DTYPES[dtype], "few")
        columns = (rng.integers(0, 5, shape[1]) / 2).astype(np.float32)
        for scale, col_scale in ((0.3, None), (1.0, columns), (2.7, columns), (0.0, None)):
            s = reference.scores(x, scale, col_scale)
            k = x.size // 2
            (mask,) = masks([(x, scale, col_scale)], k)
            (want,) = reference.keep_lowest_removed([s], k)
            assert np.array_equal(mask, reference.bits(want)), (shape, scale)


@pytest.mark.parametrize("with_double", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_matrices_of_mixed_dtypes_compete(with_double, threads):
    names = ["float32", "float16", "bfloat16", "float32"]
    names += ["float64"] if with_double else []
    rng = np.random.default_rng(5)
    scored = []
    for i, name in enumerate(names):
        x = matrix((20 + i, 33), DTYPES[name], "few", seed=i)
        col_scale = rng.random(33).astype(np.float32).round(1) if i % 2 else None
        scored.append((x, 0.5 + i / 4, col_scale))
    all_scores = [reference.scores(*one) for one in scored]
    total = sum(s.size for s in all_scores)
    for k in (0, 1, total // 4, total // 2, total - 1, total):
        got = masks(scored, k, threads=threads)
        for mask, want in zip(got, reference.keep_lowest_removed(all_scores, k), strict=True):
            assert np.array_equal(mask, reference.bits(want))


def test_float64_is_told_apart_beyond_float32():
    x = np.array([[1.0, 1.0 + 1e-12, 1.0 - 1e-12, 1.0 + 2e-12]])
    for k, kept in ((1, [0, 1, 3]), (2, [1, 3]), (3, [3])):
        (mask,) = masks([(x, 1.0, None)], k)
        assert np.flatnonzero(reference.unbits(mask, (4,))).tolist() == kept
    (rows,) = [_core.mask_rows((x, 1.0, None), 2)]
    assert np.flatnonzero(reference.unbits(rows, (4,))).tolist() == [1, 3]
    assert np.flatnonzero(reference.unbits(_core.mask_nm((x, 1.0, None), 2, 4), (4,))).tolist() == [
        1,
        3,
    ]


def test_an_empty_selection():
    assert _core.select([], 0) == (0.0, 0)
    empty = np.zeros((0, 4), np.float32)
    (mask,) = masks([(empty, 1.0, None)], 0)
    assert mask.size == 0


@pytest.mark.parametrize("kind", ["normal", "few", "equal"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(dtype, kind):
    for shape in SHAPES:
        x = matrix(shape, DTYPES[dtype], kind)
        for k in counts(shape[1]):
            for threads in (1, 2):
                mask = _core.mask_rows((x, 1.0, None), k, threads)
                want = reference.keep_rows(reference.scores(x), k)
                assert np.array_equal(mask, reference.bits(want)), (shape, k)
    columns = np.random.default_rng(0).random(257).astype(np.float32)
    x = matrix((301, 257), DTYPES[dtype], kind)
    want = reference.keep_rows(reference.scores(x, 2.0, columns), 100)
    assert np.array_equal(_core.mask_rows((x, 2.0, columns), 100), reference.bits(want))


@pytest.mark.parametrize("kind", ["normal", "few", "equal"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_n_of_m(dtype, kind):
    for shape in SHAPES:
        x = matrix(shape, DTYPES[dtype], kind)
        for n, m in ((2, 4), (1, 4), (4, 8), (3, 7), (1, 1), (64, 64), (5, 64)):
            for threads in (1, 2):
                mask = _core.mask_nm((x, 1.0, None), n, m, threads)
                want = reference.keep_nm(reference.scores(x), n, m)
                assert np.array_equal(mask, reference.bits(want)), (shape, n, m)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks(dtype):
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        x = matrix(shape, DTYPES[dtype])
        columns = rng.random(shape[1]).astype(np.float32)
        for rows, cols in ((1, 1), (4, 1), (1, 4), (3, 5), (16, 16), (1, shape[1]), (1000, 1000)):
            for threads in (1, 2):
                got = _core.block_scores((x, 1.5, columns), rows, cols, threads)
                want = reference.block_rms(reference.scores(x, 1.5, columns), rows, cols)
                assert got.dtype == np.float32 and got.shape == want.shape
                np.testing.assert_allclose(got, want, rtol=1e-6, atol=0)
                keep = rng.random(want.shape) < 0.5
                full = _core.mask_blocks(reference.bits(keep), *shape, rows, cols, threads)
                assert np.array_equal(
                    full, reference.bits(reference.expand_blocks(keep, shape, rows, cols))
                )


@pytest.mark.parametrize("dtype", DTYPES)
def test_energy(dtype):
    x = matrix(LARGE, DTYPES[dtype], "wide")
    columns = np.random.default_rng(0).random(LARGE[1]).astype(np.float32)
    plain = (x.astype(np.float64) ** 2).sum()
    weighed = ((x.astype(np.float64) * columns) ** 2).sum()
    for threads in (1, 2, 5):
        assert _core.energy((x, 1.0, None), threads) == pytest.approx(plain, rel=1e-12)
        assert _core.energy((x, 1.0, None), threads) == _core.energy((x, 1.0, None))
        assert _core.energy((x, 1.0, columns), threads) == pytest.approx(weighed, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_histogram(dtype):
    x, y = matrix(LARGE, DTYPES[dtype], "wide"), matrix((5, 7), np.float32)
    scores = [reference.scores(x, 0.7), reference.scores(y)]
    want = np.zeros(1 << 15, np.int64)
    for s in scores:
        bins = s.astype(np.float32).view(np.uint32).ravel() >> 16
        want += np.bincount(bins, minlength=1 << 15)
    for threads in (1, 2):
        got = _core.histogram([(x, 0.7, None), (y, 1.0, None)], threads)
        assert np.array_equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_finite(dtype):
    for size in (0, 1, 7, 8, 31, 1000, LARGE[0] * LARGE[1]):
        x = matrix((size,), DTYPES[dtype])
        assert _core.all_finite(x) and _core.all_finite(x, 2)
        for value in (np.nan, np.inf, -np.inf):
            for place in {0, size // 2, size - 1} if size else ():
                bad = x.copy()
                bad[place] = value
                assert not _core.all_finite(bad) and not _core.all_finite(bad, 2)
    largest = np.full(9, ml_dtypes.finfo(DTYPES[dtype]).max).astype(DTYPES[dtype])
    assert _core.all_finite(largest)


# ---- packing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_and_unpack(dtype, isa):
    isa = variant(isa)
    rng = np.random.default_rng(0)
    for n in [*range(70), 127, 128, 129, 1000, 4099, LARGE[0] * LARGE[1]]:
        for density in (0.0, 0.02, 0.3, 0.97, 1.0):
            keep = rng.random(n) < density
            x = matrix((n,), DTYPES[dtype], "zeros", seed=n)
            mask = reference.bits(keep)
            for threads in (1, 2):
                values = _core.pack(x, mask, threads, isa)
                assert reference.same_bytes(values, x[keep])
                want = np.where(keep, x, np.zeros(1, x.dtype))
                got = _core.unpack(values, mask, (n,), threads, isa)
                assert reference.same_bytes(got, want)


@pytest.mark.parametrize("isa", _core.isas())
def test_unaligned_bases(isa):
    """Slices that begin anywhere: aligned to the element, not to a vector."""
    isa = variant(isa)
    for name, dtype in DTYPES.items():
        whole = matrix((600,), dtype)
        keep = np.random.default_rng(1).random(600) < 0.4
        for begin in range(17):
            x = whole[begin : begin + 500]
            mask = np.zeros(80, np.uint8)
            mask[begin % 8 :][:63] = reference.bits(keep[:500])
            view = mask[begin % 8 :][:63]
            values = _core.pack(x, view, 1, isa)
            assert reference.same_bytes(values, x[keep[:500]]), name
            shifted = np.concatenate([np.zeros(begin, dtype), values])[begin:]
            got = _core.unpack(shifted, view, (500,), 1, isa)
            assert reference.same_bytes(got, np.where(keep[:500], x, np.zeros(1, dtype)))


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_variant_selects_the_same_bytes(dtype, isa):
    isa = variant(isa)
    columns = np.random.default_rng(2).random(LARGE[1]).astype(np.float32)
    for kind in KINDS:
        for shape in [(1, 5), (7, 8), (13, 63), LARGE]:
            x = matrix(shape, DTYPES[dtype], kind)
            for col_scale in (None, columns[: shape[1]]):
                scored = [(x, 1.0, col_scale)]
                for k in (0, x.size // 3, x.size // 2, x.size):
                    want = _core.select(scored, k, isa="scalar")
                    plain = _core.mask_threshold(scored[0], *want, isa="scalar")
                    for threads in (1, 2):
                        got = _core.select(scored, k, threads=threads, isa=isa)
                        assert got == want
                        mask = _core.mask_threshold(scored[0], *got, threads=threads, isa=isa)
                        assert mask[0].tobytes() == plain[0].tobytes() and mask[1] == plain[1]


def test_every_half_converts_alike():
    """All 65,536 float16 patterns but NaN: subnormals, both zeros, infinities."""
    x = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    x = x[~np.isnan(x)]
    for isa, (compiled, supported) in _core.isas().items():
        if not (compiled and supported):
            continue
        for k in (1, 30_000, 60_000):
            score, ties = _core.select([(x, 1.0, None)], k, isa=isa)
            s = np.sort(np.abs(x.astype(np.float32)))
            assert score == s[k - 1]
            mask, _ = _core.mask_threshold((x, 1.0, None), score, ties, isa=isa)
            (want,) = reference.keep_lowest_removed([reference.scores(x)], k)
            assert np.array_equal(mask, reference.bits(want))


@pytest.mark.parametrize("threads", [1, 2, 3, 8, 64])
def test_any_number_of_threads_gives_the_same_bytes(threads):
    for kind in ("normal", "equal", "zeros"):
        scored = [
            (matrix(LARGE, dtype, kind), 1.0 + i, None) for i, dtype in enumerate(DTYPES.values())
        ]
        total = sum(x.size for x, _, _ in scored)
        for chosen in (scored[:1], scored[2:], scored):
            k = total // 5
            one, many = masks(chosen, k, threads=1), masks(chosen, k, threads=threads)
            assert all(a.tobytes() == b.tobytes() for a, b in zip(one, many, strict=True))
        for i, (x, _, _) in enumerate(scored):
            mask = masks(scored, k)[i]
            values = _core.pack(x, mask, threads)
            assert reference.same_bytes(values, _core.pack(x, mask, 1))
            assert reference.same_bytes(
                _core.unpack(values, mask, x.shape, threads), _core.unpack(values, mask, x.shape, 1)
            )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_round_trips(data):
    name = data.draw(st.sampled_from(sorted(DTYPES)))
    rows, cols = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 90))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    density = data.draw(st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.9, 1.0]))
    keep = rng.random((rows, cols)) < density
    bytes_each = DTYPES[name].itemsize
    raw = rng.integers(0, 256, rows * cols * bytes_each, dtype=np.uint8)
    x = raw.view(DTYPES[name]).reshape(rows, cols)  # any bits at all: NaN payloads survive too
    threads = data.draw(st.integers(1, 3))
    names = [isa for isa, both in _core.isas().items() if all(both)]
    packing, unpacking = data.draw(st.sampled_from(names)), data.draw(st.sampled_from(names))
    mask = reference.bits(keep)
    values = _core.pack(x, mask, threads, packing)
    assert values.tobytes() == np.ascontiguousarray(x[keep]).tobytes()
    dense = _core.unpack(values, mask, (rows, cols), threads, unpacking)
    assert dense.shape == x.shape and dense.dtype == x.dtype
    assert dense[keep].tobytes() == values.tobytes()
    assert not dense[~keep].view(np.uint8).any() if (~keep).any() else True


# ---- bad input ----------------------------------------------------------------------------------


def test_corrupt_masks_and_values():
    x = matrix((11,), np.float32)
    mask = reference.bits(np.arange(11) % 2 == 0)
    values = _core.pack(x, mask)
    assert values.size == 6
    for wrong in (mask[:1], np.append(mask, np.uint8(0)), np.zeros(0, np.uint8)):
        for call in (
            lambda m: _core.pack(x, m),
            lambda m: _core.unpack(values, m, (11,)),
            lambda m: _core.mask_count(m, 11),
        ):
            with pytest.raises(ValueError):
                call(wrong)
    for bit in range(3, 8):
        padded = mask.copy()
        padded[1] |= 1 << bit
        for call in (_core.pack, _core.mask_count):
            with pytest.raises(ValueError):
                call(x if call is _core.pack else padded, padded if call is _core.pack else 11)
        with pytest.raises(ValueError):
            _core.unpack(np.append(values, np.float32(1)), padded, (11,))
    for wrong_values in (values[:-1], np.append(values, np.float32(0)), values[:0]):
        with pytest.raises(ValueError):
            _core.unpack(wrong_values, mask, (11,))
    for shape in ((8,), (17,), (3, 6), (1 << 62, 1 << 62), (-11,), (0,)):
        with pytest.raises(ValueError):
            _core.unpack(values, mask, shape)


X = np.ones((6, 8), np.float32)
MASK = np.full(6, 255, np.uint8)
BAD_CALLS: dict[str, Any] = {
    "integers": (TypeError, lambda: _core.all_finite(np.ones(3, np.int32))),
    "complex": (TypeError, lambda: _core.energy((np.ones((2, 2), np.complex64), 1.0, None))),
    "longdouble": (TypeError, lambda: _core.all_finite(np.ones(3, np.longdouble))),
    "a list": (TypeError, lambda: _core.all_finite([1.0])),
    "no array": (TypeError, lambda: _core.pack(None, MASK)),
    "swapped bytes": (ValueError, lambda: _core.all_finite(X.astype(">f4"))),
    "transposed": (ValueError, lambda: _core.pack(X.T, MASK)),
    "strided": (ValueError, lambda: _core.all_finite(X[:, ::2])),
    "reversed": (ValueError, lambda: _core.select([(X[::-1], 1.0, None)], 1)),
    "unaligned": (
        ValueError,
        lambda: _core.all_finite(np.zeros(9, np.uint8)[1:].view(np.float32)),
    ),
    "mask of bools": (TypeError, lambda: _core.pack(X, MASK.astype(bool))),
    "mask of int8": (TypeError, lambda: _core.unpack(X, MASK.view(np.int8), (6, 8))),
    "strided mask": (ValueError, lambda: _core.pack(X, np.full(12, 255, np.uint8)[::2])),
    "k above n": (ValueError, lambda: _core.select([(X, 1.0, None)], 49)),
    "negative k": ((ValueError, OverflowError), lambda: _core.select([(X, 1.0, None)], -1)),
    "k beyond 64 bits": (
        (ValueError, OverflowError),
        lambda: _core.select([(X, 1.0, None)], 1 << 64),
    ),
    "k of another type": (TypeError, lambda: _core.select([(X, 1.0, None)], 1.5)),
    "row k above cols": (ValueError, lambda: _core.mask_rows((X, 1.0, None), 9)),
    "negative scale": (ValueError, lambda: _core.select([(X, -1.0, None)], 1)),
    "infinite scale": (ValueError, lambda: _core.select([(X, np.inf, None)], 1)),
    "NaN scale": (ValueError, lambda: _core.select([(X, np.nan, None)], 1)),
    "short col_scale": (
        ValueError,
        lambda: _core.select([(X, 1.0, np.ones(7, np.float32))], 1),
    ),
    "float64 col_scale": (TypeError, lambda: _core.select([(X, 1.0, np.ones(8))], 1)),
    "no tuple": (TypeError, lambda: _core.select([X], 1)),
    "no list": (TypeError, lambda: _core.select((X, 1.0, None), 1)),
    "half a tuple": (TypeError, lambda: _core.energy((X, 1.0))),
    "n of zero": (ValueError, lambda: _core.mask_nm((X, 1.0, None), 0, 4)),
    "n above m": (ValueError, lambda: _core.mask_nm((X, 1.0, None), 5, 4)),
    "m above 64": (ValueError, lambda: _core.mask_nm((X, 1.0, None), 1, 65)),
    "negative n": ((ValueError, OverflowError), lambda: _core.mask_nm((X, 1.0, None), -1, 4)),
    "no block": (ValueError, lambda: _core.block_scores((X, 1.0, None), 0, 1)),
    "negative block": (
        (ValueError, OverflowError),
        lambda: _core.block_scores((X, 1.0, None), 1, -1),
    ),
    "short block mask": (
        ValueError,
        lambda: _core.mask_blocks(np.zeros(1, np.uint8), 40, 40, 2, 2),
    ),
    "unknown variant": ((RuntimeError, ValueError), lambda: _core.pack(X, MASK, 1, "sse9")),
    "unknown keyword": (TypeError, lambda: _core.pack(X, MASK, cores=2)),
    "too few arguments": (TypeError, lambda: _core.pack(X)),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case):
    kind, call = BAD_CALLS[case]
    with pytest.raises(kind) as error:
        call()
    assert str(error.value)


@pytest.mark.parametrize("threads", [0, -5, 10**6])
def test_odd_thread_counts_still_compute(threads):
    assert _core.all_finite(X, threads)
    assert reference.same_bytes(_core.pack(X, MASK, threads), X.ravel())
