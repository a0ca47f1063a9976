"""Models that run compressed: ``convert``. The way back is in collect.py."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import _core, encodings
from ..compressed import Compressed
from ..encodings import Dense, Diagonal, Encoding, Fused, Planes, Rows
from ..errors import LoadedDenseWarning, ModelError, TensorError, TensorTypeError
from ..options import resolve_threads
from ..packed import Packed, pack, value_dtype
from .attention import FoldedAttention
from .collect import ORIGIN, Origin
from .dropout import Dropout
from .families import Family, family_of
from .folded import FoldedHeads, FoldedValue, NoRuntimeForm
from .modules import PackedEmbedding, PackedLinear
from .tensors import from_numpy, storage_key, to_numpy

__all__ = ["convert", "pack_more"]

_FOLDED = (Rows, Planes, Diagonal)
# transformers' GELUs by a tanh that write eight tensors where torch's writes one
_GELU_IN_STEPS = ("NewGELUActivation", "FastGELUActivation")
_PackedLayer = PackedLinear | PackedEmbedding


def convert(model: nn.Module, compressed: Compressed, *, dtype: Any = None) -> nn.Module:
    """Makes a model run in compressed form, in place: dense weights that have a packed or folded
    form are dropped.

    Pruned matrices become ``PackedLinear`` and ``PackedEmbedding`` (tied ones stay tied), attention
    whose query, key or value is folded becomes ``FoldedAttention``, dropout draws faster
    (``Dropout``), transformers' ``gelu_new`` and ``gelu_fast`` become torch's GELU, everything else
    is loaded as ``load_state_dict`` does. The outputs are those of the model with
    ``compressed.state_dict()``, to rounding. Training goes on in the compressed form: kept weights
    alone change.

    Parameters
    ----------
    model
        The model that the checkpoint was compressed from, or one of the same class and
        configuration, on the CPU. A transformers model for folded attention.
    compressed
        From ``foldprune.compress`` or ``load``.
    dtype
        Of the packed values: a torch dtype or "int8". By default that of the model's weights.

    Returns the model itself. Raises, with the model as it was,

    ModelError
        (ValueError) names that do not fit, tensors tied otherwise, a model already converted.
    TensorError, TensorTypeError
        (ValueError, TypeError) shapes or dtypes that do not fit.

    Tensors that have no compressed form to run in are unpacked, with a ``LoadedDenseWarning``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch module, got {type(model).__name__}")
    if not isinstance(compressed, Compressed):
        raise TypeError(f"compressed: expected a Compressed, got {type(compressed).__name__}")
    plan = _Plan(model, compressed, dtype)
    plan.apply()
    return model


# ---- from a checkpoint to modules ---------------------------------------------------------------


@dataclasses.dataclass
class _Use:
    """A packed tensor and the module that is to hold it."""

    path: str
    module: nn.Module
    encoding: encodings.Packed
    swapped: bool  # the encoding's (out x in) is the module's (in x out)
    dtype: np.dtype[Any]

    @property
    def weight(self) -> torch.Tensor:
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight


class _Plan:
    """Everything that is checked, before anything is changed."""

    def __init__(self, model: nn.Module, compressed: Compressed, dtype: Any) -> None:
        self.model, self.compressed = model, compressed
        self.modules = dict(model.named_modules(remove_duplicate=False))
        if any(isinstance(m, (*_PACKED, FoldedAttention)) for m in self.modules.values()):
            raise ModelError(
                f"{type(model).__name__} is converted already; load weights into it by "
                "load_state_dict, or convert a dense model"
            )
        self.state: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
        self.source = self._match()
        self.folded: dict[str, _Fold] = {}
        self.attention: dict[str, str] = {}
        self.dense_because: dict[str, str] = {}
        self._plan_attention()
        self.uses: dict[str, list[_Use]] = {}
        self._plan_packed(dtype)

    # ---- names ----------------------------------------------------------------------------------

    def _match(self) -> dict[str, str]:
        """The stored tensor of every name of the model."""
        compressed, state = self.compressed, self.state
        stored = {name: compressed.tied.get(name, name) for name in compressed}
        aliases: dict[tuple[Any, ...], list[str]] = {}
        for name, tensor in state.items():
            if tensor.device.type != "cpu":
                raise ModelError(f"{name!r} is on {tensor.device}: convert a model on the CPU")
            key = storage_key(tensor) if tensor.numel() else ("empty", name)
            aliases.setdefault(key, []).append(name)
        source, missing = {}, []
        for names in aliases.values():
            found = {stored[name] for name in names if name in stored}
            if len(found) > 1:
                raise ModelError(
                    f"the model ties {', '.join(names)}, the checkpoint has different tensors for "
                    f"them: {', '.join(sorted(found))}"
                )
            if found:
                source.update(dict.fromkeys(names, found.pop()))
            else:
                missing += names
        unexpected = [name for name in compressed if name not in state]
        if missing or unexpected:
            raise ModelError(
                f"the checkpoint does not fit {type(self.model).__name__}: "
                f"missing {_listed(missing)}, not in the model {_listed(unexpected)}"
            )
        for name, tensor in state.items():
            encoding = compressed.encodings[source[name]]
            if tuple(tensor.shape) != tuple(encoding.shape):
                raise TensorError(
                    f"{name!r}: shape {tuple(encoding.shape)} in the checkpoint, "
                    f"{tuple(tensor.shape)} in the model"
                )
        return source

    def encoding(self, name: str) -> Encoding | None:
        return self.compressed.encodings.get(self.source.get(name, name))

    # ---- folded attention -----------------------------------------------------------------------

    def _plan_attention(self) -> None:
        folded = {
            name
            for name, encoding in self.compressed.encodings.items()
            if isinstance(encoding, (*_FOLDED, Fused))
        }
        for path, module in self.modules.items():
            family = family_of(module)
            if family is None:
                continue
            names = {
                child: _join(path, child)
                for child in ([family.fused] if family.fused else family.roles.values())
            }
            weights = [f"{name}.weight" for name in names.values()]
            if not folded.intersection(weights):
                continue
            try:
                self.folded[path] = _Fold(self, path, module, family)
            except NoRuntimeForm as error:
                self.dense_because.update(dict.fromkeys(weights, str(error)))
                continue
            for weight in folded.intersection(weights):
                self.attention[weight] = path
                bias = weight.removesuffix("weight") + "bias"
                if bias in self.state:
                    self.attention[bias] = path
        for name in folded - set(self.attention):
            if name.endswith("weight"):
                reason = "it is in no attention module that foldprune.torch knows"
                self.dense_because.setdefault(name, reason)

    # ---- packed matrices ------------------------------------------------------------------------

    def _plan_packed(self, dtype: Any) -> None:
        wanted = None if dtype is None else value_dtype(_dtype_name(dtype))
        by_source: dict[str, list[str]] = {}
        for name, source in self.source.items():
            if isinstance(self.compressed.encodings[source], encodings.Packed):
                by_source.setdefault(source, []).append(name)
        for source, names in by_source.items():
            encoding = self.compressed.encodings[source]
            assert isinstance(encoding, encodings.Packed)
            try:
                uses = [_use(self.modules, self.state, name, encoding, wanted) for name in names]
            except NoRuntimeForm as error:
                self.dense_because[source] = str(error)
                continue
            for use in uses:
                values = encoding.values
                if use.dtype not in (values.dtype, np.dtype(np.int8)):
                    with np.errstate(over="ignore"):
                        values = values.astype(use.dtype)
                if not np.isfinite(values.astype(np.float32)).all():
                    raise TensorError(f"{source!r}: has numbers beyond the range of {use.dtype}")
            self.uses[source] = uses

    # ---- the change -----------------------------------------------------------------------------

    def apply(self) -> None:
        compressed, threads = self.compressed, self.compressed.threads
        for source, reason in self.dense_because.items():
            _warn_dense(source, reason, 3)
        loaded: set[int] = set()
        with torch.no_grad():
            for name, tensor in self.state.items():
                source = self.source[name]
                if source in self.uses or source in self.attention:
                    continue
                if tensor.data_ptr() in loaded and tensor.numel():
                    continue
                loaded.add(tensor.data_ptr())
                array = compressed.encodings[source].unpack(threads)
                tensor.copy_(from_numpy(np.array(array, order="C")))
        swapped = {source: uses[0].swapped for source, uses in self.uses.items()}
        # one by one, and nothing here holds on to the dense weights: there is room for one model
        self.state.clear()
        self.modules.clear()
        while self.uses:
            _, uses = self.uses.popitem()
            _swap_in(self.model, uses, threads)
        for path, fold in self.folded.items():
            _set(self.model, path, fold.build(self.model.get_submodule(path)))
        for module in self.model.modules():
            _make_faster(module)
        described = {
            name: {**encodings.describe(encoding), "swapped": swapped.get(name, False)}
            for name, encoding in compressed.encodings.items()
        }
        first: dict[str, str] = {}
        for name, source in self.source.items():
            first.setdefault(source, name)
        origin = Origin(
            list(compressed),
            dict(compressed.tied),
            described,
            first,
            dict(self.attention),
            compressed.report,
            compressed.recipe,
            compressed.framework,
        )
        setattr(self.model, ORIGIN, origin)


