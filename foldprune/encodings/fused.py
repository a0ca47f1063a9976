"""Tensors that hold several matrices, each with an encoding of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..errors import FormatError
from .base import Array, Encoding, Parts, integer

__all__ = ["Fused"]


@dataclass(frozen=True)
class Fused:
    """Several (out x in) matrices in one tensor along the output dimension: one after another, or
    with ``interleave`` heads, head by head."""

    segments: tuple[Encoding, ...]
    transposed: bool = False
    interleave: int = 0
    kind: ClassVar[str] = "fused"

    @property
    def shape(self) -> tuple[int, ...]:
        rows = sum(segment.shape[0] for segment in self.segments)
        rest = self.segments[0].shape[1:]
        return (*rest, rows) if self.transposed else (rows, *rest)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.segments[0].dtype

    @property
    def numbers(self) -> int:
        return sum(segment.numbers for segment in self.segments)

    def unpack(self, threads: int = 1) -> Array:
        dense = [segment.unpack(threads) for segment in self.segments]
        if self.interleave:
            rest = dense[0].shape[1:]
            by_head = [segment.reshape(self.interleave, -1, *rest) for segment in dense]
            fused = np.stack(by_head, axis=1).reshape(-1, *rest)
        else:
            fused = np.concatenate(dense)
        return np.ascontiguousarray(fused.T) if self.transposed else fused

    def parts(self) -> Parts:
        return {
            f"{i}.{name}": part
            for i, segment in enumerate(self.segments)
            for name, part in segment.parts().items()
        }

    def params(self) -> dict[str, Any]:
        segments = [{"kind": s.kind, **s.params(), "rows": s.shape[0]} for s in self.segments]
        return {
            "segments": segments,
            "transposed": self.transposed,
            "interleave": self.interleave,
        }

    @classmethod
    def restore(
        cls, shape: tuple[int, ...], dtype: np.dtype[Any], params: Mapping[str, Any], parts: Parts
    ) -> Fused:
        from . import restore  # segments are encodings of any other kind

        transposed = bool(params.get("transposed", False))
        described = params.get("segments")
        if not shape or not isinstance(described, list) or not described:
            raise FormatError("fused: expected a list of segments")
        logical = shape[::-1] if transposed else shape
        segments = []
        for i, segment in enumerate(described):
            if not isinstance(segment, dict) or segment.get("kind") == cls.kind:
                raise FormatError("fused: a segment is a plain encoding")
            rows = integer(segment, "rows", 0, logical[0])
            own = {
                n.partition(".")[2]: p for n, p in parts.items() if n.partition(".")[0] == str(i)
            }
            segments.append(restore((rows, *logical[1:]), dtype, segment, own))
        interleave = integer(params, "interleave", 0, logical[0])
        if interleave and any(s.shape[0] != segments[0].shape[0] for s in segments):
            raise FormatError("fused: interleaved segments are of one size")
        if interleave and segments[0].shape[0] % interleave:
            raise FormatError("fused: segments do not divide into the heads they alternate by")
        fused = cls(tuple(segments), transposed, interleave)
        if fused.shape != shape:
            raise FormatError(f"fused: segments make up {fused.shape}, not {shape}")
        return fused
