"""Compression block by block: each block is calibrated on what the compressed ones before it put
out, and each group of its matrices on what the groups before it put out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from .. import calibrated
from ..api import DEFAULT_RATE, check_arguments, check_calibration, note_unused_rate
from ..calibration import Calibration, layer_name
from ..compressed import Compressed
from ..errors import ModelError
from ..job import Job
from ..measured import Measured
from ..options import Progress, reporter, resolve_threads, silent
from ..recipe import Recipe
from ..schemas.layout import AttentionBlock, FeedForwardBlock
from .batches import Batch, naming
from .calibrate import Loss, as_tokens, calibrate, check_batches, prepared, reading
from .tensors import from_numpy

__all__ = ["compress", "without_cache"]


def compress(
    model: torch.nn.Module,
    batches: Iterable[Any],
    rate: float = DEFAULT_RATE,
    *,
    recipe: Recipe | None = None,
    num_heads: int | None = None,
    calibration: Calibration | None = None,
    held_out: int | None = 8,
    gradients: int = 16,
    loss: Loss | None = None,
    progress: Progress | bool | None = True,
    threads: int | None = None,
) -> Compressed:
    """Compresses a model on the user's data, block by block.

    The dense model is calibrated once, to learn what its loss sees (``foldprune.torch.calibrate``)
    and to spread ``rate``. Then every block is compressed in the order of the model: query, key and
    value, the output projection, the first feed-forward matrices, the last one, each fitted to the
    inputs that the compressed model before it gives; an output embedding of its own comes last. In
    memory are the statistics of the model (16 d^2 bytes for each distinct input of d numbers) while
    the rate is spread, and then those of one block, a copy of it, and the hidden states of all
    batches.

    Parameters
    ----------
    model
        A torch module of a known architecture (``foldprune.schemas``). It is not changed, whatever
        happens.
    batches
        Batches of calibration data, as ``foldprune.torch.calibrate`` takes them; kept in memory.
    rate, recipe, num_heads, threads
        As for ``foldprune.compress``. A recipe's ``fpp_scope`` "global" spreads its rate over the
        pruned tensors by damage.
    calibration
        The dense model's, by ``foldprune.torch.calibrate`` with gradients, where it is at hand; by
        default the batches are run for it first.
    held_out, gradients, loss
        As for ``foldprune.torch.calibrate``.
    progress
        True for bars on standard error, or a function called with (done, total, name).

    Returns
    -------
    Compressed

    Raises
    ------
    As ``foldprune.compress`` and ``foldprune.torch.calibrate``.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch module, got {type(model).__name__}")
    check_batches(batches)
    given = recipe
    recipe, rate = check_arguments(rate, recipe)
    check_calibration(calibration)
    workers = resolve_threads(threads)
    values = list(batches)
    job = Job.begin(model, recipe, None, num_heads, silent, workers)
    if given is not None:
        note_unused_rate(job, rate, given)
    if job.layout.schema is None:
        raise ModelError(
            f"{type(model).__name__}: the blocks of an unknown architecture cannot be run one by "
            "one; use foldprune.compress(model, recipe=..., calibration="
            "foldprune.torch.calibrate(model, batches))"
        )
    chains = {block.stack for block in job.layout.attentions}
    if len(chains) > 1 or any(block.cross for block in job.layout.attentions):
        raise ModelError(
            f"{type(model).__name__}: its blocks are no single chain ({', '.join(sorted(chains))}):"
            f" {_ALTERNATIVE}"
        )
    if calibration is None:
        calibration = calibrate(
            model,
            values,
            held_out=held_out,
            gradients=gradients,
            loss=loss,
            progress=progress,
            threads=workers,
        )
    measured = Measured(job.arrays, job.checkpoint.tied, job.layout, calibration, workers)
    measured.check(job.checkpoint.names)
    job.notes += measured.notes
    with reporter(progress, "measuring") as job.progress:
        plan = calibrated.make_plan(job, measured, rate, recipe)
        feed_forwards = {block.name: block for block in job.layout.feed_forwards}
        stages = [
            _stages(block, feed_forwards.get(block.name), plan) for block in job.layout.attentions
        ]
        inside = {name for of_block in stages for stage in of_block for name in stage.tensors}
        outside = [name for name in plan.shares if name not in inside]
        looked_up = [name for name in outside if measured.is_embedding(name)]
        calibrated.apply_tensors(job, measured, looked_up, plan)
    job.progress = silent
    gradients_alone = calibration.without_moments()
    del calibration, measured  # and with them all moments, unless the caller keeps them
    with reporter(progress, "compressing") as report, prepared(model), torch.no_grad():
        runner = _Runner(model, [Batch(model, v, i) for i, v in enumerate(values)], job)
        for i, (block, of_block) in enumerate(zip(job.layout.attentions, stages, strict=True)):
            report(i, len(stages), block.name)
            runner.compress(i, block, of_block, plan, gradients_alone)
        heads = [name for name in outside if name not in looked_up]
        runner.compress_heads(heads, plan, gradients_alone)
        report(len(stages), len(stages), "")
    job.warn_refused()
    return job.finish(recipe or plan.recipe())


