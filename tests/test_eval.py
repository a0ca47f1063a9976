"""Metrics and the baselines' pruning, against references in float64 from the definitions."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
from models import batches, inputs

from foldprune import ModelError, RateError

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from foldprune.eval import baselines, classification, interval, perplexity  # noqa: E402
from foldprune.torch import convert  # noqa: E402

Array = np.ndarray[Any, np.dtype[Any]]


# ---- perplexity ---------------------------------------------------------------------------------


def losses(model: Any, ids: Any) -> Array:
    """Negative log-likelihood of every token after the first, float64."""
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1].double()
    picked = logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
    return -picked.numpy()


def test_one_window_is_the_models_own_loss(make_model):
    model, ids = make_model("llama"), batches()[0].flatten()[:30]
    found = perplexity(model, ids, window=64, bytes=100, progress=False)
    want = losses(model, ids)
    assert found.tokens == 29
    assert found.loss == pytest.approx(want.mean(), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(want.mean()), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(want.mean() * 30 / 100 / math.log(2), rel=1e-5)


@pytest.mark.parametrize(("stride", "length"), [(5, 31), (5, 30), (16, 40), (1, 20), (None, 33)])
def test_windows_slide(make_model, stride, length):
    model, ids = make_model("llama"), batches()[0].flatten()[:length]
    window, step = 16, stride or 8
    want: list[float] = []
    reached = 0
    for begin in range(0, length, step):
        end = min(begin + window, length)
        new = losses(model, ids[begin:end])
        want += list(new[max(reached - begin - 1, 0) :])  # loss i is that of token begin + i + 1
        reached = end
        if end == length:
            break
    found = perplexity(model, ids, window=window, stride=stride, progress=False)
    assert found.tokens == len(want)
    assert found.loss == pytest.approx(np.mean(want), rel=1e-5)
    if step < window:
        assert found.tokens == length - 1, "every token but the first is scored, once"
    assert found.bits_per_byte is None


def test_perplexity_leaves_the_model_in_its_mode(make_model):
    model = make_model("gpt2").train()  # with dropout, so that eval mode shows
    ids = batches()[0][0]
    first, second = (perplexity(model, ids, progress=False).loss for _ in range(2))
    assert first == second
    assert model.training


@pytest.mark.parametrize(
    ("tokens", "options", "error"),
    [
        ([5], {}, ValueError),
        ([[5, 6]], {}, ValueError),
        ([0.5, 0.5], {}, TypeError),
        ([5, 6, 7], {"window": 1}, ValueError),
        ([5, 6, 7], {"window": 4, "stride": 5}, ValueError),
        ([5, 6, 7], {"stride": 0}, ValueError),
        ([5, 6, 7], {"bytes": 0}, ValueError),
    ],
)
def test_perplexity_of_bad_input(make_model, tokens, options, error):
    with pytest.raises(error):
        perplexity(make_model("llama"), tokens, progress=False, **options)


@pytest.mark.parametrize(
    ("ids", "window", "said"),
    [([5, 10**6, 7], 3, "3 tokens with ids from 5 to 1000000"), ([5] * 5000, 5000, "positions")],
)
def test_perplexity_of_what_the_model_has_not(make_model, ids, window, said):
    with pytest.raises(ModelError, match=said):
        perplexity(make_model("gpt2"), ids, window=window, progress=False)


def test_perplexity_is_not_silently_nan(make_model):
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight[:] = math.nan
    with pytest.raises(ModelError, match="nan"):
        perplexity(model, [3, 4, 5], progress=False)


# ---- classification and seeds -------------------------------------------------------------------


def test_classification():
    # class 0: 1 of 2 found, 1 of 1 claims right; class 1: 2 of 2, 2 of 3; class 3 only claimed
    scores = classification([0, 0, 1, 1, 1], [0, 1, 1, 1, 3])
    assert scores.accuracy == pytest.approx(3 / 5) and scores.rows == 5
    assert scores.macro_f1 == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert classification(torch.tensor([2, 1]), np.array([2, 1]), classes=3).macro_f1 == 1


@pytest.mark.parametrize(
    ("labels", "predicted", "message"),
    [
        ([0, 3], [0, 0], "labels: 3 is out of range.*below 3"),
        ([0, -1], [0, 0], "labels: -1 is out of range"),
        ([0, 1], [0, 5], "predicted: 5 is out of range"),
        ([0, 1], [0], "2 labels and 1 predictions"),
        ([], [], "empty"),
        ([[0]], [[0]], "one dimension"),
    ],
)
def test_classification_of_bad_input(labels, predicted, message):
    with pytest.raises(ValueError, match=message):
        classification(labels, predicted, classes=3)


def test_labels_are_whole_numbers():
    with pytest.raises(TypeError, match="labels"):
        classification([0.0, 1.0], [0, 1])


@pytest.mark.parametrize(
    ("count", "level", "quantile"),  # of tables of Student's t
    [
        (2, 0.95, 12.7062),
        (3, 0.95, 4.30265),
        (4, 0.99, 5.84091),
        (11, 0.95, 2.22814),
        (101, 0.9, 1.66023),
    ],
)
def test_interval(count, level, quantile):
    values = np.random.default_rng(0).standard_normal(count)
    found = interval(values, level)
    half = quantile * values.std(ddof=1) / math.sqrt(count)
    assert found.mean == pytest.approx(values.mean()) and found.count == count
    assert found.spread == pytest.approx(values.std(ddof=1))
    assert (found.low, found.high) == pytest.approx(
        (values.mean() - half, values.mean() + half), rel=1e-5
    )


def test_interval_of_one_value_and_of_none():
    one = interval([0.5])
    assert (one.mean, one.spread, one.low, one.high) == (0.5, 0, -math.inf, math.inf)
    with pytest.raises(ValueError, match="values"):
        interval([])
    with pytest.raises(ValueError, match="level"):
        interval([1, 2], level=1)


# ---- one matrix ---------------------------------------------------------------------------------


@pytest.fixture
def layer() -> tuple[Array, Array]:
    """A weight (24 x 160: two of SparseGPT's blocks) and correlated inputs (400 x 160)."""
    rng = np.random.default_rng(3)
    mixing = rng.standard_normal((160, 160)) / 12
    return rng.standard_normal((24, 160)), rng.standard_normal((400, 160)) @ mixing


def test_magnitude_removes_the_smallest(layer):
    weight = torch.from_numpy(layer[0].copy())
    kept = baselines.magnitude(weight, 0.3).numpy()
    assert (~kept).sum() == int(0.3 * kept.size)
    assert abs(layer[0])[kept].min() >= abs(layer[0])[~kept].max()
    assert np.array_equal(weight.numpy(), np.where(kept, layer[0], 0))


def test_wanda_removes_the_smallest_of_every_row(layer):
    w, x = layer
    weight = torch.from_numpy(w.copy())
    kept = baselines.wanda(weight, torch.from_numpy(np.square(x).mean(0)), 0.3).numpy()
    scores = abs(w) * np.linalg.norm(x, axis=0)
    assert ((~kept).sum(1) == int(0.3 * 160)).all()
    for row, own in zip(scores, kept, strict=True):
        assert row[own].min() >= row[~own].max()
    assert np.array_equal(weight.numpy(), np.where(kept, w, 0))


def test_sparsegpt_is_optimal_brain_surgeon_column_by_column(layer):
    w, x = layer
    hessian = x.T @ x / len(x)
    weight = torch.from_numpy(w.copy())
    kept = baselines.sparsegpt(weight, torch.from_numpy(hessian), 0.5).numpy()

    want, mask = w.copy(), np.ones(w.shape, bool)
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(160)
    # the inverse for the columns from j on, whose first entry says what removing column j costs
    inverses = [np.linalg.inv(damped[j:, j:]) for j in range(160)]
    costs = np.array([inverse[0, 0] for inverse in inverses])
    for start in (0, 128):
        end = min(start + 128, 160)
        scores = np.square(want[:, start:end]) / costs[start:end]
        order = np.argsort(scores, axis=None, kind="stable")[: int(0.5 * scores.size)]
        block = np.ones(scores.shape, bool)
        block.ravel()[order] = False
        mask[:, start:end] = block
        for j in range(start, end):
            error = np.where(mask[:, j], 0, want[:, j]) / costs[j]
            want[:, j:] -= np.outer(error, inverses[j][0])
    assert np.array_equal(kept, mask)
    np.testing.assert_allclose(weight.numpy(), np.where(mask, want, 0), atol=1e-9)

    def loss(new: Array) -> float:
        return float(np.square(x @ (new - w).T).sum())

    assert loss(weight.numpy()) < loss(np.where(mask, w, 0))


def test_random_depends_on_its_seed_alone(layer):
    def kept(seed: int) -> Array:
        weight = torch.from_numpy(layer[0].copy())
        return baselines.random(weight, 0.4, torch.Generator().manual_seed(seed)).numpy()

    assert np.array_equal(kept(1), kept(1)) and not np.array_equal(kept(1), kept(2))
    assert (~kept(1)).sum() == int(0.4 * layer[0].size)


# ---- a model ------------------------------------------------------------------------------------

GROUPS = {"embedding": 0.25, "feed_forward": 0.5, "attention_output": 0.125, "qkv": 0.75}


@pytest.mark.parametrize("method", baselines.METHODS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-gqa", "llama-tied", "opt"])
def test_prune_by_groups_and_train_with_the_zeros_held(make_model, family, method):
    model = make_model(family)
    before = copy.deepcopy(model)
    rates = baselines.group_rates(model, GROUPS)
    masks = baselines.prune(model, method, rates, batches(count=2), progress=False)
    assert masks.keys() == rates.keys()
    for name, kept in masks.items():
        weight = model.get_parameter(name).detach()
        assert kept.shape == weight.shape
        assert not weight[~kept].any() and weight[kept].all()
        row = 1 / min(kept.shape)  # Wanda's share of a row is a whole number
        assert float((~kept).double().mean()) == pytest.approx(rates[name], abs=row)
    for name, parameter in before.named_parameters():
        if name not in masks:
            assert torch.equal(parameter, model.get_parameter(name)), name

    ids = batches(seed=5, count=1)[0]
    compressed = baselines.packed(model, masks, method)
    removed = sum(int((~kept).sum()) for kept in masks.values())
    total = sum(p.numel() for p in model.parameters())
    assert compressed.report.removed == pytest.approx(removed / total)
    student = convert(before, compressed)
    torch.testing.assert_close(student(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    optimiser = torch.optim.AdamW(student.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        student(ids).logits.square().mean().backward()
        optimiser.step()
    for name, kept in masks.items():
        path = name.removesuffix(".weight")
        weight = student.get_submodule(path).weight  # (out x in)
        if type(model.get_submodule(path)).__name__ == "Conv1D":
            weight = weight.T
        assert not weight[~kept].any() and not torch.equal(weight, model.get_parameter(name))


def test_same_rates_remove_as_many_numbers(make_model):
    import foldprune

    model = make_model("bert")
    want = foldprune.compress(model, recipe=foldprune.Recipe.paper()).report
    rates = baselines.group_rates(model, baselines.same_rates(want))
    masks = baselines.prune(model, "magnitude", rates, progress=False)
    found = baselines.packed(model, masks, "magnitude").report
    for group in ("qkv", "qkv with output", "feed_forward", "embedding"):
        numbers = want.totals[group].numbers
        removed = [report.totals[group].removed * numbers for report in (want, found)]
        assert removed[0] == pytest.approx(removed[1], abs=len(rates)), group


def test_zeros_that_are_there_count_towards_the_rate(make_model):
    model = make_model("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    zeros = torch.rand(model.get_parameter(name).shape) < 0.3
    with torch.no_grad():
        model.get_parameter(name)[zeros] = 0
    for method in ("random", "magnitude"):
        pruned = copy.deepcopy(model)
        kept = baselines.prune(pruned, method, {name: 0.5}, progress=False)[name]
        assert not kept[zeros].any()
        assert int((pruned.get_parameter(name) == 0).sum()) == int(0.5 * zeros.numel())


@pytest.mark.parametrize("family", ["bert", "llama-gqa"])
def test_statistics_are_of_the_real_inputs(make_model, family):
    """In the first block nothing has been pruned before."""
    model = make_model(family)
    found: dict[str, Any] = {}

    def visit(i: int, matrices: list[Any]) -> None:
        found.update({name: mean for name, _, mean in matrices})

    quiet = lambda done, total, name: None  # noqa: E731
    baselines.visit_blocks(model, batches(), baselines.products, visit, quiet)
    want = inputs(model)
    assert len(found) >= 12 and found.keys() <= want.keys()
    for name, mean in found.items():  # nothing is changed, so all blocks see the dense inputs
        x = want[name]
        np.testing.assert_allclose(mean.numpy(), x.T @ x / len(x), rtol=1e-3, atol=1e-4)


def test_blocks_are_calibrated_on_what_pruned_ones_put_out(make_model):
    model = make_model("llama")
    seen: dict[str, Any] = {}

    def visit(i: int, matrices: list[Any]) -> None:
        for name, weight, mean in matrices:
            seen[name] = mean
            weight.zero_()

    quiet = lambda done, total, name: None  # noqa: E731
    baselines.visit_blocks(model, batches(), baselines.squares, visit, quiet)
    name = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_allclose(
        seen[name].numpy(), np.square(inputs(model)[name]).mean(0), rtol=1e-3
    )


def test_padding_takes_no_part(make_model):
    model = make_model("bert")
    ids = batches(count=1)[0]
    short = {"input_ids": ids[:, :9], "attention_mask": torch.ones(8, 9, dtype=torch.long)}
    padded = torch.nn.functional.pad(short["input_ids"], (0, 5), value=7)
    mask = torch.nn.functional.pad(short["attention_mask"], (0, 5))
    sums: list[dict[str, Any]] = []
    for batch in (short, {"input_ids": padded, "attention_mask": mask}):
        found: dict[str, Any] = {}

        def visit(i: int, matrices: list[Any], found: Any = found) -> None:
            found.update({name: mean for name, _, mean in matrices})

        quiet = lambda done, total, name: None  # noqa: E731
        baselines.visit_blocks(model, [batch], baselines.squares, visit, quiet)
        sums.append(found)
    for name, mean in sums[0].items():
        torch.testing.assert_close(mean, sums[1][name], rtol=1e-4, atol=1e-5)


def test_prune_of_bad_input(make_model):
    model = make_model("bert")
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"method 'movement'.*wanda"):
        baselines.prune(model, "movement", {name: 0.5})
    with pytest.raises(ModelError, match=r"no weight 'x\.weight'"):
        baselines.prune(model, "magnitude", {"x.weight": 0.5})
    with pytest.raises(ModelError, match="not a matrix"):
        baselines.prune(model, "magnitude", {name.replace("weight", "bias"): 0.5})
    with pytest.raises(RateError, match="rate 1"):
        baselines.prune(model, "magnitude", {name: 1.0})
    with pytest.raises(ModelError, match="no batches"):
        baselines.prune(model, "wanda", {name: 0.5}, progress=False)
    with pytest.raises(ValueError, match="unknown group"):
        baselines.group_rates(model, {"attention": 0.5})
    for n, parameter in model.named_parameters():
        assert torch.equal(parameter, before[n])
