"""How the folds of the C core read what they are given: views, dtypes, threads, bad calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from fold_cases import DTYPES, Heads, make

import foldprune  # noqa: F401  (loads the library that _core is linked to)
from foldprune import _core


def results(heads: Heads, threads: int = 1) -> list[np.ndarray]:
    groups, head_dim = heads[5], heads[0].shape[0] // heads[4]
    plain = (heads[0], None, heads[2], None, heads[4], heads[5])
    scores = _core.rope_scores(heads, False, threads)
    ranks = np.full(groups, 3, np.int32)
    out = [
        _core.irc_spectrum(heads, threads),
        *_core.irc(heads, ranks, True, threads),
        *_core.irc(heads, ranks, False, threads),
        *_core.irc(heads, None, True, threads),
        *_core.dwc_spectrum(plain, threads),
        *_core.dwc_select(plain, None, head_dim, threads),
        *_core.dwc_remainder(plain, ranks, threads),
        scores,
        *_core.rope(heads, False, scores, ranks, True, threads),
    ]
    return [part for part in out if part is not None]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_views_are_read_where_they_lie(dtype):
    """Transposed, fused, interleaved, strided and reversed views give the bytes of their copies."""
    left, bias, right, _, heads, groups = make("grouped", True, dtype=dtype)
    want = results((left, bias, right, None, heads, groups))

    fused = np.concatenate([left, right, right[:3]]).astype(dtype)
    fused_t = np.ascontiguousarray(fused.T)
    wide = np.zeros((left.shape[0], 2 * left.shape[1]), dtype)
    wide[:, 1::2] = left
    backwards = np.ascontiguousarray(right[::-1])
    bias_column = np.zeros((len(bias), 3), dtype)
    bias_column[:, 1] = bias
    for a, b, c in (
        (np.asfortranarray(left), bias, np.asfortranarray(right)),
        (fused[: len(left)], bias, fused[len(left) : len(left) + len(right)]),
        (fused_t[:, : len(left)].T, bias, fused_t.T[len(left) : len(left) + len(right)]),
        (wide[:, 1::2], bias_column[:, 1], backwards[::-1]),
    ):
        got = results((a, b, c, None, heads, groups))
        assert all(reference.same_bytes(x, y) for x, y in zip(want, got, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_dtypes_are_widened_exactly(dtype):
    narrow = make("plain", True, dtype=dtype)
    wide = tuple(x.astype(np.float64) if isinstance(x, np.ndarray) else x for x in narrow)
    for x, y in zip(results(narrow), results(wide), strict=True):
        assert reference.same_bytes(x, y)


@pytest.mark.parametrize("size", ["plain", "grouped"])
@pytest.mark.parametrize("threads", [2, 3, 16])
def test_any_number_of_threads_gives_the_same_bytes(size, threads):
    heads = make(size, True)
    for x, y in zip(results(heads), results(heads, threads), strict=True):
        assert reference.same_bytes(x, y)


def _bad_calls() -> dict[str, tuple[Any, Any]]:
    heads = make("plain", True)
    left, bias, right = heads[:3]
    ranks = np.ones(4, np.int32)
    scores = _core.rope_scores(heads, False)
    return {
        "no tuple": (TypeError, lambda: _core.irc(left, ranks, True)),
        "integers": (
            TypeError,
            lambda: _core.irc_spectrum((left.astype(int), bias, right, None, 4, 4)),
        ),
        "one dimension": (
            ValueError,
            lambda: _core.irc_spectrum((left[0], None, right, None, 4, 4)),
        ),
        "bias of two": (ValueError, lambda: _core.irc_spectrum((left, left, right, None, 4, 4))),
        "short bias": (
            ValueError,
            lambda: _core.irc_spectrum((left, bias[:-1], right, None, 4, 4)),
        ),
        "no heads": (ValueError, lambda: _core.irc_spectrum((left, bias, right, None, 0, 4))),
        "no groups": (ValueError, lambda: _core.irc_spectrum((left, bias, right, None, 4, 0))),
        "negative heads": (
            ValueError,
            lambda: _core.irc_spectrum((left, bias, right, None, -4, 4)),
        ),
        "heads by groups": (
            ValueError,
            lambda: _core.irc_spectrum((left, bias, right, None, 4, 3)),
        ),
        "rows by heads": (ValueError, lambda: _core.irc_spectrum((left, bias, right, None, 5, 5))),
        "rows of right": (
            ValueError,
            lambda: _core.irc_spectrum((left, bias, right[:-1], None, 4, 4)),
        ),
        "no columns": (
            ValueError,
            lambda: _core.irc_spectrum((left, bias, right[:, :0], None, 4, 4)),
        ),
        "rank above": (ValueError, lambda: _core.irc(heads, ranks * 9, True)),
        "negative rank": (ValueError, lambda: _core.irc(heads, -ranks, True)),
        "ranks of int64": (TypeError, lambda: _core.irc(heads, ranks.astype(np.int64), True)),
        "ranks too few": (ValueError, lambda: _core.irc(heads, ranks[:3], True)),
        "remainder above": (ValueError, lambda: _core.dwc_remainder(heads, ranks * 9)),
        "remainder without ranks": (
            (TypeError, ValueError),
            lambda: _core.dwc_remainder(heads, None),
        ),
        "count of zero": (ValueError, lambda: _core.dwc_select(heads, None, 0)),
        "count above": (ValueError, lambda: _core.dwc_select(heads, None, 9)),
        "column above": (
            ValueError,
            lambda: _core.dwc_select(heads, np.full((4, 2), 32, np.int32), 2),
        ),
        "negative column": (
            ValueError,
            lambda: _core.dwc_select(heads, np.full((4, 2), -1, np.int32), 2),
        ),
        "columns too few": (
            ValueError,
            lambda: _core.dwc_select(heads, np.zeros((4, 1), np.int32), 2),
        ),
        "planes above": (ValueError, lambda: _core.rope(heads, False, scores, ranks * 5, True)),
        "scores too few": (ValueError, lambda: _core.rope(heads, False, scores[:2], ranks, True)),
        "scores of float32": (
            TypeError,
            lambda: _core.rope(heads, False, scores.astype(np.float32), ranks, True),
        ),
        "odd head size": (ValueError, lambda: _core.rope_scores(make("odd"), False)),
    }


BAD_CALLS = _bad_calls()


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case):
    kind, call = BAD_CALLS[case]
    with pytest.raises(kind) as error:
        call()
    assert str(error.value)


def test_not_finite_is_an_error_and_not_a_crash():
    left, bias, right, _, heads, groups = make("plain", True)
    right[3, 4] = np.nan
    for call in (
        lambda h: _core.irc(h, None, True),
        lambda h: _core.irc_spectrum(h),
        lambda h: _core.dwc_spectrum((h[0], None, h[2], None, 4, 4)),
        lambda h: _core.dwc_select((h[0], None, h[2], None, 4, 4), None, 8),
    ):
        with pytest.raises(ValueError):
            call((left, bias, right, None, heads, groups))
