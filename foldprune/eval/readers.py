"""Rows of text and labels out of files: comma or tab separated, JSON lines, plain text, the hub."""

from __future__ import annotations

import csv
import importlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import DataError

__all__ = ["SUFFIXES", "Rows", "Source", "documents", "read_file", "read_hub", "read_table"]

SUFFIXES = (".csv", ".tsv", ".jsonl", ".txt")
TEXT_COLUMNS = ("text", "sentence", "content")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Rows:
    """Texts and their classes from 0 (none for language modelling)."""

    texts: Sequence[str]
    labels: Sequence[int] = ()


@dataclass(frozen=True)
class Source:
    """The rows of a set as they are published; what is None is drawn from ``train``."""

    train: Rows
    validation: Rows | None = None
    test: Rows | None = None
    classes: Sequence[str] = field(default=())


def read_table(
    path: str,
    columns: Sequence[str],
    *,
    delimiter: str = ",",
    quoted: bool = True,
    skip: int = 0,
) -> list[dict[str, str]]:
    """Rows of a table with a header, without the ``skip`` rows after it. DataError if a column is
    missing, here or in a row."""
    csv.field_size_limit(1 << 30)
    with open(path, encoding="utf-8", newline="") as file:
        try:
            reader = csv.DictReader(
                file, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
            )
            _need(path, columns, reader.fieldnames or ())
            rows = list(reader)[skip:]
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}: {error}") from None
    for i, row in enumerate(rows):
        for column in columns:
            if row[column] is None:
                raise DataError(f"{path}, row {i}: has no {column!r}")
    return rows


def _need(path: str, columns: Iterable[str], present: Iterable[str]) -> None:
    present = list(present)
    if missing := [column for column in columns if column not in present]:
        raise DataError(f"{path}: no column {', '.join(missing)}; there are {', '.join(present)}")


def documents(text: str, boundary: str = r"\n\s*\n") -> list[str]:
    """The parts of a text between matches of a regular expression."""
    return [part.strip() for part in re.split(boundary, text) if part.strip()]


# ---- the user's files ---------------------------------------------------------------------------


def read_file(path: str) -> Source:
    """A table with the columns ``text`` and perhaps ``label`` (numbers from 0, or names), or plain
    text whose documents are parted by empty lines."""
    if path.endswith(".txt"):
        with open(path, encoding="utf-8") as file:
            return Source(Rows(documents(file.read())))
    rows: Sequence[Row]
    if path.endswith(".jsonl"):
        rows = _json_lines(path)
    else:
        rows = read_table(path, ("text",), delimiter="\t" if path.endswith(".tsv") else ",")
    if not rows or "label" not in rows[0]:
        return Source(Rows([_text(path, i, row["text"]) for i, row in enumerate(rows)]))
    for i, row in enumerate(rows):
        if row.get("label") in (None, ""):
            raise DataError(f"{path}, row {i}: has no 'label'")
    return labelled({"train": rows}, path, "text", "label")


def _json_lines(path: str) -> list[Row]:
    rows: list[Row] = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: expected an object")
            _need(f"{path}, line {number}", ("text",), row)
            rows.append(row)
    return rows


def labelled(
    parts: Mapping[str, Sequence[Row]],
    where: str,
    text: str,
    label: str | Callable[[Row], Any],
    classes: Sequence[str] | None = None,
) -> Source:
    """Rows with labels as a ``Source``. Whole numbers are the classes themselves; anything else is
    a name, and the classes are the sorted names of all parts, unless they are given."""
    find = (lambda row: row[label]) if isinstance(label, str) else label
    found = {part: [find(row) for row in rows] for part, rows in parts.items()}
    values = sorted({str(value) for labels in found.values() for value in labels})
    numeric = all(re.fullmatch(r"-?\d+", value) for value in values)
    if classes is None:
        count = 1 + max((int(value) for value in values), default=0) if numeric else 0
        classes = [str(i) for i in range(count)] if numeric else values
    index = {name: i for i, name in enumerate(classes)}
    out = {}
    for part, rows in parts.items():
        labels = []
        for i, value in enumerate(found[part]):
            number = int(value) if numeric else index.get(str(value))
            if number is None:
                raise DataError(f"{where}, {part}, row {i}: unknown label {value!r}")
            labels.append(number)
        out[part] = Rows([_text(where, i, row[text]) for i, row in enumerate(rows)], labels)
    return Source(out["train"], out.get("validation"), out.get("test"), classes)


def _text(where: str, i: int, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}, row {i}: a text is a string, not {type(value).__name__}")
    return value


# ---- the hub ------------------------------------------------------------------------------------


def read_hub(name: str) -> Source:
    """``owner/name`` or ``owner/name:configuration``, by the package datasets."""
    try:
        hub = importlib.import_module("datasets")
    except ImportError:
        raise ModuleNotFoundError(f"hf:{name} needs the package: pip install datasets") from None
    path, _, configuration = name.partition(":")
    loaded = hub.load_dataset(path, configuration or None)
    where = f"hf:{name}"
    parts = {part: loaded[part] for part in ("train", "validation", "test") if part in loaded}
    if "train" not in parts:
        raise DataError(f"{where}: no split 'train'; there are {', '.join(loaded)}")
    columns = parts["train"].column_names
    text = next((column for column in TEXT_COLUMNS if column in columns), None)
    if text is None:
        raise DataError(
            f"{where}: no column of text ({', '.join(TEXT_COLUMNS)}); there are "
            f"{', '.join(columns)}. Register a reader: foldprune.eval.datasets.register"
        )
    if "label" not in columns:
        plain = {part: Rows(list(rows[text])) for part, rows in parts.items()}
        return Source(plain["train"], plain.get("validation"), plain.get("test"))
    # a test split without its labels, as shared tasks have, is none
    labelled_parts = {p: list(rows) for p, rows in parts.items() if -1 not in rows["label"]}
    classes = getattr(parts["train"].features["label"], "names", None)
    return labelled(labelled_parts, where, text, "label", classes)
