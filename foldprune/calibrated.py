"""Compression with a calibration: a plan of what becomes of every block and tensor, and its
execution, all at once or block by block as the statistics come in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from . import _core
from .allocate import Taken, Unit, allocate
from .calibration import Calibration
from .encodings import Array
from .fit import fit, fit_neurons
from .job import Job
from .measured import Measured
from .prune import Pruned, Target, encode, mask_lowest
from .recipe import GROUPS, Granularity, Recipe
from .schemas.layout import AttentionBlock, FeedForwardBlock
from .tensors import is_weight_dtype

__all__ = ["Plan", "apply_attention", "apply_tensors", "candidates", "make_plan", "parts", "run"]


@dataclass
class Plan:
    """What is to become of the model. ``irc`` and ``dwc``: by block, what the job's folds take;
    ``shares`` and ``granularities``: by tensor, for FPP."""

    irc: dict[str, tuple[int | Array | None, str, float]] = field(default_factory=dict)
    dwc: dict[str, tuple[str | int | Array, str]] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    granularities: dict[str, Granularity] = field(default_factory=dict)
    scope: str = "tensor"

    def recipe(self) -> Recipe:
        """The nearest recipe: shares by tensor; folds whose rank differs from head to head stand as
        lossless ones."""
        overrides = {name: {"fpp": share} for name, share in self.shares.items() if share < 1}
        return Recipe(
            fpp=0.0 if overrides else None,
            fpp_on=GROUPS,
            fpp_scope="tensor",
            irc="lossless" if self.irc else None,
            dwc="lossless" if self.dwc else None,
            overrides=overrides,
        )


def run(job: Job, calibration: Calibration, rate: float, recipe: Recipe | None) -> Recipe:
    """All of a job, with the statistics of the uncompressed model; returns the recipe, or for a
    rate the one it was settled into."""
    measured = Measured(job.arrays, job.checkpoint.tied, job.layout, calibration, job.threads)
    measured.check(job.checkpoint.names)
    job.notes += measured.notes
    job.passes = 2 if recipe is None else 1  # curves, then the tensors themselves
    plan = make_plan(job, measured, rate, recipe)
    for block in job.layout.attentions:
        apply_attention(job, measured, block, plan)
    apply_tensors(job, measured, job.arrays, plan)
    job.warn_refused()
    return recipe or plan.recipe()


# ---- plans --------------------------------------------------------------------------------------


def make_plan(job: Job, measured: Measured, rate: float, recipe: Recipe | None) -> Plan:
    return (
        _plan_rate(job, measured, rate) if recipe is None else _plan_recipe(job, measured, recipe)
    )


def _plan_recipe(job: Job, measured: Measured, recipe: Recipe) -> Plan:
    """The recipe, with the shares of tensors that compete in one scope settled by damage."""
    plan = Plan(scope="row" if recipe.fpp_scope == "row" else "tensor")
    folded: set[str] = set()  # which will not be pruned
    for block in job.layout.attentions:
        if block.heads:
            if (irc := job.irc_of(block, recipe)) is not None:
                plan.irc[block.name] = irc
                if job.refusal(block, "irc", exact=irc[0] is None) is None:
                    folded |= {block.query.weight, block.key.weight}
            if (dwc := job.dwc_of(block, recipe)) is not None:
                plan.dwc[block.name] = dwc
                if job.refusal(block, "dwc", exact=dwc[0] == "lossless") is None:
                    folded.add(block.value.weight)
    together: dict[float, list[Target]] = {}
    for target in candidates(job):
        at = recipe.at(target.name)
        if at.fpp is None or job.layout.groups[target.name] not in at.fpp_on:
            continue
        granularity = Granularity.parse(at.fpp_granularity)
        if granularity.kind == "neuron" and not job.is_hidden(target.name):
            embedding = job.layout.groups[target.name] == "embedding"
            granularity = Granularity("row" if embedding else "weight")
        plan.shares[target.name] = float(at.fpp)
        plan.granularities[target.name] = granularity
        competes = recipe.fpp_scope == "global" and target.name not in folded
        if competes and granularity.kind == "weight" and at.fpp:
            together.setdefault(float(at.fpp), []).append(target)
    for rate, targets in together.items():
        if len(targets) > 1:
            units = [measured.fpp_unit(target) for target in targets]
            total = sum(target.matrix.size for target in targets)
            for (taken,) in allocate(rate, total, [[[unit]] for unit in units]):
                plan.shares[taken.unit.name] = taken.setting
    return plan


def _plan_rate(job: Job, measured: Measured, rate: float) -> Plan:
    """Spreads the rate over everything by damage per number."""
    plan = Plan()
    total = sum(a.size for a in job.arrays.values() if is_weight_dtype(a.dtype))
    by_name = {block.name: block for block in job.layout.attentions}
    folds: dict[tuple[str, str], list[Taken]] = {}
    for way in allocate(rate, total, parts(job, measured)):
        for taken in way:
            if taken.unit.method == "FPP":
                if taken.setting > 0:
                    plan.shares[taken.unit.name] = taken.setting
            else:
                folds.setdefault((taken.unit.block, taken.unit.method), []).append(taken)
    for (name, method), taken_by_head in folds.items():
        block = by_name[name]
        ranks = np.array([round(taken.setting) for taken in taken_by_head])
        settled = job.ranks_of(block, ranks, method)
        if method == "IRC":
            plan.irc[name] = (*settled, 0.0)
        else:
            plan.dwc[name] = (settled[0] if settled[0] is not None else "lossless", settled[1])
    plan.granularities = dict.fromkeys(plan.shares, Granularity("weight"))
    return plan


def parts(job: Job, measured: Measured) -> list[list[list[Unit]]]:
    """The parts of the model and the ways to make each smaller, pruning first."""
    units = {}
    for target in candidates(job):
        units[target.name] = measured.fpp_unit(target)
        job.step(target.name)
    out: list[list[list[Unit]]] = []
    for block in job.layout.attentions:
        query_key = [block.query.weight, block.key.weight]
        folds = {}
        for kind in ("IRC", "DWC"):
            reason = job.refusal(block, kind.lower(), exact=False)
            if reason is None:
                folds[kind] = measured.fold_units(block, kind)
            else:
                job.refuse(
                    (block.query, block.key) if kind == "IRC" else (block.value,),
                    f"{kind} left out: {reason}",
                )
        if block.value.weight in query_key:  # fused: pruned whole, or folded
            out.append(_ways(units, query_key[:1], [u for f in folds.values() for u in f]))
        else:
            out.append(_ways(units, query_key, folds.get("IRC", [])))
            out.append(_ways(units, [block.value.weight], folds.get("DWC", [])))
    out += [[[unit]] for unit in units.values()]
    return out


def _ways(units: dict[str, Unit], names: list[str], folds: list[Unit]) -> list[list[Unit]]:
    pruned = [units.pop(name) for name in dict.fromkeys(names) if name in units]
    return [pruned, folds] if folds else [pruned]


def candidates(job: Job) -> list[Target]:
    """Every matrix that FPP can be used on, folded ones excepted."""
    targets = []
    for name in job.arrays:
        if job.layout.groups[name] in GROUPS and (target := job.target(name)) is not None:
            targets.append(target)
    return targets


# ---- execution ----------------------------------------------------------------------------------


def apply_attention(job: Job, measured: Measured, block: AttentionBlock, plan: Plan) -> None:
    """Folds one block's query, key and value."""
    moments, source = measured.query_moments(block), measured.source_moments(block)
    if (moments is None or source is None) and block.name in plan.irc.keys() | plan.dwc.keys():
        job.notes.append(f"{block.name}: the calibration does not reach it: folded without data")
    if block.name in plan.irc:
        job.fold_query_key(block, *plan.irc[block.name], moments=moments, source=source)
    if block.name in plan.dwc:
        job.fold_value(block, *plan.dwc[block.name], moments=source)
        _follow_values(job, measured, block)
    job.assemble_folds(block)


