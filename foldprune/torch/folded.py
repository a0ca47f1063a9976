"""Projections of attention heads in their folded form, as layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ..encodings import Array, Dense, Diagonal, Encoding, Planes, Rows, Zeros
from ..errors import ModuleError
from .tensors import from_numpy, to_numpy

__all__ = ["FoldedHeads", "FoldedValue", "NoRuntimeForm"]


class NoRuntimeForm(Exception):
    """The encodings have no form to run in; the message is the reason."""


def _parameter(array: Array, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(from_numpy(np.array(array, order="C")).to(dtype))


def _numbers(parameter: torch.Tensor) -> Array:
    return to_numpy("values", parameter).copy()


def _index(array: Array) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64))


def _constant(module: nn.Module, name: str, array: Array) -> None:
    """What follows from the ranks, and is in no state dict."""
    module.register_buffer(name, _index(array), persistent=False)


def _slots(ranks: list[int], width: int) -> Array:
    """Where each head's rows go among heads of ``width`` rows."""
    kept = np.arange(width) < np.array(ranks)[:, None]
    return np.flatnonzero(kept)


class _Folded(nn.Module):
    """Ranks are part of the state, so that values cannot be loaded into heads of other ranks."""

    ranks: torch.Tensor

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("ranks", "remainder_ranks"):
            own, given = getattr(self, name, None), state_dict.get(f"{prefix}{name}")
            if own is not None and given is not None and not torch.equal(own, given.to(own)):
                args[-1].append(
                    f"{prefix}{name}: heads have ranks {own.tolist()}, the state dict's "
                    f"{given.tolist()}; convert the model with the compressed checkpoint they "
                    "belong to"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._follow()

    def _follow(self) -> None:
        """Brings up to date what follows from the indices in the state."""
        raise NotImplementedError


class FoldedHeads(_Folded):
    """Query or key of which each head keeps some rows (``Rows``) or 2-planes (``Planes``).

    Gives (batch, length, heads, width), width being the rows of the largest head and the others'
    missing ones zero, which add nothing to a product. A plane's two rows are next to each other.
    Where heads hold the identity in pivot columns, ``values`` are the other columns alone; where
    FPP has pruned the rows, what their ``mask`` keeps.
    """

    mask: torch.Tensor | None
    stored: torch.Tensor | None
    pivots: torch.Tensor | None
    planes: torch.Tensor | None
    owners: torch.Tensor
    slots: torch.Tensor
    free: torch.Tensor | None
    padded: torch.Tensor | None

    def __init__(self, weight: Rows | Planes, bias: Encoding | None, dtype: torch.dtype) -> None:
        super().__init__()
        assert weight.cols is not None
        self.heads, self.head_dim, self.cols = weight.heads, weight.head_dim, weight.cols
        self.pairing = weight.pairing if isinstance(weight, Planes) else None
        self.per_rank = 1 if self.pairing is None else 2
        ranks = weight.ranks.tolist()
        self.width = self.per_rank * max(1, *ranks)
        self.ragged = any(self.per_rank * rank != self.width for rank in ranks)
        self.total = self.per_rank * sum(ranks)
        self.values = _parameter(weight.values, dtype)
        self.register_buffer("ranks", torch.from_numpy(weight.ranks.copy()))
        # by row: whose pivots it knows, those of its head or those of its plane
        owners = np.repeat(np.arange(self.heads), ranks)
        if self.pairing is not None:
            owners = np.repeat(np.arange(len(owners)), 2)
        self.units = self.heads if self.pairing is None else self.total // 2
        _constant(self, "owners", owners)
        _constant(self, "slots", _slots(ranks, self.width // self.per_rank))
        for name in ("pivots", "planes"):
            indices = getattr(weight, name, None)
            self.register_buffer(name, None if indices is None else _index(indices))
        mask = None if weight.mask is None else torch.from_numpy(weight.mask.copy())
        self.register_buffer("mask", mask)
        self._follow()
        self.bias_kind = None if bias is None else bias.kind
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None)
        if bias is not None and not isinstance(bias, Zeros):
            if isinstance(bias, (Rows, Planes)):
                same = np.array_equal(bias.ranks, weight.ranks) and _same(
                    getattr(bias, "planes", None), getattr(weight, "planes", None)
                )
                if type(bias) is not type(weight) or not same:
                    raise NoRuntimeForm("the bias is folded otherwise than the weight")
                self.bias = _parameter(bias.values, dtype)
            elif isinstance(bias, Dense) and sum(ranks) * self.per_rank == bias.array.size:
                # every row is there: of planes, in the order of the head
                array = bias.array
                if self.pairing is not None:
                    array = array.reshape(self.heads, 2, -1).swapaxes(1, 2)
                self.bias = _parameter(array.reshape(-1), dtype)
            else:
                raise NoRuntimeForm(f"a bias stored as {bias.kind!r} beside folded rows")

    def matrix(self) -> torch.Tensor:
        """(rows of all heads x cols)."""
        shape = self.total, self.cols
        if self.stored is not None:
            return self.values.new_zeros(shape).masked_scatter(self.stored, self.values)
        if self.pivots is None or self.free is None:
            return self.values.view(shape)
        whole = self.values.new_zeros(shape)
        whole[:: self.per_rank].scatter_(1, self.pivots[:, None], 1)
        return whole.masked_scatter(self.free[self.owners], self.values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.linear(x, self.matrix(), self.bias)
        if self.ragged:
            padded = y.new_zeros((*y.shape[:-1], self.heads * self.width))
            slots = self.slots
            if self.per_rank == 2:
                slots = torch.stack((2 * slots, 2 * slots + 1), -1).view(-1)
            y = padded.index_copy(-1, slots, y)
        return y.view(*y.shape[:-1], self.heads, self.width)

    def _follow(self) -> None:
        """What follows from mask, pivots and planes. ``stored``: (rows of all heads x cols);
        ``free``: by head or plane, the columns that are no pivots; ``padded``: (heads x planes of
        the largest head), None for all in order."""
        stored = free = padded = None
        if self.mask is not None:
            bits = self.mask[:, None] >> torch.arange(8, device=self.mask.device) & 1
            stored = bits.bool().view(-1)[: self.total * self.cols].view(self.total, self.cols)
        if self.pivots is not None:
            free = self.pivots.new_ones((self.units, self.cols), dtype=torch.bool)
            free[self.owners[:: self.per_rank], self.pivots] = False
        if self.planes is not None:
            width = self.width // 2
            padded = self.planes.new_zeros(self.heads * width)
            padded = padded.index_copy(0, self.slots, self.planes).view(self.heads, width)
        self.register_buffer("stored", stored, persistent=False)
        self.register_buffer("free", free, persistent=False)
        self.register_buffer("padded", padded, persistent=False)

    def encodings(self) -> tuple[Encoding, Encoding | None]:
        """Weight and bias as they are now."""
        ranks = self.ranks.numpy().copy()
        pivots, planes = (
            None if t is None else t.numpy().astype(np.int32) for t in (self.pivots, self.planes)
        )
        mask = None if self.mask is None else self.mask.numpy().copy()
        shape = (self.heads, self.head_dim)
        values = _numbers(self.values)

        def encode(
            cols: int | None, values: Array, pivots: Array | None, mask: Array | None
        ) -> Encoding:
            if self.pairing is None:
                return Rows(*shape, cols, ranks, values, pivots, mask)
            return Planes(*shape, cols, self.pairing, ranks, planes, values, pivots, mask)

        bias: Encoding | None = None
        if self.bias_kind == "zeros":
            bias = Zeros((self.heads * self.head_dim,), values.dtype)
        elif self.bias is not None:
            bias = encode(None, _numbers(self.bias), None, None)
            if self.bias_kind == "dense":
                bias = Dense(bias.unpack())
        return encode(self.cols, values, pivots, mask), bias

    def extra_repr(self) -> str:
        unit = "rows" if self.pairing is None else "planes"
        kept = sorted(set(self.ranks.tolist()))
        return f"in_features={self.cols}, heads={self.heads}, {unit}={kept}"


def _same(a: Array | None, b: Array | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))


class FoldedValue(_Folded):
    """Value heads that read coordinates of their input (``Diagonal``), and, of the other
    coordinates, what a remainder of low rank gives. Gives (batch, length, heads, head_dim)."""

    pivots: torch.Tensor
    remainder_ranks: torch.Tensor
    readers: torch.Tensor
    free: torch.Tensor
    owners: torch.Tensor
    slots: torch.Tensor

    def __init__(self, weight: Diagonal, bias: Encoding | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.head_dim, self.cols = weight.heads, weight.head_dim, weight.cols
        ranks, ks = weight.ranks.tolist(), weight.remainder_ranks.tolist()
        self.register_buffer("ranks", torch.from_numpy(weight.ranks.copy()))
        self.register_buffer("remainder_ranks", torch.from_numpy(weight.remainder_ranks.copy()))
        self.register_buffer("pivots", _index(weight.pivots))
        self.left = _parameter(weight.left, dtype) if weight.left.size else None
        self.right = _parameter(weight.right, dtype) if weight.right.size else None
        # heads whose remainder is stored itself have as many rows of it as pivots
        factored = [Diagonal.sizes(r, k, self.cols)[0] > 0 for r, k in zip(ranks, ks, strict=True)]
        self.rows = [k if f or not k else r for r, k, f in zip(ranks, ks, factored, strict=True)]
        self.factored = factored
        self.part_ranks = ranks
        heads = np.arange(self.heads)
        _constant(self, "readers", np.repeat(heads, ranks))  # by pivot
        _constant(self, "owners", np.repeat(heads, self.rows))  # by row of the remainder
        _constant(self, "slots", _slots(ranks, self.head_dim))
        self._follow()
        self.bias_kind = None if bias is None else bias.kind
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None)
        if isinstance(bias, Dense):
            self.bias = _parameter(bias.array, dtype)
        elif bias is not None and not isinstance(bias, Zeros):
            raise NoRuntimeForm(f"a bias stored as {bias.kind!r} beside a diagonal value")

    def _follow(self) -> None:
        """What follows from the pivots. ``start``: where the heads' coordinates begin, if they
        follow each other; ``free``: by head, the columns that are no pivots."""
        free = self.pivots.new_ones((self.heads, self.cols), dtype=torch.bool)
        free[self.readers, self.pivots] = False
        self.register_buffer("free", free, persistent=False)
        pivots = self.pivots.cpu().numpy()
        first = int(pivots[0]) if pivots.size else 0
        consecutive = np.array_equal(pivots, first + np.arange(self.heads * self.head_dim))
        self.start = first if consecutive else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.right is None:
            y = self._read(x)
        elif any(self.factored):
            y = self._read(x) + self._factored(x)
        else:  # remainders stored themselves: one product, which takes the identity along
            y = self._padded(functional.linear(x, self._whole()))
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*y.shape[:-1], self.heads, self.head_dim)

    def _read(self, x: torch.Tensor) -> torch.Tensor:
        """The coordinates that the heads read: a view of the input where they follow each other."""
        if x.shape[-1] != self.cols:
            raise ModuleError(f"input of shape {tuple(x.shape)}: expected {self.cols} features")
        size = self.heads * self.head_dim
        if self.start is not None:
            return x[..., self.start : self.start + size]
        return self._padded(x[..., self.pivots])

    def _padded(self, y: torch.Tensor) -> torch.Tensor:
        """Heads of head_dim rows each, those of a smaller rank filled up with zeros."""
        size = self.heads * self.head_dim
        if y.shape[-1] == size:
            return y
        return y.new_zeros((*y.shape[:-1], size)).index_copy(-1, self.slots, y)

    def _whole(self) -> torch.Tensor:
        """The dense matrix, without the rows that heads of a smaller rank lack."""
        assert self.right is not None
        stored = torch.tensor([k > 0 for k in self.rows], device=self.pivots.device)
        whole = self.right.new_zeros((len(self.pivots), self.cols))
        whole.scatter_(1, self.pivots[:, None], 1)
        mask = (self.free & stored[:, None])[self.readers]
        return whole.masked_scatter(mask, self.right)

    def _factored(self, x: torch.Tensor) -> torch.Tensor:
        """left (right x), head by head as their sizes differ."""
        assert self.right is not None and self.left is not None
        whole = self.right.new_zeros((len(self.owners), self.cols))
        right = whole.masked_scatter(self.free[self.owners], self.right)
        z = functional.linear(x, right)
        parts, at, row = [], 0, 0
        for rank, k, factored in zip(self.part_ranks, self.rows, self.factored, strict=True):
            part = z[..., row : row + k]
            if factored:
                part = functional.linear(part, self.left[at : at + rank * k].view(rank, k))
                at += rank * k
            elif not k:
                part = z.new_zeros((*z.shape[:-1], rank))
            row += k
            parts.append(functional.pad(part, (0, self.head_dim - rank)))
        return torch.cat(parts, -1)

    def encodings(self) -> tuple[Encoding, Encoding | None]:
        """Weight and bias as they are now."""
        some = next((p for p in (self.right, self.left, self.bias) if p is not None), None)
        dtype = self.empty_dtype if some is None else _numbers(some).dtype
        left, right = (
            np.zeros(0, dtype) if p is None else _numbers(p) for p in (self.left, self.right)
        )
        weight = Diagonal(
            self.heads,
            self.head_dim,
            self.cols,
            self.ranks.numpy().copy(),
            self.pivots.numpy().astype(np.int32),
            self.remainder_ranks.numpy().copy(),
            left,
            right,
        )
        bias: Encoding | None = None
        if self.bias_kind == "zeros":
            bias = Zeros((self.heads * self.head_dim,), dtype)
        elif self.bias is not None:
            bias = Dense(_numbers(self.bias))
        return weight, bias

    empty_dtype: np.dtype[Any] = np.dtype(np.float32)

    def extra_repr(self) -> str:
        ks = sorted(set(self.remainder_ranks.tolist()))
        return f"in_features={self.cols}, heads={self.heads}, remainder={ks}"
