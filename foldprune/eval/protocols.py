"""How the runs of the tables are made: compress, recover, and measure, within one budget.

An encoder is compressed once by each method and rate, calibrated on unlabelled text of the training
splits and recovered on more of it, and then fine-tuned on every set and seed. A language model is
compressed and recovered on the training split of the first set, once for each seed, and its
perplexity is measured on every set.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from typing import Any, ClassVar

import numpy as np
import torch

from ..options import Progress
from . import models
from .datasets import Dataset, load
from .finetune import Classifier, Texts, predict, train
from .metrics import classification, perplexity
from .packaged import CLASSIFICATION, LANGUAGE
from .students import PAPER, Rate, Students
from .table import Metric

__all__ = ["Budget", "Classification", "Language", "Protocol"]


@dataclass(frozen=True)
class Budget:
    """What every run may spend. Sequences of at most ``length`` tokens, ``batch`` of them a step.

    ``calibration``: sequences to calibrate on; ``recovery``: steps on unlabelled text;
    ``steps``: of fine-tuning; ``test``: rows of a test split, or tokens of a text. Steps and
    learning rates are the same for all methods; ``paper_...`` are those for what the recipe paper,
    or others in its place, made, if they differ: little is left there to spoil, and much to be
    learnt.
    """

    length: int
    batch: int
    calibration: int
    recovery: int
    recovery_lr: float
    steps: int
    lr: float
    test: int
    paper_recovery: int | None = None
    paper_recovery_lr: float | None = None
    paper_lr: float | None = None

    @property
    def sequences(self) -> int:
        """Of unlabelled text, that the longest recovery does not see any twice."""
        steps = max(self.recovery, self.paper_recovery or 0)
        return self.calibration + steps * self.batch


class Protocol(ABC):
    """How a table's runs are made. ``corpus``: the sets whose training text is for calibration and
    recovery; ``folder``: where models may be kept. What runs share is made once."""

    name: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]
    sets: ClassVar[tuple[str, ...]]
    quick_sets: ClassVar[tuple[str, ...]]
    labelled: ClassVar[bool]  # whether its sets are
    model: ClassVar[str]
    rates: ClassVar[tuple[Rate, ...]]
    budget: ClassVar[Budget]
    quick_budget: ClassVar[Budget]

    def __init__(self, settings: Budget, corpus: Sequence[str], folder: str) -> None:
        self.settings, self.corpus, self.folder = settings, tuple(corpus), folder
        self.dataset = cache(load)

    def facts(self) -> dict[str, Any]:
        """What results depend on besides a run's own configuration."""
        return {"budget": asdict(self.settings), "corpus": list(self.corpus)}

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
    budget = Budget(
        length=64,
        batch=32,
        calibration=1024,
        recovery=200,
        recovery_lr=3e-4,
        steps=100,
        lr=3e-4,
        test=1000,
        paper_recovery=1000,
        paper_recovery_lr=2e-3,
        paper_lr=1e-3,
    )
    quick_budget = replace(
        budget, calibration=128, recovery=4, paper_recovery=4, steps=12, test=200
    )

    def __init__(self, settings: Budget, corpus: Sequence[str], folder: str) -> None:
        super().__init__(settings, corpus, folder)
        self.students = lru_cache(1)(self._students)  # with its calibration it is large
        self.tokens = cache(self._tokens)

    def run(
        self, model: str, method: str, rate: Rate, name: str, seed: int, progress: Progress
    ) -> dict[str, Any]:
        settings, data = self.settings, self.dataset(name)
        students, tokenizer = self.students(model)
        encoder, removed = students.module(method, rate, progress)
        torch.manual_seed(seed)
        classifier = Classifier(encoder, len(data.classes)).train()
        rows = data.train.sample(settings.steps * settings.batch, seed)
        texts = Texts(tokenizer, rows.texts, settings.length)
        groups = texts.endless(settings.batch, np.random.default_rng(seed))

        def loss() -> torch.Tensor:
            group = next(groups)
            labels = torch.tensor([rows.labels[i] for i in group])
            return torch.nn.functional.cross_entropy(classifier(texts.batch(group)), labels)

        lr = (settings.paper_lr if rate == PAPER else None) or settings.lr
        steps = train(classifier.groups(), loss, steps=settings.steps, lr=lr, progress=progress)
        test = data.test.sample(settings.test, 0)
        found = predict(classifier, self.tokens(model, name), settings.batch)
        scores = classification(test.labels, found, classes=len(data.classes))
        facts = {"accuracy": scores.accuracy, "macro_f1": scores.macro_f1, "rows": scores.rows}
        return {**facts, **removed, "steps": steps}

    def _tokens(self, model: str, name: str) -> Texts:
        """Of the test rows."""
        _, tokenizer = self.students(model)
        test = self.dataset(name).test.sample(self.settings.test, 0)
        return Texts(tokenizer, test.texts, self.settings.length)

    def _students(self, model: str) -> tuple[Students, Any]:
        settings = self.settings
        dense, tokenizer = models.encoder(model)
        unlabelled = _mixed([self.dataset(name) for name in self.corpus], settings.sequences)
        rng = np.random.default_rng(0)

        def batches(texts: Sequence[str]) -> list[dict[str, torch.Tensor]]:
            tokens = Texts(tokenizer, texts, settings.length)
            return [tokens.batch(group) for group in tokens.groups(settings.batch, rng)]

        students = Students(
            dense,
            batches(unlabelled[: settings.calibration]),
            batches(unlabelled[settings.calibration :] or unlabelled),
            steps=settings.recovery,
            lr=settings.recovery_lr,
            paper_steps=settings.paper_recovery,
            paper_lr=settings.paper_recovery_lr,
            facts={"model": model, **self.facts()},
            folder=os.path.join(self.folder, "models"),
        )
        return students, tokenizer


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
    labelled = False
    model = models.SMOLLM2
    rates = (0.2, 0.4, 0.7, PAPER)
    budget = Budget(
        length=512,
        batch=2,
        calibration=32,
        recovery=40,
        recovery_lr=1e-4,
        steps=0,
        lr=0.0,
        test=8192,
    )
    quick_budget = replace(budget, length=128, calibration=4, recovery=2, test=512)

    def __init__(self, settings: Budget, corpus: Sequence[str], folder: str) -> None:
        super().__init__(settings, corpus, folder)
        self.model_of = cache(models.language_model)
        self.tokens = cache(self._tokens)
        self.students = lru_cache(1)(self._students)  # with its calibration it is large

    def run(
        self, model: str, method: str, rate: Rate, name: str, seed: int, progress: Progress
    ) -> dict[str, Any]:
        module, removed = self.students(model, seed).module(method, rate, progress)
        tokens, size = self.tokens(model, name)
        measured = perplexity(
            module, tokens, window=self.settings.length, bytes=size, progress=progress
        )
        facts = {"perplexity": measured.perplexity, "bits_per_byte": measured.bits_per_byte}
        return {**facts, "tokens": measured.tokens, **removed}

    def _tokens(self, model: str, name: str) -> tuple[torch.Tensor, int]:
        """The first tokens of the test split, and the bytes that they stand for."""
        _, tokenizer = self.model_of(model)
        ids = _encode(tokenizer, self.dataset(name).test.texts, self.settings.test)
        return ids, len(tokenizer.decode(ids).encode())

    def _students(self, model: str, seed: int) -> Students:
        settings = self.settings
        dense, tokenizer = self.model_of(model)
        documents = list(self.dataset(self.corpus[0]).train.texts)
        np.random.default_rng(seed).shuffle(documents)
        ids = _encode(tokenizer, documents, settings.sequences * settings.length)
        rows = ids[: len(ids) // settings.length * settings.length].reshape(-1, settings.length)
        batches = [{"input_ids": batch} for batch in torch.split(rows, settings.batch)]
        first = -(-settings.calibration // settings.batch)
        return Students(
            dense,
            batches[:first],
            batches[first:] or batches,
            steps=settings.recovery,
            lr=settings.recovery_lr,
            paper_steps=settings.paper_recovery,
            paper_lr=settings.paper_recovery_lr,
            facts={"model": model, "seed": seed, **self.facts()},
            folder=None,  # half a gigabyte each
        )


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
