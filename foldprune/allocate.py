"""One rate over units whose damage curves are known: remove first what costs least damage per
number.

For a price p every unit stands where damage - p * removed is least, so that no exchange between
units could lose less; p is raised until the rate is reached. Only the lower convex hull of a
curve matters.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .encodings import Array
from .errors import RateError

__all__ = ["TOLERANCE", "Taken", "Unit", "above", "allocate"]

TOLERANCE = 0.005  # how far the reached rate may be from the asked one
_ROUNDS = 100  # halvings of the price's range


@dataclass(eq=False)
class Unit:
    """A part of the model that can be made smaller step by step.

    Parameters
    ----------
    name, method
        What it is, for people: "model.layers.0.mlp.down_proj.weight", "FPP".
    settings
        What each step means (share of the weights removed, rank), one number each; the first
        removes least.
    removed
        Numbers that need no storing at each setting, not decreasing.
    damage
        What the model's output loses at each.
    smooth
        Whether settings between two steps can be taken too.
    """

    name: str
    method: str
    settings: Array
    removed: Array
    damage: Array
    smooth: bool = False

    @property
    def block(self) -> str:
        """The block of a head's unit, which is called "block:head"."""
        return self.name.rpartition(":")[0]

    @cached_property
    def hull(self) -> list[int]:
        """Steps on the lower convex hull, from the first."""
        points = list(zip(self.removed.tolist(), self.damage.tolist(), strict=True))
        hull = [0]
        for i in range(1, len(points)):
            if points[i][0] <= points[hull[-1]][0]:
                if points[i][1] < points[hull[-1]][1] and len(hull) > 1:
                    hull.pop()
                else:
                    continue
            while len(hull) > 1 and above(points[hull[-2]], points[hull[-1]], points[i]):
                hull.pop()
            hull.append(i)
        return hull

    @cached_property
    def prices(self) -> Array:
        """Damage per number of every edge of the hull, rising."""
        hull = self.hull
        rise, run = np.diff(self.damage[hull]), np.diff(self.removed[hull])
        # rounding may leave a curve that falls a little: what gains costs nothing
        return np.maximum.accumulate(np.maximum(rise / run, 0.0)) if len(run) else np.zeros(0)

    def edges_at(self, price: float) -> int:
        """How many edges of the hull cost less than ``price``."""
        return int(np.searchsorted(self.prices, price, side="left"))


@dataclass
class Taken:
    """What became of a unit: ``position`` counts edges of its hull, parts of one included."""

    unit: Unit
    position: float = 0.0

    def _at(self, values: Array) -> float:
        hull = values[self.unit.hull]
        return float(np.interp(self.position, np.arange(len(hull)), hull))

    @property
    def setting(self) -> float:
        return self._at(self.unit.settings)

    @property
    def removed(self) -> float:
        return self._at(self.unit.removed)

    @property
    def damage(self) -> float:
        return self._at(self.unit.damage)


# ways to treat one part of the model, of which one is to be used; each is a set of units
Alternatives = Sequence[Sequence[Unit]]


def allocate(rate: float, total: int, parts: Sequence[Alternatives]) -> list[list[Taken]]:
    """For each part the alternative chosen and where its units stand, so that ``rate`` of ``total``
    numbers is removed.

    Raises RateError if the rate cannot be reached within TOLERANCE.
    """
    target, slack = rate * total, TOLERANCE * total
    most = sum(max(_most(units) for units in part) for part in parts)
    if target > most + slack:
        raise RateError(
            f"rate {rate:g} cannot be reached: the largest possible is {most / total:.4f} (the "
            "rest are tensors that no method is used on)"
        )
    target = min(target, most)
    if rate == 0:
        return [[Taken(unit) for unit in part[0]] for part in parts]
    free = [_cheapest(part, np.nextafter(0.0, 1.0)) for part in parts]
    if _removed(free) >= target - slack:
        chosen = _meet(_as_many_as_fit(free, parts, target, slack), target)
    else:
        chosen = min(
            (_meet(way, target) for way in _bracket(parts, target)),
            key=lambda way: (max(abs(_removed(way) - target) - slack, 0.0), _damage(way)),
        )
    reached = _removed(chosen)
    if abs(reached - target) > slack:
        raise RateError(
            f"rate {rate:g} cannot be met within {TOLERANCE:.1%}: the nearest that the methods' "
            f"steps allow is {reached / total:.4f}, and the largest possible {most / total:.4f}"
        )
    return chosen


