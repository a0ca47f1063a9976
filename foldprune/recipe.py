"""What to do to which tensors."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["Granularity", "Recipe", "pattern_of"]

GROUPS = ("embedding", "feed_forward", "attention_output", "qkv")
SCOPES = ("global", "tensor", "row")


@dataclasses.dataclass(frozen=True)
class Granularity:
    """A parsed ``fpp_granularity``: what leaves together.

    ``kind`` is "weight", "nm", "block", "neuron" or "row"; ``a`` and ``b`` are n and m, or the
    rows and columns of a block.
    """

    kind: str
    a: int = 1
    b: int = 1

    @property
    def label(self) -> str:
        """The text it was parsed from."""
        if self.kind == "nm":
            return f"{self.a}:{self.b}"
        return f"{self.a}x{self.b}" if self.kind == "block" else self.kind

    def block(self, cols: int) -> tuple[int, int]:
        """Rows and columns of what leaves together, of a matrix with ``cols`` columns."""
        return (1, cols) if self.kind == "row" else (self.a, self.b)

    @classmethod
    def parse(cls, text: str) -> Granularity:
        if text in ("weight", "neuron", "row"):
            return cls(text)
        if match := re.fullmatch(r"(\d+):(\d+)", text):
            n, m = int(match[1]), int(match[2])
            if not 1 <= n <= m <= 64:
                raise ValueError(
                    f"fpp_granularity {text!r}: n:m keeps n of every m weights, 1 <= n <= m <= 64"
                )
            return cls("nm", n, m)
        if match := re.fullmatch(r"(\d+)x(\d+)", text):
            rows, cols = int(match[1]), int(match[2])
            if rows < 1 or cols < 1:
                raise ValueError(
                    f"fpp_granularity {text!r}: a block has at least one row and column"
                )
            return cls("block", rows, cols)
        raise ValueError(
            f"fpp_granularity {text!r}: expected 'weight', 'neuron', 'row', 'n:m' such as '2:4', "
            "or 'rxc' such as '4x1'"
        )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Which methods are used, how far, and where. A field of None leaves its method out.

    Parameters
    ----------
    fpp
        Forward propagation pruning: the share of the weights of ``fpp_on`` that is removed, in
        [0, 1).
    fpp_on
        Groups pruned: any of "embedding" (word, position and type embeddings, output embedding),
        "feed_forward", "attention_output" and "qkv".
    fpp_granularity
        What leaves together: "weight" (each on its own); "n:m" (n of every m consecutive inputs
        stay; ``fpp`` must then be 1 - n/m); "rxc" (blocks of r rows by c columns of the (out x in)
        matrix); "row" (whole output rows; embeddings: whole tokens); "neuron" (a hidden unit
        leaves the rows of up and gate and the column of down together; embeddings lose whole rows
        and attention outputs single weights, as they have no hidden units).
    fpp_scope
        What competes for one threshold: "global" (all pruned tensors), "tensor", or "row" (each
        output row; "weight" granularity only). With a calibration "global" spreads single weights
        over the tensors by damage; other granularities take the same share of each.
    irc
        Identical row compression of query and key: the rank kept per head (for models with rotary
        position embedding: the number of 2-planes), or "lossless". With a calibration the heads'
        mean rank, spread over the heads of a block by what each rank explains; a head with little
        to tell may be left with none, and attends to all tokens alike.
    irc_fpp
        Pruning of what ``irc`` keeps: the share of the numbers of its rows that is removed, in [0,
        1). Four rows of which a quarter is kept say more than one row, in as many numbers.
    dwc
        Diagonal weight compression of value: "slice" (head i reads its own slice of the input; no
        grouped-query attention), "pivot" (the coordinates that matter most), a number (pivots, plus
        the remainder cut to that rank), or "lossless".
    overrides
        Patterns of tensor names to fields that differ there, e.g.
        ``{"*layer.0.*": {"fpp": None, "irc": 16}}``. Shell-style patterns, or a regular expression
        after "re:"; later ones win. Attention methods look at the query's and value's names.

    Source: the methods are named by Belhaouari & Kraidia, Sci. Rep. 15:10171 (2025); their
    mathematics here is foldprune's own reading of them.
    """

    fpp: float | None = None
    fpp_on: tuple[str, ...] = ("embedding", "feed_forward", "attention_output")
    fpp_granularity: str = "weight"
    fpp_scope: str = "global"
    irc: int | str | None = None
    irc_fpp: float | None = None
    dwc: int | str | None = None
    overrides: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.fpp_on, str):
            object.__setattr__(self, "fpp_on", (self.fpp_on,))
        if not isinstance(self.fpp_on, Iterable):
            raise TypeError(f"fpp_on={self.fpp_on!r}: expected a tuple of {list(GROUPS)}")
        object.__setattr__(self, "fpp_on", tuple(self.fpp_on))
        _check_rate("fpp", self.fpp)
        _check_rate("irc_fpp", self.irc_fpp)
        if unknown := [group for group in self.fpp_on if group not in GROUPS]:
            raise ValueError(f"fpp_on: unknown group(s) {unknown}; known are {list(GROUPS)}")
        if self.fpp_scope not in SCOPES:
            raise ValueError(f"fpp_scope {self.fpp_scope!r}: expected one of {list(SCOPES)}")
        if not isinstance(self.fpp_granularity, str):
            raise TypeError(f"fpp_granularity={self.fpp_granularity!r}: expected a string")
        granularity = Granularity.parse(self.fpp_granularity)
        if self.fpp_scope == "row" and granularity.kind not in ("weight", "nm"):
            raise ValueError("fpp_scope 'row' goes with fpp_granularity 'weight' or 'n:m'")
        if granularity.kind == "nm" and self.fpp is not None:
            implied = 1 - granularity.a / granularity.b
            if abs(self.fpp - implied) > 1e-9:
                raise ValueError(
                    f"fpp={self.fpp} contradicts fpp_granularity {self.fpp_granularity!r}, which "
                    f"removes {implied:g}; pass fpp={implied:g}"
                )
        _check_rank("irc", self.irc, least=1, words=("lossless",))
        if self.irc_fpp and self.irc == "lossless":
            raise ValueError(
                f"irc_fpp={self.irc_fpp} prunes what irc='lossless' keeps whole; give irc a rank, "
                "or leave irc_fpp out"
            )
        _check_rank("dwc", self.dwc, least=0, words=("slice", "pivot", "lossless"))
        fields = {field.name for field in dataclasses.fields(self)} - {"overrides", "fpp_scope"}
        if not isinstance(self.overrides, Mapping):
            raise TypeError("overrides: expected a mapping of name patterns to fields")
        for pattern, changes in self.overrides.items():
            if not isinstance(pattern, str) or not isinstance(changes, Mapping):
                raise TypeError(f"overrides[{pattern!r}]: expected a mapping of fields to values")
            if wrong := set(changes) - fields:
                raise ValueError(
                    f"overrides[{pattern!r}]: unknown field(s) {sorted(wrong)}; known are "
                    f"{sorted(fields)}"
                )
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise ValueError(f"overrides[{pattern!r}]: {error}") from None
            dataclasses.replace(self, overrides={}, **changes)  # checks the values
        # of its own: later changes to the caller's dicts are not ours
        own = {pattern: dict(changes) for pattern, changes in self.overrides.items()}
        object.__setattr__(self, "overrides", own)

    @classmethod
    def lossless(cls) -> Recipe:
        """Exact to rounding: only numbers that the model cannot see are removed."""
        return cls(irc="lossless", dwc="lossless")

    @classmethod
    def paper(cls) -> Recipe:
        """The paper's extreme: FPP 0.7 per layer, rank 1 (one plane), diagonal value."""
        return cls(fpp=0.7, fpp_scope="tensor", irc=1, dwc="slice")

    def at(self, name: str) -> Recipe:
        """The recipe that holds for the tensor ``name``: overrides applied."""
        changes: dict[str, Any] = {}
        for pattern, fields in self.overrides.items():
            if _matches(pattern, name):
                changes.update(fields)
        return dataclasses.replace(self, overrides={}, **changes)

    def check_overrides(self, names: Iterable[str]) -> None:
        """ValueError if an override's pattern fits none of the names."""
        names = list(names)
        for pattern in self.overrides:
            if not any(_matches(pattern, name) for name in names):
                raise ValueError(f"overrides[{pattern!r}] matches no tensor of this model")

    @property
    def folds(self) -> bool:
        """Whether any tensor may be folded, which needs a known architecture."""
        fields = [{"irc": self.irc, "dwc": self.dwc}, *self.overrides.values()]
        return any(f.get("irc") is not None or f.get("dwc") is not None for f in fields)

    @property
    def shares_thresholds(self) -> bool:
        """Whether pruned tensors may compete with those of other layers."""
        fields = [{"fpp": self.fpp}, *self.overrides.values()]
        return self.fpp_scope == "global" and any(f.get("fpp") is not None for f in fields)

    def to_dict(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["fpp_on"] = list(self.fpp_on)
        values["overrides"] = {pattern: dict(fields) for pattern, fields in self.overrides.items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Raises ValueError for fields that a recipe does not have."""
        if not isinstance(values, Mapping):
            raise TypeError("a recipe is a mapping of fields to values")
        known = {field.name for field in dataclasses.fields(cls)}
        if wrong := set(values) - known:
            raise ValueError(f"unknown recipe field(s) {sorted(wrong)}; known are {sorted(known)}")
        return cls(**values)

    def to_json(self, *, indent: int | None = None) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        return cls.from_dict(json.loads(text))


def pattern_of(name: str) -> str:
    """The override pattern that fits this tensor alone."""
    return f"re:^{re.escape(name)}$"


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def _check_rate(field: str, rate: float | None) -> None:
    if rate is None:
        return
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        raise TypeError(f"{field}={rate!r}: expected a number in [0, 1) or None")
    if not 0 <= rate < 1:
        raise ValueError(f"{field}={rate!r}: the share of weights removed lies in [0, 1)")


def _check_rank(field: str, value: int | str | None, least: int, words: tuple[str, ...]) -> None:
    if value is None or value in words:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f"{field}={value!r}: expected a rank, one of {list(words)}, or None")
    if value < least:
        raise ValueError(f"{field}={value}: the least rank is {least}")
