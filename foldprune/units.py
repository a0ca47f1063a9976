"""What of a model must be compressed together, and the work on one such unit.

A unit is an attention block's projections, a feed-forward layer, or what belongs to neither. Tasks
are functions of small arguments that can be pickled: they read their tensors from the source, in
whatever process or machine sees its files, and know of the rest of the model only what ``Plan``
says. A finished unit is a shard whose metadata say what the final header needs of it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import uncalibrated
from .container import crc, flatten, write_atomically
from .encodings import Array
from .errors import FormatError
from .job import Job, residual_terms
from .options import silent
from .prune import Cut, histogram
from .recipe import Granularity, Recipe
from .schemas.layout import AttentionBlock, FeedForwardBlock, Layout, Matrix
from .spread import Option
from .tensor_files import SafetensorsFile, open_tensors, write_safetensors
from .tensors import Checkpoint

__all__ = [
    "Folded",
    "Plan",
    "Survey",
    "Unit",
    "compress_unit",
    "count_scores",
    "finished",
    "partition",
    "survey",
    "survey_folded",
]

_RECORD = "foldprune_unit"
_SMALL = 64 << 20  # bytes up to which tensors of no block share a unit
Block = AttentionBlock | FeedForwardBlock
Key = tuple[float, str]  # rate and granularity of what competes


@dataclass(frozen=True)
class Unit:
    """``names`` are stored with it, in the checkpoint's order; ``files`` holds all that it reads,
    which may be a norm of another unit too. ``layout`` knows only these. ``terms``: see
    ``job.residual_terms``."""

    names: tuple[str, ...]
    files: Mapping[str, str]
    layout: Layout
    terms: int


@dataclass(frozen=True)
class Plan:
    """What is done to a unit, with what had to be settled over all of them.

    ``recipe``: None if a rate was spread. ``cuts``: thresholds by rate and granularity, one under
    ``BY_RATE`` for a spread rate; ``ranks``: for a spread rate those of every fold, in the order of
    ``uncalibrated.foldable``.
    """

    recipe: Recipe | None
    cuts: Mapping[Key, Cut] = field(default_factory=dict)
    ranks: Sequence[Sequence[int] | None] = ()


BY_RATE: Key = (0.0, "weight")


# ---- what belongs together ----------------------------------------------------------------------


def partition(layout: Layout, files: Mapping[str, str], sizes: Mapping[str, int]) -> list[Unit]:
    """All units, in the order of their first tensors. ``sizes``: bytes of every tensor in
    ``files``, in the checkpoint's order."""
    order = {name: i for i, name in enumerate(files)}
    blocks: list[Block] = [*layout.attentions, *layout.feed_forwards]
    together = [set(_names(block)) for block in blocks]
    for at, names in enumerate(together):  # blocks that share a tensor are one unit
        for later in together[at + 1 :]:
            if names & later:
                later |= names
                names.clear()
                break
    groups = [sorted(names, key=order.__getitem__) for names in together if names]
    inside = {name for names in groups for name in names}
    size = 0
    for name in files:
        if name in inside:
            continue
        if not size or size + sizes[name] > _SMALL:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += sizes[name]
    groups.sort(key=lambda names: order[names[0]])
    return [_unit(layout, names, files) for names in groups]


def _names(block: Block) -> Iterator[str]:
    for one in dataclasses.fields(block):
        matrix = getattr(block, one.name)
        if isinstance(matrix, Matrix):
            yield matrix.weight
            if matrix.bias is not None:
                yield matrix.bias


def _unit(layout: Layout, names: Sequence[str], files: Mapping[str, str]) -> Unit:
    own = set(names)
    attentions = [block for block in layout.attentions if own.issuperset(_names(block))]
    norms = {block.norm for block in attentions if block.norm is not None}
    reads = {name: file for name, file in files.items() if name in own or _is_of(name, norms)}
    restricted = dataclasses.replace(
        layout,
        attentions=attentions,
        feed_forwards=[block for block in layout.feed_forwards if own.issuperset(_names(block))],
        groups={name: layout.groups[name] for name in reads},
        transposed=layout.transposed & own,
        output_embeddings=layout.output_embeddings & own,
        notes=[],
    )
    return Unit(tuple(names), reads, restricted, residual_terms(layout))


