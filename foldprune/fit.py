"""FPP with data: which weights of a matrix leave, and what the others become to make up for it.

With C the second moment of the inputs, H = C + lambda I and W (out x in), the mask comes from a
sweep over the columns (Optimal Brain Surgeon: each removed weight is compensated by the columns to
its right) and the kept weights are then the exact least-squares solution on their support,
w_S = H_SS^-1 (H w)_S, row by row. lambda is chosen on rows that were held out of C.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from . import _core
from .encodings import Array
from .errors import TensorError
from .moments import Moments
from .prune import Pruned, Target, encode, mask_lowest
from .recipe import Granularity

__all__ = ["SEARCH_DAMPING", "SWAP_ROUNDS", "Gram", "fit", "fit_neurons", "row_damage", "sweep"]

SEARCH_DAMPING = 0.01  # of the mean of C's diagonal, for masks
DAMPINGS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_SAMPLE = 4  # groups of eight rows that a damping is chosen on
SWAP_ROUNDS = 2
_ROUNDS = 12  # in which hidden units leave


class Gram:
    """The second moments of an input, and what follows from them once for all matrices that read
    it."""

    def __init__(self, moments: Moments, threads: int) -> None:
        self.moments = moments
        self.threads = threads

    @cached_property
    def second(self) -> Array:
        """(d, d) float64, uncentred."""
        return self.moments.second

    @cached_property
    def split(self) -> tuple[Array, Array] | None:
        """Second moments of the rows to fit and of the rows held out; None without the latter."""
        held = self.moments.held
        return None if held is None else (self.moments.fit, held)

    @cached_property
    def factor(self) -> tuple[Array, Array]:
        return _core.obs_factor(self.damped(self.second, SEARCH_DAMPING), self.threads)

    @cached_property
    def col_scale(self) -> Array:
        """Root mean square of every input, (d,) float32."""
        return np.sqrt(np.diagonal(self.second)).astype(np.float32)

    def mapped(self, change: Array, shift: Array, added: Array) -> Gram:
        """Of the input after head i's part x_i of it became change[i] x_i + shift[i] + e_i, with
        e_i of mean 0, of mean square added[i] and independent; (heads, new, old), (heads, new) and
        (heads, new, new)."""
        heads, new, old = change.shape

        def mapped(second: Array, mean: Array) -> Array:
            blocks = second.reshape(heads, old, heads, old)
            out = np.einsum("iab,ibjc,jdc->iajd", change, blocks, change, optimize=True)
            out[np.arange(heads), :, np.arange(heads)] += added
            out = out.reshape(heads * new, heads * new)
            moved = np.einsum("iab,ib->ia", change, mean.reshape(heads, old)).ravel()
            cross = np.outer(moved + shift.ravel() / 2, shift.ravel())
            return out + cross + cross.T

        gram = Gram(self.moments, self.threads)
        gram.second = mapped(self.second, self.moments.mean)
        if self.split is not None:
            means = self.moments.split_means
            gram.split = (mapped(self.split[0], means[0]), mapped(self.split[1], means[1]))
        else:
            gram.split = None
        return gram

    @staticmethod
    def damped(second: Array, damping: float) -> Array:
        """second + damping * mean(diagonal) * I; I alone where the inputs were all zero."""
        mean = float(np.diagonal(second).mean())
        out = second.copy()
        out[np.diag_indices_from(out)] += damping * mean if mean > 0 else 1.0
        return out

    @property
    def note(self) -> str:
        rows, width = self.moments.rows, len(self.second)
        if rows >= width:
            return ""
        return f"calibrated on {rows} rows for {width} inputs: too few without damping"


def _working(matrix: Array) -> Array:
    """The matrix in a dtype that the solvers take: float64 stays, all else float32."""
    dtype = matrix.dtype if matrix.dtype == np.float64 else np.float32
    return np.ascontiguousarray(matrix, dtype)


def row_damage(matrix: Array, new: Array, gram: Gram) -> tuple[Array, Array]:
    """Per row, E|dw x|^2 and E|w x|^2, float64: the exact expected squared change of each output,
    and its mean square."""
    new = np.ascontiguousarray(new, _working(matrix).dtype)
    return _core.damage(_working(matrix), new, gram.second, gram.threads)


def sweep(matrix: Array, gram: Gram, share: float, row_weight: Array | None) -> tuple[Array, Array]:
    """Mask that keeps 1 - share of the weights, all rows competing, and the swept weights."""
    a, d = gram.factor
    count = round(share * matrix.size)
    mask, swept = _core.obs_sweep(
        _working(matrix), a, d, "block", count, row_weight=row_weight, threads=gram.threads
    )
    assert swept is not None
    return mask, swept


def fit(
    target: Target,
    gram: Gram,
    share: float,
    granularity: Granularity,
    scope: str,
    row_weight: Array | None = None,
) -> Pruned:
    """Removes ``share`` of one matrix's weights and fits the others to the data.

    ``row_weight``: what an error of each output costs, (out,) float64; only the search uses it, as
    the best kept weights of a row do not depend on it. ``scope`` "row": every row loses the same
    share.
    """
    threads, matrix = gram.threads, target.matrix
    if granularity.kind == "nm":
        n, m = granularity.a, granularity.b
        return _finish(target, gram, _search(matrix, gram, "n:m", (n, m)), (1, 1), m)
    if granularity.kind == "weight":
        if scope == "row":
            mask = _search(matrix, gram, "row", round(share * matrix.shape[1]))
        else:
            mask = sweep(matrix, gram, share, row_weight)[0]
        return _finish(target, gram, mask, (1, 1), 0)
    weight = np.ones(len(matrix)) if row_weight is None else row_weight
    block = granularity.block(matrix.shape[1])
    if granularity.kind == "row":  # nothing makes up for an output
        energy = row_damage(matrix, np.zeros_like(matrix), gram)[1]
        grid = np.sqrt(weight * energy)[:, None].astype(np.float32)
    else:
        weighed = np.sqrt(weight)[:, None].astype(np.float32) * matrix.astype(np.float32)
        grid = _core.block_scores((weighed, 1.0, gram.col_scale), *block, threads)
    return _finish(target, gram, mask_lowest(grid, share, threads), block)


def _search(matrix: Array, gram: Gram, rule: str, amount: int | tuple[int, int]) -> Array:
    a, d = gram.factor
    mask, _ = _core.obs_sweep(_working(matrix), a, d, rule, amount, out=False, threads=gram.threads)
    return mask


def _finish(
    target: Target,
    gram: Gram,
    mask: Array,
    block: tuple[int, int],
    swaps_within: int | None = None,
) -> Pruned:
    """Fits what the mask over blocks keeps; ``swaps_within``: the mask may still change, by
    exchanges inside groups of so many columns (0: of a whole row)."""
    threads, matrix = gram.threads, _working(target.matrix)
    elements = mask
    if block != (1, 1):
        rows, cols = matrix.shape
        elements = _core.mask_blocks(mask, rows, cols, *block, threads)
    damping = _choose_damping(matrix, elements, gram)
    damped = gram.damped(gram.second, damping)
    if swaps_within is None:
        new = _core.refit(matrix, elements, damped, threads=threads)
    else:
        mask, new = _core.swap(
            matrix, elements, damped, SWAP_ROUNDS, group=swaps_within, threads=threads
        )
    with np.errstate(over="ignore"):
        stored = new.astype(target.matrix.dtype)
    if not _core.all_finite(stored, threads):
        raise TensorError(
            f"{target.name!r}: the fitted weights leave the range of {target.matrix.dtype}; "
            "compress the model in float32, or with more calibration data"
        )
    changed, energy = row_damage(matrix, stored, gram)
    total = float(energy.sum())
    pruned = encode(target, mask, block, threads, stored)
    pruned.error = float(changed.sum()) / total if total > 0 else 0.0
    facts = [pruned.note, f"{gram.note}, damping {damping:g}" if gram.note else ""]
    pruned.note = "; ".join(fact for fact in facts if fact)
    return pruned


def _choose_damping(matrix: Array, elements: Array, gram: Gram) -> float:
    """The damping whose solution, fitted without the held-out rows, does best on them; judged on a
    sample of the matrix's rows. The error has one valley, which is walked down."""
    if gram.split is None:
        return SEARCH_DAMPING
    second, held = gram.split
    rows, mask = _sample(matrix, elements)

    def error(i: int) -> float:
        if not 0 <= i < len(DAMPINGS):
            return np.inf
        new = _core.refit(rows, mask, gram.damped(second, DAMPINGS[i]), threads=gram.threads)
        return float(_core.damage(rows, new, held, gram.threads)[0].sum())

    best = DAMPINGS.index(SEARCH_DAMPING)
    least = error(best)
    for step in (1, -1):
        moved = False
        while (next_error := error(best + step)) < least:
            best, least, moved = best + step, next_error, True
        if moved:
            break
    return DAMPINGS[best]


