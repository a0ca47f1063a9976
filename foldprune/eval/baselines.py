"""Other people's pruning, in torch, written from their papers, for comparison: random, magnitude,
Wanda and SparseGPT.

Wanda: Sun et al., arXiv 2306.11695. SparseGPT: Frantar & Alistarh, arXiv 2301.00774. Both are
defined for the linear layers of a model's blocks; embeddings go by magnitude with them. A matrix is
(out x in) here; Conv1D's are seen transposed. Zeros that are there already are the first to go, so
that they count towards the rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from ..compressed import Compressed
from ..encodings import Packed
from ..errors import ModelError, RateError
from ..job import Job
from ..options import Progress, reporter, resolve_threads, silent
from ..prune import Pruned
from ..recipe import GROUPS, Recipe
from ..report import Report
from ..torch.batches import Batch, naming
from ..torch.calibrate import as_tokens, check_batches, prepared, reading

__all__ = [
    "GROUPS",
    "METHODS",
    "group_rates",
    "magnitude",
    "matrices",
    "packed",
    "prune",
    "random",
    "same_rates",
    "sparsegpt",
    "sparsegpt_factor",
    "sparsegpt_sweep",
    "squares",
    "visit_blocks",
    "wanda",
    "wanda_scores",
]

METHODS = ("random", "magnitude", "wanda", "sparsegpt")
BLOCK_COLS = 128  # of SparseGPT
DAMPING = 0.01

# rows x in -> what is summed over the rows
Statistic = Callable[[torch.Tensor], torch.Tensor]
# a block's number, and of its matrices the name, the weight and the mean statistic of the input
Visit = Callable[[int, list[tuple[str, torch.Tensor, torch.Tensor]]], None]
Masks = dict[str, torch.Tensor]


# ---- one matrix: changed in place; what comes back is the mask of what is kept ------------------


def _keep(weight: torch.Tensor, removed: torch.Tensor) -> torch.Tensor:
    weight[removed] = 0
    return ~removed


def _smallest(scores: torch.Tensor, rate: float) -> torch.Tensor:
    """Mask of the share ``rate`` of all scores that is smallest."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().argsort(stable=True)[: int(rate * scores.numel())]] = True
    return mask.view_as(scores)


def random(weight: torch.Tensor, rate: float, generator: torch.Generator) -> torch.Tensor:
    scores = torch.rand(weight.shape, generator=generator).masked_fill(weight == 0, -1)
    return _keep(weight, _smallest(scores, rate))


def magnitude(weight: torch.Tensor, rate: float) -> torch.Tensor:
    return _keep(weight, _smallest(weight.abs(), rate))


