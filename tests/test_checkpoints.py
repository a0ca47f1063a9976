"""Checkpoints that are streamed: what compress would give, whoever runs it and however often."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from safetensors.numpy import save_file

import foldprune
from foldprune import Recipe, checkpoints, files, units
from foldprune.prune import Cut
from foldprune.schemas.layout import find_layout

HEADS = {"num_attention_heads": 4}
# nothing competes with another layer: exactly what compress gives
APART = {
    "lossless": {"rate": 0.0},
    "tensor": {"recipe": Recipe(fpp=0.6, fpp_scope="tensor", irc=3, dwc=2)},
    "rows": {"recipe": Recipe(fpp=0.5, fpp_scope="row")},
    "pruned folds": {"recipe": Recipe(irc=3, irc_fpp=0.5)},
    "2:4": {"recipe": Recipe(fpp=0.5, fpp_granularity="2:4", dwc="pivot")},
    "nothing": {"recipe": Recipe()},
}
# all layers share a threshold
TOGETHER = {
    "rate": {"rate": 0.4},
    "low rate": {"rate": 0.05},
    "weights": {"recipe": Recipe(fpp=0.6, irc=3, dwc=2)},
    "blocks": {"recipe": Recipe(fpp=0.5, fpp_granularity="2x2")},
    "neurons": {"recipe": Recipe(fpp=0.5, fpp_granularity="neuron")},
}


def write(folder: Path, state: dict[str, np.ndarray], shards: int = 3) -> Path:
    """A model folder: shards with an index, a configuration and a tokenizer."""
    folder.mkdir()
    names = list(state)
    weight_map = {}
    for i in range(shards):
        own = names[i::shards]
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({name: state[name] for name in own}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    index = {"metadata": {}, "weight_map": {name: weight_map[name] for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(HEADS))
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "vocab.txt").write_text("a b c")
    return folder


def llama(layers: int = 3, dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    state = reference.llama_state(layers=layers, seed=seed)
    return {name: array.astype(dtype) for name, array in state.items()}


STATES = {
    "bert": lambda: reference.bert_state(layers=3),
    "llama": llama,
    "bfloat16": lambda: llama(dtype=ml_dtypes.bfloat16),
}


@pytest.fixture
def source(tmp_path) -> Path:
    return write(tmp_path / "source", llama())


def contents(folder: Path) -> dict[str, str]:
    """Every file's checksum."""
    paths = sorted(folder.iterdir())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def parts(compressed: foldprune.Compressed) -> dict[str, bytes]:
    return {
        f"{name}::{part}": array.tobytes()
        for name, encoding in compressed.encodings.items()
        for part, array in encoding.parts().items()
    }


pytestmark = pytest.mark.filterwarnings("ignore::foldprune.FoldRefusedWarning")


# ---- what it writes -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", APART)
@pytest.mark.parametrize("family", STATES)
def test_gives_what_compress_gives(family, how, tmp_path):
    source = write(tmp_path / "source", STATES[family]())
    report = foldprune.compress_checkpoint(source, tmp_path / "out", **APART[how])
    want, got = foldprune.compress(source, **APART[how]), foldprune.load(tmp_path / "out")
    assert parts(got) == parts(want)
    assert list(got) == list(want)
    assert got.recipe == want.recipe
    assert got.report.to_dict() == report.to_dict()
    assert got.report.rows == want.report.rows
    assert got.report.heads == want.report.heads and got.report.schema == want.report.schema
    assert sorted(got.report.notes) == sorted(want.report.notes)