def _sample(matrix: Array, elements: Array) -> tuple[Array, Array]:
    """Groups of eight rows, evenly spread, and their mask: eight rows fill whole bytes."""
    rows, cols = matrix.shape
    groups = rows // 8
    if groups <= _SAMPLE:
        return matrix, elements
    chosen = np.linspace(0, groups - 1, _SAMPLE).round().astype(int)
    picked = matrix[: groups * 8].reshape(groups, 8, cols)[chosen].reshape(-1, cols)
    mask = elements[: groups * cols].reshape(groups, cols)[chosen].ravel()
    return np.ascontiguousarray(picked), np.ascontiguousarray(mask)


def fit_neurons(
    up: Target,
    down: Target,
    gate: Target | None,
    gram: Gram,
    share: float,
    row_weight: Array | None = None,
) -> dict[str, Pruned]:
    """Removes ``share`` of a feed-forward layer's hidden units, rows of up and gate with columns of
    down, and refits down. ``gram`` is of down's input.

    The price of unit j is what the output loses when the other units make up for it as well as they
    can: sum_i row_weight_i w_ij^2 / (H^-1)_jj. Units leave in rounds, cheapest first.
    """
    threads, hidden = gram.threads, down.matrix.shape[1]
    mask = _search_columns(down.matrix, gram, round(share * hidden), row_weight)
    out = {}
    for target in (up, gate):
        if target is not None:
            out[target.name] = encode(target, mask, (1, target.matrix.shape[1]), threads)
    out[down.name] = _finish(down, gram, mask, (len(down.matrix), 1))
    return out


def _search_columns(matrix: Array, gram: Gram, count: int, row_weight: Array | None) -> Array:
    """Bit mask over the columns that keeps all but ``count``."""
    weights = matrix.astype(np.float64)
    if row_weight is not None:
        weights *= np.sqrt(row_weight)[:, None]
    inverse = np.linalg.inv(gram.damped(gram.second, SEARCH_DAMPING))
    left = np.arange(matrix.shape[1])
    for i in range(_ROUNDS):
        step = (count * (i + 1)) // _ROUNDS - (count * i) // _ROUNDS
        price = np.square(weights).sum(axis=0) / np.diagonal(inverse)
        order = np.argsort(price, kind="stable")
        out, stay = order[:step], np.sort(order[step:])
        spread = np.linalg.solve(inverse[np.ix_(out, out)], inverse[np.ix_(out, stay)])
        weights = weights[:, stay] - weights[:, out] @ spread
        inverse = inverse[np.ix_(stay, stay)] - inverse[np.ix_(stay, out)] @ spread
        left = left[stay]
    kept = np.zeros(matrix.shape[1], bool)
    kept[left] = True
    return np.packbits(kept, bitorder="little")
