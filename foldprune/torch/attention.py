"""``FoldedAttention``: a transformers self-attention module that computes in folded sizes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ..encodings import Dense, Encoding, Fused
from .attention_ops import folded_attention
from .families import Family
from .folded import FoldedHeads, FoldedValue, NoRuntimeForm
from .modules import PackedLinear
from .tensors import to_numpy

__all__ = ["FoldedAttention"]


def _is_key_mask(mask: torch.Tensor) -> bool:
    """Whether a (batch, 1, queries, keys) mask says the same to every query."""
    if mask.dtype is not torch.bool or mask.dim() != 4 or mask.shape[1] != 1:
        return False
    if mask.shape[2] == 1 or mask.stride(2) == 0:
        return True
    # what a mask holds is nothing for a graph to depend on
    return not torch.compiler.is_compiling() and torch.equal(mask, mask[:, :, :1].expand_as(mask))


def _key_mask(mask: torch.Tensor, keys: int) -> torch.Tensor:
    return mask[:, 0, 0, :keys]


class FoldedAttention(nn.Module):
    """Self-attention whose queries and keys have the folded rank, and whose values read
    coordinates of the block's input.

    Made by ``foldprune.torch.convert`` in place of a transformers attention module, and called as
    that is. Queries and keys of heads with fewer rows, or fewer planes under rotary embedding, are
    filled up with zeros to the largest of the block; the key/value cache holds the folded ones.
    The softmax is scaled as before. With fewer dimensions a head than values have, or dropout, and
    in linear time with one, it is ``foldprune.folded_attention``'s where that means the same as
    transformers' "sdpa" (float32 on the CPU, no mask but a causal or a padding one); else it goes
    through the attention function that the model is configured for ("sdpa", "eager").
    """

    def __init__(
        self,
        module: nn.Module,
        family: Family,
        projections: Mapping[str, nn.Module],
        heads: int,
        groups: int,
        head_dim: int,
    ) -> None:
        super().__init__()
        self.family = family
        self.config: Any = module.config
        self.layer_idx: Any = getattr(module, "layer_idx", None)
        self.is_causal = bool(getattr(module, "is_causal", True))
        self.heads, self.groups, self.head_dim = heads, groups, head_dim
        self.num_key_value_groups = heads // groups
        self.scaling = float(getattr(module, "scaling", head_dim**-0.5))
        window = getattr(module, "sliding_window", getattr(self.config, "sliding_window", None))
        self.sliding_window: int | None = window
        self._implementation = type(module).__module__
        for role, name in family.roles.items():
            self.add_module(name, projections[role])
        for name in (*(family.norms or ()), family.output, family.dropout, family.output_dropout):
            child = getattr(module, name, None) if name else None
            if name and isinstance(child, nn.Module):
                self.add_module(name, child)
        dropout = getattr(module, family.dropout)
        self._dropout = float(getattr(dropout, "p", dropout))
        self._check()
        self.train(module.training)

    def _check(self) -> None:
        """Query and key keep the same of every head."""
        query, key = getattr(self, self.family.query), getattr(self, self.family.key)
        per_group = self.heads // self.groups
        if isinstance(query, FoldedHeads) and isinstance(key, FoldedHeads):
            if query.pairing != key.pairing or not torch.equal(
                query.ranks, key.ranks.repeat_interleave(per_group)
            ):
                raise NoRuntimeForm("query and key keep different ranks")
            one, other = query.padded, key.padded
            if other is not None:
                other = other.repeat_interleave(per_group, 0)
            if one is None or other is None:
                if one is not other:
                    raise NoRuntimeForm("query and key keep different planes")
            elif not torch.equal(one, other):
                raise NoRuntimeForm("query and key keep different planes")
        folded = [p for p in (query, key) if isinstance(p, FoldedHeads)]
        for projection in folded:
            planes = projection.pairing is not None
            if planes != self.family.rope or projection.pairing == "adjacent":
                raise NoRuntimeForm("the rotary embedding is not the one that the fold is for")
            if len(folded) == 1 and (
                projection.width != self.head_dim
                or projection.ragged
                or projection.planes is not None
            ):
                raise NoRuntimeForm("only one of query and key is folded")
        if folded and self.family.norms:
            raise NoRuntimeForm("query and key are normalised before they meet")

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``cache`` is what transformers calls ``past_key_values`` from 5.24 on."""
        family = self.family
        query = self._heads("query", hidden_states, self.heads)
        key = self._heads("key", hidden_states, self.groups)
        value = self._heads("value", hidden_states, self.groups).to(query.dtype).transpose(1, 2)
        if family.rope:
            assert position_embeddings is not None
            query, key = self._rotate(query, key, *position_embeddings)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            cache = getattr(cache, "self_attention_cache", cache)
            key, value = cache.update(key, value, self.layer_idx)
        output, weights = self._attend(query, key, value, attention_mask, **kwargs)
        output = output.reshape(*hidden_states.shape[:-1], self.heads * self.head_dim)
        if family.output is not None:
            output = getattr(self, family.output)(output)
        if family.output_dropout is not None:
            output = getattr(self, family.output_dropout)(output)
        return output, weights

    def _heads(self, role: str, x: torch.Tensor, heads: int) -> torch.Tensor:
        """(batch, length, heads, size)."""
        projection = getattr(self, self.family.roles[role])
        y: torch.Tensor = projection(x)
        if not isinstance(projection, (FoldedHeads, FoldedValue)):
            y = y.view(*y.shape[:-1], heads, self.head_dim)
        if self.family.norms and role != "value":
            norm = getattr(self, self.family.norms[role == "key"])
            y = norm(y)
        return y

    def _rotate(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotates the planes that are kept, each by its own angle."""
        firsts, seconds, planes = [], [], []
        for role, x in (("query", query), ("key", key)):
            projection = getattr(self, self.family.roles[role])
            if isinstance(projection, FoldedHeads):
                first, second = x.view(*x.shape[:-1], x.shape[-1] // 2, 2).unbind(-1)
                if projection.padded is not None:
                    planes.append(projection.padded)
            else:
                first, second = x.chunk(2, -1)
            firsts.append(first)
            seconds.append(second)
        if planes:
            kept = torch.cat(planes)
            cos, sin = cos[..., kept], sin[..., kept]
        else:
            half = self.head_dim // 2
            cos, sin = cos[..., None, :half], sin[..., None, :half]
        # both at once: a token's rotation is many small operations
        first, second = torch.cat(firsts, 2), torch.cat(seconds, 2)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
        return rotated[:, :, : self.heads], rotated[:, :, self.heads :]

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, length, heads, head_dim), and the weights where the function gives them."""
        dropout = self._dropout if self.training else 0.0
        rank, dim = key.shape[-1], value.shape[-1]
        faster = rank == 1 or (query.shape[2] > 1 and (rank < dim or dropout > 0))
        if faster and dropout < 1 and self._means_the_same(query, mask, kwargs):
            causal = mask is None and self._is_causal(query, kwargs)
            key_mask = None if mask is None else _key_mask(mask, key.shape[2])
            output = folded_attention(
                query,
                key,
                value,
                key_mask=key_mask,
                scale=self.scaling,
                causal=causal,
                dropout=dropout,
            )
            return output.transpose(1, 2), None
        transformers = sys.modules["transformers.modeling_utils"]
        eager = getattr(sys.modules[self._implementation], "eager_attention_forward", None)
        attend = transformers.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager
        )
        missing = dim - rank
        if missing > 0 and query.shape[2] > 1 and self.config._attn_implementation == "sdpa":
            # torch's fast kernel wants one width: three times as fast as a narrower product by the
            # slow one. A single query's keys are better read as they are
            query, key = (functional.pad(x, (0, missing)) for x in (query, key))
        if self.sliding_window is not None:
            kwargs["sliding_window"] = self.sliding_window
        output, weights = attend(
            self,
            query,
            key,
            value,
            mask,
            dropout=dropout,
            scaling=self.scaling,
            **kwargs,
        )
        return output, weights

    def _is_causal(self, query: torch.Tensor, kwargs: Mapping[str, Any]) -> bool:
        """What transformers' sdpa takes no mask for."""
        given = kwargs.get("is_causal")
        return query.shape[2] > 1 and bool(self.is_causal if given is None else given)

    def _means_the_same(
        self, query: torch.Tensor, mask: torch.Tensor | None, kwargs: Mapping[str, Any]
    ) -> bool:
        """Whether ``folded_attention`` does."""
        return (
            query.dtype is torch.float32
            and query.is_cpu
            and self.config._attn_implementation == "sdpa"
            and kwargs.get("position_bias") is None
            and (self.sliding_window is None or query.shape[2] <= self.sliding_window)
            and (mask is None or _is_key_mask(mask))
        )

    # ---- back to encodings ----------------------------------------------------------------------

    def fused(self) -> tuple[Encoding, Encoding | None]:
        """Weight (in x out) and bias of the one layer that query, key and value came from."""
        weights, biases = [], []
        for name in self.family.roles.values():
            projection = getattr(self, name)
            if isinstance(projection, (FoldedHeads, FoldedValue)):
                weight, bias = projection.encodings()
            else:
                assert not isinstance(projection, PackedLinear)
                weight = Dense(np.array(to_numpy("weight", projection.weight)))
                bias = None
                if projection.bias is not None:
                    bias = Dense(np.array(to_numpy("bias", projection.bias)))
            weights.append(weight)
            biases.append(bias)
        if any(bias is None for bias in biases):
            return Fused(tuple(weights), True), None
        return Fused(tuple(weights), True), Fused(tuple(b for b in biases if b is not None))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, key_heads={self.groups}, head_dim={self.head_dim}"
