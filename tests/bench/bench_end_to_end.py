"""Whole models, dense and running compressed: sentences encoded by MiniLM, prefill and decoding of
SmolLM2-135M, memory. Every configuration runs in a process of its own.

    python tests/bench/bench_end_to_end.py [--threads 1 2] [--recipes pruned-0.7 folded]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import torch
import transformers

import foldprune
from foldprune import Recipe
from foldprune.torch import convert, to_compressed

GROUPS = ("embedding", "feed_forward", "attention_output", "qkv")
# data-free, as only speed and memory are looked at here
RECIPES = {
    "pruned-0.5": Recipe(fpp=0.5, fpp_on=GROUPS),
    "pruned-0.7": Recipe(fpp=0.7, fpp_on=GROUPS),
    "folded": Recipe(fpp=0.7, fpp_on=GROUPS, irc=8, dwc="pivot"),
}
PROMPT, NEW, SENTENCES = 512, 128, 1000


def weight_bytes(model: torch.nn.Module) -> int:
    """Of all parameters and buffers, shared ones once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def best(function: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times)


# ---- one configuration --------------------------------------------------------------------------


def load(name: str, folder: Path) -> Any:
    return torch.load(folder / f"{name}.pt", weights_only=False)


@torch.inference_mode()
def measure_minilm(model: Any, repeats: int) -> dict[str, float]:
    _, tokenizer = models.minilm()
    sentences = sorted(models.wikitext_sentences(SENTENCES), key=len)
    batches = models.sentence_batches(tokenizer, sentences)

    def encode() -> None:
        for batch in batches:
            model(**batch)

    model(**batches[0])
    return {"encode": len(sentences) / best(encode, repeats)}


@torch.inference_mode()
def measure_smollm2(model: Any, repeats: int) -> dict[str, float]:
    ids = torch.load(Path(os.environ["FOLDPRUNE_BENCH"]) / "ids.pt")
    model(ids[:, :8])
    prefill = best(lambda: model(ids, logits_to_keep=1), 3 * repeats)  # it takes a second

    def decode() -> None:
        cache = transformers.DynamicCache(config=model.config)
        token = ids[:, :1]
        for _ in range(NEW):
            logits = model(token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)

    return {"prefill": PROMPT / prefill, "decode": NEW / best(decode, repeats)}


@torch.inference_mode()
def difference(name: str, model: Any, folder: Path) -> float:
    """Largest difference from the dense model with the weights of the compressed one, relative to
    its largest output."""
    dense = load(name, folder)
    dense.load_state_dict(to_compressed(model).state_dict("torch"))
    if name == "minilm":
        sentences = models.wikitext_sentences(32)
        (batch,) = models.sentence_batches(models.minilm()[1], sentences)
        one, other = (models.embed(m, batch) for m in (dense, model))
    else:
        ids = torch.load(folder / "ids.pt")[:, :128]
        one, other = dense(ids).logits, model(ids).logits
    return float((one - other).abs().max() / one.abs().max())


def worker(name: str, kind: str, threads: int, repeats: int, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(threads)
    model = load(name, folder)
    if kind != "dense":
        recipe, dtype = kind.split()
        model = convert(model, foldprune.load(folder / f"{name}-{recipe}.safetensors"), dtype=dtype)
    measure = measure_minilm if name == "minilm" else measure_smollm2
    result: dict[str, Any] = {"weights": weight_bytes(model), **measure(model, repeats)}
    result |= {"resident": resident()}
    result["peak"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if kind != "dense":
        result["difference"] = difference(name, model, folder)
    return result


# ---- all of them --------------------------------------------------------------------------------


def prepare(name: str, folder: Path) -> None:
    model = models.minilm()[0] if name == "minilm" else models.smollm2()
    torch.save(model, folder / f"{name}.pt")
    for recipe, settings in RECIPES.items():
        foldprune.compress(model, recipe=settings).save(folder / f"{name}-{recipe}.safetensors")
    if name == "smollm2":
        torch.save(models.wikitext_tokens(1, PROMPT), folder / "ids.pt")


def rows(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    kinds = ["dense"]
    kinds += [f"{recipe} {dtype}" for recipe in arguments.recipes for dtype in arguments.dtypes]
    for name in arguments.models:
        if not (folder / f"{name}.pt").exists():
            prepare(name, folder)
        for threads in arguments.threads:
            for kind in kinds:
                command = [sys.executable, __file__, "--worker", name, kind, str(threads)]
                command += ["--repeats", str(arguments.repeats)]
                environment = {**os.environ, "FOLDPRUNE_BENCH": str(folder)}
                done = subprocess.run(command, env=environment, check=True, capture_output=True)
                found = json.loads(done.stdout)
                yield {"model": name, "threads": threads, "kind": kind, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["minilm", "smollm2"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where prepared models are kept")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        name, kind, threads = arguments.worker
        folder = Path(os.environ["FOLDPRUNE_BENCH"])
        print(json.dumps(worker(name, kind, int(threads), arguments.repeats, folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        dense: dict[str, Any] = {}
        for row in rows(arguments, folder):
            name, threads, kind = row.pop("model"), row.pop("threads"), row.pop("kind")
            dense = row if kind == "dense" else dense
            figures = []
            for key, value in row.items():
                if key == "difference":
                    figures.append(f"{key} {value:.1e}")
                elif key in ("weights", "resident", "peak"):
                    figures.append(f"{key} {value / 1e6:.0f} MB ({value / dense[key]:.2f})")
                else:
                    figures.append(f"{key} {value:.1f}/s ({value / dense[key]:.2f})")
            print(f"{name} {threads} thread(s) {kind}: {', '.join(figures)}", flush=True)


if __name__ == "__main__":
    main()
