"""Compression without a calibration: a recipe, or a rate that is spread by what each method's own
error says, see spread.py. Units of a checkpoint use its parts one by one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import numpy as np

from . import dwc, irc
from .encodings import Array
from .fold import Fold, Refused, exact_in
from .job import Job
from .prune import (
    Cut,
    Target,
    energy,
    histogram,
    prune,
    prune_below,
    prune_cut,
    prune_neurons,
)
from .recipe import Granularity, Recipe
from .schemas.layout import AttentionBlock
from .spread import Option, choose, fill, settled_recipe

__all__ = [
    "competitors",
    "fold_by_recipe",
    "fold_options",
    "fold_to",
    "foldable",
    "prune_recipe",
    "prune_to_cut",
    "run",
    "weighed_targets",
]


def run(job: Job, rate: float, recipe: Recipe | None) -> Recipe:
    """All of a job; returns the recipe, or for a rate the one it was settled into."""
    if recipe is None:
        return _run_rate(job, rate)
    fold_by_recipe(job, recipe)
    job.warn_refused()
    prune_recipe(job, recipe)
    return recipe


# ---- by a recipe --------------------------------------------------------------------------------


def fold_by_recipe(job: Job, recipe: Recipe) -> None:
    for block in job.layout.attentions:
        if not block.heads:
            continue
        if (logits := job.irc_of(block, recipe)) is not None:
            job.fold_query_key(block, *logits)
        if (values := job.dwc_of(block, recipe)) is not None:
            job.fold_value(block, *values)
        job.assemble_folds(block)
        job.progress(job.done, job.total, block.name)


def prune_recipe(job: Job, recipe: Recipe, relative: bool = False) -> None:
    """FPP of the recipe's ``fpp_on``. ``relative``: what competes are shares of each matrix's
    own output, not the numbers themselves."""
    for (rate, text), targets in competitors(job, recipe, relative).items():
        granularity = Granularity.parse(text)
        if granularity.kind == "neuron":
            _prune_neurons(job, targets, rate)
            continue
        cut = job.cuts.get((rate, text))
        if cut is not None:
            pruned = prune_cut(targets, cut, granularity, job.threads, job.step_target)
        else:
            pruned = prune(
                targets, rate, granularity, recipe.fpp_scope, job.threads, job.step_target
            )
        job.keep_pruned(pruned, text)


def competitors(
    job: Job, recipe: Recipe, relative: bool = False
) -> dict[tuple[float, str], list[Target]]:
    """What is to be pruned, by rate and granularity: those that share both compete."""
    hidden = {
        matrix.weight
        for block in job.layout.feed_forwards
        for matrix in (block.up, block.down, block.gate)
        if matrix is not None
    }
    sets: dict[tuple[float, str], list[Target]] = {}
    targets = job.targets(recipe)
    if relative:
        _weigh(job, targets)
    for target in targets:
        at = recipe.at(target.name)
        text = at.fpp_granularity
        if text == "neuron" and target.name not in hidden:
            job.is_hidden(target.name)
            text = "row" if job.layout.groups[target.name] == "embedding" else "weight"
        sets.setdefault((float(at.fpp or 0), text), []).append(target)
    return sets


def _prune_neurons(job: Job, targets: list[Target], rate: float) -> None:
    """Prunes the hidden units of the layers that the targets belong to."""
    by_name = {target.name: target for target in targets}
    for block in job.layout.feed_forwards:
        members = job.neuron_members(block, by_name)
        if not members:
            continue
        gate = by_name[block.gate.weight] if block.gate is not None else None
        up, down = by_name[block.up.weight], by_name[block.down.weight]
        pruned = prune_neurons(up, down, gate, rate, job.threads)
        job.keep_pruned(pruned, "neuron")
        for name in members:
            job.step(name)


# ---- by a rate ----------------------------------------------------------------------------------


def _run_rate(job: Job, rate: float) -> Recipe:
    """Spreads the rate; returns the nearest recipe with uniform fields."""
    folds = foldable(job)
    options, outputs = fold_options(job, folds)
    targets = weighed_targets(job, outputs)
    weights = sum(target.matrix.size for target in targets)
    counts = histogram(targets, Granularity("weight"), job.threads)
    choice = choose(rate, job.numbers, options, weights, counts)
    fold_to(job, folds, [option.ranks for option in options])
    count = fill(rate, job.numbers, choice, job.folded_numbers, weights)
    if count:
        pruned = prune_below(weighed_targets(job), count, job.threads, job.step_target)
        job.keep_pruned(pruned, "weight")
    return settled_recipe(options, count, weights)


def foldable(job: Job) -> list[tuple[AttentionBlock, str]]:
    """The folds that are valid whatever their ranks, "IRC" of every block and then "DWC"; why
    others are not is noted."""
    logits, values = [], []
    for block in job.layout.attentions:
        if (reason := job.refusal(block, "irc", exact=False)) is None:
            logits.append((block, "IRC"))
        else:
            job.refuse((block.query, block.key), f"IRC left out: {reason}")
        if (reason := job.refusal(block, "dwc", exact=False)) is None:
            values.append((block, "DWC"))
        else:
            job.refuse((block.value,), f"DWC left out: {reason}")
    return logits + values


def fold_options(
    job: Job, foldable: Sequence[tuple[AttentionBlock, str]]
) -> tuple[list[Option], dict[str, Fold]]:
    """What each rank of each fold would cost; and by the output projection's name, how pruning
    is to see it: as the lossless DWC leaves it."""
    options, outputs = [], {}
    for block, method in foldable:
        if method == "IRC":
            curve = irc.curve(block, job.arrays, job.threads)
            options.append(Option(curve, least=1))
        else:
            curve = dwc.curve(block, job.arrays, job.threads)
            options.append(Option(curve, least=0))
            if exact_in(job.arrays[block.value.weight].dtype):
                with contextlib.suppress(Refused):
                    fold = dwc.fold(block, job.arrays, "lossless", job.threads)
                    outputs[block.output.weight] = fold
        job.progress(job.done, job.total, block.name)
    return options, outputs


def fold_to(
    job: Job, foldable: Sequence[tuple[AttentionBlock, str]], ranks: Sequence[Array | None]
) -> None:
    """Folds each to its ranks per key head; None leaves it as it is."""
    for (block, name), chosen in zip(foldable, ranks, strict=True):
        if chosen is None:
            continue
        settled, method = job.ranks_of(block, chosen, name)
        if name == "IRC":
            job.fold_query_key(block, settled, method)
        else:
            job.fold_value(block, "lossless" if settled is None else settled, method)
    for block in job.layout.attentions:
        job.assemble_folds(block)


def prune_to_cut(job: Job, cut: Cut) -> None:
    """The rest of a spread rate, where the cut was found for more matrices than are here."""
    targets, granularity = weighed_targets(job), Granularity("weight")
    pruned = prune_cut(targets, cut, granularity, job.threads, job.step_target)
    job.keep_pruned(pruned, "weight")


def weighed_targets(job: Job, outputs: Mapping[str, Fold] | None = None) -> list[Target]:
    """Everything that single weights can be removed from, as they compete at one rate."""
    targets = job.targets(Recipe(fpp=0))  # how much is what is to be found out
    for target in targets:
        output = (outputs or {}).get(target.name)
        if output is not None and output.output is not None:
            target.matrix = output.output
            target.col_scale = output.output_scale
    _weigh(job, targets)
    return targets


def _weigh(job: Job, targets: Sequence[Target]) -> None:
    """Scores become shares of each matrix's own output: |w| / ||W||.

    What gives the logits counts more: its relative error is the model's own, while a block's is
    that of one of the 2 L + 1 terms (embedding, attention and feed-forward of each of L blocks)
    that add up to the last hidden state.
    """
    for target in targets:
        norm = float(np.sqrt(energy(target, job.threads)))
        target.scale = 1.0 / norm if norm > 0 else 1.0
        if target.name in job.layout.output_embeddings:
            target.scale *= float(np.sqrt(job.terms))
