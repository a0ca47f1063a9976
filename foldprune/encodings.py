"""How one tensor is stored: each encoding can give the dense tensor back from its own parts alone.

A part is an array with a short name; ``params`` is what else has to be remembered, as JSON.
``restore`` is the inverse of both and trusts nothing that it reads: sizes are checked before
anything of the claimed size is allocated. ``numbers`` counts what stands for weights (not masks or
indices), ``nbytes`` everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import ml_dtypes
import numpy as np

from . import _core
from .errors import FormatError

__all__ = ["Dense", "Diagonal", "Encoding", "Fused", "Packed", "Planes", "Rows", "Zeros", "restore"]

Array = np.ndarray[Any, np.dtype[Any]]
Parts = dict[str, Array]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
WEIGHT_DTYPES = (np.dtype("f4"), np.dtype("f8"), np.dtype("f2"), BFLOAT16)


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
        array = _part(parts, "", dtype, shape)
        kept = None if params.get("kept") is None else _integer(params, "kept", 0, array.size)
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
        block_rows, block_cols = (_in_range(b, 1, 1 << 40, "block") for b in block)
        bits = -(-rows // block_rows) * -(-cols // block_cols)
        mask = _part(parts, "mask", np.dtype("u1"), ((bits + 7) // 8,))
        values = _part(parts, "values", dtype, (None,))
        if dtype not in WEIGHT_DTYPES:
            raise FormatError(f"packed: values cannot be {dtype}")
        packed = cls((rows, cols), mask, values, (block_rows, block_cols), transposed)
        try:
            kept = _core.mask_count(packed.element_mask(), rows * cols)
        except ValueError as error:
            raise FormatError(f"packed: {error}") from None
        if kept != values.size:
            raise FormatError(f"packed: the mask keeps {kept} elements, {values.size} are stored")
        return packed


@dataclass(frozen=True)
class Rows:
    """IRC: per head, fewer rows than the head has, written back as groups of identical ones.

    ``cols`` is None for a bias vector. With ``pivots`` (one column per stored row) each head's
    rows hold the identity in their pivot columns, which is not stored. ``values`` runs head by
    head.
    """

    heads: int
    head_dim: int
    cols: int | None
    ranks: Array  # (heads,) int32
    values: Array  # 1-D
    pivots: Array | None = None  # (sum of ranks,) int32
    kind: ClassVar[str] = "rows"

    @property
    def shape(self) -> tuple[int, ...]:
        rows = self.heads * self.head_dim
        return (rows,) if self.cols is None else (rows, self.cols)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.values.dtype

    @property
    def numbers(self) -> int:
        return int(self.values.size)

    def factors(self) -> list[Array]:
        """Each head's stored rows, (rank x cols) float64, identity columns filled in."""
        cols = 1 if self.cols is None else self.cols
        out, value, row = [], 0, 0
        for rank in self.ranks.tolist():
            factor = np.zeros((rank, cols))
            free = np.ones(cols, bool)
            if self.pivots is not None:
                pivots = self.pivots[row : row + rank]
                factor[np.arange(rank), pivots] = 1.0
                free[pivots] = False
            size = rank * int(free.sum())
            factor[:, free] = self.values[value : value + size].reshape(rank, -1)
            value, row = value + size, row + rank
            out.append(factor)
        return out

    def unpack(self, threads: int = 1) -> Array:
        cols = 1 if self.cols is None else self.cols
        dense = np.zeros((self.heads, self.head_dim, cols), self.dtype)
        for head, factor in zip(dense, self.factors(), strict=True):
            if len(factor):
                sizes = group_sizes(len(factor), self.head_dim)
                head[:] = np.repeat(factor / np.sqrt(sizes)[:, None], sizes, axis=0)
        return dense.reshape(self.shape)

    def parts(self) -> Parts:
        parts = {"ranks": self.ranks, "values": self.values}
        if self.pivots is not None:
            parts["pivots"] = self.pivots
        return parts

    def params(self) -> dict[str, Any]:
        return {"heads": self.heads}

    @classmethod
    def restore(
        cls, shape: tuple[int, ...], dtype: np.dtype[Any], params: Mapping[str, Any], parts: Parts
    ) -> Rows:
        heads, head_dim, cols = _head_shape(shape, params)
        ranks = _ranks(parts, heads, head_dim)
        total = int(ranks.sum())
        pivots = None
        if "pivots" in parts:
            pivots = _part(parts, "pivots", np.dtype("i4"), (total,))
            if cols is None:
                raise FormatError("rows: a bias has no pivots")
            _check_distinct(pivots, ranks, cols, "pivots")
        width = 1 if cols is None else cols
        size = sum(r * (width - r * (pivots is not None)) for r in ranks.tolist())
        values = _part(parts, "values", dtype, (size,))
        return cls(heads, head_dim, cols, ranks, values, pivots)


