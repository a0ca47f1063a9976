"""Compressed and recovered models of a table: each method and rate is made once."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from .. import torch as runtime
from ..api import compress
from ..calibration import Calibration
from ..compressed import Compressed
from ..container import load
from ..options import Progress
from ..recipe import GROUPS, Recipe
from . import baselines

__all__ = ["DENSE", "FOLDPRUNE", "METHODS", "ORIGINAL", "PAPER", "Students"]

# the model as it came, and with the training that all others have
ORIGINAL, DENSE = "original", "dense"
FOLDPRUNE, PAPER = "foldprune", "paper"
METHODS = (FOLDPRUNE, *baselines.METHODS)
# Pivots are chosen by the calibration, cost no more than slices, and exist where heads share keys;
# four rows of which a quarter is kept say more than one, in as many numbers.
PAPER_RECIPE = replace(Recipe.paper(), irc=4, irc_fpp=0.75, dwc="pivot")
# Short recoveries came closer to the teacher on its outputs alone than with matched layers first.
LAYERWISE = 0.0
Rate = float | str


class Students:
    """Makes the compressed versions of one dense model.

    ``calibration`` and ``recovery``: unlabelled batches, the same for all methods; ``facts``: what
    the models depend on besides method and rate, plain JSON; ``folder``: where they are kept
    (None: only the last one is, in memory). They are recovered for ``steps`` (0: not at all) at
    ``lr``.
    """

    def __init__(
        self,
        dense: torch.nn.Module,
        calibration: Sequence[Any],
        recovery: Sequence[Any],
        *,
        steps: int,
        lr: float,
        facts: Mapping[str, Any],
        folder: str | None,
    ) -> None:
        self.dense = dense.requires_grad_(False)
        self.batches, self.recovery = calibration, recovery
        self.steps, self.lr = steps, lr
        self.facts, self.folder = dict(facts), folder
        self._last: tuple[str, Compressed] | None = None

    def module(
        self, method: str, rate: Rate, progress: Progress
    ) -> tuple[torch.nn.Module, dict[str, float]]:
        """A new module that can be trained, embeddings frozen, and the shares of numbers that were
        removed: of the model and of qkv."""
        module = copy.deepcopy(self.dense).requires_grad_(True)
        removed = {"removed": 0.0, "qkv_removed": 0.0}
        if method in METHODS:
            compressed = self.compressed(method, rate, progress)
            module = runtime.convert(module, compressed)
            totals = compressed.report.totals
            removed = {"removed": totals["model"].removed, "qkv_removed": totals["qkv"].removed}
        _freeze_embeddings(module)
        return module, removed

    def compressed(self, method: str, rate: Rate, progress: Progress) -> Compressed:
        """Compressed on the calibration batches, then recovered."""
        facts = {**self.facts, "method": method, "rate": rate}
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        path = self.folder and os.path.join(self.folder, f"{method}-{rate}-{key}.safetensors")
        if path and os.path.exists(path):
            found = load(path)
        else:
            found = self._recovered(self._compressed(method, rate, progress), progress)
            if path:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                found.save(path)
        self._last = key, found
        return found

    def _compressed(self, method: str, rate: Rate, progress: Progress) -> Compressed:
        if method == FOLDPRUNE:
            recipe = PAPER_RECIPE
            if rate != PAPER:  # no folds, which came out better for both models
                recipe = Recipe(fpp=self._share(rate), fpp_on=GROUPS)
            return runtime.compress(
                self.dense,
                self.batches,
                recipe=recipe,
                calibration=self.calibration,
                progress=progress,
            )
        pruned = copy.deepcopy(self.dense)
        rates = baselines.group_rates(pruned, self._rates(rate))
        masks = baselines.prune(pruned, method, rates, self.batches, progress=progress)
        return baselines.packed(pruned, masks, method)

    def _recovered(self, compressed: Compressed, progress: Progress) -> Compressed:
        if not self.steps:
            return compressed
        student = runtime.convert(copy.deepcopy(self.dense).requires_grad_(True), compressed)
        _freeze_embeddings(student)
        done = runtime.recover(
            student,
            self.dense,
            self.recovery,
            steps=self.steps,
            lr=self.lr,
            layerwise=LAYERWISE,
            progress=progress,
        )
        if done.stopped == "interrupted":  # what is half recovered is not kept
            raise KeyboardInterrupt
        return runtime.to_compressed(student)

    def _rates(self, rate: Rate) -> dict[str, float]:
        """Of the baselines by group. For the paper's recipe the share that it removes from each;
        else one share for all, that takes the rate from the model."""
        if rate == PAPER:
            return baselines.same_rates(compress(self.dense, recipe=PAPER_RECIPE).report)
        return dict.fromkeys(GROUPS, self._share(rate))

    def _share(self, rate: Rate) -> float:
        """Of the matrices' weights, for a rate of all numbers."""
        numbers = sum(p.numel() for p in self.dense.parameters())
        return float(rate) * numbers / baselines.matrices(self.dense)

    @cached_property
    def calibration(self) -> Calibration:
        return runtime.calibrate(self.dense, self.batches, progress=False)


def _freeze_embeddings(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (torch.nn.Embedding, runtime.PackedEmbedding)):
            module.requires_grad_(False)
