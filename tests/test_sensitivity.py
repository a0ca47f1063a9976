"""Damage curves: their unit against its definition on real inputs, what they promise against what
compression then removes, and the table that shows them."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import numpy as np
import pytest
from models import FAMILIES, costs, damage, inputs, out_in, settled

import foldprune
from foldprune import Calibration, Recipe, Sensitivity, dwc, irc
from foldprune.measured import SHARES, Measured

Array = np.ndarray[Any, np.dtype[Any]]


@pytest.fixture(autouse=True)
def _refusals_are_expected():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", foldprune.FoldRefusedWarning)
        yield


def state_of(model: Any) -> dict[str, Array]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


# ---- what damage means --------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [0, 16])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-gqa"])
def test_damage_of_pruning(known, family, gradients):
    """From nothing to the loss of the whole output, below what zeroing the smallest weights costs
    and above what the best solution on its own support does."""
    model, calibration = known(family, gradients)
    job, measured = settled(model, calibration)
    state, met = state_of(model), inputs(model)
    checked = 0
    for name, x in met.items():
        if name not in job.arrays or job.layout.groups[name] in ("other", "embedding"):
            continue
        w = out_in(model, name, state)
        target = job.target(name)
        assert target is not None
        unit = measured.fpp_unit(target)
        assert np.array_equal(unit.removed, SHARES * w.size) and unit.smooth
        assert unit.damage[0] == 0 and (np.diff(unit.damage) >= 0).all()
        whole = damage(w, 0 * w, x, costs(job, measured, name))
        cost = costs(job, measured, name) / (1.0 if gradients else whole)
        assert unit.damage[-1] == pytest.approx(damage(w, 0 * w, x, cost), rel=1e-6)
        for share in (0.2, 0.5, 0.8):
            smallest = np.abs(w) <= np.quantile(np.abs(w), share)
            assert unit.damage[round(100 * share)] < damage(w, np.where(smallest, 0, w), x, cost)
        checked += 1
    assert checked >= 8
    assert measured.unit.startswith("expected loss" if gradients else "relative")


@pytest.mark.parametrize("gradients", [0, 16])
@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3"])
def test_compression_loses_what_the_curve_says_or_less(known, family, gradients):
    """Better dampings and swaps come on top of the sweep that the curve is measured with."""
    model, calibration = known(family, gradients)
    table = foldprune.sensitivity(model, calibration, threads=1)
    job, measured = settled(model, calibration)
    state, met = state_of(model), inputs(model)
    on = ("feed_forward", "attention_output", "qkv")
    for share in (0.4, 0.6, 0.8):
        recipe = Recipe(fpp=share, fpp_on=on, fpp_scope="tensor")
        got = foldprune.compress(model, recipe=recipe, calibration=calibration, threads=1)
        for row in got.report.rows:
            if "FPP" not in row.method:
                continue
            w, new = (out_in(model, row.name, s) for s in (state, got))
            cost = costs(job, measured, row.name)
            if not gradients:
                cost = cost / damage(w, 0 * w, met[row.name], cost)
            (point,) = [p for p in table.curve(row.name, "FPP") if abs(p.setting - share) < 1e-9]
            assert point.removed == pytest.approx(row.numbers - row.stored, abs=1)
            lost = damage(w, new, met[row.name], cost)
            assert 0.05 * point.damage < lost < 1.02 * point.damage


def test_what_gives_the_logits_counts_more_without_gradients(known):
    """Its error is the model's own; a block's is that of one of 2 L + 1 terms."""
    model, calibration = known("llama-gqa", 0)
    table = foldprune.sensitivity(model, calibration, threads=1)
    assert table.curve("lm_head.weight", "FPP")[-1].damage == pytest.approx(5)
    assert table.curve("model.layers.0.mlp.up_proj.weight", "FPP")[-1].damage == pytest.approx(1)


def measured_with(model: Any, ids: Array) -> Measured:
    calibration = Calibration()
    calibration.update_tokens("model.embed_tokens", ids, 89)
    return settled(model, calibration)[1]


def test_use_of_rows(known):
    """Seen tokens in proportion; unseen ones share as much as was seen once (Good, Turing)."""
    model, _ = known("llama-gqa")
    name = "model.embed_tokens.weight"
    use = measured_with(model, np.array([7] * 50 + [8] * 30 + [0, 1, 2, 3])).row_use(name)
    assert use is not None and use.sum() == pytest.approx(1)
    unseen = np.setdiff1d(np.arange(89), [7, 8, 0, 1, 2, 3])
    assert use[7] / use[8] == pytest.approx(50 / 30) and use[0] == pytest.approx(use[7] / 50)
    assert use[unseen].sum() == pytest.approx(use[:4].sum())
    assert np.ptp(use[unseen]) == 0 and 0 < use[unseen[0]] < use[0]

    every = measured_with(model, np.repeat(np.arange(89), 2)).row_use(name)
    np.testing.assert_allclose(every, 1 / 89)
    few = measured_with(model, np.append(np.arange(88), [5])).row_use(name)  # 87 once, one never
    assert few is not None and few[88] == few[0], "an unseen token is no likelier than a seen one"
    assert settled(model, Calibration())[1].row_use(name) is None


def test_words_come_in_bursts(known):
    """What one part of the data alone used tells how much is new in another part."""
    model, _ = known("llama-gqa")
    calibration = Calibration()
    for part in range(8):  # each with two words of its own, five times each
        ids = np.r_[[40] * 10, [part] * 5, [part + 8] * 5]
        calibration.update_tokens("model.embed_tokens", ids, 89)
    name = "model.embed_tokens.weight"
    use = settled(model, calibration)[1].row_use(name)
    unseen = np.setdiff1d(np.arange(89), [40, *range(16)])
    assert use[unseen].sum() == pytest.approx(min(80, len(unseen)) / (160 + len(unseen)))
    few = measured_with(model, np.r_[[40] * 80, np.repeat(np.arange(16), 5)]).row_use(name)
    assert few[unseen].sum() == pytest.approx(1 / 161)  # one part alone tells nothing


def rare_to_mean(calibration: Calibration, name: str) -> Array:
    """Mean square of the gradient where words about as frequent are used, to the mean over all
    tokens; eight tokens of the mean are added to every class."""
    squares, tokens = calibration.row_gradient(name)
    mean = squares.sum() / tokens.sum()
    counts = calibration.row_use(name)
    classes = np.array([int(np.log2(count)) if count else 0 for count in counts])
    out = np.empty(len(counts))
    for one in set(classes):
        own = classes == one
        out[own] = (squares[own].sum() + 8 * mean) / (tokens[own].sum() + 8) / mean
    return out


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-gqa"])
def test_a_saturated_head_is_no_cheaper_than_the_mean_head(known, family):
    """Where the softmax is all but certain, the gradient says nothing."""
    model, calibration = known(family)
    calibration = copy.deepcopy(calibration)
    job, measured = settled(model, calibration)
    block = job.layout.attentions[0]
    for matrix in (block.query, block.key):
        sums = calibration._gradients[matrix.weight.removesuffix(".weight")].sums
        size = block.head_dim
        first = matrix.bias_view(np.arange(len(sums)), block.heads)[:size]
        sums[first] *= 1e-9
        target = job.target(matrix.weight)
        weight = measured.row_weight(target)
        own = matrix.bias_view(weight, block.heads).reshape(-1, size)
        rows = matrix.view(job.arrays[matrix.weight], block.heads).astype(np.float64)
        bias = 0.0
        if matrix.bias is not None:
            bias = matrix.bias_view(job.arrays[matrix.bias], block.heads).astype(np.float64)
        moments = measured.moments(matrix.weight)
        out = np.einsum("rc,cd,rd->r", rows, moments.covariance, rows)
        if matrix is block.query or block.rope:
            out += (rows @ moments.mean + bias) ** 2
        cost = own * out.reshape(own.shape)
        whole = sums / calibration._gradients[matrix.weight.removesuffix(".weight")].weight
        estimate = matrix.bias_view(whole, block.heads).reshape(own.shape) * out.reshape(own.shape)
        assert cost[0].sum() == pytest.approx(estimate.sum() / len(own), rel=0.02)
        assert (cost.sum(axis=1) > 0.98 * estimate.sum() / len(own)).all()


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("zeroed", ["one head", "all heads"])
def test_heads_of_zeros_have_finite_costs(known, zeroed):
    model, calibration = known("bert")
    model = copy.deepcopy(model)
    query = model.bert.encoder.layer[0].attention.self.query
    rows = slice(None) if zeroed == "all heads" else slice(query.out_features // 4)
    query.weight.data[rows] = query.bias.data[rows] = 0
    job, measured = settled(model, calibration)
    weight = measured.row_weight(job.target("bert.encoder.layer.0.attention.self.query.weight"))
    assert np.isfinite(weight).all() and (weight > 0).all()
    for unit in measured.fold_units(job.layout.attentions[0], "IRC"):
        assert np.isfinite(unit.damage).all()
    got = foldprune.compress(model, 0.3, calibration=calibration, threads=1)
    assert got.report.removed >= 0.295  # and what heads of zeros leave free


@pytest.mark.parametrize("gradients", [0, 16])
@pytest.mark.parametrize("family", ["llama-gqa", "llama-tied", "gpt2", "bert"])
def test_damage_of_embeddings(known, family, gradients):
    """A row's squared error at each column's cost, as often as the row is used; where the logits
    come from the same tensor, theirs too."""
    model, calibration = known(family, gradients)
    job, measured = settled(model, calibration)
    (name,) = [n for n in job.arrays if n.endswith(("embed_tokens.weight", "wte.weight"))] or [
        "bert.embeddings.word_embeddings.weight"
    ]
    w = job.arrays[name].astype(np.float64)
    use = measured.row_use(name)
    assert use is not None
    column = calibration.gradient(name)
    column = 1 / (use @ np.square(w).sum(axis=1)) * np.ones(48) if column is None else column
    rare = rare_to_mean(calibration, name) if gradients else 1.0
    price = np.square(w) * np.outer(use * rare, column)
    if family != "llama-gqa":
        head = "cls.predictions.decoder.weight" if family == "bert" else "lm_head.weight"
        x = inputs(model)[head]
        if gradients:
            cost = calibration.gradient(head)
            assert cost is not None
            cost = np.maximum(cost, use)
        else:
            cost = np.full(89, 5 / damage(w, 0 * w, x, np.ones(89)))
        price += np.square(w) * np.outer(cost, np.square(x).mean(axis=0))
    target = job.target(name)
    assert target is not None
    unit = measured.fpp_unit(target)
    assert unit.damage[0] == 0 and unit.damage[-1] == pytest.approx(price.sum(), rel=0.01)
    cheapest = np.append(0, np.cumsum(np.sort(price.ravel())))
    want = np.interp(unit.removed, np.arange(len(cheapest)), cheapest)
    np.testing.assert_allclose(unit.damage, want, rtol=0.01, atol=1e-4 * price.sum())
    got = foldprune.compress(
        model,
        recipe=Recipe(fpp=0.5, fpp_on=("embedding",), fpp_scope="tensor"),
        calibration=calibration,
        threads=1,
    )
    gone = np.asarray(got[name]) == 0
    assert price[gone].max() <= price[~gone].min() * 1.0001
    (row,) = [row for row in got.report.rows if row.name == name]
    assert row.error == pytest.approx(price[gone].sum() / price.sum(), rel=1e-4)


def lost_keys(job: Any, block: Any, rank: int, moments: Any, x: Array) -> Array:
    """What the keys that IRC leaves at a rank differ from the dense ones by, (tokens, rows): the
    folded logits are those of the dense queries with keys P k. Without rotation, their mean drops
    out."""

    def with_bias(weight: Array, bias: Array | None) -> Array:
        column = np.zeros(len(weight)) if bias is None else bias
        return np.column_stack([weight, column]).astype(np.float64)

    def dense(matrix: Any) -> Array:
        bias = None if matrix.bias is None else job.arrays[matrix.bias]
        return with_bias(
            matrix.view(job.arrays[matrix.weight], block.heads),
            None if bias is None else matrix.bias_view(bias, block.heads),
        )

    def folded(role: str) -> Array:
        bias = fold.biases.get(role)
        return with_bias(fold.weights[role].unpack(), None if bias is None else bias.unpack())

    fold = irc.fold(block, job.arrays, np.full(block.groups, rank, np.int32), 1, moments)
    keys = dense(block.key)
    k = np.column_stack([x, np.ones(len(x))]) @ keys.T
    if block.rope:
        return np.where((folded("key") == 0).all(axis=1), k, 0.0)
    keys, new_keys = keys[:, :-1], folded("key")[:, :-1]
    lost = np.zeros_like(k)
    for i in range(block.heads):
        rows = slice(i * block.head_dim, (i + 1) * block.head_dim)
        product = folded("query")[rows].T @ new_keys[rows]
        p = np.linalg.pinv(dense(block.query)[rows].T) @ product @ np.linalg.pinv(keys[rows])
        lost[:, rows] = (x @ keys[rows].T) @ (np.eye(block.head_dim) - p).T
    return lost - lost.mean(axis=0)


@pytest.mark.parametrize("gradients", [0, 16])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-gqa", "qwen2"])
def test_damage_of_folds(known, family, gradients):
    """Of IRC what the keys lose, weighed by the loss's gradient; of DWC, and without gradients, the
    fold's share of what losing the values' (keys') differences from token to token would cost."""
    model, calibration = known(family, gradients)
    job, measured = settled(model, calibration)
    met = inputs(model)
    for block in job.layout.attentions:
        moments, x = measured.source_moments(block), met[block.query.weight]
        for kind, matrix, curve_of in (
            ("IRC", block.key, irc.curve),
            ("DWC", block.value, dwc.curve),
        ):
            gradient = calibration.gradient(matrix.weight)
            rows = None if gradient is None else matrix.bias_view(gradient, block.heads)
            if rows is not None and kind == "IRC":
                rows = measured._logit_costs(block, matrix, rows)
            curve = curve_of(block, job.arrays, 1, moments)
            units = measured.fold_units(block, kind)
            assert [u.name for u in units] == [f"{block.name}:{j}" for j in range(block.groups)]
            for unit in units:
                assert (np.diff(unit.damage) >= 0).all() and (np.diff(unit.removed) >= 0).all()
                assert unit.damage[0] <= 1e-9 * unit.damage[-1]
                assert unit.settings[-1] == (kind == "IRC")
            if kind == "IRC" and rows is not None:
                for at, rank in enumerate(units[0].settings.astype(int)):
                    lost = np.square(lost_keys(job, block, int(rank), moments, x)).mean(0)
                    by_head = (rows * lost).reshape(block.groups, -1).sum(1)
                    found = [unit.damage[at] for unit in units]
                    scale = max(unit.damage[-1] for unit in units)
                    # the folded weights are float32, and their pseudo-inverses magnify it
                    np.testing.assert_allclose(found, by_head, rtol=0.01, atol=1e-3 * scale)
                continue
            worth = 1.0
            if rows is not None:
                w = matrix.view(job.arrays[matrix.weight], block.heads)
                worth = float(rows @ (x @ w.T.astype(np.float64)).var(axis=0))
            for unit, error in zip(units, curve.error, strict=True):
                ranks = unit.settings.astype(int)
                np.testing.assert_allclose(unit.damage, worth * error[ranks], rtol=1e-6)


# ---- the table ----------------------------------------------------------------------------------


def tables(known: Any, family: str) -> list[Sensitivity]:
    model, with_gradients = known(family)
    _, without = known(family, 0)
    return [
        foldprune.sensitivity(model, given, threads=1) for given in (None, without, with_gradients)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_curves_rise(known, family):
    free, relative, fisher = tables(known, family)
    assert free.unit == relative.unit == "relative squared output error"
    assert fisher.unit == "expected loss per token"
    assert any("no calibration" in note for note in free.notes)
    assert any("no gradients" in note for note in relative.notes)
    assert not any("gradients" in note for note in fisher.notes)
    for table in (free, relative, fisher):
        parts = dict.fromkeys((p.name, p.method) for p in table.points)
        assert {method for _, method in parts} == (
            {"FPP", "DWC"} if family == "qwen3" else {"FPP", "IRC", "DWC"}
        )
        for name, method in parts:
            curve = table.curve(name, method)
            removed = [p.removed for p in curve]
            lost = np.array([p.damage for p in curve])
            assert removed == sorted(removed) and 0 <= removed[0] < removed[-1] <= curve[0].numbers
            assert (np.diff(lost) >= -1e-12 * lost[-1]).all() and lost[0] >= 0
            assert len({p.numbers for p in curve}) == 1
            if method == "FPP":
                assert [p.removed for p in curve] == [round(p.setting * p.numbers) for p in curve]


def test_what_it_was_asked_of_is_not_changed(known):
    model, calibration = known("bert")
    before = {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}
    calls: list[Any] = []
    foldprune.sensitivity(model, calibration, progress=lambda *call: calls.append(call))
    assert {n: t.numpy().tobytes() for n, t in model.state_dict().items()} == before
    done = [call[0] for call in calls]
    assert done == sorted(done) and calls[-1][0] == calls[-1][1] > 0


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-gqa", "qwen2"])
def test_folds_remove_what_the_table_says(known, family):
    """At rank 1, which every head has then: others are spread over the heads."""
    model, calibration = known(family)
    table = foldprune.sensitivity(model, calibration, threads=1)
    got = foldprune.compress(model, recipe=Recipe(irc=1), calibration=calibration, threads=1)
    blocks = {p.name.rpartition(":")[0] for p in table.points if p.method == "IRC"}
    for name in blocks:
        rows = [r for r in got.report.rows if r.name.startswith(f"{name}.") and r.group == "qkv"]
        removed = sum(r.numbers - r.stored for r in rows)
        points = [p for p in table.points if p.method == "IRC" and p.name.startswith(f"{name}:")]
        assert removed == sum(p.removed for p in points if p.setting == 1)
        assert sum(p.numbers for p in points if p.setting == 1) == sum(
            r.numbers * (2 / 3 if family == "gpt2" else 1)
            for r in rows
            if ".value." not in r.name and ".v_proj." not in r.name
        )


def test_a_rate_loses_less_by_these_curves_than_one_share_for_all(known):
    model, calibration = known("gpt2")
    table = foldprune.sensitivity(model, calibration, threads=1)
    on = ("feed_forward", "attention_output", "qkv", "embedding")

    def total(scope: str) -> float:
        recipe = Recipe(fpp=0.5, fpp_on=on, fpp_scope=scope)
        got = foldprune.compress(model, recipe=recipe, calibration=calibration, threads=1)
        lost = 0.0
        for row in got.report.rows:
            if "FPP" in row.method:
                curve = table.curve(row.name, "FPP")
                points = ([p.removed for p in curve], [p.damage for p in curve])
                lost += float(np.interp(row.numbers - row.stored, *points))
        return lost

    assert total("global") < 0.5 * total("tensor")


def test_the_table_can_be_kept_and_read(known):
    table = tables(known, "llama-gqa")[2]
    back = Sensitivity.from_dict(json.loads(json.dumps(table.to_dict())))
    assert back == table
    text, page = str(table), table._repr_html_()
    assert table.unit in text.splitlines()[0]
    for point in table.points:
        assert point.name in text and point.name in page
    line = next(line for line in text.splitlines() if line.startswith("model.layers.0:1"))
    assert " IRC " in line and f"{(2 * 12 + 12) * 48:,}" in line  # two query heads and their key
    curve = table.curve("lm_head.weight", "FPP")
    (line,) = [line for line in text.splitlines() if line.startswith("lm_head.weight")]
    half = next(p.damage for p in curve if abs(p.setting - 0.5) < 1e-9)
    assert f"{half:.2e}" in line and "4,272" in line
    with pytest.raises(KeyError):
        table.curve("lm_head.weight", "IRC")
