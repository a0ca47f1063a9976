"""Bad input: the right kind of error, the tensor's name in it, and nothing lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
from safetensors.numpy import save_file

import foldprune
from foldprune import Recipe

UP = "encoder.layer.1.intermediate.dense.weight"
ATTENTION = "encoder.layer.1.attention."
RECIPES = {
    "rate": {"rate": 0.3},
    "lossless": {"recipe": Recipe.lossless()},
    "paper": {"recipe": Recipe.paper()},
    "fpp": {"recipe": Recipe(fpp=0.5)},
}


def digest(state: dict[Any, Any]) -> dict[Any, bytes]:
    return {
        name: np.asarray(value).tobytes()
        for name, value in state.items()
        if hasattr(value, "shape")
    }


def fails(state: Any, kind: type[Exception], *words: str, **options: Any) -> str:
    """compress raises this kind of error, whose message has these words; the state is untouched."""
    before = digest(state) if isinstance(state, dict) else {}
    options = {"num_heads": 4, **options}
    with pytest.raises(kind) as error:
        foldprune.compress(state, **options)
    text = str(error.value)
    assert isinstance(error.value, (ValueError, TypeError, KeyError, OSError))
    for word in words:
        assert word in text, text
    if isinstance(state, dict):
        assert digest(state) == before
    return text


@pytest.fixture
def state() -> dict[str, np.ndarray]:
    return reference.bert_state()


# ---- what is no state dict ----------------------------------------------------------------------


def test_empty():
    fails({}, ValueError, "empty")


@pytest.mark.parametrize("source", [None, 3, [np.ones(3)], np.ones((3, 3)), b"path", {1, 2}])
def test_no_state_dict(source):
    fails(source, TypeError, type(source).__name__)


@pytest.mark.parametrize("name", [0, None, b"weight", ("a", "b")])
@pytest.mark.parametrize("recipe", ["rate", "fpp"])
def test_names_that_are_no_strings(name, recipe, state):
    state[name] = np.ones((3, 3), np.float32)
    fails(state, TypeError, repr(name), **RECIPES[recipe])


@pytest.mark.parametrize("value", [None, 3.0, "text", [1.0, 2.0], {"a": 1}, object()], ids=repr)
@pytest.mark.parametrize("recipe", ["rate", "fpp"])
def test_values_that_are_no_tensors(value, recipe, state):
    state["pooler.dense.weight"] = value
    fails(state, TypeError, "'pooler.dense.weight'", **RECIPES[recipe])


def test_a_training_checkpoint_is_explained(state):
    fails({"model": state, "step": 3}, TypeError, "'model'", "state dict")


# ---- dtypes and values --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", ["object", "complex64", "complex128", "int8", "int64", "uint8", "bool", "U3", "M8[s]"]
)
@pytest.mark.parametrize(
    "name", [UP, ATTENTION + "self.query.weight", "embeddings.word_embeddings.weight"]
)
@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_of_other_dtypes(dtype, name, recipe, state):
    state[name] = np.zeros(state[name].shape, dtype)
    fails(state, TypeError, repr(name), **RECIPES[recipe])


@pytest.mark.parametrize("dtype", ["object", "complex64", "U3"])
def test_other_tensors_of_impossible_dtypes(dtype, state):
    state["classifier.extra"] = np.zeros(3, dtype)
    fails(state, TypeError, "'classifier.extra'")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name",
    [
        UP,
        ATTENTION + "self.value.bias",
        "embeddings.LayerNorm.weight",
        ATTENTION + "self.key.weight",
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_nan_and_inf(value, name, dtype, state):
    import ml_dtypes

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    state = {n: a.astype(kind) for n, a in state.items()}
    state[name].flat[-1] = value
    for recipe in RECIPES.values():
        text = fails(state, ValueError, repr(name), **recipe)
        assert "NaN" in text or "Inf" in text


def test_subnormal_and_largest_numbers_are_numbers(state):
    state[UP].flat[:4] = [np.finfo(np.float32).max, -np.finfo(np.float32).max, 1e-45, -0.0]
    compressed = foldprune.compress(state, recipe=Recipe(fpp=0.5))
    assert compressed[UP].flat[0] == np.finfo(np.float32).max
    assert np.isfinite(compressed.report[UP].error)


def test_torch_tensors_of_other_kinds(state):
    torch = pytest.importorskip("torch")
    bad = {
        "complex": torch.zeros(96, 48, dtype=torch.complex64),
        "sparse": torch.eye(96, 48).to_sparse(),
        "meta": torch.zeros(96, 48, device="meta"),
        "integer": torch.zeros(96, 48, dtype=torch.int32),
        "quantized": torch.quantize_per_tensor(torch.zeros(96, 48), 0.1, 0, torch.qint8),
    }
    for value in bad.values():
        tensors: dict[str, Any] = {name: torch.from_numpy(a) for name, a in state.items()}
        tensors[UP] = value
        for recipe in RECIPES.values():
            with pytest.raises(TypeError, match=UP.replace(".", r"\.")):
                foldprune.compress(tensors, num_heads=4, **recipe)


def test_torch_nan(state):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(a).bfloat16() for name, a in state.items()}
    tensors[UP][3, 4] = float("nan")
    with pytest.raises(ValueError, match=UP.replace(".", r"\.")):
        foldprune.compress(tensors, 0.3, num_heads=4)


# ---- rates, ranks, heads ------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [-1e-9, 1, 1.0, 2, float("nan"), -float("inf")])
def test_rate_outside_its_range(rate, state):
    fails(state, ValueError, "rate", rate=rate)


@pytest.mark.parametrize(
    ("recipe", "word"),
    [(Recipe(irc=13), "irc=13"), (Recipe(dwc=13), "dwc=13"), (Recipe(irc=10**9), "irc=")],
    ids=["irc", "dwc", "huge"],
)
def test_rank_above_the_head_size(recipe, word, state):
    fails(state, ValueError, word, "encoder.layer.0", "12", recipe=recipe)


def test_more_planes_than_there_are():
    state = reference.llama_state()
    fails(state, ValueError, "irc=9", "layers.0", "8 planes", recipe=Recipe(irc=9))
    fails(state, ValueError, "dwc=17", "layers.0", recipe=Recipe(dwc=17))


@pytest.mark.parametrize("heads", [5, 7, 96])
def test_heads_that_do_not_divide(heads, state):
    fails(state, ValueError, "'encoder.layer.0.attention.self.", num_heads=heads)


@pytest.mark.parametrize("heads", [0, -1, -4])
def test_impossible_heads(heads, state):
    fails(state, ValueError, "num_heads", num_heads=heads)


@pytest.mark.parametrize("heads", [4.0, "4", True])
def test_heads_of_another_type(heads, state):
    fails(state, TypeError, "num_heads", num_heads=heads)
    fails(
        state,
        TypeError,
        "num_attention_heads",
        num_heads=None,
        config={"num_attention_heads": heads},
    )


def test_key_heads_that_do_not_divide():
    state = reference.llama_state(d=64, heads=4, groups=2)
    for layer in range(2):
        for name in ("k_proj", "v_proj"):
            state[f"model.layers.{layer}.self_attn.{name}.weight"] = np.ones((48, 64), np.float32)
    fails(
        state, ValueError, "'model.layers.0.self_attn.k_proj.weight'"
    )  # 4 query heads, 3 key heads


@pytest.mark.parametrize("config", [3, ["a"], object()])
def test_config_of_another_type(config, state):
    fails(state, TypeError, "config", num_heads=None, config=config)


def test_config_files(state, tmp_path):
    fails(state, OSError, num_heads=None, config=tmp_path / "nowhere.json")
    fails(state, OSError, num_heads=None, config=tmp_path)
    for text in ("{", "[1]", "\x00", ""):
        (tmp_path / "config.json").write_text(text)
        fails(state, ValueError, "config.json", num_heads=None, config=tmp_path)


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [
        ("recipe", {"fpp": 0.5}, TypeError),
        ("recipe", "paper", TypeError),
        ("calibration", [1], TypeError),
        ("threads", 0, ValueError),
        ("threads", "2", TypeError),
    ],
)
def test_other_options(option, value, kind, state):
    fails(state, kind, option, **{option: value})


# ---- half a model, shapes that disagree ---------------------------------------------------------


@pytest.mark.parametrize("name", ["self.query", "self.key", "self.value", "output.dense"])
@pytest.mark.parametrize("recipe", ["rate", "lossless", "paper"])
def test_half_a_triple(name, recipe, state):
    del state[f"{ATTENTION}{name}.weight"]
    fails(state, ValueError, f"{ATTENTION}{name}.weight", **RECIPES[recipe])


@pytest.mark.parametrize("name", ["intermediate.dense", "output.dense"])
def test_half_a_feed_forward_layer(name, state):
    del state[f"encoder.layer.1.{name}.weight"]
    fails(state, ValueError, f"encoder.layer.1.{name}.weight")


WRONG_SHAPES: dict[str, tuple[int, ...]] = {
    ATTENTION + "self.query.weight": (48, 40),
    ATTENTION + "self.key.weight": (40, 48),
    ATTENTION + "self.value.weight": (24, 48),
    ATTENTION + "output.dense.weight": (48, 36),
    ATTENTION + "self.query.bias": (47,),
    ATTENTION + "self.key.bias": (48, 1),
    ATTENTION + "self.value.bias": (),
    ATTENTION + "output.dense.bias": (12,),
    UP: (96, 47),
    "encoder.layer.1.output.dense.weight": (48, 95),
    "encoder.layer.1.intermediate.dense.bias": (95,),
}


@pytest.mark.parametrize("name", WRONG_SHAPES)
@pytest.mark.parametrize("recipe", ["rate", "lossless", "paper"])
def test_shapes_that_disagree(name, recipe, state):
    state[name] = np.ones(WRONG_SHAPES[name], np.float32)
    prefix = "encoder.layer.1."
    text = fails(state, ValueError, prefix, **RECIPES[recipe])
    # names the tensor, or those that it does not fit
    assert (
        name in text or name.removesuffix(".weight").removesuffix(".bias") in text or "fit" in text
    )


@pytest.mark.parametrize("shape", [(48,), (), (48, 48, 1), (1, 48, 48), (0, 48), (48, 0), (0,)])
@pytest.mark.parametrize("name", ["self.query", "self.value", "output.dense"])
def test_dimensions(shape, name, state):
    state[f"{ATTENTION}{name}.weight"] = np.ones(shape, np.float32)
    for recipe in ("rate", "lossless"):
        fails(state, ValueError, "encoder.layer.1.attention", **RECIPES[recipe])


def test_fused_rows_that_do_not_divide():
    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    state = {
        "h.0.ln_1.weight": matrix(24),
        "h.0.ln_2.weight": matrix(24),
        "h.0.attn.c_attn.weight": matrix(24, 73),
        "h.0.attn.c_attn.bias": matrix(73),
        "h.0.attn.c_proj.weight": matrix(24, 24),
        "h.0.mlp.c_fc.weight": matrix(24, 96),
        "h.0.mlp.c_proj.weight": matrix(96, 24),
    }
    fails(state, ValueError, "'h.0.attn.c_attn.weight'", "73", num_heads=2)


def test_one_dtype_for_one_fold(state):
    name = ATTENTION + "self.key.weight"
    state[name] = state[name].astype(np.float64)
    for recipe in ("rate", "lossless", "paper"):
        fails(state, TypeError, name, "float64", **RECIPES[recipe])


def test_slice_needs_its_shape():
    state = reference.llama_state()
    with pytest.warns(foldprune.FoldRefusedWarning, match="slice"):
        compressed = foldprune.compress(state, recipe=Recipe(dwc="slice"), num_heads=4)
    for name, array in state.items():
        np.testing.assert_array_equal(compressed[name], array)


def test_a_fold_that_overflows_16_bits_is_left_out_with_the_reason(state):
    state = {name: array.astype(np.float16) for name, array in state.items()}
    for name in ("self.value", "output.dense"):
        state[f"{ATTENTION}{name}.weight"][:] = 3e4
    compressed = foldprune.compress(state, recipe=Recipe(dwc="pivot"), num_heads=4)
    for role in ("self.value", "output.dense"):
        name = f"{ATTENTION}{role}.weight"
        np.testing.assert_array_equal(compressed[name], state[name])
        assert compressed.report[name].method == "dense"
    assert "range of float16" in compressed.report[ATTENTION + "self.value.weight"].note


@pytest.mark.parametrize("method", ["irc", "dwc"])
def test_overflow_of_folded_factors_is_an_error(method):
    """Query times key (output times value) can exceed the dtype: never Inf in the result."""
    state = {n: a.astype(np.float16) for n, a in reference.llama_state(layers=1).items()}
    prefix = "model.layers.0.self_attn."
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        state[f"{prefix}{name}.weight"] *= np.float16(1000)
    recipe = Recipe(irc=2) if method == "irc" else Recipe(dwc=2)
    try:
        compressed = foldprune.compress(state, recipe=recipe, num_heads=4)
    except ValueError as error:
        assert prefix in str(error)
    else:
        assert all(np.isfinite(compressed[name].astype(np.float64)).all() for name in compressed)


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_damaged_files(suffix, state, tmp_path):
    path = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch = pytest.importorskip("torch")
        torch.save({name: torch.from_numpy(array) for name, array in state.items()}, path)
    data = path.read_bytes()
    for cut in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises((ValueError, OSError), match="model"):
            foldprune.compress(path, 0.3, num_heads=4)
    path.write_bytes(b"\xff" * 64)
    fails(path, ValueError, "model")


@pytest.mark.filterwarnings("ignore::foldprune.UnmatchedTensorWarning")
def test_flipped_bits_in_a_dense_header(state, tmp_path):
    """No checksum guards a plain safetensors file; still, no other kind of error escapes."""
    path = tmp_path / "model.safetensors"
    save_file(reference.bert_state(layers=1, d=16, ff=16, vocab=5), path)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(0)
    for position in rng.integers(0, header, 400).tolist():
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            compressed = foldprune.compress(path, recipe=Recipe(fpp=0.5))
        except (ValueError, TypeError, KeyError, OSError):
            continue
        assert len(compressed)


def test_missing_and_unknown_files(tmp_path):
    fails(tmp_path / "nowhere.safetensors", OSError, "nowhere.safetensors")
    fails(tmp_path, OSError, "model.safetensors")
    (tmp_path / "weights.h5").write_bytes(b"\x89HDF")
    fails(tmp_path / "weights.h5", ValueError, "weights.h5", ".safetensors")


INDEXES: dict[str, Any] = {
    "no map": {"metadata": {}},
    "list": [],
    "map of another type": {"weight_map": 3},
    "missing shard": {"weight_map": {"a": "gone.safetensors"}},
    "name not in its shard": {"weight_map": {"a": "model.safetensors"}},
    "path": {"weight_map": {"embeddings.LayerNorm.bias": "../model.safetensors"}},
}


@pytest.mark.parametrize("index", INDEXES)
def test_broken_indexes(index, state, tmp_path):
    save_file(state, tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(INDEXES[index]))
    with pytest.raises((ValueError, OSError)):
        foldprune.compress(path, 0.3, num_heads=4)


def test_a_shard_of_the_index_must_not_be_the_index(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": path.name}}))
    with pytest.raises((ValueError, OSError)):
        foldprune.compress(path, 0.3)


# ---- models that are degenerate but sound -------------------------------------------------------

DEGENERATE: dict[str, Callable[[dict[str, np.ndarray]], None]] = {
    "zero query": lambda s: s[ATTENTION + "self.query.weight"].fill(0),
    "zero key": lambda s: s[ATTENTION + "self.key.weight"].fill(0),
    "zero value": lambda s: s[ATTENTION + "self.value.weight"].fill(0),
    "zero output": lambda s: s[ATTENTION + "output.dense.weight"].fill(0),
    "everything zero": lambda s: [array.fill(0) for array in s.values()] and None,
    "one head of zeros": lambda s: s[ATTENTION + "self.key.weight"][:12].fill(0),
    "equal rows": lambda s: s[ATTENTION + "self.key.weight"].__setitem__(
        slice(None), s[ATTENTION + "self.key.weight"][0]
    ),
    "small": lambda s: [np.multiply(a, 1e-12, out=a) for a in s.values()] and None,
    "large": lambda s: [np.multiply(a, 1e12, out=a) for a in s.values()] and None,
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("recipe", RECIPES)
def test_degenerate_weights_are_compressed(case, recipe, state):
    DEGENERATE[case](state)
    compressed = foldprune.compress(state, num_heads=4, **RECIPES[recipe])
    for name, array in state.items():
        assert compressed[name].shape == array.shape
        assert np.isfinite(compressed[name]).all(), name
    for row in compressed.report.rows:
        assert row.error is None or np.isfinite(row.error)
    if recipe == "lossless":
        assert foldprune.verify(state, compressed).lossless
    json.dumps(compressed.report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("scale", [1e-30, 1e20])
@pytest.mark.parametrize("method", ["irc", "dwc"])
def test_products_outside_the_range_of_the_dtype(method, scale, state):
    """Query times key (output times value) can leave float32's range: refused, or exact in another
    way; never zero or Inf under the name of lossless."""
    for i in range(2):
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            state[f"encoder.layer.{i}.attention.{name}.weight"] *= np.float32(scale)
    try:
        compressed = foldprune.compress(state, recipe=Recipe(**{method: "lossless"}), num_heads=4)
    except ValueError as error:
        assert "attention" in str(error)
    else:
        assert all(np.isfinite(compressed[name]).all() for name in state)
        assert foldprune.verify(state, compressed).lossless


@pytest.mark.parametrize("d", [4, 8])
def test_heads_larger_than_the_model(d):
    """d < head size: query and key of 16 rows on 4 or 8 inputs."""
    rng = np.random.default_rng(0)
    state = reference.llama_state(layers=1, d=d, heads=2, groups=2, ff=12, vocab=9)
    prefix = "model.layers.0.self_attn."
    for name in ("q_proj", "k_proj", "v_proj"):
        state[f"{prefix}{name}.weight"] = rng.standard_normal((32, d)).astype(np.float32)
    state[f"{prefix}o_proj.weight"] = rng.standard_normal((d, 32)).astype(np.float32)
    for recipe in (Recipe.lossless(), Recipe(irc=2, dwc="pivot"), Recipe(irc=8, dwc=3), None):
        compressed = foldprune.compress(state, 0.3, recipe=recipe, num_heads=2)
        assert all(np.isfinite(compressed[name]).all() for name in state)
        if recipe == Recipe.lossless():
            assert foldprune.verify(state, compressed).lossless
