"""Compression of real checkpoints: exactness, quality without data, sizes, and speed against
torch's pruning.

    python tests/bench/bench_compress.py

Prints one table per question; needs the packages that tests/bench/models.py names.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from typing import Any

import models
import numpy as np
import torch
import torch.nn.utils.prune as torch_prune

import foldprune
from foldprune import Recipe

SPEED_RUNS = 5


def line(*cells: object) -> None:
    first, *rest = (f"{c:.4f}" if isinstance(c, float) else str(c) for c in cells)
    print("  " + first.ljust(34) + "".join(c.rjust(16) for c in rest))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@torch.no_grad()
def lossless(name: str, model: Any, run: Any) -> None:
    """Outputs of the unmodified model with the compressed weights, against the original's."""
    original = {key: value.clone() for key, value in model.state_dict().items()}
    before = run(model)
    compressed = foldprune.compress(model, rate=0)
    model.load_state_dict(compressed.state_dict(), strict=True)
    after = run(model)
    model.load_state_dict(original)
    totals = compressed.report.totals
    checked = foldprune.verify(original, compressed)
    line(
        name,
        f"{relative(after, before):.1e}",
        f"{float((after - before).abs().max()):.1e}",
        f"{totals['qkv'].removed:.2%}",
        f"{totals['model'].removed:.2%}",
        checked.lossless,
    )


def quality(model: Any, batch: Any) -> None:
    original = {key: value.clone() for key, value in model.state_dict().items()}
    dense = models.embed(model, batch)
    cases: list[tuple[str, dict[str, Any]]] = [
        (f"IRC r={r}", {"recipe": Recipe(irc=r)}) for r in (24, 16, 8, 4, 2, 1)
    ]
    cases += [
        ("DWC slice", {"recipe": Recipe(dwc="slice")}),
        ("DWC pivot", {"recipe": Recipe(dwc="pivot")}),
        ("DWC remainder 16", {"recipe": Recipe(dwc=16)}),
        ("FPP 0.3, each tensor", {"recipe": Recipe(fpp=0.3, fpp_scope="tensor")}),
        ("recipe paper", {"recipe": Recipe.paper()}),
    ]
    cases += [(f"rate {rate}", {"rate": rate}) for rate in (0.1, 0.2, 0.3, 0.4, 0.5)]
    for name, arguments in cases:
        compressed = foldprune.compress(original, **arguments)
        model.load_state_dict(compressed.state_dict(), strict=True)
        cosine = float((models.embed(model, batch) * dense).sum(-1).mean())
        totals = compressed.report.totals
        line(
            name,
            cosine,
            f"{totals['qkv'].removed:.2%}",
            f"{totals['model'].removed:.2%}",
            f"{totals['model'].bytes_removed:.2%}",
        )
    model.load_state_dict(original)


def language_model(model: Any, ids: torch.Tensor) -> None:
    original = {key: value.clone() for key, value in model.state_dict().items()}
    original["lm_head.weight"] = original["model.embed_tokens.weight"]  # tied, as in the model
    line("dense", models.perplexity(model, ids))
    for rate in (0.1, 0.2, 0.3):
        compressed = foldprune.compress(original, rate, config=model.config)
        model.load_state_dict(compressed.state_dict(), strict=True)
        totals = compressed.report.totals
        line(
            f"rate {rate}",
            models.perplexity(model, ids),
            *(f"{totals[g].removed:.2%}" for g in ("qkv", "feed_forward", "embedding", "model")),
        )
    model.load_state_dict(original)


def paper_at_bert_base() -> None:
    """The share of QKV at BERT-base's shape, on random weights."""
    from transformers import BertConfig, BertModel

    compressed = foldprune.compress(BertModel(BertConfig()), recipe=Recipe.paper())
    totals = compressed.report.totals
    for group in ("qkv", "qkv with output", "feed_forward", "embedding", "model"):
        line(group, f"{totals[group].removed:.2%}", f"{totals[group].bytes_removed:.2%}")


