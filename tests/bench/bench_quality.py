"""Quality and time of calibrated compression, side by side with other methods on the same
calibration data.

    python tests/bench/bench_quality.py [SECTION ...] [--log results.jsonl]

The sections are perplexity, time, irc, rope, knob-lm and knob-encoder; by default all are run. With
--log every finished configuration is a line of that file and is not computed again (after a change
to the code, delete the lines that it touches). Tables go to standard output, progress to standard
error. --layers 2 --tokens 4x128 --test 4x128 tries the bench itself. Needs the packages that
tests/bench/models.py names.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar

import baselines
import models
import torch

import foldprune
import foldprune.torch
from foldprune import Calibration, Recipe, Report, _core
from foldprune.eval.baselines import prune as prune_others
from foldprune.eval.baselines import sparsegpt_factor, sparsegpt_sweep
from foldprune.eval.runlog import RunLog
from foldprune.fit import SEARCH_DAMPING, Gram
from foldprune.recipe import GROUPS

Progress = Callable[[int, int, str], None]
Result = dict[str, Any]

BLOCK_GROUPS = ("qkv", "attention_output", "feed_forward")
# matrices of a block that read the same input
SHARED_INPUTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
TIMED_RATE, TIMED_RUNS = 0.7, 3
TEST_SENTENCES = 256
IRC_RANKS = (24, 16, 8, 4, 1)
ROPE_PLANES = 16
BLOCK_RATES = (0.5, 0.6, 0.7)
KNOB_RATES = (0.1, 0.2, 0.3, 0.4, 0.5)


# ---- output -------------------------------------------------------------------------------------


def line(*cells: object) -> None:
    first, *rest = (f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells)
    print("  " + first.ljust(34) + "".join(c.rjust(16) for c in rest), flush=True)


class Log(RunLog):
    """Results of finished configurations, kept in a file if there is one."""

    def get(self, config: Result, compute: Callable[[Progress], Result]) -> Result:
        """The result of a configuration, computed if it is not known yet."""
        found = self.find(config)
        if found is None:
            label = " ".join(f"{name}={value}" for name, value in config.items())
            found = compute(stage(label))
            self.add(config, found)
        return found


def stage(label: str) -> Progress:
    """Progress of one configuration on standard error: a line now and then."""
    last = -float("inf")

    def report(done: int, total: int, name: str) -> None:
        nonlocal last
        if time.monotonic() - last > 15:
            last = time.monotonic()
            print(f"[{time.strftime('%H:%M:%S')}] {label}: {done}/{total} {name}", file=sys.stderr)

    report(0, 0, "")
    return report


# ---- the two models -----------------------------------------------------------------------------


class Subject:
    """A model, its data, and how well it does with other weights."""

    metric: str
    knob_metrics: ClassVar[dict[str, bool]]  # and whether they fall as the model gets worse

    def __init__(self, model: Any, batches: list[Any], data: Result) -> None:
        self.model, self.batches, self.data = model.requires_grad_(False), batches, data
        self.original = {name: value.clone() for name, value in model.state_dict().items()}

    def score(self) -> float:
        raise NotImplementedError

    def closeness(self) -> Result:
        """The knob's metrics other than the score."""
        return {}

    @cached_property
    def calibration(self) -> Calibration:
        return foldprune.torch.calibrate(self.model, self.batches, progress=stage("calibration"))

    def load(self, compressed: foldprune.Compressed) -> None:
        self.model.load_state_dict(compressed.state_dict("torch"), strict=True)

    def evaluate(self, change: Callable[[], Result | None]) -> Result:
        """What is measured after ``change`` of the model's weights, which are then restored."""
        start = time.perf_counter()
        try:
            facts = change() or {}
            seconds = time.perf_counter() - start
            return {self.metric: self.score(), "seconds": seconds, **facts}
        finally:
            self.model.load_state_dict(self.original)

    def compressed(self, progress: Progress, *args: Any, **options: Any) -> Report:
        """Compresses the model block by block, and loads the result."""
        options["progress"] = progress
        options["calibration"] = self.calibration
        compressed = foldprune.torch.compress(self.model, self.batches, *args, **options)
        self.load(compressed)
        return compressed.report


