"""Converted models against transformers' own forward passes with the dense state dict of the same
checkpoint."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest

import foldprune
from foldprune import LoadedDenseWarning, ModelError, Recipe, TensorError, TensorTypeError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from foldprune.torch import (  # noqa: E402
    FoldedAttention,
    PackedEmbedding,
    PackedLinear,
    convert,
    to_compressed,
)

FAMILIES = [*models.FAMILIES, "opt"]
DECODERS = ["gpt2", "opt", "llama-", "llama-gqa", "llama-mqa", "llama-bias", "llama-tied"]
ALL = ("embedding", "feed_forward", "attention_output", "qkv")
RECIPES: dict[str, Recipe | float] = {
    "weight": Recipe(fpp=0.5, fpp_on=ALL),
    "2:4": Recipe(fpp=0.5, fpp_granularity="2:4", fpp_on=ALL),
    "4x1": Recipe(fpp=0.5, fpp_granularity="4x1", fpp_on=ALL),
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
    "both and pruned": Recipe(irc=2, dwc=3, fpp=0.5, fpp_on=ALL),
    "paper": Recipe.paper(),
    "rate": 0.35,
}
TOLERANCE = 1e-4


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _strict_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoadedDenseWarning)
        warnings.simplefilter("ignore", foldprune.FoldRefusedWarning)
        yield


@pytest.fixture(scope="module")
def compressed_model(make_model):
    """compressed_model(family, recipe's name): the model and its Compressed, made once."""
    made: dict[tuple[str, str], Any] = {}

    def make(family: str, recipe: str) -> Any:
        if (family, recipe) not in made:
            model, chosen = make_model(family), RECIPES[recipe]
            if isinstance(chosen, float):
                compressed = foldprune.compress(model, chosen, threads=1)
            else:
                compressed = foldprune.compress(model, recipe=chosen, threads=1)
            made[family, recipe] = model, compressed
        model, compressed = made[family, recipe]
        return copy.deepcopy(model), compressed

    return make


@pytest.fixture(scope="module")
def both(compressed_model):
    """both(family, recipe): with the dense state dict, and converted."""

    def make(family: str, recipe: str, **kwargs: Any) -> tuple[Any, Any, Any]:
        model, compressed = compressed_model(family, recipe)
        return models.loaded(model, compressed), convert(model, compressed, **kwargs), compressed

    return make


def logits(model: Any, ids: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(ids, **kwargs).logits


def masks(ids: Any) -> dict[str, Any]:
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[0, :4] = 0
    right[1, 9:] = 0
    return {"left": left, "right": right}


def close(one: Any, other: Any, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


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
def test_dtype_of_the_values(both, token_ids, family, dtype):
    _, converted, _ = both(family, "weight", dtype=dtype)
    held = {m.values.dtype for m in converted.modules() if isinstance(m, PackedLinear)}
    assert held == {getattr(torch, str(dtype).removeprefix("torch."))}
    dense = copy.deepcopy(converted)
    assert logits(dense, token_ids).dtype is torch.float32
    reference = models.loaded(_blank(family), to_compressed(converted))
    close(logits(converted, token_ids), logits(reference, token_ids))


def _blank(family: str) -> Any:
    import conftest

    return conftest._family(family).eval()


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
def test_files_and_state_dicts(both, token_ids, tmp_path, family, recipe):
    _, converted, compressed = both(family, recipe)
    with torch.no_grad():  # as if trained
        for parameter in converted.parameters():
            parameter.mul_(1.01)
    expected = logits(converted, token_ids)
    to_compressed(converted).save(tmp_path / "model.safetensors")
    loaded = foldprune.load(tmp_path / "model.safetensors")
    again = convert(_blank(family), loaded)
    assert torch.equal(logits(again, token_ids), expected)
    assert all(np.array_equal(loaded[name], to_compressed(again)[name]) for name in loaded)
    fresh = convert(_blank(family), compressed)
    assert not torch.equal(logits(fresh, token_ids), expected)
    fresh.load_state_dict(converted.state_dict())
    assert torch.equal(logits(fresh, token_ids), expected)


def test_state_of_other_ranks(both, compressed_model):
    _, converted, _ = both("bert", "irc 3")
    _, other, _ = both("bert", "irc 1")
    state = other.state_dict()
    with pytest.raises(RuntimeError, match=r"query.ranks: heads have ranks \[3, 3, 3, 3\]"):
        converted.load_state_dict(state)


# ---- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-gqa"])
def test_gradients_of_a_pruned_model(both, token_ids, family):
    dense, converted, compressed = both(family, "weight")
    for model in (dense, converted):
        model(token_ids, labels=token_ids).loss.backward()
    expected = dict(dense.named_parameters())
    seen = 0
    for name, module in converted.named_modules():
        if not isinstance(module, (PackedLinear, PackedEmbedding)):
            continue
        gradient = expected.get(f"{name}.weight")
        if gradient is None:  # tied: named once
            continue
        gradient = gradient.grad
        packed = module.packed()
        found = torch.from_numpy(
            foldprune.Packed(packed.shape, packed.mask, module.values.grad.numpy()).unpack()
        )
        if compressed.encodings[f"{name}.weight"].params().get("transposed"):
            found = found.T
        dense_weight = expected[f"{name}.weight"].detach()
        close(found, gradient * (dense_weight != 0), 1e-4)
        seen += 1
    assert seen > 6


@pytest.mark.parametrize(
    "recipe", ["weight", "both and pruned", "irc pruned", "irc lossless", "remainder"]
)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-gqa", "opt"])
def test_training_step(both, token_ids, family, recipe):
    """The loss falls, what is fixed stays, and the way back gives what was trained."""
    _, converted, compressed = both(family, recipe)
    optimiser = torch.optim.AdamW(converted.parameters(), 3e-3, weight_decay=0.1)
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        loss = converted(token_ids, labels=token_ids).loss
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for n, p in converted.named_parameters() if "values" in n)
    trained = to_compressed(converted)
    for name, encoding in compressed.encodings.items():
        other = trained.encodings[name]
        assert (other.kind, other.numbers) == (encoding.kind, encoding.numbers)
        if "mask" in encoding.parts():
            assert np.array_equal(other.parts()["mask"], encoding.parts()["mask"])
    reference = models.loaded(_blank(family), trained)
    close(logits(converted.eval(), token_ids), logits(reference, token_ids))


@pytest.mark.parametrize("family", ["bert", "llama-gqa"])
def test_gradient_checkpointing(both, token_ids, family):
    _, converted, _ = both(family, "both and pruned")
    converted.eval()

    def gradients() -> dict[str, Any]:
        converted.zero_grad()
        converted(token_ids, labels=token_ids).loss.backward()
        return {n: p.grad.clone() for n, p in converted.named_parameters() if p.grad is not None}

    expected = gradients()
    converted.train()
    for module in converted.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, FoldedAttention):
            module._dropout = 0.0
    converted.gradient_checkpointing_enable()
    found = gradients()
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        close(gradient, expected[name], 1e-6)


def _ddp_rank(rank: int, path: str, results: Any) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    model = torch.load(f"{path}/model.pt", weights_only=False)
    ids = torch.load(f"{path}/ids.pt")
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    # one step of plain descent, so that the ranks' mean gradient is what is seen
    optimiser = torch.optim.SGD(parallel.parameters(), 0.1)
    parallel(ids[rank : rank + 1], labels=ids[rank : rank + 1]).loss.backward()
    optimiser.step()
    torch.save(model.state_dict(), f"{path}/rank{rank}.pt")
    dist.destroy_process_group()


def test_distributed(both, token_ids, tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    _, converted, _ = both("bert", "both and pruned")
    torch.save(converted, tmp_path / "model.pt")
    torch.save(token_ids, tmp_path / "ids.pt")
    torch.multiprocessing.spawn(_ddp_rank, (str(tmp_path), None), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{i}.pt") for i in range(2)]
    optimiser = torch.optim.SGD(converted.parameters(), 0.1)
    losses = [converted(ids[None], labels=ids[None]).loss for ids in token_ids]
    (sum(losses) / 2).backward()
    optimiser.step()
    for name, tensor in converted.state_dict().items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], tensor, rtol=1e-4, atol=1e-6)


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


# ---- bad input ----------------------------------------------------------------------------------


def unchanged(model: Any, before: dict[str, Any]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(isinstance(m, (PackedLinear, FoldedAttention)) for m in model.modules())


def test_checkpoints_that_do_not_fit(compressed_model, make_model):
    model, compressed = compressed_model("bert", "both and pruned")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    other = make_model("roberta")
    with pytest.raises(ModelError, match=r"missing roberta\..* not in the model bert\."):
        convert(other, compressed)
    wider = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=90,
            hidden_size=48,
            num_hidden_layers=2,
            intermediate_size=80,
            num_attention_heads=4,
            max_position_embeddings=40,
        )
    )
    with pytest.raises(TensorError, match=r"shape \(89, 48\) in the checkpoint, \(90, 48\)"):
        convert(wider, compressed)
    with pytest.raises(TensorTypeError, match="dtype="):
        convert(model, compressed, dtype="int4")
    with pytest.raises(TensorTypeError, match="float64 goes with float64"):
        convert(model, compressed, dtype="float64")
    with pytest.raises(TypeError, match="torch module"):
        convert(model.state_dict(), compressed)
    with pytest.raises(TypeError, match="Compressed"):
        convert(model, model.state_dict())
    with pytest.raises(ModelError, match="convert a model on the CPU"):
        convert(copy.deepcopy(model).to("meta"), compressed)
    unchanged(model, before)
    with pytest.raises(ModelError, match=r"not made by foldprune\.torch\.convert"):
        to_compressed(model)
    convert(model, compressed)
    with pytest.raises(ModelError, match="converted already"):
        convert(model, compressed)