def _most(units: Sequence[Unit]) -> float:
    return sum(float(unit.removed[unit.hull[-1]]) for unit in units)


def _removed(chosen: Sequence[Sequence[Taken]]) -> float:
    return sum(taken.removed for units in chosen for taken in units)


def _damage(chosen: Sequence[Sequence[Taken]]) -> float:
    return sum(taken.damage for units in chosen for taken in units)


def _cheapest(part: Alternatives, price: float) -> list[Taken]:
    ways = [[Taken(unit, unit.edges_at(price)) for unit in units] for units in part]
    cost = [sum(t.damage - price * t.removed for t in way) for way in ways]
    return ways[int(np.argmin(cost))]


def _bracket(
    parts: Sequence[Alternatives], target: float
) -> tuple[list[list[Taken]], list[list[Taken]]]:
    """The solutions of neighbouring prices that remove no more than the target, and no less."""
    prices = np.concatenate([unit.prices for part in parts for units in part for unit in units])
    below = [_cheapest(part, np.nextafter(0.0, 1.0)) for part in parts]
    above = [[Taken(unit, len(unit.prices)) for unit in max(part, key=_most)] for part in parts]
    high = float(prices.max(initial=0.0)) * 2 + 1e-300
    low = float(prices[prices > 0].min(initial=high)) / 2
    for _ in range(_ROUNDS):
        price = float(np.sqrt(low) * np.sqrt(high))
        chosen = [_cheapest(part, price) for part in parts]
        if _removed(chosen) <= target:
            low, below = price, chosen
        else:
            high, above = price, chosen
    return below, above


def _as_many_as_fit(
    free: list[list[Taken]], parts: Sequence[Alternatives], target: float, slack: float
) -> list[list[Taken]]:
    """More can be had at no damage than is asked: some of it, part by part."""
    chosen, removed = [], 0.0
    for part, way in zip(parts, free, strict=True):
        own = sum(taken.removed for taken in way)
        if removed + own > target + slack:
            way, own = [Taken(unit) for unit in part[0]], 0.0
        chosen.append(way)
        removed += own
    return chosen


def _meet(chosen: list[list[Taken]], target: float) -> list[list[Taken]]:
    """Moves smooth units along their next edges, cheapest first (back and dearest first, if too
    much is removed), until the target is met; then others while that brings it nearer."""
    missing = target - _removed(chosen)
    forward = missing > 0
    for smooth in (True, False):
        edges = []
        for order, taken in enumerate(itertools.chain.from_iterable(chosen)):
            if taken.unit.smooth == smooth:
                at, prices = int(taken.position), taken.unit.prices
                span = range(at, len(prices)) if forward else range(at)
                edges += [(float(prices[edge]), order, edge, taken) for edge in span]
        edges.sort(key=lambda item: item[:3], reverse=not forward)
        for _, _, edge, taken in edges:
            if missing == 0 or (missing > 0) != forward:
                return chosen
            if taken.position != (edge if forward else edge + 1):
                continue  # the edge before, of a unit that moves in steps, was left out
            size = float(np.diff(taken.unit.removed[taken.unit.hull][edge : edge + 2])[0])
            part = min(1.0, abs(missing) / size) if smooth else 1.0
            if size > 2 * abs(missing) and not smooth:
                continue
            taken.position = edge + part if forward else edge + 1 - part
            if part < 1:
                return chosen
            missing -= size if forward else -size
    return chosen


def above(first: tuple[float, ...], middle: tuple[float, ...], last: tuple[float, ...]) -> bool:
    """Whether the middle point (x, y, ...) lies on or above the line from first to last."""
    run, rise = last[0] - first[0], last[1] - first[1]
    return (middle[1] - first[1]) * run >= rise * (middle[0] - first[0])
