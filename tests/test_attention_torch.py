"""Folded attention as a torch operator, and where converted models go through it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

import foldprune
from foldprune import Recipe

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch._subclasses import FakeTensorMode  # noqa: E402

import foldprune.torch.attention as module  # noqa: E402
from foldprune.torch import convert  # noqa: E402
from foldprune.torch.attention_ops import folded_attention  # noqa: E402


def tensors(
    n: int = 9, m: int = 9, rank: int = 1, heads: int = 4, kv_heads: int = 2, dtype: Any = None
) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, n, rank), (2, kv_heads, m, rank), (2, kv_heads, m, 3)]
    return [
        torch.randn(shape, generator=generator, dtype=dtype or torch.float64).requires_grad_()
        for shape in shapes
    ]


def dense(q: Any, k: Any, v: Any, allowed: Any = None) -> Any:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, allowed, scale=1.0)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_operator_and_gradients_are_those_of_softmax_attention(rank: int, causal: bool) -> None:
    n, m = 70, 90
    found, expected = tensors(n, m, rank), tensors(n, m, rank)
    allowed = torch.ones(n, m, dtype=torch.bool).tril(m - n) if causal else None
    key_mask = None
    if not causal:
        key_mask = torch.ones(2, m, dtype=torch.bool)
        key_mask[1, 50:] = False
        allowed = key_mask[:, None, None, :]
    out = folded_attention(*found, key_mask=key_mask, causal=causal, tol=1e-10)
    reference = dense(*expected, allowed)
    assert torch.allclose(out, reference, atol=1e-9)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).double()
    (out * weights).sum().backward()
    (reference * weights).sum().backward()
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-8)


def test_gradcheck() -> None:
    for causal in (False, True):
        assert torch.autograd.gradcheck(
            lambda q, k, v, causal=causal: folded_attention(q, k, v, causal=causal), tensors()
        )


def test_operator_is_registered_in_full() -> None:
    q, k, v = tensors(dtype=torch.float32)
    torch.library.opcheck(
        torch.ops.foldprune.folded_attention.default,
        (q, k, v, None, torch.tensor(3), 0.2, 1.0, True, 1e-6),
    )


def test_compilers_know_how_results_lie_in_memory() -> None:
    """Inductor makes its code for the strides that are foretold."""
    ops = torch.ops.foldprune
    for rank in (1, 3):
        q, k, v = (t.detach() for t in tensors(rank=rank))
        options = (None, torch.tensor(3), 0.2, 1.0, True)
        real = ops.folded_attention(q, k, v, *options, 1e-6)
        dout = torch.ones_like(real[0])
        real = [*real, *ops.folded_attention_backward(dout, q, k, v, *options, *real)]
        with FakeTensorMode() as mode:
            q, k, v, dout = (mode.from_tensor(t) for t in (q, k, v, dout))
            options = (None, mode.from_tensor(options[1]), *options[2:])
            fake = ops.folded_attention(q, k, v, *options, 1e-6)
            fake = [*fake, *ops.folded_attention_backward(dout, q, k, v, *options, *fake)]
        for one, other in zip(real, fake, strict=True):
            assert (one.shape, one.stride(), one.dtype) == (
                other.shape,
                other.stride(),
                other.dtype,
            )


def dropped(seed: int, n: int, m: int, dropout: float) -> Any:
    """(2, 4, n, m) bool: the weights that are, as equal ones meet values that tell them apart."""
    q, k = torch.zeros(2, 4, n, 2), torch.zeros(2, 2, m, 2)
    torch.manual_seed(seed)
    return folded_attention(q, k, torch.eye(m).expand(2, 2, m, m), dropout=dropout) == 0


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_dropout_is_that_of_the_definition(rank: int, causal: bool) -> None:
    n, m, share = 70, 300, 0.3
    zero = dropped(4, n, m, share)
    assert abs(float(zero.double().mean()) - share) < 6 * (share / zero.numel()) ** 0.5
    found, expected = tensors(n, m, rank), tensors(n, m, rank)
    key_mask = torch.ones(2, m, dtype=torch.bool)
    key_mask[1, 250:] = False
    torch.manual_seed(4)
    out = folded_attention(*found, key_mask=key_mask, causal=causal, dropout=share)
    q, k, v = (t if i == 0 else t.repeat_interleave(2, 1) for i, t in enumerate(expected))
    visible = key_mask[:, None, None, :]
    if causal:
        visible = visible & torch.ones(n, m, dtype=torch.bool).tril(m - n)
    weights = (q @ k.mT).masked_fill(~visible, -torch.inf).softmax(-1)
    reference = (weights * ~zero / (1 - share)) @ v
    assert torch.allclose(out, reference, atol=1e-12)
    (out**2).sum().backward()
    (reference**2).sum().backward()
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-11)


def test_dropout_follows_torchs_generator() -> None:
    first = dropped(1, 5, 40, 0.5)
    assert torch.equal(dropped(1, 5, 40, 0.5), first)
    assert not torch.equal(dropped(2, 5, 40, 0.5), first)
    once = tensors(rank=2)
    folded_attention(*once, dropout=0.5).sum().backward()
    state = torch.get_rng_state()
    folded_attention(*once)  # without it no number is drawn
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError):
        folded_attention(*once, dropout=1.0)


def test_second_derivatives_are_refused() -> None:
    q, k, v = tensors()
    (gradient,) = torch.autograd.grad(folded_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_bad_tensors() -> None:
    q, k, v = tensors()
    with pytest.raises(RuntimeError, match="k has dtype"):
        folded_attention(q, k.float(), v)
    with pytest.raises(RuntimeError, match="four dimensions"):
        folded_attention(q[0], k, v)
    with pytest.raises(RuntimeError, match="dtype"):
        folded_attention(q.half(), k.half(), v.half())


# ---- converted models ---------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the modules ask the operator for."""
    seen: list[dict[str, Any]] = []

    def watched(*args: Any, **options: Any) -> Any:
        seen.append(options)
        return folded_attention(*args, **options)

    monkeypatch.setattr(module, "folded_attention", watched)
    return seen