@dataclass(frozen=True)
class Planes:
    """The kept 2-planes of every head under rotary position embedding; other planes are zero.

    ``planes`` lists them head by head; None: every head keeps all. ``pairing``: plane p is rows
    (p, p + head_dim / 2) ("half") or (2p, 2p + 1) ("adjacent"). With ``pivots`` a plane's pivot
    column is (1, 0), which is not stored.
    """

    heads: int
    head_dim: int
    cols: int | None
    pairing: str
    ranks: Array
    planes: Array | None
    values: Array
    pivots: Array | None = None
    kind: ClassVar[str] = "planes"

    @property
    def shape(self) -> tuple[int, ...]:
        rows = self.heads * self.head_dim
        return (rows,) if self.cols is None else (rows, self.cols)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.values.dtype

    @property
    def numbers(self) -> int:
        return int(self.values.size)

    def unpack(self, threads: int = 1) -> Array:
        cols = 1 if self.cols is None else self.cols
        half = self.head_dim // 2
        dense = np.zeros((self.heads, self.head_dim, cols), self.dtype)
        head = np.repeat(np.arange(self.heads), self.ranks)
        planes = np.tile(np.arange(half), self.heads) if self.planes is None else self.planes
        first = planes if self.pairing == "half" else 2 * planes
        second = planes + half if self.pairing == "half" else first + 1
        total = len(planes)
        pairs = np.empty((total, 2, cols), self.dtype)
        if self.pivots is None:
            pairs[:] = self.values.reshape(total, 2, cols)
        else:
            free = np.ones((total, cols), bool)
            free[np.arange(total), self.pivots] = False
            pairs[np.broadcast_to(free[:, None, :], pairs.shape)] = self.values
            pairs[np.arange(total), 0, self.pivots] = 1
            pairs[np.arange(total), 1, self.pivots] = 0
        dense[head, first] = pairs[:, 0]
        dense[head, second] = pairs[:, 1]
        return dense.reshape(self.shape)

    def parts(self) -> Parts:
        parts = {"ranks": self.ranks, "values": self.values}
        if self.planes is not None:
            parts["planes"] = self.planes
        if self.pivots is not None:
            parts["pivots"] = self.pivots
        return parts

    def params(self) -> dict[str, Any]:
        return {"heads": self.heads, "pairing": self.pairing}

    @classmethod
    def restore(
        cls, shape: tuple[int, ...], dtype: np.dtype[Any], params: Mapping[str, Any], parts: Parts
    ) -> Planes:
        heads, head_dim, cols = _head_shape(shape, params)
        pairing = params.get("pairing")
        if pairing not in ("half", "adjacent") or head_dim % 2:
            raise FormatError(f"planes: unknown pairing {pairing!r} or odd head size {head_dim}")
        ranks = _ranks(parts, heads, head_dim // 2)
        total = int(ranks.sum())
        planes = None
        if "planes" in parts:
            planes = _part(parts, "planes", np.dtype("i4"), (total,))
            _check_distinct(planes, ranks, head_dim // 2, "planes")
        elif total != heads * (head_dim // 2):
            raise FormatError(
                "planes: some heads keep only part of their planes, but not told which"
            )
        pivots, width = None, 1 if cols is None else cols
        if "pivots" in parts:
            pivots = _part(parts, "pivots", np.dtype("i4"), (total,))
            if cols is None or np.any((pivots < 0) | (pivots >= width)):
                raise FormatError("planes: a pivot is out of range")
        values = _part(parts, "values", dtype, (total * 2 * (width - (pivots is not None)),))
        return cls(heads, head_dim, cols, pairing, ranks, planes, values, pivots)


@dataclass(frozen=True)
class Diagonal:
    """DWC: each value head reads the coordinates ``pivots`` of its input (a diagonal up to order);
    its other columns hold a remainder of rank k: none (0), factors left (rank x k) and right (k x
    (cols - rank)), or, from k = ``whole`` on, the remainder itself in right."""

    heads: int
    head_dim: int
    cols: int
    ranks: Array  # (heads,) int32: pivots of each head
    pivots: Array
    remainder_ranks: Array  # (heads,) int32
    left: Array
    right: Array
    kind: ClassVar[str] = "diagonal"

    @staticmethod
    def sizes(rank: int, k: int, cols: int) -> tuple[int, int]:
        """Numbers in left and right. k counts as whole where factors would not be smaller."""
        if k * cols >= rank * (cols - rank):
            return 0, rank * (cols - rank)
        return rank * k, k * (cols - rank)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.heads * self.head_dim, self.cols)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.right.dtype

    @property
    def numbers(self) -> int:
        return int(self.left.size + self.right.size)

    def unpack(self, threads: int = 1) -> Array:
        dense = np.zeros((self.heads, self.head_dim, self.cols), self.dtype)
        row = left = right = 0
        for head, rank, k in zip(
            dense, self.ranks.tolist(), self.remainder_ranks.tolist(), strict=True
        ):
            pivots = self.pivots[row : row + rank]
            free = np.ones(self.cols, bool)
            free[pivots] = False
            a_size, b_size = self.sizes(rank, k, self.cols)
            a, b = self.left[left : left + a_size], self.right[right : right + b_size]
            rest = b.reshape(-1, self.cols - rank) if b_size else np.zeros((0, self.cols - rank))
            if a_size:
                rest = a.reshape(rank, k).astype(np.float64) @ rest.astype(np.float64)
            filled = np.zeros((rank, self.cols))
            if len(rest):
                filled[:, free] = rest
            filled[np.arange(rank), pivots] = 1.0
            head[:rank] = filled
            row, left, right = row + rank, left + a_size, right + b_size
        return dense.reshape(self.shape)

    def parts(self) -> Parts:
        return {
            "ranks": self.ranks,
            "pivots": self.pivots,
            "remainder_ranks": self.remainder_ranks,
            "left": self.left,
            "right": self.right,
        }

    def params(self) -> dict[str, Any]:
        return {"heads": self.heads}

    @classmethod
    def restore(
        cls, shape: tuple[int, ...], dtype: np.dtype[Any], params: Mapping[str, Any], parts: Parts
    ) -> Diagonal:
        heads, head_dim, cols = _head_shape(shape, params)
        if cols is None:
            raise FormatError("diagonal: a bias cannot be stored so")
        ranks = _ranks(parts, heads, min(head_dim, cols))
        ks = _ranks(parts, heads, head_dim, "remainder_ranks")
        pivots = _part(parts, "pivots", np.dtype("i4"), (int(ranks.sum()),))
        _check_distinct(pivots, ranks, cols, "pivots")
        sizes = [cls.sizes(r, k, cols) for r, k in zip(ranks.tolist(), ks.tolist(), strict=True)]
        left = _part(parts, "left", dtype, (sum(a for a, _ in sizes),))
        right = _part(parts, "right", dtype, (sum(b for _, b in sizes),))
        return cls(heads, head_dim, cols, ranks, pivots, ks, left, right)


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
        segments = [{**describe(s), "rows": s.shape[0]} for s in self.segments]
        return {
            "segments": segments,
            "transposed": self.transposed,
            "interleave": self.interleave,
        }

    @classmethod
    def restore(
        cls, shape: tuple[int, ...], dtype: np.dtype[Any], params: Mapping[str, Any], parts: Parts
    ) -> Fused:
        transposed = bool(params.get("transposed", False))
        described = params.get("segments")
        if not shape or not isinstance(described, list) or not described:
            raise FormatError("fused: expected a list of segments")
        logical = shape[::-1] if transposed else shape
        segments = []
        for i, segment in enumerate(described):
            if not isinstance(segment, dict) or segment.get("kind") == cls.kind:
                raise FormatError("fused: a segment is a plain encoding")
            rows = _integer(segment, "rows", 0, logical[0])
            own = {
                n.partition(".")[2]: p for n, p in parts.items() if n.partition(".")[0] == str(i)
            }
            segments.append(restore((rows, *logical[1:]), dtype, segment, own))
        interleave = _integer(params, "interleave", 0, logical[0])
        if interleave and any(s.shape[0] != segments[0].shape[0] for s in segments):
            raise FormatError("fused: interleaved segments are of one size")
        if interleave and segments[0].shape[0] % interleave:
            raise FormatError("fused: segments do not divide into the heads they alternate by")
        fused = cls(tuple(segments), transposed, interleave)
        if fused.shape != shape:
            raise FormatError(f"fused: segments make up {fused.shape}, not {shape}")
        return fused


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


def group_sizes(rank: int, head_dim: int) -> Array:
    """How many identical rows each of ``rank`` rows becomes: as equal as can be, the first ones
    larger."""
    sizes = np.full(rank, head_dim // rank)
    sizes[: head_dim % rank] += 1
    return sizes


def _part(parts: Parts, name: str, dtype: np.dtype[Any], shape: tuple[int | None, ...]) -> Array:
    part = parts.get(name)
    if part is None:
        raise FormatError(f"part {name!r} is missing")
    fits = len(part.shape) == len(shape) and all(
        want is None or have == want for have, want in zip(part.shape, shape, strict=True)
    )
    if part.dtype != dtype or not fits:
        raise FormatError(f"part {name!r} is {part.dtype}{part.shape}, expected {dtype}{shape}")
    return part


def _in_range(value: Any, least: int, most: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise FormatError(f"{what}: {value!r} is not a number from {least} to {most}")
    return value


def _integer(params: Mapping[str, Any], name: str, least: int, most: int) -> int:
    return _in_range(params.get(name), least, most, name)


def _head_shape(shape: tuple[int, ...], params: Mapping[str, Any]) -> tuple[int, int, int | None]:
    if len(shape) not in (1, 2) or not shape[0]:
        raise FormatError(f"a tensor of heads has one or two dimensions, not the shape {shape}")
    heads = _integer(params, "heads", 1, shape[0])
    if shape[0] % heads:
        raise FormatError(f"{shape[0]} rows do not divide into {heads} heads")
    return heads, shape[0] // heads, shape[1] if len(shape) == 2 else None


def _ranks(parts: Parts, heads: int, most: int, name: str = "ranks") -> Array:
    ranks = _part(parts, name, np.dtype("i4"), (heads,))
    if np.any((ranks < 0) | (ranks > most)):
        raise FormatError(f"{name}: a rank is outside [0, {most}]")
    return ranks


def _check_distinct(indices: Array, ranks: Array, limit: int, what: str) -> None:
    """Every head's own indices lie in [0, limit) and are distinct."""
    if np.any((indices < 0) | (indices >= limit)):
        raise FormatError(f"{what}: an index is outside [0, {limit})")
    head = np.repeat(np.arange(len(ranks), dtype=np.int64), ranks)
    if len(np.unique(head * limit + indices)) != len(indices):
        raise FormatError(f"{what}: an index stands twice in one head")
