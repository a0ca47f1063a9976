"""How many heads there are: told, read, recognised, assumed."""

from __future__ import annotations

import json

import pytest
import reference

import foldprune
from foldprune import Recipe

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread", "no_warnings")


def facts(compressed: foldprune.Compressed) -> tuple[int, int, int, str]:
    heads = compressed.report.heads
    return heads["heads"], heads["key_heads"], heads["head_dim"], heads["source"]


def test_heads_from_the_model_and_from_configs(make_model, tmp_path):
    model = make_model("llama-gqa")
    state = model.state_dict()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(model.config.to_dict()))
    results = [
        foldprune.compress(model, 0),
        foldprune.compress(state, 0, config=model.config),
        foldprune.compress(state, 0, config=model.config.to_dict()),
        foldprune.compress(state, 0, config=path),
        foldprune.compress(state, 0, config=str(tmp_path)),
        foldprune.compress(state, 0, config={"num_attention_heads": 4}),
    ]
    for result in results:
        assert facts(result)[:3] == (4, 2, 12)
        assert facts(result)[3] in ("config", "model")
        assert "4 heads of 12" in str(result.report)
    assert facts(foldprune.compress(state, 0, num_heads=4)) == (4, 2, 12, "num_heads")


def test_heads_from_a_model_inside_another_module(make_model):
    class Classifier(torch.nn.Module):
        def __init__(self, *encoders: torch.nn.Module) -> None:
            super().__init__()
            self.encoders = torch.nn.ModuleList(encoders)
            self.head = torch.nn.Linear(48, 3)

    inner = make_model("bert").bert
    recipe = Recipe(irc=1)
    want = facts(foldprune.compress(inner, recipe=recipe))
    with pytest.warns(foldprune.UnmatchedTensorWarning, match="head"):
        assert facts(foldprune.compress(Classifier(inner), recipe=recipe)) == want
        assert facts(foldprune.compress(Classifier(inner, inner), recipe=recipe)) == want
    other = type(inner)(type(inner.config)(**{**inner.config.to_dict(), "num_attention_heads": 2}))
    with (
        pytest.warns(foldprune.UnmatchedTensorWarning, match="head"),
        pytest.raises(foldprune.ModelError, match="pass num_heads= or config="),
    ):
        foldprune.compress(Classifier(inner, other), recipe=recipe)


def test_heads_from_the_table_of_known_shapes():
    state = reference.bert_state(layers=1, d=384, ff=1536)
    assert facts(foldprune.compress(state, recipe=Recipe(irc=1))) == (
        12,
        12,
        32,
        "table of known shapes",
    )


def test_heads_assumed_with_a_warning():
    state = reference.bert_state(layers=1, d=128, ff=96)
    with pytest.warns(foldprune.HeadSizeWarning, match="num_heads") as caught:
        compressed = foldprune.compress(state, recipe=Recipe.lossless())
    assert len(caught) == 1
    assert "64" in str(caught[0].message)
    assert facts(compressed) == (2, 2, 64, "assumed")
    assert "assumed" in str(compressed.report)


def test_pruning_alone_needs_no_heads():
    compressed = foldprune.compress(reference.bert_state(d=40), recipe=Recipe(fpp=0.5))
    assert compressed.report.totals["feed_forward"].removed == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("heads", [5, 7, 49])
def test_heads_that_do_not_divide(heads):
    with pytest.raises(foldprune.ModelError, match=r"encoder\.layer\.0\.attention"):
        foldprune.compress(reference.bert_state(), 0.3, num_heads=heads)


def test_heads_that_contradict_the_configuration():
    with pytest.raises(foldprune.ModelError, match="num_heads=4"):
        foldprune.compress(
            reference.bert_state(), 0.3, num_heads=4, config={"num_attention_heads": 6}
        )
    with pytest.raises(foldprune.ModelError, match="num_key_value_heads"):
        foldprune.compress(
            reference.llama_state(),
            0.3,
            config={"num_attention_heads": 4, "num_key_value_heads": 4},
        )
