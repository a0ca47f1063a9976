"""The file format: bit exact, small, safe against kills, and never a pickle."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from checkpoint_samples import STATES, sample, sha256
from safetensors import safe_open

import foldprune
from foldprune import Recipe
from foldprune import container as container_module

# ---- bit exact ----------------------------------------------------------------------------------

RECIPES = {
    "rate": None,
    "lossless": Recipe.lossless(),
    "weights": Recipe(fpp=0.7, fpp_on=("embedding", "feed_forward", "attention_output", "qkv")),
    "2:4": Recipe(fpp=0.5, fpp_granularity="2:4"),
    "blocks": Recipe(fpp=0.5, fpp_granularity="3x5", irc=1),
    "neurons": Recipe(fpp=0.5, fpp_granularity="neuron", dwc="pivot"),
    "rows": Recipe(fpp=0.5, fpp_granularity="row"),
    "folds": Recipe(irc=3, dwc=2, fpp=0.01),
    "pruned folds": Recipe(irc=3, irc_fpp=0.4),
    "overrides": Recipe(irc=3, overrides={"*.0.*": {"irc": None, "fpp": 0.5}}),
    "nothing": Recipe(),
}


@pytest.mark.parametrize("shards", [None, 1, 9000, 1 << 30])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", STATES)
def test_round_trip(family, recipe, shards, tmp_path):
    compressed = foldprune.compress(STATES[family](), recipe=RECIPES[recipe], num_heads=4)
    path = tmp_path / "small.safetensors"
    compressed.save(path, max_shard_bytes=shards)
    loaded = foldprune.load(path)
    assert list(loaded) == list(compressed)
    assert sha256(loaded.state_dict()) == sha256(compressed.state_dict())
    assert loaded.report.to_dict() == compressed.report.to_dict()
    assert str(loaded.report) == str(compressed.report)
    assert loaded.recipe == compressed.recipe
    assert loaded.framework == compressed.framework
    for name, encoding in compressed.encodings.items():  # packed in memory, as it was
        own, other = encoding.parts(), loaded.encodings[name].parts()
        assert loaded.encodings[name].kind == encoding.kind and list(own) == list(other)
        assert all(reference.same_bytes(own[part], other[part]) for part in own)
    if shards == 9000:
        files = sorted(file.name for file in path.iterdir())
        assert len(files) > 3
        index = next(file for file in path.iterdir() if file.name.endswith(".index.json"))
        assert sha256(foldprune.load(index).state_dict()) == sha256(loaded.state_dict())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("recipe", ["rate", "weights", "folds", "lossless"])
def test_round_trip_of_torch_dtypes(dtype, recipe, tmp_path, make_model):
    torch = pytest.importorskip("torch")
    model = make_model("gpt2").to(getattr(torch, dtype))
    compressed = foldprune.compress(model, recipe=RECIPES[recipe])
    compressed.save(tmp_path / "small.safetensors")
    loaded = foldprune.load(tmp_path / "small.safetensors")
    state = loaded.state_dict()
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    assert sha256(state) == sha256(compressed.state_dict())
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()
    model.load_state_dict(state, strict=True)


def test_round_trip_of_everything_else(tmp_path):
    import ml_dtypes

    state = reference.bert_state()
    state["classifier.int64"] = np.arange(-3, 3)
    state["classifier.uint8"] = np.arange(7, dtype=np.uint8)
    state["classifier.bool"] = np.array([True, False, True])
    state["classifier.scalar"] = np.array(2.5, np.float32)
    state["classifier.empty"] = np.zeros((0, 3), np.float32)
    state["classifier.float8"] = np.linspace(-2, 2, 9).astype(ml_dtypes.float8_e4m3fn)
    state["classifier.four"] = np.arange(16, dtype=np.float16).reshape(2, 2, 2, 2)
    state['classifier.naïve ☃ \u0000 "quoted"'] = np.ones(2, np.float32)
    compressed = foldprune.compress(state, 0.3, num_heads=4)
    compressed.save(tmp_path / "a")
    loaded = foldprune.load(str(tmp_path / "a"))
    assert list(loaded) == list(state)
    assert sha256(loaded.state_dict()) == sha256(compressed.state_dict())
    for name in list(state)[-8:]:
        assert reference.same_bytes(loaded[name], state[name])


def test_saving_again_gives_the_same_tensors_and_replaces_the_file(tmp_path):
    first, second = sample(0), sample(1)
    path = tmp_path / "a.safetensors"
    first.save(path)
    foldprune.load(path).save(path)
    assert sha256(foldprune.load(path).state_dict()) == sha256(first.state_dict())
    second.save(path)
    assert sha256(foldprune.load(path).state_dict()) == sha256(second.state_dict())
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sample().save("here.safetensors")
    sample().save("shards", max_shard_bytes=5000)
    assert sha256(foldprune.load("here.safetensors").state_dict()) == sha256(
        foldprune.load("shards").state_dict()
    )


def test_shards_replace_the_old_ones_and_nothing_else(tmp_path):
    sample(0).save(tmp_path, max_shard_bytes=4000)
    old = {file.name for file in tmp_path.iterdir()}
    (tmp_path / "model.safetensors").write_bytes(b"someone else's")
    sample(1).save(tmp_path, max_shard_bytes=4000)
    new = {file.name for file in tmp_path.iterdir()}
    assert (tmp_path / "model.safetensors").read_bytes() == b"someone else's"
    assert len(new) == len(old) + 1
    assert sha256(foldprune.load(tmp_path).state_dict()) == sha256(sample(1).state_dict())


def test_tied_tensors_are_stored_once(tmp_path):
    state = reference.llama_state(layers=1, vocab=500)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    tied = foldprune.compress(state, recipe=Recipe(fpp=0.5))
    tied.save(tmp_path / "tied")
    with safe_open(tmp_path / "tied", framework="numpy") as file:
        assert not [key for key in file.keys() if key.startswith("lm_head")]  # noqa: SIM118
    state["lm_head.weight"] = state["lm_head.weight"].copy()
    foldprune.compress(state, recipe=Recipe(fpp=0.5)).save(tmp_path / "apart")
    sizes = [(tmp_path / name).stat().st_size for name in ("tied", "apart")]
    assert sizes[1] - sizes[0] > 0.5 * state["lm_head.weight"].nbytes
    loaded = foldprune.load(tmp_path / "tied")
    assert dict(loaded.tied) == {"lm_head.weight": "model.embed_tokens.weight"}
    dense = loaded.state_dict("numpy")
    assert dense["lm_head.weight"] is dense["model.embed_tokens.weight"]


# ---- sizes --------------------------------------------------------------------------------------


def test_seventy_percent_takes_its_share(minilm_state, tmp_path):
    groups = ("embedding", "feed_forward", "attention_output", "qkv")
    compressed = foldprune.compress(minilm_state, recipe=Recipe(fpp=0.7, fpp_on=groups))
    total = compressed.report.totals["model"]
    assert total.stored_bytes <= (0.3 + 1 / 32 + 0.01) * total.bytes
    compressed.save(tmp_path / "small")
    dense = sum(array.nbytes for array in minilm_state.values())
    assert (tmp_path / "small").stat().st_size <= (0.3 + 1 / 32 + 0.01) * dense


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("family", STATES)
@pytest.mark.parametrize("fpp", [0.01, 0.03, 0.06, 0.5])
@pytest.mark.parametrize("granularity", ["weight", "1x2", "row"])
def test_no_tensor_ever_grows(family, dtype, fpp, granularity):
    state = STATES[family](dtype=dtype)
    for irc, dwc in ((None, None), (4, 2), (7, 11), ("lossless", "lossless")):
        recipe = Recipe(fpp=fpp, fpp_granularity=granularity, irc=irc, dwc=dwc)
        for row in foldprune.compress(state, recipe=recipe, num_heads=4).report.rows:
            # a fold's query and key are one decision
            if "IRC" not in row.method:
                assert row.stored_bytes <= row.bytes, row
        report = foldprune.compress(state, recipe=recipe, num_heads=4).report
        for group in ("qkv", "feed_forward", "embedding", "model"):
            total = report.totals[group]
            assert total.stored_bytes <= total.bytes


# ---- writing ------------------------------------------------------------------------------------


class Broken(Exception):
    pass


@pytest.mark.parametrize("error", [Broken, OSError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("shards", [None, 6000])
def test_a_failing_write_leaves_the_old_file(error, shards, tmp_path, monkeypatch):
    path = tmp_path / "model"
    old, new = sample(0), sample(1)
    old.save(path, max_shard_bytes=shards)
    before = {file.name for file in tmp_path.rglob("*")}
    calls = 0
    real = container_module.save_file

    def half(parts: dict[str, Any], target: str, metadata: Any = None) -> None:
        nonlocal calls
        calls += 1
        if shards is not None and calls < 3:
            real(parts, target, metadata)
            return
        Path(target).write_bytes(b"\x10half of a file")
        raise error("the disk is full")

    monkeypatch.setattr(container_module, "save_file", half)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else (OSError, MemoryError)):
        new.save(path, max_shard_bytes=shards)
    assert calls > 0
    assert sha256(foldprune.load(path).state_dict()) == sha256(old.state_dict())
    if shards is None:
        assert {file.name for file in tmp_path.rglob("*")} == before
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    new.save(path, max_shard_bytes=shards)
    assert sha256(foldprune.load(path).state_dict()) == sha256(new.state_dict())


def test_data_is_on_disk_before_the_name_points_to_it(tmp_path, monkeypatch):
    """fsync of the file, then the rename, then fsync of the folder."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def log_fsync(handle: int) -> None:
        calls.append("fsync " + os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def log_replace(source: str, target: str) -> None:
        calls.append("rename " + os.path.basename(source))
        replace(source, target)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs /proc to name open files")
    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "replace", log_replace)
    sample().save(tmp_path / "a")
    kinds = [call.split()[0] for call in calls]
    assert kinds == ["fsync", "rename", "fsync"]
    assert calls[0].split()[1] == calls[1].split()[1] != "a"
    assert calls[2].split()[1] == tmp_path.name