@pytest.mark.parametrize("how", TOGETHER)
@pytest.mark.parametrize("family", STATES)
def test_a_shared_threshold_removes_as_much_as_the_exact_one(family, how, tmp_path):
    source = write(tmp_path / "source", STATES[family]())
    foldprune.compress_checkpoint(source, tmp_path / "out", **TOGETHER[how])
    want, got = foldprune.compress(source, **TOGETHER[how]), foldprune.load(tmp_path / "out")
    assert abs(got.report.removed - want.report.removed) < 0.0005
    for row, exact in zip(got.report.rows, want.report.rows, strict=True):
        assert abs(row.removed - exact.removed) < 0.01, row.name
    assert parts(got).keys() == parts(want).keys()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_scores_on_the_wrong_side_of_the_threshold_are_near_it(dtype, tmp_path):
    state = llama(dtype=dtype)
    recipe = Recipe(fpp=0.5)
    foldprune.compress_checkpoint(
        write(tmp_path / "source", state), tmp_path / "out", recipe=recipe
    )
    got = foldprune.load(tmp_path / "out")
    exact = foldprune.compress(state, recipe=recipe, num_heads=4)
    pruned = [name for name in state if "FPP" in exact.report[name].method]
    kept = [np.abs(state[n].astype(float))[exact[n] != 0] for n in pruned]
    threshold = min(values.min() for values in kept)
    for name in pruned:
        differs = (got[name] != 0) != (exact[name] != 0)
        scores = np.abs(state[name].astype(float))[differs]
        assert np.all(np.abs(scores / threshold - 1) <= 1 / 64), name


@pytest.mark.parametrize("values", ["equal", "two", "zeros"])
def test_a_rate_is_reached_where_scores_are_equal(values, tmp_path):
    state = llama()
    for array in state.values():
        array[...] = {
            "equal": lambda a: np.full_like(a, 0.5),
            "two": lambda a: np.where(a > 0, 0.5, 0.25),
            "zeros": np.zeros_like,
        }[values](array)
    source = write(tmp_path / "source", state)
    report = foldprune.compress_checkpoint(source, tmp_path / "out", recipe=Recipe(fpp=0.4))
    exact = foldprune.compress(state, recipe=Recipe(fpp=0.4), num_heads=4).report
    assert abs(report.removed - exact.removed) < 0.0005


def test_the_cut_of_a_histogram():
    counts = np.array([3, 0, 10, 7])
    for count in range(21):
        cut = Cut.removing(count, counts)
        assert cut.count(counts) == count
        halves = [np.array([1, 0, 6, 2]), np.array([2, 0, 4, 5])]
        assert abs(sum(cut.count(half) for half in halves) - count) <= 1


@pytest.mark.parametrize("form", ["file", "single", "bin", "bin shards", "index"])
def test_every_kind_of_source(form, tmp_path):
    state = llama()
    source = write(tmp_path / "source", state)
    path = source
    if form != "index":
        for file in source.glob("model*"):
            file.unlink()
    if form in ("file", "single"):
        save_file(state, source / "model.safetensors")
        path = source / "model.safetensors" if form == "file" else source
    elif form == "index":
        path = source / "model.safetensors.index.json"
    else:
        torch = pytest.importorskip("torch")
        tensors = {name: torch.from_numpy(array) for name, array in state.items()}
        if form == "bin":
            torch.save(tensors, source / "pytorch_model.bin")
        else:
            names = [list(tensors)[:9], list(tensors)[9:]]
            files = ["pytorch_model-1.bin", "pytorch_model-2.bin"]
            for file, own in zip(files, names, strict=True):
                torch.save({name: tensors[name] for name in own}, source / file)
            weight_map = {n: f for f, own in zip(files, names, strict=True) for n in own}
            index = source / "pytorch_model.bin.index.json"
            index.write_text(json.dumps({"weight_map": weight_map}))
    foldprune.compress_checkpoint(path, tmp_path / "out", **APART["tensor"])
    want = foldprune.compress(state, num_heads=4, **APART["tensor"])
    assert parts(foldprune.load(tmp_path / "out")) == parts(want)


