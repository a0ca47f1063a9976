"""``compress``, ``Report`` and ``verify`` on everything a caller may bring."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import reference
from safetensors.numpy import save_file

import foldprune
from foldprune import Recipe

torch = pytest.importorskip("torch")


GROUPS = ("embedding", "feed_forward", "attention_output")


def as_torch(state: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: torch.from_numpy(array.copy()) for name, array in state.items()}


def torch_bits(tensor: Any) -> bytes:
    """Contents in logical order, whatever the dtype and strides."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


# ---- what comes in ------------------------------------------------------------------------------


def test_numpy_in_numpy_out():
    state = reference.bert_state()
    copies = {name: array.copy() for name, array in state.items()}
    compressed = foldprune.compress(state, 0.4, num_heads=4)
    dense = compressed.state_dict()
    assert list(dense) == list(state) == list(compressed)
    assert len(compressed) == len(state)
    for name, array in state.items():
        assert isinstance(dense[name], np.ndarray)
        assert dense[name].dtype == array.dtype and dense[name].shape == array.shape
        assert reference.same_bytes(dense[name], compressed[name])
        assert reference.same_bytes(array, copies[name])


@pytest.mark.parametrize("recipe", [None, Recipe.lossless(), Recipe(fpp=0.5), Recipe.paper()])
def test_the_original_is_not_modified_and_no_memory_is_shared(recipe):
    state = reference.bert_state()
    copies = {name: array.copy() for name, array in state.items()}
    compressed = foldprune.compress(state, recipe=recipe, num_heads=4)
    before = {name: compressed[name] for name in compressed}
    for name, array in state.items():
        assert reference.same_bytes(array, copies[name])
        assert not any(np.shares_memory(array, other) for other in before.values())
        array += 1.0
    for name, array in before.items():
        assert reference.same_bytes(array, compressed[name])
        array += 1.0  # nor does what is handed out reach back into the packed form
        assert not reference.same_bytes(array, compressed[name])


def test_torch_in_torch_out_and_apart():
    state = as_torch(reference.llama_state())
    copies = {name: tensor.clone() for name, tensor in state.items()}
    compressed = foldprune.compress(state, 0.4, num_heads=4)
    dense = compressed.state_dict()
    assert list(dense) == list(state)
    for name, tensor in state.items():
        assert isinstance(dense[name], torch.Tensor)
        assert dense[name].dtype == tensor.dtype and dense[name].shape == tensor.shape
        assert dense[name].is_contiguous()
        assert torch.equal(tensor, copies[name])
        tensor.fill_(9.0)
    again = compressed.state_dict()
    assert all(torch.equal(dense[name], again[name]) for name in dense)
    assert isinstance(compressed.state_dict("numpy")[name], np.ndarray)


def test_mixed_dtypes_keep_theirs():
    state = as_torch(reference.bert_state(layers=3))
    for name in state:
        if "layer.0." in name:
            state[name] = state[name].half()
        elif "layer.1." in name:
            state[name] = state[name].bfloat16()
        elif "layer.2." in name:
            state[name] = state[name].double()
    compressed = foldprune.compress(state, recipe=Recipe(fpp=0.5, irc=4, dwc="pivot"), num_heads=4)
    dense = compressed.state_dict()
    for name, tensor in state.items():
        assert dense[name].dtype == tensor.dtype
        if tensor.ndim == 2 and compressed.report[name].group in GROUPS:
            assert compressed.report[name].method.endswith("weight")
    methods = {
        compressed.report[f"encoder.layer.{i}.attention.self.query.weight"].method for i in range(3)
    }
    assert methods == {"IRC r=4"}
    assert foldprune.verify(state, compressed)


