"""Real models judge: transformers' own forward passes, float64 attention from the factors."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import reference

import foldprune
from foldprune import Recipe

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FAMILIES = [
    "bert",
    "roberta",
    "gpt2",
    "llama",
    "llama-gqa",
    "llama-mqa",
    "llama-bias",
    "llama-tied",
    "llama-wide",
    "mistral",
    "qwen2",
]
ABSOLUTE = 1e-5


pytestmark = pytest.mark.usefixtures("one_thread", "no_warnings")


def logits(model: Any, ids: Any) -> Any:
    with torch.no_grad():
        return model(ids).logits


def reloaded(model: Any, state: dict[str, Any]) -> Any:
    """The unmodified class with other weights."""
    other = copy.deepcopy(model)
    other.load_state_dict(state, strict=True)
    return other.eval()


def describe(model: Any) -> tuple[int, int, int, float | None]:
    """heads, key heads, head size, base of the rotary embedding."""
    config = model.config
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    base = None
    if config.model_type in ("llama", "mistral", "qwen2", "qwen3"):
        base = float(config.rope_parameters["rope_theta"])
    return heads, groups, head_dim, base


class Block:
    """One attention block: its module's hooks, and where its tensors are."""

    def __init__(self, model: Any, layer: int) -> None:
        family = model.config.model_type
        self.causal = family not in ("bert", "roberta")
        if family in ("bert", "roberta"):
            before = f"encoder.layer.{layer - 1}.output" if layer else "embeddings"
            self.norm = f"{family}.{before}.LayerNorm.weight"
            prefix = f"{family}.encoder.layer.{layer}.attention."
            module = getattr(model, family).encoder.layer[layer].attention
            self.source, self.sink = module.self, module.output.dense
            self.names = {
                "query": (prefix + "self.query", 0, 1, False),
                "key": (prefix + "self.key", 0, 1, False),
                "value": (prefix + "self.value", 0, 1, False),
                "output": (prefix + "output.dense", 0, 1, False),
            }
        elif family == "gpt2":
            self.norm = f"transformer.h.{layer}.ln_1.weight"
            prefix = f"transformer.h.{layer}.attn."
            self.source = self.sink = model.transformer.h[layer].attn
            self.names = {
                "query": (prefix + "c_attn", 0, 3, True),
                "key": (prefix + "c_attn", 1, 3, True),
                "value": (prefix + "c_attn", 2, 3, True),
                "output": (prefix + "c_proj", 0, 1, True),
            }
        else:
            self.norm = f"model.layers.{layer}.input_layernorm.weight"
            prefix = f"model.layers.{layer}.self_attn."
            self.source = self.sink = model.model.layers[layer].self_attn
            self.names = {
                role: (f"{prefix}{role[0]}_proj", 0, 1, False)
                for role in ("query", "key", "value", "output")
            }

    def real(self, model: Any, ids: Any) -> tuple[np.ndarray, np.ndarray]:
        """The block's inputs and outputs in a forward pass of the whole model."""
        seen = {}

        def enter(module: Any, args: Any, kwargs: Any) -> None:
            seen["x"] = args[0] if args else kwargs["hidden_states"]

        def leave(module: Any, args: Any, output: Any) -> None:
            seen["y"] = output[0] if isinstance(output, tuple) else output

        handles = [
            self.source.register_forward_pre_hook(enter, with_kwargs=True),
            self.sink.register_forward_hook(leave),
        ]
        logits(model, ids)
        for handle in handles:
            handle.remove()
        return seen["x"].numpy(), seen["y"].numpy()

    def input_scale(self, model: Any) -> np.ndarray:
        """Size of the block's inputs, from the gain of the normalisation before it."""
        return reference.input_scale(model.state_dict()[self.norm].double().numpy())

    def stored(self, compressed: foldprune.Compressed) -> dict[str, reference.Stored]:
        out = {}
        for role, (name, part, count, transposed) in self.names.items():
            encodings = compressed.encodings
            out[role] = reference.Stored(encodings[name + ".weight"], part, count, transposed)
            if (bias := encodings.get(name + ".bias")) is not None:
                out[role + "_bias"] = reference.Stored(bias, part, count)
        return out

    def matrices(self, model: Any) -> dict[str, np.ndarray | None]:
        """The original (out x in) matrices and biases."""
        state = model.state_dict()
        out: dict[str, np.ndarray | None] = {}
        for role, (name, part, count, transposed) in self.names.items():
            weight = state[name + ".weight"].double().numpy()
            weight = weight.T if transposed else weight
            out[role] = np.split(weight, count)[part]
            bias = state.get(name + ".bias")
            out[role + "_bias"] = (
                None if bias is None else np.split(bias.double().numpy(), count)[part]
            )
        return out


