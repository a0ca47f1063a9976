"""torch.nn's own attention, judged by its forward pass."""

from __future__ import annotations

import copy
from typing import Any

import models
import numpy as np
import pytest
import reference
import torch
from torch import nn

import foldprune
from foldprune import Recipe

ABSOLUTE = 1e-5
RECIPES = [
    Recipe(irc=1),
    Recipe(irc=5, dwc="pivot"),
    Recipe(irc="lossless", dwc=2),
    Recipe(irc=2, dwc="slice", fpp=0.5),
]


@pytest.fixture(autouse=True)
def _layers_are_called():
    """Not by a fast path, which hooks do not see."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(48, 4, 80, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(48, 4, 80, batch_first=True), 2)


def attention(**options: Any) -> nn.Module:
    return nn.MultiheadAttention(48, 4, batch_first=True, **options)


MODELS = {
    "encoder": encoder,
    "encoder, norm first": lambda: encoder(norm_first=True),
    "encoder without biases": lambda: encoder(bias=False),
    "decoder": decoder,
    "attention": attention,
    "widths": lambda: attention(kdim=40, vdim=36),
    "widths without biases": lambda: attention(kdim=40, vdim=36, bias=False),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return models.randomise(MODELS[name](), 0)


def inputs(model: nn.Module) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)

    def rows(tokens: int, width: int) -> torch.Tensor:
        return torch.randn(2, tokens, width, generator=generator)

    if isinstance(model, nn.TransformerEncoder):
        return (rows(9, 48),)
    if isinstance(model, nn.TransformerDecoder):
        return rows(9, 48), rows(7, 48)
    return rows(9, 48), rows(7, model.kdim), rows(7, model.vdim)


def forward(model: nn.Module) -> np.ndarray:
    with torch.no_grad():
        out = model(*inputs(model))
    return (out[0] if isinstance(out, tuple) else out).double().numpy()


def reloaded(model: nn.Module, compressed: foldprune.Compressed) -> nn.Module:
    other = copy.deepcopy(model)
    other.load_state_dict(compressed.state_dict(), strict=True)
    return other


def stored(prefix: str, encodings: Any) -> dict[str, reference.Stored]:
    found = {}
    for part, role in enumerate(("query", "key", "value")):
        names = {
            role: ((f"{prefix}in_proj_weight", 3), (f"{prefix}{role[0]}_proj_weight", 1)),
            f"{role}_bias": ((f"{prefix}in_proj_bias", 3),),
        }
        for key, choices in names.items():
            for name, parts in choices:
                if name in encodings:
                    where = part if parts > 1 else 0
                    found[key] = reference.Stored(encodings[name], where, parts)
    found["output"] = reference.Stored(encodings[f"{prefix}out_proj.weight"])
    if f"{prefix}out_proj.bias" in encodings:
        found["output_bias"] = reference.Stored(encodings[f"{prefix}out_proj.bias"])
    return found


def check(model: nn.Module, compressed: foldprune.Compressed) -> None:
    """Every attention of the dense state dict puts out what the stored factors do, in float64."""
    other = reloaded(model, compressed)
    met: list[tuple[str, Any, Any]] = []
    for name, module in other.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            prefix = f"{name}." if name else ""

            def note(_: Any, args: Any, out: Any, prefix: str = prefix) -> None:
                met.append((prefix, args, out[0]))

            module.register_forward_hook(note)
    forward(other)
    assert met
    for prefix, args, out in met:
        factors = stored(prefix, compressed.encodings)
        for x, k, v, y in zip(*args[:3], out, strict=True):
            arrays = (a.double().numpy() for a in (x, k, v))
            x64, k64, v64 = arrays
            want = reference.attention(x64, factors, 4, 4, 12, None, keys=k64, values=v64)
            assert y.abs().max() > 0.05
            assert np.abs(want - y.numpy()).max() <= ABSOLUTE


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["recipe", "rate"])
def test_lossless(name, how):
    model = make(name)
    lossless = {"recipe": Recipe.lossless()} if how == "recipe" else {"rate": 0.0}
    compressed = foldprune.compress(model, **lossless)
    assert compressed.report.heads["heads"] == 4  # the module says so
    assert np.abs(forward(reloaded(model, compressed)) - forward(model)).max() <= ABSOLUTE
    assert foldprune.verify(model, compressed).lossless
    d, biases = 48, "without" not in name
    widths = (d, 40, 36) if "widths" in name else (d, d, d)
    blocks = {"encoder": 2, "decoder": 4}.get(name.split()[0].strip(","), 1)
    dense = sum(d * (width + biases) for width in widths)
    total = compressed.report.totals["qkv"]
    assert total.numbers == blocks * dense
    # the identity in pivots of key and value, the key's bias and the value's
    assert total.stored == blocks * (dense - 2 * 4 * 12**2 - 2 * d * biases)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", RECIPES, ids=["1", "5-pivot", "lossless-2", "2-slice-fpp"])
def test_reduced_rank(name, recipe):
    model = make(name)
    if "widths" in name and recipe.dwc == "slice":
        with pytest.warns(foldprune.FoldRefusedWarning, match="a slice needs"):
            check(model, foldprune.compress(model, recipe=recipe))
    else:
        check(model, foldprune.compress(model, recipe=recipe))


def test_inside_another_module():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = attention()
            self.head = nn.Sequential(nn.Linear(48, 3))
            self.head.out_proj = nn.Linear(3, 3)  # no attention's

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.mix(x, x, x)[0])

    torch.manual_seed(0)
    model = models.randomise(Model(), 0)
    x = torch.randn(2, 5, 48)
    with pytest.warns(foldprune.UnmatchedTensorWarning, match=r"head\.out_proj\.weight"):
        compressed = foldprune.compress(model, recipe=Recipe.lossless())
    assert compressed.report["mix.in_proj_weight"].method == "IRC lossless + DWC lossless"
    assert compressed.report["head.out_proj.weight"].method == "dense"
    with torch.no_grad():
        difference = reloaded(model, compressed)(x) - model(x)
    assert difference.abs().max() <= ABSOLUTE


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"add_bias_kv": True}, "add_bias_kv"), ({"add_zero_attn": True}, "add_zero_attn")],
)
def test_keys_that_are_not_projected_refuse_folds(options, reason):
    model = models.randomise(attention(**options), 0)
    with pytest.warns(foldprune.FoldRefusedWarning, match=reason):
        compressed = foldprune.compress(model, recipe=Recipe.lossless())
    row = compressed.report["in_proj_weight"]
    assert row.method == "dense" and reason in row.note
    assert np.array_equal(forward(reloaded(model, compressed)), forward(model))


def test_a_zero_that_is_attended_to_can_be_said_of_a_state_dict():
    model = attention(add_zero_attn=True)
    config = {"num_attention_heads": 4, "add_zero_attn": True}
    with pytest.warns(foldprune.FoldRefusedWarning, match="add_zero_attn"):
        compressed = foldprune.compress(model.state_dict(), recipe=Recipe.lossless(), config=config)
    assert compressed.report["in_proj_weight"].method == "dense"


def test_calibration_of_feed_forward_layers():
    """Attention calls no layers, so nothing is known of its inputs: folded without data, not
    pruned with data."""
    import foldprune.torch

    model = make("encoder")
    batches = [torch.randn(4, 16, 48) for _ in range(4)]
    calibration = foldprune.torch.calibrate(model, batches, gradients=0, progress=False)
    recipe = Recipe(irc=4, fpp=0.5, fpp_on=("feed_forward",))
    compressed = foldprune.compress(model, recipe=recipe, calibration=calibration)
    assert any("folded without data" in note for note in compressed.report.notes)
    assert "FPP" in compressed.report["layers.0.linear1.weight"].method
    with pytest.raises(foldprune.TensorError, match=r"out_proj.*no statistics"):
        foldprune.compress(model, recipe=Recipe(fpp=0.5), calibration=calibration)