def test_places_that_cannot_be_written(tmp_path):
    compressed = sample()
    with pytest.raises(OSError):
        compressed.save(tmp_path / "missing" / "a")
    with pytest.raises(OSError, match="folder"):
        compressed.save(tmp_path)
    with pytest.raises(ValueError, match="max_shard_bytes"):
        compressed.save(tmp_path / "b", max_shard_bytes=0)
    assert not list(tmp_path.glob("*"))


KILL = """
import os, random, signal, sys, time
import numpy as np
import foldprune, reference
from foldprune import Recipe

path, shards, rounds = sys.argv[1], int(sys.argv[2]) or None, int(sys.argv[3])

def version(seed):
    state = reference.bert_state(d=64, ff=128, vocab=2000, seed=seed)
    return foldprune.compress(state, recipe=Recipe(fpp=0.5, irc=3, dwc=1), num_heads=4)

def digest(compressed):
    return {name: compressed[name].tobytes() for name in compressed}

versions = [version(0), version(1)]
want = [digest(v) for v in versions]
began = time.perf_counter()
versions[0].save(path, max_shard_bytes=shards)
versions[1].save(path, max_shard_bytes=shards)
duration = (time.perf_counter() - began) / 2
moments = random.Random(3)
seen = [0, 0]
for round in range(rounds):
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(send, b"x")
            at = 0
            while True:
                versions[at].save(path, max_shard_bytes=shards)
                at = 1 - at
        finally:
            os._exit(1)
    os.close(send)
    os.read(receive, 1)
    os.close(receive)
    time.sleep(moments.uniform(0, 4 * duration))
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    got = digest(foldprune.load(path))
    assert got in want, "neither of the two versions"
    seen[want.index(got)] += 1
print(*seen)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("shards", [0, 100_000])
def test_killed_at_any_moment(shards, tmp_path):
    """kill -9 while saving in a loop: the file always loads, and is one of the two versions."""
    rounds = 20
    path = tmp_path / "model"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILL, path, str(shards), str(rounds)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": _with_tests(os.environ.get("PYTHONPATH"))},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert sum(map(int, done.stdout.split())) == rounds
    # a killed run cannot clean up after itself, but nothing else is left behind
    assert len(list(tmp_path.rglob("*.tmp"))) <= rounds
    before = len(list(tmp_path.rglob("*")))
    for seed in range(3):
        sample(seed).save(path, max_shard_bytes=shards or None)
    assert len(list(tmp_path.rglob("*"))) <= before
    assert sha256(foldprune.load(path).state_dict()) == sha256(sample(2).state_dict())


def _with_tests(path: str | None) -> str:
    own = str(Path(__file__).parent)
    return f"{own}{os.pathsep}{path}" if path else own


# ---- names and pickles --------------------------------------------------------------------------


def test_names_that_cannot_be_told_apart(tmp_path):
    weight = np.arange(1, 101, dtype=np.float32).reshape(10, 10)
    state = {"a": weight, "a::mask": np.ones(3, np.float32)}
    with pytest.warns(foldprune.UnmatchedTensorWarning):
        compressed = foldprune.compress(state, recipe=Recipe(fpp=0.5))
    with pytest.raises(ValueError, match="a::mask"):
        compressed.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["__metadata__", "", "::", "a::b::c", "/etc/passwd", "x" * 3000])
def test_odd_names(name, tmp_path):
    """Come back, or are refused at once: never a file that cannot be read."""
    state = {name: np.arange(1, 101, dtype=np.float32).reshape(10, 10)}
    with pytest.warns(foldprune.UnmatchedTensorWarning):
        compressed = foldprune.compress(state, recipe=Recipe(fpp=0.0))
    try:
        compressed.save(tmp_path / "a")
    except (ValueError, OSError) as error:
        assert name == "__metadata__" and name in str(error)
        assert not list(tmp_path.iterdir())
    else:
        assert sha256(foldprune.load(tmp_path / "a").state_dict("numpy")) == sha256(state)


def test_never_a_pickle(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a pickle")

    compressed = sample()
    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(np, "save", refuse)
    monkeypatch.setattr(np, "load", refuse)
    compressed.save(tmp_path / "a")
    compressed.save(tmp_path / "b", max_shard_bytes=5000)
    assert sha256(foldprune.load(tmp_path / "a").state_dict()) == sha256(
        foldprune.load(tmp_path / "b").state_dict()
    )
    with safe_open(tmp_path / "a", framework="numpy") as file:  # any safetensors reader opens it
        assert set(file.metadata()) >= {"foldprune"}
        assert json.loads(file.metadata()["foldprune"])["version"] == container_module.VERSION
        names = list(file.keys())
    assert all(name.split("::")[0] in compressed for name in names)
