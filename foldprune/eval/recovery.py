"""Brings a compressed model's outputs back towards the dense model's, on unlabelled text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import torch

from ..options import Progress
from .finetune import train

__all__ = ["recover"]


def recover(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    batches: Sequence[Any],
    *,
    steps: int,
    lr: float,
    progress: Progress,
) -> None:
    """Trains the student in place: of a causal model the divergence of the next token's
    distribution from the teacher's, of an encoder the last hidden states' relative squared
    error."""
    stream = cycle(batches)

    def loss() -> torch.Tensor:
        batch = next(stream)
        with torch.no_grad():
            wanted = teacher(**batch)
        return _distance(student(**batch), wanted, batch.get("attention_mask"))

    parameters = [p for p in student.parameters() if p.requires_grad]
    student.eval()  # dropout would only blur what is to be matched
    train(parameters, loss, steps=steps, lr=lr, progress=progress)


def _distance(output: Any, wanted: Any, mask: torch.Tensor | None) -> torch.Tensor:
    kind = "logits" if hasattr(wanted, "logits") else "last_hidden_state"
    ours, theirs = getattr(output, kind), getattr(wanted, kind)
    if mask is not None:
        ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    if kind == "logits":
        return torch.nn.functional.kl_div(
            ours.flatten(0, -2).log_softmax(-1),
            theirs.flatten(0, -2).log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
    return (ours - theirs).square().sum() / theirs.square().sum()
