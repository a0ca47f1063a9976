"""Diagonal weight compression (DWC): the values of one attention block as coordinates of its input.

DWC sees the matrices of the outputs, W_o,i W_v,j; see csrc/include/foldprune.h for the core.
inputs.py says what the block's inputs are like.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from . import _core
from .encodings import Array, Dense, Diagonal, Zeros
from .errors import ModelError
from .fold import (
    Curve,
    Fold,
    Refused,
    bias_dtype,
    error_share,
    exact_in,
    free_columns,
    int32,
    load,
    load_pair,
    make_curve,
    round_to,
)
from .inputs import BlockInputs, Moments
from .schemas.layout import AttentionBlock

__all__ = ["curve", "fold"]


def fold(
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
        remainder_ranks = int32(np.where(whole, head_dim, mode))
        left, right, pivots, ranks, error, energy, *factors = _core.dwc_remainder(
            heads, remainder_ranks, threads
        )
        remainder_ranks = np.minimum(remainder_ranks, ranks)
    assert pivots is not None

    lefts, rights = [np.zeros(0)], [np.zeros(0)]
    read = np.zeros((groups, head_dim, cols))  # what each value head reads of its input
    for j, (rank, k) in enumerate(zip(ranks.tolist(), remainder_ranks.tolist(), strict=True)):
        chosen, free = pivots[j, :rank], free_columns(cols, pivots[j, :rank])
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
        int32(ranks),
        int32(np.concatenate([p[:r] for p, r in zip(pivots, ranks.tolist(), strict=True)])),
        int32(remainder_ranks),
        round_to(np.concatenate(lefts), dtype),
        round_to(np.concatenate(rights), dtype),
    )

    folded = Fold({"value": value}, error=error_share(error, energy))
    capacity, rows = left.shape[1], left.shape[2]
    output = np.zeros((rows, block.heads, head_dim))
    output[:, :, :capacity] = left.transpose(2, 0, 1)
    folded.output = round_to(output.reshape(rows, -1), dtype)
    scale = np.linalg.norm(inputs.weigh(read), axis=2)
    folded.output_scale = np.repeat(scale, block.heads // groups, axis=0).ravel().astype(np.float32)
    if block.output.bias is not None and (inputs.known or block.value.bias is not None):
        folded.output_bias = _fold_bias(block, arrays, inputs, value, folded.output)
    if block.value.bias is not None:
        own_dtype = bias_dtype(arrays, block.value)
        if block.output.bias is not None:
            folded.biases["value"] = Zeros((block.value.rows,), own_dtype)
        else:
            bias = np.zeros((groups, head_dim))
            bias[:, :capacity] = right[:, :, cols]
            if inputs.known:
                bias -= (value.unpack().astype(np.float64) @ inputs.mean).reshape(bias.shape)
            folded.biases["value"] = Dense(round_to(bias.ravel(), own_dtype))
    return folded


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
    columns = int32(np.arange(cols).reshape(block.groups, head_dim))
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
        load(block, arrays, matrix) for matrix in (block.value, block.output)
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
    return round_to(total, bias.dtype)


def _balanced(a: Array, b: Array) -> tuple[Array, Array]:
    """The same product with columns of a and rows of b of like norms, as training wants them; by
    powers of two, so exactly."""
    norms = np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1)
    ratio = np.where((norms[0] > 0) & (norms[1] > 0), norms[1] / np.maximum(norms[0], 1e-300), 1.0)
    scale = np.exp2(np.round(np.log2(ratio) / 2))
    return a * scale, b / scale[:, None]


def curve(
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
    return make_curve(block, squared, float(energy.sum()), stored, dense, start)


# ---- what value and output are to the core ------------------------------------------------------


def _output_heads(
    block: AttentionBlock, arrays: Mapping[str, Array], inputs: BlockInputs
) -> tuple[Any, ...]:
    value, output = load_pair(block, arrays, block.value, block.output)
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
