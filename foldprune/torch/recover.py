"""Recovery: a compressed student learns its dense teacher's outputs, on unlabelled text."""

from __future__ import annotations

import math
import os
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch

from ..container import write_atomically
from ..errors import FoldpruneWarning, ModelError
from ..options import Progress, reporter
from .calibrate import check_batches, prepared
from .matching import Objective, sites
from .sequential import without_cache

__all__ = ["Recovery", "recover"]


@dataclass
class Recovery:
    """What a recovery came to.

    Attributes
    ----------
    losses
        Of every step that was taken.
    held
        (step, loss on the held-out batches), of every evaluation; empty without such batches.
    best
        The step after which the student had the weights that it has now.
    stopped
        None if all steps were taken, else the reason.
    """

    losses: list[float] = field(default_factory=list)
    held: list[tuple[int, float]] = field(default_factory=list)
    best: int = 0
    stopped: str | None = None


def recover(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    batches: Iterable[Any],
    *,
    steps: int,
    lr: float = 2e-4,
    layerwise: float = 0.5,
    temperature: float = 2.0,
    optimizer: torch.optim.Optimizer | None = None,
    held: Iterable[Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 100,
    seed: int = 0,
    progress: Progress | bool | None = True,
    threads: int | None = None,
) -> Recovery:
    """Trains a student, in place, to give its teacher's outputs on unlabelled text.

    First the layers are matched: the loss is the mean, over all blocks, of the relative squared
    errors of the attention's output and of the block's output (of the former over all tokens, of
    the latter token by token, as single tokens can be larger than all others). Then the model's
    outputs: where it has logits, their Kullback-Leibler divergence at ``temperature``; else the
    relative squared errors of the last hidden states and of their mean over a sequence. Padding
    takes no part. Parameters with ``requires_grad`` train; of a model from
    ``foldprune.torch.convert`` these are the kept weights and the folded heads alone. Both models
    run in eval mode, without dropout, and are afterwards in the mode they were in. A remainder of
    DWC that was fitted with data can hold large numbers that cancel each other, and then diverges
    in training at any useful rate: recover with the value folded to "slice" or "pivot".

    Parameters
    ----------
    student, teacher
        Models with the same blocks, usually a converted and the dense one. They share no
        parameters.
    batches
        As ``foldprune.torch.calibrate`` takes them. A sequence is shuffled in every epoch; another
        iterable is run through in its own order, again and again if it can be.
    steps
        Number of steps of the optimizer, each on one batch.
    lr
        Largest learning rate of AdamW without weight decay: reached after a tenth of the steps, it
        falls to 0 as a cosine does. Gradients are clipped to a norm of 1.
    layerwise
        Share of the steps that match layers, in [0, 1].
    temperature
        Of both models' logits.
    optimizer
        One of the student's parameters, in place of AdamW. Its own learning rates are the largest.
    held
        Batches that are not trained on, kept in memory. The student ends with the weights that
        were best on them (by the last loss in use; those at the start count too), else with the
        last.
    checkpoint
        A file that the state of the run is written to every ``every`` steps, whole or not at all.
        Where it is there already, the run goes on from it, to the very bits of a run without a
        stop (iterables that are read in their own order must give the same batches again).
    every
        Steps between checkpoints, and between evaluations on ``held``.
    seed
        Of the order of the batches.
    progress
        True for a bar with the loss on standard error, or a function called with
        (done, total, text).
    threads
        Torch's number of threads; by default it is left as it is.

    Returns
    -------
    Recovery
        After Ctrl-C, a loss that is not finite (with a warning; the student then has its last good
        weights) or the end of an iterator too: ``stopped`` says which.

    Raises
    ------
    ModelError
        (ValueError) models of different shapes or of unknown architecture, a batch that they do not
        take, nothing to train, a checkpoint of another run.
    TypeError, ValueError
        Arguments of other kinds.
    """
    _check_arguments(student, teacher, steps, every, lr, layerwise, temperature)
    for given in (batches, held):
        check_batches(given)
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    if not trained:
        raise ModelError(f"{type(student).__name__}: no parameter has requires_grad")
    if {id(p) for p in trained.values()} & {id(p) for p in teacher.parameters()}:
        raise ModelError("student and teacher share parameters: compress a copy.deepcopy")
    matched = sites(student, teacher) if layerwise else []
    objective = Objective(student, teacher, matched, temperature)
    if optimizer is None:
        optimizer = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=0.0)
    settings = {
        "steps": steps, "layerwise": layerwise, "temperature": temperature, "every": every,
        "seed": seed, "optimizer": type(optimizer).__name__,
        "lr": [group["lr"] for group in optimizer.param_groups],
    }  # fmt: skip
    feed = _Feed(batches, seed)
    kept_out = None if held is None else list(held)
    if kept_out == []:
        raise ModelError("held: there are no batches")
    with ExitStack() as stack:
        report = stack.enter_context(reporter(progress, "recovering"))
        for context in (prepared(teacher), without_cache(teacher), without_cache(student)):
            stack.enter_context(context)
        stack.enter_context(_running(student, threads))
        run = _Run(student, trained, optimizer, objective, feed, kept_out, settings)
        path = None if checkpoint is None else os.fspath(checkpoint)
        run.begin(path)
        try:
            while run.step < steps and run.result.stopped is None:
                run.advance(report, path)
        except KeyboardInterrupt:
            run.result.stopped = "interrupted"
        run.finish()
    if run.result.stopped is not None and run.result.stopped != "interrupted":
        warnings.warn(run.result.stopped, FoldpruneWarning, stacklevel=2)
    return run.result


