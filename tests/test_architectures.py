"""Every further family, judged by its real forward pass; torch.nn's own modules; names with
prefixes, several models in one dict."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import architectures
import models
import numpy as np
import pytest
import reference
import transformers
from architectures import FAMILIES, Family
from safetensors.numpy import save_file

import foldprune
import foldprune.torch
from foldprune import Recipe, irc, schemas
from foldprune.schemas.layout import find_layout

ABSOLUTE = 1e-5
EVERY = list(FAMILIES)


pytestmark = pytest.mark.usefixtures("one_thread", "no_warnings")


def reloaded(model: Any, compressed: foldprune.Compressed) -> Any:
    other = copy.deepcopy(model)
    other.load_state_dict(compressed.state_dict(), strict=True)
    return other


def shape_of(call: architectures.Call, model: Any, family: Family) -> tuple[Any, ...]:
    """heads, key heads, head size, base of the rotary embedding, scaled."""
    heads = call.weights.shape[1]
    rows = model.state_dict()[call.weight_names["query"]].shape[0] // (3 if family.fused else 1)
    return heads, family.groups or heads, rows // heads, family.rope, family.scaled


def check(name: str, model: Any, compressed: foldprune.Compressed) -> None:
    """The dense state dict's attentions put out what the stored factors do, in float64."""
    family = FAMILIES[name]
    other = reloaded(model, compressed)
    own = architectures.dense_encodings(model)
    before, after = (architectures.calls(m, family) for m in (model, other))
    assert len(before) == len(after) >= 2
    for dense, call in zip(before, after, strict=True):
        shape = shape_of(call, model, family)
        stored = architectures.stored(call, compressed.encodings, family, shape[0])
        if family.refused is None:
            factors = architectures.stored(dense, own, family, shape[0])
            added = architectures.added(dense, factors, shape)
            want = [
                reference.attention(x, stored, *shape[:4], False, shape[4], k, v, a)
                for x, k, v, a in zip(call.queries, call.keys, call.values, added, strict=True)
            ]
        else:  # query and key are as they were
            want = [
                reference.mixed(weights, values, stored, *shape[:3])
                for weights, values in zip(call.weights, call.values, strict=True)
            ]
        assert np.abs(call.outputs).max() > 0.05  # the comparison means something
        assert np.abs(np.stack(want) - call.outputs).max() <= ABSOLUTE


# ---- every family -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("how", ["recipe", "rate"])
def test_lossless(name, how):
    family, model = FAMILIES[name], architectures.make(name)
    before = architectures.forward(model)
    assert 0.05 < np.abs(before).max() < 50
    if family.refused:
        with pytest.warns(foldprune.FoldRefusedWarning, match=family.refused):
            compressed = foldprune.compress(model, recipe=Recipe.lossless())
    elif how == "recipe":
        compressed = foldprune.compress(model, recipe=Recipe.lossless())
    else:
        compressed = foldprune.compress(model, 0)
    assert compressed.report.schema == family.schema
    after = architectures.forward(reloaded(model, compressed))
    assert np.abs(after - before).max() <= ABSOLUTE
    verified = foldprune.verify(model, compressed)
    assert verified.lossless
    for call in architectures.calls(model, family):
        names = call.weight_names["query"]
        assert any(names.startswith(f"{block.name}.") for block in verified.blocks)
        for role, weight in call.weight_names.items():
            row = compressed.report[weight]
            if role in ("query", "key") and family.refused:
                assert family.refused in row.note and "IRC lossless" not in row.method
            elif role in ("query", "key"):
                assert "IRC lossless" in row.method
            else:
                assert "DWC lossless" in row.method


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(irc=1),
        Recipe(irc=5, dwc="pivot"),
        Recipe(irc="lossless", dwc=2),
        Recipe(irc=2, dwc=0, fpp=0.5),
        Recipe(irc=3, irc_fpp=0.5),
    ],
    ids=["1", "5-pivot", "lossless-2", "2-0-fpp", "3-pruned"],
)
def test_reduced_rank(name, recipe):
    model = architectures.make(name)
    check(name, model, foldprune.compress(model, recipe=recipe))


@pytest.mark.parametrize("name", EVERY)
def test_slice(name):
    """Each head reads its own slice of what value reads; refused where that is not defined."""
    model = architectures.make(name)
    compressed = foldprune.compress(model, recipe=Recipe(dwc="slice"))
    check(name, model, compressed)
    for call in architectures.calls(model, FAMILIES[name]):
        heads, groups, head_dim, *_ = shape_of(call, model, FAMILIES[name])
        row = compressed.report[call.weight_names["value"]]
        if heads == groups and heads * head_dim == call.values.shape[2]:
            assert row.method == "DWC slice"
        else:
            assert row.method == "dense" and "a slice needs" in row.note


