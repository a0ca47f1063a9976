"""What the tests of converted models share: recipes by name (conftest.py makes the models), and
comparisons."""

from __future__ import annotations

from typing import Any

import torch

from foldprune import Recipe
from foldprune.recipe import GROUPS

RECIPES: dict[str, Recipe | float] = {
    "weight": Recipe(fpp=0.5, fpp_on=GROUPS),
    "2:4": Recipe(fpp=0.5, fpp_granularity="2:4", fpp_on=GROUPS),
    "4x1": Recipe(fpp=0.5, fpp_granularity="4x1", fpp_on=GROUPS),
    "neuron": Recipe(fpp=0.5, fpp_granularity="neuron"),
    "row": Recipe(fpp=0.3, fpp_granularity="row", fpp_on=("embedding",)),
    "irc 3": Recipe(irc=3),
    "irc 1": Recipe(irc=1),
    "irc pruned": Recipe(irc=4, irc_fpp=0.6),
    "irc lossless": Recipe(irc="lossless"),
    "slice": Recipe(dwc="slice"),
    "pivot": Recipe(dwc="pivot"),
    "remainder": Recipe(dwc=2),
    "dwc lossless": Recipe(dwc="lossless"),
    "both lossless": Recipe.lossless(),
    "both and pruned": Recipe(irc=2, dwc=3, fpp=0.5, fpp_on=GROUPS),
    "paper": Recipe.paper(),
    "rate": 0.35,
}
TOLERANCE = 1e-4


def logits(model: Any, ids: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(ids, **kwargs).logits


def close(one: Any, other: Any, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
