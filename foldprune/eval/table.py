"""Tables of runs: method and rate by data set, with the spread over seeds; files and plots."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..container import write_atomically
from ..report import text_table
from .metrics import Interval, interval

__all__ = ["Metric", "Run", "Table"]

DASHES = {"original": ":"}  # of lines for what is not compressed


@dataclass(frozen=True)
class Metric:
    """``name``: the key of a run's result. ``percent``: a share in [0, 1]. ``geometric``: of
    several sets the geometric mean is taken, as of perplexities."""

    name: str
    percent: bool = False
    geometric: bool = False

    @property
    def title(self) -> str:
        return self.name.replace("_", " ") + (" (%)" if self.percent else "")

    def mean(self, values: Sequence[float]) -> float:
        if self.geometric:
            return math.exp(sum(map(math.log, values)) / len(values))
        return sum(values) / len(values)

    def cell(self, value: Interval | None) -> str:
        if value is None:
            return "-"
        scale = 100 if self.percent else 1
        text = f"{scale * value.mean:.2f}" if value.mean < 1000 else f"{value.mean:.3g}"
        return text if value.count == 1 else f"{text} ± {scale * value.spread:.2f}"


@dataclass(frozen=True)
class Run:
    """One run's configuration, and what came out: metrics and facts by name."""

    model: str
    method: str
    rate: float | str
    set: str
    seed: int
    result: Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """All runs of a table, those that are still to be made left out. The first metric is the one
    that is plotted."""

    name: str
    metrics: tuple[Metric, ...]
    runs: tuple[Run, ...]
    planned: int
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "table": self.name,
            "planned": self.planned,
            "facts": dict(self.facts),
            "runs": [asdict(run) for run in self.runs],
            "tables": {
                model: {metric.name: self._records(model, metric) for metric in self.metrics}
                for model in self._models()
            },
        }

    def _records(self, model: str, metric: Metric) -> list[dict[str, Any]]:
        records = []
        for (method, rate), cells in self.rows(model, metric).items():
            shown = {name: cell and asdict(cell) for name, cell in cells.items()}
            records.append({"method": method, "rate": rate, "cells": shown})
        return records

    def _models(self) -> list[str]:
        return list(dict.fromkeys(run.model for run in self.runs))

    def rows(
        self, model: str, metric: Metric
    ) -> dict[tuple[str, float | str], dict[str, Interval | None]]:
        """By method and rate, by set and for their "mean": over seeds. The mean is there once
        every set is, of the seeds that all of them have."""
        runs = [run for run in self.runs if run.model == model]
        sets = list(dict.fromkeys(run.set for run in runs))
        out = {}
        for key in dict.fromkeys((run.method, run.rate) for run in runs):
            values: dict[str, dict[int, float]] = {name: {} for name in sets}
            for run in runs:
                if (run.method, run.rate) == key:
                    values[run.set][run.seed] = float(run.result[metric.name])
            cells = {name: _interval(by_seed.values()) for name, by_seed in values.items()}
            seeds = set.intersection(*(set(by_seed) for by_seed in values.values()))
            means = [metric.mean([values[name][seed] for name in sets]) for seed in sorted(seeds)]
            out[key] = {**cells, "mean": _interval(means)}
        return out

    # ---- text -----------------------------------------------------------------------------------

    def _lines(self, model: str, metric: Metric) -> list[tuple[str, ...]]:
        rows = self.rows(model, metric)
        columns = list(next(iter(rows.values())))
        lines = [("method", "rate", "removed", *columns)]
        for (method, rate), cells in rows.items():
            removed = self._removed(model, method, rate)
            shown = (metric.cell(cells[name]) for name in columns)
            lines.append((method, str(rate), f"{100 * removed:.1f} %", *shown))
        return lines

    def _removed(self, model: str, method: str, rate: float | str) -> float:
        shares = [
            float(run.result["removed"])
            for run in self.runs
            if (run.model, run.method, run.rate) == (model, method, rate)
        ]
        return sum(shares) / len(shares)

    def _sections(self) -> Iterable[tuple[str, list[tuple[str, ...]]]]:
        for model in self._models():
            for metric in self.metrics:
                yield f"{self.name}, {model}: {metric.title}", self._lines(model, metric)

    def __str__(self) -> str:
        parts = [f"{title}\n{text_table(lines)}" for title, lines in self._sections()]
        if len(self.runs) < self.planned:
            parts.append(f"{len(self.runs)} of {self.planned} runs are done")
        return "\n\n".join(parts)

    def markdown(self) -> str:
        parts = [f"{title}\n\n{_markdown(lines)}" for title, lines in self._sections()]
        return "\n\n".join(parts) + "\n"

    # ---- files ----------------------------------------------------------------------------------

    def save(self, folder: str) -> list[str]:
        """Writes NAME.md, NAME.csv (a line for each run), NAME.json and, for every model,
        NAME-MODEL.png; their paths."""
        os.makedirs(folder, exist_ok=True)
        base = os.path.join(folder, self.name)
        _write(f"{base}.md", self.markdown())
        _write(f"{base}.json", json.dumps(self.to_dict(), indent=1) + "\n")
        write_atomically(f"{base}.csv", self._write_csv)
        paths = [f"{base}.md", f"{base}.json", f"{base}.csv"]
        for model in self._models():
            path = f"{base}-{os.path.basename(os.path.normpath(model))}.png"
            self.plot(model, path)
            paths.append(path)
        return paths

    def _write_csv(self, path: str) -> None:
        names = list(dict.fromkeys(name for run in self.runs for name in run.result))
        keys = ("model", "method", "rate", "set", "seed")
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*keys, *names])
            for run in self.runs:
                own = [getattr(run, key) for key in keys]
                writer.writerow([*own, *(run.result.get(name, "") for name in names)])

    def plot(self, model: str, path: str) -> None:
        """The first metric against the share removed, a panel for each set and for the mean, a
        line for each method; what is not compressed is a dashed line."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        metric = self.metrics[0]
        rows = self.rows(model, metric)
        panels = list(next(iter(rows.values())))
        across = min(3, len(panels))
        down = math.ceil(len(panels) / across)
        figure = Figure(figsize=(4.2 * across, 3.2 * down), layout="constrained")
        FigureCanvasAgg(figure)
        axes = np.array(figure.subplots(down, across, squeeze=False)).ravel()
        for panel, axis in zip(panels, axes, strict=False):
            lines: dict[str, list[tuple[float, Interval]]] = {}
            for (method, rate), cells in rows.items():
                if (cell := cells[panel]) is not None:
                    removed = self._removed(model, method, rate)
                    lines.setdefault(method, []).append((removed, cell))
            for method, points in lines.items():
                points.sort(key=lambda point: point[0])
                x = [100 * removed for removed, _ in points]
                y = [cell.mean for _, cell in points]
                if x == [0.0]:
                    axis.axhline(
                        y[0], linestyle=DASHES.get(method, "--"), color="0.4", label=method
                    )
                else:
                    spread = [cell.spread for _, cell in points]
                    axis.errorbar(x, y, spread, marker="o", capsize=2, label=method)
            axis.set(title=panel, xlabel="numbers removed (%)", ylabel=metric.name)
            if metric.geometric:
                axis.set_yscale("log")
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        axes[0].legend(fontsize="small")
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def _interval(values: Iterable[float]) -> Interval | None:
    listed = list(values)
    return interval(listed) if listed else None


def _markdown(lines: Sequence[tuple[str, ...]]) -> str:
    head, *body = lines
    out = [head, tuple("---" for _ in head), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in out)


def _write(path: str, text: str) -> None:
    def write(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)

    write_atomically(path, write)