@pytest.mark.parametrize("name", EVERY)
def test_rate(name):
    model = architectures.make(name)
    rate = 0.1 if name == "mixtral" else 0.4  # fused experts stay
    compressed = foldprune.compress(model, rate)
    check(name, model, compressed)
    assert abs(compressed.report.removed - rate) <= 0.005


@pytest.mark.parametrize("name", EVERY)
def test_known_by_its_tensors_alone(name):
    """Without a configuration the family is the same, or one of the same names; no tensor is
    unknown to it."""
    model = architectures.make(name)
    state = model.state_dict()
    if name == "clip":  # with its own numbers of heads
        config = model.config.to_dict()
        config.pop("model_type")
        compressed = foldprune.compress(state, recipe=Recipe.lossless(), config=config)
    else:
        compressed = foldprune.compress(state, recipe=Recipe.lossless(), num_heads=4)
    same_names = {"gemma": "llama"}
    expected = FAMILIES[name].schema
    assert compressed.report.schema in (expected, same_names.get(name, expected))
    after = architectures.forward(reloaded(model, compressed))
    assert np.abs(after - architectures.forward(model)).max() <= ABSOLUTE


@pytest.mark.parametrize("name", EVERY)
def test_other_heads_are_known_too(name):
    """Classes of transformers for other tasks have no tensors that the schema does not know
    (which would be a warning, and that an error here)."""
    config = FAMILIES[name].make().config
    tasks = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
    autos = [getattr(transformers, f"AutoModelFor{task}") for task in tasks]
    for auto in (transformers.AutoModel, *autos):
        if type(config) in auto._model_mapping:
            model = models.randomise(auto.from_config(config), 0)
            compressed = foldprune.compress(model, recipe=Recipe.lossless())
            assert compressed.report.schema == FAMILIES[name].schema
            assert compressed.report.removed > 0


@pytest.mark.parametrize("name", EVERY)
def test_tied_stay_tied(name):
    model = architectures.make(name)
    state = foldprune.compress(model, recipe=Recipe(fpp=0.5)).state_dict()
    by_storage: dict[int, list[str]] = {}
    for tensor, value in model.state_dict().items():
        by_storage.setdefault(value.data_ptr(), []).append(tensor)
    for first, *others in by_storage.values():
        assert all(state[other].data_ptr() == state[first].data_ptr() for other in others)


def test_one_of_the_ties_is_there():
    """So that the test above means something."""
    state = architectures.make("t5").state_dict()
    assert state["lm_head.weight"].data_ptr() == state["encoder.embed_tokens.weight"].data_ptr()


def test_readme_has_the_table():
    readme = Path(__file__).parent.parent / "README.md"
    assert schemas.table() in readme.read_text(encoding="utf-8")


# ---- checkpoints on disk ------------------------------------------------------------------------


def on_disk(model: Any, folder: Any, recipe: Recipe) -> tuple[Any, foldprune.Compressed]:
    """The model that transformers reads from the decompressed checkpoint."""
    model.save_pretrained(folder)
    compressed = foldprune.compress(folder, recipe=recipe)
    arrays = {name: np.ascontiguousarray(compressed[name]) for name in compressed.encodings}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return type(model).from_pretrained(folder, attn_implementation="eager"), compressed


def test_mixtral_on_disk(tmp_path):
    """Each expert has tensors of its own there, which are feed-forward layers."""
    model = architectures.make("mixtral")
    before = architectures.forward(model)
    other, compressed = on_disk(model, tmp_path, Recipe.lossless())
    assert np.abs(architectures.forward(other) - before).max() <= ABSOLUTE
    pruned = foldprune.compress(tmp_path, recipe=Recipe(fpp=0.5, fpp_granularity="neuron"))
    for expert in range(4):
        prefix = f"model.layers.1.block_sparse_moe.experts.{expert}"
        units = [
            (pruned[f"{prefix}.{name}.weight"] != 0).any(axis=axis)
            for name, axis in (("w1", 1), ("w3", 1), ("w2", 0))
        ]
        assert units[0].sum() == 40
        assert all(np.array_equal(kept, units[0]) for kept in units)
    gate = compressed.report["model.layers.1.block_sparse_moe.gate.weight"]
    assert (gate.group, gate.method) == ("other", "dense")


def test_fused_experts_stay_and_the_report_says_so():
    model = architectures.make("mixtral")
    report = foldprune.compress(model, recipe=Recipe(fpp=0.5)).report
    assert report["model.layers.0.mlp.experts.down_proj"].method == "dense"
    assert any("mlp.experts.down_proj" in note and "on disk" in note for note in report.notes)


