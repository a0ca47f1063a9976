"""What tests of calibrated compression share: data for the small models of conftest.py, and what
the real models make of it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

import foldprune
from foldprune import Calibration
from foldprune.job import Job
from foldprune.measured import Measured

Array = np.ndarray[Any, np.dtype[Any]]

FAMILIES = [
    "bert", "roberta", "gpt2", "llama-", "llama-gqa", "llama-mqa", "llama-bias", "llama-tied",
    "llama-wide", "mistral", "qwen2", "qwen3",
]  # fmt: skip


def randomise(model: Any, seed: int) -> Any:
    """Every weight, bias and gain random, so that nothing is hidden behind a zero or a one; outputs
    are of order one."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = parameter.shape
            noise = torch.randn(shape, generator=generator)
            if parameter.ndim == 2:
                fan_in = shape[0] if ".c_" in name else shape[1]  # Conv1D is (in x out)
                parameter.copy_(noise / fan_in**0.5)
            elif (name.endswith("weight") and "norm" in name.lower()) or ".ln_" in name:
                parameter.copy_((0.0 if name.endswith("bias") else 1.0) + 0.3 * noise)
            else:
                parameter.copy_(0.5 * noise)
    return model.eval()


def batches(seed: int = 1, count: int = 8) -> list[Any]:
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 89, (8, 16), generator=generator) for _ in range(count)]


def logits(model: Any, ids: Any) -> Array:
    import torch

    with torch.no_grad():
        return model(ids).logits.double().numpy()


def loaded(model: Any, compressed: foldprune.Compressed) -> Any:
    """A copy of the model with the compressed weights."""
    other = copy.deepcopy(model)
    other.load_state_dict(compressed.state_dict())
    return other


def output_error(model: Any, compressed: foldprune.Compressed, seed: int = 2) -> float:
    """Relative squared error of the logits on other data than was calibrated on."""
    (ids,) = batches(seed, 1)
    dense = logits(model, ids)
    return float(np.square(logits(loaded(model, compressed), ids) - dense).sum()) / float(
        np.square(dense).sum()
    )


def inputs(model: Any) -> dict[str, Array]:
    """Every linear layer's input over the calibration batches, (rows, d) float64, by weight."""
    import torch

    met: dict[str, list[Array]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":

            def note(_: Any, args: Any, name: str = f"{name}.weight") -> None:
                met.setdefault(name, []).append(args[0].double().numpy())

            handles.append(module.register_forward_pre_hook(note))
    for ids in batches():
        logits(model, ids)
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(x).reshape(-1, x[0].shape[-1]) for name, x in met.items()}


def out_in(model: Any, name: str, state: Any) -> Array:
    """A matrix as (out x in)."""
    module = model.get_submodule(name.removesuffix(".weight"))
    matrix = np.asarray(state[name])
    return matrix.T if type(module).__name__ == "Conv1D" else matrix


def settled(model: Any, calibration: Calibration) -> tuple[Job, Measured]:
    job = Job.begin(model, None, None, None, lambda done, total, name: None, 1)
    return job, Measured(job.arrays, job.checkpoint.tied, job.layout, calibration, 1)


def error(w: Array, new: Array, x: Array) -> float:
    """Relative squared error of the output, from the rows of data themselves."""
    rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
    changed = rows @ (new.astype(np.float64) - w.astype(np.float64)).T
    return float(np.square(changed).sum() / np.square(rows @ w.T.astype(np.float64)).sum())


def damage(w: Array, new: Array, x: Array, cost: Array) -> float:
    """What the outputs lose on those rows of data, each output's squared error at its cost."""
    changed = x @ (new.astype(np.float64) - w.astype(np.float64)).T
    return float(cost @ np.square(changed).mean(axis=0))


def costs(job: Job, measured: Measured, name: str) -> Array:
    """What an error of each output costs: the mean square of the loss's gradient, where that is
    known, with a floor; queries and keys have one more, which has a test of its own."""
    rows = len(job.target(name).matrix)
    gradient = measured.calibration.gradient(name)
    if gradient is None:
        return np.ones(rows)
    if any(name in (b.query.weight, b.key.weight) for b in job.layout.attentions):
        return measured.row_weight(job.target(name))
    return np.maximum(gradient, 1e-3 * gradient.mean())
