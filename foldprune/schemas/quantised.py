"""Layers that others have quantised: their numbers mean something only together with scales that
lie beside them, so all of it passes through untouched."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..encodings import Array

__all__ = ["Quantised", "block_prefix", "find_quantised"]

# what lies beside a layer's weight, by GPTQ, AWQ, bitsandbytes, compressed-tensors, ModelOpt and
# float8 checkpoints
_BESIDE = re.compile(
    r"\.(?:qzeros|scales|g_idx|SCB|weight_format|scale_(?:weight|input)"
    r"|(?:weight|input|output)_(?:scale(?:_inv|_2)?|global_scale|zero_point|shape|g_idx)"
    r"|weight\.(?:(?:nested_)?(?:absmax|quant_map)|quant_state\..+))$"
)
_PACKED = re.compile(r"\.(?:qweight|weight_packed)$")
_CACHE_SCALE = re.compile(r"\.[kv]_scale$")  # of an attention's key-value cache
_BLOCK = re.compile(r"^(?:.*?\.)?\d+\.")


@dataclass
class Quantised:
    """``scaled``: weights of whole shape whose scales lie beside them; ``aside``: what no schema is
    to see: scales, and whole blocks with a layer whose weight is packed, as its shape is not the
    layer's own. ``notes`` names every layer."""

    scaled: set[str] = field(default_factory=set)
    aside: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def find_quantised(arrays: Mapping[str, Array]) -> Quantised:
    """Only names, shapes and dtypes are looked at."""
    beside: dict[str, list[str]] = {}
    for name in arrays:
        if match := _BESIDE.search(name):
            beside.setdefault(name[: match.start()], []).append(name)
    packed = {
        name[: match.start()]: name
        for name, array in arrays.items()
        if (match := _PACKED.search(name)) and array.dtype.kind in "iu"
    }
    found = Quantised()
    blocks: set[str] = set()
    for layer in dict.fromkeys([*packed, *beside]):
        weight = packed.get(layer, f"{layer}.weight")
        if weight not in arrays or not _is_quantised(dtype := arrays[weight].dtype):
            continue
        found.aside.update(beside.get(layer, ()))
        found.notes.append(f"{layer}: quantised ({dtype}), passes through untouched")
        if layer in packed or dtype.kind == "u":  # several numbers in each
            found.aside.add(weight)
            if prefix := block_prefix(layer):
                blocks.add(prefix)
        else:
            found.scaled.add(weight)
    if found.notes:
        found.aside.update(name for name in arrays if _CACHE_SCALE.search(name))
    found.aside.update(name for name in arrays if block_prefix(name) in blocks)
    found.notes += [
        f"{prefix}*: a layer's weight is packed, so that its shape is unknown; the whole block "
        "passes through untouched"
        for prefix in sorted(blocks)
    ]
    return found


def block_prefix(name: str) -> str | None:
    """Up to the first number, as "model.layers.0."; None outside of all blocks."""
    match = _BLOCK.match(name)
    return match and match[0]


def _is_quantised(dtype: object) -> bool:
    return getattr(dtype, "kind", "") in "iu" or str(dtype).startswith("float8")
