"""What tests of FPP in training share: a schedule, batches and a loop."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from foldprune.torch import FPP, Schedule  # noqa: E402

SOON = Schedule(0, 6, 2)


def batch(seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 89, (4, 16), generator=generator)
    return {"input_ids": ids, "labels": ids}


def train(model: Any, optimizer: Any, fpp: FPP | None, steps: int, seed: int = 1) -> list[float]:
    """The losses."""
    losses = []
    for step in range(steps):
        loss = model(**batch(seed + step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if fpp is not None:
            fpp.step()
        losses.append(float(loss.detach()))
    return losses