class LanguageModel(Subject):
    """SmolLM2-135M and WikiText-2."""

    metric = "perplexity"
    knob_metrics: ClassVar = {"perplexity": False, "divergence": False}

    def __init__(self, args: argparse.Namespace) -> None:
        train = models.wikitext_tokens(*args.tokens, "train")
        data = {"tokens": list(train.shape), "test": list(args.test), "layers": args.layers}
        model = models.smollm2()
        if args.layers is not None:
            model.model.layers = model.model.layers[: args.layers]
            model.config.num_hidden_layers = len(model.model.layers)
        super().__init__(model, list(train.split(2)), data)
        self.test = models.wikitext_tokens(*args.test)
        self.dense = copy.deepcopy(model)

    def score(self) -> float:
        return models.perplexity(self.model, self.test)

    def closeness(self) -> Result:
        """What little is lost at low rates drowns in the text's own noise of the perplexity."""
        return {"divergence": models.divergence(self.model, self.dense, self.test)}

    def zeros(self) -> float:
        """Share of zeros in the blocks' linear matrices."""
        layers = [baselines.linear_layers(block).values() for block in self.model.model.layers]
        weights = [layer.weight for block in layers for layer in block]
        return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


class Encoder(Subject):
    """MiniLM-L6 and sentences of WikiText-2."""

    metric = "cosine"
    knob_metrics: ClassVar = {"cosine": True}

    def __init__(self, args: argparse.Namespace) -> None:
        model, tokenizer = models.minilm()
        if args.layers is not None:
            model.encoder.layer = model.encoder.layer[: args.layers]
            model.config.num_hidden_layers = len(model.encoder.layer)
        train = models.wikitext_sentences(args.sentences, "train")
        batches = models.sentence_batches(tokenizer, train)
        super().__init__(model, batches, {"sentences": len(train), "layers": args.layers})
        test = models.wikitext_sentences(TEST_SENTENCES)
        self.test = models.sentence_batches(tokenizer, test)
        self.dense = self.embeddings()

    def embeddings(self) -> torch.Tensor:
        return torch.cat([models.embed(self.model, batch) for batch in self.test])

    def score(self) -> float:
        """Mean cosine to the dense model's embeddings."""
        return float((self.embeddings() * self.dense).sum(-1).mean())