def _follow_values(job: Job, measured: Measured, block: AttentionBlock) -> None:
    """What the output projection reads after its values were folded, v' for v = V x + b.

    With T v + c the least-squares fit of v' by v, attention's averages of it are known exactly, as
    its weights add up to 1; those of the rest of v' (none at the lossless level) are taken to
    shrink as those of v do.
    """
    value, groups = block.value, block.groups
    encoding = job.segments.get(value.weight, {}).get(value.slot.part)
    moments, gram = measured.source_moments(block), measured.gram(block.output.weight)
    if encoding is None or moments is None or gram is None:
        return
    old = value.view(job.arrays[value.weight], block.heads).astype(np.float64)
    new = encoding.unpack().astype(np.float64)
    old_mean, new_mean = old @ moments.mean, new @ moments.mean
    if value.bias is not None:
        old_mean += value.bias_view(job.arrays[value.bias], block.heads)
        new_mean += job.segments[value.bias][value.slot.bias_slot.part].unpack()
    old, new = (a.reshape(groups, block.head_dim, -1) for a in (old, new))
    covariance = moments.covariance
    energy = old @ covariance @ old.transpose(0, 2, 1)
    change = new @ covariance @ old.transpose(0, 2, 1)
    change = change @ np.linalg.pinv(energy, rcond=1e-10, hermitian=True)
    moved = np.einsum("gab,gb->ga", change, old_mean.reshape(groups, -1))
    shift = new_mean.reshape(groups, -1) - moved
    rest = new - change @ old
    per_group = block.heads // groups
    own = np.diagonal(gram.moments.covariance).reshape(block.heads, -1).sum(axis=1)
    whole = np.repeat(np.trace(energy, axis1=1, axis2=2), per_group)
    shrunk = np.divide(own, whole, out=np.zeros_like(own), where=whole > 0)
    added = np.repeat(rest @ covariance @ rest.transpose(0, 2, 1), per_group, axis=0)
    measured.grams[block.output.weight] = gram.mapped(
        np.repeat(change, per_group, axis=0),
        np.repeat(shift, per_group, axis=0),
        shrunk[:, None, None] * added,
    )


