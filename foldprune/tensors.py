"""Whatever the caller has, as an ordered mapping of names to NumPy arrays. Never imports torch
itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 and float8 with NumPy)
import numpy as np

from .encodings import WEIGHT_DTYPES, Array
from .errors import TensorError, TensorTypeError

__all__ = ["Checkpoint", "is_weight_dtype", "read"]


@dataclass
class Checkpoint:
    """Arrays by name in the caller's order; a name that shares its storage with an earlier one is
    in ``tied`` instead. ``framework`` is "torch", "numpy", or None for a file."""

    arrays: dict[str, Array]
    tied: dict[str, str]
    framework: str | None
    names: list[str]
    config: Mapping[str, Any] | None = None
    source: str = "state dict"
    notes: list[str] = field(default_factory=list)

    def tensors(self) -> Iterator[tuple[str, Array]]:
        """Every name, tied ones included, in order."""
        for name in self.names:
            yield name, self.arrays[self.tied.get(name, name)]


def is_weight_dtype(dtype: np.dtype[Any]) -> bool:
    """Whether the C core computes with it: float32, float64, float16, bfloat16."""
    return dtype in WEIGHT_DTYPES


def read(source: Any) -> Checkpoint:
    """A mapping, a module with ``state_dict()``, or a path as a Checkpoint.

    Raises TypeError, ValueError or OSError; where one tensor is at fault the message names it.
    """
    if isinstance(source, (str, os.PathLike)):
        from . import files

        return files.read(os.fspath(source))
    if isinstance(source, Mapping):
        return from_mapping(source)
    state_dict = getattr(source, "state_dict", None)
    if callable(state_dict):
        checkpoint = from_mapping(state_dict())
        checkpoint.config = _model_config(source) or _torch_config(source)
        checkpoint.source = type(source).__name__
        return checkpoint
    raise TypeError(
        f"expected a state dict, a module or a path, got {type(source).__name__}; pass "
        "model.state_dict() or a mapping of names to arrays"
    )


def _model_config(module: Any) -> Mapping[str, Any] | None:
    """Of a Hugging Face model, or of those inside a module, if they agree."""
    found: list[Mapping[str, Any]] = []
    left = [module]
    while left:
        one = left.pop()
        if callable(to_dict := getattr(getattr(one, "config", None), "to_dict", None)):
            found.append(to_dict())
        elif callable(children := getattr(one, "children", None)):
            left += children()
    return found[0] if found and all(config == found[0] for config in found) else None


def _torch_config(module: Any) -> Mapping[str, Any] | None:
    """What the torch.nn.MultiheadAttention inside a module say of themselves, if they agree."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(module, torch.nn.Module):
        return None
    attention = torch.nn.MultiheadAttention
    inner = [child for child in module.modules() if isinstance(child, attention)]
    if len({child.num_heads for child in inner}) != 1:
        return None
    zero = any(child.add_zero_attn for child in inner)
    return {"num_attention_heads": inner[0].num_heads, "add_zero_attn": zero}


def from_mapping(mapping: Mapping[Any, Any]) -> Checkpoint:
    if not len(mapping):
        raise TensorError("the state dict is empty: there is nothing to compress")
    torch = sys.modules.get("torch")  # a torch tensor cannot exist before its module does
    arrays: dict[str, Array] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    any_torch = False
    for name, value in mapping.items():
        if not isinstance(name, str):
            raise TensorTypeError(f"name {name!r}: names of tensors are strings")
        if torch is not None and isinstance(value, torch.Tensor):
            from .torch import tensors as adapter

            any_torch = True
            key = adapter.storage_key(value)
            array = None if key in seen else adapter.to_numpy(name, value)
        elif isinstance(value, np.ndarray):
            key = ("numpy", _address(value), value.shape, value.strides, value.dtype.str)
            array = value
        else:
            raise TensorTypeError(
                f"{name!r}: expected a NumPy array or a torch tensor, got {type(value).__name__}; "
                "pass only tensors (of a training checkpoint, its state dict)"
            )
        if key in seen:
            tied[name] = seen[key]
            continue
        assert array is not None
        arrays[name] = _checked(name, array)
        if array.size:
            seen[key] = name
    names = list(mapping)
    return Checkpoint(arrays, tied, "torch" if any_torch else "numpy", names)


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _checked(name: str, array: Array) -> Array:
    if array.dtype.kind == "O":
        raise TensorTypeError(f"{name!r}: an array of Python objects is not a tensor of weights")
    if array.dtype.kind == "c":
        raise TensorTypeError(
            f"{name!r}: complex weights are not supported; store real and imaginary parts apart"
        )
    if array.dtype.kind in "USMmV" and not is_extension_float(array.dtype):
        raise TensorTypeError(f"{name!r}: dtype {array.dtype} is not numeric")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return array if array.flags.aligned else array.copy()


def is_extension_float(dtype: np.dtype[Any]) -> bool:
    """bfloat16, float8 and their kin, which NumPy itself shows as kind 'V'."""
    return dtype.type.__module__.startswith("ml_dtypes")


def to_framework(array: Array, framework: str) -> Any:
    """The array as the framework's tensor, sharing memory."""
    if framework == "numpy":
        return array
    if framework == "torch":
        try:
            from .torch import tensors as adapter
        except ImportError:
            raise ImportError(
                "torch is not installed here; use state_dict(framework='numpy')"
            ) from None
        return adapter.from_numpy(array)
    raise ValueError(f"unknown framework {framework!r}: 'torch' or 'numpy'")
