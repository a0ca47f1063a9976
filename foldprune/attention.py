"""Folds of one attention block: from its matrices to the encodings of its tensors.

IRC sees the logits' matrices M_i = [W_q,i b_q,i]^T W_k,j, DWC the outputs' W_o,i W_v,j; see
csrc/include/foldprune.h for the core. inputs.py says what the block's inputs are like.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import _core
from .encodings import Array, Dense, Diagonal, Encoding, Planes, Rows, Zeros
from .errors import ModelError, TensorTypeError
from .inputs import BlockInputs, Moments
from .schemas.layout import AttentionBlock, Matrix
from .tensors import is_weight_dtype

__all__ = [
    "Curve",
    "Fold",
    "Refused",
    "dwc",
    "dwc_curve",
    "exact_in",
    "irc",
    "irc_curve",
    "plane_scores",
]


@dataclass
class Fold:
    """``weights`` and ``biases`` hold encodings by the role of the matrix ("query", ...), each in
    (out x in) orientation; ``output`` and ``output_bias`` are the new W_o (out x in) and b_o of
    DWC. ``error`` is ||M - M'||^2 / ||M||^2 over all heads. ``output_scale``: root mean square of
    W_o's inputs, per column, when the block's inputs are as above."""

    weights: dict[str, Encoding]
    biases: dict[str, Encoding] = field(default_factory=dict)
    error: float = 0.0
    output: Array | None = None
    output_bias: Array | None = None
    output_scale: Array | None = None


class Refused(Exception):
    """The fold is invalid for this block; the message is the reason."""


def _round(values: Array, dtype: np.dtype[Any]) -> Array:
    """Values in the dtype; Refused if they overflow it or vanish in it."""
    with np.errstate(over="ignore", under="ignore"):
        rounded = values.astype(dtype)
    lost = np.linalg.norm(rounded.astype(np.float64) - values)
    if not lost <= 0.01 * np.linalg.norm(values):
        raise Refused(f"the folded numbers leave the range of {dtype}")
    return rounded


def exact_in(dtype: np.dtype[Any]) -> bool:
    """Whether a change of gauge survives rounding to the dtype. Sixteen bits re-round every number
    by up to one part in 256 to 2,048, which is no longer lossless."""
    return dtype.itemsize >= 4


def _load(
    block: AttentionBlock, arrays: Mapping[str, Array], matrix: Matrix
) -> tuple[Array, Array | None]:
    weight = arrays[matrix.weight]
    bias = arrays[matrix.bias] if matrix.bias is not None else None
    for name, array in ((matrix.weight, weight), (matrix.bias, bias)):
        if array is not None and not is_weight_dtype(array.dtype):
            raise TensorTypeError(
                f"{name!r}: {array.dtype} weights cannot be folded; expected float32, float64, "
                "float16 or bfloat16"
            )
    view = matrix.view(weight, block.heads)
    return view, None if bias is None else matrix.bias_view(bias, block.heads)


def _load_pair(
    block: AttentionBlock, arrays: Mapping[str, Array], first: Matrix, second: Matrix
) -> tuple[tuple[Array, Array | None], tuple[Array, Array | None]]:
    """Both matrices and their biases; TypeError if the matrices' dtypes differ."""
    one, other = _load(block, arrays, first), _load(block, arrays, second)
    if one[0].dtype != other[0].dtype:
        raise TensorTypeError(
            f"{first.weight!r} is {one[0].dtype}, {second.weight!r} is {other[0].dtype}: a fold "
            "needs one dtype; cast one of them"
        )
    return one, other