def speed(model: Any) -> None:
    """compress(sd, 0.7) with FPP alone, against global_unstructured on the same matrices."""
    names = [
        row.name
        for row in foldprune.compress(model, recipe=Recipe(fpp=0.7)).report.rows
        if "FPP" in row.method
    ]
    state_dict = {key: value.clone() for key, value in model.state_dict().items()}

    ours, theirs = [], []
    for _ in range(SPEED_RUNS):
        start = time.perf_counter()
        compressed = foldprune.compress(state_dict, 0.7, recipe=Recipe(fpp=0.7))
        ours.append(time.perf_counter() - start)

        model.load_state_dict(state_dict)
        modules = [(model.get_submodule(n.rpartition(".")[0]), "weight") for n in names]
        start = time.perf_counter()
        torch_prune.global_unstructured(
            modules, pruning_method=torch_prune.L1Unstructured, amount=0.7
        )
        theirs.append(time.perf_counter() - start)
        different = 0
        for (module, _), name in zip(modules, names, strict=True):
            mask = module.weight_mask.numpy() != 0
            different += int((mask != (compressed[name] != 0)).sum())
            torch_prune.remove(module, "weight")
    model.load_state_dict(state_dict)
    dense = sum(v.numel() * v.element_size() for v in state_dict.values())
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.safetensors")
        compressed.save(path)
        size = os.path.getsize(path)
    ratio = statistics.median(theirs) / statistics.median(ours)
    line("foldprune.compress, seconds", statistics.median(ours))
    line("torch global_unstructured, seconds", statistics.median(theirs))
    line("ratio", f"{ratio:.1f} x")
    line("elements on which the masks differ", different)
    pruned = sum(compressed[name].nbytes for name in names)
    packed = sum(compressed.report[name].stored_bytes for name in names)
    line("pruned tensors, packed / dense bytes", packed / pruned)
    line("whole file / dense bytes", size / dense)


def determinism(model: Any) -> None:
    """The same bytes from one and two threads."""
    for name, arguments in (
        ("rate 0.3", {"rate": 0.3}),
        ("recipe paper", {"recipe": Recipe.paper()}),
    ):
        parts = []
        for threads in (1, 2):
            compressed = foldprune.compress(model, threads=threads, **arguments)
            parts.append(
                [p.tobytes() for e in compressed.encodings.values() for p in e.parts().values()]
            )
        line(name, "same" if parts[0] == parts[1] else "DIFFERENT")


DIGEST = """
import hashlib, sys, foldprune
compressed = foldprune.compress(sys.argv[1], recipe=foldprune.Recipe(fpp=0.7))
digest = hashlib.sha256()
for encoding in compressed.encodings.values():
    for part in encoding.parts().values():
        digest.update(part.tobytes())
print(digest.hexdigest())
"""


def variants() -> None:
    """Masks and packed values of FPP at 70 %, from every kernel variant that runs here."""
    digests = {}
    for isa, (compiled, runs) in foldprune._core.isas().items():
        if compiled and runs:
            done = subprocess.run(
                [sys.executable, "-c", DIGEST, models.minilm_folder()],
                env={**os.environ, "FOLDPRUNE_ISA": isa},
                capture_output=True,
                text=True,
                check=True,
            )
            digests[isa] = done.stdout.strip()
    for isa, digest in digests.items():
        line(isa, "same" if digest == digests["scalar"] else "DIFFERENT", digest[:12])


def main() -> None:
    warnings.simplefilter("ignore", foldprune.FoldpruneWarning)
    bert, tokenizer = models.minilm()
    sentences = models.wikitext_sentences(256)
    batch = tokenizer(sentences, padding=True, truncation=True, max_length=64, return_tensors="pt")
    llama = models.smollm2()
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 49152, (1, 512)))

    print("Lossless level (rate=0), outputs of the unmodified Hugging Face model")
    line("", "relative", "largest", "QKV removed", "model removed", "verified")
    lossless("MiniLM-L6", bert, lambda m: m(**batch).last_hidden_state)
    lossless("SmolLM2-135M", llama, lambda m: m(ids).logits)

    print(
        "\nMiniLM-L6 without data: cosine of 256 WikiText-2 sentences' embeddings to the dense "
        "model's"
    )
    line("", "cosine", "QKV removed", "model removed", "bytes removed")
    quality(bert, batch)

    print("\nSmolLM2-135M without data: perplexity of WikiText-2's first 6 x 512 test tokens")
    line("", "perplexity", "QKV removed", "FFN removed", "emb. removed", "model removed")
    language_model(llama, models.wikitext_tokens(6, 512))

    print("\nRecipe paper at BERT-base's shape (random weights)")
    line("", "removed", "bytes removed")
    paper_at_bert_base()

    print(
        f"\nFPP alone at 70 %, MiniLM-L6, median of {SPEED_RUNS} ({torch.get_num_threads()} "
        "threads)"
    )
    speed(bert)

    print("\nThreads 1 and 2")
    determinism(bert)

    print("\nKernel variants")
    variants()


if __name__ == "__main__":
    main()
