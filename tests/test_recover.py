"""Recovery and refolding: what trains, what it is trained towards, and that a run can be stopped."""

from __future__ import annotations

import copy
import random
from typing import Any

import models
import numpy as np
import pytest

import foldprune
from foldprune import FoldpruneWarning, ModelError, Recipe

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from foldprune.torch import compress, convert, recover, refold, to_compressed  # noqa: E402

PAPER = {
    "bert": Recipe(fpp=0.5, irc=1, dwc="slice"),
    "gpt2": Recipe(fpp=0.5, irc=1, dwc="slice"),
    "opt": Recipe(fpp=0.5, irc=4, dwc=2),
    "llama-": Recipe(fpp=0.5, irc=2, dwc="slice"),
    "llama-gqa": Recipe(fpp=0.5, irc=2, dwc="pivot"),
    "qwen2": Recipe(fpp=0.5, irc=2, dwc=3),
}
QUIET: dict[str, Any] = {"progress": False, "threads": 1}


def compressed(model: Any, recipe: Recipe) -> Any:
    made = foldprune.compress(model, recipe=recipe, threads=1)
    return convert(copy.deepcopy(model), made)


def padded(count: int = 6, seed: int = 3) -> list[Any]:
    """Batches with padding on the right."""
    lengths = torch.tensor([16, 9, 12, 5, 16, 7, 11, 16])
    mask = (torch.arange(16) < lengths[:, None]).long()
    return [{"input_ids": ids, "attention_mask": mask} for ids in models.batches(seed, count)]


def run(student: Any, teacher: Any, batches: Any = None, **options: Any) -> Any:
    batches = padded() if batches is None else batches
    return recover(student, teacher, batches, **{"steps": 12, "every": 4, **QUIET, **options})


def state(model: Any) -> dict[str, Any]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# ---- learning -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PAPER)
def test_the_student_comes_nearer(make_model, family):
    teacher = make_model(family)
    student = compressed(teacher, PAPER[family])
    before = state(teacher)
    for layerwise in (1.0, 0.0):
        result = run(student, teacher, steps=60, lr=3e-3, layerwise=layerwise, held=padded(2, 9))
        assert result.stopped is None and len(result.losses) == 60
        assert result.held[-1][1] < 0.9 * result.held[0][1]
    assert same(state(teacher), before)


def test_the_losses_are_those_of_the_definitions(make_model):
    """From the two models' own hidden states and logits, without hooks, in NumPy."""
    teacher = make_model("bert")
    student = compressed(teacher, PAPER["bert"])
    (batch,) = padded(1)
    keep = batch["attention_mask"].bool().numpy()
    outputs: dict[str, list[Any]] = {"student": [], "teacher": []}
    attended: dict[str, list[Any]] = {"student": [], "teacher": []}
    logits = {}
    for name, model in (("student", student), ("teacher", teacher)):
        for layer in model.bert.encoder.layer:
            layer.attention.output.dense.register_forward_hook(
                lambda _, __, y, name=name: attended[name].append(y.detach().double().numpy())
            )
        with torch.no_grad():
            out = model(**batch, output_hidden_states=True)
        outputs[name] = [h.double().numpy() for h in out.hidden_states[1:]]
        logits[name] = out.logits.double().numpy()
    errors = []
    for s, t in zip(outputs["student"], outputs["teacher"], strict=True):
        s, t = s[keep], t[keep]
        errors.append((((s - t) ** 2).sum(-1) / (t**2).sum(-1)).mean())
    for s, t in zip(attended["student"], attended["teacher"], strict=True):
        s, t = s[keep], t[keep]
        errors.append(((s - t) ** 2).sum() / (t**2).sum())
    start = run(student, teacher, [batch], steps=1, layerwise=1)
    assert start.losses[0] == pytest.approx(np.mean(errors), rel=1e-4)

    def log_softmax(x: Any) -> Any:
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    student = compressed(teacher, PAPER["bert"])
    p, q = (log_softmax(logits[name][keep] / 3.0) for name in ("teacher", "student"))
    divergence = 9.0 * (np.exp(p) * (p - q)).sum(-1).mean()
    start = run(student, teacher, [batch], steps=1, layerwise=0, temperature=3.0)
    assert start.losses[0] == pytest.approx(divergence, rel=1e-4)


def test_padding_takes_no_part(make_model):
    teacher = make_model("bert")
    one, other = padded(1)[0], padded(1)[0]
    other["input_ids"] = torch.where(other["attention_mask"].bool(), other["input_ids"], 5)
    assert not torch.equal(one["input_ids"], other["input_ids"])
    losses = []
    for batch in (one, other):
        for layerwise in (0, 1):
            student = compressed(teacher, PAPER["bert"])
            losses.append(run(student, teacher, [batch], steps=1, layerwise=layerwise).losses[0])
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-5)