def _logit_inputs(
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
    query, key = _load_pair(block, arrays, block.query, block.key)
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


def _output_heads(
    block: AttentionBlock, arrays: Mapping[str, Array], inputs: BlockInputs
) -> tuple[Any, ...]:
    value, output = _load_pair(block, arrays, block.value, block.output)
    # rows of the softmax sum to one, so the value's bias is a constant that the output's bias
    # takes up
    extra = value[1] if block.output.bias is None else None
    heads = (output[0].T, None, value[0], extra, block.heads, block.groups, None, inputs.scale)
    if not inputs.known:
        return heads
    if extra is not None:  # the value at the mean input
        extra = extra.astype(np.float64) + value[0].astype(np.float64) @ inputs.mean
    # a bias takes up the mean; without one it is fitted too
    factor = inputs.centred if _has_bias(block) else inputs.plain
    return (*heads[:3], extra, *heads[4:], None, factor)


def _has_bias(block: AttentionBlock) -> bool:
    """Whether anything can take up a constant that is added to the block's output."""
    return block.output.bias is not None or block.value.bias is not None


def _bias_dtype(arrays: Mapping[str, Array], matrix: Matrix) -> np.dtype[Any]:
    assert matrix.bias is not None
    return arrays[matrix.bias].dtype


def _int32(values: Any) -> Array:
    return np.ascontiguousarray(values, np.int32)


# ---- IRC ----------------------------------------------------------------------------------------


def irc(
    block: AttentionBlock,
    arrays: Mapping[str, Array],
    ranks: int | Array | None,
    threads: int = 1,
    moments: Moments | None = None,
    source: Moments | None = None,
) -> Fold:
    """Identical row compression of query and key.

    ``ranks``: kept rank per head (planes under rotary embedding), one number or one per key head;
    None is the lossless level, for dtypes where ``exact_in`` holds. With ``moments`` of the
    block's inputs, the fold has the least mean square error of the logits over independent queries
    and keys, the keys' mean left out as the softmax does; one number is then the mean over the
    heads, and those whose logits need more rank get more of it. ``source``: of the inputs that the
    key of cross-attention reads.
    """
    if ranks is None:
        moments = source = None
    inputs, key_inputs = _logit_inputs(block, arrays, moments, source)
    heads = _logit_heads(block, arrays, inputs, key_inputs)
    dtype = heads[0].dtype
    gauge = exact_in(dtype)
    limit = block.head_dim // 2 if block.rope else block.head_dim
    if isinstance(ranks, int):
        if ranks > limit:
            what = f"{limit} planes" if block.rope else f"the head size {limit}"
            raise ModelError(f"{block.name}: irc={ranks} is above {what}")
        if inputs.known and key_inputs.known and not block.rope:
            ranks = _spread_ranks(_core.irc_spectrum(heads, threads), ranks)
        else:
            ranks = np.full(block.groups, ranks)
    wanted = None if ranks is None else _int32(ranks)
    if block.rope:
        return _irc_planes(block, arrays, heads, inputs, wanted, gauge, threads)

    left, right, pivots, kept, error, energy = _core.irc(heads, wanted, gauge, threads)
    per_group = block.heads // block.groups
    query_ranks = np.repeat(kept, per_group)
    cols = block.query.cols
    rows = [left[i, :r] for i, r in enumerate(query_ranks.tolist())]
    whole = bool(np.all(query_ranks == block.head_dim))
    fold = Fold(
        {
            "query": _rows(block.heads, block.head_dim, [r[:, :cols] for r in rows], dtype, whole),
            "key": _key_rows(block, right, pivots, kept, dtype),
        },
        error=_ratio(error, energy),
    )
    if block.query.bias is not None:
        parts = [r[:, cols] for r in rows]
        fold.biases["query"] = _rows(
            block.heads, block.head_dim, parts, _bias_dtype(arrays, block.query), whole
        )
    if block.key.bias is not None:
        fold.biases["key"] = Zeros((block.key.rows,), _bias_dtype(arrays, block.key))
    return fold


def _spread_ranks(squared: Array, mean_rank: int) -> Array:
    """Ranks of every head from their spectra (heads, head_dim): the largest squared singular values
    of all, each in units of the square root of its head's sum, but one for every head.

    The plain error spends too much on heads of large logits, whose softmax is sharp, the relative
    one too much on heads of small ones. The root between them kept MiniLM's embeddings nearest to
    the dense model's at every mean rank from 2 to 24.
    """
    heads, limit = squared.shape
    if mean_rank in (0, limit):
        return np.full(heads, mean_rank)
    total = np.sqrt(squared.sum(axis=1, keepdims=True))
    gain = np.divide(squared, total, out=np.zeros_like(squared), where=total > 0)
    gain[:, 0] = np.inf
    chosen = np.argsort(-gain, axis=None, kind="stable")[: heads * mean_rank]
    return np.bincount(chosen // limit, minlength=heads)


def _rows(
    heads: int, head_dim: int, rows: list[Array], dtype: np.dtype[Any], whole: bool
) -> Encoding:
    """Stored rows of every head, (rank x cols) or, for a bias, (rank,)."""
    cols = rows[0].shape[1] if rows[0].ndim == 2 else None
    values = _round(np.concatenate([r.ravel() for r in rows]), dtype)
    if whole:  # nothing is left out: plainer, and never larger than before
        return Dense(values.reshape(heads * head_dim, *(() if cols is None else (cols,))))
    return Rows(heads, head_dim, cols, _int32([len(r) for r in rows]), values)


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
            rows = rows[:, _free(block.key.cols, pivots[j, :rank])]
            chosen.append(pivots[j, :rank])
        parts.append(rows.ravel())
    values = _round(np.concatenate(parts), dtype)
    columns = _int32(np.concatenate(chosen)) if pivots is not None else None
    return Rows(block.groups, block.head_dim, block.key.cols, _int32(ranks), values, columns)


def _balanced(a: Array, b: Array) -> tuple[Array, Array]:
    """The same product with columns of a and rows of b of like norms, as training wants them; by
    powers of two, so exactly."""
    norms = np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1)
    ratio = np.where((norms[0] > 0) & (norms[1] > 0), norms[1] / np.maximum(norms[0], 1e-300), 1.0)
    scale = np.exp2(np.round(np.log2(ratio) / 2))
    return a * scale, b / scale[:, None]


def _free(cols: int, pivots: Array) -> Array:
    """Mask of the columns that are no pivots."""
    free = np.ones(cols, bool)
    free[pivots] = False
    return free


def _irc_planes(
    block: AttentionBlock,
    arrays: Mapping[str, Array],
    heads: tuple[Any, ...],
    inputs: BlockInputs,
    ranks: Array | None,
    gauge: bool,
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
            _int32(ranks),
            None if whole else _int32(ragged(where, ranks)),
            _round(values.ravel(), dtype),
            columns,
        )
        return Dense(encoding.unpack()) if whole and columns is None else encoding

    columns = None if pivots is None else _int32(ragged(pivots, kept))
    fold = Fold(
        {
            "query": encode(block.heads, query_ranks, q[:, :, :cols], dtype),
            "key": encode(block.groups, kept, k[:, :, :cols], dtype, columns),
        },
        error=_ratio(error, energy),
    )
    if block.query.bias is not None:
        bias_dtype = _bias_dtype(arrays, block.query)
        fold.biases["query"] = encode(block.heads, query_ranks, q[:, :, cols], bias_dtype)
    if block.key.bias is not None:
        bias_dtype = _bias_dtype(arrays, block.key)
        fold.biases["key"] = encode(block.groups, kept, k[:, :, cols], bias_dtype)
    return fold


def plane_scores(
    block: AttentionBlock, arrays: Mapping[str, Array], moments: Moments, threads: int = 1
) -> Array:
    """What IRC keeps planes by: (key heads, head_dim / 2)."""
    inputs, key_inputs = _logit_inputs(block, arrays, moments, moments)
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


def _ratio(error: Array, energy: Array) -> float:
    total = float(energy.sum())
    return float(error.sum()) / total if total > 0 else 0.0


# ---- DWC ----------------------------------------------------------------------------------------


def dwc(
    block: AttentionBlock,
    arrays: Mapping[str, Array],
    mode: str | int | Array,
    threads: int = 1,
    moments: Moments | None = None,
) -> Fold:
    """Diagonal weight compression of value.

    ``mode``: "slice", "pivot", "lossless", or the remainder's rank (one number, or one per key
    head). With ``moments`` of the value's inputs the output projection is refitted, and where the
    output or the value has a bias, that keeps the block's mean output. Raises Refused where a slice
    is not defined or the dtype's range is left.
    """
    inputs = BlockInputs(block, arrays, None if _is_lossless(mode) else moments, source=True)
    heads = _output_heads(block, arrays, inputs)
    dtype, head_dim, groups = heads[2].dtype, block.head_dim, block.groups
    cols = block.value.cols
    if isinstance(mode, str):
        left, right, pivots, ranks, error, energy = _dwc_named(block, heads, mode, threads)
        remainder_ranks = ranks if _is_lossless(mode) else np.zeros_like(ranks)
        factors = None
    else:
        if isinstance(mode, int):
            if mode > head_dim:
                raise ModelError(f"{block.name}: dwc={mode} is above the head size {head_dim}")
            mode = np.full(groups, mode)
        mode = np.asarray(mode)
        # where factors would not be smaller, keep the remainder itself
        whole = [Diagonal.sizes(head_dim, k, cols)[0] == 0 < k for k in mode.tolist()]
        remainder_ranks = _int32(np.where(whole, head_dim, mode))
        left, right, pivots, ranks, error, energy, *factors = _core.dwc_remainder(
            heads, remainder_ranks, threads
        )
        remainder_ranks = np.minimum(remainder_ranks, ranks)
    assert pivots is not None

    lefts, rights = [np.zeros(0)], [np.zeros(0)]
    read = np.zeros((groups, head_dim, cols))  # what each value head reads of its input
    for j, (rank, k) in enumerate(zip(ranks.tolist(), remainder_ranks.tolist(), strict=True)):
        chosen, free = pivots[j, :rank], _free(cols, pivots[j, :rank])
        if factors is None:
            remainder = right[j, :rank, :cols][:, free]
        else:
            a, b = _balanced(factors[0][j, :rank], factors[1][j][:, free])
            remainder = a @ b
        if Diagonal.sizes(rank, k, cols)[0]:
            lefts.append(a[:, :k].ravel())
            rights.append(b[:k].ravel())
        elif k:
            rights.append(remainder.ravel())
        read[j, np.arange(rank), chosen] = 1.0
        read[j, :rank, free] = remainder.T
    value = Diagonal(
        groups,
        head_dim,
        cols,
        _int32(ranks),
        _int32(np.concatenate([p[:r] for p, r in zip(pivots, ranks.tolist(), strict=True)])),
        _int32(remainder_ranks),
        _round(np.concatenate(lefts), dtype),
        _round(np.concatenate(rights), dtype),
    )

    fold = Fold({"value": value}, error=_ratio(error, energy))
    capacity, rows = left.shape[1], left.shape[2]
    output = np.zeros((rows, block.heads, head_dim))
    output[:, :, :capacity] = left.transpose(2, 0, 1)
    fold.output = _round(output.reshape(rows, -1), dtype)
    scale = np.linalg.norm(inputs.weigh(read), axis=2)
    fold.output_scale = np.repeat(scale, block.heads // groups, axis=0).ravel().astype(np.float32)
    if block.output.bias is not None and (inputs.known or block.value.bias is not None):
        fold.output_bias = _fold_bias(block, arrays, inputs, value, fold.output)
    if block.value.bias is not None:
        bias_dtype = _bias_dtype(arrays, block.value)
        if block.output.bias is not None:
            fold.biases["value"] = Zeros((block.value.rows,), bias_dtype)
        else:
            bias = np.zeros((groups, head_dim))
            bias[:, :capacity] = right[:, :, cols]
            if inputs.known:
                bias -= (value.unpack().astype(np.float64) @ inputs.mean).reshape(bias.shape)
            fold.biases["value"] = Dense(_round(bias.ravel(), bias_dtype))
    return fold


def _is_lossless(mode: str | int | Array) -> bool:
    return isinstance(mode, str) and mode == "lossless"


def _dwc_named(
    block: AttentionBlock, heads: tuple[Any, ...], mode: str, threads: int
) -> tuple[Array, Array, Array | None, Array, Array, Array]:
    cols, head_dim = block.value.cols, block.head_dim
    if _is_lossless(mode):
        return _core.irc(heads, None, True, threads)
    if mode == "pivot":
        return _core.dwc_select(heads, None, min(head_dim, cols), threads)
    if block.groups != block.heads or block.heads * head_dim != cols:
        raise Refused(
            "a slice needs as many key heads as query heads and as many query rows as inputs; "
            f"here are {block.heads} heads, {block.groups} key heads, {block.query.rows} rows and "
            f"{cols} inputs (dwc='pivot' is defined)"
        )
    columns = _int32(np.arange(cols).reshape(block.groups, head_dim))
    return _core.dwc_select(heads, columns, head_dim, threads)


def _fold_bias(
    block: AttentionBlock,
    arrays: Mapping[str, Array],
    inputs: BlockInputs,
    value: Diagonal,
    output: Array,
) -> Array:
    """b_o + W_o b_v and, where the mean input is known, what the fold changes there."""
    assert block.output.bias is not None

    def at_output(weight: Array, constant: Array) -> Array:
        """A constant value, each value head's seen by every query head of its group."""
        by_head = constant.reshape(block.groups, -1)
        seen = np.repeat(by_head, block.heads // block.groups, axis=0).ravel()
        return np.asarray(weight.astype(np.float64) @ seen)

    (old_value, value_bias), (old_output, bias) = (
        _load(block, arrays, matrix) for matrix in (block.value, block.output)
    )
    constant = np.zeros(block.value.rows)
    if value_bias is not None:
        constant += value_bias.astype(np.float64)
    if inputs.known:
        constant += old_value.astype(np.float64) @ inputs.mean
    assert bias is not None
    total = bias.astype(np.float64) + at_output(old_output, constant)
    if inputs.known:
        total -= at_output(output, value.unpack().astype(np.float64) @ inputs.mean)
    return _round(total, bias.dtype)


# ---- what less rank costs -----------------------------------------------------------------------


@dataclass
class Curve:
    """For one block and method: what it costs to keep less.

    ``start`` is the numbers stored at no error ("lossless" where the dtype allows, else dense),
    ``dense`` before any fold. ``stored[j][r]`` and ``error[j][r]``: numbers and error (share of
    the block's energy) of key head j at rank r.
    """

    dense: int
    start: int
    stored: list[Array]
    error: list[Array]


def irc_curve(
    block: AttentionBlock,
    arrays: Mapping[str, Array],
    threads: int = 1,
    moments: Moments | None = None,
    source: Moments | None = None,
) -> Curve:
    inputs, key_inputs = _logit_inputs(block, arrays, moments, source)
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
    return _curve(block, squared, float(squared.sum()), stored, dense, start)


def dwc_curve(
    block: AttentionBlock,
    arrays: Mapping[str, Array],
    threads: int = 1,
    moments: Moments | None = None,
) -> Curve:
    heads = _output_heads(block, arrays, BlockInputs(block, arrays, moments, source=True))
    gauge = exact_in(heads[2].dtype)
    cols, head_dim = block.value.cols, block.head_dim
    has_bias = block.value.bias is not None
    kept_bias = head_dim if has_bias and block.output.bias is None else 0
    dense = block.value.rows * (cols + has_bias)
    squared, energy = _core.dwc_spectrum(heads, threads)
    k = np.arange(head_dim + 1)
    stored = k * cols + kept_bias
    # from some rank on the whole remainder is smaller than its factors
    stored = np.minimum(stored, head_dim * (cols - head_dim) + kept_bias)
    if not gauge:  # at the whole rank nothing is folded
        stored[-1] = dense // block.groups
    start = int(stored[-1]) * block.groups
    return _curve(block, squared, float(energy.sum()), stored, dense, start)


def _curve(
    block: AttentionBlock, squared: Array, energy: float, stored: Array, dense: int, start: int
) -> Curve:
    tails = []
    for row in squared:
        tail = np.concatenate([np.cumsum(row[::-1])[::-1], [0.0]])  # tail[r]: all past rank r
        tails.append(tail / energy if energy > 0 else np.zeros_like(tail))
    return Curve(dense, start, [stored] * block.groups, tails)
