"""What compression did, tensor by tensor and in groups."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Report", "Row", "Total", "html_table", "text_table"]

# group of totals -> groups of rows in it
_TOTALS: dict[str, tuple[str, ...]] = {
    "qkv": ("qkv",),
    "qkv with output": ("qkv", "attention_output"),
    "feed_forward": ("feed_forward",),
    "embedding": ("embedding",),
    "other": ("other",),
    "model": ("qkv", "attention_output", "feed_forward", "embedding", "other"),
}


@dataclass(frozen=True)
class Row:
    """One tensor. ``numbers`` and ``stored``: before and after; ``bytes`` and ``stored_bytes``
    likewise, masks and indices counted. ``error``: estimated relative squared error of what the
    tensor takes part in (its output; for a fold the logits or the attention's output of the
    block), None if not estimated."""

    name: str
    group: str
    method: str
    shape: tuple[int, ...]
    dtype: str
    numbers: int
    stored: int
    bytes: int
    stored_bytes: int
    error: float | None = None
    note: str = ""

    @property
    def removed(self) -> float:
        """Share of the numbers that need no storing."""
        return 1 - self.stored / self.numbers if self.numbers else 0.0


@dataclass(frozen=True)
class Total:
    numbers: int
    stored: int
    bytes: int
    stored_bytes: int

    @property
    def removed(self) -> float:
        return 1 - self.stored / self.numbers if self.numbers else 0.0

    @property
    def bytes_removed(self) -> float:
        return 1 - self.stored_bytes / self.bytes if self.bytes else 0.0


@dataclass
class Report:
    """Rows per tensor, totals per group, and everything that was assumed or refused (``notes``).

    ``str()`` prints the totals and notes; ``table()`` every tensor too; ``to_dict()`` is plain
    JSON.
    """

    rows: list[Row]
    schema: str | None = None
    heads: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def totals(self) -> dict[str, Total]:
        """By group: "qkv", "qkv with output", "feed_forward", "embedding", "other", "model"."""
        return {
            name: _sum(r for r in self.rows if r.group in groups)
            for name, groups in _TOTALS.items()
        }

    @property
    def removed(self) -> float:
        """Share of all the model's numbers that was removed."""
        return self.totals["model"].removed

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        totals = {
            name: {**asdict(total), "removed": total.removed, "bytes_removed": total.bytes_removed}
            for name, total in self.totals.items()
        }
        rows = [
            {**asdict(row), "shape": list(row.shape), "removed": row.removed} for row in self.rows
        ]
        return {
            "schema": self.schema,
            "heads": self.heads,
            "notes": self.notes,
            "totals": totals,
            "tensors": rows,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """The inverse of ``to_dict``."""
        rows = []
        for value in values["tensors"]:
            fields = {k: v for k, v in value.items() if k != "removed"}
            rows.append(Row(**{**fields, "shape": tuple(fields["shape"])}))
        return cls(rows, values.get("schema"), dict(values["heads"]), list(values["notes"]))

    def _total_lines(self) -> list[tuple[str, ...]]:
        lines: list[tuple[str, ...]] = [
            ("group", "numbers", "kept", "removed", "MB", "MB after", "bytes removed")
        ]
        for name, total in self.totals.items():
            if total.numbers:
                lines.append(
                    (
                        name.replace("_", " "),
                        f"{total.numbers:,}",
                        f"{total.stored:,}",
                        f"{total.removed:.2%}",
                        f"{total.bytes / 1e6:.2f}",
                        f"{total.stored_bytes / 1e6:.2f}",
                        f"{total.bytes_removed:.2%}",
                    )
                )
        return lines

    def _row_lines(self) -> list[tuple[str, ...]]:
        lines: list[tuple[str, ...]] = [
            ("tensor", "shape", "method", "removed", "bytes", "bytes after", "est. error", "note")
        ]
        for row in self.rows:
            lines.append(
                (
                    row.name,
                    "x".join(map(str, row.shape)) or "scalar",
                    row.method,
                    f"{row.removed:.2%}",
                    f"{row.bytes:,}",
                    f"{row.stored_bytes:,}",
                    "" if row.error is None else f"{row.error:.3g}",
                    row.note,
                )
            )
        return lines

    def _facts(self) -> list[str]:
        facts = []
        if self.heads:
            facts.append(
                f"architecture {self.schema}, {self.heads['heads']} heads of "
                f"{self.heads['head_dim']}, {self.heads['key_heads']} key heads"
                f"{' in the first block' if 'by_block' in self.heads else ''} (from: "
                f"{self.heads['source']})"
            )
        return facts + self.notes

    def __str__(self) -> str:
        return "\n".join(
            [text_table(self._total_lines()), *(f"- {fact}" for fact in self._facts())]
        )

    def table(self) -> str:
        """Every tensor, then the totals."""
        return text_table(self._row_lines()) + "\n\n" + str(self)

    def _repr_html_(self) -> str:
        facts = "".join(f"<li>{html.escape(fact)}</li>" for fact in self._facts())
        return (
            f"{html_table(self._total_lines())}<ul>{facts}</ul><details><summary>{len(self.rows)} "
            f"tensors</summary>{html_table(self._row_lines())}</details>"
        )


def _sum(rows: Iterable[Row]) -> Total:
    numbers = stored = before = after = 0
    for row in rows:
        numbers += row.numbers
        stored += row.stored
        before += row.bytes
        after += row.stored_bytes
    return Total(numbers, stored, before, after)


def text_table(lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    out = []
    for line in lines:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        out.append("  ".join(cells).rstrip())
    return "\n".join(out)


def html_table(lines: list[tuple[str, ...]]) -> str:
    head, *body = lines
    header = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>"
        for line in body
    )
    return f"<table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table>"