def test_side_files_are_copied_and_nothing_else_is_left(source, tmp_path):
    (source / "model.onnx").write_bytes(b"large")
    foldprune.compress_checkpoint(source, tmp_path / "out")
    out = tmp_path / "out"
    for name in ("config.json", "tokenizer.json", "vocab.txt"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    others = {path.name for path in out.iterdir() if not path.name.startswith("foldprune-")}
    index = "foldprune.safetensors.index.json"
    assert others == {"config.json", "tokenizer.json", "vocab.txt", index}


def test_it_replaces_what_was_compressed_there(source, tmp_path):
    out = tmp_path / "out"
    foldprune.compress_checkpoint(source, out, 0.5)
    foldprune.compress_checkpoint(source, out, recipe=Recipe(fpp=0.1))
    fresh = tmp_path / "fresh"
    foldprune.compress_checkpoint(source, fresh, recipe=Recipe(fpp=0.1))
    assert contents(out) == contents(fresh)


def test_tied_tensors_stay_tied(tmp_path):
    torch = pytest.importorskip("torch")
    source = tmp_path / "source"
    source.mkdir()
    tensors = {name: torch.from_numpy(array) for name, array in llama().items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, source / "pytorch_model.bin")
    foldprune.compress_checkpoint(source, tmp_path / "out", num_heads=4)
    loaded = foldprune.load(tmp_path / "out")
    assert loaded.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert loaded.framework == "torch"
    want = foldprune.compress(source, num_heads=4)
    assert list(loaded) == list(want) and loaded.report.removed == pytest.approx(
        want.report.removed, abs=5e-4
    )


def test_bad_arguments_and_places(source, tmp_path):
    with pytest.raises(ValueError, match="source"):
        foldprune.compress_checkpoint(source, source)
    with pytest.raises(FileNotFoundError):
        foldprune.compress_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        foldprune.compress_checkpoint(source, tmp_path / "file")
    with pytest.raises(foldprune.RateError, match="largest possible"):
        foldprune.compress_checkpoint(source, tmp_path / "out", 0.999)
    with pytest.raises(ValueError, match="matches no tensor"):
        foldprune.compress_checkpoint(
            source, tmp_path / "out", recipe=Recipe(fpp=0.5, overrides={"nothing": {"fpp": 0.1}})
        )


@pytest.mark.parametrize("recipe", [None, Recipe(fpp=0.5, fpp_scope="tensor")])
def test_a_bad_tensor_is_named(recipe, tmp_path):
    state = llama()
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    source = write(tmp_path / "source", state)
    with pytest.raises(foldprune.TensorError, match=r"layers\.1\.mlp\.up_proj"):
        foldprune.compress_checkpoint(source, tmp_path / "out", 0.5, recipe=recipe)
    with ThreadPoolExecutor(2) as pool, pytest.raises(foldprune.TensorError, match="up_proj"):
        foldprune.compress_checkpoint(source, tmp_path / "b", 0.5, recipe=recipe, executor=pool)


def test_progress_is_told(source, tmp_path):
    calls: list[tuple[int, int, str]] = []
    foldprune.compress_checkpoint(source, tmp_path / "out", progress=lambda *a: calls.append(a))
    assert [done for done, _, _ in calls] == list(range(1, len(calls) + 1))
    assert calls[-1][0] == calls[-1][1]


# ---- units --------------------------------------------------------------------------------------


def test_units_are_blocks_layers_and_the_rest():
    state = llama(layers=2)
    layout = find_layout(state, foldprune.schemas.known(), None, 4)
    found = units.partition(
        layout, dict.fromkeys(state, "file"), {n: a.nbytes for n, a in state.items()}
    )
    assert sorted(name for unit in found for name in unit.names) == sorted(state)
    kinds = [(len(u.layout.attentions), len(u.layout.feed_forwards), len(u.names)) for u in found]
    assert kinds.count((1, 0, 4)) == 2 and kinds.count((0, 1, 3)) == 2 and len(kinds) == 5
    attention = next(unit for unit in found if unit.layout.attentions)
    assert set(attention.files) - set(attention.names) == {"model.layers.0.input_layernorm.weight"}


def test_large_tensors_of_no_block_are_units_of_their_own(monkeypatch):
    monkeypatch.setattr(units, "_SMALL", 100)
    state = {f"{i}.weight": np.zeros(size, np.uint8) for i, size in enumerate([40, 50, 30, 500, 1])}
    layout = foldprune.schemas.layout.generic_layout(state)
    found = units.partition(
        layout, dict.fromkeys(state, "file"), {n: a.nbytes for n, a in state.items()}
    )
    assert [len(unit.names) for unit in found] == [2, 1, 1, 1]


# ---- who runs it --------------------------------------------------------------------------------


class Late(Executor):
    """Runs tasks in another order than they came in, one at a time."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(3)
        self.delay = random.Random(1)

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        wait = self.delay.uniform(0, 0.03)
        return self.pool.submit(lambda: (time.sleep(wait), fn(*args, **kwargs))[1])


@pytest.mark.parametrize("how", [TOGETHER["rate"], TOGETHER["weights"], APART["tensor"]])
def test_a_process_pool_writes_the_same_bytes(how, source, tmp_path):
    foldprune.compress_checkpoint(source, tmp_path / "serial", **how)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        foldprune.compress_checkpoint(source, tmp_path / "pool", executor=pool, **how)
        foldprune.decompress_checkpoint(tmp_path / "pool", tmp_path / "d", executor=pool)
    foldprune.compress_checkpoint(source, tmp_path / "late", executor=Late(), threads=2, **how)
    foldprune.decompress_checkpoint(tmp_path / "serial", tmp_path / "e")
    assert contents(tmp_path / "pool") == contents(tmp_path / "serial")
    assert contents(tmp_path / "late") == contents(tmp_path / "serial")
    assert contents(tmp_path / "d") == contents(tmp_path / "e")


def test_a_dask_cluster_writes_the_same_bytes(source, tmp_path):
    distributed = pytest.importorskip("distributed")
    foldprune.compress_checkpoint(source, tmp_path / "serial", 0.4)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        foldprune.compress_checkpoint(
            source, tmp_path / "dask", 0.4, executor=client.get_executor()
        )
    assert contents(tmp_path / "dask") == contents(tmp_path / "serial")


# ---- killed, and resumed ------------------------------------------------------------------------

# shells start what runs in the background with SIGINT ignored, and processes inherit that
RUN = """
import signal, sys, warnings
import foldprune
signal.signal(signal.SIGINT, signal.default_int_handler)
warnings.simplefilter("ignore")
print("begin", flush=True)
foldprune.compress_checkpoint(sys.argv[1], sys.argv[2], 0.4)
"""


def run(source: Path, out: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", RUN, source, out], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "begin\n"
    return child


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_at_any_moment_and_resumed(kind, tmp_path):
    state = reference.llama_state(layers=6, d=128, heads=4, groups=4, ff=384, vocab=500)
    source, out, serial = write(tmp_path / "source", state), tmp_path / "out", tmp_path / "serial"
    child, began = run(source, serial), time.perf_counter()
    assert child.wait() == 0
    duration = time.perf_counter() - began
    interrupted = 0
    for moment in np.linspace(0, 0.9, 8 if kind == signal.SIGKILL else 3):
        child = run(source, out)
        time.sleep(moment * duration)  # the first at once, so that one at least is in time
        shards = {p.name: p.stat().st_ino for p in out.glob("foldprune-*.safetensors")}
        child.send_signal(kind)
        interrupted += child.wait() != 0
        # what was finished stays as it was, whatever the run did after
        after = {p.name: p.stat().st_ino for p in out.glob("foldprune-*.safetensors")}
        assert shards.items() <= after.items()
        if (out / "foldprune.safetensors.index.json").exists():
            foldprune.load(out)
        elif out.exists():
            with pytest.raises(FileNotFoundError):
                foldprune.load(out)
    assert interrupted
    assert run(source, out).wait() == 0
    assert contents(out) == contents(serial)


def interrupt(source: Path, out: Path, after: int, **how: Any) -> None:
    """A run that ends after so many steps."""

    def stop(done: int, total: int, name: str) -> None:
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        foldprune.compress_checkpoint(source, out, progress=stop, **how)


def test_finished_shards_are_not_done_again(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupt(source, out, 4, **APART["tensor"])
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("foldprune-*.safetensors")}
    assert len(before) == 4
    calls = []
    real = units.compress_unit
    monkeypatch.setattr(units, "compress_unit", lambda *a: calls.append(a) or real(*a))
    foldprune.compress_checkpoint(source, out, **APART["tensor"])
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("foldprune-*.safetensors")}
    assert before.items() <= after.items()
    assert len(calls) == len(after) - 4
    assert not (out / checkpoints.MANIFEST).exists()


def test_what_was_settled_is_not_settled_again(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    foldprune.compress_checkpoint(source, tmp_path / "whole", 0.4)
    interrupt(source, out, 13, rate=0.4)  # 7 surveys, 3 of folds, then shards
    assert list(out.glob("foldprune-*.safetensors"))
    monkeypatch.setattr(units, "survey", None)
    foldprune.compress_checkpoint(source, out, 0.4)
    assert contents(out) == contents(tmp_path / "whole")


def test_other_arguments_do_not_resume(source, tmp_path):
    out = tmp_path / "out"
    interrupt(source, out, 2, **APART["tensor"])
    before = contents(out)
    for how in ({"rate": 0.4}, {"recipe": Recipe(fpp=0.6, irc=3, dwc=2)}):
        with pytest.raises(foldprune.FormatError, match=checkpoints.MANIFEST):
            foldprune.compress_checkpoint(source, out, **how)
    shard = next(source.glob("model-*.safetensors"))
    os.utime(shard, ns=(0, 0))
    with pytest.raises(foldprune.FormatError, match="source"):
        foldprune.compress_checkpoint(source, out, **APART["tensor"])
    assert contents(out) == before
    (out / checkpoints.MANIFEST).unlink()
    foldprune.compress_checkpoint(source, out, rate=0.0)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"asked": 3}', "[" * 100_000])
def test_a_damaged_manifest_is_an_error(text, source, tmp_path):
    out = tmp_path / "out"
    interrupt(source, out, 2, **APART["tensor"])
    (out / checkpoints.MANIFEST).write_text(text)
    with pytest.raises(foldprune.FormatError, match=checkpoints.MANIFEST):
        foldprune.compress_checkpoint(source, out, **APART["tensor"])


# ---- memory -------------------------------------------------------------------------------------

PEAK = """
import sys, warnings
import foldprune
from foldprune import Recipe
warnings.simplefilter("ignore")
def peak():  # ru_maxrss would count the process that this one was forked from
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))

