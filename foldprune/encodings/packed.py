"""Pruned tensors: a bit mask and the kept values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .. import _core
from ..errors import FormatError
from .base import WEIGHT_DTYPES, Array, Parts, in_range, part

__all__ = ["Packed", "check_mask"]


@dataclass(frozen=True)
class Packed:
    """Bit mask and kept values.

    ``mask`` has a bit per ``block`` (rows, columns) of the (out x in) matrix, row-major, least
    significant bit first; ``values`` are the kept elements in row-major order. ``transposed``: the
    tensor is stored (in x out).
    """

    matrix_shape: tuple[int, int]
    mask: Array
    values: Array
    block: tuple[int, int] = (1, 1)
    transposed: bool = False
    kind: ClassVar[str] = "packed"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix_shape[::-1] if self.transposed else self.matrix_shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.values.dtype

    @property
    def numbers(self) -> int:
        return int(self.values.size)

    @classmethod
    def from_mask(
        cls,
        matrix: Array,
        mask: Array,
        block: tuple[int, int] = (1, 1),
        transposed: bool = False,
        threads: int = 1,
    ) -> Packed:
        """Of an (out x in) matrix and booleans of its shape, True where an element is kept; with a
        bit per block where the mask consists of whole blocks."""
        bits = np.packbits(mask.ravel(), bitorder="little")
        values = _core.pack(np.ascontiguousarray(matrix), bits, threads)
        shape = (mask.shape[0], mask.shape[1])
        if block != (1, 1):
            coarse = np.packbits(mask[:: block[0], :: block[1]].ravel(), bitorder="little")
            if np.array_equal(_core.mask_blocks(coarse, *shape, *block, threads), bits):
                return cls(shape, coarse, values, block, transposed)
        return cls(shape, bits, values, (1, 1), transposed)

    def element_mask(self, threads: int = 1) -> Array:
        if self.block == (1, 1):
            return self.mask
        return _core.mask_blocks(self.mask, *self.matrix_shape, *self.block, threads)

    def unpack(self, threads: int = 1) -> Array:
        matrix = _core.unpack(self.values, self.element_mask(threads), self.matrix_shape, threads)
        return np.ascontiguousarray(matrix.T) if self.transposed else matrix

    def parts(self) -> Parts:
        return {"mask": self.mask, "values": self.values}

    def params(self) -> dict[str, Any]:
        params: dict[str, Any] = {}
        if self.block != (1, 1):
            params["block"] = list(self.block)
        if self.transposed:
            params["transposed"] = True
        return params

    @classmethod
    def restore(
        cls, shape: tuple[int, ...], dtype: np.dtype[Any], params: Mapping[str, Any], parts: Parts
    ) -> Packed:
        transposed = bool(params.get("transposed", False))
        if len(shape) != 2:
            raise FormatError(f"a packed tensor has two dimensions, not {len(shape)}")
        rows, cols = shape[::-1] if transposed else shape
        block = params.get("block", [1, 1])
        if not isinstance(block, list) or len(block) != 2:
            raise FormatError("packed: 'block' is a pair of sizes")
        block_rows, block_cols = (in_range(b, 1, 1 << 40, "block") for b in block)
        bits = -(-rows // block_rows) * -(-cols // block_cols)
        mask = part(parts, "mask", np.dtype("u1"), ((bits + 7) // 8,))
        values = part(parts, "values", dtype, (None,))
        if dtype not in WEIGHT_DTYPES:
            raise FormatError(f"packed: values cannot be {dtype}")
        packed = cls((rows, cols), mask, values, (block_rows, block_cols), transposed)
        check_mask("packed", packed.element_mask(), rows * cols, values)
        return packed


def check_mask(kind: str, mask: Array, elements: int, values: Array) -> None:
    """FormatError unless the bits over so many elements keep as many as there are values."""
    try:
        kept = _core.mask_count(mask, elements)
    except ValueError as error:
        raise FormatError(f"{kind}: {error}") from None
    if kept != values.size:
        raise FormatError(f"{kind}: the mask keeps {kept} elements, {values.size} are stored")
