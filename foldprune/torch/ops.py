"""Operators on packed matrices, registered with torch.library so that autograd, torch.compile and
torch.export know them: ``torch.ops.foldprune.packed_linear`` and ``packed_embedding``.

A packed matrix is passed as its values, mask, offset and scale (``foldprune.Packed``), the two
integer ones as int64 of the same bits. Whoever calls an operator vouches for the offsets; the
modules derive them from the mask. Kernels are for the CPU alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ml_dtypes import bfloat16

from .. import _core
from ..encodings import Array
from ..errors import ModuleError
from .tensors import from_numpy

__all__ = [
    "FLOATS",
    "core_of",
    "from_core",
    "library",
    "packed_embedding",
    "packed_linear",
    "refuse_second_derivative",
    "to_core",
]

library = torch.library.Library("foldprune", "DEF")  # type: ignore[no-untyped-call]
_MATRIX = "Tensor values, Tensor mask, Tensor offset, Tensor? scale"
for _schema in (
    f"packed_linear(Tensor x, {_MATRIX}, Tensor? bias, int rows, int cols) -> Tensor",
    f"packed_linear_backward(Tensor dy, {_MATRIX}, int cols) -> Tensor",
    f"packed_linear_gradient(Tensor dy, Tensor x, {_MATRIX}) -> Tensor",
    f"packed_embedding(Tensor ids, {_MATRIX}, int rows, int cols, int padding_idx) -> Tensor",
    f"packed_embedding_gradient(Tensor dy, Tensor ids, {_MATRIX}, int rows, int padding_idx)"
    " -> Tensor",
):
    library.define(_schema)  # type: ignore[no-untyped-call]
packed_linear = torch.ops.foldprune.packed_linear.default
packed_embedding = torch.ops.foldprune.packed_embedding.default
_backward = torch.ops.foldprune.packed_linear_backward.default
_gradient = torch.ops.foldprune.packed_linear_gradient.default
_embedding_gradient = torch.ops.foldprune.packed_embedding_gradient.default

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# ---- between tensors and the core ---------------------------------------------------------------


def to_core(tensor: torch.Tensor) -> Array:
    """A view of a contiguous CPU tensor's memory."""
    tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        array: Array = tensor.view(torch.int16).numpy().view(bfloat16)
        return array
    return tensor.numpy()


def core_of(
    values: torch.Tensor,
    mask: torch.Tensor,
    offset: torch.Tensor,
    scale: torch.Tensor | None,
    rows: int,
    cols: int,
) -> tuple[Any, ...]:
    """The matrix as ``_core`` takes it."""
    for tensor in (values, mask, offset):
        if tensor.device.type != "cpu":
            raise ModuleError(f"packed matrices run on the CPU, not on {tensor.device}")
    return (
        rows,
        cols,
        mask.numpy().view(np.uint64),
        offset.numpy().view(np.uint64),
        to_core(values),
        None if scale is None else scale.numpy(),
    )


