"""``Dropout``, torch's own without its generator, which draws number after number on one thread."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import _core
from .ops import FLOATS, from_core, library

__all__ = ["Dropout"]

library.define("dropout(Tensor x, Tensor seed, float p) -> Tensor")  # type: ignore[no-untyped-call]
_dropout = torch.ops.foldprune.dropout.default


class Dropout(nn.Dropout):
    """``torch.nn.Dropout`` whose numbers fall away by a hash of their places.

    Same arguments, same distribution, same results off the CPU, in place and in eval mode. In
    training on the CPU torch's default generator gives one number a call, the seed; all threads
    work, with the same result for any count of them, and no mask is kept for the backward pass.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        drops = self.training and 0 < self.p < 1 and not self.inplace
        known = input.device.type == "cpu" and input.layout is torch.strided
        if not drops or not known or input.dtype not in FLOATS:
            return super().forward(input)
        dropped: torch.Tensor = _dropout(input, torch.randint(2**63 - 1, ()), self.p)
        return dropped


@torch.library.impl(library, "dropout", "CPU")
def _dropout_cpu(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    wide = x.detach() if x.dtype is torch.float64 else x.detach().float()
    y = _core.dropout(wide.contiguous().numpy(), p, int(seed), torch.get_num_threads())
    return from_core(y, x.dtype, tuple(x.shape))


def _dropout_fake(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor, float], output: Any) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _grad(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    return _dropout(dy, seed, ctx.p), None, None


torch.library.register_fake("foldprune::dropout", _dropout_fake, lib=library)
torch.library.register_autograd("foldprune::dropout", _grad, setup_context=_setup, lib=library)
