"""Checkpoints larger than memory: compressed and decompressed unit by unit, by one process or many.

The shards of a compressed folder are its units (units.py), each renamed into place when it is on
disk, and the index is written last. Until then a manifest beside them says what the run was asked
for and what it has settled, so that a run that was killed goes on where it was.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, as_completed
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import units
from .api import DEFAULT_RATE, check_arguments, note_unused_rate
from .compressed import Compressed
from .container import (
    VERSION,
    check_distinct,
    make_metadata,
    open_header,
    part_name,
    read_tensor,
    remove_leftovers,
    shard_name,
    tensor_spec,
    write_atomically,
    write_index,
    write_json,
)
from .encodings import Array
from .errors import FoldRefusedWarning, FormatError
from .files import locate, read_json
from .job import Job, head_facts, settle_layout
from .options import Progress, reporter, resolve_threads, silent
from .prune import Cut
from .recipe import Recipe
from .report import Report, Row
from .spread import choose, fill, settled_recipe
from .tensor_files import SafetensorsFile, write_safetensors
from .tensors import Checkpoint
from .units import BY_RATE, Plan, Unit
from .version import version

__all__ = ["compress_checkpoint", "decompress_checkpoint"]

MANIFEST = "foldprune.manifest.json"
# what a model folder holds beside its weights: configuration, tokenizer, code, model card
_SIDE_FILES = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".py", ".md")
_DENSE_INDEX = "model.safetensors.index.json"


def compress_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    rate: float = DEFAULT_RATE,
    *,
    recipe: Recipe | None = None,
    config: Any = None,
    num_heads: int | None = None,
    executor: Executor | None = None,
    progress: Progress | bool | None = None,
    threads: int | None = None,
) -> Report:
    """Compresses a checkpoint of any size into a folder that ``load`` opens, without data.

    In memory is one unit at a time: an attention block's projections, a feed-forward layer, or one
    other tensor. Every unit is a shard. A run that was killed goes on where it was when it is
    called again with the same arguments. Configuration and tokenizer files are copied.

    Parameters
    ----------
    src
        A model folder, a sharded index, or a file, as ``compress`` takes. Torch shards are mapped
        to memory; only those of torch before 1.6 are read whole.
    dst
        The folder to write, which is made; by one run at a time. A compressed checkpoint that is
        there is replaced by the new index, at the end, in one step.
    rate, recipe, config, num_heads
        As for ``compress``. Where all tensors compete, for a rate or with ``fpp_scope="global"``,
        the threshold comes from a histogram of their scores: as many numbers are removed as with
        ``compress``, but of scores within 1 part in 128 of the threshold others may be. This takes
        further passes over the source (up to two).
    executor
        Any ``concurrent.futures.Executor`` to run the units: a process pool,
        ``dask.distributed.Client.get_executor()``, ``mpi4py.futures.MPIPoolExecutor``. Its workers
        must see ``src`` and ``dst`` under these paths. The files are the same, byte for byte.
    progress
        True for a bar on standard error, or a function called with (done, total, name) after each
        unit.
    threads
        Of every unit's work; by default as many as processors, with an executor 1.

    Returns
    -------
    Report
        That of ``load(dst)``.

    Raises
    ------
    As ``compress``; FormatError if ``dst`` holds the beginning of a run with other arguments;
    OSError if a file cannot be read or written.
    """
    given = recipe
    recipe, rate = check_arguments(rate, recipe)
    source = locate(os.fspath(src))
    dst = os.path.abspath(os.fspath(dst))
    _check_apart(source.folder, dst)
    checkpoint = Checkpoint(
        source.specs, source.tied, "torch" if source.any_torch else None, source.names,
        source.config, source.path, source.notes,
    )  # fmt: skip
    layout = settle_layout(checkpoint, recipe, config, num_heads)
    model = Job(checkpoint, layout, silent, 1)
    model.check_dtypes()
    if given is not None:
        note_unused_rate(model, rate, given)
    model.notes = [*checkpoint.notes, *layout.notes, *model.notes]
    sizes = {name: spec.nbytes for name, spec in source.specs.items()}
    parts = units.partition(layout, source.files, sizes)

    asked = {
        "foldprune": version(),
        "rate": rate if recipe is None else None,
        "recipe": None if recipe is None else recipe.to_dict(),
        "heads": head_facts(layout),
        "layout": zlib.crc32(repr((layout.attentions, layout.feed_forwards)).encode()),
        "source": {os.path.basename(path): _stamp(path) for path in source.opened},
    }
    run = _Run.open(dst, asked)
    with reporter(progress) as report:
        pool = _Pool(executor, threads, report, [unit.names[0] for unit in parts])
        if run.plans is None:
            if recipe is None:
                plans, settled = _plan_rate(rate, parts, pool)
            else:
                plans, settled = _plan_recipe(recipe, parts, pool)
            run.keep(plans, settled)
        assert run.plans is not None and run.recipe is not None
        records = run.finished(len(parts))
        missing = [i for i, record in enumerate(records) if record is None]
        tasks = [(parts[i], run.plans[i], run.shard(i, len(parts))) for i in missing]
        for i, record in zip(missing, pool.run(units.compress_unit, missing, tasks), strict=True):
            records[i] = record
    _copy_side_files(source.folder, dst)
    return run.finish(model, [record for record in records if record is not None])


# ---- what all units compete for -----------------------------------------------------------------


def _plan_recipe(recipe: Recipe, parts: list[Unit], pool: _Pool) -> tuple[list[Plan], Recipe]:
    sums: dict[units.Key, Array] = {}
    if recipe.shares_thresholds:
        tasks = [(unit, recipe) for unit in parts]
        for counts in pool.run(units.count_scores, range(len(parts)), tasks):
            for key, own in counts.items():
                sums[key] = sums[key] + own if key in sums else own
    cuts = {key: Cut.removing(round(key[0] * int(h.sum())), h) for key, h in sums.items()}
    return [Plan(recipe, cuts)] * len(parts), recipe


def _plan_rate(rate: float, parts: list[Unit], pool: _Pool) -> tuple[list[Plan], Recipe]:
    """As ``Job.run_rate``."""
    surveys = pool.run(units.survey, range(len(parts)), [(unit,) for unit in parts])
    numbers = sum(survey.numbers for survey in surveys)
    weights = sum(survey.weights for survey in surveys)
    counts = [survey.counts for survey in surveys]
    options = [
        option
        for method in ("IRC", "DWC")
        for survey in surveys
        for fold, option in zip(survey.folds, survey.options, strict=True)
        if fold == method
    ]
    choice = choose(rate, numbers, options, weights, functools.reduce(np.add, counts))

    plans = [
        Plan(None, ranks=[None if o.ranks is None else o.ranks.tolist() for o in survey.options])
        for survey in surveys
    ]
    changed = [i for i, survey in enumerate(surveys) if survey.provisional or any(plans[i].ranks)]
    tasks = [(parts[i], plans[i]) for i in changed]
    removed = 0
    for i, folded in zip(changed, pool.run(units.survey_folded, changed, tasks), strict=True):
        removed += folded.removed
        counts[i] = folded.counts
    count = fill(rate, numbers, choice, removed, weights)
    cuts = {BY_RATE: Cut.removing(count, functools.reduce(np.add, counts))} if count else {}
    plans = [Plan(None, cuts, plan.ranks) for plan in plans]
    return plans, settled_recipe(options, count, weights)


class _Pool:
    """Runs tasks, one for each of some units, here or by an executor; tells how far it is."""

    def __init__(
        self,
        executor: Executor | None,
        threads: int | None,
        progress: Progress,
        names: Sequence[str],
    ) -> None:
        self.executor = executor
        self.threads = resolve_threads(1 if threads is None and executor is not None else threads)
        self.progress = progress
        self.names = names
        self.done = self.total = 0

    def run(
        self, function: Callable[..., Any], which: Iterable[int], tasks: Sequence[tuple[Any, ...]]
    ) -> list[Any]:
        """The results of function(*task, threads), in the order of the tasks."""
        names = [self.names[i] for i in which]
        self.total += len(tasks)
        if self.executor is None:
            results = []
            for name, task in zip(names, tasks, strict=True):
                results.append(function(*task, self.threads))
                self._step(name)
            return results
        futures: dict[Future[Any], str] = {}
        try:
            for name, task in zip(names, tasks, strict=True):
                futures[self.executor.submit(function, *task, self.threads)] = name
            for future in as_completed(futures):
                future.result()  # the first error ends the run
                self._step(futures[future])
        finally:
            for future in futures:
                future.cancel()
        return [future.result() for future in futures]

    def _step(self, name: str) -> None:
        self.done += 1
        self.progress(self.done, self.total, name)


# ---- a run and its manifest ---------------------------------------------------------------------


@dataclass
class _Run:
    """An unfinished run in the folder ``dst``. ``asked``: whatever its result depends on;
    ``token``: its checksum, which is in the names of the shards."""

    dst: str
    asked: dict[str, Any]
    token: str
    plans: list[Plan] | None = None
    recipe: Recipe | None = None

    @classmethod
    def open(cls, dst: str, asked: dict[str, Any]) -> _Run:
        """A new run, or the one that was begun with the same arguments."""
        os.makedirs(dst, exist_ok=True)
        asked = json.loads(json.dumps({"format": VERSION, **asked}))
        text = json.dumps(asked, sort_keys=True)
        run = cls(dst, asked, hashlib.sha256(text.encode()).hexdigest()[:16])
        remove_leftovers(dst)
        if not os.path.exists(run.manifest):
            run._write()
            return run
        try:
            found = read_json(run.manifest)
            before = dict(found["asked"])
            if before == asked and found["plans"] is not None:
                run.plans = [_plan_from(plan) for plan in found["plans"]]
                run.recipe = Recipe.from_dict(found["recipe"])
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{run.manifest}: damaged ({error!r}); remove it") from None
        if before != asked:
            other = next(k for k in (*asked, *before) if before.get(k) != asked.get(k))
            raise FormatError(
                f"{dst} holds the beginning of a run with another {other!r} ({before.get(other)}; "
                f"now {asked.get(other)}): repeat its arguments to resume it, or remove {MANIFEST}"
            )
        return run

    @property
    def manifest(self) -> str:
        return os.path.join(self.dst, MANIFEST)

    def keep(self, plans: list[Plan], recipe: Recipe) -> None:
        """Writes down what has been settled."""
        self.plans, self.recipe = plans, recipe
        self._write()

    def _write(self) -> None:
        values: dict[str, Any] = {"asked": self.asked, "plans": None, "recipe": None}
        if self.plans is not None and self.recipe is not None:
            values["plans"] = [_plan_to(plan) for plan in self.plans]
            values["recipe"] = self.recipe.to_dict()
        write_json(self.manifest, values)

    def shard(self, number: int, count: int) -> str:
        return os.path.join(self.dst, shard_name(self.token, number, count))

    def finished(self, count: int) -> list[dict[str, Any] | None]:
        """The records of the units whose shards are there."""
        return [units.finished(self.shard(i, count)) for i in range(count)]

    def finish(self, model: Job, records: list[dict[str, Any]]) -> Report:
        """Makes of the shards a compressed checkpoint."""
        assert self.recipe is not None
        weight_map: dict[str, str] = {}
        crc32: dict[str, int] = {}
        described: dict[str, dict[str, Any]] = {}
        rows: dict[str, Row] = {}
        notes, refused = list(model.notes), []
        for i, record in enumerate(records):
            check_distinct(weight_map, record["crc32"])
            file = os.path.basename(self.shard(i, len(records)))
            weight_map |= dict.fromkeys(record["crc32"], file)
            crc32 |= record["crc32"]
            described |= {tensor["name"]: tensor for tensor in record["tensors"]}
            own = Report.from_dict(record["report"])
            rows |= {row.name: row for row in own.rows}
            notes += own.notes
            refused += record["refused"]
        for text in dict.fromkeys(refused):
            warnings.warn(text, FoldRefusedWarning, stacklevel=3)
        checkpoint, layout = model.checkpoint, model.layout
        report = Report(
            [rows[n] if n in rows else model.tied_row(n) for n in checkpoint.names],
            layout.schema,
            head_facts(layout),
            list(dict.fromkeys(notes)),
        )
        whole = Compressed(
            checkpoint.names, {}, checkpoint.tied, report, self.recipe, checkpoint.framework
        )
        tensors = [described[name] for name in checkpoint.arrays]
        write_index(self.dst, make_metadata(whole, tensors, crc32), weight_map)
        os.unlink(self.manifest)
        return report


def _plan_to(plan: Plan) -> dict[str, Any]:
    return {
        "recipe": None if plan.recipe is None else plan.recipe.to_dict(),
        "cuts": [[*key, cut.bin, cut.share] for key, cut in plan.cuts.items()],
        "ranks": plan.ranks,
    }


def _plan_from(values: Mapping[str, Any]) -> Plan:
    recipe = values["recipe"]
    return Plan(
        None if recipe is None else Recipe.from_dict(recipe),
        {(rate, text): Cut(at, share) for rate, text, at, share in values["cuts"]},
        values["ranks"],
    )


def _stamp(path: str) -> list[int]:
    """Size and time of change: another file of the same name has others."""
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns]


# ---- folders ------------------------------------------------------------------------------------


def _check_apart(folder: str, dst: str) -> None:
    if os.path.exists(dst) and not os.path.isdir(dst):
        raise NotADirectoryError(f"{dst}: not a folder")
    if os.path.exists(dst) and os.path.samefile(folder, dst):
        raise ValueError(f"{dst}: the result would be written among its source's files")


def _copy_side_files(folder: str, dst: str) -> None:
    """Configuration and tokenizer, whatever they are called."""
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if (
            name.endswith(_SIDE_FILES)
            and not name.endswith(".index.json")
            and name != MANIFEST
            and os.path.isfile(path)
        ):
            write_atomically(
                os.path.join(dst, name),
                lambda temporary, path=path: shutil.copyfile(path, temporary),
            )


# ---- and back -----------------------------------------------------------------------------------


def decompress_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    max_shard_bytes: int = 5_000_000_000,
    executor: Executor | None = None,
    progress: Progress | bool | None = None,
    threads: int | None = None,
) -> None:
    """Writes the dense checkpoint of what ``load`` opens: safetensors shards and an index.

    Transformers' ``from_pretrained`` opens the folder; configuration and tokenizer files are copied
    where ``src`` is a folder. One tensor is in memory at a time. Tied names are all written out, as
    safetensors has no ties.

    Parameters
    ----------
    src
        A compressed folder, its index, or a file.
    dst
        The folder to write, which is made. It must not hold a dense checkpoint already.
    max_shard_bytes
        A shard is larger only if a single tensor is.
    executor, progress, threads
        As for ``compress_checkpoint``; a task is a shard.

    Raises
    ------
    FormatError
        (ValueError) the source is damaged.
    OSError
        A file cannot be read or written, or is there already (FileExistsError).
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}: expected at least 1")
    src, dst = os.fspath(src), os.path.abspath(os.fspath(dst))
    header, files = open_header(src)
    if os.path.exists(index := os.path.join(dst, _DENSE_INDEX)):
        raise FileExistsError(f"{index}: there already; give another folder")
    folder = src if os.path.isdir(src) else os.path.dirname(os.path.abspath(src))
    if os.path.isdir(src):
        _check_apart(folder, dst)
    os.makedirs(dst, exist_ok=True)
    shards, total_size = _dense_shards(header, files, max_shard_bytes)
    with reporter(progress, "decompressing") as report:
        names = [shard[0].name for shard in shards]
        paths = [
            os.path.join(dst, f"model-{i + 1:05}-of-{len(shards):05}.safetensors")
            for i in range(len(shards))
        ]
        tasks = list(zip(shards, paths, strict=True))
        _Pool(executor, threads, report, names).run(_write_dense, range(len(tasks)), tasks)
    if os.path.isdir(src):
        _copy_side_files(folder, dst)
    weight_map = {tensor.name: os.path.basename(path) for shard, path in tasks for tensor in shard}
    metadata = {"total_size": total_size}
    write_json(index, {"metadata": metadata, "weight_map": weight_map})


