"""What every encoding is, and the checks that reading one needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import ml_dtypes
import numpy as np

from ..errors import FormatError

__all__ = ["WEIGHT_DTYPES", "Array", "Encoding", "Parts", "in_range", "integer", "nbytes", "part"]

Array = np.ndarray[Any, np.dtype[Any]]
Parts = dict[str, Array]

# what the C core computes with
WEIGHT_DTYPES = (np.dtype("f4"), np.dtype("f8"), np.dtype("f2"), np.dtype(ml_dtypes.bfloat16))


class Encoding(Protocol):
    kind: ClassVar[str]

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def numbers(self) -> int: ...

    def unpack(self, threads: int = 1) -> Array: ...

    def parts(self) -> Parts: ...

    def params(self) -> dict[str, Any]: ...


def nbytes(encoding: Encoding) -> int:
    """Bytes of all parts, masks and indices included."""
    return sum(part.nbytes for part in encoding.parts().values())


def part(parts: Parts, name: str, dtype: np.dtype[Any], shape: tuple[int | None, ...]) -> Array:
    part = parts.get(name)
    if part is None:
        raise FormatError(f"part {name!r} is missing")
    fits = len(part.shape) == len(shape) and all(
        want is None or have == want for have, want in zip(part.shape, shape, strict=True)
    )
    if part.dtype != dtype or not fits:
        raise FormatError(f"part {name!r} is {part.dtype}{part.shape}, expected {dtype}{shape}")
    return part


def in_range(value: Any, least: int, most: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise FormatError(f"{what}: {value!r} is not a number from {least} to {most}")
    return value


def integer(params: Mapping[str, Any], name: str, least: int, most: int) -> int:
    return in_range(params.get(name), least, most, name)