def _check_arguments(
    student: Any,
    teacher: Any,
    steps: Any,
    every: Any,
    lr: float,
    layerwise: float,
    temperature: float,
) -> None:
    for name, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"{name}: expected a torch module, got {type(model).__name__}")
    for name, count in (("steps", steps), ("every", every)):
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"{name}={count!r}: expected a whole number")
        if count < 1:
            raise ValueError(f"{name}={count}: expected at least 1")
    if not 0 <= layerwise <= 1:
        raise ValueError(f"layerwise={layerwise!r}: the share of the steps lies in [0, 1]")
    for name, value in (("lr", lr), ("temperature", temperature)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}={value!r}: expected a number above 0")


@contextmanager
def _running(student: torch.nn.Module, threads: int | None) -> Iterator[None]:
    """Eval mode with gradients, on so many threads; afterwards as before, whatever happens."""
    training = {module: module.training for module in student.modules()}
    before = torch.get_num_threads()
    try:
        student.eval()
        if threads is not None:
            torch.set_num_threads(threads)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(before)
        for module, flag in training.items():
            module.training = flag


# ---- batches, again and again -------------------------------------------------------------------


class _Ended(Exception):
    """An iterator has no more batches."""


class _Feed:
    """The batches in the order of training, and how far it has come: ``epoch``, ``position`` in
    it, and the state of all random numbers when it began, which an iterable may draw its order
    from."""

    def __init__(self, batches: Any, seed: int) -> None:
        self.batches, self.seed = batches, seed
        self.indexed = isinstance(batches, Sequence) or (
            hasattr(batches, "__getitem__") and hasattr(batches, "__len__")
        )
        if self.indexed and not len(batches):
            raise ModelError("there are no batches: a recovery needs data")
        self.epoch = self.position = 0
        self.random: dict[str, Any] = {}
        self._iterator: Iterator[Any] | None = None

    def _begin(self) -> Iterator[Any]:
        self.random = _random_state()
        if not self.indexed:
            return iter(self.batches)
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.batches), generator=generator).tolist()
        return (self.batches[i] for i in order)

    def next(self) -> Any:
        while True:
            if self._iterator is None:
                self._iterator = self._begin()
            with suppress(StopIteration):
                value = next(self._iterator)
                self.position += 1
                return value
            if not self.position:
                raise ModelError("there are no batches: a recovery needs data")
            if self._iterator is self.batches:
                raise _Ended
            self.epoch, self.position, self._iterator = self.epoch + 1, 0, None

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "random": self.random}

    def restore(self, state: dict[str, Any]) -> None:
        _set_random_state(state["random"])
        self.epoch, self.position = state["epoch"], 0
        self._iterator = self._begin()
        self.position = state["position"]
        if self.position and next(islice(self._iterator, self.position - 1, None), self) is self:
            raise ModelError(
                f"the batches are fewer than the {self.position} that the run has read already"
            )


def _random_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))


# ---- the run ------------------------------------------------------------------------------------