def test_non_contiguous_tensors_mean_their_values():
    plain = reference.bert_state()
    odd = {}
    for i, (name, array) in enumerate(plain.items()):
        if array.ndim == 2 and i % 2:
            odd[name] = np.asfortranarray(array)
        elif array.ndim == 2:
            wide = np.zeros((array.shape[0], 2 * array.shape[1]), array.dtype)
            wide[:, ::2] = array
            odd[name] = wide[:, ::2]
        else:
            odd[name] = array[::-1].copy()[::-1]  # a negative stride
    tensors = {n: torch.from_numpy(np.asfortranarray(a)) for n, a in plain.items()}
    assert not tensors["encoder.layer.0.output.dense.weight"].is_contiguous()
    for recipe in (Recipe.lossless(), Recipe(fpp=0.5, irc=3, dwc="pivot")):
        want = foldprune.compress(plain, recipe=recipe, num_heads=4)
        for given in (odd, tensors):
            got = foldprune.compress(given, recipe=recipe, num_heads=4)
            for name in plain:
                assert reference.same_bytes(want[name], got[name]), name


def test_tied_tensors_are_compressed_once_and_stay_tied():
    state = as_torch(reference.llama_state())
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    compressed = foldprune.compress(state, recipe=Recipe(fpp=0.5))
    dense = compressed.state_dict()
    assert dense["lm_head.weight"].data_ptr() == dense["model.embed_tokens.weight"].data_ptr()
    assert dict(compressed.tied) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" in compressed and "lm_head.weight" not in compressed.encodings
    row = compressed.report["lm_head.weight"]
    assert row.method == "tied to model.embed_tokens.weight" and row.numbers == row.bytes == 0
    numbers = sum(t.numel() for n, t in state.items() if n != "lm_head.weight")
    assert compressed.report.totals["model"].numbers == numbers

    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    again = foldprune.compress(arrays, recipe=Recipe(fpp=0.5)).state_dict()
    assert again["lm_head.weight"] is again["model.embed_tokens.weight"]


def test_views_of_one_storage_that_differ_are_not_tied():
    storage = torch.randn(60, 64, generator=torch.Generator().manual_seed(0))
    state = as_torch(reference.llama_state())
    state["model.embed_tokens.weight"] = storage[:40]
    state["lm_head.weight"] = storage[20:]
    compressed = foldprune.compress(state, recipe=Recipe(fpp=0.5))
    assert not compressed.tied
    dense = compressed.state_dict()
    assert dense["model.embed_tokens.weight"].shape == dense["lm_head.weight"].shape == (40, 64)


def test_buffers_and_odd_dtypes_pass_through():
    state = as_torch(reference.bert_state())
    state["embeddings.position_ids"] = torch.arange(32)[None]
    state["embeddings.token_type_ids"] = torch.zeros(1, 32, dtype=torch.uint8)
    state["pooler.dense.bias"] = torch.arange(6).bool()
    state["classifier.scale"] = torch.tensor(2.5)
    state["classifier.empty"] = torch.zeros(0, 3)
    state["classifier.small"] = torch.randn(4, 4).to(torch.float8_e4m3fn)
    compressed = foldprune.compress(state, 0.4, num_heads=4)
    dense = compressed.state_dict()
    for name in list(state)[-6:]:
        assert dense[name].dtype == state[name].dtype and dense[name].shape == state[name].shape
        assert torch_bits(dense[name]) == torch_bits(state[name]), name
        assert compressed.report[name].method == "dense"
    for name in ("embeddings.position_ids", "pooler.dense.bias"):
        assert compressed.report[name].numbers == 0  # no weights, so no part of the rate


def test_modules_and_models(make_model):
    model = make_model("bert")
    a = foldprune.compress(model, 0.3)
    b = foldprune.compress(model.state_dict(), 0.3, config=model.config)
    assert list(a) == list(model.state_dict())
    for name in a:
        assert reference.same_bytes(a[name], b[name])
    plain = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.ReLU(), torch.nn.Linear(20, 5))
    with pytest.warns(foldprune.UnmatchedTensorWarning):
        c = foldprune.compress(plain, recipe=Recipe(fpp=0.5))
    plain.load_state_dict(c.state_dict(), strict=True)
    assert sum(int((p == 0).sum()) for p in plain.parameters()) == 350


