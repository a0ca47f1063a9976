"""Gemma 1 to 3: LLaMA's names, norms that multiply by 1 + weight. Gemma 2 caps the logits after
query and key have met; Gemma 3 normalises both before."""

from dataclasses import replace

from .llama import LLAMA
from .schema import Attention

assert isinstance(LLAMA.attention, Attention)
GEMMA = replace(
    LLAMA,
    name="gemma",
    model_types=("gemma", "gemma2", "gemma3_text"),
    attention=replace(LLAMA.attention, norm_offset=1.0),
    block_dense=(*LLAMA.block_dense, r"(pre|post)_feedforward_layernorm\.weight"),
    note="norms multiply by 1 + weight",
)
