"""Mixtral: LLaMA's attention, and experts as feed-forward layers. Checkpoints have a tensor for
every expert's matrix; transformers 5 fuses them in memory into tensors of three dimensions."""

from dataclasses import replace

from .llama import LLAMA
from .schema import FeedForward, Slot

_EXPERT = "block_sparse_moe.experts.*"

MIXTRAL = replace(
    LLAMA,
    name="mixtral",
    model_types=("mixtral",),
    feed_forward=FeedForward(
        gate=Slot(f"{_EXPERT}.w1"), up=Slot(f"{_EXPERT}.w3"), down=Slot(f"{_EXPERT}.w2")
    ),
    block_dense=(
        *LLAMA.block_dense,
        r"(block_sparse_moe|mlp)\.gate\.weight",
        r"mlp\.experts\.(gate_up_proj|down_proj)",
    ),
    note="experts are pruned where each has its own tensors, as in checkpoints",
)