def _make_faster(module: Any) -> None:
    """What stands between packed matrices, in place: its hooks stay, and whoever holds it."""
    if type(module) is nn.Dropout:
        module.__class__ = Dropout
    elif type(module).__name__ in _GELU_IN_STEPS:
        module.__class__ = nn.GELU
        module.approximate = "tanh"


def _use(
    modules: Mapping[str, nn.Module],
    state: Mapping[str, torch.Tensor],
    name: str,
    encoding: encodings.Packed,
    wanted: np.dtype[Any] | None,
) -> _Use:
    """The module that is to hold a packed tensor. NoRuntimeForm if it cannot."""
    path, _, leaf = name.rpartition(".")
    module = modules[path]
    if leaf != "weight":
        raise NoRuntimeForm(f"{type(module).__name__} has no packed form for {leaf!r}")
    linear = type(module) is nn.Linear
    conv = type(module).__name__ == "Conv1D"
    embedding = type(module) is nn.Embedding
    if embedding and (module.max_norm is not None or module.sparse or module.scale_grad_by_freq):
        raise NoRuntimeForm("the embedding renormalises or has sparse gradients")
    if not (linear or conv or embedding):
        raise NoRuntimeForm(f"{type(module).__name__} has no packed form")
    own = state[name].dtype
    model_dtype = to_numpy(name, torch.empty(0, dtype=own)).dtype
    if wanted is not None and (wanted == np.float64) != (model_dtype == np.float64):
        raise TensorTypeError(
            f"{name!r}: {wanted} values in a model of {model_dtype}: float64 goes with "
            "float64 alone"
        )
    return _Use(path, module, encoding, conv != encoding.transposed, wanted or model_dtype)


def _swap_in(model: nn.Module, uses: Sequence[_Use], threads: int) -> None:
    """Packed layers in place of those that share one tensor."""
    groups: dict[int, list[_Use]] = {}  # by what the model ties
    for use in uses:
        groups.setdefault(use.weight.data_ptr(), []).append(use)
    for group in groups.values():
        first: _PackedLayer | None = None
        for use in group:
            new = _packed_module(use, first, threads)
            first = first or new
            _set(model, use.path, new)
        _declare_tied(model, [use.path for use in group])