def lossless(model: Any, how: str) -> foldprune.Compressed:
    if how == "rate":
        return foldprune.compress(model, 0)
    return foldprune.compress(model, recipe=Recipe.lossless())


def blocks(model: Any) -> list[Block]:
    return [Block(model, layer) for layer in range(model.config.num_hidden_layers)]


def check_blocks(model: Any, compressed: foldprune.Compressed, ids: Any) -> None:
    """The dense state dict's attention outputs are those of the stored factors, block by block."""
    heads, groups, head_dim, base = describe(model)
    other = reloaded(model, compressed.state_dict())
    for block in blocks(other):
        stored = block.stored(compressed)
        inputs, outputs = block.real(other, ids)
        assert np.abs(outputs).max() > 0.05  # the comparison means something
        for x, y in zip(inputs, outputs, strict=True):
            want = reference.attention(x, stored, heads, groups, head_dim, base, block.causal)
            assert np.abs(want - y).max() <= ABSOLUTE


# ---- the lossless level -------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["recipe", "rate"])
def test_lossless_leaves_the_logits(family, how, make_model, token_ids):
    model = make_model(family)
    before = logits(model, token_ids)
    assert 0.1 < before.abs().max() < 50
    compressed = lossless(model, how)
    after = logits(reloaded(model, compressed.state_dict()), token_ids)
    assert (after - before).abs().max() <= ABSOLUTE
    assert foldprune.verify(model, compressed).lossless
    for block in blocks(model):
        for role, name in (("query", "IRC"), ("key", "IRC"), ("value", "DWC")):
            row = compressed.report[block.names[role][0] + ".weight"]
            assert f"{name} lossless" in row.method


@pytest.mark.parametrize("family", FAMILIES)
def test_lossless_removes_what_the_gauge_gives(family, make_model):
    model = make_model(family)
    _heads, groups, head_dim, base = describe(model)
    report = foldprune.compress(model, 0).report
    first = blocks(model)[0].matrices(model)
    per_block = sum(first[r].size for r in ("query", "key", "value"))
    per_block += sum(
        first[f"{r}_bias"].size for r in ("query", "key", "value") if first[f"{r}_bias"] is not None
    )
    removed = groups * head_dim**2  # the identity in the value's pivots
    if first["value_bias"] is not None and first["output_bias"] is not None:
        removed += groups * head_dim
    if base is None:
        removed += groups * head_dim**2  # the identity in the key's pivots
        removed += groups * head_dim if first["key_bias"] is not None else 0
    else:
        removed += groups * head_dim  # two numbers per plane
    total = report.totals["qkv"]
    assert total.numbers == 2 * per_block
    assert total.stored == 2 * (per_block - removed)
    assert report.totals["model"].numbers - report.totals["model"].stored == 2 * removed


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-bias", "qwen2"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("how", ["recipe", "rate"])
def test_lossless_in_16_bits_changes_nothing_and_says_so(family, dtype, how, make_model):
    model = make_model(family).to(getattr(torch, dtype))
    compressed = lossless(model, how)
    state = compressed.state_dict()
    for name, tensor in model.state_dict().items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(
            state[name].contiguous().view(torch.int16), tensor.contiguous().view(torch.int16)
        ), name
    assert compressed.report.removed == 0
    text = str(compressed.report)
    assert dtype in text and "lossless" in text
    for block in blocks(model):
        for role in ("query", "key", "value"):
            row = compressed.report[block.names[role][0] + ".weight"]
            assert row.method == "dense"
            assert dtype in row.note and "lossless" in row.note


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-bias"])
def test_lossless_in_float64(family, make_model, token_ids):
    model = make_model(family).double()
    before = logits(model, token_ids)
    compressed = lossless(model, "recipe")
    after = logits(reloaded(model, compressed.state_dict()), token_ids)
    assert (after - before).abs().max() <= 1e-11
    for block in blocks(model):
        for role, name in (("query", "IRC"), ("key", "IRC"), ("value", "DWC")):
            row = compressed.report[block.names[role][0] + ".weight"]
            assert f"{name} lossless" in row.method


