"""Odd tensors, calls at once, calls without end: the right result, and flat memory."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import reference
from safetensors.numpy import save_file

import foldprune
from foldprune import Recipe

pytestmark = [
    pytest.mark.filterwarnings("ignore::foldprune.UnmatchedTensorWarning"),
    pytest.mark.filterwarnings("ignore::foldprune.FoldRefusedWarning"),
]


# ---- odd tensors --------------------------------------------------------------------------------

SHAPES = [(), (0,), (1,), (0, 5), (5, 0), (0, 0), (1, 7), (7, 1), (1, 1), (0, 3, 2), (2, 1, 3)]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int64", "bool"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_shapes(shape, dtype, tmp_path):
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    rng = np.random.default_rng(0)
    odd = np.asarray(rng.standard_normal(shape)).astype(kind)
    state = {"odd": odd, "even.weight": rng.standard_normal((8, 8), np.float32)}
    for recipe in (
        Recipe(fpp=0.5),
        Recipe(fpp=0.5, fpp_scope="row"),
        Recipe(fpp=0.5, fpp_granularity="2:4"),
        Recipe(fpp=0.5, fpp_granularity="4x4"),
        Recipe(fpp=0.5, fpp_granularity="row"),
    ):
        compressed = foldprune.compress(state, recipe=recipe)
        compressed.save(tmp_path / "a")
        loaded = foldprune.load(tmp_path / "a")
        assert loaded["odd"].shape == shape and loaded["odd"].dtype == kind
        same = np.asarray(loaded["odd"] == odd) | np.asarray(loaded["odd"] == 0)
        assert same.all()
        if len(shape) != 2 or kind.kind in "ib":
            assert reference.same_bytes(loaded["odd"], odd)
        save_file(state, tmp_path / "model.safetensors")
        foldprune.compress_checkpoint(
            tmp_path / "model.safetensors", tmp_path / "out", recipe=recipe
        )
        assert foldprune.load(tmp_path / "out")["odd"].shape == shape


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_huge_and_denormal_values(dtype):
    """The smallest go first, whatever their size; what stays keeps every bit."""
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    info = ml_dtypes.finfo(kind)
    tiny, huge = float(info.smallest_subnormal), float(info.max)
    values = [0.0, -0.0, tiny, -2 * tiny, 8 * tiny, float(info.tiny), -1.0, 3.0, huge / 2, -huge]
    weight = np.array(values * 8, np.float64).astype(kind).reshape(8, 10)
    for scope in ("global", "tensor", "row"):
        recipe = Recipe(fpp=0.5, fpp_scope=scope)
        compressed = foldprune.compress({"a.weight": weight}, recipe=recipe)
        dense = compressed["a.weight"]
        kept = np.abs(weight.astype(np.float64)) >= float(info.tiny)
        if dtype == "float64":  # scores are float32: below its range all are alike
            kept = np.abs(weight) >= 1
        assert reference.same_bytes(dense[kept], weight[kept])
        assert np.isfinite(compressed.report["a.weight"].error)


def sparse(state: dict[str, np.ndarray], share: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    out = {}
    for name, array in state.items():
        mask = rng.random(array.shape) < share if array.ndim == 2 else np.zeros(array.shape, bool)
        out[name] = np.where(mask, np.float32(0), array)
    return out


@pytest.mark.parametrize("how", [{"rate": 0.3}, {"recipe": Recipe(fpp=0.3)}])
def test_sparse_tensors_stay_sparse_and_count_once(how, tmp_path):
    """Where more is zero already than is asked for, nothing else goes."""
    state = sparse(reference.llama_state(), 0.8)
    compressed = foldprune.compress(state, num_heads=4, **how)
    save_file(state, tmp_path / "model.safetensors")
    foldprune.compress_checkpoint(tmp_path, tmp_path / "out", num_heads=4, **how)
    for result in (compressed, foldprune.load(tmp_path / "out")):
        for name, array in state.items():
            if result.report[name].method.startswith("FPP"):  # a fold moves the zeros
                np.testing.assert_array_equal(result[name], array)
        stored = sum(encoding.numbers for encoding in result.encodings.values())
        assert stored == sum(row.stored for row in result.report.rows)
        numbers = sum(array.size for array in state.values())
        assert result.report.removed == pytest.approx(1 - stored / numbers)
    if "rate" in how:
        assert compressed.report.removed == pytest.approx(0.3, abs=0.005)


def test_a_pruned_model_pruned_again_loses_nothing_more():
    state = reference.llama_state()
    once = foldprune.compress(state, recipe=Recipe(fpp=0.6), num_heads=4)
    again = foldprune.compress(once.state_dict("numpy"), recipe=Recipe(fpp=0.6), num_heads=4)
    assert again.report.removed == once.report.removed
    for name in state:
        assert reference.same_bytes(again[name], once[name])


DEFICIENT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rank one": lambda w: np.outer(w[:, 0], w[0]).astype(np.float32),
    "rank three": lambda w: (w[:, :3] @ w[:3]).astype(np.float32),
    "duplicated rows": lambda w: np.repeat(w[::4], 4, axis=0),
    "duplicated columns": lambda w: np.repeat(w[:, ::4], 4, axis=1),
    "nearly duplicated rows": lambda w: np.repeat(w[::4], 4, axis=0) + np.float32(1e-7) * w,
    "one row": lambda w: np.where(np.arange(len(w))[:, None] == 3, w, np.float32(0)),
}


@pytest.mark.parametrize("case", DEFICIENT)
@pytest.mark.parametrize("family", [reference.bert_state, reference.llama_state])
def test_rank_deficient_projections(case, family):
    state = family()
    for name, array in state.items():
        if any(part in name for part in ("query.w", "key.w", "value.w", "q_proj", "k_proj", "v_")):
            state[name] = DEFICIENT[case](array)
    compressed = foldprune.compress(state, rate=0, num_heads=4)
    assert foldprune.verify(state, compressed).lossless
    for recipe in (Recipe(irc=2, dwc=1), Recipe(irc=3, dwc="pivot")):
        folded = foldprune.compress(state, recipe=recipe, num_heads=4)
        assert all(np.isfinite(folded[name]).all() for name in state)
        assert all(row.error is None or row.error >= 0 for row in folded.report.rows)


STRANGE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "negative strides": lambda a: np.flip(np.flip(a).copy()),
    "transposed": lambda a: a.T.copy().T,
    "every other": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "big-endian reversed": lambda a: np.flip(np.flip(a).astype(a.dtype.newbyteorder(">"))),
    "unaligned": lambda a: np.frombuffer(b"x" + a.tobytes(), a.dtype, offset=1).reshape(a.shape),
    "read-only": lambda a: np.broadcast_to(a, a.shape),
    "subclass": lambda a: a.view(np.matrix) if a.ndim == 2 else a,
    "memory-mapped order": lambda a: np.asfortranarray(a),
}


@pytest.mark.parametrize("layout", STRANGE)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("how", [{"rate": 0.4}, {"recipe": Recipe(fpp=0.5, irc=2, dwc=2)}])
@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_arrays_in_any_layout_mean_their_values(how, dtype, layout, tmp_path):
    state = {name: a.astype(dtype) for name, a in reference.llama_state(layers=1).items()}
    state["step"] = np.arange(6, dtype=np.int64).reshape(2, 3)
    odd = {name: STRANGE[layout](array) for name, array in state.items()}
    before = {name: array.tobytes() for name, array in odd.items()}
    want = foldprune.compress(state, num_heads=4, **how)
    got = foldprune.compress(odd, num_heads=4, **how)
    assert {name: array.tobytes() for name, array in odd.items()} == before
    got.save(tmp_path / "a")
    for result in (got, foldprune.load(tmp_path / "a")):
        for name in state:
            assert type(result[name]) is np.ndarray
            assert reference.same_bytes(result[name], want[name]), name


FLOAT8 = ["float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("how", [{"rate": 0.2}, {"recipe": Recipe(fpp=0.5, irc=2, dwc=2)}])
def test_float8_passes_through_and_is_named(how, dtype, tmp_path):
    kind = np.dtype(getattr(ml_dtypes, dtype))
    state = reference.llama_state(vocab=400)
    eight = [name for name in state if "layers.1" in name and name.endswith("proj.weight")]
    for name in eight:
        state[name] = state[name].astype(kind)
    path = tmp_path / "model.safetensors"
    foldprune.tensor_files.write_safetensors(str(path), state, state.values(), {})
    foldprune.compress_checkpoint(path, tmp_path / "out", num_heads=4, **how)
    for result in (
        foldprune.compress(state, num_heads=4, **how),
        foldprune.compress(path, num_heads=4, **how),
        foldprune.load(tmp_path / "out"),
    ):
        for name in eight:
            assert reference.same_bytes(result[name], state[name])
            assert result.report[name].removed == 0 and result.report[name].numbers == 0
            assert any(name in note and dtype in note for note in result.report.notes)
        assert result.report.removed > 0.1


def quantised(name: str, weight: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    """What stands for a weight in checkpoints of that kind."""
    (rows, cols), layer = weight.shape, name.removesuffix(".weight")
    rng = np.random.default_rng(rows)
    if kind == "gptq":
        return {
            f"{layer}.qweight": rng.integers(0, 99, (cols // 8, rows), np.int32),
            f"{layer}.qzeros": rng.integers(0, 99, (2, rows // 8), np.int32),
            f"{layer}.scales": rng.random((2, rows)).astype(np.float16),
            f"{layer}.g_idx": np.arange(cols, dtype=np.int32) // (cols // 2),
        }
    if kind == "bitsandbytes-4bit":
        return {
            name: rng.integers(0, 99, (weight.size // 2, 1), np.uint8),
            f"{name}.absmax": rng.integers(0, 99, weight.size // 64, np.uint8),
            f"{name}.quant_map": rng.random(16, np.float32),
            f"{name}.quant_state.bitsandbytes__nf4": rng.integers(0, 99, 30, np.uint8),
        }
    if kind == "bitsandbytes-8bit":
        return {
            name: rng.integers(-99, 99, weight.shape, np.int8),
            f"{layer}.SCB": rng.random(rows, np.float32),
        }
    eight = {name: weight.astype(ml_dtypes.float8_e4m3fn)}
    if kind == "compressed-tensors":
        return eight | {
            f"{layer}.weight_scale": rng.random((rows, 1), np.float32),
            f"{layer}.input_scale": np.ones((), np.float32),
        }
    assert kind == "float8-blocks"
    return eight | {f"{name}_scale_inv": rng.random((1, 1), np.float32)}


QUANTISED = [
    "gptq", "bitsandbytes-4bit", "bitsandbytes-8bit", "compressed-tensors", "float8-blocks",
]  # fmt: skip


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("which", ["layers.1", "layers"])
@pytest.mark.parametrize("how", [{"rate": 0.1}, {"recipe": Recipe(fpp=0.5, irc=2, dwc=2)}])
def test_quantised_layers_pass_through_with_their_scales(how, which, kind, tmp_path):
    state = reference.llama_state(vocab=400)
    chosen = [name for name in state if which in name and name.endswith("proj.weight")]
    kept: dict[str, np.ndarray] = {}
    for name in chosen:
        kept |= quantised(name, state.pop(name), kind)
    state |= kept
    path = tmp_path / "model.safetensors"
    foldprune.tensor_files.write_safetensors(str(path), state, state.values(), {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", foldprune.FoldRefusedWarning)
        foldprune.compress_checkpoint(path, tmp_path / "out", num_heads=4, **how)
        result = foldprune.compress(state, num_heads=4, **how)
    for compressed in (result, foldprune.load(tmp_path / "out")):
        for name, array in kept.items():
            assert reference.same_bytes(compressed[name], array)
        for name in chosen:
            layer = name.removesuffix(".weight")
            assert any(f"{layer}: quantised" in note for note in compressed.report.notes)
        assert compressed.report["model.embed_tokens.weight"].removed > 0
        if which == "layers.1":
            assert compressed.report["model.layers.0.mlp.up_proj.weight"].removed > 0


def test_a_fold_needs_both_of_its_matrices():
    """A quantised key beside a float query, an output projection beside its value."""
    state = reference.llama_state()
    for part in ("k_proj", "o_proj"):
        name = f"model.layers.0.self_attn.{part}.weight"
        state |= quantised(name, state[name], "bitsandbytes-8bit")
    with pytest.warns(foldprune.FoldRefusedWarning, match="int8 weights pass through"):
        result = foldprune.compress(state, recipe=Recipe(irc=2, dwc=2), num_heads=4)
    for part in ("q_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{part}.weight"
        assert reference.same_bytes(result[name], state[name])
        assert result.report[name.replace("layers.0", "layers.1")].removed > 0


@pytest.mark.parametrize("recipe", [None, Recipe(fpp=0.5)])
def test_integer_weights_without_scales_are_refused_by_name(recipe):
    """Integers are not numbers to prune; the remedy is in the message."""
    state = reference.llama_state()
    name = "model.layers.1.mlp.up_proj.weight"
    state[name] = np.zeros(state[name].shape, np.int8)
    with pytest.raises(foldprune.TensorTypeError, match="dequantise") as error:
        foldprune.compress(state, 0.3, recipe=recipe, num_heads=4)
    assert name in str(error.value)


# ---- many at once, many times -------------------------------------------------------------------


def test_eight_threads_at_once(tmp_path):
    states = [reference.llama_state(seed=seed) for seed in range(8)]
    hows = [{"rate": 0.4}, {"recipe": Recipe(fpp=0.5, irc=2, dwc=2)}] * 4

    def work(i: int) -> dict[str, bytes]:
        out = []
        for again in range(3):
            compressed = foldprune.compress(states[i], num_heads=4, threads=2, **hows[i])
            path = tmp_path / f"{i}-{again}"
            compressed.save(path)
            out.append({n: a.tobytes() for n, a in foldprune.load(path).items()})
        assert out[0] == out[1] == out[2]
        return out[0]

    alone = [work(i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == alone


FLAT = """
import sys, warnings
import numpy as np
import foldprune
from foldprune import Recipe
warnings.simplefilter("ignore")

rng = np.random.default_rng(0)
prefix = "model.layers.0."
names = {"self_attn.q_proj": 8, "self_attn.k_proj": 8, "self_attn.v_proj": 8,
         "self_attn.o_proj": 8, "mlp.gate_proj": 8, "mlp.up_proj": 8, "mlp.down_proj": 8}
state = {f"{prefix}{n}.weight": rng.standard_normal((s, 8), np.float32) for n, s in names.items()}
for norm in ("input_layernorm", "post_attention_layernorm"):
    state[f"{prefix}{norm}.weight"] = np.ones(8, np.float32)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

for i in range(int(sys.argv[1])):
    how = {"rate": 0.4} if i % 2 else {"recipe": Recipe(fpp=0.5, irc=1, dwc=1)}
    compressed = foldprune.compress(state, num_heads=2, threads=1, **how)
    [compressed[name] for name in state]
    if i == int(sys.argv[1]) // 4:
        before = resident()
print(resident() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_memory_is_flat_over_ten_thousand_calls():
    """In pages of 4 kB, over the last three quarters: a leak of 100 bytes a call would show."""
    done = subprocess.run(
        [sys.executable, "-c", FLAT, "10000"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 180
