"""Converted models against transformers' own forward passes with the dense state dict of the same
checkpoint."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest

import foldprune
from foldprune import Recipe

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from converting import RECIPES, close, logits  # noqa: E402

from foldprune.torch import (  # noqa: E402
    FoldedAttention,
    PackedEmbedding,
    PackedLinear,
    convert,
    to_compressed,
)

FAMILIES = [*models.FAMILIES, "opt"]
DECODERS = ["gpt2", "opt", "llama-", "llama-gqa", "llama-mqa", "llama-bias", "llama-tied"]

pytestmark = pytest.mark.usefixtures("one_thread", "no_warnings")


def masks(ids: Any) -> dict[str, Any]:
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[0, :4] = 0
    right[1, 9:] = 0
    return {"left": left, "right": right}


# ---- the same outputs ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_outputs_and_the_way_back(both, token_ids, family, recipe):
    dense, converted, compressed = both(family, recipe)
    close(logits(converted, token_ids), logits(dense, token_ids))
    for mask in masks(token_ids).values():
        one, other = (logits(m, token_ids, attention_mask=mask) for m in (converted, dense))
        close(one[mask.bool()], other[mask.bool()])
    again = to_compressed(converted)
    assert list(again) == list(compressed) and again.tied == compressed.tied
    assert again.recipe == compressed.recipe
    assert str(again.report) == str(compressed.report)
    for name, encoding in compressed.encodings.items():
        other, parts = again.encodings[name], encoding.parts()
        assert (other.kind, other.params()) == (encoding.kind, encoding.params())
        assert other.parts().keys() == parts.keys()
        for part, array in parts.items():
            assert other.parts()[part].dtype == array.dtype
            assert np.array_equal(other.parts()[part], array), (name, part)


@pytest.mark.parametrize("recipe", ["weight", "irc 3", "remainder", "both lossless", "paper"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "opt", "llama-gqa", "mistral"])
def test_eager_attention(both, token_ids, family, recipe):
    dense, converted, _ = both(family, recipe)
    for model in (dense, converted):
        model.set_attn_implementation("eager")
    close(logits(converted, token_ids), logits(dense, token_ids))
    mask = masks(token_ids)["left"]
    one, other = (logits(m, token_ids, attention_mask=mask) for m in (converted, dense))
    close(one[mask.bool()], other[mask.bool()])


@pytest.mark.parametrize("recipe", ["weight", "irc 3", "irc lossless", "both and pruned", "paper"])
@pytest.mark.parametrize("family", DECODERS)
def test_generate(both, token_ids, family, recipe):
    dense, converted, _ = both(family, recipe)
    mask = masks(token_ids)["left"]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for implementation in ({}, {"cache_implementation": "static"}):
        one, other = (
            m.generate(token_ids, attention_mask=mask, **options, **implementation)
            for m in (converted, dense)
        )
        assert torch.equal(one, other)
    # the cache, token by token
    cache = transformers.DynamicCache(config=converted.config)
    with torch.no_grad():
        parts = [
            converted(part, past_key_values=cache, use_cache=True).logits
            for part in (token_ids[:, :5], token_ids[:, 5:6], token_ids[:, 6:])
        ]
    close(torch.cat(parts, 1), logits(dense, token_ids))


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast"])
def test_gelu_in_one_step(make_model, name):
    """The same function and gradient, in the module that was there, with its hooks."""
    model = copy.deepcopy(make_model("gpt2"))
    dense = transformers.activations.ACT2FN[name]
    layer = model.transformer.h[0].mlp.act = copy.deepcopy(dense)
    called: list[Any] = []
    layer.register_forward_hook(lambda *_: called.append(1))
    convert(model, foldprune.compress(model, 0.5))
    assert type(layer) is torch.nn.GELU and layer is model.transformer.h[0].mlp.act
    x = torch.linspace(-12, 12, 5001, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), dense(x)
    close(y, expected, 1e-9)
    close(*(torch.autograd.grad(v.sum(), x)[0] for v in (y, expected)), 1e-9)
    assert called and "tanh" in repr(layer)


def test_cache_holds_folded_keys(both, token_ids):
    _, converted, _ = both("llama-gqa", "irc 3")
    with torch.no_grad():
        cache = converted(token_ids, use_cache=True).past_key_values
    assert cache.layers[0].keys.shape == (2, 2, 13, 2 * 3)


def test_heads_of_different_ranks(known, token_ids):
    """Ranks and remainders that differ from head to head, none at all among them."""
    for family in ("bert", "gpt2", "llama-gqa", "opt"):
        if family == "opt":
            continue  # no calibration of learned positions with an offset here
        model, calibration = known(family, 0)
        for rate in (0.3, 0.45):
            compressed = foldprune.compress(model, rate, calibration=calibration, threads=1)
            converted = convert(copy.deepcopy(model), compressed)
            close(logits(converted, token_ids), logits(models.loaded(model, compressed), token_ids))
        for irc in (1, 3):
            compressed = foldprune.compress(
                model, recipe=Recipe(irc=irc, dwc=2), calibration=calibration, threads=1
            )
            converted = convert(copy.deepcopy(model), compressed)
            folded = [m for m in converted.modules() if isinstance(m, FoldedAttention)]
            assert len(folded) == 2
            close(logits(converted, token_ids), logits(models.loaded(model, compressed), token_ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "int8", "float32"])
@pytest.mark.parametrize("family", ["bert", "llama-tied", "gpt2"])
def test_dtype_of_the_values(both, make_model, token_ids, family, dtype):
    _, converted, _ = both(family, "weight", dtype=dtype)
    held = {m.values.dtype for m in converted.modules() if isinstance(m, PackedLinear)}
    assert held == {getattr(torch, str(dtype).removeprefix("torch."))}
    dense = copy.deepcopy(converted)
    assert logits(dense, token_ids).dtype is torch.float32
    reference = models.loaded(make_model(family, seed=1), to_compressed(converted))
    close(logits(converted, token_ids), logits(reference, token_ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("recipe", ["weight", "both lossless", "both and pruned", "paper"])
@pytest.mark.parametrize("family", ["bert", "llama-gqa"])
def test_models_of_other_dtypes(compressed_model, token_ids, family, recipe, dtype):
    model, compressed = compressed_model(family, recipe)
    model = model.to(dtype)
    dense = models.loaded(model, compressed)
    converted = convert(model, compressed)
    one, other = logits(converted, token_ids), logits(dense, token_ids)
    assert one.dtype is dtype
    close(one.double(), other.double(), 1e-5 if dtype is torch.float64 else 0.3)


def test_bfloat16_after_conversion(both, token_ids):
    dense, converted, _ = both("llama-tied", "both and pruned")
    one, other = (logits(m.to(torch.bfloat16), token_ids) for m in (converted, dense))
    assert one.dtype is torch.bfloat16
    close(one.float(), other.float(), 0.3)


def test_autocast(both, token_ids):
    dense, converted, _ = both("bert", "both and pruned")
    with torch.autocast("cpu", torch.bfloat16):
        one, other = logits(converted, token_ids), logits(dense, token_ids)
    assert one.dtype is other.dtype
    close(one.float(), other.float(), 0.3)


def test_memory_falls(both):
    dense, converted, _ = both("bert", "weight")

    def size(model: Any) -> int:
        tensors = (*model.parameters(), *model.buffers())
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())

    kinds = {type(m) for m in converted.modules()}
    assert {PackedLinear, PackedEmbedding} <= kinds
    assert size(converted) < 0.75 * size(dense)


# ---- ties ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "opt", "llama-tied"])
def test_ties_stay(both, token_ids, family):
    _, converted, _ = both(family, "weight")
    stream = io.BytesIO()
    torch.save(converted, stream)
    stream.seek(0)
    expected = logits(converted, token_ids)
    others = [
        converted,
        copy.deepcopy(converted),
        pickle.loads(pickle.dumps(converted)),
        torch.load(stream, weights_only=False),
    ]
    for other in others:
        table, head = other.get_input_embeddings(), other.get_output_embeddings()
        assert isinstance(table, PackedEmbedding) and isinstance(head, PackedLinear)
        assert table.values is head.values and table.mask is head.mask
        assert torch.equal(logits(other, token_ids), expected)
        assert list(to_compressed(other)) == list(to_compressed(converted))


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "opt", "llama-tied"])
def test_ties_as_transformers_saves_and_makes_them(both, token_ids, tmp_path, family, dtype):
    from safetensors.torch import load_file

    _, converted, _ = both(family, "weight", dtype=dtype)
    expected = logits(converted, token_ids)
    converted.tie_weights()
    assert converted.get_input_embeddings().values is converted.get_output_embeddings().values
    assert torch.equal(logits(converted, token_ids), expected)
    converted.save_pretrained(tmp_path)  # as its Trainer does
    saved = load_file(tmp_path / "model.safetensors")
    _, other, _ = both(family, "weight", dtype=dtype)
    for tensor in other.state_dict().values():
        tensor.zero_()
    missing = other.load_state_dict(saved, strict=False).missing_keys
    head = next(n for n, m in other.named_modules() if m is other.get_output_embeddings())
    assert not [name for name in missing if not name.startswith(f"{head}.")]
    assert torch.equal(logits(other, token_ids), expected)


def test_a_checkpoint_without_the_tied_name(make_model, token_ids):
    model = make_model("llama-tied")
    state = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    compressed = foldprune.compress(state, recipe=Recipe(fpp=0.5), config=model.config)
    converted = convert(copy.deepcopy(model), compressed)
    assert converted.lm_head.values is converted.model.embed_tokens.values
    reference = models.loaded(model, foldprune.compress(model, recipe=Recipe(fpp=0.5)))
    close(logits(converted, token_ids), logits(reference, token_ids))


# ---- state --------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["weight", "irc lossless", "both and pruned", "remainder"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-gqa"])
def test_files_and_state_dicts(both, make_model, token_ids, tmp_path, family, recipe):
    _, converted, compressed = both(family, recipe)
    with torch.no_grad():  # as if trained
        for parameter in converted.parameters():
            parameter.mul_(1.01)
    expected = logits(converted, token_ids)
    to_compressed(converted).save(tmp_path / "model.safetensors")
    loaded = foldprune.load(tmp_path / "model.safetensors")
    again = convert(make_model(family, seed=1), loaded)
    assert torch.equal(logits(again, token_ids), expected)
    assert all(np.array_equal(loaded[name], to_compressed(again)[name]) for name in loaded)
    fresh = convert(make_model(family, seed=1), compressed)
    assert not torch.equal(logits(fresh, token_ids), expected)
    fresh.load_state_dict(converted.state_dict())
    assert torch.equal(logits(fresh, token_ids), expected)


def test_state_of_other_ranks(both, compressed_model):
    _, converted, _ = both("bert", "irc 3")
    _, other, _ = both("bert", "irc 1")
    state = other.state_dict()
    with pytest.raises(RuntimeError, match=r"query.ranks: heads have ranks \[3, 3, 3, 3\]"):
        converted.load_state_dict(state)


# ---- compilers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("bert", "both and pruned"),
        ("bert", "irc lossless"),
        ("bert", "irc pruned"),
        ("llama-gqa", "both and pruned"),
    ],
)
def test_compile_and_export(both, token_ids, family, recipe):
    _, converted, _ = both(family, recipe)
    expected = logits(converted, token_ids)
    compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
    close(compiled(token_ids, use_cache=False).logits, expected)
    if family == "bert":
        exported = torch.export.export(converted, (token_ids,))
        close(exported.module()(token_ids).logits, expected)


def test_real_model(minilm_folder: Path):
    model = transformers.AutoModel.from_pretrained(minilm_folder).eval()
    recipe = Recipe(fpp=0.7, irc=8, dwc="pivot")
    compressed = foldprune.compress(model, recipe=recipe)
    dense = models.loaded(model, compressed)
    converted = convert(model, compressed)
    ids = torch.randint(1000, 30000, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    with torch.no_grad():
        one, other = (m(ids, attention_mask=mask).last_hidden_state for m in (converted, dense))
    close(one[mask.bool()], other[mask.bool()])
