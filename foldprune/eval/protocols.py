"""How the runs of the tables are made: compress, recover, and measure, within one budget.

An encoder is compressed once by each method and rate, calibrated on unlabelled text of the training
splits and recovered on more of it, and then fine-tuned on every set and seed. A language model is
calibrated and compressed on text of the training splits, and then trained on more of it, once for
each seed; its perplexity is measured on every set.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from itertools import cycle
from typing import Any, ClassVar

import numpy as np
import torch

from ..options import Progress
from . import models
from .datasets import Dataset, load
from .finetune import Classifier, Texts, predict, train
from .metrics import classification, perplexity
from .packaged import CLASSIFICATION, LANGUAGE
from .students import DENSE, ORIGINAL, PAPER, Rate, Students
from .table import Metric

__all__ = ["Budget", "Classification", "Language", "Protocol"]


@dataclass(frozen=True)
class Budget:
    """What every run at a rate may spend, whatever its method. Sequences of at most ``length``
    tokens, ``batch`` of them a step.

    ``calibration``: sequences to calibrate on; ``recovery``: steps towards the dense model's
    outputs; ``steps``: of training, on labels or next tokens; ``test``: rows of a test split, or
    tokens of a text.
    """

    length: int
    batch: int
    calibration: int
    recovery: int
    recovery_lr: float
    steps: int
    lr: float
    test: int

    @property
    def texts(self) -> int:
        """Sequences to calibrate on and to recover with."""
        return self.calibration + self.recovery * self.batch


class Protocol(ABC):
    """How a table's runs are made. ``budget``: at a rate, and of what is not compressed;
    ``paper_budget``: for what the recipe paper, or others in its place, made, as little is left
    there to spoil, and much to be learnt; ``corpus``: the sets whose training text is for
    calibration and recovery; ``folder``: where models may be kept. What runs share is made
    once."""

    name: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]
    sets: ClassVar[tuple[str, ...]]
    quick_sets: ClassVar[tuple[str, ...]]
    references: ClassVar[tuple[str, ...]] = (DENSE,)  # what the methods are compared with
    labelled: ClassVar[bool]  # whether its sets are
    model: ClassVar[str]
    rates: ClassVar[tuple[Rate, ...]]
    standard: ClassVar[Budget]
    standard_paper: ClassVar[Budget]
    quick: ClassVar[dict[str, int]]  # what a trial has less of

    def __init__(
        self, budget: Budget, paper_budget: Budget, corpus: Sequence[str], folder: str
    ) -> None:
        self.budget, self.paper_budget = budget, paper_budget
        self.corpus, self.folder = tuple(corpus), folder
        self.dataset = cache(load)

    @classmethod
    def budgets(cls, quick: bool) -> tuple[Budget, Budget]:
        """The table's own, of rates and of the recipe paper."""
        less = cls.quick if quick else {}
        return replace(cls.standard, **less), replace(cls.standard_paper, **less)

    def budget_at(self, rate: Rate) -> Budget:
        return self.paper_budget if rate == PAPER else self.budget

    def facts(self, budget: Budget) -> dict[str, Any]:
        """What results depend on besides a run's own configuration."""
        return {"budget": asdict(budget), "corpus": list(self.corpus)}

    @abstractmethod
    def run(
        self, model: str, method: str, rate: Rate, name: str, seed: int, progress: Progress
    ) -> dict[str, Any]:
        """The metrics, the shares of numbers removed, and other facts."""


# ---- classification -----------------------------------------------------------------------------


