"""What a student is compared with its teacher by: the outputs of attention and blocks, and of the
model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from .. import schemas, tensors
from ..calibration import layer_name
from ..errors import ModelError
from ..schemas.layout import Layout, find_layout
from .batches import Batch, naming
from .calibrate import as_tokens

__all__ = ["Objective", "Site", "layout_of", "sites"]


@dataclass(frozen=True)
class Site:
    """A module whose outputs are to be the teacher's."""

    path: str
    is_block: bool


def layout_of(model: torch.nn.Module) -> Layout:
    """A dense model's layout. ModelError if its architecture is unknown."""
    checkpoint = tensors.read(model)
    return find_layout(
        checkpoint.arrays, schemas.known(), checkpoint.config, None, False, checkpoint.tied
    )


def sites(student: torch.nn.Module, teacher: torch.nn.Module) -> list[Site]:
    """Attention outputs and blocks in the order in which they run. ModelError if the student has
    others, or embeddings of other sizes."""
    layout = layout_of(teacher)
    found = []
    for block in layout.attentions:
        found += [Site(layer_name(block.output.weight), False), Site(block.name, True)]
    series = layout.attentions[0].name.rpartition(".")[0]
    counts = [len(list(_module(m, series).children())) for m in (student, teacher)]
    if counts[0] != counts[1]:
        raise ModelError(f"the student has {counts[0]} blocks ({series}), the teacher {counts[1]}")
    for name, group in layout.groups.items():
        if group == "embedding" and name.endswith(".weight"):
            sizes = [_size(_module(m, layer_name(name))) for m in (student, teacher)]
            if sizes[0] != sizes[1]:
                raise ModelError(
                    f"{name!r} has (vocabulary, hidden) sizes {sizes[0]} in the student, "
                    f"{sizes[1]} in the teacher"
                )
    for site in found:
        _module(student, site.path)
    return found


def _module(model: torch.nn.Module, path: str) -> torch.nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ModelError(
            f"{type(model).__name__} has no {path!r}, which the other model has: student and "
            "teacher are to be of the same class"
        ) from None


def _size(module: Any) -> tuple[int, int]:
    """Of an embedding, or of the layer that gives the logits."""
    rows = "num_embeddings" if hasattr(module, "num_embeddings") else "out_features"
    cols = "embedding_dim" if rows == "num_embeddings" else "in_features"
    return getattr(module, rows), getattr(module, cols)


class _Stop(Exception):
    """Raised in a forward pass once it has given what was wanted."""


class Objective:
    """What a student is to have in common with its teacher, as losses of one batch."""

    def __init__(
        self,
        student: torch.nn.Module,
        teacher: torch.nn.Module,
        sites: Sequence[Site],
        temperature: float,
    ) -> None:
        self.student, self.teacher = student, teacher
        self.sites, self.temperature = sites, temperature

    def layers(self, value: Any, index: int) -> torch.Tensor:
        batch = Batch(self.student, value, index)
        with torch.no_grad():
            targets = self._outputs(self.teacher, Batch(self.teacher, value, index))
        outputs = self._outputs(self.student, batch)
        losses = []
        for site in self.sites:
            _check_shapes(site.path, outputs[site.path], targets[site.path])
            output, mask = as_tokens(batch, site.path, outputs[site.path])
            target, _ = as_tokens(batch, site.path, targets[site.path])
            losses.append(_relative_error(output, target, mask, by_token=site.is_block))
        return torch.stack(losses).mean()

    def _outputs(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Of every site; what comes after the last block is not computed."""
        outputs: dict[str, torch.Tensor] = {}

        def note(path: str, _: torch.nn.Module, __: Any, output: Any) -> None:
            outputs[path] = output[0] if isinstance(output, (tuple, list)) else output
            if path == self.sites[-1].path:
                raise _Stop

        args, kwargs = batch.arguments
        with ExitStack() as stack:
            for site in self.sites:
                hook = model.get_submodule(site.path).register_forward_hook(
                    partial(note, site.path)
                )
                stack.callback(hook.remove)
            with naming(batch.index), suppress(_Stop):
                model(*args, **kwargs)
        missing = [site.path for site in self.sites if site.path not in outputs]
        if missing:
            raise ModelError(
                f"{type(model).__name__} does not call {missing[0]}: match its outputs alone, "
                "with layerwise=0"
            )
        return outputs

    def output(self, value: Any, index: int) -> torch.Tensor:
        batch = Batch(self.student, value, index)
        args, kwargs = batch.arguments
        with naming(index):
            theirs, their_kwargs = Batch(self.teacher, value, index).arguments
            with torch.no_grad():
                target = self.teacher(*theirs, **their_kwargs)
            output = self.student(*args, **kwargs)
            logits = [getattr(out, "logits", None) for out in (output, target)]
            if isinstance(logits[0], torch.Tensor) and isinstance(logits[1], torch.Tensor):
                return self._divergence(batch, logits[0], logits[1])
            states = [_last_states(out) for out in (output, target)]
            _check_shapes("the output", states[0], states[1])
            ours, mask = as_tokens(batch, "output", states[0])
            goal, _ = as_tokens(batch, "output", states[1])
            pooled = [_mean(x, mask) for x in (ours, goal)]
            return _relative_error(ours, goal, mask, by_token=True) + _relative_error(
                pooled[0], pooled[1], None, by_token=True
            )

    def _divergence(self, batch: Batch, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        _check_shapes("the logits", logits, target)
        divergence = functional.kl_div(
            functional.log_softmax(logits.float() / self.temperature, -1),
            functional.log_softmax(target.float() / self.temperature, -1),
            reduction="none",
            log_target=True,
        ).sum(-1, keepdim=True)
        divergence, mask = as_tokens(batch, "output", divergence)
        return self.temperature**2 * (divergence if mask is None else divergence[mask]).mean()


def _check_shapes(what: str, output: torch.Tensor, target: torch.Tensor) -> None:
    if output.shape != target.shape:
        raise ModelError(
            f"{what}: shape {tuple(output.shape)} in the student, {tuple(target.shape)} in the "
            "teacher"
        )


def _last_states(output: Any) -> torch.Tensor:
    states = getattr(output, "last_hidden_state", None)
    if isinstance(output, (tuple, list)) and output and states is None:
        states = output[0]
    states = output if states is None else states
    if not isinstance(states, torch.Tensor) or states.ndim != 3:
        raise ModelError(
            f"the output ({type(output).__name__}) has neither logits nor the last hidden states "
            "of every token in the student or the teacher: nothing to distil"
        )
    return states


def _mean(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(batch, d): over a sequence's tokens."""
    if mask is None:
        return x.mean(1)
    weight = mask[..., None].to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp_min(1)


def _relative_error(
    output: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None, by_token: bool
) -> torch.Tensor:
    """Of (..., d), the masked ones alone: squared error over squares, in all or token by token."""
    output, target = output.float(), target.float()
    if mask is not None:
        output, target = output[mask], target[mask]
    error = (output - target).square().sum(-1)
    size = target.square().sum(-1)
    if not by_token:
        error, size = error.sum(), size.sum()
    return (error / size.clamp_min(torch.finfo(size.dtype).tiny)).mean()
