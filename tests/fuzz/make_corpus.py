"""Writes the seeds in corpus/: a small compressed file, its header, and bytes for the others."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import reference
import targets

import foldprune
from foldprune import Recipe
from foldprune.tensor_files import SafetensorsFile


def main() -> None:
    state = reference.bert_state(layers=1, d=16, ff=24, vocab=10)
    state["lm_head.decoder.weight"] = state["embeddings.word_embeddings.weight"]
    recipe = Recipe(fpp=0.5, irc=2, dwc=1)
    sample = targets.CORPUS / "sample.safetensors"
    foldprune.compress(state, recipe=recipe, num_heads=2).save(sample)
    rng = np.random.default_rng(0)
    seeds = {
        "file": [sample.read_bytes(), b"", b"\x02" + bytes(7) + b"{}"],
        "header": [SafetensorsFile(str(sample)).metadata["foldprune"].encode()],
        "restore": [rng.bytes(200) for _ in range(4)],
        "unpack": [rng.bytes(2000) for _ in range(4)],
    }
    for target, all_data in seeds.items():
        (targets.CORPUS / target).mkdir(parents=True, exist_ok=True)
        for i, data in enumerate(all_data):
            (targets.CORPUS / target / f"seed-{i}").write_bytes(data)


if __name__ == "__main__":
    main()
