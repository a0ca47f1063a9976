"""Sums over the rows of layers' inputs in C, against float64 references written from the
definitions."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from reference_moments import close, rows, second_moment, weights_of

from foldprune import _core

DTYPES = {
    "float32": np.dtype("f4"),
    "float64": np.dtype("f8"),
    "float16": np.dtype("f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# rows past one chunk of rows (512), columns past one tile (192) and one piece (256)
SHAPES = [(1, 1), (3, 7), (7, 193), (511, 5), (513, 64), (1100, 400)]


@pytest.mark.parametrize("kind", ["none", "mask", "weights"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_second_moments(dtype, kind):
    for shape in SHAPES:
        x, w = rows(shape, DTYPES[dtype]), weights_of(kind, shape[0])
        known = np.ones(shape[0]) if w is None else w
        start = np.eye(shape[1])
        second, total = start.copy(), np.ones(shape[1])
        weight, count = _core.moments_update(x, w, second, total)
        assert close(second, start + second_moment(x, known))
        assert np.array_equal(second, second.T)
        assert close(total, 1 + known @ x.astype(np.float64))
        assert weight == pytest.approx(known.sum(), rel=1e-14) and count == (known > 0).sum()


def test_views_of_any_strides():
    x = rows((40, 60))
    for view in (x.T, x[::-1], x[:, ::-1], x[::3, 5:50:4], np.broadcast_to(x[:1], (9, 60))):
        second, total = np.zeros((view.shape[1],) * 2), np.zeros(view.shape[1])
        _core.moments_update(view, None, second, total)
        assert close(second, second_moment(view))
        squares = np.zeros(view.shape[1])
        _core.square_sums(view, None, squares)
        assert close(squares, np.diag(second_moment(view)))
    unaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.uint8)
    odd = np.ndarray((40, 60), np.float32, unaligned.data)
    assert not odd.flags.aligned
    second, total = np.zeros((60, 60)), np.zeros(60)
    _core.moments_update(odd, None, second, total)
    assert close(second, second_moment(x))


@pytest.mark.parametrize("kind", ["none", "weights"])
def test_any_thread_count_gives_the_same_bytes(kind):
    x, w = rows((1300, 450)), weights_of(kind, 1300)
    results = []
    for threads in (1, 2, 3, 8):
        second, total, squares = np.zeros((450, 450)), np.zeros(450), np.zeros(450)
        _core.moments_update(x, w, second, total, threads)
        _core.square_sums(x, w, squares, threads)
        results.append(second.tobytes() + total.tobytes() + squares.tobytes())
    assert len(set(results)) == 1


def test_long_sums_keep_float64():
    # float32 sums of 200,000 squares near 1e8 would be off by 1e-3 or so
    x = (1e4 + rows((200_000, 2))).astype(np.float32)
    second, total = np.zeros((2, 2)), np.zeros(2)
    _core.moments_update(x, None, second, total)
    wide = x.astype(np.longdouble)
    assert close(second, (wide.T @ wide).astype(np.float64), 1e-13)
    assert close(total, wide.sum(0).astype(np.float64), 1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_square_sums(dtype):
    for shape in SHAPES:
        x, w = rows(shape, DTYPES[dtype]), weights_of("weights", shape[0])
        squares = np.ones(shape[1])
        weight, count = _core.square_sums(x, w, squares)
        assert close(squares, 1 + w @ x.astype(np.float64) ** 2)
        assert weight == pytest.approx(w.sum()) and count == (w > 0).sum()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e160])
@pytest.mark.parametrize("column", [0, 299])
def test_nothing_is_added_where_a_value_is_bad(bad, column):
    x = rows((900, 300), "f8")
    x[870, column] = bad
    w = np.ones(900)
    second, total, squares = np.eye(300), np.ones(300), np.ones(300)
    for weights in (None, w):
        assert _core.check_rows(x, weights, 2) == 870
        with pytest.raises(ValueError, match="NaN, infinite or too large"):
            _core.moments_update(x, weights, second, total)
        with pytest.raises(ValueError, match="NaN, infinite or too large"):
            _core.square_sums(x, weights, squares)
    assert np.array_equal(second, np.eye(300)) and (total == 1).all() and (squares == 1).all()
    w[870] = 0  # padding may hold anything
    assert _core.check_rows(x, w) == -1
    _core.moments_update(x, w, second, total)
    assert np.isfinite(second).all() and np.isfinite(total).all()
    assert close(second, np.eye(300) + second_moment(np.delete(x, 870, 0)))


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_bad_weights_are_refused(bad):
    x, w = rows((5, 3)), np.array([1, 1, 1, bad, 1])
    second, total, counts = np.zeros((3, 3)), np.zeros(3), np.zeros(9)
    assert _core.check_rows(x, w) == 3
    for call in (
        lambda: _core.moments_update(x, w, second, total),
        lambda: _core.square_sums(x, w, total),
        lambda: _core.count_rows(np.arange(5), w, counts),
    ):
        with pytest.raises(ValueError, match="negative"):
            call()
    assert not second.any() and not total.any() and not counts.any()


def test_row_counts():
    ids = np.random.default_rng(0).integers(0, 17, 400)
    counts = np.ones(17)
    assert _core.count_rows(ids, None, counts) == 400
    assert np.array_equal(counts, 1 + np.bincount(ids, minlength=17))
    w = weights_of("mask", 400)
    ids[w == 0] = -100
    counts = np.zeros(17)
    assert _core.count_rows(ids, w, counts) == w.sum()
    assert np.array_equal(counts, np.bincount(ids[w > 0], minlength=17))
    for bad in (-1, 17, 2**40):
        with pytest.raises(ValueError, match="out of range"):
            _core.count_rows(np.array([3, bad]), None, counts)
    assert counts.sum() == w.sum()


def test_arguments_of_the_core():
    x, second, total = rows((4, 3)), np.zeros((3, 3)), np.zeros(3)
    frozen = np.zeros((3, 3))
    frozen.flags.writeable = False
    for error, arguments in [
        (ValueError, (x, None, frozen, total)),
        (ValueError, (x, None, np.zeros((3, 4)), total)),
        (ValueError, (x, None, second, np.zeros(4))),
        (ValueError, (x, None, second.astype(np.float32), total)),
        (ValueError, (x, None, np.zeros((6, 6))[::2, ::2], total)),
        (ValueError, (x, np.ones(3), second, total)),
        (TypeError, (x, np.ones(4, np.float32), second, total)),
        (ValueError, (x[0], None, second, total)),
        (ValueError, (x.astype(">f4"), None, second, total)),
        (TypeError, (x.astype(np.int32), None, second, total)),
        (TypeError, (x.tolist(), None, second, total)),
    ]:
        with pytest.raises(error):
            _core.moments_update(*arguments)
    with pytest.raises(TypeError):
        _core.count_rows(np.arange(3, dtype=np.int32), None, total)
    with pytest.raises(ValueError):
        _core.count_rows(np.arange(3), None, second)
    assert not second.any() and not total.any()
    assert _core.moments_update(x[:0], None, second, total) == (0.0, 0)