def apply_tensors(job: Job, measured: Measured, names: Iterable[str], plan: Plan) -> None:
    """FPP of those tensors that the plan has a share for, folded ones excepted."""
    wanted = [name for name in names if name in plan.shares]
    hidden = {
        matrix.weight: block
        for block in job.layout.feed_forwards
        for matrix in (block.up, block.down, block.gate)
        if matrix is not None
    }
    done: set[str] = set()
    for name in wanted:
        if name in done:
            continue
        granularity, share = plan.granularities[name], plan.shares[name]
        if granularity.kind == "neuron":
            together = job.neuron_members(hidden[name], wanted)
            members = {t.name: t for n in together if (t := job.target(n)) is not None}
            pruned = _fit_neurons(measured, hidden[name], members, share)
        elif (target := job.target(name)) is None:
            continue
        else:
            pruned = {name: _fit(job, measured, target, share, granularity, plan.scope)}
        job.keep_pruned(pruned, granularity.label)
        done |= set(pruned)
        for finished in pruned:
            job.step(finished)


def _fit(
    job: Job, measured: Measured, target: Target, share: float, granularity: Granularity, scope: str
) -> Pruned:
    if measured.is_embedding(target.name):
        return _prune_embedding(measured, target, share, granularity, scope)
    gram = measured.require_gram(target.name)
    return fit(target, gram, share, granularity, scope, measured.row_weight(target))


def _fit_neurons(
    measured: Measured, block: FeedForwardBlock, members: dict[str, Target], share: float
) -> dict[str, Pruned]:
    down = members[block.down.weight]
    gate = members[block.gate.weight] if block.gate is not None else None
    gram = measured.require_gram(down.name)
    weight = measured.row_weight(down)
    return fit_neurons(members[block.up.weight], down, gate, gram, share, weight)


def _prune_embedding(
    measured: Measured, target: Target, share: float, granularity: Granularity, scope: str
) -> Pruned:
    """An embedding's rows are looked up, not mixed: nothing can make up for a removed number, and
    the damage is the sum of the prices."""
    threads = measured.threads
    scores = measured.embedding_scores(target)
    block = (1, 1)
    if granularity.kind == "nm":
        mask = _core.mask_nm((scores, 1.0, None), granularity.a, granularity.b, threads)
    elif granularity.kind == "weight" and scope == "row":
        mask = _core.mask_rows((scores, 1.0, None), round(share * scores.shape[1]), threads)
    elif granularity.kind == "weight":
        mask = mask_lowest(scores, share, threads)
    else:
        block = granularity.block(scores.shape[1])
        grid = _core.block_scores((scores, 1.0, None), *block, threads)
        mask = mask_lowest(grid, share, threads)
    pruned = encode(target, mask, block, threads)
    kept = pruned.encoding.unpack(threads)
    lost = np.where((kept.T if target.transposed else kept) == 0, scores, 0.0)
    total = float(np.square(scores, dtype=np.float64).sum())
    pruned.error = float(np.square(lost, dtype=np.float64).sum()) / total if total > 0 else 0.0
    return pruned
