"""How a rate is spread over a model's tensors."""

from __future__ import annotations

import numpy as np
import pytest
import reference

import foldprune


def language_model(tied: bool) -> dict[str, np.ndarray]:
    """A LLaMA-shaped state dict whose two embeddings are alike but for their place."""
    state = reference.llama_state()
    rng = np.random.default_rng(0)
    shape = (400, state["model.embed_tokens.weight"].shape[1])
    state["model.embed_tokens.weight"] = rng.standard_normal(shape, np.float32)
    state["lm_head.weight"] = (
        state["model.embed_tokens.weight"] if tied else rng.standard_normal(shape, np.float32)
    )
    return state


def test_an_output_embedding_costs_more_than_an_input_embedding():
    compressed = foldprune.compress(language_model(tied=False), 0.4, num_heads=4)
    read, write = (
        compressed.report[name].removed for name in ("model.embed_tokens.weight", "lm_head.weight")
    )
    assert read > 1.5 * write > 0


@pytest.mark.parametrize("present", [True, False])
def test_a_shared_embedding_counts_as_the_output(present):
    """Tied, or left out of the file because it is tied: the same tensor gives the logits."""
    state = language_model(tied=True)
    if not present:
        del state["lm_head.weight"]
    tied = foldprune.compress(state, 0.4, num_heads=4)
    apart = foldprune.compress(language_model(tied=False), 0.4, num_heads=4)
    name = "model.embed_tokens.weight"
    assert tied.report[name].removed < apart.report[name].removed


def test_a_lower_rate_removes_no_more_from_any_tensor():
    state = language_model(tied=False)
    low, high = (foldprune.compress(state, rate, num_heads=4) for rate in (0.2, 0.5))
    for name in state:
        assert low.report[name].removed <= high.report[name].removed + 1e-9