class Bench:
    """What the sections share; models are loaded when a section needs them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.log = args, Log(args.log)

    @cached_property
    def language_model(self) -> LanguageModel:
        return LanguageModel(self.args)

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.args)


# ---- perplexity ---------------------------------------------------------------------------------


def block_recipe(rate: float, **fields: Any) -> Recipe:
    return Recipe(fpp=rate, fpp_on=BLOCK_GROUPS, **{"fpp_scope": "tensor", **fields})


def owl_outliers(bench: Bench) -> list[float]:
    lm = bench.language_model
    config = {"section": "perplexity", "method": "owl_outliers", **lm.data}
    found = bench.log.get(
        config, lambda p: {"outliers": baselines.owl_outliers(lm.model, lm.batches, p)}
    )
    return found["outliers"]


def prune(bench: Bench, method: str, rate: float, progress: Progress) -> None:
    """Leaves the language model pruned by one of METHODS."""
    lm = bench.language_model
    uniform = [rate] * len(lm.model.model.layers)
    if method in ("magnitude", "wanda", "sparsegpt", "owl"):
        rates = baselines.owl_rates(owl_outliers(bench), rate) if method == "owl" else uniform
        named = baselines.block_rates(lm.model, rates)
        published = "sparsegpt" if method == "owl" else method
        prune_others(lm.model, published, named, lm.batches, progress=progress)
    elif method == "uniform":
        lm.compressed(progress, recipe=block_recipe(rate))
    elif method == "owl-spread":
        rates = baselines.owl_rates(owl_outliers(bench), rate)
        overrides = {f"model.layers.{i}.*": {"fpp": rates[i]} for i in range(len(rates))}
        lm.compressed(progress, recipe=block_recipe(rate, overrides=overrides))
    elif method == "allocated":
        lm.compressed(progress, recipe=block_recipe(rate, fpp_scope="global"))
    elif method == "one-shot":
        recipe = block_recipe(rate, fpp_scope="global")
        lm.load(foldprune.compress(lm.model, recipe=recipe, calibration=lm.calibration))


METHODS = {
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "owl": "SparseGPT, OWL's spread",
    "uniform": "foldprune, uniform",
    "owl-spread": "foldprune, OWL's spread",
    "allocated": "foldprune, allocated",
    "one-shot": "foldprune, allocated, one shot",
}


def perplexity(bench: Bench) -> None:
    lm = bench.language_model

    def result(method: str, rate: float) -> Result:
        def compute(progress: Progress) -> Result:
            if method in ("uniform", "owl-spread", "allocated", "one-shot"):
                _ = lm.calibration  # not in its seconds, as all of these use it
            elif method in ("owl", "owl-spread"):
                owl_outliers(bench)  # likewise
            return lm.evaluate(lambda: change(progress))

        def change(progress: Progress) -> Result:
            if method != "dense":
                prune(bench, method, rate, progress)
            return {"zeros": lm.zeros()}

        config = {"section": "perplexity", "method": method, "rate": rate, **lm.data}
        return bench.log.get(config, compute)

    tokens, test = ("{} x {}".format(*shape) for shape in (lm.data["tokens"], lm.test.shape))
    print(
        f"\nSmolLM2-135M, WikiText-2 perplexity of {test} test tokens, calibrated on {tokens} of "
        "train; all linear matrices of the blocks (seconds: without OWL's outliers and the dense "
        "model's statistics)"
    )
    line("", "perplexity", "to SparseGPT", "zeros", "seconds")
    line("dense", result("dense", 0.0)["perplexity"])
    for rate in bench.args.rates or BLOCK_RATES:
        print(f"  -- {rate:.0%} --")
        reference = None
        for method in bench.args.methods:
            found = result(method, rate)
            if method == "sparsegpt":
                reference = found["perplexity"]
            ratio = f"{found['perplexity'] / reference:.3f}" if reference else ""
            line(
                METHODS[method],
                f"{found['perplexity']:.2f}",
                ratio,
                f"{found['zeros']:.2%}",
                f"{found['seconds']:.1f}",
            )


# ---- time ---------------------------------------------------------------------------------------


def timed(bench: Bench, progress: Progress) -> Result:
    """Seconds for all matrices of the blocks, their inputs' second moments given. torch's
    SparseGPT factors a Hessian for every matrix, as published; foldprune one for every input."""
    lm, threads = bench.language_model, bench.args.threads
    theirs = {"factor": 0.0, "sweep": 0.0}
    ours = {part: [0.0] * TIMED_RUNS for part in ("factor", "sweep", "least squares")}
    blocks = lm.model.model.layers

    def block_times(i: int) -> None:
        for names in SHARED_INPUTS:
            layers = [blocks[i].get_submodule(name) for name in names]
            moments = lm.calibration.moments(f"model.layers.{i}.{names[0]}")
            assert moments is not None
            second = moments.second
            hessian = torch.from_numpy(second).float()
            for layer in layers:
                clock = Clock()
                factor = sparsegpt_factor(hessian)
                theirs["factor"] += clock.lap()
                sparsegpt_sweep(layer.weight.clone(), factor, TIMED_RATE)
                theirs["sweep"] += clock.lap()
            for run in range(TIMED_RUNS):
                clock = Clock()
                damped = Gram.damped(second, SEARCH_DAMPING)
                a, d = _core.obs_factor(damped, threads)
                ours["factor"][run] += clock.lap()
                for layer in layers:
                    weight = layer.weight.numpy()
                    count = round(TIMED_RATE * weight.size)
                    clock = Clock()
                    mask, _ = _core.obs_sweep(weight, a, d, "block", count, threads=threads)
                    ours["sweep"][run] += clock.lap()
                    _core.refit(weight, mask, damped, threads=threads)
                    ours["least squares"][run] += clock.lap()

    for i in range(len(blocks)):
        block_times(i)
        progress(i + 1, len(blocks), "blocks")
    medians = {part: statistics.median(runs) for part, runs in ours.items()}
    return {"torch": theirs, "foldprune": medians}


class Clock:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        self.start, seconds = now, now - self.start
        return seconds


def times(bench: Bench) -> None:
    lm, threads = bench.language_model, bench.args.threads
    config = {"section": "time", "rate": TIMED_RATE, "threads": threads, **lm.data}
    found = bench.log.get(config, lambda progress: timed(bench, progress))
    theirs, ours = found["torch"], found["foldprune"]
    sums = [part["factor"] + part["sweep"] for part in (theirs, ours)]
    print(
        f"\nSmolLM2-135M, seconds for all linear matrices of the blocks at {TIMED_RATE:.0%}, "
        f"statistics given, threads: {threads} (foldprune: median of {TIMED_RUNS})"
    )
    line("", "torch SparseGPT", "foldprune", "ratio")
    for part in ("factor", "sweep"):
        line(part, f"{theirs[part]:.2f}", f"{ours[part]:.2f}", f"{theirs[part] / ours[part]:.1f} x")
    line("both", f"{sums[0]:.2f}", f"{sums[1]:.2f}", f"{sums[0] / sums[1]:.1f} x")
    line("exact least squares", "", f"{ours['least squares']:.2f}")


# ---- folds --------------------------------------------------------------------------------------


def fold_result(bench: Bench, subject: Subject, section: str, recipe: Recipe, data: bool) -> Result:
    """A recipe's result, with or without the calibration."""
    fold = {name: value for name in ("irc", "dwc") if (value := getattr(recipe, name)) is not None}
    config = {"section": section, **fold, "calibrated": data, **subject.data}

    def change() -> Result:
        calibration = subject.calibration if data else None
        compressed = foldprune.compress(subject.model, recipe=recipe, calibration=calibration)
        subject.load(compressed)
        return {"qkv_removed": compressed.report.totals["qkv"].removed}

    return bench.log.get(config, lambda progress: subject.evaluate(change))


