"""Layers whose matrices stay packed: ``PackedLinear`` and ``PackedEmbedding``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from .. import _core
from ..encodings import Array
from ..errors import ModuleError, TensorError, TensorTypeError
from ..packed import Packed, pack
from .ops import core_of, from_core, packed_embedding, packed_linear
from .tensors import from_numpy, to_numpy

__all__ = ["PackedEmbedding", "PackedLinear", "pack_tensor"]

_autocast = torch.is_autocast_enabled
_grad_enabled = torch.is_grad_enabled
_compiling = torch.compiler.is_compiling
_tracing = torch._C._get_tracing_state
_modes = torch._C._len_torch_dispatch_stack
_threads = torch.get_num_threads
_float32, _float64 = torch.float32, torch.float64


def _eager() -> bool:
    """Whether a kernel may be called without the dispatcher, which is most of what a small product
    costs: nothing is to be differentiated, traced or watched."""
    return not (_grad_enabled() or _compiling() or _modes()) and _tracing() is None


class _PackedModule(nn.Module):
    """A packed (out x in) matrix as a parameter ``values`` and buffers ``mask`` and ``scale``; the
    offsets of the tiles follow from the mask and are in no state dict."""

    values: nn.Parameter
    mask: torch.Tensor
    offset: torch.Tensor
    scale: torch.Tensor | None

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self._rows, self._cols = packed.shape
        # the packed matrix may go on to be used: what is trained is a copy
        values = from_numpy(packed.values.copy())
        self.values = nn.Parameter(values, requires_grad=values.is_floating_point())
        self.register_buffer("mask", torch.from_numpy(packed.mask.view(np.int64).copy()))
        offset = torch.from_numpy(packed.offset.view(np.int64).copy())
        self.register_buffer("offset", offset, persistent=False)
        scale = None if packed.scale is None else torch.from_numpy(packed.scale.copy())
        self.register_buffer("scale", scale)
        self._cached: tuple[Any, ...] | None = None

    # ---- what others see ------------------------------------------------------------------------

    def packed(self) -> Packed:
        """The matrix as it is now, a copy, for ``foldprune.packed_matmul`` and others."""
        values, mask, _, scale = (None if t is None else t.detach().cpu() for t in self._tensors())
        assert values is not None and mask is not None
        return Packed(
            (self._rows, self._cols),
            mask.numpy().view(np.uint64).copy(),
            to_numpy("values", values).copy(),
            None if scale is None else scale.numpy().copy(),
        )

    @property
    def weight(self) -> torch.Tensor:
        """The dense matrix, for inspection: a copy, unpacked at every access. What is written to
        it is lost; train ``values``."""
        return from_numpy(self.packed().unpack(torch.get_num_threads()))

    @property
    def density(self) -> float:
        """Kept share of the elements."""
        return self.values.numel() / max(1, self._rows * self._cols)

    def extra_repr(self) -> str:
        dtype = str(self.values.dtype).removeprefix("torch.")
        return f"dtype={dtype}, density={self.density:.3f}"

    def share(self, other: _PackedModule) -> None:
        """Ties this layer's matrix to another's of the same shape: one set of arrays for both."""
        if (self._rows, self._cols) != (other._rows, other._cols):
            raise ModuleError(
                f"a {self._rows} x {self._cols} matrix cannot be tied to one of "
                f"{other._rows} x {other._cols}"
            )
        self.values, self._cached = other.values, None
        for name in ("mask", "offset", "scale"):
            self._buffers[name] = other._buffers[name]

    # ---- the arrays -----------------------------------------------------------------------------

    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.values, self.mask, self.offset, self.scale

    def _matrix(self) -> tuple[Any, ...]:
        """The matrix as ``_core`` takes it, made anew when the values have moved."""
        cached, values = self._cached, self._parameters["values"]
        assert values is not None
        if cached is not None and cached[0] == values.data_ptr():
            core: tuple[Any, ...] = cached[1]
            return core
        core = core_of(*self._tensors(), self._rows, self._cols)
        offset = _core.packed_offsets(core[2], self._rows, self._cols)
        if not np.array_equal(offset, core[3]) or core[4].shape != (int(offset[-1]),):
            raise ModuleError(
                "the mask does not fit the values and their offsets: change it by "
                "load_state_dict, not in place"
            )
        self._cached = (values.data_ptr(), core)
        return core

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scale is not None and self.scale is not None and self.scale.dtype is not scale.dtype:
            self.scale = scale.to(self.scale.device)  # half() and the like are for the values
        self._cached = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        import copy

        other = self.__class__.__new__(self.__class__)
        memo[id(self)] = other
        other.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return other

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        mask, values = state_dict.get(f"{prefix}mask"), state_dict.get(f"{prefix}values")
        offset = None
        try:
            if values is None and f"{prefix}weight" in state_dict:  # not strict, it would be passed
                raise ModuleError(
                    f"{prefix}weight: a dense matrix for a layer that is packed; convert a dense "
                    "model that has it, or load a state from after packing"
                )
            if isinstance(mask, torch.Tensor):
                offset = self._offsets_of(f"{prefix}mask", mask)
                count = int(offset[-1])
                if values is None and count != self.values.numel():
                    raise ModuleError(
                        f"{prefix}mask: keeps {count} values, the layer has {self.values.numel()} "
                        f"and the state dict no {prefix}values"
                    )
                if values is not None and tuple(values.shape) != (count,):
                    raise ModuleError(
                        f"{prefix}values: the mask keeps {count}, got shape {tuple(values.shape)}"
                    )
            if values is not None and (values.dtype is torch.int8) != (self.scale is not None):
                raise ModuleError(
                    f"{prefix}values: {values.dtype} cannot be loaded into a layer of "
                    f"{self.values.dtype}: int8 numbers are in units of a scale"
                )
        except ModuleError as error:
            error_msgs.append(str(error))
            return
        if offset is not None and values is not None and values.shape != self.values.shape:
            # in place: a tied layer has the same parameter
            self.values.data = self.values.data.new_empty(values.shape)
            self.values.grad = None
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if offset is not None:
            with torch.no_grad():
                self.offset.copy_(torch.from_numpy(offset.view(np.int64)))
        self._cached = None

    def _offsets_of(self, name: str, mask: torch.Tensor) -> Array:
        words = self._rows * -(-self._cols // 64)
        if mask.dtype is not torch.int64 or mask.shape != (words,):
            raise ModuleError(
                f"{name}: expected torch.int64 ({words},) for a {self._rows} x {self._cols} "
                f"matrix, got {mask.dtype} {tuple(mask.shape)}"
            )
        array = mask.detach().cpu().contiguous().numpy().view(np.uint64)
        try:
            return _core.packed_offsets(array, self._rows, self._cols)
        except ValueError:
            raise ModuleError(f"{name}: bits are set past the last column") from None

    def _check_device(self, tensor: torch.Tensor) -> None:
        for what, device in (("input", tensor.device), ("values", self.values.device)):
            if device.type not in ("cpu", "meta"):
                raise ModuleError(f"packed matrices run on the CPU: the {what} is on {device}")


def pack_tensor(weight: Any, mask: Any, dtype: Any, transposed: bool = False) -> Packed:
    """``foldprune.pack`` of torch tensors; of a (in x out) one with ``transposed``."""
    if not isinstance(weight, torch.Tensor):
        raise TensorTypeError(f"weight: expected a torch tensor, got {type(weight).__name__}")
    array = to_numpy("weight", weight)
    keep = mask
    if isinstance(mask, torch.Tensor):
        if mask.dtype is not torch.bool:
            raise TensorTypeError(f"mask: expected a boolean tensor, got {mask.dtype}")
        keep = mask.cpu().numpy()
    if transposed:
        array, keep = array.T, None if keep is None else keep.T
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    return pack(array, keep, dtype)


class PackedLinear(_PackedModule):
    """y = x W^T + b with a packed W: a linear layer that keeps and reads the kept weights alone.

    The gradient is that of the kept values; pruned weights stay zero. int8 values do not train.
    Inputs are float32, bfloat16 or float16, computed in float32 and returned in their own dtype
    (float64 with float64 values). On the CPU alone.

    Parameters
    ----------
    in_features, out_features
        The matrix's sizes.
    bias
        Whether there is a bias, of zeros at first.
    mask
        Boolean (out x in), what is kept; None keeps all. Values are drawn as nn.Linear draws them.
        ``from_dense`` and ``from_packed`` take them from a matrix.
    dtype
        Of the values: a torch dtype, or "int8".
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mask: torch.Tensor | None = None,
        dtype: Any = None,
    ) -> None:
        dense = nn.Linear(in_features, out_features, bias=False)
        if mask is None:
            mask = torch.ones(out_features, in_features, dtype=torch.bool)
        super().__init__(pack_tensor(dense.weight, mask, dtype))
        zeros = torch.zeros(out_features)
        if self.values.is_floating_point():
            zeros = zeros.to(self.values.dtype)
        self.register_parameter("bias", nn.Parameter(zeros) if bias else None)

    @property
    def in_features(self) -> int:
        return self._cols

    @property
    def out_features(self) -> int:
        return self._rows

    @classmethod
    def from_packed(
        cls, packed: Packed, bias: torch.Tensor | nn.Parameter | None = None
    ) -> PackedLinear:
        """A layer with a copy of a packed matrix. A bias that is a Parameter is used itself."""
        if not isinstance(packed, Packed):
            raise TensorTypeError(f"packed: expected a Packed, got {type(packed).__name__}")
        if bias is not None and bias.shape != (packed.shape[0],):
            raise TensorError(f"bias: expected shape ({packed.shape[0]},), got {tuple(bias.shape)}")
        module = cls.__new__(cls)
        _PackedModule.__init__(module, packed)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias.detach().clone())
        module.register_parameter("bias", bias)
        return module

    @classmethod
    def from_dense(
        cls, weight: torch.Tensor | nn.Module, mask: Any = None, dtype: Any = None
    ) -> PackedLinear:
        """Packs a matrix (out x in), an nn.Linear or a transformers Conv1D.

        ``mask``: boolean, of the weight's shape, True where a weight is kept; by default the
        weights that are not zero. ``dtype``: of the values, by default the weight's; a torch dtype
        or "int8". Raises TensorError or TensorTypeError as ``foldprune.pack``.
        """
        bias = None
        transposed = False
        if isinstance(weight, nn.Module):
            transposed = type(weight).__name__ == "Conv1D"
            bias = getattr(weight, "bias", None)
            weight = weight.weight
        packed = pack_tensor(weight, mask, dtype, transposed)
        return cls.from_packed(packed, None if bias is None else bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if _autocast("cpu") and x.dtype is not _float64 and x.is_floating_point():
            x = x.to(torch.get_autocast_dtype("cpu"))
        shape, bias = x.shape, self._parameters["bias"]
        if (
            x.dtype is _float32
            and type(x) is torch.Tensor
            and x.is_cpu
            and _eager()
            and shape[-1:] == (self._cols,)
            and (bias is None or bias.dtype is _float32)
        ):
            core = self._matrix()
            if core[4].dtype != np.float64:
                flat = x.detach().contiguous().numpy()
                if flat.ndim != 2:
                    flat = flat.reshape(shape[:-1].numel(), self._cols)
                added = None if bias is None else bias.detach().numpy()
                y = _core.matmul(core, flat, added, _threads())
                return torch.from_numpy(y.reshape(*shape[:-1], self._rows))
        self._check_device(x)
        out: torch.Tensor = packed_linear(x, *self._tensors(), bias, self._rows, self._cols)
        return out

    def extra_repr(self) -> str:
        return (
            f"in_features={self._cols}, out_features={self._rows}, bias={self.bias is not None}, "
            + super().extra_repr()
        )


class PackedEmbedding(_PackedModule):
    """A packed table of embeddings, whose rows are unpacked when they are looked up.

    Parameters
    ----------
    num_embeddings, embedding_dim
        The table's sizes.
    padding_idx
        A row that gets no gradient.
    mask, dtype
        As for ``PackedLinear``; values are drawn as nn.Embedding draws them.

    Attributes
    ----------
    out_dtype
        Of the rows that are looked up, None for that of the values (float32 from int8). ``half``
        and the like change it too.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        mask: torch.Tensor | None = None,
        dtype: Any = None,
    ) -> None:
        dense = nn.Embedding(num_embeddings, embedding_dim, padding_idx)
        if mask is None:
            mask = torch.ones(num_embeddings, embedding_dim, dtype=torch.bool)
        super().__init__(pack_tensor(dense.weight, mask, dtype))
        self.padding_idx = dense.padding_idx
        self.out_dtype: torch.dtype | None = None

    @property
    def num_embeddings(self) -> int:
        return self._rows

    @property
    def embedding_dim(self) -> int:
        return self._cols

    @classmethod
    def from_packed(
        cls,
        packed: Packed,
        padding_idx: int | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> PackedEmbedding:
        """A layer with a copy of a packed (rows x size) table."""
        if not isinstance(packed, Packed):
            raise TensorTypeError(f"packed: expected a Packed, got {type(packed).__name__}")
        rows = packed.shape[0]
        if padding_idx is not None:
            if not -rows <= padding_idx < rows:
                raise TensorError(f"padding_idx={padding_idx}: the table has {rows} rows")
            padding_idx %= rows
        module = cls.__new__(cls)
        _PackedModule.__init__(module, packed)
        module.padding_idx, module.out_dtype = padding_idx, out_dtype
        return module

    @classmethod
    def from_dense(
        cls, weight: torch.Tensor | nn.Embedding, mask: Any = None, dtype: Any = None
    ) -> PackedEmbedding:
        """Packs a table or an nn.Embedding; ``mask`` and ``dtype`` as for ``PackedLinear``."""
        padding_idx = None
        if isinstance(weight, nn.Embedding):
            padding_idx, weight = weight.padding_idx, weight.weight
        return cls.from_packed(pack_tensor(weight, mask, dtype), padding_idx)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self._check_device(ids)
        padding = -1 if self.padding_idx is None else self.padding_idx
        rows: torch.Tensor
        if _eager() and type(ids) is torch.Tensor and ids.dtype is torch.int64 and ids.is_cpu:
            flat = ids.contiguous().view(-1).numpy()
            try:
                found = _core.packed_lookup(self._matrix(), flat, _threads())
            except ValueError:
                raise IndexError("index out of range in self") from None
            dtype = torch.float32 if self.scale is not None else self.values.dtype
            rows = from_core(found, dtype, (*ids.shape, self._cols))
        else:
            sizes = (self._rows, self._cols)
            rows = packed_embedding(ids, *self._tensors(), *sizes, padding)
        return rows if self.out_dtype is None else rows.to(self.out_dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self.out_dtype is not None:
            self.out_dtype = fn(torch.empty(0, dtype=self.out_dtype)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        return f"{self._rows}, {self._cols}, {padding}" + super().extra_repr()
