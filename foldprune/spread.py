"""One rate over all methods: remove first what costs least estimated relative output error per
number.

Folds come in steps (one rank of one head), each block's and head's steps taken along the lower
convex hull of its cost, so that their price per number only rises. Single weights fill the rest
exactly: the price of weight w of matrix W is w^2 / ||W||^2.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .allocate import TOLERANCE, above
from .encodings import Array
from .errors import RateError
from .fold import Curve
from .recipe import Recipe

__all__ = ["Choice", "Option", "choose", "fill", "settled_recipe"]


@dataclass
class Option:
    """A fold that may be used: its curve, and the choice that ``choose`` makes: ``ranks`` per key
    head, None while the block stays dense."""

    curve: Curve
    least: int  # smallest rank allowed
    ranks: Array | None = None


@dataclass
class Choice:
    """How many numbers the folds are to remove, and how many FPP."""

    folded: int
    pruned: int


@dataclass(frozen=True)
class _Step:
    price: float
    size: int
    option: Option
    group: int  # -1: the whole block moves to its lossless level
    rank: int


def choose(
    rate: float,
    total: int,
    options: Sequence[Option],
    weights: int,
    histogram: Array,
) -> Choice:
    """Settles every option's ranks and the number of weights to prune.

    ``total`` is the model's count of numbers, ``weights`` how many of them FPP may remove,
    ``histogram`` their scores by ``_core.histogram``. Raises RateError if the rate cannot be
    reached.
    """
    steps = [step for option in options for step in _steps(option)]
    steps.sort(key=lambda step: step.price)  # stable: ties stay in the model's order
    sizes = np.array([step.size for step in steps], np.int64)
    target = round(rate * total)
    most = int(sizes.sum()) + weights
    if target > most + TOLERANCE * total:
        raise RateError(
            f"rate {rate:g} cannot be reached: the largest possible is {most / total:.4f} (the "
            "rest are tensors that no method is used on)"
        )
    target = min(target, most)

    free = int(sum(step.size for step in steps if step.price == 0))
    if abs(free - target) <= TOLERANCE * total:
        # what costs nothing is close enough: lossless is better than exact to the number
        taken = sum(step.price == 0 for step in steps)
        _take(steps[:taken])
        return Choice(free, 0)

    # the cheapest steps, as many as fit when every weight cheaper than the last of them goes too
    removed = np.concatenate([[0], np.cumsum(sizes)])
    cheaper = np.concatenate([[0], _count_below([step.price for step in steps], histogram)])
    taken = int(np.searchsorted(removed + cheaper, target, side="right")) - 1
    while taken < len(steps) and target - removed[taken] > weights:
        taken += 1  # weights alone cannot fill the rest
    if removed[taken] > target:  # a large step: the nearer of before and after it
        below = target - removed[taken - 1] - weights
        if below <= removed[taken] - target:
            taken -= 1
    _take(steps[:taken])
    return Choice(int(removed[taken]), int(min(max(target - removed[taken], 0), weights)))


def fill(rate: float, total: int, choice: Choice, folded: int, weights: int) -> int:
    """How many weights to prune once the folds are made and have removed ``folded`` numbers, which
    may be fewer than was chosen: a fold that would take more bytes is left out. Raises RateError
    if the rate is out of reach."""
    pruned = choice.pruned
    if pruned or abs(folded - choice.folded) > TOLERANCE * total:
        pruned = min(max(pruned + choice.folded - folded, 0), weights)
    if not pruned and folded > choice.folded:
        return 0  # heads of less than full rank: more went than was asked, but at no cost
    reached = folded + pruned
    if abs(reached - rate * total) > TOLERANCE * total:
        raise RateError(
            f"rate {rate:g} cannot be met within {TOLERANCE:.1%}: the nearest that the folds' "
            f"steps allow is {reached / total:.4f}, and the largest possible at most "
            f"{(folded + weights) / total:.4f}"
        )
    return pruned


def settled_recipe(options: Sequence[Option], pruned: int, weights: int) -> Recipe:
    """The nearest recipe with uniform fields to what a rate has settled on."""
    folds = any(option.ranks is not None for option in options)
    return Recipe(
        fpp=pruned / weights if 0 < pruned < weights else None,
        irc="lossless" if folds else None,
        dwc="lossless" if folds else None,
    )


def _steps(option: Option) -> list[_Step]:
    curve = option.curve
    steps = []
    if curve.start < curve.dense:
        steps.append(_Step(0.0, curve.dense - curve.start, option, -1, -1))
    start_each = curve.start // len(curve.stored)
    for group, (stored, error) in enumerate(zip(curve.stored, curve.error, strict=True)):
        # points (numbers removed, error), from the whole rank down
        removed = start_each - stored[option.least :][::-1].astype(np.float64)
        points = [(0.0, 0.0, len(stored) - 1)]
        ranks = range(len(stored) - 1, option.least - 1, -1)
        for x, y, rank in zip(
            removed.tolist(), error[option.least :][::-1].tolist(), ranks, strict=True
        ):
            if x <= points[-1][0]:
                continue
            while len(points) > 1 and above(points[-2], points[-1], (x, y)):
                points.pop()
            points.append((x, y, rank))
        for before, after in itertools.pairwise(points):
            size = int(after[0] - before[0])
            steps.append(_Step((after[1] - before[1]) / size, size, option, group, after[2]))
    return steps


def _take(steps: Sequence[_Step]) -> None:
    for step in steps:
        option = step.option
        if option.ranks is None:
            whole = len(option.curve.stored[0]) - 1
            option.ranks = np.full(len(option.curve.stored), whole)
        if step.group >= 0:
            option.ranks[step.group] = step.rank


def _count_below(prices: Sequence[float], histogram: Array) -> Array:
    """How many weights have a squared score below each price, to the resolution of the
    histogram."""
    counts = np.concatenate([[0], np.cumsum(histogram)])
    bits = np.sqrt(np.maximum(prices, 0)).astype(np.float32).view(np.uint32)
    below: Array = counts[np.minimum(bits >> 16, len(histogram))]
    return below.astype(np.int64)