def irc(bench: Bench) -> None:
    encoder = bench.encoder
    print(
        f"\nMiniLM-L6, mean cosine of the embeddings of {TEST_SENTENCES} WikiText-2 test sentences "
        f"to the dense model's, calibrated on {encoder.data['sentences']} of train"
    )
    line("", "without data", "calibrated", "qkv removed")
    cases = [(f"IRC r={r}", Recipe(irc=r)) for r in IRC_RANKS]
    cases += [(f"DWC {mode}", Recipe(dwc=mode)) for mode in ("pivot", "slice")]
    cases += [(f"DWC remainder {k}", Recipe(dwc=k)) for k in (16, 8)]
    for name, recipe in cases:
        free, fitted = (fold_result(bench, encoder, "irc", recipe, d) for d in (False, True))
        line(
            name,
            f"{free['cosine']:.4f}",
            f"{fitted['cosine']:.4f}",
            f"{fitted['qkv_removed']:.1%}",
        )


def rope(bench: Bench) -> None:
    lm = bench.language_model
    config = {"section": "rope", "method": "norm", "planes": ROPE_PLANES, **lm.data}
    recipe = Recipe(irc=ROPE_PLANES)

    def change() -> None:
        baselines.keep_planes_by_norm(lm.model, ROPE_PLANES)

    dim = lm.model.config.head_dim // 2
    print(f"\nSmolLM2-135M with {ROPE_PLANES} of {dim} planes a head, WikiText-2 perplexity")
    line("", "perplexity")
    norm = bench.log.get(config, lambda progress: lm.evaluate(change))
    line("planes by |W_q| |W_k|", norm["perplexity"])
    for name, data in (("foldprune without data", False), ("foldprune, calibrated", True)):
        line(name, fold_result(bench, lm, "rope", recipe, data)["perplexity"])


