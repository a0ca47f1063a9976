"""The way back: ``to_compressed``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from .. import encodings
from ..compressed import Compressed
from ..encodings import Dense, Encoding
from ..errors import ModelError
from ..options import resolve_threads
from ..packed import Packed
from ..report import Report
from .attention import FoldedAttention
from .folded import FoldedHeads, FoldedValue
from .modules import PackedEmbedding, PackedLinear
from .tensors import to_numpy

__all__ = ["ORIGIN", "Origin", "resized", "to_compressed"]

ORIGIN = "_foldprune_origin"  # the attribute of a converted model


def to_compressed(model: nn.Module) -> Compressed:
    """The weights of a converted model, trained or not, as a ``Compressed``.

    Recipe and report are those of the checkpoint it was converted with, the report's sizes as they
    are now; its errors are of the compression, not of any training since. Weights have the model's
    dtype, those of int8 values float32. Raises ModelError (a ValueError) for a model that is not
    converted.
    """
    origin = getattr(model, ORIGIN, None)
    if not isinstance(origin, Origin):
        raise ModelError(
            f"{type(model).__name__} was not made by foldprune.torch.convert; "
            "foldprune.compress(model) compresses a dense one"
        )
    return origin.collect(model)


@dataclasses.dataclass
class Origin:
    """The checkpoint without its weights. ``described``: each tensor's encoding as JSON;
    ``attention``: for tensors that a FoldedAttention has taken in, its name."""

    names: list[str]
    tied: dict[str, str]
    described: dict[str, dict[str, Any]]
    sources: dict[str, str]
    attention: dict[str, str]
    report: Report
    recipe: Any
    framework: str | None

    def collect(self, model: nn.Module) -> Compressed:
        threads = resolve_threads(None)
        state = model.state_dict()
        out: dict[str, Encoding] = {}
        for name, described in self.described.items():
            path, _, leaf = self.sources[name].rpartition(".")
            if name in self.attention:
                out[name] = _folded_encoding(model, self.attention[name], path, leaf)
                continue
            module = model.get_submodule(path)
            if isinstance(module, (PackedLinear, PackedEmbedding)) and leaf == "weight":
                out[name] = _packed_encoding(module.packed(), described, threads)
            else:
                array = to_numpy(name, state[self.sources[name]]).copy()
                kept = described.get("kept")
                out[name] = Dense(array, kept if described["kind"] == "dense" else None)
        return Compressed(
            list(self.names),
            out,
            dict(self.tied),
            resized(self.report, out),
            self.recipe,
            self.framework,
            threads=threads,
        )


def resized(report: Report, stored: Mapping[str, Encoding]) -> Report:
    """The report with the sizes of these encodings."""
    rows = [
        dataclasses.replace(
            row,
            stored=stored[row.name].numbers if row.numbers else 0,
            stored_bytes=encodings.nbytes(stored[row.name]),
        )
        if row.name in stored
        else row
        for row in report.rows
    ]
    return dataclasses.replace(report, rows=rows)


def _folded_encoding(model: nn.Module, attention: str, path: str, leaf: str) -> Encoding:
    folded = model.get_submodule(attention)
    assert isinstance(folded, FoldedAttention)
    name = path[len(attention) + 1 :] if attention else path
    if name == folded.family.fused:
        both = folded.fused()
    else:
        projection = getattr(folded, name)
        assert isinstance(projection, (FoldedHeads, FoldedValue))
        both = projection.encodings()
    encoding = both[leaf == "bias"]
    assert encoding is not None
    return encoding


def _packed_encoding(
    packed: Packed, described: Mapping[str, Any], threads: int
) -> encodings.Packed:
    """Row-major bits and values, in the blocks that the checkpoint had."""
    dense = packed.unpack(threads)
    ones = Packed(packed.shape, packed.mask, np.ones(packed.values.shape, np.float32))
    mask = ones.unpack(threads) != 0
    transposed = bool(described.get("transposed", False))
    swapped = described.get("swapped", False)
    if swapped:
        dense, mask = dense.T, mask.T
    rows, cols = described.get("block", (1, 1))
    return encodings.Packed.from_mask(dense, mask, (int(rows), int(cols)), transposed, threads)
