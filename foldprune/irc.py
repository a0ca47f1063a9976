"""Identical row compression (IRC): the rank of one attention block's queries and keys.

IRC sees the matrices of the logits, M_i = [W_q,i b_q,i]^T W_k,j; see csrc/include/foldprune.h for
the core. inputs.py says what the block's inputs are like.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from . import _core
from .encodings import Array, Dense, Encoding, Planes, Rows, Zeros
from .errors import ModelError
from .fold import (
    Curve,
    Fold,
    bias_dtype,
    error_share,
    exact_in,
    free_columns,
    int32,
    load_pair,
    make_curve,
    round_to,
)
from .inputs import BlockInputs, Moments
from .schemas.layout import AttentionBlock

__all__ = ["curve", "fold", "logit_inputs", "plane_scores"]


def fold(
    block: AttentionBlock,
    arrays: Mapping[str, Array],
    ranks: int | Array | None,
    threads: int = 1,
    moments: Moments | None = None,
    source: Moments | None = None,
    plain: bool = False,
) -> Fold:
    """Identical row compression of query and key.

    ``ranks``: kept rank per head (planes under rotary embedding), one number or one per key head;
    None is the lossless level, for dtypes where ``exact_in`` holds. With ``moments`` of the
    block's inputs, the fold has the least mean square error of the logits over independent queries
    and keys, the keys' mean left out as the softmax does; one number is then the mean over the
    heads, and those whose logits need more rank get more of it. ``source``: of the inputs that the
    key of cross-attention reads. ``plain``: all numbers of the rows are stored, as ``Rows`` or
    ``Planes`` whatever their ranks, with no identity in pivot columns.
    """
    if ranks is None:
        moments = source = None
    inputs, key_inputs = logit_inputs(block, arrays, moments, source)
    heads = _logit_heads(block, arrays, inputs, key_inputs)
    dtype = heads[0].dtype
    gauge = exact_in(dtype) and not plain
    limit = block.head_dim // 2 if block.rope else block.head_dim
    if isinstance(ranks, int):
        if ranks > limit:
            what = f"{limit} planes" if block.rope else f"the head size {limit}"
            raise ModelError(f"{block.name}: irc={ranks} is above {what}")
        if inputs.known and key_inputs.known and not block.rope:
            ranks = _spread_ranks(_core.irc_spectrum(heads, threads), ranks)
        else:
            ranks = np.full(block.groups, ranks)
    wanted = None if ranks is None else int32(ranks)
    if block.rope:
        return _irc_planes(block, arrays, heads, inputs, wanted, gauge, plain, threads)

    left, right, pivots, kept, error, energy = _core.irc(heads, wanted, gauge, threads)
    per_group = block.heads // block.groups
    query_ranks = np.repeat(kept, per_group)
    cols = block.query.cols
    rows = [left[i, :r] for i, r in enumerate(query_ranks.tolist())]
    whole = bool(np.all(query_ranks == block.head_dim)) and not plain
    folded = Fold(
        {
            "query": _rows(block.heads, block.head_dim, [r[:, :cols] for r in rows], dtype, whole),
            "key": _key_rows(block, right, pivots, kept, dtype),
        },
        error=error_share(error, energy),
    )
    if block.query.bias is not None:
        parts = [r[:, cols] for r in rows]
        folded.biases["query"] = _rows(
            block.heads, block.head_dim, parts, bias_dtype(arrays, block.query), whole
        )
    if block.key.bias is not None:
        folded.biases["key"] = Zeros((block.key.rows,), bias_dtype(arrays, block.key))
    return folded


def _spread_ranks(squared: Array, mean_rank: int) -> Array:
    """Ranks of every head from their spectra (heads, head_dim): the largest squared singular values
    of all, each in units of the square root of its head's sum. A head may be left with none, and
    then attends to all tokens alike.

    The plain error spends too much on heads of large logits, whose softmax is sharp, the relative
    one too much on heads of small ones. The root between them kept MiniLM's embeddings nearest to
    the dense model's at every mean rank from 2 to 24.
    """
    heads, limit = squared.shape
    if mean_rank in (0, limit):
        return np.full(heads, mean_rank)
    total = np.sqrt(squared.sum(axis=1, keepdims=True))
    gain = np.divide(squared, total, out=np.zeros_like(squared), where=total > 0)
    chosen = np.argsort(-gain, axis=None, kind="stable")[: heads * mean_rank]
    return np.bincount(chosen // limit, minlength=heads)


def _rows(
    heads: int, head_dim: int, rows: list[Array], dtype: np.dtype[Any], whole: bool
) -> Encoding:
    """Stored rows of every head, (rank x cols) or, for a bias, (rank,)."""
    cols = rows[0].shape[1] if rows[0].ndim == 2 else None
    values = round_to(np.concatenate([r.ravel() for r in rows]), dtype)
    if whole:  # nothing is left out: plainer, and never larger than before
        return Dense(values.reshape(heads * head_dim, *(() if cols is None else (cols,))))
    return Rows(heads, head_dim, cols, int32([len(r) for r in rows]), values)


def _key_rows(
    block: AttentionBlock,
    right: Array,
    pivots: Array | None,
    ranks: Array,
    dtype: np.dtype[Any],
) -> Encoding:
    """Right factors, without the identity in their pivot columns."""
    parts, chosen = [], []
    for j, rank in enumerate(ranks.tolist()):
        rows = right[j, :rank]
        if pivots is not None:
            rows = rows[:, free_columns(block.key.cols, pivots[j, :rank])]
            chosen.append(pivots[j, :rank])
        parts.append(rows.ravel())
    values = round_to(np.concatenate(parts), dtype)
    columns = int32(np.concatenate(chosen)) if pivots is not None else None
    return Rows(block.groups, block.head_dim, block.key.cols, int32(ranks), values, columns)


def _irc_planes(
    block: AttentionBlock,
    arrays: Mapping[str, Array],
    heads: tuple[Any, ...],
    inputs: BlockInputs,
    ranks: Array | None,
    gauge: bool,
    plain: bool,
    threads: int,
) -> Fold:
    adjacent = block.rope == "adjacent"
    scores = _plane_scores(block, heads, inputs, threads)
    left, right, pivots, kept, error, energy, planes = _core.rope(
        heads, adjacent, scores, ranks, gauge, threads
    )
    if pivots is not None and not _pivots_hold(right, pivots, kept):
        # a key plane whose weights are all zero but whose bias is not has no column to normalise
        left, right, pivots, kept, error, energy, planes = _core.rope(
            heads, adjacent, scores, ranks, False, threads
        )
    dtype, cols, head_dim = heads[0].dtype, block.query.cols, block.head_dim
    per_group = block.heads // block.groups
    query_ranks = np.repeat(kept, per_group)

    def ragged(array: Array, ranks: Array) -> Array:
        return np.concatenate([a[:r] for a, r in zip(array, ranks.tolist(), strict=True)])

    q, k = ragged(left, query_ranks), ragged(right, kept)  # (total planes, 2, cols + bias)

    def encode(
        count: int, ranks: Array, values: Array, dtype: np.dtype[Any], columns: Array | None = None
    ) -> Encoding:
        """Values (total planes, 2, cols) or, for a bias, (total planes, 2)."""
        whole = bool(np.all(ranks == head_dim // 2))
        where = planes if count == block.groups else np.repeat(planes, per_group, axis=0)
        width = values.shape[2] if values.ndim == 3 else None
        if columns is not None:
            free = np.ones((len(columns), 1, values.shape[2]), bool)
            free[np.arange(len(columns)), 0, columns] = False
            values = values[np.broadcast_to(free, values.shape)]
        encoding = Planes(
            count,
            head_dim,
            width,
            str(block.rope),
            int32(ranks),
            None if whole else int32(ragged(where, ranks)),
            round_to(values.ravel(), dtype),
            columns,
        )
        dense = whole and columns is None and not plain
        return Dense(encoding.unpack()) if dense else encoding

    columns = None if pivots is None else int32(ragged(pivots, kept))
    folded = Fold(
        {
            "query": encode(block.heads, query_ranks, q[:, :, :cols], dtype),
            "key": encode(block.groups, kept, k[:, :, :cols], dtype, columns),
        },
        error=error_share(error, energy),
    )
    if block.query.bias is not None:
        own_dtype = bias_dtype(arrays, block.query)
        folded.biases["query"] = encode(block.heads, query_ranks, q[:, :, cols], own_dtype)
    if block.key.bias is not None:
        own_dtype = bias_dtype(arrays, block.key)
        folded.biases["key"] = encode(block.groups, kept, k[:, :, cols], own_dtype)
    return folded


def plane_scores(
    block: AttentionBlock, arrays: Mapping[str, Array], moments: Moments, threads: int = 1
) -> Array:
    """What IRC keeps planes by: (key heads, head_dim / 2)."""
    inputs, key_inputs = logit_inputs(block, arrays, moments, moments)
    heads = _logit_heads(block, arrays, inputs, key_inputs)
    return _plane_scores(block, heads, inputs, threads)


def _plane_scores(
    block: AttentionBlock, heads: tuple[Any, ...], inputs: BlockInputs, threads: int
) -> Array:
    """What every plane p is expected to contribute to the logits, E|q_p|^2 E|k_p|^2 with the
    queries of a group summed: (groups, head_dim / 2)."""
    adjacent = block.rope == "adjacent"
    if not inputs.known:
        return _core.rope_scores(heads, adjacent, threads)

    def energies(weight: Array, bias: Array | None, count: int) -> Array:
        rows = weight.astype(np.float64)
        # under rotation neither mean nor bias drops out
        squared = (inputs.weigh(rows) ** 2).sum(axis=1)
        if bias is not None:
            shift = bias.astype(np.float64)
            squared += shift * (2.0 * (rows @ inputs.mean) + shift)
        pairs = (-1, 2) if adjacent else (2, -1)
        return np.asarray(squared.reshape(count, *pairs).sum(axis=2 if adjacent else 1))

    query = energies(heads[0], heads[1], block.heads).reshape(block.groups, -1, block.head_dim // 2)
    return np.asarray(query.sum(axis=1) * energies(heads[2], heads[3], block.groups))


def _pivots_hold(right: Array, pivots: Array, ranks: Array) -> bool:
    return all(
        bool(np.all(right[j, np.arange(r), 0, pivots[j, :r]] == 1))
        for j, r in enumerate(ranks.tolist())
    )


def curve(
    block: AttentionBlock,
    arrays: Mapping[str, Array],
    threads: int = 1,
    moments: Moments | None = None,
    source: Moments | None = None,
) -> Curve:
    inputs, key_inputs = logit_inputs(block, arrays, moments, source)
    heads = _logit_heads(block, arrays, inputs, key_inputs)
    gauge = exact_in(heads[0].dtype)
    cols, head_dim = block.key.cols, block.head_dim
    per_group = block.heads // block.groups
    query_cols = block.query.cols + (block.query.bias is not None)
    dense = (block.query.rows * query_cols) + block.key.rows * (cols + (block.key.bias is not None))
    if block.rope:
        squared = -np.sort(-_plane_scores(block, heads, inputs, threads), axis=1)
        r = np.arange(squared.shape[1] + 1)
        key = 2 * r * (cols + (block.key.bias is not None)) - (2 * r if gauge else 0)
        stored = 2 * r * per_group * query_cols + key
    else:
        squared = _core.irc_spectrum(heads, threads)
        r = np.arange(head_dim + 1)
        stored = r * per_group * query_cols + r * (cols - (r if gauge else 0))
    if not gauge:  # at the whole rank nothing is folded
        stored[-1] = dense // block.groups
    start = int(stored[-1]) * block.groups
    return make_curve(block, squared, float(squared.sum()), stored, dense, start)


# ---- what query and key are to the core ---------------------------------------------------------


def logit_inputs(
    block: AttentionBlock,
    arrays: Mapping[str, Array],
    moments: Moments | None,
    source: Moments | None,
) -> tuple[BlockInputs, BlockInputs]:
    """What query and what key read."""
    inputs = BlockInputs(block, arrays, moments)
    return inputs, BlockInputs(block, arrays, source, source=True) if block.cross else inputs


def _logit_heads(
    block: AttentionBlock, arrays: Mapping[str, Array], inputs: BlockInputs, source: BlockInputs
) -> tuple[Any, ...]:
    query, key = load_pair(block, arrays, block.query, block.key)
    # without rotation the key's bias adds a constant to each row of the softmax and drops out, and
    # so does the keys' mean
    key_bias = key[1] if block.rope else None
    heads = (*query, key[0], key_bias, block.heads, block.groups, inputs.scale, source.scale)
    if block.rope:
        return heads
    left = None
    if inputs.known:
        left = inputs.plain if query[1] is None else inputs.extended
    return (*heads, left, source.centred if source.known else None)
