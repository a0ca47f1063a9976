"""What tests of `calibrate` share: batches, a small network, and how statistics are compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from foldprune import Calibration

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from foldprune.torch import calibrate  # noqa: E402


def batches_for(vocabulary: int = 89, count: int = 3) -> list[dict[str, Any]]:
    """Batches of four sequences, padded on the right, of several lengths."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for i in range(count):
        length = 9 + 3 * i
        ids = torch.randint(3, vocabulary, (4, length), generator=generator)
        lengths = torch.tensor([length, length - 2, 5, length])
        mask = (torch.arange(length) < lengths[:, None]).long()
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def quiet(model: Any, batches: Any, **options: Any) -> Calibration:
    return calibrate(model, batches, progress=False, **options)


def linear_layers(model: Any) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
    }


def close(have: np.ndarray, want: np.ndarray, tolerance: float = 1e-12) -> bool:
    return have.shape == want.shape and bool(
        np.abs(have - want).max() <= tolerance * np.abs(want).max()
    )


def everything(calibration: Calibration) -> dict[str, Any]:
    """All that can be read, bit by bit."""
    read: dict[str, Any] = {}
    for name in calibration.names:
        moments = calibration.moments(name)
        read[name] = [
            None if array is None else array.tobytes()
            for array in (
                moments and moments.second,
                moments and moments.held,
                moments and moments.mean,
                calibration.row_use(name),
                calibration.gradient(name),
            )
        ]
    return read


class Net(torch.nn.Module):
    """Layers a, b, c of width 4 on x, by a rule."""

    def __init__(self, rule: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (torch.nn.Linear(4, 4) for _ in range(3))
        self.rule = rule

    def forward(self, x: Any) -> Any:
        return self.rule(self, x)


X = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))


def next_token_loss(model: Any, batch: Any) -> Any:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    n = int(batch["attention_mask"].sum())  # padding is on the right
    return -sum(
        torch.log_softmax(logits[0, t], 0)[batch["input_ids"][0, t + 1]] for t in range(n - 1)
    )
