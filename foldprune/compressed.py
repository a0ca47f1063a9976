"""The result of compression: packed in memory, dense on access."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from . import tensors
from .encodings import Array, Encoding
from .recipe import Recipe
from .report import Report

__all__ = ["Compressed"]


class Compressed(Mapping[str, Array]):
    """A compressed checkpoint: a mapping of names to dense NumPy arrays, each unpacked when it is
    read.

    Attributes
    ----------
    report : Report
        What every tensor cost.
    recipe : Recipe
        What was asked for; where ``compress`` was given a rate alone, what it settled on.
    encodings : Mapping[str, Encoding]
        How each tensor is stored (tied names are in ``tied`` instead).
    tied : Mapping[str, str]
        Names that share another one's tensor.
    framework : str or None
        "torch" or "numpy": whose tensors ``state_dict`` gives. None: those of torch if the process
        has imported it, else NumPy's.
    """

    def __init__(
        self,
        names: list[str],
        encodings: dict[str, Encoding],
        tied: dict[str, str],
        report: Report,
        recipe: Recipe,
        framework: str | None,
        threads: int = 1,
    ) -> None:
        self._names = names
        self.encodings: Mapping[str, Encoding] = encodings
        self.tied: Mapping[str, str] = tied
        self.report = report
        self.recipe = recipe
        self.framework = framework
        self.threads = threads

    def __getitem__(self, name: str) -> Array:
        return self.encodings[self.tied.get(name, name)].unpack(self.threads)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self.encodings or name in self.tied

    def __repr__(self) -> str:
        total = self.report.totals["model"]
        return (
            f"<foldprune.Compressed: {len(self)} tensors, {total.removed:.1%} of the numbers "
            f"removed, {total.bytes / 1e6:.1f} -> {total.stored_bytes / 1e6:.1f} MB>"
        )

    def _repr_html_(self) -> str:
        return self.report._repr_html_()

    def state_dict(self, framework: str | None = None) -> dict[str, Any]:
        """The dense state dict: same names, order, dtypes and shapes as the original, tied tensors
        tied.

        The unmodified model takes it with ``load_state_dict(strict=True)``. ``framework``: "torch"
        or "numpy"; by default the one that the original was in.
        """
        framework = framework or self.framework or ("torch" if "torch" in sys.modules else "numpy")
        dense: dict[str, Any] = {}
        for name in self._names:
            source = self.tied.get(name)
            if source is not None:
                dense[name] = dense[source]
            else:
                dense[name] = tensors.to_framework(self[name], framework)
        return dense

    def save(self, path: str | os.PathLike[str], *, max_shard_bytes: int | None = None) -> None:
        """Writes the packed form: one safetensors file, or with ``max_shard_bytes`` a folder of
        shards and an index.

        The old file or the new one is there at any moment, whole. Raises OSError if it cannot be
        written.
        """
        from . import container

        container.save(self, os.fspath(path), max_shard_bytes)
