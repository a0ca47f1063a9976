"""``foldprune.torch.Dropout`` against its definition and torch's own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import foldprune  # noqa: E402
from foldprune.torch import Dropout, convert  # noqa: E402

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def dropout(x: Any, p: float = 0.3, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Dropout(p)(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_kept_grows(dtype: Any) -> None:
    x = torch.rand(40, 3, 500, dtype=dtype) + 1
    y = dropout(x)
    assert y.dtype is dtype and y.shape == x.shape
    kept = y != 0
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(y[kept], (x[kept].to(wide) * (1 / 0.7)).to(dtype))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_shares_in_all_directions(p: float) -> None:
    """Of all, and of neighbours in rows, columns and calls: within six standard deviations."""
    zero = torch.stack([dropout(torch.ones(700, 384), p, seed) == 0 for seed in range(3)]).double()

    def near(share: Any, expected: float) -> bool:
        return abs(float(share.mean()) - expected) < 6 * (expected / share.numel()) ** 0.5

    assert near(zero, p)
    assert near(zero[:, 1:] * zero[:, :-1], p * p)
    assert near(zero[:, :, 1:] * zero[:, :, :-1], p * p)
    assert near(zero[1:] * zero[:-1], p * p)


def test_follows_torchs_generator_alone() -> None:
    x = torch.ones(50, 100)
    first = dropout(x)
    assert torch.equal(dropout(x), first) and not torch.equal(dropout(x, seed=1), first)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(dropout(x), first)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(dropout(torch.ones(100, 50).T), dropout(torch.ones(50, 100)))


def test_gradients() -> None:
    x = torch.randn(7, 300, dtype=torch.float64, requires_grad=True)
    factor = dropout(torch.ones_like(x))
    (found,) = torch.autograd.grad((dropout(x) ** 3).sum(), x, create_graph=True)
    assert torch.allclose(found, 3 * (x * factor) ** 2 * factor)
    (second,) = torch.autograd.grad(found.sum(), x)
    assert torch.allclose(second, 6 * x * factor**3)


def test_recomputed_the_same() -> None:
    x = torch.randn(7, 300, requires_grad=True)
    layer = Dropout(0.4)
    torch.manual_seed(0)
    expected = layer(x)
    torch.manual_seed(0)
    found = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert torch.equal(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(gradient, dropout(torch.ones_like(x), 0.4))


def test_operator() -> None:
    x = torch.randn(4, 3, 20, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.foldprune.dropout.default, (x, torch.tensor(5), 0.3))


def test_compiled() -> None:
    x = torch.randn(50, 100, requires_grad=True)
    layer = Dropout(0.4)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    y = compiled(x)
    y.sum().backward()
    assert torch.equal(y, dropout(x, 0.4))
    assert torch.equal(x.grad == 0, y == 0)


def test_where_it_is_torchs() -> None:
    x = torch.randn(5, 6)
    assert Dropout(0.5).eval()(x) is x
    assert torch.equal(dropout(x, 0.0), x)
    assert not dropout(x, 1.0).any()
    assert dropout(x.to("meta")).shape == x.shape
    inside = x.clone()
    assert Dropout(0.5, inplace=True)(inside) is inside
    with pytest.raises(ValueError, match="between 0 and 1"):
        Dropout(1.5)


def test_converted_models_have_it(make_model: Callable[..., Any]) -> None:
    model = make_model("bert")
    layer = model.bert.embeddings.dropout
    called: list[Any] = []
    hook = layer.register_forward_hook(lambda *_: called.append(1))
    convert(model, foldprune.compress(model, 0.5))
    found = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert found and all(type(m) is Dropout and m.p == 0.1 for m in found)
    assert model.bert.embeddings.dropout is layer
    ids = torch.randint(3, 89, (2, 31), generator=torch.Generator().manual_seed(3))
    model.train()(ids)
    hook.remove()
    losses = []
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.manual_seed(0)
        losses.append(other(ids, labels=ids).loss.item())
    assert called and len(set(losses)) == 1
    assert losses[0] != model.eval()(ids, labels=ids).loss.item()