def test_every_kind_of_path(tmp_path, make_model):
    model = make_model("bert")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    want = foldprune.compress(state, 0.4, config=model.config)
    arrays = {name: tensor.numpy() for name, tensor in state.items()}

    file = tmp_path / "plain" / "weights.safetensors"
    file.parent.mkdir()
    save_file(arrays, file)
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    names = list(arrays)
    weight_map = {}
    for i in range(3):
        save_file({n: arrays[n] for n in names[i::3]}, sharded / f"model-{i}.safetensors")
        weight_map |= dict.fromkeys(names[i::3], f"model-{i}.safetensors")
    index = {"metadata": {}, "weight_map": {n: weight_map[n] for n in names}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    (sharded / "config.json").write_text(json.dumps(model.config.to_dict()))
    torch.save(state, tmp_path / "weights.pt")
    torch.save(state, tmp_path / "pytorch_model.bin")

    heads = {"num_heads": 4}
    for path, extra in [
        (file, heads),
        (str(file), heads),
        (folder, {}),
        (folder / "model.safetensors", {}),
        (sharded, {}),
        (sharded / "model.safetensors.index.json", {}),
        (tmp_path / "weights.pt", heads),
        (tmp_path / "pytorch_model.bin", heads),
    ]:
        got = foldprune.compress(path, 0.4, **extra)
        assert set(got) == set(want), path
        for name in want:
            assert reference.same_bytes(want[name], got[name]), (path, name)
        assert all(isinstance(t, torch.Tensor) for t in got.state_dict().values())
    assert list(foldprune.compress(sharded, 0.4)) == names


def test_pickles_with_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "touched"), "w"))

    torch.save({"a": torch.ones(2), "b": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(foldprune.FormatError, match="weights_only"):
        foldprune.compress(tmp_path / "evil.pt", 0.3)
    assert not (tmp_path / "touched").exists()


# ---- rates --------------------------------------------------------------------------------------

CHECKPOINTS = {
    "bert": lambda: reference.bert_state(d=64, ff=256, vocab=400),
    "llama": lambda: reference.llama_state(ff=256, vocab=400),
    "bert-float16": lambda: reference.bert_state(d=64, ff=256, vocab=400, dtype=np.float16),
    "llama-float64": lambda: reference.llama_state(ff=256, vocab=400, dtype=np.float64),
    "llama-mqa": lambda: reference.llama_state(groups=1, ff=256, vocab=400),
}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9])
def test_rates_are_reached_within_half_a_point(checkpoint, rate):
    state = CHECKPOINTS[checkpoint]()
    compressed = foldprune.compress(state, rate, num_heads=4)
    assert abs(compressed.report.removed - rate) <= 0.005
    # counted in the dense tensors too, where FPP alone worked
    for row in compressed.report.rows:
        if row.method.startswith("FPP"):
            assert int(np.count_nonzero(compressed[row.name])) == row.stored, row.name


def test_rates_on_real_weights(minilm_folder):
    for rate in (0.05, 0.3, 0.6, 0.9):
        compressed = foldprune.compress(minilm_folder, rate)
        assert abs(compressed.report.removed - rate) <= 0.005


def test_a_higher_rate_never_costs_less():
    state = CHECKPOINTS["bert"]()
    error = []
    for rate in (0.0, 0.1, 0.2, 0.4, 0.6, 0.8):
        compressed = foldprune.compress(state, rate, num_heads=4)
        error.append(sum(row.error or 0.0 for row in compressed.report.rows))
    assert error == sorted(error) and error[0] < 1e-9


@pytest.mark.parametrize("checkpoint", ["bert", "llama"])
def test_above_the_largest_possible_rate_the_error_names_it(checkpoint):
    state = CHECKPOINTS[checkpoint]()
    with pytest.raises(foldprune.RateError) as error:
        foldprune.compress(state, 0.9999, num_heads=4)
    largest = float(str(error.value).split("largest possible is ")[1].split()[0].rstrip(";,"))
    assert 0.9 < largest < 0.9999 - 0.005
    below = np.floor((largest - 0.002) * 1000) / 1000
    reached = foldprune.compress(state, below, num_heads=4).report.removed
    assert abs(reached - below) <= 0.005