def _declare_tied(model: nn.Module, paths: Sequence[str]) -> None:
    """Hugging Face's models find shared tensors by their names when they save and tie them: those
    of these packed layers in place of the weights'."""
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        inside = [path.removeprefix(start) for path in paths if path.startswith(start)]
        if len(inside) < 2 or not hasattr(module, "_tied_weights_keys"):
            continue
        # embeddings are what others are tied to
        inside.sort(key=lambda path: not isinstance(module.get_submodule(path), PackedEmbedding))
        source, others = inside[0], inside[1:]
        layer = module.get_submodule(source)
        parts = [*dict(layer.named_parameters(recurse=False)), *dict(layer.named_buffers())]
        names = {
            f"{other}.{part}": f"{source}.{part}"
            for other in others
            for part in parts
            if part != "bias"
        }
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            known = getattr(module, attribute, None) or {}
            if isinstance(known, Mapping):
                gone = {f"{path}.weight" for path in inside}
                kept = {name: to for name, to in known.items() if name not in gone}
                setattr(module, attribute, {**kept, **names})
            else:  # a list of names, before transformers 5
                setattr(module, attribute, [*known, *names])


def _packed_module(use: _Use, tied: _PackedLayer | None, threads: int) -> _PackedLayer:
    module = use.module
    packed = _runtime(use, threads)
    new: _PackedLayer
    if isinstance(module, nn.Embedding):
        own = use.weight.dtype
        new = PackedEmbedding.from_packed(packed, module.padding_idx)
        if new.scale is not None or new.values.dtype is not own:
            new.out_dtype = own
    else:
        bias: Any = module.bias
        new = PackedLinear.from_packed(packed, bias)
    if new.values.is_floating_point():
        new.values.requires_grad_(use.weight.requires_grad)
    if tied is not None:
        new.share(tied)
    new.train(module.training)
    return new


def pack_more(model: nn.Module, packed: Mapping[str, encodings.Packed], method: str) -> None:
    """Packs dense matrices of a model that was converted before, in place.

    ``packed``: by their names in the checkpoint that the model was converted with. ``method``: what
    the report says of them from now on. A matrix whose module has no packed form stays dense, with
    a LoadedDenseWarning.
    """
    origin = getattr(model, ORIGIN)
    assert isinstance(origin, Origin)
    state = model.state_dict(keep_vars=True)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, encoding in packed.items():
        key = storage_key(state[origin.sources[name]])
        names = [n for n, tensor in state.items() if storage_key(tensor) == key]
        try:
            uses = [_use(modules, state, n, encoding, None) for n in names]
        except NoRuntimeForm as error:
            _warn_dense(name, str(error), 3)
            continue
        _swap_in(model, uses, resolve_threads(None))
        origin.described[name] = {**encodings.describe(encoding), "swapped": uses[0].swapped}
    rows = [
        dataclasses.replace(row, method=method) if row.name in packed else row
        for row in origin.report.rows
    ]
    origin.report = dataclasses.replace(origin.report, rows=rows)


def _warn_dense(name: str, reason: str, level: int) -> None:
    message = f"{name!r} is loaded dense: {reason}"
    warnings.warn(message, LoadedDenseWarning, stacklevel=level + 1)


_PACKED = (PackedLinear, PackedEmbedding)


