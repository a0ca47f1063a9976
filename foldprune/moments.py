"""Sums over what a layer reads, and the moments that they give."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from . import _core
from .encodings import Array

__all__ = ["Inputs", "Moments", "Sums", "Totals"]


@dataclass(eq=False)
class Sums:
    """Sums over rows x of activations; no arrays before the first row."""

    second: Array | None = None  # sum of w x x^T, (d, d) float64
    sum: Array | None = None  # sum of w x, (d,) float64
    weight: float = 0.0
    rows: int = 0

    def add(self, x: Array, weights: Array | None, threads: int) -> None:
        if weights is not None and not weights.any():
            return
        second, total = self.allocate(x.shape[1])
        weight, rows = _core.moments_update(x, weights, second, total, threads)
        self.weight += weight
        self.rows += rows

    def merge(self, other: Sums) -> None:
        if other.second is None or other.sum is None:
            return
        second, total = self.allocate(len(other.sum))
        second += other.second
        total += other.sum
        self.weight += other.weight
        self.rows += other.rows

    def allocate(self, width: int) -> tuple[Array, Array]:
        if self.second is None or self.sum is None:
            self.second, self.sum = np.zeros((width, width)), np.zeros(width)
        return self.second, self.sum


@dataclass(eq=False)
class Inputs:
    """One layer's input: sums over the rows to fit on and over those held out."""

    width: int
    fit: Sums = field(default_factory=Sums)
    held: Sums = field(default_factory=Sums)
    sequences: int = 0  # seen so far, which decides what is held out
    position: int = 0  # likewise, of rows that came without sequences

    @property
    def sets(self) -> tuple[Sums, Sums]:
        return self.fit, self.held


@dataclass(eq=False)
class Totals:
    """A sum per output or embedding row."""

    sums: Array
    weight: float = 0.0


@dataclass(frozen=True, eq=False, repr=False)
class Moments:
    """The moments of one layer's input x with d entries, as a view of the calibration's sums:
    later updates show, and each matrix is computed when it is read, as a fresh float64 array."""

    _inputs: Inputs

    def __repr__(self) -> str:
        return f"Moments(width={self.width}, rows={self.rows}, held_rows={self.held_rows})"

    @property
    def width(self) -> int:
        """d."""
        return self._inputs.width

    @property
    def count(self) -> float:
        """Sum of all weights: the number of tokens, if masks were 0 and 1."""
        return self._inputs.fit.weight + self._inputs.held.weight

    @property
    def rows(self) -> int:
        """Rows of weight above 0; ``second`` has at most this rank."""
        return self._inputs.fit.rows + self._inputs.held.rows

    @property
    def mean(self) -> Array:
        """(1/n) sum of x over all rows: (d,)."""
        sums = [s.sum for s in self._inputs.sets if s.sum is not None]
        return np.sum(sums, axis=0) / self.count

    @property
    def second(self) -> Array:
        """(1/n) sum of x x^T over all rows, fitted and held out: (d, d)."""
        first, *rest = (s.second for s in self._inputs.sets if s.second is not None)
        total = np.array(first)
        for second in rest:
            total += second
        total /= self.count
        return total

    @property
    def covariance(self) -> Array:
        """``second`` minus mean mean^T: (d, d)."""
        mean, second = self.mean, self.second
        second -= np.outer(mean, mean)
        return second

    @property
    def is_split(self) -> bool:
        """Whether rows were held out, and others not."""
        return self._inputs.fit.weight > 0 and self._inputs.held.weight > 0

    @property
    def fit(self) -> Array:
        """``second`` over the rows that are not held out; over all if none is: (d, d)."""
        sums = self._inputs.fit
        if sums.second is None or not self.is_split:
            return self.second
        return sums.second / sums.weight

    @property
    def held(self) -> Array | None:
        """``second`` over the held-out rows, to judge on what was not fitted: (d, d), or None."""
        sums = self._inputs.held
        return None if sums.second is None or not self.is_split else sums.second / sums.weight

    @property
    def split_means(self) -> tuple[Array, Array]:
        """``mean`` over the rows that are not held out, and over those that are: (d,) each."""
        means = [s.sum / s.weight for s in self._inputs.sets if s.sum is not None and s.weight]
        return means[0], means[-1]

    @property
    def fit_rows(self) -> int:
        """Rows that ``fit`` is over."""
        return self._inputs.fit.rows if self.is_split else self.rows

    @property
    def held_rows(self) -> int:
        """Rows that ``held`` is over; 0 where it is None."""
        return self._inputs.held.rows if self.is_split else 0