def test_vit_on_disk(tmp_path):
    """Its checkpoints have other names than transformers 5 has in memory."""
    model = architectures.make("vit")
    before = architectures.forward(model)
    other, compressed = on_disk(model, tmp_path, Recipe.lossless())
    row = compressed.report["vit.encoder.layer.0.attention.attention.query.weight"]
    assert row.method == "IRC lossless"
    assert np.abs(architectures.forward(other) - before).max() <= ABSOLUTE


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.", "bert.", "module.", "_orig_mod.", "a.b.module."])
def test_prefixes(prefix):
    state = reference.bert_state()
    plain = foldprune.compress(state, recipe=Recipe(irc=3, dwc="pivot"), num_heads=4)
    named = {prefix + name: array for name, array in state.items()}
    compressed = foldprune.compress(named, recipe=Recipe(irc=3, dwc="pivot"), num_heads=4)
    for name in state:
        np.testing.assert_array_equal(compressed[prefix + name], plain[name])


def test_blocks_that_were_compiled_or_wrapped_one_by_one():
    state = reference.llama_state()
    plain = foldprune.compress(state, recipe=Recipe(irc=3, dwc="pivot"), num_heads=4)
    renamed = {name: name.replace("layers.1.", "layers.1._orig_mod.module.", 1) for name in state}
    compressed = foldprune.compress(
        {renamed[name]: array for name, array in state.items()},
        recipe=Recipe(irc=3, dwc="pivot"),
        num_heads=4,
    )
    for name in state:
        np.testing.assert_array_equal(compressed[renamed[name]], plain[name])


def test_two_models_in_one_dict():
    """Each block is weighed by its own model's norms."""
    towers = {"query.": reference.bert_state(seed=1), "document.": reference.bert_state(seed=2)}
    rng = np.random.default_rng(0)
    for state in towers.values():
        gain = rng.uniform(0.1, 3, 48).astype(np.float32)
        state["embeddings.LayerNorm.weight"] = gain
    together = foldprune.compress(
        {prefix + name: a for prefix, state in towers.items() for name, a in state.items()},
        recipe=Recipe(irc=3, dwc="pivot"),
        num_heads=4,
    )
    for prefix, state in towers.items():
        alone = foldprune.compress(state, recipe=Recipe(irc=3, dwc="pivot"), num_heads=4)
        for name in state:
            np.testing.assert_array_equal(together[prefix + name], alone[name])


def test_towers_of_different_heads():
    model = architectures.make("clip")
    compressed = foldprune.compress(model, recipe=Recipe.lossless())
    by_block = compressed.report.heads["by_block"]
    heads = {"text_model": 4, "vision_model": 5}
    assert by_block == {
        f"{tower}.encoder.layers.{i}": count for tower, count in heads.items() for i in range(2)
    }
    assert "in the first block" in str(compressed.report)
    with pytest.raises(foldprune.ModelError, match="contradicts"):
        foldprune.compress(model, recipe=Recipe.lossless(), num_heads=4)


def test_another_block_without_attention_stays_with_a_warning():
    state = reference.llama_state() | {"vision.layers.0.weight": np.ones((4, 4), np.float32)}
    with pytest.warns(foldprune.UnmatchedTensorWarning, match=r"vision\.layers\.0\.weight"):
        compressed = foldprune.compress(state, recipe=Recipe.lossless(), num_heads=4)
    assert compressed.report["vision.layers.0.weight"].method == "dense"


# ---- configurations -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gpt-neox", None),
        ("gpt-neox", {"rotary_pct": 0.25}),
        ("gpt-neox", {"partial_rotary_factor": 0.5}),
        ("phi", None),
        ("phi", {"rope_parameters": {"partial_rotary_factor": 0.4}}),
    ],
)
def test_partial_rotation_is_refused_whatever_is_known(family, config):
    state = architectures.make(family).state_dict()
    heads = {"num_heads": 4} if config is None else {}
    config = config and {"num_attention_heads": 4, **config}
    compressed = foldprune.compress(state, recipe=Recipe(irc=2), config=config, **heads)
    rows = [row for row in compressed.report.rows if row.group == "qkv" and "weight" in row.name]
    assert rows and all(row.method == "dense" for row in rows)
    assert all(
        "only part of each head rotates" in row.note for row in rows if "v_p" not in row.name
    )


@pytest.mark.parametrize("key", ["rotary_pct", "partial_rotary_factor"])
def test_whole_rotation_keeps_planes(key):
    state = architectures.make("gpt-neox").state_dict()
    config = {"model_type": "gpt_neox", "num_attention_heads": 4, key: 1.0}
    compressed = foldprune.compress(state, recipe=Recipe(irc=2), config=config)
    row = compressed.report["gpt_neox.layers.0.attention.query_key_value.weight"]
    assert row.method == "IRC planes=2"


