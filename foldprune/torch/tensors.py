"""Between torch tensors and NumPy arrays, without a copy where both can share memory."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

from ..encodings import Array
from ..errors import TensorTypeError

__all__ = ["from_numpy", "storage_key", "to_numpy"]

# dtypes that torch's NumPy bridge does not know: through an integer of the same size
_BRIDGES: dict[torch.dtype, tuple[torch.dtype, np.dtype[Any]]] = {
    torch.bfloat16: (torch.int16, np.dtype(ml_dtypes.bfloat16)),
}
for _name, _scalar in {
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
}.items():
    if hasattr(torch, _name):
        _BRIDGES[getattr(torch, _name)] = (torch.int8, np.dtype(_scalar))
_BACK = {scalar: (bridge, dtype) for dtype, (bridge, scalar) in _BRIDGES.items()}


def storage_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same memory seen the same way: tied weights."""
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return ("torch", id(tensor))
    return (
        "torch",
        str(tensor.device),
        tensor.data_ptr(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
    )


def to_numpy(name: str, tensor: torch.Tensor) -> Array:
    """A view of the tensor's memory (a copy if it is on another device)."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise TensorTypeError(
            f"{name!r}: sparse and quantized torch tensors are not supported; pass "
            "tensor.to_dense() or tensor.dequantize()"
        )
    if tensor.device.type == "meta":
        raise TensorTypeError(f"{name!r}: a tensor on the meta device has no values; load it first")
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.dtype in _BRIDGES:
        bridge, dtype = _BRIDGES[tensor.dtype]
        if tensor.dim() == 0:
            return tensor.reshape(1).view(bridge).numpy().view(dtype).reshape(())
        return tensor.view(bridge).numpy().view(dtype)
    try:
        return tensor.numpy()
    except (TypeError, RuntimeError) as error:
        raise TensorTypeError(f"{name!r}: {error}") from None


def from_numpy(array: Array) -> torch.Tensor:
    """The array as a tensor of the same memory."""
    if array.dtype in _BACK:
        bridge, dtype = _BACK[array.dtype]
        integers = np.dtype("i2" if bridge == torch.int16 else "i1")
        return torch.from_numpy(array.view(integers)).view(dtype)
    return torch.from_numpy(array)
