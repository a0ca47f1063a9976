"""What IRC and DWC share: the fold of a block and its cost, and how its matrices are read and its
numbers rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .encodings import Array, Encoding
from .errors import TensorTypeError
from .schemas.layout import AttentionBlock, Matrix
from .tensors import is_weight_dtype

__all__ = [
    "Curve",
    "Fold",
    "Refused",
    "bias_dtype",
    "error_share",
    "exact_in",
    "free_columns",
    "int32",
    "load",
    "load_pair",
    "make_curve",
    "round_to",
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


def round_to(values: Array, dtype: np.dtype[Any]) -> Array:
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


def load(
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


def load_pair(
    block: AttentionBlock, arrays: Mapping[str, Array], first: Matrix, second: Matrix
) -> tuple[tuple[Array, Array | None], tuple[Array, Array | None]]:
    """Both matrices and their biases; TypeError if the matrices' dtypes differ."""
    one, other = load(block, arrays, first), load(block, arrays, second)
    if one[0].dtype != other[0].dtype:
        raise TensorTypeError(
            f"{first.weight!r} is {one[0].dtype}, {second.weight!r} is {other[0].dtype}: a fold "
            "needs one dtype; cast one of them"
        )
    return one, other


def bias_dtype(arrays: Mapping[str, Array], matrix: Matrix) -> np.dtype[Any]:
    assert matrix.bias is not None
    return arrays[matrix.bias].dtype


def int32(values: Any) -> Array:
    return np.ascontiguousarray(values, np.int32)


def free_columns(cols: int, pivots: Array) -> Array:
    """Mask of the columns that are no pivots."""
    free = np.ones(cols, bool)
    free[pivots] = False
    return free


def error_share(error: Array, energy: Array) -> float:
    total = float(energy.sum())
    return float(error.sum()) / total if total > 0 else 0.0


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


def make_curve(
    block: AttentionBlock, squared: Array, energy: float, stored: Array, dense: int, start: int
) -> Curve:
    tails = []
    for row in squared:
        tail = np.concatenate([np.cumsum(row[::-1])[::-1], [0.0]])  # tail[r]: all past rank r
        tails.append(tail / energy if energy > 0 else np.zeros_like(tail))
    return Curve(dense, start, [stored] * block.groups, tails)