def wanda_scores(weight: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """|W_ij| ||x_j||, with the mean square of every input."""
    return weight.abs() * squares.sqrt()


def wanda(weight: torch.Tensor, squares: torch.Tensor, rate: float) -> torch.Tensor:
    """In every output row those of least score."""
    order = wanda_scores(weight, squares).argsort(dim=1, stable=True)
    removed = torch.zeros(weight.shape, dtype=torch.bool)
    removed.scatter_(1, order[:, : int(rate * weight.shape[1])], True)
    return _keep(weight, removed)


def sparsegpt_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def sparsegpt_sweep(weight: torch.Tensor, factor: torch.Tensor, rate: float) -> torch.Tensor:
    """The mask of each block of columns is chosen when the sweep arrives at it, over all rows; the
    columns to the right make up for what is removed."""
    cols = weight.shape[1]
    kept = torch.ones(weight.shape, dtype=torch.bool)
    for start in range(0, cols, BLOCK_COLS):
        end = min(start + BLOCK_COLS, cols)
        block, inner = weight[:, start:end].clone(), factor[start:end, start:end]
        mask = _smallest((block / inner.diagonal()).square(), rate)
        errors = torch.zeros_like(block)
        for j in range(end - start):
            column = block[:, j].masked_fill(mask[:, j], 0)
            errors[:, j] = (block[:, j] - column) / inner[j, j]
            block[:, j:] -= torch.outer(errors[:, j], inner[j, j:])
            block[:, j] = column
        weight[:, start:end] = block
        weight[:, end:] -= errors @ factor[start:end, end:]
        kept[:, start:end] = ~mask
    return kept


def sparsegpt(weight: torch.Tensor, hessian: torch.Tensor, rate: float) -> torch.Tensor:
    return sparsegpt_sweep(weight, sparsegpt_factor(hessian), rate)


def squares(x: torch.Tensor) -> torch.Tensor:
    return x.square().sum(0)


def products(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x


_BY_INPUT: dict[
    str, tuple[Statistic, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]]
] = {"wanda": (squares, wanda), "sparsegpt": (products, sparsegpt)}


# ---- a model ------------------------------------------------------------------------------------


@torch.no_grad()
def prune(
    model: torch.nn.Module,
    method: str,
    rates: Mapping[str, float],
    batches: Iterable[Any] = (),
    *,
    seed: int = 0,
    progress: Progress | bool | None = True,
) -> Masks:
    """Prunes a Hugging Face model in place by one of METHODS.

    Parameters
    ----------
    model
        Of a known architecture (``foldprune.schemas``).
    rates
        For every weight to prune, by name, the share of it to remove, in [0, 1): see
        ``group_rates`` and ``same_rates``.
    batches
        For Wanda and SparseGPT: calibration data as ``foldprune.torch.calibrate`` takes it. Block
        by block the statistics of the inputs are taken, the matrices pruned, and the pruned block
        run for the next one's inputs.
    seed
        Of random pruning.
    progress
        True for a bar on standard error, or a function called with (done, total, name).

    Returns
    -------
    dict
        By name a bool tensor of the weight's shape: True where it is kept.

    Raises
    ------
    ValueError
        An unknown method, a name that is no matrix of the model, a rate outside [0, 1), no batches.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}: expected one of {', '.join(METHODS)}")
    weights = {name: _out_in(model, name) for name in rates}
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise RateError(f"{name!r}: rate {rate}: the share removed lies in [0, 1)")
    masks: Masks = {}
    with reporter(progress, method) as report:
        if method in _BY_INPUT:
            statistic, change = _BY_INPUT[method]

            def visit(_: int, matrices: list[tuple[str, torch.Tensor, torch.Tensor]]) -> None:
                for name, weight, sums in matrices:
                    if name in rates:
                        masks[name] = change(weight, sums, rates[name])

            visit_blocks(model, batches, statistic, visit, report)
        generator = torch.Generator().manual_seed(seed)
        for name, weight in weights.items():
            if name not in masks:
                rate = rates[name]
                masks[name] = (
                    random(weight, rate, generator)
                    if method == "random"
                    else magnitude(weight, rate)
                )
    return {name: _own_layout(model, name, masks[name]) for name in rates}


def _is_conv1d(module: torch.nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _out_in(model: torch.nn.Module, name: str) -> torch.Tensor:
    """The weight as an (out x in) view of its memory."""
    try:
        weight = model.get_parameter(name).detach()
    except AttributeError:
        raise ModelError(f"{type(model).__name__} has no weight {name!r}") from None
    if weight.ndim != 2:
        raise ModelError(f"{name!r} of shape {tuple(weight.shape)} is not a matrix")
    return _own_layout(model, name, weight)


def _own_layout(model: torch.nn.Module, name: str, matrix: torch.Tensor) -> torch.Tensor:
    """From (out x in) to the layout of the weight, and back."""
    return matrix.T if _is_conv1d(model.get_submodule(name.rpartition(".")[0])) else matrix


# ---- block by block -----------------------------------------------------------------------------


@torch.no_grad()
def visit_blocks(
    model: torch.nn.Module,
    batches: Iterable[Any],
    statistic: Statistic,
    visit: Visit,
    progress: Progress,
) -> None:
    """Block by block: the mean over tokens of the statistic of every linear layer's inputs is
    taken, ``visit`` changes the weights, and the block is run again for the next one's inputs."""
    check_batches(batches)
    values = [Batch(model, value, i) for i, value in enumerate(batches)]
    if not values:
        raise ModelError("there are no batches: this method of pruning needs data")
    names = [block.name for block in _begin(model).layout.attentions]
    with prepared(model):
        calls = _first_calls(model, names[0], values)
        for i, name in enumerate(names):
            block = model.get_submodule(name)
            layers = {
                f"{name}.{path}.weight": module
                for path, module in block.named_modules()
                if isinstance(module, torch.nn.Linear) or _is_conv1d(module)
            }
            means = _run_counting(block, layers, calls, statistic)
            visit(i, [(layer, _out_in(model, layer), mean) for layer, mean in means.items()])
            calls = [(b, _hidden(block(x, *args, **kw)), args, kw) for b, x, args, kw in calls]
            progress(i + 1, len(names), name)


# a batch, the hidden states that a block reads, and what else it is called with
Call = tuple[Batch, torch.Tensor, tuple[Any, ...], dict[str, Any]]


class _Caught(Exception):
    """Ends a forward pass at the first block."""


def _first_calls(model: torch.nn.Module, block: str, batches: Sequence[Batch]) -> list[Call]:
    """What the first block is called with."""
    calls: list[Call] = []

    def catch(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(kwargs)
        hidden, rest = (args[0], args[1:]) if args else (named.pop("hidden_states"), ())
        for cache in ("past_key_values", "past_key_value"):
            if cache in named:
                named[cache] = None  # blocks are run twice
        calls.append((batch, hidden, rest, named))
        raise _Caught

    handle = model.get_submodule(block).register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in batches:
            args, kwargs = batch.arguments
            with naming(batch.index), suppress(_Caught):
                model(*args, **kwargs)
    finally:
        handle.remove()
    return calls


def _hidden(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return hidden


def _run_counting(
    block: torch.nn.Module,
    layers: dict[str, torch.nn.Module],
    calls: Sequence[Call],
    statistic: Statistic,
) -> dict[str, torch.Tensor]:
    """Means of the statistic over the tokens of the layers' inputs; layers that read the same
    tensor one after another share the work."""
    sums: dict[str, torch.Tensor] = {}
    rows: dict[str, int] = {}
    last: list[torch.Tensor | None] = [None, None]

    def count(batch: Batch, name: str, x: torch.Tensor) -> None:
        tokens, mask = as_tokens(batch, name, x)
        real = tokens.flatten(0, -2) if mask is None else tokens[mask]
        if x is not last[0]:
            last[:] = [x, statistic(real)]
        assert last[1] is not None
        sums[name] = sums[name] + last[1] if name in sums else last[1]
        rows[name] = rows.get(name, 0) + len(real)

    for batch, hidden, args, kwargs in calls:
        with reading(layers, partial(count, batch)):
            block(hidden, *args, **kwargs)
    return {name: total / rows[name] for name, total in sums.items()}


# ---- rates and results --------------------------------------------------------------------------


def _begin(model: torch.nn.Module) -> Job:
    # a recipe that folds, as it is an error then if the architecture is unknown
    recipe, threads = Recipe(irc=1), resolve_threads(None)
    return Job.begin(model, recipe, None, None, silent, threads)


_ALL = dict.fromkeys(GROUPS, 0.0)


def group_rates(model: torch.nn.Module, rates: Mapping[str, float]) -> dict[str, float]:
    """The rate of every matrix from that of its group: "embedding", "feed_forward",
    "attention_output" or "qkv"."""
    if wrong := set(rates) - set(GROUPS):
        raise ValueError(f"unknown group(s) {sorted(wrong)}; known are {list(GROUPS)}")
    job = _begin(model)
    groups = {name: job.layout.groups[name] for name, a in job.arrays.items() if a.ndim == 2}
    return {name: rates[group] for name, group in groups.items() if group in rates}


def matrices(model: torch.nn.Module) -> int:
    """How many numbers the matrices of all groups hold."""
    return sum(model.get_parameter(name).numel() for name in group_rates(model, _ALL))


def same_rates(report: Report) -> dict[str, float]:
    """By group the share of its matrices that must go for as many numbers to be removed as a
    compression removed from it."""
    rates = {}
    for group in GROUPS:
        rows = [row for row in report.rows if row.group == group]
        matrices = sum(row.numbers for row in rows if len(row.shape) == 2)
        if matrices:
            rates[group] = sum(row.numbers - row.stored for row in rows) / matrices
    return rates


def packed(model: torch.nn.Module, masks: Masks, method: str) -> Compressed:
    """The pruned model as a compressed checkpoint, to be saved, or trained with its zeros held
    (``foldprune.torch.convert``)."""
    job = _begin(model)
    for name, kept in masks.items():
        array, mask = job.arrays[name], kept.numpy()
        transposed = name in job.layout.transposed
        if transposed:
            array, mask = array.T, mask.T
        encoding = Packed.from_mask(array, mask, transposed=transposed, threads=job.threads)
        job.keep_pruned({name: Pruned(encoding, None)}, f"mask: {method}")
    return job.finish(Recipe())