# ---- the one knob -------------------------------------------------------------------------------


def knob_lm(bench: Bench) -> None:
    knob(bench, "SmolLM2-135M", bench.language_model)


def knob_encoder(bench: Bench) -> None:
    knob(bench, "MiniLM-L6", bench.encoder)


def knob(bench: Bench, name: str, subject: Subject) -> None:
    print(f"\n{name}, one rate for the whole model, against uniform FPP of as many numbers")
    metrics = subject.knob_metrics
    pairs = [column for metric in metrics for column in (metric, "uniform")]
    line("", "numbers removed", "bytes removed", "mean error", *pairs, "uniform bytes")
    results = []
    for rate in bench.args.rates or KNOB_RATES:
        ours, theirs = knob_results(bench, subject, rate)
        results.append((ours, theirs))
        line(
            f"rate {rate}",
            f"{ours['removed']:.2%}",
            f"{ours['bytes_removed']:.2%}",
            f"{ours['error']:.2e}",
            *(found[metric] for metric in metrics for found in (ours, theirs)),
            f"{theirs['bytes_removed']:.2%}",
        )
    for metric, falls in metrics.items():
        curve = [ours[metric] for ours, _ in results]
        better = [(ours[metric] > theirs[metric]) == falls for ours, theirs in results]
        line(f"{metric}: monotone", "yes" if curve == sorted(curve, reverse=falls) else "NO")
        line(f"{metric}: better everywhere", "yes" if all(better) else "NO")


def knob_results(bench: Bench, subject: Subject, rate: float) -> tuple[Result, Result]:
    """Of the rate spread by foldprune, and of FPP alone at one share for all matrices."""

    def facts(report: Report) -> Result:
        total = report.totals["model"]
        matrices = sum(r.numbers for r in report.rows if r.group in GROUPS and len(r.shape) == 2)
        errors = [row.error for row in report.rows if row.error is not None]
        return {
            "removed": total.removed,
            "bytes_removed": total.bytes_removed,
            "error": statistics.fmean(errors),
            "share": (total.numbers - total.stored) / matrices,
            **subject.closeness(),
        }

    def spread(progress: Progress) -> Result:
        return subject.evaluate(lambda: facts(subject.compressed(progress, rate)))

    def uniform(progress: Progress) -> Result:
        recipe = Recipe(fpp=ours["share"], fpp_on=GROUPS, fpp_scope="tensor")
        return subject.evaluate(lambda: facts(subject.compressed(progress, recipe=recipe)))

    config = {"section": "knob", "model": type(subject).__name__, "rate": rate, **subject.data}
    ours = bench.log.get({**config, "spread": "foldprune"}, spread)
    return ours, bench.log.get({**config, "spread": "uniform"}, uniform)


# ---- the command --------------------------------------------------------------------------------

SECTIONS = {
    "perplexity": perplexity,
    "time": times,
    "irc": irc,
    "rope": rope,
    "knob-lm": knob_lm,
    "knob-encoder": knob_encoder,
}


def shape(text: str) -> tuple[int | None, int]:
    """ "64x512" as (64, 512); "all" is every row of 512."""
    if text == "all":
        return None, 512
    rows, length = text.split("x")
    return int(rows), int(length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("sections", nargs="*", metavar="section", help=", ".join(SECTIONS))
    parser.add_argument("--tokens", type=shape, default="64x512", help="to calibrate SmolLM2 on")
    parser.add_argument("--test", type=shape, default="20x512", help='its test tokens, or "all"')
    parser.add_argument("--sentences", type=int, default=2000, help="to calibrate MiniLM on")
    parser.add_argument("--rates", type=float, nargs="+", help="of perplexity and knob")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, help="only the first blocks of the models")
    parser.add_argument("--log", metavar="FILE", help="JSON lines of finished configurations")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"unknown section {unknown.pop()!r}: expected {', '.join(SECTIONS)}")
    warnings.simplefilter("ignore", foldprune.FoldpruneWarning)
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    for section in args.sections or SECTIONS:
        SECTIONS[section](bench)


if __name__ == "__main__":
    main()
