"""Forward propagation pruning of a set of matrices: scores, masks, packed encodings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from . import _core
from .encodings import Array, Dense, Encoding, Packed, nbytes
from .recipe import Granularity

__all__ = [
    "Cut",
    "Pruned",
    "Target",
    "encode",
    "energy",
    "histogram",
    "mask_lowest",
    "prune",
    "prune_below",
    "prune_cut",
    "prune_neurons",
]

# what the core scores: |x| * scale * col_scale
Scored = tuple[Array, float, Array | None]


@dataclass
class Target:
    """A matrix to prune, (out x in), contiguous. ``scale`` and ``col_scale`` weigh its scores (see
    ``fp_scored``), and so does ``row_scale`` for a matrix whose rows are looked up. ``transposed``:
    the tensor itself is (in x out)."""

    name: str
    matrix: Array
    transposed: bool = False
    scale: float = 1.0
    col_scale: Array | None = None
    row_scale: Array | None = None

    @property
    def scored(self) -> Scored:
        return (self.weighed(self.matrix), self.scale, self.col_scale)

    def weighed(self, matrix: Array) -> Array:
        """A matrix of the target's shape with its rows as they count."""
        if self.row_scale is None:
            return matrix
        return np.ascontiguousarray(matrix * self.row_scale[:, None], np.float32)


@dataclass
class Pruned:
    """``error``: relative squared error of the output; without data, the removed scores squared
    over all scores squared; None if it is not known."""

    encoding: Encoding
    error: float | None
    note: str = ""


def energy(target: Target, threads: int) -> float:
    """Squared norm of the matrix, its rows and columns as they count."""
    return _core.energy((target.weighed(target.matrix), 1.0, target.col_scale), threads)


def prune(
    targets: Sequence[Target],
    rate: float,
    granularity: Granularity,
    scope: str,
    threads: int,
    done: Callable[[Target], None] = lambda target: None,
) -> dict[str, Pruned]:
    """Removes ``rate`` of the targets' weights, lowest scores first; exact to one weight (or
    block).

    Rows always compete within their own matrix, as rows of different matrices differ in length.
    """
    if granularity.kind == "nm":
        out = {}
        for target in targets:
            mask = _core.mask_nm(target.scored, granularity.a, granularity.b, threads)
            out[target.name] = encode(target, mask, (1, 1), threads)
            done(target)
        return out
    if granularity.kind == "row":
        scope = "tensor"
    if scope == "global":
        return _prune_together(targets, rate, granularity, threads, done)
    out = {}
    for target in targets:
        if scope == "row":
            k = round(rate * target.matrix.shape[1])
            mask = _core.mask_rows(target.scored, k, threads)
            out[target.name] = encode(target, mask, (1, 1), threads)
            done(target)
        else:
            out |= _prune_together([target], rate, granularity, threads, done)
    return out


def prune_below(
    targets: Sequence[Target],
    count: int,
    threads: int,
    done: Callable[[Target], None] = lambda target: None,
) -> dict[str, Pruned]:
    """Removes the ``count`` weights of lowest score among all targets."""
    scored, blocks = _scores(targets, Granularity("weight"), threads)
    return _apply(targets, scored, blocks, count, threads, done)


def _prune_together(
    targets: Sequence[Target],
    rate: float,
    granularity: Granularity,
    threads: int,
    done: Callable[[Target], None],
) -> dict[str, Pruned]:
    scored, blocks = _scores(targets, granularity, threads)
    count = round(rate * sum(own[0].size for own in scored))
    return _apply(targets, scored, blocks, count, threads, done)


def _scores(
    targets: Sequence[Target], granularity: Granularity, threads: int
) -> tuple[list[Scored], list[tuple[int, int]]]:
    """What competes, one for each target, and the blocks that it stands for."""
    if granularity.kind == "weight":
        return [target.scored for target in targets], [(1, 1)] * len(targets)
    blocks = [granularity.block(target.matrix.shape[1]) for target in targets]
    grids = [
        _core.block_scores(target.scored, block[0], block[1], threads)
        for target, block in zip(targets, blocks, strict=True)
    ]
    return [(grid, 1.0, None) for grid in grids], blocks


# ---- matrices that are never in memory together -------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """A threshold by a histogram of scores, which add up over matrices: what lies in a bin below
    ``bin`` is removed, and of what each matrix has in that bin the lowest ``share``.

    So the count is exact but for half a weight per matrix, and every score that is removed while a
    lower one stays is within a bin's width of it, 1 part in 128.
    """

    bin: int
    share: float

    @classmethod
    def removing(cls, count: int, histogram: Array) -> Cut:
        """The cut that removes ``count`` of what the histogram counts."""
        below = np.cumsum(histogram)
        at = int(np.searchsorted(below, count))
        if at == len(below):
            return cls(at, 0.0)
        inside = int(histogram[at])
        return cls(at, (count - (int(below[at]) - inside)) / inside if inside else 0.0)

    def count(self, histogram: Array) -> int:
        """How many of one matrix's scores it removes."""
        inside = int(histogram[self.bin]) if self.bin < len(histogram) else 0
        return int(histogram[: self.bin].sum()) + round(self.share * inside)