@pytest.mark.parametrize("checkpoint", ["bert", "llama"])
def test_rate_zero_is_lossless(checkpoint):
    state = CHECKPOINTS[checkpoint]()
    compressed = foldprune.compress(state, 0, num_heads=4)
    recipe = foldprune.compress(state, recipe=Recipe.lossless(), num_heads=4)
    assert compressed.report.removed == recipe.report.removed > 0
    for name in state:
        assert reference.same_bytes(compressed[name], recipe[name])
    assert compressed.report.totals["feed_forward"].removed == 0
    verification = foldprune.verify(state, compressed)
    assert verification.lossless and verification and not verification.failures


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_rates_outside_their_range(rate):
    with pytest.raises(ValueError, match="rate"):
        foldprune.compress(reference.bert_state(), rate, num_heads=4)


@pytest.mark.parametrize("rate", ["0.3", None, True, [0.3]])
def test_rates_of_the_wrong_type(rate):
    with pytest.raises(TypeError, match="rate"):
        foldprune.compress(reference.bert_state(), rate, num_heads=4)


# ---- determinism --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    [None, Recipe.paper(), Recipe.lossless(), Recipe(fpp=0.5, fpp_granularity="4x1", dwc=2, irc=3)],
    ids=["rate", "paper", "lossless", "blocks"],
)
def test_the_same_bytes_for_any_number_of_threads(recipe, minilm_state):
    names = [n for n in minilm_state if "layer." not in n or "layer.0." in n or "layer.1." in n]
    state = {name: minilm_state[name] for name in names}
    results = [
        foldprune.compress(state, recipe=recipe, num_heads=12, threads=threads)
        for threads in (1, 2, 3, None)
    ]
    for other in results[1:]:
        assert other.report.to_dict() == results[0].report.to_dict()
        assert list(other.encodings) == list(results[0].encodings)
        for name, encoding in results[0].encodings.items():
            ours, theirs = encoding.parts(), other.encodings[name].parts()
            assert list(ours) == list(theirs)
            assert all(reference.same_bytes(ours[p], theirs[p]) for p in ours), name


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_out_of_range(threads):
    with pytest.raises(ValueError, match="threads"):
        foldprune.compress(reference.bert_state(), recipe=Recipe(fpp=0.5), threads=threads)
    with pytest.raises(TypeError, match="threads"):
        foldprune.compress(reference.bert_state(), recipe=Recipe(fpp=0.5), threads=2.0)


# ---- report and verification --------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [None, Recipe.paper(), Recipe.lossless(), Recipe(fpp=0.7)])
def test_the_report_adds_up(recipe):
    state = reference.bert_state(d=64)
    state["lm_head.decoder.weight"] = state["embeddings.word_embeddings.weight"]
    state["embeddings.position_ids"] = np.arange(32)[None]
    compressed = foldprune.compress(state, 0.3, recipe=recipe, num_heads=4)
    report = compressed.report
    assert [row.name for row in report.rows] == list(state)
    for row in report.rows:
        assert row.shape == state[row.name].shape and row.dtype == state[row.name].dtype.name
        assert 0 <= row.stored <= row.numbers and 0 <= row.stored_bytes <= row.bytes
        if row.name in compressed.tied:
            continue
        encoding = compressed.encodings[row.name]
        assert row.stored_bytes == sum(part.nbytes for part in encoding.parts().values())
        assert row.bytes == state[row.name].nbytes
    totals = report.totals
    for field in ("numbers", "stored", "bytes", "stored_bytes"):
        by_group = {
            group: sum(getattr(row, field) for row in report.rows if row.group == group)
            for group in ("qkv", "attention_output", "feed_forward", "embedding", "other")
        }
        assert getattr(totals["qkv"], field) == by_group["qkv"]
        both = by_group["qkv"] + by_group["attention_output"]
        assert getattr(totals["qkv with output"], field) == both
        assert getattr(totals["feed_forward"], field) == by_group["feed_forward"]
        assert getattr(totals["embedding"], field) == by_group["embedding"]
        assert getattr(totals["model"], field) == sum(by_group.values())
    floats = [a for n, a in state.items() if a.dtype == np.float32 and n not in compressed.tied]
    assert totals["model"].numbers == sum(array.size for array in floats)
    assert (
        report.removed
        == totals["model"].removed
        == 1 - totals["model"].stored / totals["model"].numbers
    )


