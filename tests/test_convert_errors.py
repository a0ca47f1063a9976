"""What convert refuses, and what it loads dense."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import models
import numpy as np
import pytest

import foldprune
from foldprune import LoadedDenseWarning, ModelError, Recipe, TensorError, TensorTypeError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from converting import close, logits  # noqa: E402

from foldprune.torch import (  # noqa: E402
    FoldedAttention,
    PackedLinear,
    convert,
    to_compressed,
)

pytestmark = pytest.mark.usefixtures("one_thread", "no_warnings")


def unchanged(model: Any, before: dict[str, Any]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(isinstance(m, (PackedLinear, FoldedAttention)) for m in model.modules())


def test_checkpoints_that_do_not_fit(compressed_model, make_model):
    model, compressed = compressed_model("bert", "both and pruned")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    other = make_model("roberta")
    with pytest.raises(ModelError, match=r"missing roberta\..* not in the model bert\."):
        convert(other, compressed)
    wider = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=90,
            hidden_size=48,
            num_hidden_layers=2,
            intermediate_size=80,
            num_attention_heads=4,
            max_position_embeddings=40,
        )
    )
    with pytest.raises(TensorError, match=r"shape \(89, 48\) in the checkpoint, \(90, 48\)"):
        convert(wider, compressed)
    with pytest.raises(TensorTypeError, match="dtype="):
        convert(model, compressed, dtype="int4")
    with pytest.raises(TensorTypeError, match="float64 goes with float64"):
        convert(model, compressed, dtype="float64")
    with pytest.raises(TypeError, match="torch module"):
        convert(model.state_dict(), compressed)
    with pytest.raises(TypeError, match="Compressed"):
        convert(model, model.state_dict())
    with pytest.raises(ModelError, match="convert a model on the CPU"):
        convert(copy.deepcopy(model).to("meta"), compressed)
    unchanged(model, before)
    with pytest.raises(ModelError, match=r"not made by foldprune\.torch\.convert"):
        to_compressed(model)
    convert(model, compressed)
    with pytest.raises(ModelError, match="converted already"):
        convert(model, compressed)


def test_values_beyond_float16(make_model):
    model = make_model("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = 1e6
    compressed = foldprune.compress(model, recipe=Recipe(fpp=0.5))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(TensorError, match=r"layer.0.output.dense.weight'.* range of float16"):
        convert(model, compressed, dtype="float16")
    unchanged(model, before)


def test_what_the_model_ties_and_the_checkpoint_does_not(make_model):
    tied, free = make_model("llama-tied"), make_model("llama-tied")
    free.config.tie_word_embeddings = False
    free.lm_head.weight = torch.nn.Parameter(free.lm_head.weight.detach() + 1)
    compressed = foldprune.compress(free, recipe=Recipe(fpp=0.5))
    with pytest.raises(ModelError, match=r"the model ties model\.embed_tokens\.weight, lm_head"):
        convert(tied, compressed)
    # the other way round each has its own
    converted = convert(free, foldprune.compress(tied, recipe=Recipe(fpp=0.5)))
    assert converted.lm_head.values is not converted.model.embed_tokens.values
    assert torch.equal(converted.lm_head.values, converted.model.embed_tokens.values)


def test_loaded_dense(token_ids):
    """A module without a packed form, and attention that is none of transformers'."""

    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Bilinear(8, 8, 8)
            self.matrix = torch.nn.Parameter(torch.randn(8, 8))
            self.linear = torch.nn.Linear(8, 8)

    model = Odd()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", foldprune.UnmatchedTensorWarning)
        compressed = foldprune.compress(model, recipe=Recipe(fpp=0.5))
    with pytest.warns(LoadedDenseWarning, match="'matrix' is loaded dense"):
        converted = convert(model, compressed)
    assert isinstance(converted.linear, PackedLinear)
    assert np.array_equal(converted.matrix.detach().numpy(), compressed["matrix"])
    assert np.array_equal(to_compressed(converted)["matrix"], compressed["matrix"])


def test_attention_without_a_runtime_form(compressed_model, token_ids):
    model, compressed = compressed_model("gpt2", "irc 3")
    model.config.reorder_and_upcast_attn = True
    model = type(model)(model.config).eval()
    with pytest.warns(LoadedDenseWarning, match="reorder_and_upcast_attn"):
        converted = convert(model, compressed)
    reference = models.loaded(model, compressed)
    assert not any(isinstance(m, FoldedAttention) for m in converted.modules())
    close(logits(converted, token_ids), logits(reference, token_ids))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_input_that_does_not_fit(both, token_ids, implementation):
    _, converted, _ = both("bert", "both and pruned")
    converted.set_attn_implementation(implementation)
    attention = converted.bert.encoder.layer[0].attention.self
    x = torch.randn(2, 13, 48)
    for mask in (torch.zeros(2, 1, 13, 7), torch.zeros(3, 1, 13, 13), torch.zeros(2, 1, 4, 13)):
        with pytest.raises(RuntimeError, match=r"size|expand|shape"):
            attention(x, attention_mask=mask)
    for wrong in (torch.randn(2, 13, 47), x.double()):
        with pytest.raises(RuntimeError):
            attention(wrong)
    with pytest.raises(IndexError, match="out of range"):
        logits(converted, token_ids + 89)