# ---- reduced rank -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_irc_at_reduced_rank(family, rank, make_model, token_ids):
    """The written-back weights give the logits of the factors (planes under rotary embedding)."""
    model = make_model(family)
    compressed = foldprune.compress(model, recipe=Recipe(irc=rank))
    check_blocks(model, compressed, token_ids)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_dwc_slice(family, make_model, token_ids):
    model = make_model(family)
    compressed = foldprune.compress(model, recipe=Recipe(dwc="slice"))
    check_blocks(model, compressed, token_ids)
    heads, _, head_dim, _ = describe(model)
    for block in blocks(model):
        for i, head in enumerate(block.stored(compressed)["value"].heads(heads)):
            want = np.zeros_like(head)  # the paper's diagonal: head i reads its own coordinates
            want[range(head_dim), range(i * head_dim, (i + 1) * head_dim)] = 1.0
            assert np.array_equal(head, want)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["pivot", 0, 1, 8, "lossless"])
def test_dwc_modes(family, mode, make_model, token_ids):
    model = make_model(family)
    compressed = foldprune.compress(model, recipe=Recipe(dwc=mode))
    check_blocks(model, compressed, token_ids)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(irc=2, dwc="pivot"),
        Recipe(irc="lossless", dwc=2),
        Recipe(irc=3, dwc="lossless", fpp=0.5),
        Recipe(irc=2, dwc=1, fpp=0.5, fpp_granularity="2:4"),
        Recipe(irc=3, irc_fpp=0.5, dwc=1),
    ],
    ids=["2-pivot", "lossless-2", "3-lossless-fpp", "2-1-2:4", "3-pruned-1"],
)
def test_irc_with_dwc(family, recipe, make_model, token_ids):
    model = make_model(family)
    check_blocks(model, foldprune.compress(model, recipe=recipe), token_ids)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_recipe_paper(family, make_model, token_ids):
    model = make_model(family)
    compressed = foldprune.compress(model, recipe=Recipe.paper())
    check_blocks(model, compressed, token_ids)
    report = compressed.report
    for row in report.rows:
        if row.group not in ("qkv", "other") and len(row.shape) == 2 and row.numbers:
            assert row.stored == row.numbers - round(0.7 * row.numbers), row.name
    heads, _groups, _head_dim, base = describe(model)
    first = blocks(model)[0].matrices(model)
    d = first["query"].shape[1]
    biased = first["query_bias"] is not None
    # one row of q (with its bias) and, but for the pivot, of k per head; a plane is two rows
    stored = heads * (d + biased + d - 1) if base is None else heads * (2 * d + 2 * d - 2)
    assert report.totals["qkv"].stored == 2 * stored


def test_paper_on_grouped_queries_keeps_values_and_says_what_to_do(make_model):
    """A slice is not defined there: value stays as it is, everything else follows the recipe."""
    model = make_model("llama-gqa")
    with pytest.warns(foldprune.FoldRefusedWarning, match="pivot"):
        compressed = foldprune.compress(model, recipe=Recipe.paper())
    for row in compressed.report.rows:
        if "v_proj" in row.name:
            assert row.method == "dense"
            assert "slice" in row.note
            assert torch.equal(model.state_dict()[row.name], compressed.state_dict()[row.name])
        elif "q_proj.weight" in row.name:
            assert row.method == "IRC planes=1"
    assert any("slice" in note for note in compressed.report.notes)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-gqa", "qwen2"])
