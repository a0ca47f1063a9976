"""Tensors stored whole, or not at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..errors import FormatError
from .base import Array, Parts, integer, part

__all__ = ["Dense", "Zeros"]


@dataclass(frozen=True)
class Dense:
    """The tensor itself. ``kept`` is how many of its numbers are not pruned away (None: all)."""

    array: Array
    kept: int | None = None
    kind: ClassVar[str] = "dense"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    @property
    def numbers(self) -> int:
        return int(self.array.size) if self.kept is None else self.kept

    def unpack(self, threads: int = 1) -> Array:
        return self.array.copy()

    def parts(self) -> Parts:
        return {"": self.array}

    def params(self) -> dict[str, Any]:
        return {} if self.kept is None else {"kept": self.kept}

    @classmethod
    def restore(
        cls, shape: tuple[int, ...], dtype: np.dtype[Any], params: Mapping[str, Any], parts: Parts
    ) -> Dense:
        array = part(parts, "", dtype, shape)
        kept = None if params.get("kept") is None else integer(params, "kept", 0, array.size)
        return cls(array, kept)


@dataclass(frozen=True)
class Zeros:
    """A tensor that fell away entirely: a bias that drops out of the model or moved into
    another."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    kind: ClassVar[str] = "zeros"

    @property
    def numbers(self) -> int:
        return 0

    def unpack(self, threads: int = 1) -> Array:
        return np.zeros(self.shape, self.dtype)

    def parts(self) -> Parts:
        return {}

    def params(self) -> dict[str, Any]:
        return {}

    @classmethod
    def restore(
        cls, shape: tuple[int, ...], dtype: np.dtype[Any], params: Mapping[str, Any], parts: Parts
    ) -> Zeros:
        if math.prod(shape) > 1 << 24:
            raise FormatError(
                "an all-zero tensor of more than 2^24 elements is not written by foldprune"
            )
        return cls(shape, dtype)
