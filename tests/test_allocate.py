"""One rate over units with damage curves, against enumeration of everything that could be taken."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from foldprune.allocate import TOLERANCE, Taken, Unit, allocate
from foldprune.errors import RateError

Array = np.ndarray[Any, np.dtype[Any]]
SEEDS = range(6)


def unit(removed: Any, damage: Any, smooth: bool = False, name: str = "u") -> Unit:
    removed = np.asarray(removed, float)
    return Unit(name, "FPP", np.linspace(0, 1, len(removed)), removed, np.array(damage), smooth)


def convex(rng: np.random.Generator, steps: int, smooth: bool, scale: float = 1.0) -> Unit:
    """From (0, 0), by steps of 1 to 9 numbers at rising prices."""
    sizes = rng.integers(1, 10, steps)
    prices = np.sort(rng.uniform(0.01, scale, steps))
    removed = np.concatenate([[0], np.cumsum(sizes)])
    return unit(removed, np.concatenate([[0.0], np.cumsum(sizes * prices)]), smooth)


def flat(chosen: Sequence[Sequence[Taken]]) -> list[Taken]:
    return [taken for way in chosen for taken in way]


def totals(chosen: Sequence[Sequence[Taken]]) -> tuple[float, float]:
    return sum(t.removed for t in flat(chosen)), sum(t.damage for t in flat(chosen))


def alone(units: Sequence[Unit]) -> list[list[list[Unit]]]:
    return [[[u]] for u in units]


def largest(units: Sequence[Unit]) -> float:
    return sum(float(u.removed[-1]) for u in units)


def at_price(ways: Sequence[Sequence[Unit]], price: float) -> tuple[float, float]:
    """Removed and damage of the way and steps that a price favours, by trying all of them."""
    options = []
    for way in ways:
        steps = [list(zip(u.removed, u.damage, strict=True)) for u in way]
        for combination in itertools.product(*steps):
            removed, damage = map(sum, zip(*combination, strict=True))
            options.append((damage - price * removed, removed, damage))
    return min(options)[1:]


# ---- the least damage ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_steps_are_the_best_of_all_combinations(seed):
    """At what a price removes nothing that removes as much costs less."""
    rng = np.random.default_rng(seed)
    units = [convex(rng, 4, smooth=False) for _ in range(5)]
    grid = list(itertools.product(range(5), repeat=5))
    removed = np.array([[u.removed[i] for u, i in zip(units, g, strict=True)] for g in grid])
    damage = np.array([[u.damage[i] for u, i in zip(units, g, strict=True)] for g in grid])
    removed, damage = removed.sum(axis=1), damage.sum(axis=1)
    total = 100 * largest(units)  # half a point is then half of all that can go
    for price in (0.1, 0.3, 0.5, 0.7, 0.95):
        target = sum(at_price([[u]], price)[0] for u in units)
        got = totals(allocate(target / total, int(total), alone(units)))
        assert got[0] == pytest.approx(target)
        assert got[1] == pytest.approx(damage[removed >= target - 1e-9].min())


@pytest.mark.parametrize("seed", SEEDS)
def test_smooth_units_are_the_best_of_a_fine_grid(seed):
    rng = np.random.default_rng(seed)
    units = [convex(rng, 5, smooth=True) for _ in range(3)]
    first, second, third = units
    x, y = np.meshgrid(*(np.linspace(0, u.removed[-1], 401) for u in (first, second)))
    beside = np.interp(x, first.removed, first.damage) + np.interp(y, second.removed, second.damage)
    for share in (0.03, 0.2, 0.5, 0.8, 0.99):
        target = share * largest(units)
        rest = target - x - y
        possible = (rest >= 0) & (rest <= third.removed[-1])
        everything = beside + np.interp(rest, third.removed, third.damage)
        got = totals(allocate(share, round(largest(units)), alone(units)))
        assert got[0] == pytest.approx(target)
        best = everything[possible].min()
        step = max(u.removed[-1] for u in units) / 400  # by which the grid may miss the best
        assert best - 4 * step <= got[1] <= best + 1e-9


def edges(ways: Sequence[Unit]) -> list[tuple[float, float]]:
    """(price, size) of every edge of convex units, cheapest first."""
    both = [
        (rise / run, run)
        for u in ways
        for rise, run in zip(np.diff(u.damage), np.diff(u.removed), strict=True)
    ]
    return sorted(both)


def least(units: Sequence[Unit], target: float) -> float:
    """Least damage of removing that much from smooth convex units; infinite if they have less."""
    damage = 0.0
    for price, size in edges(units):
        damage += price * min(size, target)
        target -= min(size, target)
    return damage if target <= 1e-9 else np.inf


@pytest.mark.parametrize("seed", SEEDS)
def test_one_of_several_ways(seed):
    """The best combination of ways at what a price removes; between such points no more damage
    than at the next one."""
    rng = np.random.default_rng(seed)
    parts = [
        [[convex(rng, 3, True, scale) for _ in range(rng.integers(1, 3))] for scale in (1.0, 0.6)]
        for _ in range(3)
    ]
    parts.append([[convex(rng, 3, True)]])
    most = sum(max(largest(way) for way in part) for part in parts)
    before = (0.0, 0.0)
    for price in (0.05, 0.2, 0.4, 0.6, 0.9):
        target, damage = np.sum([at_price(part, price) for part in parts], axis=0)
        got = totals(allocate(target / most, round(most), parts))
        combined = [[u for way in ways for u in way] for ways in itertools.product(*parts)]
        assert got[0] == pytest.approx(target)
        assert got[1] == pytest.approx(min(least(units, target) for units in combined))
        between = (before[0] + target) / 2
        got = totals(allocate(between / most, round(most), parts))
        assert got[0] == pytest.approx(between, abs=TOLERANCE * most)
        assert before[1] - 1e-9 <= got[1] <= damage + 1e-9
        before = (target, damage)
    for part, way in zip(parts, allocate(0.4, round(most), parts), strict=True):
        assert [t.unit for t in way] in part, "a way is taken whole"
    curve = [totals(allocate(rate, round(most), parts)) for rate in np.linspace(0, 1, 21)]
    assert (np.diff(curve, axis=0) >= -1e-9).all(), "more removed never costs less"


@pytest.mark.parametrize("seed", SEEDS)
def test_the_largest_rate_can_be_had(seed):
    """Even where what removes most is not what a price would ever make the better way soon."""
    rng = np.random.default_rng(seed)
    cheap, dear = convex(rng, 3, True), convex(rng, 3, True)
    dear.removed[-1] = cheap.removed[-1] + 1
    dear.damage[-1] = 1e6
    parts = [[[cheap], [dear]], [[convex(rng, 4, True)]]]
    most = float(dear.removed[-1] + parts[1][0][0].removed[-1])
    got = totals(allocate(most / (2 * most), round(2 * most), parts))
    assert got[0] == pytest.approx(most)


# ---- what the rate is ---------------------------------------------------------------------------


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.004, 0.1, 0.5, 0.77, 0.9])
def test_the_rate_is_reached(smooth, rate):
    rng = np.random.default_rng(1)
    units = [convex(rng, 20, smooth) for _ in range(40)]
    total = round(largest(units) / 0.9)
    removed = totals(allocate(rate, total, alone(units)))[0]
    assert abs(removed - rate * total) <= (1e-9 if smooth else TOLERANCE) * total


def test_smooth_units_fill_between_the_steps_of_others():
    steps = unit([0, 40], [0, 1e-3])
    smooth = unit([0, 30, 60], [0, 3, 9], smooth=True)
    for target, at in ((20, (0, 20)), (40, (40, 0)), (55, (40, 15))):
        (first,), (second,) = allocate(target / 100, 100, alone([steps, smooth]))
        assert (first.removed, second.removed) == pytest.approx(at)


def test_above_the_largest_rate_the_error_names_it():
    rng = np.random.default_rng(2)
    units = [convex(rng, 5, True) for _ in range(3)]
    ways = [[[units[0]], [units[1]]], [[units[2]]]]
    most = max(largest(units[:1]), largest(units[1:2])) + largest(units[2:])
    total = round(most / 0.6)
    with pytest.raises(RateError, match=f"rate 0.7 .*largest possible is {most / total:.4f}"):
        allocate(0.7, total, ways)
    slightly_more = most / total + 0.9 * TOLERANCE
    assert totals(allocate(slightly_more, total, ways))[0] == pytest.approx(most)


def test_between_the_steps_of_one_unit_the_error_names_the_nearest():
    steps = unit([0, 50, 80], [0, 1, 3])
    with pytest.raises(RateError, match=r"rate 0.3 .*nearest .* is 0\.5000"):
        allocate(0.3, 100, alone([steps]))
    ((taken,),) = allocate(0.503, 100, alone([steps]))
    assert taken.removed == 50 and taken.damage == 1 and taken.setting == 0.5


def test_one_unit():
    steps = unit([0, 10, 30, 60], [0, 1, 4, 16], smooth=True)
    for rate in (0.05, 0.1, 0.25, 0.6):
        ((taken,),) = allocate(rate, 100, alone([steps]))
        assert taken.removed == pytest.approx(100 * rate)
        assert taken.damage == pytest.approx(np.interp(100 * rate, steps.removed, steps.damage))
        assert taken.setting == pytest.approx(np.interp(100 * rate, steps.removed, steps.settings))


# ---- what is free -------------------------------------------------------------------------------


def test_what_costs_nothing_goes_first():
    free = [unit([0, 10, 20], [0, 0, 5], True), unit([0, 15, 20], [0, 0, 5], True)]
    costly = unit([0, 50], [0, 1e-6], smooth=True)
    parts = alone([costly, *free])
    chosen = flat(allocate(0.20, 100, parts))  # less than is free
    assert sum(t.damage for t in chosen) == 0
    assert sum(t.removed for t in chosen) == pytest.approx(20)
    for rate in (0.25, 0.26, 0.30):  # all of it and a little more
        chosen = flat(allocate(rate, 100, parts))
        assert [t.removed for t in chosen] == pytest.approx([100 * rate - 25, 10, 15])
    assert totals(allocate(0.0, 100, parts))[0] == 0


def test_free_steps_are_taken_whole_as_far_as_they_fit():
    ways = [[[unit([0, 8], [0, 1], True)], [unit([0, 10], [0, 0])]] for _ in range(6)]
    chosen = allocate(0.30, 100, ways)
    assert totals(chosen) == pytest.approx((30, 0))
    assert sorted(t.removed for t in flat(chosen)) == pytest.approx([0, 0, 0, 10, 10, 10])


# ---- curves of other shapes ---------------------------------------------------------------------


def test_of_a_curve_that_is_not_convex_only_the_hull_matters():
    humped = unit([0, 10, 20, 30], [0, 8, 9, 10], True)
    straight = unit([0, 30], [0, 10], True)
    other = unit([0, 10, 40], [0, 3, 30], True)
    assert humped.hull == [0, 3]
    for rate in (0.1, 0.3, 0.5):
        got = totals(allocate(rate, 100, alone([humped, other])))
        assert got == pytest.approx(totals(allocate(rate, 100, alone([straight, other]))))


def test_a_curve_that_falls_or_stands_still():
    """Settings that remove nothing more, and damage that rounding made fall a little."""
    fallen = unit([0, 5, 5, 10], [0, 2.0, 1.0, 1.0 - 1e-12], True)
    assert fallen.hull[0] == 0 and 1 not in fallen.hull
    assert (np.diff(fallen.prices) >= 0).all()
    sinking = unit([0, 5, 10], [0, -1e-15, 1], True)
    assert (sinking.prices >= 0).all()
    ((taken,),) = allocate(0.05, 100, alone([sinking]))
    assert taken.removed == pytest.approx(5)
    assert not len(unit([7, 7], [0, 0]).prices)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_higher_rate_removes_no_less_anywhere(seed):
    rng = np.random.default_rng(seed)
    units = [convex(rng, 6, True) for _ in range(8)]
    before = np.zeros(8)
    damage = 0.0
    for rate in np.linspace(0, 1, 41):
        chosen = flat(allocate(float(rate), round(largest(units)), alone(units)))
        removed = np.array([t.removed for t in chosen])
        assert (removed >= before - 1e-9).all()
        assert sum(t.damage for t in chosen) >= damage - 1e-9
        before, damage = removed, sum(t.damage for t in chosen)
