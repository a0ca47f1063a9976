"""A weight that is pruned while it trains: its mask, what its layers read, how optimisers go on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn

from .. import encodings
from .calibrate import is_embedding, is_linear
from .modules import pack_tensor
from .tensors import from_numpy, to_numpy

__all__ = ["MaskedMatrix", "Watch", "carry_over"]

_Hook = TypeVar("_Hook", bound=Callable[..., None])


def _eagerly(hook: _Hook) -> _Hook:
    """Not to be traced by torch.compile, which would not see what is written to the weights, and
    compile anew for every count."""
    disabled: Any = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return cast(_Hook, disabled)


@dataclasses.dataclass
class Watch:
    """What a model's matrices have in common in a forward pass. ``tokens``: which positions are no
    padding, None for all."""

    active: bool = True
    tokens: torch.Tensor | None = None

    @_eagerly
    def note(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        two = isinstance(mask, torch.Tensor) and mask.ndim == 2
        self.tokens = mask.bool().reshape(-1) if two else None  # type: ignore[union-attr]


@dataclasses.dataclass
class MaskedMatrix:
    """A weight that is pruned, and what its layers have read. ``keep``: None before anything is
    pruned. ``sums``: of squares by input, or, where it is ``looked_up``, of uses by row."""

    weight: nn.Parameter
    transposed: bool
    watch: Watch
    looked_up: bool = False
    keep: torch.Tensor | None = None
    block: tuple[int, int] = (1, 1)
    sums: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0).double())
    count: float = 0.0

    def watch_for(self, looked_up: bool) -> None:
        self.looked_up = looked_up
        width = self.weight.shape[0 if looked_up or self.transposed else 1]
        self.sums = torch.zeros(width, dtype=torch.float64)

    def hold(self) -> None:
        """Zeroes what is pruned, whatever has been done to the weight since."""
        if self.keep is not None:
            self.weight.data.mul_(self.keep)

    @_eagerly
    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.hold()
        reads = is_embedding(module) if self.looked_up else is_linear(module)
        if not (reads and module.training and self.watch.active):
            return
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        rows = x.reshape(-1) if self.looked_up else x.reshape(-1, x.shape[-1])
        tokens = self.watch.tokens
        if tokens is not None and len(tokens) == len(rows):
            rows = rows[tokens]
        if self.looked_up:
            self.sums += torch.bincount(rows, minlength=len(self.sums))
        else:
            self.sums += rows.float().square().sum(0)
        self.count += len(rows)

    def before_saving(self, *_: Any) -> None:
        self.hold()

    def masked(self, gradient: torch.Tensor) -> torch.Tensor:
        if self.keep is None or gradient.layout is not torch.strided:
            return gradient
        return gradient * self.keep

    def encoding(self, name: str, threads: int) -> encodings.Packed:
        assert self.keep is not None
        matrix, mask = to_numpy(name, self.weight), self.keep.numpy()
        if self.transposed:
            matrix, mask = matrix.T, mask.T
        return encodings.Packed.from_mask(matrix, mask, self.block, self.transposed, threads)


def carry_over(optimizer: torch.optim.Optimizer, matrix: MaskedMatrix, new: nn.Parameter) -> None:
    """The optimiser goes on with the kept values in place of the whole weight."""
    old = matrix.weight

    def kept(tensor: torch.Tensor) -> torch.Tensor:
        packed = pack_tensor(tensor, matrix.keep, None, matrix.transposed)
        return from_numpy(packed.values.copy())

    if old.grad is not None and new.grad is None:
        new.grad = kept(old.grad)
    for group in optimizer.param_groups:
        group["params"][:] = [
            new if parameter is old else parameter for parameter in group["params"]
        ]
    state = optimizer.state.pop(old, None)
    if state is None:
        return
    numbers = [value for value in state.values() if isinstance(value, torch.Tensor)]
    # what goes with the matrix as a whole, as factored moments do, cannot follow and starts anew
    if all(value.numel() == 1 or value.shape == old.shape for value in numbers):
        optimizer.state[new] = {
            key: kept(value) if isinstance(value, torch.Tensor) and value.numel() > 1 else value
            for key, value in state.items()
        }
