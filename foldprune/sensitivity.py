"""What each part of a model costs to make smaller: the curves that one rate is spread by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from . import calibrated
from .allocate import Unit
from .api import check_calibration
from .calibration import Calibration
from .job import Job
from .measured import Measured
from .options import Progress, reporter, resolve_threads
from .report import html_table, text_table

__all__ = ["Point", "Sensitivity", "sensitivity"]

_SHOWN = (0.1, 0.3, 0.5, 0.7, 0.9)  # shares removed that the printed table shows
_SHARES = np.linspace(0.05, 1.0, 20)  # shares of weights that FPP's curves are given at


@dataclass(frozen=True)
class Point:
    """One way to make one part smaller. ``setting``: the share of weights removed (FPP), the rank
    (planes under rotary embedding) kept (IRC), the remainder's rank kept (DWC). ``numbers``: how
    many the part has; for a head, IRC counts query and key with their biases, DWC the value with
    its own. ``removed``: those that need no storing then. ``damage``: what the model's output
    loses, see ``Sensitivity.unit``."""

    name: str
    method: str
    setting: float
    numbers: int
    removed: int
    damage: float


@dataclass
class Sensitivity:
    """Damage curves per layer and method.

    Attributes
    ----------
    points : list of Point
        Of a tensor for FPP, of a block's key head ("model.layers.0:2") for IRC and DWC.
    unit : str
        What damage means: expected loss per token (to second order), or relative squared error of
        the part's own output where the calibration has no gradients.
    notes : list of str

    ``str()`` prints a line per part and method; ``to_dict()`` is plain JSON.
    """

    points: list[Point]
    unit: str
    notes: list[str] = field(default_factory=list)

    def curve(self, name: str, method: str) -> list[Point]:
        """One part's points by one method, removing ever more. KeyError if there are none."""
        points = [p for p in self.points if p.name == name and p.method == method]
        if not points:
            raise KeyError((name, method))
        return points

    def to_dict(self) -> dict[str, Any]:
        points = [asdict(point) for point in self.points]
        return {"unit": self.unit, "notes": self.notes, "points": points}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sensitivity:
        """The inverse of ``to_dict``."""
        points = [Point(**point) for point in values["points"]]
        return cls(points, values["unit"], list(values["notes"]))

    def _lines(self) -> list[tuple[str, ...]]:
        header = ("part", "method", "numbers", *(f"-{share:.0%}" for share in _SHOWN))
        lines: list[tuple[str, ...]] = [header]
        for name, method in dict.fromkeys((p.name, p.method) for p in self.points):
            points = self.curve(name, method)
            shares = [point.removed / point.numbers for point in points]
            damage = [point.damage for point in points]
            cells = [
                f"{np.interp(share, shares, damage):.2e}" if share <= shares[-1] + 1e-9 else ""
                for share in _SHOWN
            ]
            lines.append((name, method, f"{points[0].numbers:,}", *cells))
        return lines

    def __str__(self) -> str:
        title = f"damage ({self.unit}) by the share of a part's numbers removed"
        return "\n".join([title, text_table(self._lines()), *(f"- {n}" for n in self.notes)])

    def _repr_html_(self) -> str:
        return html_table(self._lines())


def sensitivity(
    state_dict: Any,
    calibration: Calibration | None = None,
    *,
    config: Any = None,
    num_heads: int | None = None,
    progress: Progress | bool | None = None,
    threads: int | None = None,
) -> Sensitivity:
    """What removing numbers would cost, by layer and method; nothing is compressed.

    ``calibration``: statistics to judge by; without, the errors are those of inputs that are white
    up to the gain of the norm before them. The other arguments and errors are those of
    ``foldprune.compress``, which spreads a rate by these very curves when it has a calibration.
    """
    check_calibration(calibration)
    with reporter(progress, "measuring") as report:
        job = Job.begin(state_dict, None, config, num_heads, report, resolve_threads(threads))
        measured = Measured(
            job.arrays,
            job.checkpoint.tied,
            job.layout,
            Calibration() if calibration is None else calibration,
            job.threads,
        )
        measured.check(job.checkpoint.names)
        units = [unit for part in calibrated.parts(job, measured) for way in part for unit in way]
        report(len(job.arrays), len(job.arrays), "")
    blocks = {block.name: block for block in job.layout.attentions}
    points = []
    for unit in units:
        if unit.method == "FPP":
            numbers = job.arrays[unit.name].size
        else:
            block = blocks[unit.block]
            matrices = (block.query, block.key) if unit.method == "IRC" else (block.value,)
            numbers = sum(m.rows * (m.cols + (m.bias is not None)) for m in matrices)
            numbers //= block.groups
        points += _points(unit, numbers)
    return Sensitivity(points, measured.unit, [*job.notes, *measured.notes])


def _points(unit: Unit, numbers: int) -> list[Point]:
    if unit.smooth:
        removed = np.interp(_SHARES, unit.settings, unit.removed)
        columns = (_SHARES, removed, np.interp(_SHARES, unit.settings, unit.damage))
    else:
        columns = (unit.settings, unit.removed, unit.damage)
    return [
        Point(unit.name, unit.method, float(setting), numbers, round(float(gone)), float(damage))
        for setting, gone, damage in zip(*columns, strict=True)
    ]
