"""Compression with a calibration: fits against NumPy's least squares and real data, damage against
its definition, and real transformers models as judges."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import ml_dtypes
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
from foldprune.fit import DAMPINGS, SEARCH_DAMPING, Gram, fit, fit_neurons
from foldprune.prune import Pruned, Target, prune, prune_neurons
from foldprune.recipe import Granularity

Array = np.ndarray[Any, np.dtype[Any]]

# (granularity, scope, share)
WAYS = [
    ("weight", "tensor", 0.6),
    ("weight", "row", 0.6),
    ("2:4", "tensor", 0.5),
    ("4x1", "tensor", 0.5),
    ("row", "tensor", 0.25),
]
NAMES = [f"{granularity} {scope}" for granularity, scope, _ in WAYS]
OUT, IN = 24, 40


# ---- one matrix ---------------------------------------------------------------------------------


def data(sequences: int = 16, tokens: int = 32, seed: int = 0) -> Array:
    """Inputs with strong correlations, unequal scales and a mean: (sequences, tokens, IN)."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((sequences, tokens, 12)) @ rng.standard_normal((12, IN))
    noise = rng.standard_normal((sequences, tokens, IN))
    scales = np.random.default_rng(1).uniform(0.2, 3, IN)
    return ((mixed + noise + 0.5) * scales).astype(np.float32)


def weights(dtype: Any = np.float32, seed: int = 0, shape: tuple[int, int] = (OUT, IN)) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def gram_of(x: Array, held_out: int | None = 4) -> Gram:
    calibration = Calibration(held_out=held_out)
    calibration.update("layer", x)
    moments = calibration.moments("layer")
    assert moments is not None
    return Gram(moments, 1)


def run_fit(way: tuple[str, str, float], matrix: Array, gram: Gram, **options: Any) -> Pruned:
    granularity, scope, share = way
    target = Target("layer.weight", matrix)
    return fit(target, gram, share, Granularity.parse(granularity), scope, **options)


def second(x: Array) -> Array:
    rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
    return rows.T @ rows / len(rows)


def damped(c: Array, damping: float) -> Array:
    return c + damping * np.diagonal(c).mean() * np.eye(len(c))


def least_squares(w: Array, keep: Array, h: Array) -> Array:
    """Every row's w' of that support with the least (w - w') H (w - w')^T."""
    out = np.zeros(w.shape)
    for row, support, new in zip(w.astype(np.float64), keep, out, strict=True):
        if support.any():
            new[support] = np.linalg.solve(h[np.ix_(support, support)], (h @ row)[support])
    return out


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_kept_is_the_least_squares_solution(way, dtype):
    """On the support that the fit came to, with one of the dampings; the fixed one without held-out
    rows."""
    x, w = data(), weights(dtype)
    tolerance = 1e-9 if dtype == np.float64 else 3e-5
    for held_out, dampings in ((4, DAMPINGS), (None, (SEARCH_DAMPING,))):
        new = run_fit(way, w, gram_of(x, held_out)).encoding.unpack()
        assert new.dtype == dtype
        best = [least_squares(w, new != 0, damped(second(x), damping)) for damping in dampings]
        distance = [np.abs(new - solution).max() / np.abs(solution).max() for solution in best]
        assert min(distance) < tolerance


@pytest.mark.parametrize("way", WAYS[3:], ids=NAMES[3:])
@pytest.mark.parametrize("sequences", [4, 40])
def test_the_damping_is_the_best_on_held_out_rows(way, sequences):
    """Of a support that does not depend on it: fitted without the held-out rows, judged on them."""
    x, w = data(sequences, 8), weights(np.float64)
    new = run_fit(way, w, gram_of(x)).encoding.unpack()
    keep = new != 0
    held = np.arange(sequences) % 4 == 3
    solutions = [least_squares(w, keep, damped(second(x[~held]), d)) for d in DAMPINGS]
    errors = [error(w, solution, x[held]) for solution in solutions]
    best = least_squares(w, keep, damped(second(x), DAMPINGS[int(np.argmin(errors))]))
    np.testing.assert_allclose(new, best, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_the_reported_error_is_what_the_outputs_lose(way, dtype):
    x, w = data(), weights(dtype)
    pruned = run_fit(way, w, gram_of(x))
    new = pruned.encoding.unpack()
    assert new.dtype == dtype
    assert pruned.error == pytest.approx(error(w, new, x), rel=1e-5)
    assert pruned.note == ""


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_sixteen_bits_are_the_rounded_solution(way, dtype):
    x, w = data(), weights(dtype)
    new = run_fit(way, w, gram_of(x)).encoding.unpack()
    same = run_fit(way, w.astype(np.float32), gram_of(x)).encoding.unpack()
    assert np.array_equal(new, same.astype(dtype))


def test_fitted_weights_outside_the_range_are_an_error_that_names_the_tensor():
    w = np.full((8, IN), 6e4, np.float16)
    w[:, ::2] *= -1
    common = np.random.default_rng(0).standard_normal((8, 64, 1))
    x = (common + 0.05 * data(8, 64)).astype(np.float32) * np.geomspace(1, 30, IN, dtype=np.float32)
    with pytest.raises(TensorError, match=r"'layer.weight'.*float16.*float32"):
        run_fit(("weight", "row", 0.8), w, gram_of(x))


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
def test_never_worse_than_without_data(way):
    granularity, scope, share = way
    for seed in range(4):
        x, w = data(seed=seed), weights(seed=seed)
        target = Target("layer.weight", w)
        free = prune([target], share, Granularity.parse(granularity), scope, 1)
        before = error(w, free["layer.weight"].encoding.unpack(), x)
        assert run_fit(way, w, gram_of(x)).error < (1.0 if granularity == "row" else 0.7) * before


@pytest.mark.parametrize("share", [0.0, 0.13, 0.5, 0.77, 1.0])
def test_exactly_the_share_goes(share):
    x, w = data(), weights()
    gram = gram_of(x)

    def zeros(granularity: str, scope: str = "tensor") -> Array:
        return run_fit((granularity, scope, share), w, gram).encoding.unpack() == 0

    assert zeros("weight").sum() == round(share * w.size)
    assert (zeros("weight", "row").sum(axis=1) == round(share * IN)).all()
    blocks = zeros("4x1").reshape(OUT // 4, 4, IN)
    assert (blocks.all(axis=1) == blocks.any(axis=1)).all()
    assert blocks.all(axis=1).sum() == round(share * blocks.size / 4)
    rows = zeros("row")
    assert (rows.all(axis=1) == rows.any(axis=1)).all()
    assert rows.all(axis=1).sum() == round(share * OUT)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 7)])
