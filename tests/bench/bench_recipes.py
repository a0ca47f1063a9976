"""What each part of the tables' recipe costs: MiniLM-L6 compressed by it, or with one part left
whole or otherwise, and recovered for some steps on the classification sets' texts; cosine of its
sentence embeddings to the dense model's on held-out texts, before and after.

    python tests/bench/bench_recipes.py --steps 100
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from dataclasses import replace

import models

import foldprune.torch as fpt
from foldprune.eval.protocols import Classification
from foldprune.eval.students import PAPER_RECIPE

HELD = 20  # batches
RECIPES = {
    "the recipe": PAPER_RECIPE,
    "dense rows of rank 1": replace(PAPER_RECIPE, irc=1, irc_fpp=None),
    "whole queries and keys": replace(PAPER_RECIPE, irc=None, irc_fpp=None),
    "whole values": replace(PAPER_RECIPE, dwc=None),
    "whole queries, keys and values": replace(PAPER_RECIPE, irc=None, irc_fpp=None, dwc=None),
    "whole embeddings": replace(PAPER_RECIPE, fpp_on=("feed_forward", "attention_output")),
    "whole feed-forward and output": replace(PAPER_RECIPE, fpp_on=("embedding",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    args = parser.parse_args()
    budget = replace(Classification.standard_paper, recovery=args.steps + HELD)
    with tempfile.TemporaryDirectory() as folder:
        table = Classification(budget, budget, Classification.sets, folder)
        students = table.students(Classification.model, budget)
    dense, held = students.dense.eval(), students.recovery[-HELD:]
    print("| | qkv removed | model removed | cosine at once | recovered |\n|---|---|---|---|---|")
    for name in args.recipes:
        compressed = fpt.compress(
            dense,
            students.batches,
            recipe=RECIPES[name],
            calibration=students.calibration,
            progress=False,
        )
        student = fpt.convert(copy.deepcopy(dense).requires_grad_(True), compressed)
        student.embeddings.requires_grad_(False)
        before = models.cosine(student.eval(), dense, held)
        fpt.recover(
            student,
            dense,
            students.recovery[:-HELD],
            steps=args.steps,
            lr=budget.recovery_lr,
            layerwise=0.0,
            progress=False,
        )
        after = models.cosine(student.eval(), dense, held)
        totals = compressed.report.totals
        print(
            f"| {name} | {totals['qkv'].removed:.1%} | {totals['model'].removed:.1%} | "
            f"{before:.3f} | {after:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