class _Fold:
    """The folded projections of one attention module."""

    def __init__(self, plan: _Plan, path: str, module: nn.Module, family: Family) -> None:
        self.family, self.path = family, path
        for attribute in family.refuses:
            if getattr(module, attribute, False):
                raise NoRuntimeForm(f"{type(module).__name__} with {attribute}")
        child = getattr(module, family.fused or family.query)
        dtype = child.weight.dtype
        self.projections: dict[str, nn.Module | None] = {}
        pairs = self._segments(plan) if family.fused else self._tensors(plan)
        heads = {}
        for role, (weight, bias) in pairs.items():
            heads[role] = (weight.shape[0], getattr(weight, "heads", None))
            if isinstance(weight, (Rows, Planes)) and role != "value":
                self.projections[role] = FoldedHeads(weight, bias, dtype)
            elif isinstance(weight, Diagonal) and role == "value":
                value = FoldedValue(weight, bias, dtype)
                self.projections[role] = value
            elif isinstance(weight, _FOLDED):
                raise NoRuntimeForm(f"a {role} stored as {weight.kind!r}")
            else:
                self.projections[role] = _linear(weight, bias, dtype) if family.fused else None
        config: Any = module.config
        self.heads = int(config.num_attention_heads)
        self.groups = int(getattr(config, "num_key_value_heads", None) or self.heads)
        self.head_dim = heads["query"][0] // self.heads
        for role, count in (("query", self.heads), ("key", self.groups), ("value", self.groups)):
            rows, own = heads[role]
            if own not in (None, count) or rows != count * self.head_dim:
                raise NoRuntimeForm(f"the {role} is folded in {own} heads, the model has {count}")
        self.build(module)  # checks that the projections go together

    def _tensors(self, plan: _Plan) -> dict[str, tuple[Encoding, Encoding | None]]:
        pairs = {}
        for role, name in self.family.roles.items():
            weight = plan.encoding(f"{_join(self.path, name)}.weight")
            if weight is None or isinstance(weight, Fused):
                raise NoRuntimeForm(f"the {role} is fused with another tensor")
            pairs[role] = (weight, plan.encoding(f"{_join(self.path, name)}.bias"))
        return pairs

    def _segments(self, plan: _Plan) -> dict[str, tuple[Encoding, Encoding | None]]:
        name = _join(self.path, str(self.family.fused))
        weight, bias = plan.encoding(f"{name}.weight"), plan.encoding(f"{name}.bias")
        if (
            not isinstance(weight, Fused)
            or not weight.transposed
            or weight.interleave
            or len(weight.segments) != 3
        ):
            raise NoRuntimeForm("its parts are fused otherwise than the model's")
        biases: list[Encoding | None] = [None] * 3
        if isinstance(bias, Fused) and len(bias.segments) == 3 and not bias.interleave:
            biases = list(bias.segments)
        elif bias is not None:
            array = bias.unpack()
            ends = np.cumsum([segment.shape[0] for segment in weight.segments])
            biases = [Dense(part.copy()) for part in np.split(array, ends[:-1])]
        return {
            role: (segment, own)
            for role, segment, own in zip(self.family.roles, weight.segments, biases, strict=True)
        }

    def build(self, module: nn.Module) -> FoldedAttention:
        projections = {
            role: projection or getattr(module, self.family.roles[role])
            for role, projection in self.projections.items()
        }
        return FoldedAttention(
            module, self.family, projections, self.heads, self.groups, self.head_dim
        )


def _linear(weight: Encoding, bias: Encoding | None, dtype: torch.dtype) -> nn.Linear:
    rows, cols = weight.shape
    linear = nn.Linear(cols, rows, bias=bias is not None, dtype=dtype, device="meta")
    linear.weight = nn.Parameter(from_numpy(weight.unpack()).to(dtype))
    if bias is not None:
        linear.bias = nn.Parameter(from_numpy(bias.unpack()).to(dtype))
    return linear


def _runtime(use: _Use, threads: int) -> Packed:
    """The module's (out x in) matrix with the checkpoint's own mask."""
    encoding = use.encoding
    rows, cols = encoding.matrix_shape
    bits = encoding.element_mask(threads)
    dense = _core.unpack(encoding.values, bits, (rows, cols), threads)
    kept = np.unpackbits(bits, count=rows * cols, bitorder="little")
    mask = kept.astype(bool).reshape(rows, cols)
    if use.swapped:
        dense, mask = dense.T, mask.T
    return pack(dense, np.ascontiguousarray(mask), use.dtype)


def _dtype_name(dtype: Any) -> Any:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _listed(names: list[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more


def _set(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)
