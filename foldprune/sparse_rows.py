"""FPP of the rows that IRC keeps: more ranks in as many numbers.

A row l of the queries and a row r of the keys stand for (l x) (r y) in the logits. What an error of
l x costs does not depend on which of its numbers are missing, so each row is pruned as one of any
matrix (fit.py): by a sweep, exchanges, and the least squares of what is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from . import _core, irc
from .encodings import Array, Planes, Rows
from .fit import SEARCH_DAMPING, SWAP_ROUNDS, Gram
from .fold import Fold, load, round_to
from .inputs import BlockInputs, Moments
from .schemas.layout import AttentionBlock

__all__ = ["fold"]

Pair = tuple[Array, Array | None]  # weight and bias


def fold(
    block: AttentionBlock,
    arrays: Mapping[str, Array],
    ranks: int | Array,
    share: float,
    threads: int = 1,
    moments: Moments | None = None,
    source: Moments | None = None,
) -> Fold:
    """As ``irc.fold``, then ``share`` of the numbers of every row that is kept is removed."""
    folded = irc.fold(block, arrays, ranks, threads, moments, source, plain=True)
    inputs, key_inputs = irc.logit_inputs(block, arrays, moments, source)
    _prune(folded, "query", inputs, False, share, threads)
    # without rotation a constant in the keys drops out of the softmax
    _prune(folded, "key", key_inputs, block.rope is None, share, threads)
    folded.error = _error(block, arrays, folded, inputs, key_inputs)
    return folded


def _prune(
    folded: Fold, role: str, inputs: BlockInputs, centred: bool, share: float, threads: int
) -> None:
    """The rows of "query" or "key". ``centred``: a constant in what they give does not matter; a
    bias makes up for one."""
    weight, bias = folded.weights[role], folded.biases.get(role)
    assert isinstance(weight, (Rows, Planes)) and weight.cols is not None
    rows = weight.values.reshape(-1, weight.cols).astype(np.float64)
    own = bias if isinstance(bias, (Rows, Planes)) else None
    mask, new = _prune_rows(rows, inputs, centred or own is not None, share, threads)
    values = round_to(_core.pack(new, mask, threads), weight.dtype)
    folded.weights[role] = replace(weight, values=values, mask=mask)
    if own is not None and inputs.known:
        moved = own.values + (rows - new) @ inputs.mean
        folded.biases[role] = replace(own, values=round_to(moved, own.dtype))


def _prune_rows(
    rows: Array, inputs: BlockInputs, centred: bool, share: float, threads: int
) -> tuple[Array, Array]:
    """Bit mask and new rows."""
    count = round(share * rows.shape[1])
    if not inputs.known:
        scores = np.ascontiguousarray(np.abs(inputs.weigh(rows)), np.float32)
        mask = _core.mask_rows((scores, 1.0, None), count, threads)
        return mask, rows
    factor = inputs.centred if centred else inputs.plain
    second = Gram.damped(factor @ factor.T, SEARCH_DAMPING)
    a, d = _core.obs_factor(second, threads)
    mask, _ = _core.obs_sweep(rows, a, d, "row", count, out=False, threads=threads)
    return _core.swap(rows, mask, second, SWAP_ROUNDS, threads=threads)


def _error(
    block: AttentionBlock,
    arrays: Mapping[str, Array],
    folded: Fold,
    inputs: BlockInputs,
    key_inputs: BlockInputs,
) -> float:
    """What the logits lose, as ``Fold.error`` of IRC: over independent queries and keys, and under
    rotary embedding over all angles between them."""

    def sides(query: Pair, key: Pair) -> tuple[Array, Array]:
        q = _by_head(block, inputs.weigh(*query), block.heads)
        k = _by_head(block, key_inputs.weigh(*key, centred=block.rope is None), block.groups)
        return q, np.repeat(k, block.heads // block.groups, axis=0)

    def product(a: tuple[Array, Array], b: tuple[Array, Array]) -> float:
        """The mean of one's logits times the other's, summed over heads."""
        if block.rope is None:
            q, k = (x @ y.swapaxes(1, 2) for x, y in zip(a, b, strict=True))
        else:
            q, k = ((x * y.conj()).sum(axis=2) for x, y in zip(a, b, strict=True))
        return float((q * k.conj()).real.sum())

    old = sides(_pair(load(block, arrays, block.query)), _pair(load(block, arrays, block.key)))
    new = sides(*(_unpacked(folded, role) for role in ("query", "key")))
    energy = product(old, old)
    error = energy - 2 * product(old, new) + product(new, new)
    return max(error, 0.0) / energy if energy > 0 else 0.0


def _pair(matrix: tuple[Array, Array | None]) -> Pair:
    weight, bias = matrix
    return weight.astype(np.float64), None if bias is None else bias.astype(np.float64)


def _unpacked(folded: Fold, role: str) -> Pair:
    bias = folded.biases.get(role)
    return _pair((folded.weights[role].unpack(), None if bias is None else bias.unpack()))


def _by_head(block: AttentionBlock, rows: Array, heads: int) -> Array:
    """(heads, head_dim, ...), or under rotary embedding a complex number for each plane."""
    rows = rows.reshape(heads, block.head_dim, -1)
    if block.rope is None:
        return rows
    half = block.head_dim // 2
    if block.rope == "adjacent":
        return np.asarray(rows[:, ::2] + 1j * rows[:, 1::2])
    return np.asarray(rows[:, :half] + 1j * rows[:, half:])
