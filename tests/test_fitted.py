"""Fits of one matrix to its calibration, against NumPy's least squares and real data."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from models import error

from foldprune import Calibration
from foldprune.errors import TensorError
from foldprune.fit import DAMPINGS, SEARCH_DAMPING, Gram, fit, fit_neurons
from foldprune.prune import Pruned, Target, prune, prune_neurons
from foldprune.recipe import Granularity

Array = np.ndarray[Any, np.dtype[Any]]

# (granularity, scope, share)
WAYS = [
    ("weight", "tensor", 0.6),
    ("weight", "row", 0.6),
    ("2:4", "tensor", 0.5),
    ("4x1", "tensor", 0.5),
    ("row", "tensor", 0.25),
]
NAMES = [f"{granularity} {scope}" for granularity, scope, _ in WAYS]
OUT, IN = 24, 40


def data(sequences: int = 16, tokens: int = 32, seed: int = 0) -> Array:
    """Inputs with strong correlations, unequal scales and a mean: (sequences, tokens, IN)."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((sequences, tokens, 12)) @ rng.standard_normal((12, IN))
    noise = rng.standard_normal((sequences, tokens, IN))
    scales = np.random.default_rng(1).uniform(0.2, 3, IN)
    return ((mixed + noise + 0.5) * scales).astype(np.float32)


def weights(dtype: Any = np.float32, seed: int = 0, shape: tuple[int, int] = (OUT, IN)) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def gram_of(x: Array, held_out: int | None = 4) -> Gram:
    calibration = Calibration(held_out=held_out)
    calibration.update("layer", x)
    moments = calibration.moments("layer")
    assert moments is not None
    return Gram(moments, 1)


def run_fit(way: tuple[str, str, float], matrix: Array, gram: Gram, **options: Any) -> Pruned:
    granularity, scope, share = way
    target = Target("layer.weight", matrix)
    return fit(target, gram, share, Granularity.parse(granularity), scope, **options)


def second(x: Array) -> Array:
    rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
    return rows.T @ rows / len(rows)


def damped(c: Array, damping: float) -> Array:
    return c + damping * np.diagonal(c).mean() * np.eye(len(c))


def least_squares(w: Array, keep: Array, h: Array) -> Array:
    """Every row's w' of that support with the least (w - w') H (w - w')^T."""
    out = np.zeros(w.shape)
    for row, support, new in zip(w.astype(np.float64), keep, out, strict=True):
        if support.any():
            new[support] = np.linalg.solve(h[np.ix_(support, support)], (h @ row)[support])
    return out


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_kept_is_the_least_squares_solution(way, dtype):
    """On the support that the fit came to, with one of the dampings; the fixed one without held-out
    rows."""
    x, w = data(), weights(dtype)
    tolerance = 1e-9 if dtype == np.float64 else 3e-5
    for held_out, dampings in ((4, DAMPINGS), (None, (SEARCH_DAMPING,))):
        new = run_fit(way, w, gram_of(x, held_out)).encoding.unpack()
        assert new.dtype == dtype
        best = [least_squares(w, new != 0, damped(second(x), damping)) for damping in dampings]
        distance = [np.abs(new - solution).max() / np.abs(solution).max() for solution in best]
        assert min(distance) < tolerance


@pytest.mark.parametrize("way", WAYS[3:], ids=NAMES[3:])
@pytest.mark.parametrize("sequences", [4, 40])
def test_the_damping_is_the_best_on_held_out_rows(way, sequences):
    """Of a support that does not depend on it: fitted without the held-out rows, judged on them."""
    x, w = data(sequences, 8), weights(np.float64)
    new = run_fit(way, w, gram_of(x)).encoding.unpack()
    keep = new != 0
    held = np.arange(sequences) % 4 == 3
    solutions = [least_squares(w, keep, damped(second(x[~held]), d)) for d in DAMPINGS]
    errors = [error(w, solution, x[held]) for solution in solutions]
    best = least_squares(w, keep, damped(second(x), DAMPINGS[int(np.argmin(errors))]))
    np.testing.assert_allclose(new, best, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_the_reported_error_is_what_the_outputs_lose(way, dtype):
    x, w = data(), weights(dtype)
    pruned = run_fit(way, w, gram_of(x))
    new = pruned.encoding.unpack()
    assert new.dtype == dtype
    assert pruned.error == pytest.approx(error(w, new, x), rel=1e-5)
    assert pruned.note == ""


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_sixteen_bits_are_the_rounded_solution(way, dtype):
    x, w = data(), weights(dtype)
    new = run_fit(way, w, gram_of(x)).encoding.unpack()
    same = run_fit(way, w.astype(np.float32), gram_of(x)).encoding.unpack()
    assert np.array_equal(new, same.astype(dtype))


def test_fitted_weights_outside_the_range_are_an_error_that_names_the_tensor():
    w = np.full((8, IN), 6e4, np.float16)
    w[:, ::2] *= -1
    common = np.random.default_rng(0).standard_normal((8, 64, 1))
    x = (common + 0.05 * data(8, 64)).astype(np.float32) * np.geomspace(1, 30, IN, dtype=np.float32)
    with pytest.raises(TensorError, match=r"'layer.weight'.*float16.*float32"):
        run_fit(("weight", "row", 0.8), w, gram_of(x))


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
def test_never_worse_than_without_data(way):
    granularity, scope, share = way
    for seed in range(4):
        x, w = data(seed=seed), weights(seed=seed)
        target = Target("layer.weight", w)
        free = prune([target], share, Granularity.parse(granularity), scope, 1)
        before = error(w, free["layer.weight"].encoding.unpack(), x)
        assert run_fit(way, w, gram_of(x)).error < (1.0 if granularity == "row" else 0.7) * before


@pytest.mark.parametrize("share", [0.0, 0.13, 0.5, 0.77, 1.0])
def test_exactly_the_share_goes(share):
    x, w = data(), weights()
    gram = gram_of(x)

    def zeros(granularity: str, scope: str = "tensor") -> Array:
        return run_fit((granularity, scope, share), w, gram).encoding.unpack() == 0

    assert zeros("weight").sum() == round(share * w.size)
    assert (zeros("weight", "row").sum(axis=1) == round(share * IN)).all()
    blocks = zeros("4x1").reshape(OUT // 4, 4, IN)
    assert (blocks.all(axis=1) == blocks.any(axis=1)).all()
    assert blocks.all(axis=1).sum() == round(share * blocks.size / 4)
    rows = zeros("row")
    assert (rows.all(axis=1) == rows.any(axis=1)).all()
    assert rows.all(axis=1).sum() == round(share * OUT)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 7)])
