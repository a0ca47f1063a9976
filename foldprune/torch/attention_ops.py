"""``torch.ops.foldprune.folded_attention``: softmax attention with few dimensions a head, in linear
time where there is one (foldprune/folded.py)."""

from __future__ import annotations

from typing import Any

import torch

from .. import _core
from ..errors import ModuleError
from .ops import library, refuse_second_derivative
from .tensors import from_numpy

__all__ = ["folded_attention"]

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? seed, float dropout, float scale, "
    "bool causal"
)
library.define(  # type: ignore[no-untyped-call]
    f"folded_attention({_ARGUMENTS}, float tol) -> (Tensor, Tensor, Tensor)"
)
library.define(  # type: ignore[no-untyped-call]
    f"folded_attention_backward(Tensor dout, {_ARGUMENTS}, Tensor out, Tensor lse, Tensor nodes)"
    " -> (Tensor, Tensor, Tensor)"
)
_attention = torch.ops.foldprune.folded_attention.default
_backward = torch.ops.foldprune.folded_attention_backward.default

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def folded_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    key_mask: torch.Tensor | None = None,
    scale: float = 1.0,
    causal: bool = False,
    dropout: float = 0.0,
    tol: float = 1e-6,
) -> torch.Tensor:
    """``foldprune.folded_attention`` on tensors, differentiable in q, k and v.

    q (batch, heads, n, r), k (batch, kv_heads, m, r), v (batch, kv_heads, m, d), float32 or float64
    on the CPU; key_mask (batch, m) bool. ``dropout``, in [0, 1): the probability of each weight of
    the softmax to be dropped; which ones, torch's default generator decides by one number a call.
    Returns (batch, heads, n, d).
    """
    seed = torch.randint(2**63 - 1, ()) if dropout else None
    out: torch.Tensor = _attention(q, k, v, key_mask, seed, dropout, scale, causal, tol)[0]
    return out


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.device.type not in ("cpu", "meta"):
            raise ModuleError(f"folded attention runs on the CPU: {name} is on {tensor.device}")
        if tensor.dtype not in (torch.float32, torch.float64) or tensor.dtype is not q.dtype:
            raise ModuleError(
                f"{name} has dtype {tensor.dtype}: expected q, k and v all float32 or all float64"
            )
        if tensor.dim() != 4:
            raise ModuleError(f"{name}: expected four dimensions, got shape {tuple(tensor.shape)}")


def _array(tensor: torch.Tensor) -> Any:
    """Its memory, if a head's numbers lie side by side."""
    tensor = tensor.detach()
    return (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).numpy()


def _mask(key_mask: torch.Tensor | None) -> Any:
    return None if key_mask is None else key_mask.contiguous().numpy()


@torch.library.impl(library, "folded_attention", "CPU")
def _attention_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout: float,
    scale: float,
    causal: bool,
    tol: float,
) -> Tensors:
    _check(q, k, v)
    out, lse, nodes = _core.attention(
        _array(q), _array(k), _array(v), scale, causal, _mask(key_mask), "auto", tol,
        torch.get_num_threads(), dropout=dropout, seed=0 if seed is None else int(seed),
    )  # fmt: skip
    return from_numpy(out), from_numpy(lse), from_numpy(nodes)


@torch.library.impl(library, "folded_attention_backward", "CPU")
def _backward_cpu(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout: float,
    scale: float,
    causal: bool,
    out: torch.Tensor,
    lse: torch.Tensor,
    nodes: torch.Tensor,
) -> Tensors:
    dq, dk, dv = _core.attention_backward(
        _array(dout), _array(q), _array(k), _array(v), _array(out), lse.numpy(), nodes.numpy(),
        scale, causal, _mask(key_mask), torch.get_num_threads(), dropout=dropout,
        seed=0 if seed is None else int(seed),
    )  # fmt: skip
    return from_numpy(dq), from_numpy(dk), from_numpy(dv)


def _rows(like: torch.Tensor, columns: int) -> torch.Tensor:
    """What the core makes for as many heads and rows: a row's heads lie side by side."""
    batch, heads, n = like.shape[:3]
    return like.new_empty((batch, n, heads, columns)).transpose(1, 2)


def _attention_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any) -> Tensors:
    _check(q, k, v)
    lse = v.new_empty(q.shape[:3], dtype=torch.float64)
    nodes = v.new_empty((q.shape[0], k.shape[1]), dtype=torch.int32)
    return _rows(q, v.shape[-1]), lse, nodes


def _backward_fake(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any
) -> Tensors:
    return _rows(q, q.shape[-1]), _rows(k, k.shape[-1]), _rows(v, v.shape[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    q, k, v, key_mask, seed, ctx.dropout, ctx.scale, ctx.causal, _ = inputs
    ctx.save_for_backward(q, k, v, key_mask, seed, *output)


def _grad(ctx: Any, dout: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    q, k, v, key_mask, seed, *output = ctx.saved_tensors
    options = seed, ctx.dropout, ctx.scale, ctx.causal
    gradients = _backward(dout, q, k, v, key_mask, *options, *output)
    return (*gradients, *[None] * 6)


torch.library.register_fake("foldprune::folded_attention", _attention_fake, lib=library)
torch.library.register_fake("foldprune::folded_attention_backward", _backward_fake, lib=library)
torch.library.register_autograd(
    "foldprune::folded_attention", _grad, setup_context=_setup, lib=library
)
refuse_second_derivative("folded_attention_backward", "folded attention has")
