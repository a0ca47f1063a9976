"""Forward propagation pruning while a model trains: ``FPP``."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from .. import tensors, uncalibrated
from ..container import write_atomically
from ..errors import FoldpruneWarning, ModelError, TensorError, UnmatchedTensorWarning
from ..job import Job
from ..measured import expected_use
from ..options import resolve_threads, silent
from ..prune import Pruned
from ..recipe import Granularity, Recipe, pattern_of
from ..schemas.layout import generic_layout
from .batches import Batch
from .calibrate import Loss, is_conv1d, is_embedding, prepared
from .collect import ORIGIN, Origin
from .convert import convert, pack_more
from .masked import MaskedMatrix, Watch, carry_over
from .modules import PackedEmbedding, PackedLinear
from .tensors import from_numpy, storage_key

__all__ = ["FPP", "Event", "Schedule"]

_TRIES = 4  # shares that are tried at a step, each half as far as the one before
_MEMORY = 0.5  # what statistics from before a step count after it
# optimisers whose step is one of whole matrices, or of all parameters as one vector, by class name
_WHOLE = {"Muon", "LBFGS"}
_FPP_FILE = "fpp.pt"  # in a Trainer's checkpoint

_Optimizers = torch.optim.Optimizer | list[torch.optim.Optimizer] | None


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When how much is pruned: from optimiser step ``start`` to ``end``, every ``interval`` steps.

    The pruned share of the rate grows as 1 - (1 - t)^3, t going from 0 to 1, so that most leaves
    while there is training left to make up for it (Zhu & Gupta, 2017).
    """

    start: int = 0
    end: int = 1000
    interval: int = 50

    def __post_init__(self) -> None:
        for name, least in (("start", 0), ("end", 1), ("interval", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Schedule({name}={value!r}): expected a whole number >= {least}")
        if self.end <= self.start:
            raise ValueError(f"Schedule: end={self.end} is not after start={self.start}")

    def share(self, step: int) -> float:
        """Of the rate, after that many optimiser steps."""
        t = (min(step, self.end) - self.start) / (self.end - self.start)
        return 1.0 - (1.0 - max(t, 0.0)) ** 3

    def due(self, step: int) -> bool:
        """Whether this step prunes, while there is something left to prune."""
        return step > self.start and (step == self.end or (step - self.start) % self.interval == 0)


@dataclasses.dataclass(frozen=True)
class Event:
    """A step that pruned. ``wanted``: share of the rate by the schedule, ``share``: reached;
    ``before`` and ``after``: the loss on the held batch, None without one."""

    step: int
    wanted: float
    share: float
    before: float | None
    after: float | None


class FPP:
    """Prunes a model in steps while it trains; afterwards kept weights alone train.

    In training mode forward passes gather what the layers read. At the steps of the schedule the
    weights that add least to the forward signal, |w| times the root mean square of its input (of an
    embedding: times the root of how often the row is used), are frozen and zeroed, up to the
    recipe's rate. Their gradients are zero from then on, and whatever an optimiser or a merge of
    adapters writes to them is zeroed again before the layer next runs or is saved. Zeros that the
    model has at the beginning stay, and count as removed.

    When the rate is reached the model is packed: matrices become ``PackedLinear`` and
    ``PackedEmbedding``, whose parameter is the kept values, and the optimiser goes on with their
    part of its state. ``foldprune.torch.to_compressed(model)`` takes the result.

    >>> fpp = FPP(model, Recipe(fpp=0.7), optimizer=optimizer)  # doctest: +SKIP
    >>> for batch in batches:  # doctest: +SKIP
    ...     model(**batch).loss.backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    ...     fpp.step()

    Parameters
    ----------
    model
        On the CPU; of any architecture, or one that ``foldprune.torch.convert`` made, whose dense
        matrices are pruned, beside its folded attention and packed matrices.
    recipe
        ``fpp`` and what goes with it. Weights that compete beyond their own matrix (``fpp_scope``
        "global") count as shares of their matrix's whole output. n:m comes down from n = m. Folds
        are made beforehand, by ``foldprune.torch.compress`` and ``convert``.
    schedule
        By default ``Schedule()``.
    optimizer
        The optimiser, or a list of several: state of pruned weights is zeroed, and carried over
        when the model is packed. Without it, with Muon or LBFGS, whose steps take weights as a
        whole, and in a process group, whose DistributedDataParallel holds on to the dense
        parameters, the model stays masked until ``pack`` is called.
    held, tolerance, loss
        A batch that checks every step: suspects that raise its loss by more than ``tolerance``, as
        a share of it, thaw (they get their values back and train again) and half of them are tried,
        up to three times; the schedule's next step tries again, also after the schedule's end.
        ``loss(model, held)`` gives the loss, by default the model's own. In a process group the
        mean over processes counts.
    threads
        By default as many as the process may run on.

    Attributes
    ----------
    history : list of Event
        The steps that pruned.

    Raises ModelError (a ValueError) where there is nothing to prune, or a checked loss is not
    finite; TensorError (a ValueError) for weights or inputs that are not. Nothing is pruned then.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        schedule: Schedule | None = None,
        optimizer: _Optimizers = None,
        held: Any = None,
        tolerance: float = 0.02,
        loss: Loss | None = None,
        threads: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch module, got {type(model).__name__}")
        if not isinstance(recipe, Recipe):
            raise TypeError(f"recipe: expected a foldprune.Recipe, got {type(recipe).__name__}")
        if recipe.folds:
            raise ValueError(
                "FPP prunes; fold beforehand: foldprune.torch.convert(model, "
                "foldprune.torch.compress(model, batches, recipe=Recipe(irc=..., dwc=...)))"
            )
        if not tolerance >= 0:
            raise ValueError(f"tolerance={tolerance!r}: expected a share of the loss, at least 0")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        self.model, self.recipe, self.schedule = model, recipe, schedule or Schedule()
        self.held, self.tolerance, self._loss = held, tolerance, loss
        self._threads = resolve_threads(threads)
        self.history: list[Event] = []
        self._steps, self._share, self._packed = 0, 0.0, False
        self._watch = Watch()
        self._handles: list[Any] = []
        self._optimizers: list[torch.optim.Optimizer] = []
        self.attach(optimizer)
        self._matrices = self._find()
        for matrix in self._matrices.values():
            kept = matrix.weight.detach() != 0
            if kept.any() and not kept.all():  # a matrix of zeros is yet to be trained
                matrix.keep = kept
        self._hook(self._matrices)

    def attach(self, optimizer: _Optimizers) -> None:
        """Names the optimiser, where it was made after this."""
        if optimizer is None:
            return
        given = optimizer if isinstance(optimizer, list) else [optimizer]
        found = [getattr(o, "optimizer", o) for o in given]  # without wrappers
        for one in found:
            if not isinstance(one, torch.optim.Optimizer):
                raise TypeError(f"optimizer: expected a torch optimiser, got {type(one).__name__}")
        own = {id(parameter) for parameter in self.model.parameters()}
        theirs = (p for one in found for group in one.param_groups for p in group["params"])
        if not any(id(parameter) in own for parameter in theirs):
            raise ValueError(
                f"optimizer: has none of this {type(self.model).__name__}'s parameters; was it "
                "made for another model, or for a copy?"
            )
        self._optimizers = found

    @property
    def done(self) -> bool:
        """Whether the recipe's rate is reached."""
        return self._share >= 1

    @property
    def rate(self) -> float:
        """Share of the pruned matrices' weights that is removed now."""
        kept = total = 0
        for matrix in self._matrices.values():
            total += matrix.weight.numel()
            kept += int(matrix.weight.numel() if matrix.keep is None else matrix.keep.sum())
        return 1 - kept / total

    # ---- the matrices ---------------------------------------------------------------------------

    def _job(self, recipe: Recipe) -> Job:
        """The model as ``foldprune.compress`` sees it, as it is now."""
        origin = getattr(self.model, ORIGIN, None)
        if not isinstance(origin, Origin):
            with warnings.catch_warnings():
                if self._steps:  # said once
                    warnings.simplefilter("ignore", UnmatchedTensorWarning)
                return Job.begin(self.model, recipe, None, None, silent, self._threads)
        state = self.model.state_dict()
        dense = {name: state[own] for name, own in origin.sources.items() if own in state}
        checkpoint = tensors.from_mapping(dense)
        layout = generic_layout(checkpoint.arrays)
        groups = {row.name: row.group for row in origin.report.rows}
        layout.groups = {name: groups[name] for name in checkpoint.arrays}
        layout.transposed = {n for n in checkpoint.arrays if is_conv1d(self._module(n))}
        job = Job(checkpoint, layout, silent, self._threads)
        job.check_tensors()
        return job

    def _name(self, name: str) -> str:
        """What the model calls a tensor of the checkpoint."""
        origin = getattr(self.model, ORIGIN, None)
        return origin.sources[name] if isinstance(origin, Origin) else name

    def _module(self, name: str) -> nn.Module:
        return self.model.get_submodule(self._name(name).rpartition(".")[0])

    def _find(self) -> dict[str, MaskedMatrix]:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        found = {}
        for target in self._job(self.recipe).targets(self.recipe):
            if (weight := parameters.get(self._name(target.name))) is not None:
                found[target.name] = MaskedMatrix(weight, target.transposed, self._watch)
        if not found:
            raise ModelError(
                f"{type(self.model).__name__} has no dense matrix in the recipe's "
                f"fpp_on={list(self.recipe.fpp_on)} to prune"
            )
        return found

    def _hook(self, matrices: Mapping[str, MaskedMatrix]) -> None:
        if not matrices:
            return
        by_key = {storage_key(m.weight): m for m in matrices.values()}
        pre = self.model.register_forward_pre_hook(self._watch.note, with_kwargs=True)
        self._handles.append(pre)
        for module in self.model.modules():
            weight = module._parameters.get("weight")
            matrix = None if weight is None else by_key.get(storage_key(weight))
            if matrix is not None:
                # of a tied output embedding it counts how often the rows are looked up
                matrix.watch_for(matrix.looked_up or is_embedding(module))
                run = module.register_forward_pre_hook(matrix.before_forward, with_kwargs=True)
                save: Any = module.register_state_dict_pre_hook(matrix.before_saving)  # type: ignore[no-untyped-call]
                self._handles += [run, save]
        for matrix in by_key.values():
            if matrix.weight.requires_grad:
                hook = matrix.weight.register_hook(matrix.masked)  # type: ignore[no-untyped-call]
                self._handles.append(hook)

    # ---- the steps ------------------------------------------------------------------------------

    def step(self) -> None:
        """To be called after every step of the optimiser."""
        self._steps += 1
        if not self.done and self.schedule.due(self._steps):
            self._advance()
            if self.done and self._optimizers and not _distributed() and self._packable():
                self.pack()

    def _packable(self) -> bool:
        """Whether the optimisers can go on with vectors of kept values."""
        kinds = {kind.__name__ for o in self._optimizers for kind in type(o).__mro__}
        whole = sorted(kinds & _WHOLE)
        if whole:
            warnings.warn(
                f"{whole[0]} takes weights as a whole and cannot go on with packed ones: the model "
                "stays masked; call pack() when it has been trained",
                FoldpruneWarning,
                stacklevel=3,
            )
        return not whole

    @torch.no_grad()
    def _advance(self) -> None:
        wanted, old = self.schedule.share(self._steps), self._share
        before = after = self._held_loss()
        share = wanted
        for attempt in range(_TRIES):
            share = old + (wanted - old) / 2**attempt
            frozen = self._freeze(share)
            try:
                after = self._held_loss()
            except ModelError:
                after = math.inf
            if before is None or after is None or after <= before * (1 + self.tolerance):
                break
            for name, (keep, left, values) in frozen.items():
                matrix = self._matrices[name]
                matrix.weight.data[left] = values
                matrix.keep = keep
            share, after = old, before
        self._share = share
        self._watch.active = not self.done
        for matrix in self._matrices.values():
            matrix.sums *= _MEMORY
            matrix.count *= _MEMORY
            self._forget(matrix)
        self.history.append(Event(self._steps, wanted, share, before, after))

    def _freeze(
        self, share: float
    ) -> dict[str, tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]]:
        """Zeroes up to that share of the rate. By name: the mask so far, what left, its values."""
        recipe = self._recipe_at(share)
        job = self._job(recipe)
        for name, matrix in self._matrices.items():
            self._weigh(job, name, matrix)
        uncalibrated.prune_recipe(job, recipe, relative=recipe.fpp_scope == "global")
        frozen = {}
        for name, matrix in self._matrices.items():
            encoding, keep = job.results[name].encoding, matrix.keep
            kept = from_numpy(encoding.unpack(self._threads)) != 0
            matrix.keep = kept if keep is None else kept & keep
            left = ~matrix.keep if keep is None else keep & ~matrix.keep
            frozen[name] = (keep, left, matrix.weight.data[left])
            matrix.block = getattr(encoding, "block", (1, 1))
            matrix.hold()
        return frozen

    def _recipe_at(self, share: float) -> Recipe:
        """The recipe that removes that share of what this one does."""
        overrides = {}
        for name in self._matrices:
            at = self.recipe.at(name)
            text, rate = at.fpp_granularity, (at.fpp or 0.0) * share
            granularity = Granularity.parse(text)
            if granularity.kind == "nm":
                n = granularity.b - math.floor((granularity.b - granularity.a) * share + 1e-9)
                text, rate = f"{n}:{granularity.b}", 1 - n / granularity.b
            fields = {"fpp": rate, "fpp_on": at.fpp_on, "fpp_granularity": text}
            overrides[pattern_of(name)] = fields
        return dataclasses.replace(self.recipe, fpp=None, overrides=overrides)

    def _weigh(self, job: Job, name: str, matrix: MaskedMatrix) -> None:
        """Hands the statistics to the job that selects."""
        gathered = torch.cat((matrix.sums, matrix.sums.new_tensor([matrix.count])))
        if _distributed():
            dist.all_reduce(gathered)
        sums, count = gathered[:-1].numpy(), float(gathered[-1])
        if not np.isfinite(sums).all():
            raise TensorError(f"{name!r}: the layer's input had NaN or infinite numbers")
        if not sums.any():  # it has not run
            return
        if matrix.looked_up:
            job.row_scales[name] = np.sqrt(expected_use(sums)).astype(np.float32)
        else:
            job.col_scales[name] = np.sqrt(sums / count).astype(np.float32)

    def _held_loss(self) -> float | None:
        """Mean over the processes. ModelError if it is not finite."""
        if self.held is None:
            return None
        with prepared(self.model), torch.no_grad():
            value = (self._loss or _own_loss)(self.model, self.held).detach().double()
        if _distributed():
            dist.all_reduce(value)
            value /= dist.get_world_size()
        if not math.isfinite(value):
            raise ModelError(f"step {self._steps}: the held batch's loss is {float(value)}")
        return float(value)

    def _forget(self, matrix: MaskedMatrix) -> None:
        """Momentum of pruned weights."""
        if matrix.keep is None:
            return
        for optimizer in self._optimizers:
            for value in optimizer.state.get(matrix.weight, {}).values():
                if isinstance(value, torch.Tensor) and value.shape == matrix.weight.shape:
                    value.mul_(matrix.keep)

    # ---- packing --------------------------------------------------------------------------------

    @torch.no_grad()
    def pack(self, optimizer: _Optimizers = None) -> nn.Module:
        """Packs the model in place, carries the optimisers over and returns the model.

        It happens by itself once the rate is reached where an optimiser is known, but not in a
        process group: there, call it on every process and wrap the model anew. Before the rate is
        reached it gives a FoldpruneWarning. Afterwards there is nothing more to prune.
        """
        self.attach(optimizer)
        if self._packed:
            return self.model
        if not self.done:
            text = f"{self.rate:.1%} is pruned, and the rate not reached"
            warnings.warn(text, FoldpruneWarning, stacklevel=2)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._share, self._packed, self._watch.active = 1.0, True, False
        pruned = {n: m for n, m in self._matrices.items() if m.keep is not None}
        names = {name: self._name(name) for name in pruned}
        packed = {name: m.encoding(name, self._threads) for name, m in pruned.items()}
        if hasattr(self.model, ORIGIN):
            pack_more(self.model, packed, "FPP in training")
        else:
            job = self._job(self.recipe)
            job.keep_pruned({n: Pruned(e, None) for n, e in packed.items()}, "in training")
            convert(self.model, job.finish(self.recipe))
        left = {}
        for name, matrix in pruned.items():
            module = self.model.get_submodule(names[name].rpartition(".")[0])
            if isinstance(module, (PackedLinear, PackedEmbedding)):
                for own in self._optimizers:
                    carry_over(own, matrix, module.values)
                matrix.weight = nn.Parameter(matrix.weight.to("meta"))  # its shape is all we need
            else:
                left[name] = matrix
        self._hook(left)  # what has no packed form stays masked
        return self.model

    # ---- for training loops ---------------------------------------------------------------------

    def callback(self) -> Any:
        """A transformers.TrainerCallback that attaches the Trainer's optimiser and calls
        ``step``, and saves FPP's state in the Trainer's checkpoints, as ``fpp.pt``. The best model,
        where the Trainer loads it at the end, is one from after the rate was reached.

        To go on from such a checkpoint, ``load_state_dict(torch.load(folder + "/fpp.pt"))`` before
        ``trainer.train(resume_from_checkpoint=folder)``, as the model is packed if it was; else a
        FoldpruneWarning says so.
        """
        from transformers import TrainerCallback
        from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

        fpp = self

        class FPPCallback(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
                if state.global_step and not fpp._steps:
                    text = (
                        f"training goes on after step {state.global_step}, but FPP is at its "
                        f"beginning; if it pruned this model before, load {_FPP_FILE} from the "
                        "checkpoint's folder by load_state_dict, before trainer.train()"
                    )
                    warnings.warn(text, FoldpruneWarning, stacklevel=2)
                fpp.attach(known.get("optimizer"))

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                before = fpp.done
                fpp.step()
                if fpp.done and not before:  # what was the best has weights that are gone now
                    state.best_metric = state.best_model_checkpoint = None

            def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                folder = f"{args.output_dir}/{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
                if state.is_world_process_zero and os.path.isdir(folder):
                    saved = fpp.state_dict()
                    write_atomically(f"{folder}/{_FPP_FILE}", lambda path: torch.save(saved, path))

        return FPPCallback()

    def state_dict(self) -> dict[str, Any]:
        """Steps, masks and statistics, to be saved beside the model's and the optimiser's."""
        return {
            "steps": self._steps,
            "share": self._share,
            "packed": self._packed,
            "keep": {n: m.keep for n, m in self._matrices.items() if m.keep is not None},
            "block": {n: m.block for n, m in self._matrices.items()},
            "sums": {n: m.sums for n, m in self._matrices.items()},
            "count": {n: m.count for n, m in self._matrices.items()},
            "history": [dataclasses.asdict(event) for event in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``state_dict``; before the model's and the optimiser's states are loaded, as
        the model is packed if it was."""
        if state["sums"].keys() != self._matrices.keys():
            raise ModelError("the state is that of another model or recipe")
        for name, matrix in self._matrices.items():
            keep, sums = state["keep"].get(name), state["sums"][name]
            if sums.shape != matrix.sums.shape or (
                keep is not None and keep.shape != matrix.weight.shape
            ):
                raise ModelError(f"{name!r}: the state is that of a matrix of another shape")
        for name, matrix in self._matrices.items():
            keep = state["keep"].get(name)
            matrix.keep = None if keep is None else keep.clone()
            matrix.block = tuple(state["block"][name])
            matrix.sums, matrix.count = state["sums"][name].clone(), state["count"][name]
        self._steps, self._share = state["steps"], state["share"]
        self._watch.active = not self.done
        self.history = [Event(**event) for event in state["history"]]
        if state["packed"]:
            self.pack()


def _own_loss(model: nn.Module, value: Any) -> torch.Tensor:
    args, kwargs = Batch(model, value, 0).arguments
    loss = getattr(model(*args, **kwargs), "loss", None)
    if not isinstance(loss, torch.Tensor):
        raise ModelError(
            f"{type(model).__name__} gives no loss for the held batch: put labels in it, or pass "
            "loss="
        )
    return loss.mean()


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
