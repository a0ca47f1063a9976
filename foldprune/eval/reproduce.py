"""The tables that compare methods on real data: a grid of runs, each logged when it is done."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product

import torch

from ..errors import DataError
from ..options import Progress, reporter, resolve_threads
from .protocols import Budget, Classification, Language, Protocol
from .runlog import RunLog
from .students import METHODS, PAPER, Rate
from .table import Run, Table

__all__ = ["TABLES", "reproduce"]

TABLES: dict[str, type[Protocol]] = {kind.name: kind for kind in (Classification, Language)}


def reproduce(
    table: str,
    *,
    out: str | os.PathLike[str],
    quick: bool = False,
    models: Sequence[str] | None = None,
    sets: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    rates: Sequence[Rate] | None = None,
    seeds: Sequence[int] | None = None,
    budget: Budget | None = None,
    progress: Progress | bool | None = True,
    threads: int | None = None,
) -> Table:
    """Makes the runs of a table that are not in its log yet, and saves table and plots.

    Parameters
    ----------
    table
        "classification" or "lm".
    out
        The folder of the log (``TABLE.jsonl``, a line for each run), of compressed encoders
        (``models``), and of what is made of them (see ``Table.save``). With it a table that was
        stopped goes on; runs of other code or data want another folder.
    quick
        Two sets, one seed and a few steps: whether everything works, not what it is worth.
    models
        "minilm" or "smollm2", or folders of Hugging Face models with their tokenizers.
    sets
        As ``foldprune.eval.datasets.load`` takes them.
    methods, rates, seeds
        Which of METHODS, "dense" (trained like the others) and, of language models, "original";
        shares of the model to remove, or "paper" for ``Recipe.paper()``; numbers. By default all
        methods, 0.2, 0.4, of language models also 0.7, and "paper", and 0 and 1.
    budget
        In place of the table's own, for all rates and the recipe paper.
    progress
        True for a bar on standard error, or a function called with (done, total, name).
    threads
        Of torch; by default as many as processors.

    Raises
    ------
    ValueError
        An unknown table, method, rate or set, a set of the wrong kind.
    ModuleNotFoundError
        A package of data or of a model is not installed; the message has the command.
    """
    if table not in TABLES:
        raise ValueError(f"table {table!r}: expected one of {', '.join(TABLES)}")
    kind = TABLES[table]
    folder = os.fspath(out)
    standard = kind.quick_sets if quick else kind.sets
    sets = tuple(sets or standard)
    # a choice among the standard sets is not to change what models are calibrated on
    corpus = standard if set(sets) <= set(standard) else sets
    budgets = kind.budgets(quick) if budget is None else (budget, budget)
    protocol = kind(*budgets, corpus, folder)
    grid = list(
        _grid(
            tuple(models or (kind.model,)),
            sets,
            _methods(methods, kind),
            _rates(rates) or kind.rates,
            tuple(seeds if seeds is not None else ((0,) if quick else (0, 1))),
        )
    )
    for name in dict.fromkeys((*sets, *corpus)):  # before anything is computed
        if bool(protocol.dataset(name).classes) != kind.labelled:
            has = "has no" if kind.labelled else "has"
            raise DataError(f"{name}: {has} labels, which does not suit the table {table}")
    os.makedirs(folder, exist_ok=True)
    log = RunLog(os.path.join(folder, f"{table}.jsonl"))
    torch.set_num_threads(resolve_threads(threads))
    runs: list[Run] = []
    try:
        with reporter(progress, table) as report:
            for i, (model, seed, (method, rate), name) in enumerate(grid):
                inside = partial(_inside, report, i, len(grid), f"{name}, {method} {rate}")
                runs.append(_run(protocol, log, model, method, rate, name, seed, inside))
    finally:  # what is done is shown, whatever stops the rest
        facts = {**protocol.facts(protocol.budget), "paper_budget": asdict(protocol.paper_budget)}
        made = Table(table, kind.metrics, tuple(runs), len(grid), facts)
        made.save(folder)
    return made


def _run(
    protocol: Protocol,
    log: RunLog,
    model: str,
    method: str,
    rate: Rate,
    name: str,
    seed: int,
    progress: Progress,
) -> Run:
    """From the log, or made and logged."""
    config = {
        **{"table": protocol.name, "model": model, "method": method, "rate": rate},
        **{"set": name, "seed": seed, **protocol.facts(protocol.budget_at(rate))},
    }
    result = log.find(config)
    if result is None:
        start = time.perf_counter()
        result = protocol.run(model, method, rate, name, seed, progress)
        result["seconds"] = time.perf_counter() - start
        log.add(config, result)
    return Run(model, method, rate, name, seed, result)


def _inside(
    report: Progress, run: int, runs: int, label: str, done: int, total: int, name: str
) -> None:
    report(run, runs, f"{label}: {name} {done}/{total}")


def _grid(
    models: tuple[str, ...],
    sets: tuple[str, ...],
    methods: tuple[str, ...],
    rates: tuple[Rate, ...],
    seeds: tuple[int, ...],
) -> Iterator[tuple[str, int, tuple[str, Rate], str]]:
    """Model, seed, method and rate, set; what is not compressed has no rate."""
    ways: list[tuple[str, Rate]] = [(m, 0.0) for m in methods if m not in METHODS]
    ways += [(m, rate) for rate, m in product(rates, methods) if m in METHODS]
    return product(models, seeds, ways, sets)


def _methods(methods: Sequence[str] | None, kind: type[Protocol]) -> tuple[str, ...]:
    known = (*kind.references, *METHODS)
    if wrong := set(methods or ()) - set(known):
        raise ValueError(f"unknown method(s) {sorted(wrong)}; known are {', '.join(known)}")
    return tuple(methods or known)


def _rates(rates: Sequence[Rate] | None) -> tuple[Rate, ...]:
    for rate in rates or ():
        if rate != PAPER and not (isinstance(rate, (int, float)) and 0 < rate < 1):
            raise ValueError(f"rate {rate!r}: expected a share in (0, 1), or {PAPER!r}")
    return tuple(rates or ())