def test_n_of_m_stay(n, m):
    new = run_fit((f"{n}:{m}", "tensor", 1 - n / m), weights(), gram_of(data())).encoding.unpack()
    for begin in range(0, IN, m):
        kept = (new[:, begin : begin + m] != 0).sum(axis=1)
        assert (kept == min(n, IN - begin)).all()


def test_share_zero_leaves_every_bit():
    x, w = data(), weights()
    for granularity in ("weight", "4x1", "row"):
        pruned = run_fit((granularity, "tensor", 0.0), w, gram_of(x))
        assert np.array_equal(pruned.encoding.unpack(), w) and pruned.error == 0


def test_inputs_that_are_always_zero():
    """What reads them leaves sooner than the rest, though damping lets it count for a little."""
    x, w = data(), weights()
    x[..., 3] = x[..., 17] = 0
    for scope in ("tensor", "row"):
        pruned = run_fit(("weight", scope, 0.4), w, gram_of(x))
        gone = pruned.encoding.unpack() == 0
        assert gone[:, [3, 17]].mean() > 0.8 and gone.mean() == pytest.approx(0.4, abs=1e-3)
        assert pruned.error == pytest.approx(error(w, pruned.encoding.unpack(), x), rel=1e-5)
    for way in WAYS:
        pruned = run_fit(way, w, gram_of(np.zeros_like(x)))
        assert np.isfinite(pruned.encoding.unpack()).all() and pruned.error == 0


def test_fewer_rows_than_inputs_are_said():
    few = run_fit(WAYS[0], weights(), gram_of(data(4, 8)))
    assert few.note.startswith("calibrated on 32 rows for 40 inputs")
    damping = float(few.note.rpartition("damping ")[2])
    new = few.encoding.unpack()
    best = least_squares(weights(), new != 0, damped(second(data(4, 8)), damping))
    assert np.abs(new - best).max() < 3e-5 * np.abs(best).max()
    unsplit = run_fit(WAYS[0], weights(), gram_of(data(4, 8), None))
    assert unsplit.note.endswith(f"damping {SEARCH_DAMPING:g}")


def test_errors_that_cost_more_are_made_less():
    """Rows compete by what their outputs' errors cost, in every granularity that has a choice."""
    x, w = data(), weights()
    costs = np.ones(OUT)
    costs[:8] = 100
    for granularity in ("weight", "4x1", "row"):
        way = (granularity, "tensor", 0.5)
        for gone in (1.0, 1e-10):  # only ratios matter
            new = run_fit(way, w, gram_of(x), row_weight=gone * costs).encoding.unpack()
            even = run_fit(way, w, gram_of(x)).encoding.unpack()
            assert (new[:8] == 0).sum() < 0.75 * (even[:8] == 0).sum()
            assert (new == 0).sum() == (even == 0).sum()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("gated", [False, True])
def test_hidden_units_leave_together_and_down_is_refitted(share, gated):
    x, down = data(), weights(np.float64, 2)
    up, gate = weights(np.float64, 3, (IN, OUT)), weights(np.float64, 4, (IN, OUT))
    targets = [Target(n, m) for n, m in (("up", up), ("down", down), ("gate", gate))]
    if not gated:
        targets[2:] = [None]  # type: ignore[list-item]
    pruned = fit_neurons(*targets, gram_of(x), share)
    assert set(pruned) == {"up", "down", *(["gate"] if gated else [])}
    new = {name: p.encoding.unpack() for name, p in pruned.items()}
    kept = (new["down"] != 0).any(axis=0)
    assert (~kept).sum() == round(share * IN)
    for name, matrix in (("up", up), ("gate", gate)):
        if name in new:
            assert np.array_equal(new[name], matrix * kept[:, None])
    assert pruned["down"].error == pytest.approx(error(down, new["down"], x), rel=1e-5, abs=1e-15)
    support = np.broadcast_to(kept, down.shape)
    best = [least_squares(down, support, damped(second(x), d)) for d in DAMPINGS]
    assert min(np.abs(new["down"] - b).max() for b in best) < 1e-9
    if 0 < share < 1:
        free = prune_neurons(*targets, share, 1)["down"].encoding.unpack()
        assert pruned["down"].error < 0.5 * error(down, free, x)


def test_hidden_units_are_chosen_by_what_the_others_cannot_make_up_for():
    """Units that repeat others leave before any other, however large."""
    x, down = np.random.default_rng(5).standard_normal((8, 64, IN)), weights(seed=5)
    x[..., 20:26] = 4 * x[..., 0:6]
    pruned = fit_neurons(Target("up", down.T.copy()), Target("down", down), None, gram_of(x), 0.15)
    kept = (pruned["down"].encoding.unpack() != 0).any(axis=0)
    for i in range(6):
        assert kept[i] ^ kept[20 + i], "one of the two"
    assert pruned["down"].error < 1e-3


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