@dataclass(frozen=True)
class _Stage:
    """Tensors of a block that are compressed together, on the input of the layer ``reads``;
    ``sharing``: other layers that read the same. ``changed``: tensors that may come out new."""

    reads: str
    tensors: tuple[str, ...]
    sharing: tuple[str, ...]
    changed: tuple[str, ...]
    is_attention: bool = False


def _stages(
    block: AttentionBlock, forward: FeedForwardBlock | None, plan: calibrated.Plan
) -> list[_Stage]:
    def stage(matrices: Sequence[Any], sharing: Sequence[Any], also: Sequence[Any] = ()) -> _Stage:
        weights = tuple(dict.fromkeys(matrix.weight for matrix in matrices))
        changed = [n for m in (*matrices, *also) for n in (m.weight, m.bias) if n is not None]
        others = tuple(dict.fromkeys(m.weight for m in sharing if m.weight != matrices[0].weight))
        return _Stage(matrices[0].weight, weights, others, tuple(dict.fromkeys(changed)))

    qkv = (block.query, block.key, block.value)
    stages = [
        replace(stage(qkv, qkv, (block.output,)), is_attention=True),
        stage((block.output,), ()),
    ]
    if forward is not None:
        first = [forward.up, *([forward.gate] if forward.gate is not None else [])]
        units = [plan.granularities.get(matrix.weight) for matrix in (*first, forward.down)]
        if any(unit is not None and unit.kind == "neuron" for unit in units):
            stages.append(stage((forward.down, *first), ()))  # hidden units leave together
        else:
            stages += [stage(first, first), stage((forward.down,), ())]
    return [
        stage
        for stage in stages
        if plan.shares.keys() & set(stage.tensors)
        or (stage.is_attention and block.name in plan.irc.keys() | plan.dwc.keys())
    ]


_ALTERNATIVE = "it cannot be compressed block by block; use foldprune.compress with calibration="


class _Stop(Exception):
    """Raised in a forward pass once it has given what was wanted."""


