"""What the inputs of an attention block are like, and how that weighs the errors of its folds.

Query, key and value read the same inputs, except in cross-attention, whose key and value read
another. Data-free, what the normalisation before the block puts out is taken as white before its
gain, so input j has the root mean square |gain_j| (1 where no such norm is known).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Protocol

import numpy as np

from .encodings import Array
from .errors import TensorError
from .schemas.layout import AttentionBlock

__all__ = ["BlockInputs", "Moments"]


class Moments(Protocol):
    """What calibration knows of a block's inputs x: their ``count``, ``mean`` (d,) and ``second``
    moment (d, d), the mean of x x^T, both float64."""

    @property
    def count(self) -> float: ...

    @property
    def mean(self) -> Array: ...

    @property
    def second(self) -> Array: ...


class BlockInputs:
    """How a block's inputs weigh errors: ``scale``, the root mean square of each one, and with
    moments the ``mean`` and factors F of their second moments F F^T, (d, d) float64 each. Of
    cross-attention these are what query reads, or with ``source`` what key and value read.

    ``centred``: of the covariance; ``plain``: of x; ``extended``: of [x; 1]. The covariance is
    shrunk towards its diagonal by d / (d + 10 count), so that directions that few rows happened not
    to take still count (of the factors tried, 10 kept MiniLM's embeddings best at 150 and 400 rows
    of 384 inputs).
    """

    mean: Array
    centred: Array

    def __init__(
        self,
        block: AttentionBlock,
        arrays: Mapping[str, Array],
        moments: Moments | None,
        source: bool = False,
    ) -> None:
        matrix = block.value if source else block.query
        norm = block.norm_cross if source and block.cross else block.norm
        self.known = moments is not None
        self.scale = None
        if moments is None:
            if norm is not None:
                self.scale = _input_scale(arrays, norm, block.norm_offset, matrix.cols)
            return
        d = matrix.cols
        self.mean = np.asarray(moments.mean, np.float64)
        second = np.asarray(moments.second, np.float64)
        if self.mean.shape != (d,) or second.shape != (d, d):
            raise TensorError(
                f"{block.name}: moments of shapes {self.mean.shape} and {second.shape} for "
                f"{matrix.weight!r} with {d} inputs; calibrate with this model"
            )
        if not (np.isfinite(second).all() and np.isfinite(self.mean).all()):
            raise TensorError(f"{block.name}: the moments of its inputs hold NaN or Inf")
        covariance = second - np.outer(self.mean, self.mean)
        variance = covariance.diagonal().copy()
        largest = variance.max()
        if not (moments.count > 1 and largest > 1e-12 * second.diagonal().max()):
            raise TensorError(
                f"{block.name}: its calibrated inputs do not vary ({moments.count:g} rows); "
                "calibrate with more rows"
            )
        covariance *= 1 - _shrinkage(d, float(moments.count))
        # inputs that never varied get a little variance, so that no input counts for nothing
        np.fill_diagonal(covariance, np.maximum(variance, 1e-12 * largest))
        self.centred = np.linalg.cholesky(covariance)

    def weigh(self, rows: Array, bias: Array | None = None, centred: bool = False) -> Array:
        """Rows (..., d) in the units of x's second moment: the norms of what comes back are the
        root mean squares of row x + bias, or if ``centred`` their standard deviations."""
        if self.known and centred:
            return np.asarray(rows @ self.centred)
        if not self.known and self.scale is not None:
            rows = rows * self.scale
        if bias is None or centred:
            return np.asarray(rows @ self.plain) if self.known else rows
        rows = np.concatenate([rows, bias[..., None]], axis=-1)
        return np.asarray(rows @ self.extended) if self.known else rows

    @cached_property
    def plain(self) -> Array:
        return np.linalg.cholesky(self.centred @ self.centred.T + np.outer(self.mean, self.mean))

    @cached_property
    def extended(self) -> Array:
        d = len(self.mean)
        factor = np.zeros((d + 1, d + 1))
        factor[:d, :d], factor[:d, d], factor[d, d] = self.centred, self.mean, 1.0
        return factor


def _shrinkage(d: int, count: float) -> float:
    # the least amount keeps the Cholesky factorisation positive definite
    return max(d / (d + 10 * count), 1e-7)


def _input_scale(arrays: Mapping[str, Array], norm: str, offset: float, cols: int) -> Array | None:
    """|gain| of a normalisation, (cols,) float64; None if unknown. Gains near zero are raised to a
    thousandth of the largest, so that no input counts for nothing."""
    gain = next((arrays[n] for n in (f"{norm}.weight", f"{norm}.gamma") if n in arrays), None)
    if gain is None or gain.shape != (cols,):
        return None
    scale = np.abs(gain.astype(np.float64) + offset)
    largest = float(scale.max())
    return np.maximum(scale, 1e-3 * largest) if largest > 0 else None
