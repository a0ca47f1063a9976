"""OWL and the choice of rotary planes by norm, in torch, for comparison on models of LLaMA's kind;
magnitude, Wanda and SparseGPT are ``foldprune.eval.baselines``'s.

OWL: Yin et al., arXiv 2310.05175.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from foldprune.eval import baselines

OWL_M, OWL_LAMBDA = 5.0, 0.08

Progress = Callable[[int, int, str], None]


def linear_layers(block: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {n: m for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}


def block_rates(model: Any, rates: Sequence[float]) -> dict[str, float]:
    """The rate of every linear matrix of the blocks, from one for every block."""
    return {
        f"model.layers.{i}.{name}.weight": rate
        for i, (block, rate) in enumerate(zip(model.model.layers, rates, strict=True))
        for name in linear_layers(block)
    }


def owl_outliers(model: Any, batches: Sequence[torch.Tensor], progress: Progress) -> list[float]:
    """Per block the share of Wanda's scores above M times their mean, in the dense model."""
    shares: list[float] = []

    def visit(i: int, matrices: list[tuple[str, torch.Tensor, torch.Tensor]]) -> None:
        scores = torch.cat([baselines.wanda_scores(w, x).flatten() for _, w, x in matrices])
        shares.append(float((scores > OWL_M * scores.mean()).float().mean()))

    baselines.visit_blocks(model, batches, baselines.squares, visit, progress)
    return shares


def owl_rates(outliers: Sequence[float], rate: float) -> list[float]:
    """Per block: lower where there are more outliers, 2 lambda between the extremes, ``rate`` on
    average."""
    shares = torch.tensor(outliers, dtype=torch.float64)
    shares = (shares - shares.min()) / (shares.max() - shares.min()) * 2 * OWL_LAMBDA
    return (rate - (shares - shares.mean())).tolist()


@torch.no_grad()
def keep_planes_by_norm(model: Any, planes: int) -> None:
    """Keeps those planes of every key head, and of the query heads it serves, whose weights are
    largest, |W_q,p| |W_k,p|: the others' query rows become zero. Plane p of a head is its rows p
    and p + d/2."""
    config = model.config
    groups, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    for block in model.model.layers:
        attention = block.self_attn
        query = attention.q_proj.weight.view(groups, -1, 2, dim // 2, config.hidden_size)
        key = attention.k_proj.weight.view(groups, 2, dim // 2, config.hidden_size)
        sizes = query.square().sum((1, 2, 4)) * key.square().sum((1, 3))
        for group, order in zip(query, sizes.argsort(dim=1), strict=True):
            group[:, :, order[: dim // 2 - planes]] = 0