@dataclass
class _Call:
    """What a block is called with beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def same_as(self, other: _Call) -> bool:
        ours, theirs = (*self.args, *self.kwargs.values()), (*other.args, *other.kwargs.values())
        return (
            len(self.args) == len(other.args)
            and self.kwargs.keys() == other.kwargs.keys()
            and all(map(_same, ours, theirs))
        )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return a is b
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or bool(a == b)


class _Runner:
    """Runs the model's blocks one by one. ``hidden``: of every batch, what the next block reads."""

    def __init__(self, model: torch.nn.Module, batches: list[Batch], job: Job) -> None:
        self.model, self.batches, self.job = model, batches, job
        self.names = [block.name for block in job.layout.attentions]
        self.hidden: list[torch.Tensor] = []
        self.calls: list[list[_Call]] = []  # by batch, then block; or one for all blocks
        with without_cache(model):
            changed = self._changed()
            for batch in batches:
                self._capture(batch, changed)

    def _capture(self, batch: Batch, changed: dict[str, torch.Tensor]) -> None:
        """What the first block reads, after the embeddings were compressed, and what every block is
        called with."""
        calls: dict[str, _Call] = {}

        def note(
            name: str, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> None:
            hidden, rest, named = _split(args, kwargs)
            if not calls:
                self.hidden.append(hidden.clone())
            if name in calls:
                raise ModelError(f"{type(self.model).__name__} calls {name} twice: {_ALTERNATIVE}")
            calls[name] = _Call(rest, named)

        handles = [
            self.model.get_submodule(name).register_forward_pre_hook(
                partial(note, name), with_kwargs=True
            )
            for name in self.names
        ]
        try:
            with naming(batch.index):  # to the end: layers that share a block call it again
                self._forward(batch, changed)
        finally:
            for handle in handles:
                handle.remove()
        if list(calls) != self.names:
            raise ModelError(
                f"{type(self.model).__name__} called {len(calls)} of its {len(self.names)} blocks: "
                f"{_ALTERNATIVE}"
            )
        in_order = list(calls.values())
        alike = all(call.same_as(in_order[0]) for call in in_order)
        self.calls.append(in_order[:1] if alike else in_order)

    def _changed(self) -> dict[str, torch.Tensor]:
        """What has been compressed so far, dense."""
        device = next(self.model.parameters()).device
        return {
            name: from_numpy(dense).to(device)
            for name in self.job.arrays
            if (dense := self.job.changed(name)) is not None
        }

    def _forward(self, batch: Batch, changed: dict[str, torch.Tensor]) -> None:
        """The whole model, with other weights in place of its own."""
        args, kwargs = batch.arguments
        if "use_cache" in kwargs:
            kwargs = {**kwargs, "use_cache": False}
        torch.func.functional_call(self.model, changed, args, kwargs)

    def compress_heads(
        self, names: Sequence[str], plan: calibrated.Plan, gradients: Calibration
    ) -> None:
        """Linear layers after the blocks."""
        if not names:
            return
        job, calibration = self.job, gradients.without_moments()
        layers = {layer: self.model.get_submodule(layer) for layer in map(layer_name, names)}
        changed = self._changed()
        with without_cache(self.model):
            for batch in self.batches:
                count = partial(self._count, calibration, batch)
                with reading(layers, count), naming(batch.index):
                    self._forward(batch, changed)
        measured = Measured(job.arrays, job.checkpoint.tied, job.layout, calibration, job.threads)
        calibrated.apply_tensors(job, measured, names, plan)

    def compress(
        self,
        index: int,
        block: AttentionBlock,
        stages: Sequence[_Stage],
        plan: calibrated.Plan,
        gradients: Calibration,
    ) -> None:
        """One block; then ``hidden`` is what the compressed block puts out."""
        job = self.job
        module = copy.deepcopy(self.model.get_submodule(block.name)).eval()
        for stage in stages:
            calibration = gradients.without_moments()
            self._calibrate(index, module, block.name, stage, calibration)
            measured = Measured(
                job.arrays, job.checkpoint.tied, job.layout, calibration, job.threads
            )
            if stage.is_attention:
                calibrated.apply_attention(job, measured, block, plan)
            calibrated.apply_tensors(job, measured, stage.tensors, plan)
            for name in stage.changed:
                if (dense := job.changed(name)) is not None:
                    parameter = module.get_parameter(name.removeprefix(f"{block.name}."))
                    parameter.data.copy_(from_numpy(dense))
        for i, batch in enumerate(self.batches):
            with naming(batch.index):
                self.hidden[i] = self._block(index, i, module)

    def _block(self, index: int, i: int, module: torch.nn.Module) -> torch.Tensor:
        call = self.calls[i][index if len(self.calls[i]) > 1 else 0]
        out = module(self.hidden[i], *call.args, **call.kwargs)
        hidden = out[0] if isinstance(out, (tuple, list)) else out
        assert isinstance(hidden, torch.Tensor)
        return hidden

    def _count(self, calibration: Calibration, batch: Batch, layer: str, x: torch.Tensor) -> None:
        x, mask = as_tokens(batch, layer, x)
        calibration.update(layer, x, mask, threads=self.job.threads)

    def _calibrate(
        self,
        index: int,
        module: torch.nn.Module,
        prefix: str,
        stage: _Stage,
        calibration: Calibration,
    ) -> None:
        layer = layer_name(stage.reads)
        reader = {layer: module.get_submodule(layer.removeprefix(f"{prefix}."))}
        for i, batch in enumerate(self.batches):

            def count(name: str, x: torch.Tensor, batch: Batch = batch) -> None:
                self._count(calibration, batch, name, x)
                raise _Stop

            with reading(reader, count), naming(batch.index), suppress(_Stop):
                self._block(index, i, module)
        for name in stage.sharing:
            calibration.share(name, layer)


def _split(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden states, and the other arguments of a block."""
    if args:
        hidden, rest, named = args[0], args[1:], dict(kwargs)
    else:
        named = dict(kwargs)
        hidden, rest = named.pop("hidden_states"), ()
    return hidden, rest, named


@contextmanager
def without_cache(model: torch.nn.Module) -> Iterator[None]:
    """No key-value cache, which would grow each time a block runs."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    using = [c for c in configs.values() if getattr(c, "use_cache", False)]
    try:
        for config in using:
            config.use_cache = False
        yield
    finally:
        for config in using:
            config.use_cache = True
