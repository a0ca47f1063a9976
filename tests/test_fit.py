"""FPP with update: the OBS sweep, exact least squares and damage against float64 NumPy references
written from their definitions."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from reference import bits, unbits

import foldprune  # noqa: F401  (loads the library that _core is linked to)
from foldprune import _core

SHAPES = [(1, 1), (1, 9), (9, 1), (13, 31), (100, 40), (97, 200), (192, 300)]
RULES = ["block", "row", "threshold", "n:m", "given"]


def statistics(d: int, seed: int = 0, damping: float = 0.01) -> np.ndarray:
    """A damped second moment of correlated inputs with a decaying spectrum."""
    rng = np.random.default_rng([seed, d])
    basis = np.linalg.qr(rng.standard_normal((d, d)))[0]
    x = (rng.standard_normal((3 * d, d)) * np.logspace(0, -2, d)) @ basis
    c = x.T @ x / len(x)
    return c + damping * np.trace(c) / d * np.eye(d)


def weights(shape: tuple[int, int], dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def cumulative(count: int, begin: int, end: int, d: int) -> int:
    """Of count per d columns, those of [begin, end), rounded such that the sum is exact."""
    return (2 * count * end + d) // (2 * d) - (2 * count * begin + d) // (2 * d)


def lowest(prices: np.ndarray, k: int) -> np.ndarray:
    """True for the k lowest, the first of equal ones."""
    out = np.zeros(prices.size, bool)
    out[np.argsort(prices.ravel(), kind="stable")[:k]] = True
    return out.reshape(prices.shape)


def sparsegpt(
    w: np.ndarray,
    h: np.ndarray,
    rule: str,
    amount: Any,
    block: int = 128,
    row_weight: np.ndarray | None = None,
    keep: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Frantar & Alistarh 2023, algorithm 1, with U upper and inv(h) = U^T U; n:m as in section 3.4.
    The rules that the paper has not are this project's."""
    w = w.astype(np.float64)
    rows, d = w.shape
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    diagonal = np.diag(u)
    weight = np.ones(rows) if row_weight is None else row_weight
    keep = np.ones(w.shape, bool) if keep is None else keep.copy()
    if rule == "n:m":
        block = -(-min(block, d) // amount[1]) * amount[1]
    for begin in range(0, d, block):
        end = min(begin + block, d)
        price = weight[:, None] * (w[:, begin:end] / diagonal[begin:end]) ** 2
        if rule == "block":
            keep[:, begin:end] = ~lowest(price, cumulative(amount, begin, end, d))
        elif rule == "row":
            k = cumulative(amount, begin, end, d)
            keep[:, begin:end] = [~lowest(row, k) for row in price]
        elif rule == "threshold":
            keep[:, begin:end] = price >= amount
        for j in range(begin, end):
            if rule == "n:m" and (j - begin) % amount[1] == 0:
                group = slice(j, min(j + amount[1], end))
                price = (w[:, group] / diagonal[group]) ** 2
                keep[:, group] = [lowest(-row, amount[0]) for row in price]
            q = np.where(keep[:, j], w[:, j], 0.0)
            w[:, j + 1 :] -= np.outer((w[:, j] - q) / diagonal[j], u[j, j + 1 :])
            w[:, j] = q
    return keep, w


def least_squares(keep: np.ndarray, h: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    out = np.zeros(keep.shape)
    for row, support, b in zip(out, keep, rhs, strict=True):
        row[support] = np.linalg.solve(h[np.ix_(support, support)], b[support])
    return out


def amount_for(rule: str, shape: tuple[int, int], rate: float = 0.6) -> Any:
    if rule == "block":
        return int(rate * shape[0] * shape[1])
    return {"row": int(rate * shape[1]), "threshold": 0.01, "n:m": (2, 4), "given": None}[rule]


# ---- factor -------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 31, 127, 128, 129, 300, 576])
def test_factor_is_udu(d):
    h = statistics(d)
    a, diagonal = _core.obs_factor(h, 2)
    assert a.dtype == np.float32 and diagonal.dtype == np.float64
    assert not np.tril(a).any()
    unit = a.astype(np.float64) + np.eye(d)
    np.testing.assert_allclose((unit * diagonal) @ unit.T, h, rtol=0, atol=1e-7 * np.abs(h).max())
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    np.testing.assert_allclose(diagonal, np.diag(u) ** -2.0, rtol=1e-9)


def test_a_rank_deficient_moment_needs_damping():
    x = weights((20, 50), np.float64)
    c = x.T @ x / 20
    w, mask = weights((3, 50)), bits(np.ones((3, 50), bool))
    with pytest.raises(ValueError, match="positive definite: raise the damping"):
        _core.obs_factor(c - 1e-9 * np.eye(50))
    for kept in (range(40), range(49)):  # solved by what is kept, by what is removed
        keep = np.zeros((3, 50), bool)
        keep[:, list(kept)] = True
        with pytest.raises(ValueError, match="positive definite: raise the damping"):
            _core.refit(w, bits(keep), c - 1e-9 * np.eye(50))
    h = c + 1e-3 * np.eye(50)
    a, d = _core.obs_factor(h)
    mask, swept = _core.obs_sweep(w, a, d, "block", 75)
    keep, want = sparsegpt(w, h, "block", 75)
    assert np.array_equal(unbits(mask, w.shape), keep)
    np.testing.assert_allclose(swept, want, atol=1e-4)


# ---- sweep --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sweep_is_sparsegpt(shape, rule):
    h, w = statistics(shape[1]), weights(shape)
    a, d = _core.obs_factor(h)
    given = np.random.default_rng(1).random(shape) < 0.4 if rule == "given" else None
    amount = amount_for(rule, shape)
    mask = None if given is None else bits(given)
    for block in (128, 24, 1000):
        keep, want = sparsegpt(w, h, rule, amount, block, keep=given)
        got, swept = _core.obs_sweep(w, a, d, rule, amount, mask=mask, block_cols=block)
        assert np.array_equal(unbits(got, shape), keep)
        assert got.size == (w.size + 7) // 8 and _core.mask_count(got, w.size) == keep.sum()
        np.testing.assert_allclose(swept, want, atol=2e-5)
        assert not swept[~keep].any()
        only, none = _core.obs_sweep(w, a, d, rule, amount, mask=mask, block_cols=block, out=False)
        assert none is None and np.array_equal(only, got)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block", [16, 100, 128])
def test_any_number_of_threads_gives_the_same_bytes(rule, block):
    shape = (333, 210)
    h, w = statistics(shape[1]), weights(shape)
    given = bits(np.random.default_rng(1).random(shape) < 0.4) if rule == "given" else None
    results = []
    for threads in (1, 2, 3, 8):
        a, d = _core.obs_factor(h, threads)
        mask, swept = _core.obs_sweep(
            w, a, d, rule, amount_for(rule, shape), None, given, block, threads=threads
        )
        refitted = _core.refit(w, mask, h, threads=threads)
        damage = _core.damage(w, refitted, h, threads)
        better = _core.swap(w, mask, h, 2, threads=threads)
        arrays = (a, d, mask, swept, refitted, *damage, *better)
        results.append([x.tobytes() for x in arrays])
    assert results[1:] == results[:-1]


def test_counts_are_exact_at_the_ends():
    shape = (50, 140)
    h, w = statistics(shape[1]), weights(shape)
    a, d = _core.obs_factor(h)
    for k in (0, 1, 77, w.size - 1, w.size):
        mask, swept = _core.obs_sweep(w, a, d, "block", k, block_cols=33)
        assert _core.mask_count(mask, w.size) == w.size - k
        if k == 0:
            assert np.array_equal(swept, w)
    for k in (0, 1, 77, 139, 140):
        mask, _ = _core.obs_sweep(w, a, d, "row", k, block_cols=33)
        assert (unbits(mask, shape).sum(axis=1) == 140 - k).all()


@pytest.mark.parametrize("rule", ["block", "row"])
def test_of_equal_prices_the_first_go(rule):
    h = np.diag([1.0, 4.0] * 100)  # no correlation: nothing moves
    rng = np.random.default_rng(2)
    w = rng.integers(-2, 3, (211, 200)).astype(np.float32)
    a, d = _core.obs_factor(h)
    for rate in (0.05, 0.5, 0.9):
        amount = amount_for(rule, w.shape, rate)
        for threads in (1, 2):
            mask, swept = _core.obs_sweep(w, a, d, rule, amount, block_cols=48, threads=threads)
            keep, want = sparsegpt(w, h, rule, amount, 48)
            assert np.array_equal(unbits(mask, w.shape), keep)
            assert np.array_equal(swept, want)


@pytest.mark.parametrize("n, m", [(1, 1), (1, 2), (2, 4), (4, 8), (3, 7), (5, 64)])
def test_n_of_m(n, m):
    shape = (20, 150)
    h, w = statistics(shape[1]), weights(shape)
    a, d = _core.obs_factor(h)
    mask, swept = _core.obs_sweep(w, a, d, "n:m", (n, m))
    keep, want = sparsegpt(w, h, "n:m", (n, m))
    assert np.array_equal(unbits(mask, shape), keep)
    np.testing.assert_allclose(swept, want, atol=2e-5)
    whole = keep[:, : 150 // m * m].reshape(20, -1, m).sum(axis=2)
    assert (whole == n).all()


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_row_weights_decide_between_rows(scale):
    shape = (120, 150)
    h, w = statistics(shape[1]), weights(shape)
    weight = scale * np.exp(2 * np.random.default_rng(3).standard_normal(shape[0]))
    a, d = _core.obs_factor(h * scale)
    for rule, amount in (("block", 9000), ("threshold", 0.02 * scale * scale)):
        mask, _ = _core.obs_sweep(w, a, d, rule, amount, weight)
        keep, _ = sparsegpt(w, h * scale, rule, amount, row_weight=weight)
        assert np.array_equal(unbits(mask, shape), keep)
        assert np.ptp(keep.sum(axis=1)) > 30
    mask, _ = _core.obs_sweep(w, a, d, "block", 9000, np.zeros(120))
    assert _core.mask_count(mask, w.size) == 9000


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", ml_dtypes.bfloat16])
def test_dtypes(dtype):
    shape = (40, 130)
    h, w = statistics(shape[1]), weights(shape).astype(dtype)
    a, d = _core.obs_factor(h)
    mask, swept = _core.obs_sweep(w, a, d, "block", 3000)
    keep, want = sparsegpt(w, h, "block", 3000)
    assert swept.dtype == np.float32
    assert np.array_equal(unbits(mask, shape), keep)
    np.testing.assert_allclose(swept, want, atol=2e-5)
    refitted = _core.refit(w, mask, h)
    exact = least_squares(keep, h, w.astype(np.float64) @ h)
    if np.dtype(dtype) == np.float64:
        assert refitted.dtype == np.float64
        np.testing.assert_allclose(refitted, exact, atol=1e-10)
    else:
        assert np.array_equal(refitted, refitted.astype(np.float32))
        np.testing.assert_allclose(refitted, exact, rtol=1e-6, atol=1e-9)


# ---- least squares ------------------------------------------------------------------------------


def supports(shape: tuple[int, int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([4, *shape])
    some = rng.random(shape) < rng.random((shape[0], 1))  # few and many kept, row by row
    return {
        "few": rng.random(shape) < 0.3,
        "many": rng.random(shape) < 0.8,
        "some": some,
        "none": np.zeros(shape, bool),
        "all": np.ones(shape, bool),
        "one support": np.broadcast_to(some[-1], shape),
        "runs": np.repeat(some[::3], 3, axis=0)[: shape[0]],
    }


@pytest.mark.parametrize("kind", supports((1, 1)))
@pytest.mark.parametrize("shape", SHAPES)
def test_refit_is_least_squares(shape, kind):
    h, w = statistics(shape[1]), weights(shape, np.float64)
    keep = supports(shape)[kind]
    rhs = weights(shape, np.float64, seed=6)
    for target, given in ((w @ h, None), (rhs, rhs)):
        got = _core.refit(w, bits(keep), h, given, threads=2)
        np.testing.assert_allclose(got, least_squares(keep, h, target), rtol=1e-9, atol=1e-10)
        assert not got[~keep].any()
    if kind == "all":
        assert np.array_equal(_core.refit(w, bits(keep), h), w)


def test_refit_is_the_best_there_is():
    """No step inside the support is cheaper, and the sweep's own weights cost more."""
    shape = (60, 144)
    h, w = statistics(shape[1]), weights(shape, np.float64)
    a, d = _core.obs_factor(h)
    mask, swept = _core.obs_sweep(w, a, d, "block", int(0.7 * w.size))
    refitted = _core.refit(w, mask, h)
    cost, _ = _core.damage(w, refitted, h)
    rng = np.random.default_rng(0)
    for _ in range(5):
        step = 1e-3 * rng.standard_normal(shape) * unbits(mask, shape)
        assert (_core.damage(w, refitted + step, h)[0] > cost).all()
    assert (_core.damage(w, swept, h)[0] > cost).all()


# ---- exchanges ----------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.parametrize("kind", ["few", "many", "some", "none", "all"])
@pytest.mark.parametrize("shape", SHAPES)
def test_swaps_only_lower_the_cost(shape, kind, group):
    h, w = statistics(shape[1]), weights(shape, np.float64)
    keep = supports(shape)[kind]
    rhs = weights(shape, np.float64, seed=6)
    for target, given in ((w @ h, None), (rhs, rhs)):
        last = -np.einsum("ij,ij->i", least_squares(keep, h, target), target)
        for rounds in (1, 2, 5):
            mask, fitted = _core.swap(w, bits(keep), h, rounds, group, given, threads=2)
            support = unbits(mask, shape)
            assert np.array_equal(support.sum(axis=1), keep.sum(axis=1))
            exact = least_squares(support, h, target)
            np.testing.assert_allclose(fitted, exact, rtol=1e-9, atol=1e-10)
            cost = -np.einsum("ij,ij->i", exact, target)
            assert (cost <= last + 1e-9 * np.abs(last)).all()
            if group:
                for begin in range(0, shape[1], group):
                    columns = slice(begin, begin + group)
                    assert np.array_equal(support[:, columns].sum(1), keep[:, columns].sum(1))
            if kind in ("few", "many") and shape[1] > 30 and rounds == 1:
                assert (cost < last).mean() > 0.5
            last = cost


def test_swaps_find_the_best_support_of_uncorrelated_inputs():
    rng = np.random.default_rng(7)
    shape = (30, 64)
    h, w = np.diag(np.exp(rng.standard_normal(64))), weights(shape, np.float64)
    gain = w**2 * np.diag(h)
    keep = rng.random(shape) < 0.3
    mask, fitted = _core.swap(w, bits(keep), h, 1)
    best = np.zeros(shape, bool)
    for row, k, values in zip(best, keep.sum(axis=1), gain, strict=True):
        row[np.argsort(-values)[:k]] = True
    assert np.array_equal(unbits(mask, shape), best)
    np.testing.assert_allclose(fitted, np.where(best, w, 0.0), rtol=1e-12)
    mask, _ = _core.swap(w, bits(keep), h, 1, group=8)
    again, _ = _core.swap(w, bits(keep), h, 9, group=8)  # a pair of each group a round
    for begin in range(0, 64, 8):
        columns = slice(begin, begin + 8)
        got = unbits(again, shape)[:, columns]
        for row, values in zip(got, gain[:, columns], strict=True):
            assert np.array_equal(np.flatnonzero(row), np.sort(np.argsort(-values)[: row.sum()]))
    assert not np.array_equal(mask, again)


def test_swaps_come_close_to_the_best_of_all_supports():
    shape, k = (40, 12), 4
    h, w = statistics(shape[1]), weights(shape, np.float64)
    a, d = _core.obs_factor(h)
    mask, _ = _core.obs_sweep(w, a, d, "row", shape[1] - k)
    costs = []
    for columns in itertools.combinations(range(shape[1]), k):
        keep = np.zeros(shape, bool)
        keep[:, columns] = True
        costs.append(_core.damage(w, least_squares(keep, h, w @ h), h)[0])
    best = np.min(costs, axis=0)
    start = _core.damage(w, _core.refit(w, mask, h), h)[0]
    end = _core.damage(w, _core.swap(w, mask, h, 10)[1], h)[0]
    assert (end >= best * (1 - 1e-9)).all()
    assert (end - best).sum() < 0.5 * (start - best).sum()


# ---- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_damage_is_the_quadratic_form(shape):
    c, w = statistics(shape[1], damping=0.0), weights(shape)
    for other in (weights(shape, seed=1), weights(shape, np.float64, seed=2)):
        got = _core.damage(w, other, c, 2)
        delta = other.astype(np.float64) - w
        np.testing.assert_allclose(got[0], np.einsum("ij,jk,ik->i", delta, c, delta), rtol=1e-9)
        exact = w.astype(np.float64)
        np.testing.assert_allclose(got[1], np.einsum("ij,jk,ik->i", exact, c, exact), rtol=1e-9)
    assert not _core.damage(w, w, c)[0].any()


# ---- bad input ----------------------------------------------------------------------------------


def test_bad_input():
    w, h = weights((6, 10)), statistics(10)
    a, d = _core.obs_factor(h)
    mask = bits(np.ones((6, 10), bool))
    bad = w.copy()
    bad[3, 4] = np.nan
    bad_h = h.copy()
    bad_h[2, 3] = np.inf
    cases: list[tuple[type[Exception], str, Any]] = [
        (ValueError, "h: has NaN", lambda: _core.obs_factor(bad_h)),
        (ValueError, "h: expected shape", lambda: _core.obs_factor(h[:5])),
        (ValueError, "h: expected a square", lambda: _core.obs_factor(np.zeros((0, 0)))),
        (TypeError, "h: wrong dtype", lambda: _core.obs_factor(h.astype("f4"))),
        (ValueError, "w: has NaN", lambda: _core.obs_sweep(bad, a, d, "block", 3)),
        (ValueError, "w: has no", lambda: _core.obs_sweep(w[:0], a, d, "block", 0)),
        (ValueError, "a: expected shape", lambda: _core.obs_sweep(w, a[:9], d, "block", 3)),
        (ValueError, "d: expected shape", lambda: _core.obs_sweep(w, a, d[1:], "block", 3)),
        (ValueError, "out of range", lambda: _core.obs_sweep(w, a, -d, "block", 3)),
        (ValueError, "out of range", lambda: _core.obs_sweep(w, a, d, "block", 61)),
        (ValueError, "out of range", lambda: _core.obs_sweep(w, a, d, "row", 11)),
        (ValueError, "not a count", lambda: _core.obs_sweep(w, a, d, "row", -1)),
        (TypeError, "int", lambda: _core.obs_sweep(w, a, d, "row", 0.5)),
        (ValueError, "out of range", lambda: _core.obs_sweep(w, a, d, "threshold", -1.0)),
        (ValueError, "out of range", lambda: _core.obs_sweep(w, a, d, "threshold", np.nan)),
        (TypeError, "tuple", lambda: _core.obs_sweep(w, a, d, "n:m", 2)),
        (ValueError, "out of range", lambda: _core.obs_sweep(w, a, d, "n:m", (5, 4))),
        (ValueError, "out of range", lambda: _core.obs_sweep(w, a, d, "n:m", (1, 65))),
        (ValueError, "rule: expected", lambda: _core.obs_sweep(w, a, d, "best", 2)),
        (ValueError, "mask: rule given", lambda: _core.obs_sweep(w, a, d, "given", None)),
        (ValueError, "mask: rule given", lambda: _core.obs_sweep(w, a, d, "row", 1, None, mask)),
        (ValueError, "mask: exp", lambda: _core.obs_sweep(w, a, d, "given", 0, None, mask[1:])),
        (ValueError, "block_cols", lambda: _core.obs_sweep(w, a, d, "row", 1, block_cols=0)),
        (ValueError, "row_weight: exp", lambda: _core.obs_sweep(w, a, d, "row", 1, np.ones(7))),
        (ValueError, "out of range", lambda: _core.obs_sweep(w, a, d, "row", 1, -np.ones(6))),
        (ValueError, "w: has NaN", lambda: _core.refit(bad, mask, h)),
        (ValueError, "h: has NaN", lambda: _core.refit(w, mask, bad_h)),
        (ValueError, "h: expected shape", lambda: _core.refit(w, mask, statistics(9))),
        (ValueError, "mask: expected shape", lambda: _core.refit(w, mask[:-1], h)),
        (TypeError, "mask: wrong dtype", lambda: _core.refit(w, mask.astype(bool), h)),
        (ValueError, "rhs: expected shape", lambda: _core.refit(w, mask, h, np.ones((6, 9)))),
        (TypeError, "rhs: wrong dtype", lambda: _core.refit(w, mask, h, w)),
        (ValueError, "C-contiguous", lambda: _core.refit(w[:, ::2], mask[:4], statistics(5))),
        (ValueError, "rounds: must", lambda: _core.swap(w, mask, h, 0)),
        (ValueError, "group: must", lambda: _core.swap(w, mask, h, 1, -1)),
        (ValueError, "raise the damping", lambda: _core.swap(w, mask, -h, 1)),
        (ValueError, "w_new: has NaN", lambda: _core.damage(w, bad, h)),
        (ValueError, "sizes disagree", lambda: _core.damage(w, w[:4], h)),
        (ValueError, "c: expected shape", lambda: _core.damage(w, w, h[:9])),
        (TypeError, "w: expected a NumPy", lambda: _core.damage([1.0], w, h)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
