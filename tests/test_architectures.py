"""Every further family, judged by its real forward pass; torch.nn's own modules; names with
prefixes, several models in one dict."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import architectures
import numpy as np
import pytest
import reference
import torch
from architectures import FAMILIES, Family

import foldprune
from foldprune import Recipe

ABSOLUTE = 1e-5
EVERY = list(FAMILIES)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models of a few thousand weights are slower on more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", foldprune.FoldpruneWarning)
        warnings.simplefilter("ignore", foldprune.FoldRefusedWarning)
        yield


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
    ],
    ids=["1", "5-pivot", "lossless-2", "2-0-fpp"],
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