def test_values_beyond_float16(make_model):
    model = make_model("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = 1e6
    compressed = foldprune.compress(model, recipe=Recipe(fpp=0.5))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(TensorError, match=r"layer.0.output.dense.weight'.* range of float16"):
        convert(model, compressed, dtype="float16")
    unchanged(model, before)


def test_what_the_model_ties_and_the_checkpoint_does_not(make_model):
    tied, free = make_model("llama-tied"), make_model("llama-tied")
    free.config.tie_word_embeddings = False
    free.lm_head.weight = torch.nn.Parameter(free.lm_head.weight.detach() + 1)
    compressed = foldprune.compress(free, recipe=Recipe(fpp=0.5))
    with pytest.raises(ModelError, match=r"the model ties model\.embed_tokens\.weight, lm_head"):
        convert(tied, compressed)
    # the other way round each has its own
    converted = convert(free, foldprune.compress(tied, recipe=Recipe(fpp=0.5)))
    assert converted.lm_head.values is not converted.model.embed_tokens.values
    assert torch.equal(converted.lm_head.values, converted.model.embed_tokens.values)


def test_loaded_dense(token_ids):
    """A module without a packed form, and attention that is none of transformers'."""

    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Bilinear(8, 8, 8)
            self.matrix = torch.nn.Parameter(torch.randn(8, 8))
            self.linear = torch.nn.Linear(8, 8)

    model = Odd()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", foldprune.UnmatchedTensorWarning)
        compressed = foldprune.compress(model, recipe=Recipe(fpp=0.5))
    with pytest.warns(LoadedDenseWarning, match="'matrix' is loaded dense"):
        converted = convert(model, compressed)
    assert isinstance(converted.linear, PackedLinear)
    assert np.array_equal(converted.matrix.detach().numpy(), compressed["matrix"])
    assert np.array_equal(to_compressed(converted)["matrix"], compressed["matrix"])


def test_attention_without_a_runtime_form(compressed_model, token_ids):
    model, compressed = compressed_model("gpt2", "irc 3")
    model.config.reorder_and_upcast_attn = True
    model = type(model)(model.config).eval()
    with pytest.warns(LoadedDenseWarning, match="reorder_and_upcast_attn"):
        converted = convert(model, compressed)
    reference = models.loaded(model, compressed)
    assert not any(isinstance(m, FoldedAttention) for m in converted.modules())
    close(logits(converted, token_ids), logits(reference, token_ids))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_input_that_does_not_fit(both, token_ids, implementation):
    _, converted, _ = both("bert", "both and pruned")
    converted.set_attn_implementation(implementation)
    attention = converted.bert.encoder.layer[0].attention.self
    x = torch.randn(2, 13, 48)
    for mask in (torch.zeros(2, 1, 13, 7), torch.zeros(3, 1, 13, 13), torch.zeros(2, 1, 4, 13)):
        with pytest.raises(RuntimeError, match=r"size|expand|shape"):
            attention(x, attention_mask=mask)
    for wrong in (torch.randn(2, 13, 47), x.double()):
        with pytest.raises(RuntimeError):
            attention(wrong)
    with pytest.raises(IndexError, match="out of range"):
        logits(converted, token_ids + 89)


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
