"""Other people's pruning, in torch, written from their papers, for comparison: magnitude, Wanda,
SparseGPT and OWL on models of LLaMA's kind. All change the model's weights in place.

Wanda: Sun et al., arXiv 2306.11695. SparseGPT: Frantar & Alistarh, arXiv 2301.00774. OWL: Yin et
al., arXiv 2310.05175.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch

BLOCK_COLS = 128  # of SparseGPT
DAMPING = 0.01
OWL_M, OWL_LAMBDA = 5.0, 0.08

Progress = Callable[[int, int, str], None]
# a block's number, and of its matrices the weight (out x in) and the statistic of the input
Visit = Callable[[int, list[tuple[torch.Tensor, torch.Tensor]]], None]


# ---- one matrix ---------------------------------------------------------------------------------


def smallest(scores: torch.Tensor, rate: float) -> torch.Tensor:
    """Mask of the share ``rate`` of all scores that is smallest."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().argsort()[: int(rate * scores.numel())]] = True
    return mask.view_as(scores)


def magnitude(weight: torch.Tensor, rate: float) -> None:
    weight[smallest(weight.abs(), rate)] = 0


def wanda_scores(weight: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """|W_ij| ||x_j||, with the mean square of every input."""
    return weight.abs() * squares.sqrt()


def wanda(weight: torch.Tensor, squares: torch.Tensor, rate: float) -> None:
    """In every output row those of least score."""
    order = wanda_scores(weight, squares).argsort(dim=1, stable=True)
    weight.scatter_(1, order[:, : int(rate * weight.shape[1])], 0)


def sparsegpt_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def sparsegpt_sweep(weight: torch.Tensor, factor: torch.Tensor, rate: float) -> None:
    """The mask of each block of columns is chosen when the sweep arrives at it, over all rows; the
    columns to the right make up for what is removed."""
    cols = weight.shape[1]
    for start in range(0, cols, BLOCK_COLS):
        end = min(start + BLOCK_COLS, cols)
        block, inner = weight[:, start:end].clone(), factor[start:end, start:end]
        mask = smallest((block / inner.diagonal()).square(), rate)
        errors = torch.zeros_like(block)
        for j in range(end - start):
            kept = block[:, j].masked_fill(mask[:, j], 0)
            errors[:, j] = (block[:, j] - kept) / inner[j, j]
            block[:, j:] -= torch.outer(errors[:, j], inner[j, j:])
            block[:, j] = kept
        weight[:, start:end] = block
        weight[:, end:] -= errors @ factor[start:end, end:]


def sparsegpt(weight: torch.Tensor, hessian: torch.Tensor, rate: float) -> None:
    sparsegpt_sweep(weight, sparsegpt_factor(hessian), rate)


# ---- a model ------------------------------------------------------------------------------------


def linear_layers(block: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {n: m for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}


@torch.no_grad()
def prune_magnitude(model: Any, rate: float) -> None:
    for block in model.model.layers:
        for layer in linear_layers(block).values():
            magnitude(layer.weight, rate)


def prune_wanda(
    model: Any, batches: Sequence[torch.Tensor], rates: Sequence[float], progress: Progress
) -> None:
    """``rates``: one for every block."""

    def visit(i: int, matrices: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for weight, squares in matrices:
            wanda(weight, squares, rates[i])

    visit_blocks(model, batches, _squares, visit, progress)


def prune_sparsegpt(
    model: Any, batches: Sequence[torch.Tensor], rates: Sequence[float], progress: Progress
) -> None:
    """``rates``: one for every block."""

    def visit(i: int, matrices: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for weight, hessian in matrices:
            sparsegpt(weight, hessian, rates[i])

    visit_blocks(model, batches, _products, visit, progress)


def owl_outliers(model: Any, batches: Sequence[torch.Tensor], progress: Progress) -> list[float]:
    """Per block the share of Wanda's scores above M times their mean, in the dense model."""
    shares: list[float] = []

    def visit(i: int, matrices: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        scores = torch.cat([wanda_scores(w, squares).flatten() for w, squares in matrices])
        shares.append(float((scores > OWL_M * scores.mean()).float().mean()))

    visit_blocks(model, batches, _squares, visit, progress)
    return shares


def owl_rates(outliers: Sequence[float], rate: float) -> list[float]:
    """Per block: lower where there are more outliers, 2 lambda between the extremes, ``rate`` on
    average."""
    shares = torch.tensor(outliers, dtype=torch.float64)
    shares = (shares - shares.min()) / (shares.max() - shares.min()) * 2 * OWL_LAMBDA
    return (rate - (shares - shares.mean())).tolist()


# ---- block by block -----------------------------------------------------------------------------


@torch.no_grad()
def visit_blocks(
    model: Any,
    batches: Sequence[torch.Tensor],
    statistic: Callable[[torch.Tensor], torch.Tensor],
    visit: Visit,
    progress: Progress,
) -> None:
    """Block by block: the statistic (rows x in -> sum over rows) of every matrix's inputs is
    taken, ``visit`` changes the weights, and the block is run again for the next one's inputs."""
    calls = _first_calls(model, batches)
    rows = sum(batch.numel() for batch in batches)
    blocks = model.model.layers
    for i, block in enumerate(blocks):
        layers = linear_layers(block)
        sums = _run_counting(block, layers, calls, statistic)
        visit(i, [(layer.weight, sums[name] / rows) for name, layer in layers.items()])
        calls = [(_hidden(block(hidden, **kwargs)), kwargs) for hidden, kwargs in calls]
        progress(i + 1, len(blocks), "blocks")


def _squares(x: torch.Tensor) -> torch.Tensor:
    return x.square().sum(0)


def _products(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x


Call = tuple[torch.Tensor, dict[str, Any]]


class _Caught(Exception):
    """Ends a forward pass at the first block."""


def _first_calls(model: Any, batches: Sequence[torch.Tensor]) -> list[Call]:
    """What the first block is called with."""
    calls: list[Call] = []

    def catch(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args[0], kwargs))
        raise _Caught

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in batches:
            with suppress(_Caught):
                model(batch, use_cache=False)
    finally:
        handle.remove()
    return calls


def _hidden(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _run_counting(
    block: torch.nn.Module,
    layers: dict[str, torch.nn.Linear],
    calls: list[Call],
    statistic: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Sums of the statistic of the layers' inputs; layers that read the same tensor one after
    another share the work."""
    sums: dict[str, torch.Tensor] = {}
    last: list[torch.Tensor | None] = [None, None]

    def count(name: str, _: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        if args[0] is not last[0]:
            last[:] = [args[0], statistic(args[0].flatten(0, -2))]
        assert last[1] is not None
        sums[name] = sums[name] + last[1] if name in sums else last[1]

    handles = [m.register_forward_pre_hook(partial(count, n)) for n, m in layers.items()]
    try:
        for hidden, kwargs in calls:
            block(hidden, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return sums


# ---- rotary planes ------------------------------------------------------------------------------


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