before = peak()
how = {"rate": {"rate": 0.3}, "recipe": {"recipe": Recipe(fpp=0.5, irc=16)}}
if sys.argv[1] == "decompress":
    foldprune.decompress_checkpoint(sys.argv[2], sys.argv[3], threads=1)
else:
    foldprune.compress_checkpoint(sys.argv[2], sys.argv[3], **how[sys.argv[1]], threads=1)
print(peak() - before)
"""


def peak(how: str, source: Path, out: Path) -> int:
    """By how many bytes a process grows."""
    command = [sys.executable, "-c", PEAK, how, source, out]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """Of 20 blocks more, what is kept of every unit (the histogram of its scores) is a small
    part."""
    sizes, grown = [], []
    for layers in (4, 24):
        state = reference.llama_state(layers=layers, d=512, heads=8, groups=8, ff=1536, vocab=2000)
        source = write(tmp_path / f"{layers}", state, shards=6)
        sizes.append(sum(array.nbytes for array in state.values()))
        del state
        recipe, rate = tmp_path / f"recipe{layers}", tmp_path / f"rate{layers}"
        grown.append(
            [
                peak("recipe", source, recipe),
                peak("rate", source, rate),
                peak("decompress", recipe, tmp_path / f"dense{layers}"),
            ]
        )
    for small, large in zip(*grown, strict=True):
        assert large - small < 0.12 * (sizes[1] - sizes[0])
        assert large < 0.25 * sizes[1]


# ---- and back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 20_000, 10**9])
@pytest.mark.parametrize("family", STATES)
def test_decompressed_folders_hold_the_dense_state_dict(family, most, tmp_path):
    state = STATES[family]()
    source = write(tmp_path / "source", state)
    foldprune.compress_checkpoint(source, tmp_path / "out", 0.4)
    calls: list[int] = []
    foldprune.decompress_checkpoint(
        tmp_path / "out",
        tmp_path / "dense",
        max_shard_bytes=most,
        progress=lambda done, total, name: calls.append(done),
    )
    loaded = foldprune.load(tmp_path / "out")
    dense = files.read(str(tmp_path / "dense"))
    assert set(dense.arrays) == set(loaded)
    for name in loaded:
        assert reference.same_bytes(dense.arrays[name], loaded[name])
    shards = list((tmp_path / "dense").glob("*.safetensors"))
    assert len(shards) == len(calls) == (1 if most == 10**9 else len(shards))
    assert (tmp_path / "dense" / "tokenizer.json").exists()
    with pytest.raises(FileExistsError):
        foldprune.decompress_checkpoint(tmp_path / "out", tmp_path / "dense")


@pytest.mark.parametrize("name", ["llama-gqa", "llama-tied", "bert", "gpt2"])
def test_from_pretrained_opens_it(name, make_model, token_ids, tmp_path):
    torch = pytest.importorskip("torch")
    model = make_model(name)
    model.save_pretrained(tmp_path / "source", max_shard_size="40KB")
    foldprune.compress_checkpoint(tmp_path / "source", tmp_path / "out", rate=0.0)
    foldprune.decompress_checkpoint(tmp_path / "out", tmp_path / "dense", max_shard_bytes=50_000)
    opened = type(model).from_pretrained(tmp_path / "dense").eval()
    with torch.no_grad():
        want, got = model(token_ids).logits, opened(token_ids).logits
    assert float((got - want).norm() / want.norm()) < 1e-5


def test_damage_is_found_when_decompressing(source, tmp_path):
    foldprune.compress_checkpoint(source, tmp_path / "out", 0.4)
    shard = max((tmp_path / "out").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(foldprune.FormatError, match="damaged"):
        foldprune.decompress_checkpoint(tmp_path / "out", tmp_path / "dense")
    assert not list((tmp_path / "dense").glob("*.tmp"))
    assert not (tmp_path / "dense" / "model.safetensors.index.json").exists()


def test_smollm2_from_shards(smollm2_folder, tmp_path):
    """Real weights: within half a point of the asked rate, as the exact selection is."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder, file = smollm2_folder
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.bfloat16
    )
    plain = transformers.LlamaForCausalLM(model.config).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    del plain.config.quantization_config
    plain.save_pretrained(tmp_path / "source", max_shard_size="60MB")
    report = foldprune.compress_checkpoint(tmp_path / "source", tmp_path / "out", 0.5)
    assert abs(report.removed - 0.5) < 0.005
    recipe = Recipe(fpp=0.5)
    report = foldprune.compress_checkpoint(tmp_path / "source", tmp_path / "out", recipe=recipe)
    exact = foldprune.compress(tmp_path / "source", recipe=recipe).report
    assert abs(report.removed - exact.removed) < 0.0005
    for row, other in zip(report.rows, exact.rows, strict=True):
        assert abs(row.removed - other.removed) < 0.005, row.name
