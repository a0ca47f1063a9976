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
    """What every run may spend. Sequences of at most ``length`` tokens, ``batch`` of them a step.

    ``calibration``: sequences to calibrate on; ``recovery``: steps towards the dense model's
    outputs; ``steps``: of training, on labels or next tokens; ``test``: rows of a test split, or
    tokens of a text. Steps and learning rates are the same for all methods; ``paper_...`` are those
    for what the recipe paper, or others in its place, made, if they differ: little is left there to
    spoil, and much to be learnt.
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
    def longest_recovery(self) -> int:
        return max(self.recovery, self.paper_recovery or 0)

    def training_lr(self, rate: Rate) -> float:
        return (self.paper_lr if rate == PAPER else None) or self.lr


class Protocol(ABC):
    """How a table's runs are made. ``corpus``: the sets whose training text is for calibration and
    recovery; ``folder``: where models may be kept. What runs share is made once."""

    name: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]
    sets: ClassVar[tuple[str, ...]]
    quick_sets: ClassVar[tuple[str, ...]]
    references: ClassVar[tuple[str, ...]] = (DENSE,)  # what the methods are compared with
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

        lr = settings.training_lr(rate)
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
        count = settings.calibration + settings.longest_recovery * settings.batch
        unlabelled = _mixed([self.dataset(name) for name in self.corpus], count)
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
    references = (ORIGINAL, DENSE)
    labelled = False
    model = models.SMOLLM2
    rates = (0.2, 0.4, 0.7, PAPER)
    budget = Budget(
        length=512,
        batch=2,
        calibration=32,
        recovery=0,  # next tokens teach more in the same time
        recovery_lr=1e-4,
        steps=64,
        lr=3e-4,
        test=4096,
    )
    quick_budget = replace(budget, length=128, calibration=4, steps=2, test=512)

    def __init__(self, settings: Budget, corpus: Sequence[str], folder: str) -> None:
        super().__init__(settings, corpus, folder)
        self.model_of = cache(models.language_model)
        self.tokens = cache(self._tokens)
        self.students = lru_cache(1)(self._students)  # with its calibration it is large
        self._last: tuple[tuple[Any, ...], tuple[torch.nn.Module, dict[str, Any]]] | None = None

    def run(
        self, model: str, method: str, rate: Rate, name: str, seed: int, progress: Progress
    ) -> dict[str, Any]:
        module, facts = self._trained(model, seed, method, rate, progress)
        tokens, size = self.tokens(model, name)
        found = perplexity(
            module, tokens, window=self.settings.length, bytes=size, progress=progress
        )
        metrics = {"perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte}
        return {**metrics, "tokens": found.tokens, **facts}

    def _trained(
        self, model: str, seed: int, method: str, rate: Rate, progress: Progress
    ) -> tuple[torch.nn.Module, dict[str, Any]]:
        """For all sets; the last one is kept."""
        key = model, seed, method, rate
        if self._last is None or self._last[0] != key:
            self._last = None  # before there is another
            students, batches = self.students(model, seed)
            module, removed = students.module(method, rate, progress)
            steps = 0 if method == ORIGINAL else self._train(module, rate, batches, progress)
            self._last = key, (module, {**removed, "steps": steps})
        return self._last[1]

    def _train(
        self, module: torch.nn.Module, rate: Rate, batches: list[torch.Tensor], progress: Progress
    ) -> int:
        settings, endless = self.settings, cycle(batches)

        def loss() -> torch.Tensor:
            ids = next(endless)
            logits = module(input_ids=ids, use_cache=False).logits[:, :-1]
            return torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), ids[:, 1:].flatten()
            )

        trained = [p for p in module.train().parameters() if p.requires_grad]
        lr = settings.training_lr(rate)
        done = train(trained, loss, steps=settings.steps, lr=lr, progress=progress)
        module.eval()
        return done

    def _tokens(self, model: str, name: str) -> tuple[torch.Tensor, int]:
        """The first tokens of the test split, and the bytes that they stand for."""
        _, tokenizer = self.model_of(model)
        ids = _encode(tokenizer, self.dataset(name).test.texts, self.settings.test)
        return ids, len(tokenizer.decode(ids).encode())

    def _students(self, model: str, seed: int) -> tuple[Students, list[torch.Tensor]]:
        """And the batches to train on."""
        settings = self.settings
        dense, tokenizer = self.model_of(model)
        steps = settings.longest_recovery + settings.steps
        count = settings.calibration + steps * settings.batch
        rng = np.random.default_rng(seed)
        parts = []  # sequences of every set
        for name in self.corpus:
            documents = list(self.dataset(name).train.texts)
            rng.shuffle(documents)
            ids = _encode(tokenizer, documents, -(-count // len(self.corpus)) * settings.length)
            whole = len(ids) // settings.length * settings.length
            parts.append(ids[:whole].reshape(-1, settings.length))
        rows = torch.cat(parts)
        rows = rows[torch.from_numpy(rng.permutation(len(rows))[:count])]
        batches = list(torch.split(rows, settings.batch))
        first = -(-settings.calibration // settings.batch)
        second = first + settings.longest_recovery
        named = [{"input_ids": batch} for batch in batches]
        students = Students(
            dense,
            named[:first],
            named[first:second] or named,
            steps=settings.recovery,
            lr=settings.recovery_lr,
            paper_steps=settings.paper_recovery,
            paper_lr=settings.paper_recovery_lr,
            facts={"model": model, "seed": seed, **self.facts()},
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