def test_the_report_can_be_read():
    state = reference.bert_state()
    state["classifier.<b>.weight"] = np.ones((2, 2), np.float32)
    report = foldprune.compress(state, 0.3, num_heads=4).report
    text = str(report)
    for word in ("qkv", "qkv with output", "feed forward", "embedding", "model", "4 heads of 12"):
        assert word in text
    assert "num_heads" in text  # where the heads came from
    table = report.table()
    assert all(name in table for name in state)
    page = report._repr_html_()
    assert "<table" in page and "classifier.&lt;b&gt;.weight" in page and "<b>" not in page
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["totals"]["model"]["removed"] == report.removed
    assert [row["name"] for row in values["tensors"]] == list(state)
    assert foldprune.Report.from_dict(values).to_dict() == report.to_dict()
    with pytest.raises(KeyError):
        report["no such tensor"]


def test_compressed_is_a_mapping():
    state = reference.bert_state()
    compressed = foldprune.compress(state, 0.3, num_heads=4)
    assert dict(compressed).keys() == state.keys()
    assert "embeddings.word_embeddings.weight" in compressed and "nothing" not in compressed
    with pytest.raises(KeyError):
        compressed["nothing"]
    assert f"{compressed.report.removed:.1%}" in repr(compressed)
    assert "<table" in compressed._repr_html_()
    with pytest.raises(ValueError, match="jax"):
        compressed.state_dict("jax")


def test_verify_measures_what_was_lost():
    state = reference.bert_state()
    compressed = foldprune.compress(state, recipe=Recipe(fpp=0.5, irc=2, dwc="pivot"), num_heads=4)
    verification = foldprune.verify(state, compressed)
    assert len(verification.blocks) == 2 and len(verification.tensors) == len(state)
    for block in verification.blocks:
        assert block.logit_error > 0.01 and block.output_error > 0.01
    by_name = {check.name: check for check in verification.tensors}
    name = "encoder.layer.0.output.dense.weight"
    want = np.linalg.norm((state[name] - compressed[name]).astype(np.float64))
    want /= np.linalg.norm(state[name].astype(np.float64))
    assert by_name[name].error == pytest.approx(want, rel=1e-9)
    assert by_name[name].lossless is None  # nothing was promised
    assert by_name["embeddings.LayerNorm.weight"].lossless is True
    assert "logits off" in str(verification)
    assert json.loads(json.dumps(verification.to_dict()))["lossless"] is True
    assert "<pre>" in verification._repr_html_()


def test_verify_finds_a_broken_promise():
    state = reference.bert_state()
    compressed = foldprune.compress(state, recipe=Recipe.lossless(), num_heads=4)
    assert foldprune.verify(state, compressed)
    for name in (
        "encoder.layer.1.attention.self.query.weight",  # in the logits
        "encoder.layer.0.attention.self.value.weight",  # in the outputs
        "encoder.layer.0.attention.output.dense.bias",
        "embeddings.LayerNorm.bias",  # dense
    ):
        other = {n: a.copy() for n, a in state.items()}
        other[name].flat[3] += 0.01
        verification = foldprune.verify(other, compressed)
        assert not verification and verification.failures, name
        assert any(name.rsplit(".", 3)[0] in check.name for check in verification.failures)
        assert "NOT lossless" in str(verification)


def test_verify_wants_the_same_model():
    state = reference.bert_state()
    compressed = foldprune.compress(state, recipe=Recipe(fpp=0.5))
    for other in (
        {n: a for n, a in state.items() if "pooler" in n or "layer.0" in n},
        {**state, "more": np.ones(3, np.float32)},
        {**state, "embeddings.LayerNorm.bias": np.ones(3, np.float32)},
    ):
        with pytest.raises(ValueError):
            foldprune.verify(other, compressed)