def _is_of(name: str, modules: set[str]) -> bool:
    return name.rpartition(".")[0] in modules


# ---- the tasks ----------------------------------------------------------------------------------


def _begin(unit: Unit, threads: int, plan: Plan | None = None) -> Job:
    opened = {path: open_tensors(path) for path in dict.fromkeys(unit.files.values())}
    arrays = {name: opened[path].read(name) for name, path in unit.files.items()}
    checkpoint = Checkpoint(arrays, {}, None, list(unit.names))
    job = Job(checkpoint, unit.layout, silent, threads, terms=unit.terms)
    job.check_tensors()
    if plan is not None:
        job.cuts = plan.cuts
    return job


def count_scores(unit: Unit, recipe: Recipe, threads: int) -> dict[Key, Array]:
    """Histograms of the scores of whatever competes with other units' by this recipe."""
    job = _begin(unit, threads)
    uncalibrated.fold_by_recipe(job, recipe)
    counts = {}
    for (rate, text), targets in uncalibrated.competitors(job, recipe).items():
        granularity = Granularity.parse(text)
        if granularity.kind in ("weight", "block"):
            counts[rate, text] = histogram(targets, granularity, threads)
    return counts


@dataclass
class Survey:
    """What a rate has to be spread over: the ``numbers`` of a unit, those that single weights may
    be removed from (``weights``) by their scores (``counts``), and ``options`` in the order of
    ``folds``. ``provisional``: the scores are those under a fold that may not be made."""

    numbers: int
    weights: int
    counts: Array
    folds: list[str]
    options: list[Option]
    provisional: bool


def survey(unit: Unit, threads: int) -> Survey:
    job = _begin(unit, threads)
    foldable = uncalibrated.foldable(job)
    options, outputs = uncalibrated.fold_options(job, foldable)
    targets = uncalibrated.weighed_targets(job, outputs)
    return Survey(
        job.numbers,
        sum(target.matrix.size for target in targets),
        histogram(targets, Granularity("weight"), threads),
        [method for _, method in foldable],
        options,
        bool(outputs),
    )


@dataclass
class Folded:
    """``removed``: numbers that the folds take off a unit; ``counts``: scores as they leave it."""

    removed: int
    counts: Array


def survey_folded(unit: Unit, plan: Plan, threads: int) -> Folded:
    job = _begin(unit, threads, plan)
    _fold_to(job, plan)
    removed = job.folded_numbers
    return Folded(
        removed, histogram(uncalibrated.weighed_targets(job), Granularity("weight"), threads)
    )


def _fold_to(job: Job, plan: Plan) -> None:
    ranks = [None if r is None else np.array(r) for r in plan.ranks]
    uncalibrated.fold_to(job, uncalibrated.foldable(job), ranks)


def compress_unit(unit: Unit, plan: Plan, path: str, threads: int) -> dict[str, Any]:
    """Compresses a unit into a shard of its own; returns its record. Raises as ``compress``."""
    job = _begin(unit, threads, plan)
    if plan.recipe is not None:
        uncalibrated.fold_by_recipe(job, plan.recipe)
        uncalibrated.prune_recipe(job, plan.recipe)
    else:
        _fold_to(job, plan)
        if BY_RATE in plan.cuts:
            uncalibrated.prune_to_cut(job, plan.cuts[BY_RATE])
    compressed = job.finish(plan.recipe or Recipe())
    parts, described = flatten(compressed.encodings)
    record = {
        "tensors": described,
        "crc32": {name: crc(array) for name, array in parts.items()},
        "report": compressed.report.to_dict(),
        "refused": job.refused,
    }
    metadata = {_RECORD: json.dumps(record, separators=(",", ":"))}
    write_atomically(
        path, lambda temporary: write_safetensors(temporary, parts, parts.values(), metadata)
    )
    return record


def finished(path: str) -> dict[str, Any] | None:
    """The record of a shard that ``compress_unit`` finished; None if there is none."""
    if not os.path.exists(path):
        return None
    text = SafetensorsFile(path).metadata.get(_RECORD)
    if text is None:
        raise FormatError(f"{path}: in the place of a shard, but not written by foldprune")
    record: dict[str, Any] = json.loads(text)
    return record
