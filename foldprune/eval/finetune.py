"""Text classification by an encoder: mean pooling, a linear head, and one budget of training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import FoldpruneWarning
from ..options import Progress

__all__ = ["Classifier", "Texts", "predict", "train"]

WARM_UP = 0.1  # share of the steps
WEIGHT_DECAY = 0.01
CLIP = 1.0
HEAD_LR = 1e-2
Batch = dict[str, torch.Tensor]


class Classifier(nn.Module):
    """The mean of the encoder's last hidden states over the tokens, and a linear layer on it."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        config: Any = encoder.config
        self.encoder = encoder
        self.head = nn.Linear(int(config.hidden_size), classes)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits (rows x classes) of a batch as tokenizers give it."""
        hidden = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].to(hidden.dtype)
        logits: torch.Tensor = self.head((hidden * mask).sum(1) / mask.sum(1).clamp_min(1))
        return logits

    def groups(self) -> list[dict[str, Any]]:
        """What trains, for an optimiser: the encoder at its own learning rate, the head, which is
        new and at that rate would hardly move, at HEAD_LR."""
        encoder = [p for p in self.encoder.parameters() if p.requires_grad]
        return [{"params": encoder}, {"params": list(self.head.parameters()), "lr": HEAD_LR}]


class Texts:
    """Tokenised texts, cut at ``max_length`` tokens, and batches of texts of like lengths."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], max_length: int) -> None:
        self.tokenizer = tokenizer
        self.ids: list[list[int]] = tokenizer(
            list(texts), truncation=True, max_length=max_length, return_attention_mask=False
        )["input_ids"]

    def batch(self, rows: Sequence[int]) -> Batch:
        padded = self.tokenizer.pad({"input_ids": [self.ids[i] for i in rows]}, return_tensors="pt")
        return {name: padded[name] for name in ("input_ids", "attention_mask")}

    def groups(self, size: int, rng: np.random.Generator | None = None) -> list[list[int]]:
        """All rows in groups of like lengths; with a generator, rows of one length and the groups
        are in random order."""
        lengths = np.array([len(ids) for ids in self.ids], np.float64)
        order = np.argsort(lengths if rng is None else lengths + rng.random(len(lengths)))
        groups = [order[i : i + size].tolist() for i in range(0, len(order), size)]
        if rng is not None:
            rng.shuffle(groups)
        return groups

    def endless(self, size: int, rng: np.random.Generator) -> Iterator[list[int]]:
        """Groups of one epoch after the other."""
        while True:
            yield from self.groups(size, rng)


def train(
    parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]],
    loss: Callable[[], torch.Tensor],
    *,
    steps: int,
    lr: float,
    progress: Progress,
) -> int:
    """AdamW with linear warm-up and decay, gradients clipped; the number of steps that were done.

    ``parameters`` or groups of them with learning rates of their own, as torch's optimisers take
    them; ``loss()`` gives the loss of the next batch. Where it, or its gradient, is not finite,
    training stops with a FoldpruneWarning, and the parameters are those of the last finite loss.
    """
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=WEIGHT_DECAY)
    trained = [p for group in optimiser.param_groups for p in group["params"]]
    warm = max(1, round(WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: min((i + 1) / warm, (steps - i) / max(1, steps - warm))
    )
    good = [parameter.detach().clone() for parameter in trained]
    for step in range(steps):
        optimiser.zero_grad(set_to_none=True)
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        found = float(value.detach())
        norm = float(nn.utils.clip_grad_norm_(trained, CLIP))
        if not (math.isfinite(found) and math.isfinite(norm)):
            with torch.no_grad():
                torch._foreach_copy_(trained, good)
            warnings.warn(
                f"step {step}: the loss is {found}, its gradient {norm}; training "
                "stopped, the last good weights are kept",
                FoldpruneWarning,
                stacklevel=2,
            )
            return step
        torch._foreach_copy_(good, [parameter.detach() for parameter in trained])
        optimiser.step()
        schedule.step()
        progress(step + 1, steps, f"loss {found:.3f}")
    return steps


@torch.no_grad()
def predict(model: Classifier, texts: Texts, size: int) -> list[int]:
    """The most likely class of every text."""
    model.eval()
    found = [0] * len(texts.ids)
    for rows in texts.groups(size):
        for row, label in zip(rows, model(texts.batch(rows)).argmax(-1).tolist(), strict=True):
            found[row] = label
    return found
