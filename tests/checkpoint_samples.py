"""Small compressed checkpoints for the tests of files, and how two are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import reference

import foldprune
from foldprune import Recipe

STATES: dict[str, Callable[..., dict[str, np.ndarray]]] = {
    "bert": reference.bert_state,
    "llama": reference.llama_state,
}


def sha256(state: dict[str, Any]) -> dict[str, str]:
    """Of every tensor's dtype, shape and bytes."""
    out = {}
    for name, value in state.items():
        if isinstance(value, np.ndarray):
            data, kind = np.ascontiguousarray(value).tobytes(), value.dtype.name
        else:
            import torch

            data = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            kind = str(value.dtype)
        text = f"{kind}{tuple(value.shape)}".encode()
        out[name] = hashlib.sha256(text + data).hexdigest()
    return out


def sample(seed: int = 0, **recipe: Any) -> foldprune.Compressed:
    """A small checkpoint with every kind of encoding in it."""
    state = reference.bert_state(d=32, ff=48, vocab=40, seed=seed)
    state["lm_head.decoder.weight"] = state["embeddings.word_embeddings.weight"]
    state["embeddings.position_ids"] = np.arange(32)[None]
    fields = {"fpp": 0.6, "irc": 3, "dwc": 2, **recipe}
    return foldprune.compress(state, recipe=Recipe(**fields), num_heads=4)
