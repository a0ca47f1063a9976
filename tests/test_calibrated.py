"""Compression with a calibration: damage against its definition, and real transformers models as
judges."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import reference
from models import (
    FAMILIES,
    batches,
    costs,
    damage,
    error,
    inputs,
    loaded,
    out_in,
    output_error,
    settled,
)

import foldprune
from foldprune import Calibration, Recipe
from foldprune.calibrated import apply_attention, make_plan
from foldprune.errors import ModelError, RateError, TensorError

Array = np.ndarray[Any, np.dtype[Any]]

# ---- whole models -------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _refusals_are_expected():
    """Random models of some families cannot be folded, which is said each time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", foldprune.FoldRefusedWarning)
        yield


def by_name(compressed: foldprune.Compressed) -> dict[str, Any]:
    return {row.name: row for row in compressed.report.rows}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rate_is_reached_and_the_outputs_are_nearer(known, family):
    model, calibration = known(family)
    for rate in (0.2, 0.5):
        got = foldprune.compress(model, rate, calibration=calibration, threads=1)
        assert got.report.removed == pytest.approx(rate, abs=0.005)
        free = foldprune.compress(model, rate, threads=1)
        assert output_error(model, got) < 0.6 * output_error(model, free)


@pytest.mark.parametrize("family", FAMILIES)
def test_rate_zero_is_still_lossless(known, family):
    model, calibration = known(family)
    got = foldprune.compress(model, 0, calibration=calibration, threads=1)
    assert output_error(model, got) < 1e-10
    assert got.report.removed == foldprune.compress(model, 0, threads=1).report.removed
    assert got.recipe == Recipe.lossless()


@pytest.mark.parametrize("gradients", [0, 16])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-gqa", "llama-tied", "qwen3"])
@pytest.mark.parametrize("granularity", ["weight", "2:4", "4x1", "row", "neuron"])
def test_layers_lose_less_than_by_magnitude(known, family, granularity, gradients):
    """Every fitted matrix on the inputs that it really has, which is also what the report says."""
    model, calibration = known(family, gradients)
    met = inputs(model)
    on = ("feed_forward", "attention_output", "qkv")
    recipe = Recipe(
        fpp=0.5,
        fpp_on=on[:1] if granularity == "neuron" else on,
        fpp_granularity=granularity,
        fpp_scope="tensor",
    )
    got = foldprune.compress(model, recipe=recipe, calibration=calibration, threads=1)
    free = foldprune.compress(model, recipe=recipe, threads=1)
    job, measured = settled(model, calibration)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    checked = 0
    for row in got.report.rows:
        if row.name not in met or "FPP" not in row.method:
            continue
        w, new, other = (out_in(model, row.name, s) for s in (state, got, free))
        assert (new == 0).sum() == (other == 0).sum()
        if granularity == "neuron" and len(w) > 48:
            continue  # up and gate only lose rows
        x = met[row.name]
        assert row.error == pytest.approx(error(w, new, x), rel=1e-4)
        cost = costs(job, measured, row.name)
        assert damage(w, new, x, cost) <= damage(w, other, x, cost)
        checked += 1
    assert checked >= (2 if granularity == "neuron" else 8)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("family", ["bert", "llama-gqa"])
def test_other_dtypes(known, family, dtype):
    import torch

    model, calibration = known(family)
    model = copy.deepcopy(model).to(getattr(torch, dtype))
    got = foldprune.compress(model, 0.4, calibration=calibration, threads=1)
    assert got.report.removed == pytest.approx(0.4, abs=0.005)
    assert {tensor.dtype for tensor in got.state_dict().values()} == {getattr(torch, dtype)}
    free = foldprune.compress(model, 0.4, threads=1)
    assert output_error(model, got) < 0.6 * output_error(model, free)


# ---- recipes ------------------------------------------------------------------------------------


def test_scopes(known):
    model, calibration = known("llama-gqa")
    removed = {}
    for scope in ("global", "tensor", "row"):
        recipe = Recipe(fpp=0.5, fpp_scope=scope)
        got = foldprune.compress(model, recipe=recipe, calibration=calibration, threads=1)
        assert got.recipe == recipe
        rows = [row for row in got.report.rows if "FPP" in row.method]
        assert {row.group for row in rows} == {"embedding", "feed_forward", "attention_output"}
        removed[scope] = np.array([row.removed for row in rows])
        numbers = np.array([row.numbers for row in rows])
        assert removed[scope] @ numbers == pytest.approx(0.5 * numbers.sum(), abs=len(rows))
        if scope == "row":
            for row in rows:
                per_row = (np.asarray(got[row.name]) == 0).sum(axis=1)
                assert (per_row == round(0.5 * row.shape[1])).all()
    assert np.ptp(removed["global"]) > 0.2
    assert (removed["tensor"] == 0.5).all() and (removed["row"] == 0.5).all()