class _Run:
    """Steps of the optimizer. ``good``: the trained weights that were best on the held-out batches,
    or without these the last that ``every`` steps gave and that a finite loss followed."""

    diverged = False

    def __init__(
        self,
        student: torch.nn.Module,
        trained: dict[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        feed: _Feed,
        held: list[Any] | None,
        settings: dict[str, Any],
    ) -> None:
        self.student, self.trained, self.optimizer = student, trained, optimizer
        self.objective, self.feed = objective, feed
        self.held, self.settings = held, settings
        self.step = 0
        self.result = Recovery()
        self.good: dict[str, torch.Tensor] = {}
        self.good_loss = math.inf

    def begin(self, path: str | None) -> None:
        if path is not None and os.path.exists(path):
            self._restore(path)
        else:
            self.evaluate()

    def advance(self, report: Progress, path: str | None) -> None:
        """One step."""
        settings, steps = self.settings, self.settings["steps"]
        layers = self.step < round(settings["layerwise"] * steps)
        loss_of = self.objective.layers if layers else self.objective.output
        try:
            value = self.feed.next()
        except _Ended:
            self.result.stopped = f"the batches ended after {self.step} of {steps} steps"
            return
        loss = loss_of(value, self.feed.position - 1)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        number = loss.item()
        if not (math.isfinite(number) and torch.isfinite(norm)):
            self.result.stopped = (
                f"the loss ({number:g}) or its gradient ({float(norm):g}) is not finite at "
                f"step {self.step}: the student has the weights of step {self.result.best}; try a "
                "smaller lr"
            )
            self.diverged = True
            return
        if self.held is None and self.step % settings["every"] == 0:
            self._keep()  # now that they are known to be good
        for group, peak in zip(self.optimizer.param_groups, settings["lr"], strict=True):
            group["lr"] = peak * _schedule(self.step, steps)
        self.optimizer.step()
        self.step += 1
        self.result.losses.append(number)
        report(self.step, steps, f"{'layers' if layers else 'output'} {number:.4g}")
        if self.step % settings["every"] == 0 or self.step == steps:
            self.evaluate()
            if path is not None:
                self._save(path)

    def evaluate(self) -> None:
        """Notes the weights if they are the best so far on the held-out batches, if there are
        any."""
        if self.held is None:
            return
        objective = self.objective
        last = objective.layers if self.settings["layerwise"] == 1 else objective.output
        with torch.no_grad():
            losses = [last(value, i).item() for i, value in enumerate(self.held)]
        loss = math.fsum(losses) / len(losses)
        self.result.held.append((self.step, loss))
        if loss < self.good_loss:
            self.good_loss = loss
            self._keep()

    def _keep(self) -> None:
        self.good = {name: p.detach().clone() for name, p in self.trained.items()}
        self.result.best = self.step

    def finish(self) -> None:
        self.optimizer.zero_grad()
        if self.held is None and not self.diverged:
            self.result.best = self.step
            return
        with torch.no_grad():
            for name, value in self.good.items():
                self.trained[name].copy_(value)

    # ---- checkpoints ----------------------------------------------------------------------------

    def _save(self, path: str) -> None:
        state = {
            "settings": self.settings,
            "step": self.step,
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "feed": self.feed.state(),
            "random": _random_state(),
            "good": self.good,
            "good_loss": self.good_loss,
            "losses": self.result.losses,
            "held": self.result.held,
            "best": self.result.best,
        }
        write_atomically(path, partial(torch.save, state))

    def _restore(self, path: str) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            settings = state["settings"]
        except OSError:
            raise
        except Exception as error:  # torch raises many kinds for damaged files
            reason = str(error).partition("\n")[0]
            raise ModelError(f"{path}: not a checkpoint of a recovery: {reason}") from None
        for name, value in self.settings.items():
            if settings.get(name) != value:
                raise ModelError(
                    f"{path} is of a run with {name}={settings.get(name)!r}, this one has "
                    f"{value!r}: take that, or another file"
                )
        try:
            self.student.load_state_dict(state["student"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"{path} is of another student or optimizer: {error}") from None
        self.step, self.good, self.good_loss = state["step"], state["good"], state["good_loss"]
        self.result = Recovery(state["losses"], state["held"], state["best"])
        self.feed.restore(state["feed"])
        _set_random_state(state["random"])


def _schedule(step: int, steps: int) -> float:
    """Share of the largest learning rate: linear warm-up, then half a cosine."""
    warm = max(1, steps // 10)
    return min((step + 1) / warm, (1 + math.cos(math.pi * step / steps)) / 2)