@pytest.mark.parametrize("rate", [0.1, 0.4, 0.7])
def test_a_rate_gives_what_its_factors_say(family, rate, make_model, token_ids):
    model = make_model(family)
    compressed = foldprune.compress(model, rate)
    check_blocks(model, compressed, token_ids)
    assert abs(compressed.report.removed - rate) <= 0.005


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_irc_error_is_the_best_possible(family, rank, make_model):
    """Eckart and Young: no factors of this rank come nearer to [W_q b_q]^T W_k, its rows and
    columns weighed by the size of what the normalisation before them puts out."""
    model = make_model(family)
    heads, groups, head_dim, _ = describe(model)
    compressed = foldprune.compress(model, recipe=Recipe(irc=rank))
    for block in blocks(model):
        own, scale = block.matrices(model), block.input_scale(model)
        wanted = reference.products(
            own["query"], own["query_bias"], own["key"], heads, groups, scale, scale
        )
        stored = block.stored(compressed)
        query, key = stored["query"].heads(heads), stored["key"].heads(groups)
        bias = stored["query_bias"].heads(heads)
        errors, energies = 0.0, 0.0
        for i, m in enumerate(wanted):
            assert len(query[i]) == len(key[i]) == rank
            got = np.concatenate([query[i] * scale, bias[i]], axis=1).T @ (key[i] * scale)
            least = reference.spectrum(m, head_dim)[rank:].sum()
            assert ((m - got) ** 2).sum() == pytest.approx(least, rel=1e-5)
            errors, energies = errors + least, energies + (m**2).sum()
        row = compressed.report[block.names["query"][0] + ".weight"]
        assert row.error == pytest.approx(errors / energies, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "llama-gqa", "llama-mqa", "llama-bias", "qwen2"])
@pytest.mark.parametrize("rank", [1, 3])
def test_rope_keeps_the_planes_that_contribute_most(family, rank, make_model):
    model = make_model(family)
    heads, groups, _, _ = describe(model)
    compressed = foldprune.compress(model, recipe=Recipe(irc=rank))
    for block in blocks(model):
        own, scale = block.matrices(model), block.input_scale(model)
        scores = reference.plane_scores(
            own["query"],
            own["query_bias"],
            own["key"],
            own["key_bias"],
            heads,
            groups,
            "half",
            scale,
            scale,
        )
        kept = block.stored(compressed)["key"].planes(groups, "half")
        for own_scores, planes in zip(scores, kept, strict=True):
            assert set(planes) == set(np.argsort(-own_scores)[:rank].tolist())
        row = compressed.report[block.names["key"][0] + ".weight"]
        lost = scores.sum() - np.sort(scores, axis=1)[:, -rank:].sum()
        assert row.error == pytest.approx(lost / scores.sum(), rel=1e-6)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-gqa", "qwen2"])
def test_dwc_error_is_what_the_definition_says(family, make_model):
    """pivot: M outside its largest columns; remainder k: the tail of M outside the pivots."""
    model = make_model(family)
    heads, groups, head_dim, _ = describe(model)
    pivoted = foldprune.compress(model, recipe=Recipe(dwc="pivot"))
    cut = foldprune.compress(model, recipe=Recipe(dwc=2))
    for block in blocks(model):
        own, scale = block.matrices(model), block.input_scale(model)
        ms = reference.products(own["output"].T, None, own["value"], heads, groups, None, scale)
        energy = sum((m**2).sum() for m in ms)
        name = block.names["value"][0] + ".weight"

        norms = [np.sort((m**2).sum(axis=0))[::-1] for m in ms]
        left = sum(n[head_dim:].sum() for n in norms)
        assert pivoted.report[name].error == pytest.approx(left / energy, rel=1e-6)
        chosen = block.stored(pivoted)["value"].parts["pivots"].reshape(groups, head_dim)
        for m, columns in zip(ms, chosen, strict=True):
            assert set(columns.tolist()) == set(np.argsort(-(m**2).sum(axis=0))[:head_dim].tolist())

        parts = block.stored(cut)["value"].parts
        pivots = parts["pivots"].reshape(groups, head_dim)
        left = 0.0
        for m, columns in zip(ms, pivots, strict=True):
            rest = np.delete(m, columns, axis=1)
            left += reference.spectrum(rest, head_dim)[2:].sum()
        assert cut.report[name].error == pytest.approx(left / energy, rel=1e-6)


# ---- what the mathematics forbids ---------------------------------------------------------------


