"""How one tensor is stored: each encoding can give the dense tensor back from its own parts alone.

A part is an array with a short name; ``params`` is what else has to be remembered, as JSON.
``restore`` is the inverse of both and trusts nothing that it reads: sizes are checked before
anything of the claimed size is allocated. ``numbers`` counts what stands for weights (not masks or
indices), ``nbytes`` everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..errors import FormatError
from .base import WEIGHT_DTYPES, Array, Encoding, Parts, nbytes
from .dense import Dense, Zeros
from .fused import Fused
from .heads import Diagonal, Planes, Rows, group_sizes
from .packed import Packed

__all__ = [
    "WEIGHT_DTYPES",
    "Array",
    "Dense",
    "Diagonal",
    "Encoding",
    "Fused",
    "Packed",
    "Parts",
    "Planes",
    "Rows",
    "Zeros",
    "describe",
    "group_sizes",
    "nbytes",
    "restore",
]

_KINDS: dict[str, Callable[..., Any]] = {
    cls.kind: cls.restore for cls in (Dense, Zeros, Packed, Rows, Planes, Diagonal, Fused)
}


def describe(encoding: Encoding) -> dict[str, Any]:
    """Kind and params, as JSON."""
    return {"kind": encoding.kind, **encoding.params()}


def restore(
    shape: tuple[int, ...], dtype: np.dtype[Any], described: Mapping[str, Any], parts: Parts
) -> Encoding:
    """The encoding that ``describe`` and ``parts`` came from. FormatError if they contradict each
    other."""
    kind = described.get("kind")
    if kind not in _KINDS:
        raise FormatError(f"unknown encoding {kind!r}: written by a newer foldprune?")
    encoding: Encoding = _KINDS[kind](shape, dtype, described, parts)
    if tuple(encoding.shape) != tuple(shape) or encoding.dtype != dtype:
        raise FormatError(
            f"{kind}: stored as {encoding.dtype}{encoding.shape}, expected {dtype}{shape}"
        )
    if unknown := set(parts) - set(encoding.parts()):
        raise FormatError(f"{kind}: unexpected part(s) {sorted(unknown)}")
    return encoding