# ---- with data ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_cross_attention_gains_from_data(name):
    """A fold for the data has less error in the logits of cross-attention, up to a constant in each
    row, than one without data."""
    model, family = architectures.make(name), FAMILIES[name]
    data = [architectures.inputs(model, seed) for seed in range(8)]
    calibration = foldprune.torch.calibrate(model, data, gradients=0, progress=False)
    job, measured = models.settled(model, calibration)
    for block in job.layout.attentions:
        for matrix, moments in (
            (block.query, measured.query_moments(block)),
            (block.value, measured.source_moments(block)),
        ):
            layer = calibration.moments(matrix.weight.removesuffix(".weight"))
            np.testing.assert_array_equal(moments.second, layer.second)
    recipe = Recipe(irc=3)
    own = architectures.dense_encodings(model)
    folded = [
        foldprune.compress(model, recipe=recipe, calibration=c).encodings
        for c in (calibration, None)
    ]
    calls = [c for c in architectures.calls(model, family) if "encoder_attn" in c.roles[0]]
    assert len(calls) == 2
    for call in calls:
        shape = shape_of(call, model, family)
        logits = [
            np.stack(
                [
                    reference.scaled_logits(
                        x, k, architectures.stored(call, encodings, family, shape[0]), *shape
                    )
                    for x, k in zip(call.queries, call.keys, strict=True)
                ]
            )
            for encodings in (own, *folded)
        ]
        dense, with_data, without = (m - m.mean(axis=-1, keepdims=True) for m in logits)
        errors = [np.square(m - dense).sum() for m in (with_data, without)]
        assert errors[0] < 0.7 * errors[1]


@dataclasses.dataclass
class Known:
    """Moments of so many rows that nothing is shrunk."""

    mean: np.ndarray
    second: np.ndarray
    count: float = 1e9


def test_irc_of_cross_attention_is_the_best_for_what_both_sides_read():
    """Eckart and Young, over all pairs of a query and a (centred) key of the data."""
    rng = np.random.default_rng(0)
    heads, rank, rows = 3, 2, 300
    state = {
        "q_proj_weight": rng.standard_normal((24, 24)),
        "k_proj_weight": rng.standard_normal((24, 20)),
        "v_proj_weight": rng.standard_normal((24, 20)),
        "in_proj_bias": rng.standard_normal(72),
        "out_proj.weight": rng.standard_normal((24, 24)),
    }
    (block,) = find_layout(state, schemas.known(), None, heads).attentions
    x, y = (
        rng.standard_normal((rows, width)) * rng.uniform(0.1, 3, width) + 1 for width in (24, 20)
    )
    moments = [Known(a.mean(axis=0), a.T @ a / rows) for a in (x, y)]
    fold = irc.fold(block, state, np.full(heads, rank), 1, *moments)

    def products(query: np.ndarray, bias: np.ndarray, key: np.ndarray) -> list[np.ndarray]:
        q = (x @ query.T + bias).reshape(rows, heads, -1)
        k = ((y - y.mean(axis=0)) @ key.T).reshape(rows, heads, -1)
        return [q[:, i] @ k[:, i].T for i in range(heads)]

    dense = products(state["q_proj_weight"], state["in_proj_bias"][:24], state["k_proj_weight"])
    folded = products(
        fold.weights["query"].unpack(),
        fold.biases["query"].unpack(),
        fold.weights["key"].unpack(),
    )
    for whole, approximated in zip(dense, folded, strict=True):
        least = reference.spectrum(whole, 8)[rank:].sum()
        assert np.square(whole - approximated).sum() == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize("name", ["bart", "clip", "albert"])
def test_what_is_no_chain_of_blocks_is_not_compressed_block_by_block(name):
    model = architectures.make(name)
    with pytest.raises(foldprune.ModelError, match="block by block"):
        foldprune.torch.compress(
            model, [architectures.inputs(model)], 0.2, gradients=0, progress=False
        )


def test_a_tied_embedding_whose_lookups_are_not_counted_is_pruned_as_an_embedding():
    """Gemma scales what it looks up, in a class of its own."""
    model = architectures.make("gemma")
    data = [architectures.inputs(model, seed) for seed in range(4)]
    compressed = foldprune.torch.compress(
        model, data, recipe=Recipe(fpp=0.5, fpp_scope="tensor"), gradients=0, progress=False
    )
    row = compressed.report["model.embed_tokens.weight"]
    kept = compressed[row.name]
    assert row.method.startswith("FPP 50.0%")
    # nothing makes up for a removed number of a row that is looked up
    assert np.array_equal(kept[kept != 0], model.state_dict()[row.name].numpy()[kept != 0])
