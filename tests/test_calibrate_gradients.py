"""The gradients that ``foldprune.torch.calibrate`` measures, against autograd by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from calibrating import (
    Net,
    X,
    batches_for,
    close,
    everything,
    linear_layers,
    next_token_loss,
    quiet,
)

torch = pytest.importorskip("torch")


def squares_by_hand(model: Any, batches: list[Any], loss: Any, count: int) -> dict[str, Any]:
    """Mean squares over tokens of the gradients at the layers' outputs, sequence by sequence."""
    sums: dict[str, Any] = {}
    tokens = 0
    for batch in batches:
        for i in range(len(batch["input_ids"])):
            if not count:
                break
            count -= 1
            one = {name: value[i : i + 1] for name, value in batch.items()}
            outputs: dict[str, Any] = {}
            handles = [
                module.register_forward_hook(
                    lambda m, args, out, name=name, to=outputs: to.__setitem__(name, out)
                )
                for name, module in linear_layers(model).items()
            ]
            value = loss(model, one)
            for handle in handles:
                handle.remove()
            gradients = torch.autograd.grad(value, list(outputs.values()))
            mask = one["attention_mask"].bool()
            for name, gradient in zip(outputs, gradients, strict=True):
                sums[name] = sums.get(name, 0) + (gradient[mask].double() ** 2).sum(0).numpy()
            tokens += int(mask.sum())
    return {name: square / tokens for name, square in sums.items()}


@pytest.mark.parametrize("family", ["gpt2", "llama-gqa"])
@pytest.mark.parametrize("labels", [False, True])
def test_gradients_of_the_next_token_loss(make_model, family, labels):
    model, batches = make_model(family), batches_for()
    want = squares_by_hand(model, batches, next_token_loss, 6)
    if labels:
        for batch in batches:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    calibration = quiet(model, batches, gradients=6)
    assert set(want) == set(linear_layers(model))
    for name, squares in want.items():
        assert close(calibration.gradient(name), squares, 1e-4), name


def test_left_padding_is_ignored_too(make_model):
    model = make_model("llama-gqa")
    ids = torch.randint(3, 89, (1, 8), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(8)[None]
    whole = {"input_ids": ids, "attention_mask": torch.ones(1, 8, dtype=int)}
    padded = {
        "input_ids": torch.cat([torch.full((1, 3), 7), ids], 1),
        "attention_mask": (torch.arange(11) >= 3).long()[None],
        "position_ids": torch.cat([torch.zeros(1, 3, dtype=int), positions], 1),
    }
    have, want = quiet(model, [padded]), quiet(model, [whole])
    for name in linear_layers(model):
        assert close(have.gradient(name), want.gradient(name), 1e-4), name
        assert close(have.moments(name).second, want.moments(name).second, 1e-5), name


def test_gradients_of_labels_and_of_a_loss_of_ones_own(make_model):
    model, batches = make_model("bert"), batches_for()

    def summed(model: Any, batch: Any) -> Any:
        logits = model(batch["input_ids"], batch["attention_mask"]).logits[0]
        chosen = batch["attention_mask"][0].bool()
        picked = torch.log_softmax(logits, -1).gather(1, batch["input_ids"][0][:, None])[:, 0]
        return -picked[chosen].sum()

    want = squares_by_hand(model, batches, summed, 5)
    labelled = [
        {**b, "labels": b["input_ids"].masked_fill(b["attention_mask"] == 0, -100)} for b in batches
    ]
    for calibration in (
        quiet(model, labelled, gradients=5),
        quiet(model, batches, gradients=5, loss=summed),
    ):
        for name, squares in want.items():
            assert close(calibration.gradient(name), squares, 1e-4), name


def test_sequences_without_labels_do_not_count(make_model):
    model, batch = make_model("bert"), batches_for(count=1)[0]
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][1:] = -100
    one = {name: value[:1] for name, value in batch.items()}
    have, want = quiet(model, [batch], gradients=4), quiet(model, [one], gradients=4)
    for name in linear_layers(model):
        assert np.array_equal(have.gradient(name), want.gradient(name))


def test_projections_where_there_is_no_loss():
    # y = a(x): the gradient at y is a random sign over the norm of y, whatever the sign
    net = Net(lambda net, x: net.a(x))
    calibration = quiet(net, [X], gradients=4)
    with torch.no_grad():
        norms = net.a(X[:4]).double().norm(dim=-1)
    want = float((1 / norms**2).mean())
    assert close(calibration.gradient("a"), np.full(4, want), 1e-6)
    assert everything(quiet(net, [X], gradients=4)) == everything(calibration)  # seeded


def test_projections_measure_the_expected_error(make_model):
    """Over the random signs, the squares at y are those of the relative change of the output, by
    an independent change of each of y's entries."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 40))
    x = torch.randn(400, 1, 4)
    calibration = quiet(net, [x], gradients=400)
    y = net[0](x).detach().double()
    jacobian = net[2].weight.detach().double() * (1 - torch.tanh(y) ** 2)  # tokens, 40, 3
    out = net.double()(x.double()).detach()
    want = ((jacobian**2).sum(1) / (out**2).sum(-1)).mean(0).numpy()
    assert close(calibration.gradient("0"), want, 0.15)


def test_gradients_reach_layers_past_in_place_operations():
    def rule(net: Net, x: Any) -> Any:
        y = net.a(x)
        y.mul_(2)
        return net.b(y).relu_()

    net = Net(rule)
    calibration = quiet(net, [X], gradients=6, loss=lambda model, x: model(x).sum())
    with torch.no_grad():
        y = net.b(2 * net.a(X))
        at_b = (y > 0).double()
        at_a = 2 * at_b @ net.b.weight.double()
    for name, g in (("a", at_a), ("b", at_b)):
        assert close(calibration.gradient(name), (g**2).mean((0, 1)).numpy(), 1e-6)