class Classification(Protocol):
    name = "classification"
    metrics = (Metric("accuracy", percent=True), Metric("macro_f1", percent=True))
    sets = tuple(CLASSIFICATION)
    quick_sets = ("trec", "sms-spam")
    labelled = True
    model = models.MINILM
    rates = (0.2, 0.4, PAPER)
    standard = Budget(
        length=64,
        batch=32,
        calibration=1024,
        recovery=200,
        recovery_lr=3e-4,
        steps=100,
        lr=3e-4,
        test=1000,
    )
    standard_paper = replace(standard, recovery=1000, recovery_lr=2e-3, lr=1e-3)
    quick: ClassVar = {"calibration": 128, "recovery": 4, "steps": 12, "test": 200}

    def __init__(
        self, budget: Budget, paper_budget: Budget, corpus: Sequence[str], folder: str
    ) -> None:
        super().__init__(budget, paper_budget, corpus, folder)
        self.encoder_of = cache(models.encoder)
        self.students = lru_cache(1)(self._students)  # with its calibration it is large
        self.tokens = cache(self._tokens)

    def facts(self, budget: Budget) -> dict[str, Any]:
        return {**super().facts(budget), "texts": self.texts}

    @property
    def texts(self) -> int:
        """How many unlabelled ones are chosen, for the budget with the most; all take theirs from
        these."""
        return max(self.budget.texts, self.paper_budget.texts)

    def run(
        self, model: str, method: str, rate: Rate, name: str, seed: int, progress: Progress
    ) -> dict[str, Any]:
        budget, data = self.budget_at(rate), self.dataset(name)
        _, tokenizer = self.encoder_of(model)
        encoder, removed = self.students(model, budget).module(method, rate, progress)
        torch.manual_seed(seed)
        classifier = Classifier(encoder, len(data.classes)).train()
        rows = data.train.sample(budget.steps * budget.batch, seed)
        texts = Texts(tokenizer, rows.texts, budget.length)
        groups = texts.endless(budget.batch, np.random.default_rng(seed))

        def loss() -> torch.Tensor:
            group = next(groups)
            labels = torch.tensor([rows.labels[i] for i in group])
            return torch.nn.functional.cross_entropy(classifier(texts.batch(group)), labels)

        steps = train(
            classifier.groups(), loss, steps=budget.steps, lr=budget.lr, progress=progress
        )
        test = data.test.sample(budget.test, 0)
        found = predict(classifier, self.tokens(model, name, budget), budget.batch)
        scores = classification(test.labels, found, classes=len(data.classes))
        facts = {"accuracy": scores.accuracy, "macro_f1": scores.macro_f1, "rows": scores.rows}
        return {**facts, **removed, "steps": steps}

    def _tokens(self, model: str, name: str, budget: Budget) -> Texts:
        """Of the test rows."""
        _, tokenizer = self.encoder_of(model)
        test = self.dataset(name).test.sample(budget.test, 0)
        return Texts(tokenizer, test.texts, budget.length)

    def _students(self, model: str, budget: Budget) -> Students:
        dense, tokenizer = self.encoder_of(model)
        unlabelled = _mixed([self.dataset(name) for name in self.corpus], self.texts)
        rng = np.random.default_rng(0)

        def batches(texts: Sequence[str]) -> list[dict[str, torch.Tensor]]:
            tokens = Texts(tokenizer, texts, budget.length)
            return [tokens.batch(group) for group in tokens.groups(budget.batch, rng)]

        return Students(
            dense,
            batches(unlabelled[: budget.calibration]),
            batches(unlabelled[budget.calibration :] or unlabelled),
            steps=budget.recovery,
            lr=budget.recovery_lr,
            facts={"model": model, **self.facts(budget)},
            folder=os.path.join(self.folder, "models"),
        )