@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_what_is_folded_takes_no_share_from_the_others(known, family):
    model, calibration = known(family)
    recipe = Recipe(fpp=0.5, fpp_on=("feed_forward", "qkv"), irc=4, dwc="pivot")
    got = foldprune.compress(model, recipe=recipe, calibration=calibration, threads=1)
    rows = [row for row in got.report.rows if "FPP" in row.method]
    assert {row.group for row in rows} == (
        {"feed_forward"} if family == "bert" else {"feed_forward", "qkv"}
    )
    numbers = sum(row.numbers for row in rows)
    assert sum(row.stored for row in rows) == pytest.approx(0.5 * numbers, abs=len(rows))


def test_overrides(known):
    model, calibration = known("llama-gqa")
    recipe = Recipe(
        fpp=0.5,
        fpp_scope="tensor",
        fpp_on=("feed_forward", "attention_output"),
        overrides={
            "model.layers.0.*": {"fpp": None},
            "*.1.mlp.up_proj.weight": {"fpp": 0.8},
            "*.1.mlp.gate_proj.weight": {"fpp_granularity": "2:4"},
            "*.1.mlp.down_proj.weight": {"fpp_granularity": "4x1", "fpp": 0.25},
        },
    )
    rows = by_name(foldprune.compress(model, recipe=recipe, calibration=calibration, threads=1))
    assert all(row.method == "dense" for name, row in rows.items() if ".0." in name)
    methods = {name.split(".")[-2]: row.method for name, row in rows.items() if "FPP" in row.method}
    assert methods == {
        "o_proj": "FPP 50.0% weight",
        "up_proj": "FPP 80.0% weight",
        "gate_proj": "FPP 50.0% 2:4",
        "down_proj": "FPP 25.0% 4x1",
    }


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-gqa"])
def test_folds_with_pruning(known, family):
    model, calibration = known(family)
    recipe = Recipe(fpp=0.3, fpp_scope="tensor", fpp_on=("attention_output", "qkv"), irc=4, dwc=8)
    got = foldprune.compress(model, recipe=recipe, calibration=calibration, threads=1)
    for row in got.report.rows:
        if row.group == "qkv" and len(row.shape) == 2:
            assert "IRC" in row.method or "DWC" in row.method
            assert "FPP" not in row.method and "folded, so not pruned" in row.note
        if row.group == "attention_output" and len(row.shape) == 2:
            assert row.method == "DWC remainder k=8 + FPP 30.0% weight"
    free = foldprune.compress(model, recipe=recipe, threads=1)
    assert output_error(model, got) < output_error(model, free)