def test_n_of_m_stay(n, m):
    new = run_fit((f"{n}:{m}", "tensor", 1 - n / m), weights(), gram_of(data())).encoding.unpack()
    for begin in range(0, IN, m):
        kept = (new[:, begin : begin + m] != 0).sum(axis=1)
        assert (kept == min(n, IN - begin)).all()


def test_share_zero_leaves_every_bit():
    x, w = data(), weights()
    for granularity in ("weight", "4x1", "row"):
        pruned = run_fit((granularity, "tensor", 0.0), w, gram_of(x))
        assert np.array_equal(pruned.encoding.unpack(), w) and pruned.error == 0


def test_inputs_that_are_always_zero():
    """What reads them leaves sooner than the rest, though damping lets it count for a little."""
    x, w = data(), weights()
    x[..., 3] = x[..., 17] = 0
    for scope in ("tensor", "row"):
        pruned = run_fit(("weight", scope, 0.4), w, gram_of(x))
        gone = pruned.encoding.unpack() == 0
        assert gone[:, [3, 17]].mean() > 0.8 and gone.mean() == pytest.approx(0.4, abs=1e-3)
        assert pruned.error == pytest.approx(error(w, pruned.encoding.unpack(), x), rel=1e-5)
    for way in WAYS:
        pruned = run_fit(way, w, gram_of(np.zeros_like(x)))
        assert np.isfinite(pruned.encoding.unpack()).all() and pruned.error == 0


def test_fewer_rows_than_inputs_are_said():
    few = run_fit(WAYS[0], weights(), gram_of(data(4, 8)))
    assert few.note.startswith("calibrated on 32 rows for 40 inputs")
    damping = float(few.note.rpartition("damping ")[2])
    new = few.encoding.unpack()
    best = least_squares(weights(), new != 0, damped(second(data(4, 8)), damping))
    assert np.abs(new - best).max() < 3e-5 * np.abs(best).max()
    unsplit = run_fit(WAYS[0], weights(), gram_of(data(4, 8), None))
    assert unsplit.note.endswith(f"damping {SEARCH_DAMPING:g}")


def test_errors_that_cost_more_are_made_less():
    """Rows compete by what their outputs' errors cost, in every granularity that has a choice."""
    x, w = data(), weights()
    costs = np.ones(OUT)
    costs[:8] = 100
    for granularity in ("weight", "4x1", "row"):
        way = (granularity, "tensor", 0.5)
        for gone in (1.0, 1e-10):  # only ratios matter
            new = run_fit(way, w, gram_of(x), row_weight=gone * costs).encoding.unpack()
            even = run_fit(way, w, gram_of(x)).encoding.unpack()
            assert (new[:8] == 0).sum() < 0.75 * (even[:8] == 0).sum()
            assert (new == 0).sum() == (even == 0).sum()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("gated", [False, True])
def test_hidden_units_leave_together_and_down_is_refitted(share, gated):
    x, down = data(), weights(np.float64, 2)
    up, gate = weights(np.float64, 3, (IN, OUT)), weights(np.float64, 4, (IN, OUT))
    targets = [Target(n, m) for n, m in (("up", up), ("down", down), ("gate", gate))]
    if not gated:
        targets[2:] = [None]  # type: ignore[list-item]
    pruned = fit_neurons(*targets, gram_of(x), share)
    assert set(pruned) == {"up", "down", *(["gate"] if gated else [])}
    new = {name: p.encoding.unpack() for name, p in pruned.items()}
    kept = (new["down"] != 0).any(axis=0)
    assert (~kept).sum() == round(share * IN)
    for name, matrix in (("up", up), ("gate", gate)):
        if name in new:
            assert np.array_equal(new[name], matrix * kept[:, None])
    assert pruned["down"].error == pytest.approx(error(down, new["down"], x), rel=1e-5, abs=1e-15)
    support = np.broadcast_to(kept, down.shape)
    best = [least_squares(down, support, damped(second(x), d)) for d in DAMPINGS]
    assert min(np.abs(new["down"] - b).max() for b in best) < 1e-9
    if 0 < share < 1:
        free = prune_neurons(*targets, share, 1)["down"].encoding.unpack()
        assert pruned["down"].error < 0.5 * error(down, free, x)


def test_hidden_units_are_chosen_by_what_the_others_cannot_make_up_for():
    """Units that repeat others leave before any other, however large."""
    x, down = np.random.default_rng(5).standard_normal((8, 64, IN)), weights(seed=5)
    x[..., 20:26] = 4 * x[..., 0:6]
    pruned = fit_neurons(Target("up", down.T.copy()), Target("down", down), None, gram_of(x), 0.15)
    kept = (pruned["down"].encoding.unpack() != 0).any(axis=0)
    for i in range(6):
        assert kept[i] ^ kept[20 + i], "one of the two"
    assert pruned["down"].error < 1e-3