def test_a_model_without_a_head_learns_its_hidden_states(make_model):
    teacher = make_model("bert").bert
    student = compressed(teacher, PAPER["bert"])
    result = run(student, teacher, steps=60, layerwise=0.0, lr=3e-3, held=padded(2, 9))
    assert result.held[-1][1] < 0.8 * result.held[0][1]


def test_only_what_requires_gradients_trains(make_model):
    teacher = make_model("bert")
    student = compressed(teacher, PAPER["bert"])
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("attention" in name and parameter.is_floating_point())
    before = state(student)
    student.train()
    run(student, teacher)
    after = state(student)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("attention" in name for name in moved)
    assert student.training and student.bert.encoder.layer[0].training
    assert all(parameter.grad is None for parameter in student.parameters())


def test_the_callers_optimizer_is_used(make_model):
    teacher = make_model("bert")
    student = compressed(teacher, PAPER["bert"])
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    run(student, teacher, optimizer=optimizer)
    assert all(group["lr"] < 0.5 for group in optimizer.param_groups)
    # a schedule that ends near 0
    assert optimizer.param_groups[0]["lr"] < 0.05


# ---- folded attention ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", PAPER)
def test_gradients_are_those_of_the_dense_model(make_model, family):
    """Of the folded parts, by the chain rule through ``unpack``: moving one number of a folded
    part moves the dense model's loss by as much."""
    teacher = make_model(family)
    student = compressed(teacher, PAPER[family]).double()
    ids = models.batches(4, 1)[0]

    def loss_of(model: Any) -> Any:
        return model(ids).logits.square().mean()

    loss_of(student).backward()
    generator = torch.Generator().manual_seed(0)
    parameters = [
        (name, p) for name, p in student.named_parameters() if ".attention" in name or "attn" in name
    ]
    assert any("query" in n or "q_proj" in n for n, _ in parameters)
    dense = copy.deepcopy(teacher).double()
    for name, parameter in parameters:
        assert parameter.grad is not None, name
        i = int(torch.randint(parameter.numel(), (), generator=generator))
        values = []
        for step in (1e-5, -1e-5):
            parameter.data.view(-1)[i] += step
            dense.load_state_dict(to_compressed(student).state_dict())
            with torch.no_grad():
                values.append(float(loss_of(dense)))
            parameter.data.view(-1)[i] -= step
        expected = (values[0] - values[1]) / 2e-5
        found = float(parameter.grad.view(-1)[i])
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-9), name


@pytest.mark.parametrize("family", PAPER)
def test_nothing_comes_back_under_weight_decay(make_model, family):
    teacher = make_model(family)
    student = compressed(teacher, PAPER[family])
    start = to_compressed(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0.3)
    run(student, teacher, optimizer=optimizer, steps=30)
    end = to_compressed(student)
    assert end.report.totals == start.report.totals
    changed = 0
    for name, encoding in start.encodings.items():
        after = end.encodings[name]
        assert type(after) is type(encoding) and after.numbers == encoding.numbers
        one, other = encoding.unpack(), after.unpack()
        changed += not np.array_equal(one, other)
        if isinstance(encoding, foldprune.encodings.Packed):
            assert not other[~kept(encoding)].any()
    assert changed > 10
    # and exactly back: a model converted from it gives the same bits
    again = convert(copy.deepcopy(teacher), end)
    assert same(state(again), state(student))
    dense = models.loaded(teacher, end)
    ids = models.batches(4, 1)[0]
    np.testing.assert_allclose(models.logits(student, ids), models.logits(dense, ids), atol=2e-5)


def kept(encoding: Any) -> Any:
    ones = foldprune.encodings.Packed(
        encoding.matrix_shape,
        encoding.mask,
        np.ones_like(encoding.values),
        encoding.block,
        encoding.transposed,
    )
    return ones.unpack() != 0


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_attention_of_rank_one_goes_backward_in_linear_time(make_model, family, monkeypatch):
    from foldprune.torch import attention_ops

    teacher = make_model(family)
    student = compressed(teacher, PAPER[family])
    slow = copy.deepcopy(student)
    slow.set_attn_implementation("eager")
    calls = []
    core = attention_ops._core.attention_backward
    monkeypatch.setattr(
        attention_ops._core, "attention_backward", lambda *args: calls.append(1) or core(*args)
    )
    batch = padded(1)[0]
    for model in (slow, student):
        assert not calls
        (model(**batch).logits[batch["attention_mask"].bool()] ** 2).mean().backward()
    assert len(calls) == 2  # layers
    for (name, one), other in zip(student.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6, msg=name)