def from_core(array: Array, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return from_numpy(array).to(dtype).view(shape)


def _accumulate(values: torch.Tensor) -> torch.dtype:
    return torch.float64 if values.dtype is torch.float64 else torch.float32


def _flat(x: torch.Tensor, values: torch.Tensor) -> Array:
    """(tokens x columns) in the dtype that the core computes in."""
    width = x.shape[-1]
    flat = x.detach().reshape(math.prod(x.shape[:-1]), width)
    return flat.to(_accumulate(values)).contiguous().numpy()


def _check_linear(
    x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, rows: int, cols: int
) -> None:
    if x.dtype not in FLOATS or (x.dtype is torch.float64) != (values.dtype is torch.float64):
        raise ModuleError(
            f"input has dtype {x.dtype} but the packed values have {values.dtype}: float64 goes "
            "with float64, float32, bfloat16 and float16 with any other"
        )
    if x.dim() == 0 or x.shape[-1] != cols:
        raise ModuleError(
            f"input of shape {tuple(x.shape)} cannot be multiplied with a {rows} x {cols} matrix: "
            f"its last dimension must be {cols}"
        )
    if bias is not None and bias.shape != (rows,):
        raise ModuleError(f"bias: expected shape ({rows},), got {tuple(bias.shape)}")


def _check_ids(ids: torch.Tensor) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise ModuleError(f"indices have dtype {ids.dtype}: expected torch.int64 or torch.int32")


# ---- kernels ------------------------------------------------------------------------------------


@torch.library.impl(library, "packed_linear", "CPU")
def _linear_cpu(
    x: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    offset: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    rows: int,
    cols: int,
) -> torch.Tensor:
    _check_linear(x, values, bias, rows, cols)
    core = core_of(values, mask, offset, scale, rows, cols)
    added = None if bias is None else bias.detach().to(_accumulate(values)).contiguous().numpy()
    y = _core.matmul(core, _flat(x, values), added, torch.get_num_threads())
    return from_core(y, x.dtype, (*x.shape[:-1], rows))


@torch.library.impl(library, "packed_linear_backward", "CPU")
def _backward_cpu(
    dy: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    offset: torch.Tensor,
    scale: torch.Tensor | None,
    cols: int,
) -> torch.Tensor:
    core = core_of(values, mask, offset, scale, dy.shape[-1], cols)
    dx = _core.matmul_backward(core, _flat(dy, values), torch.get_num_threads())
    return from_core(dx, dy.dtype, (*dy.shape[:-1], cols))


@torch.library.impl(library, "packed_linear_gradient", "CPU")
def _gradient_cpu(
    dy: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    offset: torch.Tensor,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    core = core_of(values, mask, offset, scale, dy.shape[-1], x.shape[-1])
    gradient = _core.matmul_gradient(
        core, _flat(dy, values), _flat(x, values), torch.get_num_threads()
    )
    return from_core(gradient, values.dtype, tuple(values.shape))


@torch.library.impl(library, "packed_embedding", "CPU")
def _embedding_cpu(
    ids: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    offset: torch.Tensor,
    scale: torch.Tensor | None,
    rows: int,
    cols: int,
    padding_idx: int,
) -> torch.Tensor:
    _check_ids(ids)
    core = core_of(values, mask, offset, scale, rows, cols)
    flat = ids.reshape(-1).to(torch.int64).contiguous().numpy()
    try:
        found = _core.packed_lookup(core, flat, torch.get_num_threads())
    except ValueError:
        raise IndexError("index out of range in self") from None
    return from_core(found, _looked_up(values), (*ids.shape, cols))


@torch.library.impl(library, "packed_embedding_gradient", "CPU")
def _embedding_gradient_cpu(
    dy: torch.Tensor,
    ids: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    offset: torch.Tensor,
    scale: torch.Tensor | None,
    rows: int,
    padding_idx: int,
) -> torch.Tensor:
    core = core_of(values, mask, offset, scale, rows, dy.shape[-1])
    flat = ids.reshape(-1).to(torch.int64).contiguous().numpy()
    gradient = _core.packed_lookup_gradient(
        core, flat, _flat(dy, values), padding_idx, torch.get_num_threads()
    )
    return from_core(gradient, values.dtype, tuple(values.shape))


def _looked_up(values: torch.Tensor) -> torch.dtype:
    return torch.float32 if values.dtype is torch.int8 else values.dtype


# ---- shapes alone -------------------------------------------------------------------------------


def _linear_fake(
    x: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    offset: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    rows: int,
    cols: int,
) -> torch.Tensor:
    _check_linear(x, values, bias, rows, cols)
    return x.new_empty((*x.shape[:-1], rows))


def _backward_fake(dy: torch.Tensor, *matrix: Any) -> torch.Tensor:
    return dy.new_empty((*dy.shape[:-1], matrix[-1]))


def _gradient_fake(
    dy: torch.Tensor, x: torch.Tensor, values: torch.Tensor, *matrix: Any
) -> torch.Tensor:
    return torch.empty_like(values)


def _embedding_fake(
    ids: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    offset: torch.Tensor,
    scale: torch.Tensor | None,
    rows: int,
    cols: int,
    padding_idx: int,
) -> torch.Tensor:
    _check_ids(ids)
    return values.new_empty((*ids.shape, cols), dtype=_looked_up(values))


def _embedding_gradient_fake(
    dy: torch.Tensor, ids: torch.Tensor, values: torch.Tensor, *matrix: Any
) -> torch.Tensor:
    return torch.empty_like(values)


_FAKES: dict[str, Callable[..., torch.Tensor]] = {
    "packed_linear": _linear_fake,
    "packed_linear_backward": _backward_fake,
    "packed_linear_gradient": _gradient_fake,
    "packed_embedding": _embedding_fake,
    "packed_embedding_gradient": _embedding_gradient_fake,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"foldprune::{_name}", _fake, lib=library)


# ---- gradients ----------------------------------------------------------------------------------


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, values, mask, offset, scale, bias, _, cols = inputs
    # x is needed for the values' gradient alone
    needed = x if ctx.needs_input_grad[1] else None
    ctx.save_for_backward(needed, values, mask, offset, scale)
    ctx.cols, ctx.dtype = cols, x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_grad(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, *matrix = ctx.saved_tensors
    dx = dvalues = dbias = None
    if ctx.needs_input_grad[0]:
        dx = _backward(dy, *matrix, ctx.cols).to(ctx.dtype)
    if ctx.needs_input_grad[1]:
        dvalues = _gradient(dy, x, *matrix)
    if ctx.needs_input_grad[5]:
        wide = dy if dy.dtype is torch.float64 else dy.float()
        dbias = wide.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype)
    return dx, dvalues, None, None, None, dbias, None, None


def _embedding_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ids, *matrix, rows, _, padding_idx = inputs
    ctx.save_for_backward(ids, *matrix)
    ctx.rows, ctx.padding_idx = rows, padding_idx


def _embedding_grad(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    ids, *matrix = ctx.saved_tensors
    dvalues = None
    if ctx.needs_input_grad[1]:
        dvalues = _embedding_gradient(dy, ids, *matrix, ctx.rows, ctx.padding_idx)
    return None, dvalues, None, None, None, None, None, None


def refuse_second_derivative(operator: str, who: str) -> None:
    """Makes the gradient of an operator that itself gives gradients an error."""

    def refuse(ctx: Any, *gradients: Any) -> Any:
        raise ModuleError(f"{who} no second derivative (create_graph=True)")

    torch.library.register_autograd(f"foldprune::{operator}", refuse, lib=library)


torch.library.register_autograd(
    "foldprune::packed_linear", _linear_grad, setup_context=_linear_setup, lib=library
)
torch.library.register_autograd(
    "foldprune::packed_embedding", _embedding_grad, setup_context=_embedding_setup, lib=library
)
for _name in ("packed_linear_backward", "packed_linear_gradient", "packed_embedding_gradient"):
    refuse_second_derivative(_name, "packed matrices have")