def histogram(targets: Sequence[Target], granularity: Granularity, threads: int) -> Array:
    """How many of the targets' scores lie in each of the core's bins."""
    return _core.histogram(_scores(targets, granularity, threads)[0], threads)


def prune_cut(
    targets: Sequence[Target],
    cut: Cut,
    granularity: Granularity,
    threads: int,
    done: Callable[[Target], None] = lambda target: None,
) -> dict[str, Pruned]:
    """Removes what lies below the cut."""
    out: dict[str, Pruned] = {}
    for target in targets:
        scored, blocks = _scores([target], granularity, threads)
        count = cut.count(_core.histogram(scored, threads))
        out |= _apply([target], scored, blocks, count, threads, done)
    return out


def _apply(
    targets: Sequence[Target],
    scored: list[Scored],
    blocks: Sequence[tuple[int, int]],
    count: int,
    threads: int,
    done: Callable[[Target], None],
) -> dict[str, Pruned]:
    threshold, ties = _core.select(scored, count, threads)
    out = {}
    for target, own, block in zip(targets, scored, blocks, strict=True):
        mask, used = _core.mask_threshold(own, threshold, ties, threads)
        ties -= used
        out[target.name] = encode(target, mask, block, threads)
        done(target)
    return out


def prune_neurons(
    up: Target, down: Target, gate: Target | None, rate: float, threads: int
) -> dict[str, Pruned]:
    """Removes ``rate`` of a feed-forward layer's hidden units: rows of up and gate with columns of
    down.

    A unit adds down_i * act(gate_i x) * (up_i x), so its score is the product of the norms.
    """
    rows = [target for target in (up, gate) if target is not None]
    score = _norms(down, 0, threads) * np.prod([_norms(t, 1, threads) for t in rows], axis=0)
    mask = mask_lowest(np.ascontiguousarray(score, np.float32), rate, threads)
    out = {t.name: encode(t, mask, (1, t.matrix.shape[1]), threads) for t in rows}
    out[down.name] = encode(down, mask, (down.matrix.shape[0], 1), threads)
    return out


def mask_lowest(scores: Array, share: float, threads: int) -> Array:
    """Bit mask over the scores that removes the lowest ``share`` of them."""
    scored = (scores, 1.0, None)
    threshold, ties = _core.select([scored], round(share * scores.size), threads)
    return _core.mask_threshold(scored, threshold, ties, threads)[0]


def _norms(target: Target, axis: int, threads: int) -> Array:
    """Root mean square of every row (axis 1) or column (axis 0), float64."""
    rows, cols = target.matrix.shape
    block_rows, block_cols = (1, cols) if axis == 1 else (rows, 1)
    return (
        _core.block_scores(target.scored, block_rows, block_cols, threads)
        .ravel()
        .astype(np.float64)
    )


def encode(
    target: Target,
    mask: Array,
    block: tuple[int, int],
    threads: int,
    matrix: Array | None = None,
) -> Pruned:
    """The target's weights (or new ones, ``matrix``) where the mask over its blocks is set, packed
    where that is smaller. The error is that of zeroing the others."""
    rows, cols = target.matrix.shape
    elements = mask if block == (1, 1) else _core.mask_blocks(mask, rows, cols, *block, threads)
    values = _core.pack(target.matrix if matrix is None else matrix, elements, threads)
    packed = Packed((rows, cols), mask, values, block, target.transposed)
    error = 0.0 if matrix is not None else _zeroing_error(target, elements, values, threads)
    if nbytes(packed) < target.matrix.nbytes:
        return Pruned(packed, error)
    return Pruned(
        Dense(packed.unpack(threads), kept=int(values.size)),
        error,
        "stored dense: mask and values would take more bytes",
    )


def _zeroing_error(target: Target, elements: Array, values: Array, threads: int) -> float:
    if values.size == target.matrix.size:
        return 0.0
    if target.col_scale is None and target.row_scale is None:
        kept = _core.energy((values, 1.0, None), threads)
    else:
        dense = _core.unpack(values, elements, target.matrix.shape, threads)
        kept = _core.energy((target.weighed(dense), 1.0, target.col_scale), threads)
    total = energy(target, threads)
    return max(0.0, 1.0 - kept / total) if total > 0 else 0.0
