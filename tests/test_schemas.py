"""A family of one's own: registered from outside, fused head by head (BLOOM's layout, with ALiBi),
judged by the real forward pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import foldprune
from foldprune import Recipe, schemas
from foldprune.schemas import Attention, FeedForward, Schema, Slot

FUSED = "self_attention.query_key_value"
BLOOM = Schema(
    name="bloom",
    model_types=("bloom",),
    block=r"h\.(\d+)\.",
    attention=Attention(
        query=Slot(FUSED, part=0, parts=3, interleaved=True),
        key=Slot(FUSED, part=1, parts=3, interleaved=True),
        value=Slot(FUSED, part=2, parts=3, interleaved=True),
        output=Slot("self_attention.dense"),
        norm="input_layernorm",
    ),
    feed_forward=FeedForward(up=Slot("mlp.dense_h_to_4h"), down=Slot("mlp.dense_4h_to_h")),
    requires=("input_layernorm.weight", "post_attention_layernorm.weight"),
    block_dense=(r"(input|post_attention)_layernorm\.(weight|bias)",),
    embeddings=(r"word_embeddings\.weight", r"lm_head\.weight"),
    dense=(r"word_embeddings_layernorm\.(weight|bias)", r"ln_f\.(weight|bias)"),
)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(schemas, "_schemas", list(schemas.known()))
    schemas.register(BLOOM)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=120, hidden_size=48, n_layer=2, n_head=4)
    model = transformers.BloomModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def forward(model):
    return model(torch.arange(40).reshape(2, 20)).last_hidden_state


def test_lossless_on_an_interleaved_layout(model):
    before = forward(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    compressed = foldprune.compress(model, recipe=Recipe.lossless())
    model.load_state_dict(compressed.state_dict(), strict=True)
    assert (forward(model) - before).abs().max() <= 1e-5
    assert compressed.report[f"h.0.{FUSED}.weight"].method == "IRC lossless + DWC lossless"
    # 2 d_h^2 numbers a head, the key's bias and the value's
    removed = 2 * 2 * 4 * 12**2 + 2 * 2 * 48
    totals = compressed.report.totals["model"]
    assert totals.numbers - totals.stored == removed
    assert foldprune.verify(state, compressed).lossless


def test_interleaved_segments_come_back_from_a_file(model, tmp_path):
    compressed = foldprune.compress(model, recipe=Recipe(irc=5, dwc="pivot", fpp=0.5))
    compressed.save(tmp_path / "bloom.safetensors")
    loaded = foldprune.load(tmp_path / "bloom.safetensors")
    for name in compressed:
        np.testing.assert_array_equal(loaded[name], compressed[name])
    model.load_state_dict(loaded.state_dict(), strict=True)
    # the key of each head has five distinct rows, each repeated
    fused = compressed[f"h.0.{FUSED}.weight"].reshape(4, 3, 12, 48)
    for head in fused[:, 1]:
        assert len(np.unique(head, axis=0)) == 5


def test_without_the_schema_the_error_says_how_to_pass_one(model):
    schemas._schemas.remove(BLOOM)
    with pytest.raises(foldprune.ModelError, match=r"schemas\.register"):
        foldprune.compress(model, 0.3)
    with pytest.raises(foldprune.ModelError, match=r"query_key_value"):
        foldprune.compress(dict(model.state_dict()), 0.3)


def test_register_takes_schemas_only():
    with pytest.raises(TypeError):
        schemas.register({"name": "bloom"})


@pytest.mark.usefixtures("no_warnings")
def test_interleaved_parts_of_a_state_dict():
    """Other names, without a model: what a user registers is used."""
    heads, head_dim, d = 3, 8, 24
    rng = np.random.default_rng(5)
    fused = (rng.standard_normal((3 * d, d)) / np.sqrt(d)).astype(np.float32)
    bias = rng.standard_normal(3 * d).astype(np.float32)
    state = {
        "tower.0.mix.weight": fused,
        "tower.0.mix.bias": bias,
        "tower.0.out.weight": (rng.standard_normal((d, d)) / np.sqrt(d)).astype(np.float32),
        "tower.0.out.bias": rng.standard_normal(d).astype(np.float32),
    }
    slots = [Slot("mix", part=i, parts=3, interleaved=True) for i in range(3)]
    schemas.register(
        Schema(
            name="tower",
            model_types=("tower",),
            block=r"tower\.(\d+)\.",
            attention=Attention(*slots, Slot("out"), scaled=False),
            feed_forward=None,
        )
    )

    def outputs(tensors: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        w = tensors["tower.0.mix.weight"].astype(np.float64).reshape(heads, 3, head_dim, d)
        b = tensors["tower.0.mix.bias"].astype(np.float64).reshape(heads, 3, head_dim)
        q, k, v = (x @ w[:, i].transpose(0, 2, 1) + b[:, i, None] for i in range(3))
        a = np.exp(q @ k.transpose(0, 2, 1))
        mixed = (a / a.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(len(x), -1)
        out = tensors["tower.0.out.weight"].astype(np.float64)
        return mixed @ out.T + tensors["tower.0.out.bias"].astype(np.float64)

    x = rng.standard_normal((9, d)) / 4
    for recipe in (Recipe.lossless(), Recipe(irc="lossless"), Recipe(dwc="lossless")):
        compressed = foldprune.compress(state, recipe=recipe, num_heads=heads)
        assert compressed.report.schema == "tower" and compressed.report.removed > 0.05
        assert np.abs(outputs(dict(compressed), x) - outputs(state, x)).max() <= 1e-5
        assert foldprune.verify(state, compressed).lossless