@pytest.mark.parametrize("mode", ["lossless", 6, "pivot"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-gqa", "llama-bias", "qwen2"])
def test_what_the_output_projection_reads_after_its_values_were_folded(known, family, mode):
    """The second moments that it is fitted to, against those of the folded model."""
    from foldprune.torch import calibrate

    model, calibration = known(family)
    recipe = Recipe(dwc=mode)
    job, measured = settled(model, calibration)
    plan = make_plan(job, measured, 0.0, recipe)
    block = job.layout.attentions[0]
    name = block.output.weight
    before = measured.require_gram(name).second
    apply_attention(job, measured, block, plan)
    gram = measured.require_gram(name)
    folded = loaded(model, job.finish(recipe))
    real = calibrate(folded, batches(), gradients=0, progress=False, threads=1).moments(name)
    assert real is not None and gram.split is not None
    tolerance = {"lossless": 1e-5, 6: 0.1, "pivot": 0.6}[mode]
    for have, want in ((gram.second, real.second), (gram.split[0], real.fit)):
        assert np.linalg.norm(have - want) < tolerance * np.linalg.norm(want)
        assert np.linalg.eigvalsh(have)[0] > -1e-9 * np.trace(have)
    assert np.linalg.norm(before - real.second) > 0.8 * np.linalg.norm(real.second)


# ---- what comes with it -------------------------------------------------------------------------


def test_notes_say_what_the_damage_is(known):
    model, calibration = known("bert")
    assert not foldprune.compress(model, 0.3, calibration=calibration, threads=1).report.notes[1:]
    model, without = known("bert", 0)
    got = foldprune.compress(model, 0.3, calibration=without, threads=1)
    assert any("no gradients" in note for note in got.report.notes)
    assert output_error(model, got) < 0.6 * output_error(model, foldprune.compress(model, 0.3))


def test_a_calibration_without_gradients_serves_every_family(known):
    for family in ("gpt2", "llama-tied", "qwen3"):
        model, calibration = known(family, 0)
        got = foldprune.compress(model, 0.4, calibration=calibration, threads=1)
        assert got.report.removed == pytest.approx(0.4, abs=0.005)
        free = foldprune.compress(model, 0.4, threads=1)
        assert output_error(model, got) < 0.7 * output_error(model, free)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-tied"])
def test_saved_and_loaded(known, family, tmp_path):
    model, calibration = known(family)
    got = foldprune.compress(model, 0.5, calibration=calibration, threads=1)
    got.save(tmp_path / "model.safetensors")
    back = foldprune.load(tmp_path / "model.safetensors")
    assert back.recipe == got.recipe and back.report.to_dict() == got.report.to_dict()
    for name, tensor in got.state_dict("numpy").items():
        assert reference.same_bytes(np.asarray(back[name]), np.asarray(tensor))
    calibration.save(tmp_path / "calibration.safetensors")
    loaded_back = Calibration.load(tmp_path / "calibration.safetensors")
    again = foldprune.compress(model, 0.5, calibration=loaded_back, threads=1)
    for name, tensor in got.state_dict("numpy").items():
        assert reference.same_bytes(np.asarray(again[name]), np.asarray(tensor))


@pytest.mark.parametrize(
    "how",
    [
        {"rate": 0.4},
        {"recipe": Recipe(fpp=0.5, irc=4, dwc=6)},
        {"recipe": Recipe(fpp=0.5, fpp_granularity="2:4", fpp_on=("feed_forward", "qkv"))},
        {"recipe": Recipe(fpp=0.5, fpp_granularity="neuron")},
        {"recipe": Recipe(fpp=0.5, fpp_granularity="4x1")},
    ],
    ids=["rate", "folds", "2:4", "neuron", "4x1"],
)
def test_the_same_bytes_for_any_number_of_threads(known, how):
    model, calibration = known("llama-gqa")
    one = foldprune.compress(model, **how, calibration=calibration, threads=1).state_dict("numpy")
    for threads in (2, 3):
        more = foldprune.compress(model, **how, calibration=calibration, threads=threads)
        for name, array in one.items():
            assert reference.same_bytes(np.asarray(more[name]), np.asarray(array)), name


def test_numpy_in_and_nothing_is_changed(known):
    model, calibration = known("gpt2")
    state = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    before = {name: array.tobytes() for name, array in state.items()}
    del state["lm_head.weight"]  # as checkpoints leave out what is tied
    config = model.config.to_dict()
    got = foldprune.compress(state, 0.4, config=config, calibration=calibration, threads=1)
    assert all(array.tobytes() == before[name] for name, array in state.items())
    whole = foldprune.compress(model, 0.4, calibration=calibration, threads=1)
    for name in state:
        assert reference.same_bytes(np.asarray(got[name]), np.asarray(whole[name])), name


def test_progress_only_goes_forward(known):
    model, calibration = known("bert")
    for how in ({"rate": 0.4}, {"rate": 0}, {"recipe": Recipe(fpp=0.5, irc=4)}):
        calls: list[tuple[int, int, str]] = []
        foldprune.compress(
            model, **how, calibration=calibration, progress=lambda *call, to=calls: to.append(call)
        )
        done = [call[0] for call in calls]
        assert done == sorted(done) and calls[-1][0] == calls[-1][1] > 0
        assert len({call[1] for call in calls}) == 1


# ---- bad input ----------------------------------------------------------------------------------


def rows(width: int) -> Array:
    return np.random.default_rng(0).standard_normal((4, 64, width)).astype(np.float32)


def test_a_calibration_of_another_model(known):
    llama, of_llama = known("llama-gqa")
    bert, of_bert = known("bert")
    for model, calibration, name in ((llama, of_bert, "bert.enc"), (bert, of_llama, "model.lay")):
        for call in (foldprune.compress, foldprune.sensitivity):
            with pytest.raises(ModelError, match=f"does not have: .*{name}.*another model's"):
                call(model, calibration=calibration, threads=1)


@pytest.mark.parametrize("layer", ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"])
def test_a_calibration_of_another_width(known, layer):
    model, _ = known("llama-gqa")
    outputs, width = model.get_submodule(layer).weight.shape
    calibration = Calibration()
    calibration.update(layer, rows(width + 1))
    with pytest.raises(ModelError, match=rf"'{layer}.weight'.*with {width + 1} inputs"):
        foldprune.compress(model, calibration=calibration, threads=1)
    calibration = Calibration()
    calibration.update_gradient(layer, rows(outputs - 1))
    with pytest.raises(ModelError, match=rf"'{layer}.weight'.*{outputs - 1} outputs"):
        foldprune.compress(model, calibration=calibration, threads=1)


def test_a_calibration_of_another_vocabulary(known):
    model, _ = known("llama-tied")
    calibration = Calibration()
    calibration.update_tokens("model.embed_tokens", np.arange(50), 90)
    with pytest.raises(ModelError, match=r"'model.embed_tokens.weight'.*90 embedding rows"):
        foldprune.compress(model, calibration=calibration, threads=1)


def test_a_name_that_no_layer_has(known):
    model, _ = known("llama-gqa")
    calibration = Calibration()
    calibration.update("model.layers.7.mlp.up_proj", rows(48))
    with pytest.raises(ModelError, match=r"model\.layers\.7\.mlp\.up_proj.*state dict"):
        foldprune.compress(model, calibration=calibration, threads=1)


def test_statistics_are_missing(known):
    """Of a matrix that is to be pruned; where nothing is pruned none are needed."""
    from foldprune.torch import calibrate

    model, _ = known("llama-gqa")
    options: dict[str, Any] = {"gradients": 0, "progress": False, "threads": 1}
    calibration = calibrate(model, batches(), names="*.mlp.*", **options)
    with pytest.raises(TensorError, match=r"'model\.layers\.0\.self_attn\.\w+\.weight'.*update"):
        foldprune.compress(model, 0.3, calibration=calibration, threads=1)
    recipe = Recipe(fpp=0.5, fpp_on=("feed_forward", "attention_output"), fpp_scope="tensor")
    with pytest.raises(TensorError, match=r"'\S+\.0\.self_attn\.o_proj\.weight'.*overrides"):
        foldprune.compress(model, recipe=recipe, calibration=calibration, threads=1)
    recipe = Recipe.from_dict({**recipe.to_dict(), "overrides": {"*.o_proj.*": {"fpp": None}}})
    got = foldprune.compress(model, recipe=recipe, calibration=calibration, threads=1)
    assert sum("FPP" in row.method for row in got.report.rows) == 6
    got = foldprune.compress(model, recipe=Recipe(irc=3), calibration=calibration, threads=1)
    assert any("model.layers.0" in note and "without data" in note for note in got.report.notes)


def test_an_empty_calibration(known):
    model, _ = known("bert")
    got = foldprune.compress(model, 0, calibration=Calibration(), threads=1)
    assert any("no calibration" in note for note in got.report.notes)
    with pytest.raises(TensorError, match="has no statistics of this layer"):
        foldprune.compress(model, recipe=Recipe(fpp=0.5), calibration=Calibration(), threads=1)


def test_arguments_of_other_kinds(known, tmp_path):
    model, calibration = known("bert")
    for wrong in ("calibration.safetensors", {}, calibration.moments("cls.predictions.decoder")):
        for call in (foldprune.compress, foldprune.sensitivity):
            with pytest.raises(TypeError, match=r"calibration: expected a foldprune\.Calibration"):
                call(model, calibration=wrong)


def test_above_the_largest_possible_rate_the_error_names_it(known):
    model, calibration = known("bert")
    with pytest.raises(RateError, match=r"largest possible is 0\.9") as caught:
        foldprune.compress(model, 0.999, calibration=calibration, threads=1)
    largest = float(str(caught.value).partition("largest possible is ")[2].split()[0])
    got = foldprune.compress(model, largest - 1e-4, calibration=calibration, threads=1)
    assert got.report.removed == pytest.approx(largest, abs=0.005)