@dataclass(frozen=True)
class _Tensor:
    """One tensor to write dense: ``described`` and ``crc32`` as in the header, ``files`` of its
    parts."""

    name: str
    described: Mapping[str, Any]
    files: Mapping[str, str]
    crc32: Mapping[str, int]

    @property
    def spec(self) -> Array:
        return tensor_spec(self.described)


def _dense_shards(
    header: Mapping[str, Any], files: Mapping[str, SafetensorsFile], max_shard_bytes: int
) -> tuple[list[list[_Tensor]], int]:
    described = {tensor["name"]: tensor for tensor in header["tensors"]}
    shards: list[list[_Tensor]] = [[]]
    size = total_size = 0
    for name in header["names"]:
        stored = header["tied"].get(name, name)
        parts = [part_name(stored, part) for part in described[stored]["parts"]]
        tensor = _Tensor(
            name,
            described[stored],
            {part: files[part].path for part in parts},
            {part: header["crc32"][part] for part in parts},
        )
        nbytes = tensor.spec.nbytes
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
        total_size += nbytes
    return shards, total_size


def _write_dense(tensors: Sequence[_Tensor], path: str, threads: int) -> None:
    opened = {p: SafetensorsFile(p) for tensor in tensors for p in tensor.files.values()}

    def unpacked() -> Iterable[Array]:
        for tensor in tensors:
            files = {part: opened[p] for part, p in tensor.files.items()}
            yield read_tensor(tensor.described, files, tensor.crc32).unpack(threads)

    specs = {tensor.name: tensor.spec for tensor in tensors}
    write_atomically(
        path, lambda temporary: write_safetensors(temporary, specs, unpacked(), {"format": "pt"})
    )