def pair(model: Any, recipe: Recipe) -> tuple[Any, Any]:
    """The dense state dict's model, and the converted one."""
    compressed = foldprune.compress(model, recipe=recipe)
    other = copy.deepcopy(model)
    other.load_state_dict(compressed.state_dict())
    return other, convert(model, compressed)


@pytest.mark.parametrize("padding", [False, True])
def test_an_encoder_of_rank_one_takes_linear_time(
    make_model: Callable[..., Any], calls: list[dict[str, Any]], padding: bool
) -> None:
    expected, model = pair(make_model("bert"), Recipe(irc=1, dwc="pivot"))
    ids = torch.randint(3, 89, (2, 31), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padding:
        mask[1, 20:] = 0
    with torch.no_grad():
        found = model(ids, attention_mask=mask).logits
        reference = expected(ids, attention_mask=mask).logits
    assert len(calls) == 2
    assert [call["causal"] for call in calls] == [False, False]
    assert [call["key_mask"] is not None for call in calls] == [padding, padding]
    kept = mask.bool()
    assert torch.allclose(found[kept], reference[kept], atol=1e-4)


def test_a_decoder_of_rank_one_takes_linear_time(
    make_model: Callable[..., Any], calls: list[dict[str, Any]]
) -> None:
    expected, model = pair(make_model("gpt2"), Recipe(irc=1))
    ids = torch.randint(3, 89, (2, 31), generator=torch.Generator().manual_seed(3))
    for m in (model, expected):
        m(ids, labels=ids).loss.backward()
    assert [call["causal"] for call in calls] == [True, True]
    name = "transformer.h.0.ln_1.weight"
    gradients = [dict(m.named_parameters())[name].grad for m in (model, expected)]
    assert torch.allclose(*gradients, atol=1e-5)
    calls.clear()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids[:1], **options), expected.generate(ids[:1], **options))
    assert calls


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-gqa"])
def test_fewer_dimensions_than_values(
    make_model: Callable[..., Any], calls: list[dict[str, Any]], family: str
) -> None:
    expected, model = pair(make_model(family), Recipe(irc=2))
    ids = torch.randint(3, 89, (2, 31), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, expected(ids).logits, atol=1e-4)
    assert len(calls) == 2
    if family == "bert":
        return
    calls.clear()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids[:1], **options), expected.generate(ids[:1], **options))
    assert len(calls) == 2  # of the prompt; single queries go elsewhere


def test_dropout_of_a_model(make_model: Callable[..., Any], calls: list[dict[str, Any]]) -> None:
    """Outputs vary about those without, recomputed ones are the same."""
    _, model = pair(make_model("bert"), Recipe(irc=2, dwc="pivot"))
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    ids = torch.randint(3, 89, (2, 31), generator=torch.Generator().manual_seed(3))
    block = model.bert.encoder.layer[0].attention.self
    x = torch.randn(2, 31, 48, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = block(x)[0]
        block.train()
        mean = sum(block(x)[0] for _ in range(400)) / 400
    assert [call["dropout"] for call in calls] == [0.0] + 400 * [0.1]
    assert float((mean - expected).abs().mean()) < 0.05 * float(expected.abs().mean())

    def gradients() -> list[Any]:
        torch.manual_seed(0)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model.train()
    plain = gradients()
    model.gradient_checkpointing_enable()
    assert all(torch.equal(a, b) for a, b in zip(gradients(), plain, strict=True))


@pytest.mark.parametrize("reason", ["a mask of its own", "eager", "all dropped", "rank"])
def test_what_is_left_to_the_model(
    make_model: Callable[..., Any], calls: list[dict[str, Any]], reason: str
) -> None:
    expected, model = pair(make_model("gpt2"), Recipe(irc=12 if reason == "rank" else 1))
    ids = torch.randint(3, 89, (2, 13), generator=torch.Generator().manual_seed(3))
    options = {}
    if reason == "a mask of its own":  # causal and padded
        options["attention_mask"] = torch.ones_like(ids)
        options["attention_mask"][0, :4] = 0
    if reason == "eager":
        for m in (model, expected):
            m.set_attn_implementation("eager")
    if reason == "all dropped":
        model.train()
        for block in model.transformer.h:
            block.attn._dropout = 1.0
    with torch.no_grad():
        found, reference = model(ids, **options).logits, expected(ids, **options).logits
    assert not calls
    if reason != "all dropped":
        assert torch.allclose(found[:, 4:], reference[:, 4:], atol=1e-4)