def test_progress_is_told():
    state = reference.bert_state()
    for recipe in (None, Recipe.paper(), Recipe(fpp=0.5)):
        calls: list[tuple[int, int, str]] = []
        foldprune.compress(
            state,
            recipe=recipe,
            num_heads=4,
            progress=lambda *call, calls=calls: calls.append(call),
        )
        done = [call[0] for call in calls]
        assert done == sorted(done) and calls[-1][0] == calls[-1][1] > 0
        assert len({call[1] for call in calls}) == 1
        assert {call[2] for call in calls} & {"encoder.layer.0.output.dense.weight"}


def test_progress_bar_goes_to_standard_error(capsys):
    foldprune.compress(reference.bert_state(), recipe=Recipe(fpp=0.5), progress=True)
    assert capsys.readouterr().out == ""


def test_an_error_in_progress_comes_through():
    def fail(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        foldprune.compress(reference.bert_state(), recipe=Recipe(fpp=0.5), progress=fail)


# ---- real weights -------------------------------------------------------------------------------


def relative(after: Any, before: Any) -> float:
    return float((after - before).norm() / before.norm())


def test_minilm_lossless(minilm_folder):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(minilm_folder, dtype=torch.float32).eval()
    ids = torch.randint(1000, 20000, (4, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(ids).last_hidden_state
    compressed = foldprune.compress(model, 0)
    assert foldprune.verify(model, compressed).lossless
    d, heads = 384, 12
    removed = 2 * d * d // heads + 2 * d  # per block: two identities per head, two biases
    total = compressed.report.totals["qkv"]
    assert total.numbers - total.stored == 6 * removed
    model.load_state_dict(compressed.state_dict(), strict=True)
    with torch.no_grad():
        after = model(ids).last_hidden_state
    assert relative(after, before) <= 1e-4


def test_minilm_paper(minilm_folder):
    compressed = foldprune.compress(minilm_folder, recipe=Recipe.paper())
    report = compressed.report
    assert report.totals["qkv"].removed >= 0.978
    assert report.totals["feed_forward"].removed == pytest.approx(0.7, abs=0.005)
    assert report.totals["embedding"].removed == pytest.approx(0.7, abs=1e-4)
    assert report.heads["heads"] == 12 and report.heads["head_dim"] == 32


def test_bert_base_shape_paper():
    """98.9 % of QKV at d = 768, h = 12, whatever the weights."""
    state = reference.bert_state(layers=1, d=768, ff=3072, vocab=100)
    report = foldprune.compress(state, recipe=Recipe.paper()).report
    assert report.heads["heads"] == 12
    assert report.totals["qkv"].removed >= 0.989
    assert report.totals["qkv with output"].removed >= 0.741


def test_smollm2_lossless(smollm2_folder):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    folder, file = smollm2_folder
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32
    ).eval()
    ids = torch.randint(100, 40000, (1, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(ids).logits
    compressed = foldprune.compress(model, 0)
    assert compressed.report.heads["key_heads"] == 3 and compressed.report.heads["head_dim"] == 64
    total = compressed.report.totals["qkv"]
    assert total.numbers - total.stored >= 30 * 3 * 64 * 64  # the value's identities
    model.load_state_dict(compressed.state_dict(), strict=True)
    with torch.no_grad():
        after = model(ids).logits
    assert relative(after, before) <= 1e-4


def test_without_torch(tmp_path):
    """A process that never imports torch compresses, saves and loads NumPy arrays."""
    save_file(reference.bert_state(), tmp_path / "dense.safetensors")
    code = """
import sys, foldprune
compressed = foldprune.compress(sys.argv[1], 0.4, num_heads=4)
compressed.save(sys.argv[2])
state = foldprune.load(sys.argv[2]).state_dict()
assert "torch" not in sys.modules
print(type(next(iter(state.values()))).__module__, len(state))
"""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            tmp_path / "dense.safetensors",
            tmp_path / "small.safetensors",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["numpy", str(len(reference.bert_state()))]
