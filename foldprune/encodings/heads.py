"""Folded projections: what is stored of each attention head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .. import _core
from ..errors import FormatError
from .base import WEIGHT_DTYPES, Array, Parts, integer, part
from .packed import check_mask

__all__ = ["Diagonal", "Planes", "Rows", "group_sizes"]


class _HeadRows:
    """What Rows and Planes have in common: ``values`` of heads x head_dim rows. With ``mask``, a
    bit for each number of the stored rows, least significant first, they are the kept ones."""

    heads: int
    head_dim: int
    cols: int | None  # None: a bias vector
    values: Array
    mask: Array | None

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

    def _unmasked(self, rows: int) -> Array:
        """All numbers of that many stored rows."""
        assert self.mask is not None and self.cols is not None
        return _core.unpack(self.values, self.mask, (rows, self.cols), 1)


@dataclass(frozen=True)
class Rows(_HeadRows):
    """IRC: per head, fewer rows than the head has, written back as groups of identical ones.

    ``cols`` is None for a bias vector. With ``pivots`` (one column per stored row) each head's
    rows hold the identity in their pivot columns, which is not stored. ``values`` runs head by
    head. Rows that FPP has pruned have a ``mask`` and no pivots.
    """

    heads: int
    head_dim: int
    cols: int | None
    ranks: Array  # (heads,) int32
    values: Array  # 1-D
    pivots: Array | None = None  # (sum of ranks,) int32
    mask: Array | None = None
    kind: ClassVar[str] = "rows"

    def factors(self) -> list[Array]:
        """Each head's stored rows, (rank x cols) float64, identity columns filled in."""
        cols = 1 if self.cols is None else self.cols
        if self.mask is not None:
            whole = self._unmasked(int(self.ranks.sum())).astype(np.float64)
            return np.split(whole, np.cumsum(self.ranks)[:-1])
        out, value, row = [], 0, 0
        for rank in self.ranks.tolist():
            factor = np.zeros((rank, cols))
            free = np.ones(cols, bool)
            if self.pivots is not None:
                pivots = self.pivots[row : row + rank]
                factor[np.arange(rank), pivots] = 1.0
                free[pivots] = False
            width = int(free.sum())
            size = rank * width
            factor[:, free] = self.values[value : value + size].reshape(rank, width)
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
        if self.mask is not None:
            parts["mask"] = self.mask
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
        if "mask" in parts:
            mask, values = _masked(parts, dtype, total, cols)
            return cls(heads, head_dim, cols, ranks, values, None, mask)
        pivots = None
        if "pivots" in parts:
            pivots = part(parts, "pivots", np.dtype("i4"), (total,))
            if cols is None:
                raise FormatError("rows: a bias has no pivots")
            _check_distinct(pivots, ranks, cols, "pivots")
        width = 1 if cols is None else cols
        size = sum(r * (width - r * (pivots is not None)) for r in ranks.tolist())
        values = part(parts, "values", dtype, (size,))
        return cls(heads, head_dim, cols, ranks, values, pivots)


@dataclass(frozen=True)
class Planes(_HeadRows):
    """The kept 2-planes of every head under rotary position embedding; other planes are zero.

    ``planes`` lists them head by head; None: every head keeps all. ``pairing``: plane p is rows
    (p, p + head_dim / 2) ("half") or (2p, 2p + 1) ("adjacent"). With ``pivots`` a plane's pivot
    column is (1, 0), which is not stored. A ``mask`` is as that of ``Rows``.
    """

    heads: int
    head_dim: int
    cols: int | None
    pairing: str
    ranks: Array
    planes: Array | None
    values: Array
    pivots: Array | None = None
    mask: Array | None = None
    kind: ClassVar[str] = "planes"

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
        if self.mask is not None:
            pairs[:] = self._unmasked(2 * total).reshape(total, 2, cols)
        elif self.pivots is None:
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
        if self.mask is not None:
            parts["mask"] = self.mask
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
            planes = part(parts, "planes", np.dtype("i4"), (total,))
            _check_distinct(planes, ranks, head_dim // 2, "planes")
        elif total != heads * (head_dim // 2):
            raise FormatError(
                "planes: some heads keep only part of their planes, but not told which"
            )
        if "mask" in parts:
            mask, values = _masked(parts, dtype, 2 * total, cols)
            return cls(heads, head_dim, cols, pairing, ranks, planes, values, None, mask)
        pivots, width = None, 1 if cols is None else cols
        if "pivots" in parts:
            pivots = part(parts, "pivots", np.dtype("i4"), (total,))
            if cols is None or np.any((pivots < 0) | (pivots >= width)):
                raise FormatError("planes: a pivot is out of range")
        values = part(parts, "values", dtype, (total * 2 * (width - (pivots is not None)),))
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
        pivots = part(parts, "pivots", np.dtype("i4"), (int(ranks.sum()),))
        _check_distinct(pivots, ranks, cols, "pivots")
        sizes = [cls.sizes(r, k, cols) for r, k in zip(ranks.tolist(), ks.tolist(), strict=True)]
        left = part(parts, "left", dtype, (sum(a for a, _ in sizes),))
        right = part(parts, "right", dtype, (sum(b for _, b in sizes),))
        return cls(heads, head_dim, cols, ranks, pivots, ks, left, right)


def group_sizes(rank: int, head_dim: int) -> Array:
    """How many identical rows each of ``rank`` rows becomes: as equal as can be, the first ones
    larger."""
    sizes = np.full(rank, head_dim // rank)
    sizes[: head_dim % rank] += 1
    return sizes


def _head_shape(shape: tuple[int, ...], params: Mapping[str, Any]) -> tuple[int, int, int | None]:
    if len(shape) not in (1, 2) or not shape[0]:
        raise FormatError(f"a tensor of heads has one or two dimensions, not the shape {shape}")
    heads = integer(params, "heads", 1, shape[0])
    if shape[0] % heads:
        raise FormatError(f"{shape[0]} rows do not divide into {heads} heads")
    return heads, shape[0] // heads, shape[1] if len(shape) == 2 else None


def _ranks(parts: Parts, heads: int, most: int, name: str = "ranks") -> Array:
    ranks = part(parts, name, np.dtype("i4"), (heads,))
    if np.any((ranks < 0) | (ranks > most)):
        raise FormatError(f"{name}: a rank is outside [0, {most}]")
    return ranks


def _masked(parts: Parts, dtype: np.dtype[Any], rows: int, cols: int | None) -> tuple[Array, Array]:
    """Mask and kept values of pruned rows."""
    if cols is None or "pivots" in parts or dtype not in WEIGHT_DTYPES:
        raise FormatError("a mask is for rows of weights without pivots")
    mask = part(parts, "mask", np.dtype("u1"), ((rows * cols + 7) // 8,))
    values = part(parts, "values", dtype, (None,))
    check_mask("rows", mask, rows * cols, values)
    return mask, values


def _check_distinct(indices: Array, ranks: Array, limit: int, what: str) -> None:
    """Every head's own indices lie in [0, limit) and are distinct."""
    if np.any((indices < 0) | (indices >= limit)):
        raise FormatError(f"{what}: an index is outside [0, {limit})")
    head = np.repeat(np.arange(len(ranks), dtype=np.int64), ranks)
    if len(np.unique(head * limit + indices)) != len(indices):
        raise FormatError(f"{what}: an index stands twice in one head")