@pytest.mark.parametrize("source", ["model", "state dict"])
def test_qwen3_refuses_irc_and_says_why(source, make_model, token_ids):
    model = make_model("qwen3")
    before = logits(model, token_ids)
    heads, _groups, _head_dim, _base = describe(model)
    given, extra = (model, {}) if source == "model" else (model.state_dict(), {"num_heads": heads})
    with pytest.warns(foldprune.FoldRefusedWarning, match="normalised"):
        lossless = foldprune.compress(given, recipe=Recipe.lossless(), **extra)
    after = logits(reloaded(model, lossless.state_dict()), token_ids)
    assert (after - before).abs().max() <= ABSOLUTE
    state = model.state_dict()
    for compressed in (
        lossless,
        foldprune.compress(given, recipe=Recipe(irc=2, dwc="pivot", fpp=0.5), **extra),
        foldprune.compress(given, 0.4, **extra),
    ):
        for layer in range(2):
            prefix = f"model.layers.{layer}.self_attn."
            for name in ("q_proj", "k_proj"):
                row = compressed.report[f"{prefix}{name}.weight"]
                assert row.method == "dense" and "normalised" in row.note
                assert np.array_equal(compressed[row.name], state[row.name].numpy())
            assert "DWC" in compressed.report[f"{prefix}v_proj.weight"].method
        assert "normalised" in str(compressed.report)
        reloaded(model, compressed.state_dict())
    assert "FPP" in compressed.report["model.layers.0.mlp.up_proj.weight"].method


def test_partial_rotation_refuses_irc(make_model):
    model = make_model("llama-gqa")
    config = {**model.config.to_dict(), "partial_rotary_factor": 0.5}
    compressed = foldprune.compress(model.state_dict(), recipe=Recipe.lossless(), config=config)
    row = compressed.report["model.layers.0.self_attn.q_proj.weight"]
    assert row.method == "dense" and "partial_rotary_factor" in row.note
    assert "DWC" in compressed.report["model.layers.0.self_attn.v_proj.weight"].method


def test_relative_positions_refuse_irc():
    state = reference.bert_state(layers=1)
    prefix = "encoder.layer.0.attention.self."
    state[prefix + "distance_embedding.weight"] = np.ones((63, 12), np.float32)
    compressed = foldprune.compress(state, recipe=Recipe.lossless(), num_heads=4)
    row = compressed.report[prefix + "query.weight"]
    assert row.method == "dense" and "relative position" in row.note
    assert "DWC" in compressed.report[prefix + "value.weight"].method


def test_unknown_model_is_an_error_that_lists_its_tensors():
    state = {"tower.stage0.mix.weight": np.ones((8, 8), np.float32)}
    with pytest.raises(foldprune.ModelError) as error:
        foldprune.compress(state, 0.3)
    assert "tower.stage0.mix.weight" in str(error.value)
    assert "foldprune.schemas.register" in str(error.value)
    with pytest.raises(foldprune.ModelError, match="mamba"):
        foldprune.compress(reference.bert_state(), 0.3, config={"model_type": "mamba"})


def test_a_block_with_unknown_tensors_is_an_error_that_lists_them(make_model):
    state = reference.bert_state()
    state["encoder.layer.1.attention.self.gate.weight"] = np.ones((4, 4), np.float32)
    with pytest.raises(foldprune.ModelError, match=r"layer\.1\.attention\.self\.gate\.weight"):
        foldprune.compress(state, recipe=Recipe.lossless(), num_heads=4)


def test_tensors_outside_the_blocks_stay_with_a_warning():
    state = reference.bert_state()
    state["extra.head.weight"] = np.ones((4, 4), np.float32)
    with pytest.warns(foldprune.UnmatchedTensorWarning, match=r"extra\.head\.weight"):
        compressed = foldprune.compress(state, 0.3, num_heads=4)
    assert compressed.report["extra.head.weight"].method == "dense"
    assert "extra.head.weight" in str(compressed.report)


def test_fpp_alone_works_on_any_state_dict():
    rng = np.random.default_rng(0)
    state = {
        "stage.0.mix": rng.standard_normal((20, 30)).astype(np.float32),
        "stage.0.embed.weight": rng.standard_normal((40, 10)).astype(np.float32),
        "stage.0.shift": rng.standard_normal(20).astype(np.float32),
        "steps": np.array(7),
    }
    with pytest.warns(foldprune.UnmatchedTensorWarning, match="unknown architecture"):
        compressed = foldprune.compress(state, recipe=Recipe(fpp=0.6))
    zeros = sum(
        int((compressed[name] == 0).sum()) for name in ("stage.0.mix", "stage.0.embed.weight")
    )
    assert zeros == 600
    assert reference.same_bytes(compressed["stage.0.shift"], state["stage.0.shift"])
    assert reference.same_bytes(compressed["steps"], state["steps"])
