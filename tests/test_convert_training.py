"""Converted models in training."""

from __future__ import annotations

from typing import Any

import models
import numpy as np
import pytest

import foldprune

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from converting import close, logits  # noqa: E402
from ranks import enter, leave  # noqa: E402

from foldprune.torch import (  # noqa: E402
    FoldedAttention,
    PackedEmbedding,
    PackedLinear,
    to_compressed,
)

pytestmark = pytest.mark.usefixtures("one_thread", "no_warnings")


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
def test_training_step(both, make_model, token_ids, family, recipe):
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
    reference = models.loaded(make_model(family), trained)
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
    enter(rank, path)
    model = torch.load(f"{path}/model.pt", weights_only=False)
    ids = torch.load(f"{path}/ids.pt")
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    # one step of plain descent, so that the ranks' mean gradient is what is seen
    optimiser = torch.optim.SGD(parallel.parameters(), 0.1)
    parallel(ids[rank : rank + 1], labels=ids[rank : rank + 1]).loss.backward()
    optimiser.step()
    torch.save(model.state_dict(), f"{path}/rank{rank}.pt")
    leave()


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