def _mixed(sets: Sequence[Dataset], count: int) -> list[str]:
    """At most ``count`` training texts, from all sets in turn, in random order."""
    share = -(-count // len(sets))
    texts = [text for data in sets for text in data.train.sample(share, 0).texts]
    order = np.random.default_rng(0).permutation(len(texts))[:count]
    return [texts[i] for i in order]


# ---- language modelling -------------------------------------------------------------------------


class Language(Protocol):
    name = "lm"
    metrics = (
        Metric("perplexity", geometric=True),
        Metric("bits_per_byte"),
    )
    sets = tuple(LANGUAGE)
    quick_sets = ("wikitext-2", "shakespeare")
    references = (ORIGINAL, DENSE)
    labelled = False
    model = models.SMOLLM2
    rates = (0.2, 0.4, 0.7, PAPER)
    standard = standard_paper = Budget(
        length=512,
        batch=2,
        calibration=32,
        recovery=0,  # next tokens teach more in the same time
        recovery_lr=1e-4,
        steps=64,
        lr=3e-4,
        test=4096,
    )
    quick: ClassVar = {"length": 128, "calibration": 4, "steps": 2, "test": 512}

    def __init__(
        self, budget: Budget, paper_budget: Budget, corpus: Sequence[str], folder: str
    ) -> None:
        super().__init__(budget, paper_budget, corpus, folder)
        self.model_of = cache(models.language_model)
        self.tokens = cache(self._tokens)
        self.students = lru_cache(1)(self._students)  # with its calibration it is large
        self._last: tuple[tuple[Any, ...], tuple[torch.nn.Module, dict[str, Any]]] | None = None

    def run(
        self, model: str, method: str, rate: Rate, name: str, seed: int, progress: Progress
    ) -> dict[str, Any]:
        budget = self.budget_at(rate)
        module, facts = self._trained(model, seed, method, rate, progress)
        tokens, size = self.tokens(model, name, budget.test)
        found = perplexity(module, tokens, window=budget.length, bytes=size, progress=progress)
        metrics = {"perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte}
        return {**metrics, "tokens": found.tokens, **facts}

    def _trained(
        self, model: str, seed: int, method: str, rate: Rate, progress: Progress
    ) -> tuple[torch.nn.Module, dict[str, Any]]:
        """For all sets; the last one is kept."""
        key = model, seed, method, rate
        if self._last is None or self._last[0] != key:
            self._last = None  # before there is another
            budget = self.budget_at(rate)
            students, batches = self.students(model, seed, budget)
            module, removed = students.module(method, rate, progress)
            steps = 0 if method == ORIGINAL else self._train(module, budget, batches, progress)
            self._last = key, (module, {**removed, "steps": steps})
        return self._last[1]

    def _train(
        self,
        module: torch.nn.Module,
        budget: Budget,
        batches: list[torch.Tensor],
        progress: Progress,
    ) -> int:
        endless = cycle(batches)

        def loss() -> torch.Tensor:
            ids = next(endless)
            logits = module(input_ids=ids, use_cache=False).logits[:, :-1]
            return torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), ids[:, 1:].flatten()
            )

        trained = [p for p in module.train().parameters() if p.requires_grad]
        done = train(trained, loss, steps=budget.steps, lr=budget.lr, progress=progress)
        module.eval()
        return done

    def _tokens(self, model: str, name: str, count: int) -> tuple[torch.Tensor, int]:
        """The first tokens of the test split, and the bytes that they stand for."""
        _, tokenizer = self.model_of(model)
        ids = _encode(tokenizer, self.dataset(name).test.texts, count)
        return ids, len(tokenizer.decode(ids).encode())

    def _students(
        self, model: str, seed: int, budget: Budget
    ) -> tuple[Students, list[torch.Tensor]]:
        """And the batches to train on."""
        dense, tokenizer = self.model_of(model)
        count = budget.texts + budget.steps * budget.batch
        rng = np.random.default_rng(seed)
        parts = []  # sequences of every set
        for name in self.corpus:
            documents = list(self.dataset(name).train.texts)
            rng.shuffle(documents)
            ids = _encode(tokenizer, documents, -(-count // len(self.corpus)) * budget.length)
            whole = len(ids) // budget.length * budget.length
            parts.append(ids[:whole].reshape(-1, budget.length))
        rows = torch.cat(parts)
        rows = rows[torch.from_numpy(rng.permutation(len(rows))[:count])]
        batches = list(torch.split(rows, budget.batch))
        first = -(-budget.calibration // budget.batch)
        second = first + budget.recovery
        named = [{"input_ids": batch} for batch in batches]
        students = Students(
            dense,
            named[:first],
            named[first:second] or named,
            steps=budget.recovery,
            lr=budget.recovery_lr,
            facts={"model": model, "seed": seed, **self.facts(budget)},
            folder=None,  # half a gigabyte each
        )
        return students, batches[second:] or batches


def _encode(tokenizer: Any, documents: Sequence[str], count: int) -> torch.Tensor:
    """The first ``count`` tokens of the documents, parted by empty lines."""
    text, characters = [], 0
    for document in documents:
        text.append(document)
        characters += len(document)
        if characters > 10 * count:  # more than any text has in so many tokens
            break
    joined = "\n\n".join(text)[: 10 * count]
    ids: torch.Tensor = tokenizer(joined, return_tensors="pt").input_ids[0]
    return ids[:count]
