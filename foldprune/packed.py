"""Matrices that stay packed while they are used.

A packed matrix is cut into tiles of 64 x 64. Each tile has 64 bits a row, set where a weight is
kept, and the kept values row after row (csrc/include/foldprune.h, fp_packed), so that products walk
through the values in order and no dense copy is ever made. The same arrays serve the forward and
the backward pass, lookups of rows and the gradient of the kept values.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from . import _core
from .encodings import WEIGHT_DTYPES, Array
from .errors import TensorError, TensorTypeError
from .options import resolve_threads
from .tensors import is_weight_dtype

__all__ = ["Packed", "pack", "packed_matmul"]

_VALUE_DTYPES = (*WEIGHT_DTYPES, np.dtype(np.int8))
_NAMES = "float32, float64, float16, bfloat16 or int8"


class Packed:
    """A packed (out x in) matrix, made by ``pack`` or from its parts.

    Attributes
    ----------
    shape
        (out, in).
    mask
        uint64, one word for every row of every tile; ``mask_words`` makes it from booleans.
    values
        The kept values, (count,), in the order of the tiles.
    scale
        For int8 values: float32 (out,), what each row's values are multiplied by. Else None.

    Raises ``TensorError`` or ``TensorTypeError`` if the parts do not fit each other.
    """

    __slots__ = ("_core", "mask", "offset", "scale", "shape", "values")

    def __init__(
        self, shape: tuple[int, int], mask: Array, values: Array, scale: Array | None = None
    ) -> None:
        rows, cols = shape
        if values.dtype not in _VALUE_DTYPES:
            raise TensorTypeError(f"values: expected {_NAMES}, got {values.dtype}")
        words = rows * -(-cols // 64)
        if mask.dtype != np.uint64 or mask.shape != (words,):
            raise TensorError(
                f"mask: expected uint64 ({words},) for a {rows} x {cols} matrix, got {mask.dtype} "
                f"{mask.shape}"
            )
        if (scale is not None) != (values.dtype == np.int8):
            raise TensorError("scale: int8 values have one, others have none")
        if scale is not None and (scale.dtype != np.float32 or scale.shape != (rows,)):
            raise TensorError(f"scale: expected float32 ({rows},), got {scale.dtype} {scale.shape}")
        self.shape = (rows, cols)
        # what offsets are derived from may not change behind them
        self.mask = _read_only(mask)
        try:
            self.offset = _read_only(_core.packed_offsets(self.mask, rows, cols))
        except ValueError:
            raise TensorError("mask: bits are set past the last column") from None
        count = int(self.offset[-1])
        if values.shape != (count,):
            raise TensorError(f"values: the mask keeps {count}, got shape {values.shape}")
        self.values = np.require(values, requirements=["C", "A"])
        self.scale = scale if scale is None else np.require(scale, requirements=["C", "A"])
        self._core = (rows, cols, self.mask, self.offset, self.values, self.scale)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the values."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Of all that is kept in memory: values, mask, offsets of the tiles, scales."""
        scale = 0 if self.scale is None else self.scale.nbytes
        return self.values.nbytes + self.mask.nbytes + self.offset.nbytes + scale

    @property
    def density(self) -> float:
        """Kept share of the elements; 0 for an empty matrix."""
        return self.values.size / max(1, self.shape[0] * self.shape[1])

    def unpack(self, threads: int | None = None) -> Array:
        """The dense matrix, (out x in), of the values' dtype, or float32 from int8."""
        return _core.packed_unpack(self._core, resolve_threads(threads))

    def __reduce__(self) -> tuple[Any, ...]:
        return (Packed, (self.shape, self.mask, self.values, self.scale))

    def __repr__(self) -> str:
        return (
            f"Packed({self.shape[0]} x {self.shape[1]}, {self.dtype}, {self.density:.1%} kept, "
            f"{self.nbytes} bytes)"
        )


def _read_only(array: Array) -> Array:
    view = np.require(array, requirements=["C", "A"]).view()
    view.flags.writeable = False
    return view


def mask_words(mask: Array, threads: int = 1) -> Array:
    """The words of a boolean (out x in) mask, as ``Packed.mask`` has them."""
    bits = np.packbits(np.ascontiguousarray(mask).ravel(), bitorder="little")
    rows, cols = mask.shape
    return _core.packed_mask(bits, rows, cols, threads)


