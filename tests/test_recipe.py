"""``Recipe``: its values, overrides and JSON, and what a rate settles on."""

from __future__ import annotations

import json
import warnings

import pytest
import reference

import foldprune
from foldprune import Recipe


def test_recipe_json_both_ways():
    recipes = [
        Recipe(),
        Recipe.lossless(),
        Recipe.paper(),
        Recipe(fpp=0.5, fpp_granularity="2:4", fpp_on=("feed_forward", "qkv")),
        Recipe(fpp=0.3, irc=4, dwc=2, overrides={"*layer.0.*": {"fpp": None, "irc": 16}}),
        Recipe(fpp=0.3, fpp_scope="row"),
        Recipe(irc=4, irc_fpp=0.75),
    ]
    for recipe in recipes:
        text = recipe.to_json(indent=1)
        assert Recipe.from_json(text) == recipe
        assert Recipe.from_dict(json.loads(text)) == recipe


def test_recipe_is_frozen():
    with pytest.raises(AttributeError):
        Recipe().fpp = 0.5
    overrides = {"*layer.0.*": {"fpp": 0.5}}
    recipe = Recipe(overrides=overrides)
    text = recipe.to_json()
    overrides["*"] = {"fpp": 0.1}
    overrides["*layer.0.*"]["fpp"] = 0.9
    assert recipe.to_json() == text


@pytest.mark.parametrize(
    "fields",
    [
        {"fpp": 1.0},
        {"fpp": -0.1},
        {"fpp": float("nan")},
        {"fpp_on": ("attention",)},
        {"fpp_granularity": "column"},
        {"fpp_granularity": "5:4"},
        {"fpp_granularity": "0:4"},
        {"fpp_granularity": "1:65"},
        {"fpp_granularity": "0x4"},
        {"fpp": 0.3, "fpp_granularity": "2:4"},
        {"fpp_scope": "layer"},
        {"fpp_scope": "row", "fpp_granularity": "4x1"},
        {"irc": 0},
        {"irc": -1},
        {"irc": "full"},
        {"irc_fpp": 1.0},
        {"irc": "lossless", "irc_fpp": 0.5},
        {"dwc": -1},
        {"dwc": "diagonal"},
        {"overrides": {"*": {"rank": 1}}},
        {"overrides": {"*": {"irc": 0}}},
        {"overrides": {"re:(": {"irc": 1}}},
    ],
    ids=str,
)
def test_recipe_values(fields):
    with pytest.raises(ValueError):
        Recipe(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"fpp": "0.5"},
        {"fpp": True},
        {"irc": 2.5},
        {"irc": True},
        {"irc_fpp": "0.5"},
        {"dwc": 1.5},
        {"overrides": {1: {"irc": 1}}},
        {"overrides": {"*": 3}},
        {"overrides": [("*", {})]},
        {"fpp_granularity": 4},
        {"fpp_on": 3},
    ],
    ids=str,
)
def test_recipe_types(fields):
    with pytest.raises(TypeError):
        Recipe(**fields)


@pytest.mark.parametrize("text", ["[]", "3", "{", '{"fpq": 0.5}', '{"fpp": "a"}', "null"])
def test_recipe_json_is_checked(text):
    with pytest.raises((ValueError, TypeError)):
        Recipe.from_json(text)


def test_overrides():
    state = reference.bert_state(layers=3)
    recipe = Recipe(
        fpp=0.5,
        fpp_scope="tensor",
        irc=3,
        overrides={
            "*layer.0.*": {"fpp": None, "irc": None, "dwc": "pivot"},
            "re:layer\\.1\\..*intermediate": {"fpp": 0.9},
            "*layer.1.attention.self.*": {"irc": 5},
            "*word_embeddings*": {"fpp": 0.2},
        },
    )
    compressed = foldprune.compress(state, recipe=recipe, num_heads=4)
    report = compressed.report

    def method(layer: int, name: str) -> str:
        return report[f"encoder.layer.{layer}.{name}.weight"].method

    assert [method(i, "attention.self.query") for i in range(3)] == ["dense", "IRC r=5", "IRC r=3"]
    assert [method(i, "attention.self.value") for i in range(3)] == ["DWC pivot", "dense", "dense"]
    shares = [report[f"encoder.layer.{i}.intermediate.dense.weight"].removed for i in range(3)]
    assert shares == pytest.approx([0, 0.9, 0.5], abs=1e-3)
    assert report["embeddings.word_embeddings.weight"].removed == pytest.approx(0.2, abs=1e-3)


def test_overrides_that_match_nothing_or_half():
    state = reference.bert_state()
    with pytest.raises(ValueError, match=r"layer\.9"):
        foldprune.compress(
            state, recipe=Recipe(irc=2, overrides={"*layer.9.*": {"irc": 3}}), num_heads=4
        )
    with pytest.raises(ValueError, match="query"):
        foldprune.compress(
            state, recipe=Recipe(irc=2, overrides={"*query*": {"irc": 3}}), num_heads=4
        )
    with pytest.raises(ValueError, match="different 'irc_fpp'"):
        foldprune.compress(
            state, recipe=Recipe(irc=2, overrides={"*query*": {"irc_fpp": 0.5}}), num_heads=4
        )
    with pytest.raises(ValueError, match="neuron"):
        foldprune.compress(
            state,
            recipe=Recipe(
                fpp=0.5,
                fpp_granularity="neuron",
                overrides={"*layer.0.intermediate*": {"fpp": None}},
            ),
        )


def test_a_rate_beside_a_recipe_is_said_to_be_unused():
    with pytest.warns(foldprune.FoldpruneWarning, match="not used"):
        foldprune.compress(reference.bert_state(), 0.45, recipe=Recipe(fpp=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        foldprune.compress(reference.bert_state(), recipe=Recipe(fpp=0.5))


def test_what_a_rate_settled_on_is_recorded():
    compressed = foldprune.compress(reference.bert_state(), 0.4, num_heads=4)
    assert isinstance(compressed.recipe, Recipe)
    assert compressed.recipe.fpp is None or 0 < compressed.recipe.fpp < 1
