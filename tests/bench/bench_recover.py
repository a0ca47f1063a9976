"""Rank 1 at once against ranks that fall step by step, values diagonal in both: MiniLM-L6 recovers
on WikiText-2's sentences; cosine of its sentence embeddings to the dense model's on held-out ones.

    python tests/bench/bench_recover.py --folder runs

Both ways take the same number of steps in all. What is done is in the folder, and a run that was
stopped goes on from there. Embeddings are frozen.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
import warnings
from typing import Any

import models
import torch

import foldprune.torch as fpt
from foldprune import Recipe
from foldprune.container import write_atomically

WAYS = {
    "jump": [Recipe(irc=1, dwc="slice")],
    "annealed": [Recipe(irc=rank, dwc="slice") for rank in (8, 2, 1)],
}


def run(way: str, args: argparse.Namespace, teacher: Any, data: dict[str, Any]) -> dict[str, Any]:
    quiet: dict[str, Any] = {"progress": False, "threads": args.threads}
    student, stages = None, []
    for i, recipe in enumerate(WAYS[way]):
        began = time.perf_counter()
        if student is None:
            made = fpt.compress(teacher, data["calibration"], recipe=recipe, **quiet)
            student = fpt.convert(copy.deepcopy(teacher), made)
            student.embeddings.requires_grad_(False)
        else:
            student = fpt.refold(student, teacher, data["calibration"], recipe, **quiet)
        folded, before = time.perf_counter(), models.cosine(student, teacher, data["held"])
        result = fpt.recover(
            student,
            teacher,
            data["train"],
            steps=args.steps // len(WAYS[way]),
            lr=args.lr,
            layerwise=args.layerwise,
            checkpoint=os.path.join(args.folder, f"{way}-{i}.pt"),
            every=50,
            threads=args.threads,
        )
        if result.stopped is not None:
            raise SystemExit(f"{way}: {result.stopped}")
        stages.append(
            {
                "recipe": f"irc {recipe.irc}, dwc {recipe.dwc}",
                "folded": before,
                "recovered": models.cosine(student, teacher, data["held"]),
                "removed of qkv": fpt.to_compressed(student).report.totals["qkv"].removed,
                "seconds": [round(folded - began), round(time.perf_counter() - folded)],
            }
        )
        print(way, stages[-1], flush=True)
    return {"stages": stages, "cosine": stages[-1]["recovered"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--folder", required=True, help="of checkpoints and results")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--steps", type=int, default=120, help="of 32 sentences, in all")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--layerwise", type=float, default=0.75)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    os.makedirs(args.folder, exist_ok=True)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    teacher, tokenizer = models.minilm()

    def batches(split: str, count: int) -> list[Any]:
        sentences = list(dict.fromkeys(models.wikitext_sentences(count, split)))
        return models.sentence_batches(tokenizer, sentences)

    train = batches("train", 8192)
    data = {"train": train, "calibration": train[:16], "held": batches("valid", 256)}
    for way in args.ways:
        path = os.path.join(args.folder, f"{way}.json")
        if not os.path.exists(path):
            text = json.dumps({**vars(args), **run(way, args, teacher, data)}, indent=1)
            write_atomically(path, lambda name, text=text: _write(name, text))
        with open(path) as file:
            print(f"{way}: cosine {json.load(file)['cosine']:.4f}", flush=True)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


if __name__ == "__main__":
    main()