def pack(w: Array, mask: Array | None = None, dtype: Any = None) -> Packed:
    """Packs a matrix for ``packed_matmul``.

    Parameters
    ----------
    w
        (out x in), float32, float64, float16 or bfloat16, of finite numbers; any strides.
    mask
        Boolean (out x in), True where a weight is kept; by default the weights that are not zero.
    dtype
        Of the stored values: any of the four, or "int8", rounded to 255 steps with a scale for each
        row. By default w's own.

    Raises ``TensorError`` (a ValueError) or ``TensorTypeError`` (a TypeError).
    """
    if not isinstance(w, np.ndarray):
        raise TensorTypeError(f"w: expected a NumPy array, got {type(w).__name__}")
    if w.ndim != 2:
        raise TensorError(f"w: expected two dimensions (out x in), got shape {w.shape}")
    if not is_weight_dtype(w.dtype):
        raise TensorTypeError(
            f"w: expected float32, float64, float16 or bfloat16 of native byte order, got {w.dtype}"
        )
    stored = value_dtype(w.dtype if dtype is None else dtype)
    threads = resolve_threads(None)
    w = np.require(w, requirements=["C", "A"])
    if not _core.all_finite(w, threads):
        raise TensorError("w: has NaN or infinite numbers; a weight must be finite")
    if mask is None:
        mask = w != 0
    elif not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        raise TensorTypeError(
            f"mask: expected a boolean array, got {getattr(mask, 'dtype', type(mask).__name__)}"
        )
    elif mask.shape != w.shape:
        raise TensorError(f"mask: shape {mask.shape} does not fit w's {w.shape}")
    source = np.dtype(np.float32) if stored == np.int8 else stored
    if source != w.dtype:
        with np.errstate(over="ignore"):
            w = w.astype(source)
        if not _core.all_finite(w, threads):
            raise TensorError(
                f"w: has numbers beyond the range of {stored}; scale it or keep its dtype"
            )
    words = mask_words(mask, threads)
    rows, cols = w.shape
    offset = _core.packed_offsets(words, rows, cols, threads)
    values = _core.packed_fill((rows, cols, words, offset, None, None), w, threads)
    scale = None
    if stored == np.int8:
        core = (rows, cols, words, offset, values, None)
        values, scale = _core.packed_quantise(core, threads)
    return Packed((rows, cols), words, values, scale)


def value_dtype(dtype: Any) -> np.dtype[Any]:
    """A dtype of packed values by its name. TensorTypeError if it is none."""
    message = f"dtype={dtype!r}: expected {_NAMES}"
    try:
        found = np.dtype(bfloat16 if dtype == "bfloat16" else dtype)
    except TypeError:
        raise TensorTypeError(message) from None
    if found not in _VALUE_DTYPES:
        raise TensorTypeError(message)
    return found


def packed_matmul(
    x: Array, packed: Packed, *, bias: Array | None = None, threads: int | None = None
) -> Array:
    """x W^T + bias with a packed W, as a linear layer does.

    Parameters
    ----------
    x
        (..., in); float32, float16 or bfloat16, or float64 if the values are. Sums are in float32
        (float64). Any strides, any number of leading dimensions, none of which needs be above zero.
    packed
        W, (out x in).
    bias
        (out,), or None.
    threads
        By default as many as the process may run on. The result is the same for any number.

    Returns (..., out), of x's dtype. Which kernel runs depends on the number of tokens and on how
    much is kept. Raises ``TensorError`` (a ValueError) or ``TensorTypeError`` (a TypeError).
    """
    if not isinstance(packed, Packed):
        raise TensorTypeError(
            f"packed: expected a Packed matrix, got {type(packed).__name__}; foldprune.pack makes "
            "one"
        )
    rows, cols = packed.shape
    accumulate = np.dtype(np.float64 if packed.dtype == np.float64 else np.float32)
    if not isinstance(x, np.ndarray):
        raise TensorTypeError(f"x: expected a NumPy array, got {type(x).__name__}")
    if not is_weight_dtype(x.dtype) or (x.dtype == np.float64) != (accumulate == np.float64):
        raise TensorTypeError(
            f"x: {x.dtype} with {packed.dtype} values; expected "
            f"{'float64' if accumulate == np.float64 else 'float32, float16 or bfloat16'}: cast x, "
            "or pack the matrix in another dtype"
        )
    if x.ndim < 1 or x.shape[-1] != cols:
        raise TensorError(
            f"x: shape {x.shape} cannot be multiplied with a {rows} x {cols} matrix; its last "
            f"dimension must be {cols}"
        )
    if bias is not None:
        if not isinstance(bias, np.ndarray) or not is_weight_dtype(bias.dtype):
            raise TensorTypeError("bias: expected a floating NumPy array")
        if bias.shape != (rows,):
            raise TensorError(f"bias: expected shape ({rows},), got {bias.shape}")
        bias = np.require(bias, accumulate, ["C", "A"])
    flat = np.require(x, accumulate, ["C", "A"]).reshape(math.prod(x.shape[:-1]), cols)
    y = _core.matmul(packed._core, flat, bias, resolve_threads(threads))
    return y.reshape(*x.shape[:-1], rows).astype(x.dtype, copy=False)
