"""Files made to deceive, disks that are full, odd tensors: an error that names what is wrong, or
the right result; never a crash, a hang, or memory that the input does not justify."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from safetensors.numpy import save_file

import foldprune
from foldprune import Recipe

REFUSED = (ValueError, TypeError, OSError)
pytestmark = [
    pytest.mark.filterwarnings("ignore::foldprune.UnmatchedTensorWarning"),
    pytest.mark.filterwarnings("ignore::foldprune.FoldRefusedWarning"),
]


def refused(path: Path, kinds: tuple[type[Exception], ...] = REFUSED, **how: Any) -> str:
    """Every reader refuses the path, taking little memory; the message of ``compress``."""
    tracemalloc.start()
    try:
        with pytest.raises(kinds) as error:
            foldprune.compress(path, recipe=Recipe(fpp=0.5), **how)
        with pytest.raises(kinds):
            foldprune.compress_checkpoint(path, path.parent / "out", recipe=Recipe(fpp=0.5))
        with pytest.raises(kinds):
            foldprune.load(path)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 10_000_000
    return str(error.value)


# ---- safetensors headers that lie ---------------------------------------------------------------


def entry(shape: Any = (2, 2), offsets: Any = (0, 16), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: dict[str, Any] = {
    "offsets past the end": {"a": entry(offsets=(0, 1 << 40), shape=(1 << 38,))},
    "offsets of 2^63": {"a": entry(offsets=(0, 1 << 63), shape=(1 << 61,))},
    "size that overflows": {"a": entry(shape=(1 << 32, 1 << 32, 4), offsets=(0, 0))},
    "size that wraps to the right one": {"a": entry(shape=((1 << 62) + 1, 4))},
    "shape larger than the data": {"a": entry(shape=(2, 3))},
    "shape smaller than the data": {"a": entry(shape=(2, 1))},
    "negative shape": {"a": entry(shape=(-2, -2))},
    "shape of fractions": {"a": entry(shape=(2.0, 2.0))},
    "shape of text": {"a": entry(shape="22")},
    "a million dimensions": {"a": entry(shape=(1,) * 1_000_000, offsets=(0, 4))},
    "100 dimensions": {"a": entry(shape=(1,) * 100, offsets=(0, 4)), "b": entry((3,), (4, 16))},
    "offsets in the wrong order": {"a": entry(offsets=(16, 0))},
    "overlap": {"a": entry(), "b": entry(shape=(2,), offsets=(8, 16))},
    "hole": {"a": entry(shape=(1,), offsets=(0, 4)), "b": entry(shape=(1,), offsets=(12, 16))},
    "negative offsets": {"a": entry(offsets=(-16, 0))},
    "another dtype": {"a": entry(dtype="F64")},
    "unknown dtype": {"a": entry(dtype="F31")},
    "no dtype": {"a": {"shape": [2, 2], "data_offsets": [0, 16]}},
    "metadata of numbers": {"__metadata__": {"a": 1}, "a": entry()},
    "list": [entry()],
    "number": 3,
    "nothing": {},
}


def raw(path: Path, header: Any, data: bytes = bytes(16)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("lie", HEADERS)
def test_headers_that_lie(lie, tmp_path):
    refused(raw(tmp_path / "model.safetensors", HEADERS[lie]))


@pytest.mark.parametrize("size", [0, 1, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_header_sizes_that_lie(size, tmp_path):
    path = raw(tmp_path / "model.safetensors", {"a": entry()})
    path.write_bytes(size.to_bytes(8, "little") + path.read_bytes()[8:])
    refused(path)


@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b'{"a":' * 100_000, b'{"a"', b"\xff\xfe", b'{"\\ud800":1}', b"\x00" * 40],
    ids=["arrays", "objects", "cut", "not utf-8", "half a surrogate", "zeros"],
)
def test_headers_that_are_no_json(text, tmp_path):
    refused(raw(tmp_path / "model.safetensors", text))


def test_names_that_are_there_twice(tmp_path):
    one = json.dumps(entry(shape=(2,), offsets=(0, 8)))
    two = json.dumps(entry(shape=(2,), offsets=(8, 16)))
    same = json.dumps(entry())
    path = tmp_path / "model.safetensors"
    refused(raw(path, f'{{"a":{one},"a":{two}}}'.encode()))
    assert "'a' is there twice" in refused(raw(path, f'{{"a":{same},"a":{same}}}'.encode()))


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones((100, 100), np.float32), "b": np.ones((9, 9), np.float32)}, path)
    file = foldprune.tensor_files.SafetensorsFile(str(path))
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(foldprune.FormatError, match="cut short"):
        for name in file.specs:
            file.read(name)


# ---- indexes and folders ------------------------------------------------------------------------


def index(folder: Path, weight_map: Any, text: str | None = None) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}) if text is None else text)
    return path


@pytest.mark.parametrize(
    "shard",
    ["/etc/passwd", "/dev/zero", "../up.safetensors", "sub/../../up.safetensors", "..", ".", "",
     "a\x00.safetensors", "model.safetensors/", "~/model.safetensors", "x" * 5000 + ".safetensors"],
)  # fmt: skip
def test_shards_elsewhere(shard, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    state = {"a": np.ones((4, 4), np.float32)}
    save_file(state, tmp_path / "up.safetensors")
    save_file(state, folder / "model.safetensors")
    refused(index(folder, {"a": shard}))


@pytest.mark.parametrize("kind", ["pipe", "zero", "random", "folder", "loop", "dangling"])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_that_are_no_files(kind, suffix, tmp_path):
    """A pipe would block, a device would never end."""
    if suffix == ".bin":
        pytest.importorskip("torch")
    shard = tmp_path / f"shard{suffix}"
    if kind == "pipe":
        os.mkfifo(shard)
    elif kind == "folder":
        shard.mkdir()
    else:
        target = {"zero": "/dev/zero", "random": "/dev/urandom", "loop": shard}
        shard.symlink_to(target.get(kind, "nowhere"))
    refused(index(tmp_path, {"a": shard.name}))
    refused(shard)


def test_linked_shards_are_read_as_the_hub_cache_has_them(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"a": np.ones((4, 4), np.float32)}, tmp_path / "blobs" / "0123")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/0123")
    assert len(foldprune.compress(tmp_path / "snapshot", recipe=Recipe(fpp=0.5))) == 1


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"weight_map":' * 50_000, '{"weight_map":{"a":{"b":1}}}', '{"weight_map":{}}',
     '{"weight_map":{"a":null}}', "3", "null", '"weight_map"', "\ufeff{}"],
    ids=range(9),
)  # fmt: skip
def test_indexes_that_are_none(text, tmp_path):
    save_file({"a": np.ones((4, 4), np.float32)}, tmp_path / "model.safetensors")
    refused(index(tmp_path, None, text))


def test_an_index_that_names_a_tensor_twice(tmp_path):
    for i, value in enumerate((1.0, 2.0)):
        save_file({"a": np.full((4, 4), value, np.float32)}, tmp_path / f"{i}.safetensors")
    text = '{"weight_map":{"a":"0.safetensors","a":"1.safetensors"}}'
    assert "'a'" in refused(index(tmp_path, None, text))


@pytest.mark.parametrize("text", ["[" * 100_000, "\x00", "{", "\ud800"])
def test_configurations_that_are_none(text, tmp_path):
    save_file(reference.bert_state(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(foldprune.ModelError, match=r"config\.json"):
        foldprune.compress(tmp_path, 0.3)


HOSTILE_HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "infinite shape": lambda h: h["tensors"][0].update(shape=[float("inf")]),
    "NaN shape": lambda h: h["tensors"][0].update(shape=[float("nan")]),
    "long shape": lambda h: h["tensors"][0].update(shape=[1] * 10_000),
    "a tensor twice": lambda h: h["tensors"].append(h["tensors"][0]),
    "parts twice": lambda h: h["tensors"][0]["parts"].append(h["tensors"][0]["parts"][0]),
    "names of lists": lambda h: h.update(names=[[1]] * len(h["names"])),
    "ties of lists": lambda h: h.update(tied={"x": []}),
    "version": lambda h: h.update(version=float("inf")),
    "heads": lambda h: h["report"].update(heads=3),
    "framework": lambda h: h.update(framework=["torch"]),
}


@pytest.mark.parametrize("lie", HOSTILE_HEADERS)
def test_our_own_header_that_lies(lie, tmp_path):
    """With sound checksums."""
    import zlib

    compressed = foldprune.compress(reference.bert_state(), recipe=Recipe(fpp=0.5), num_heads=4)
    compressed.save(tmp_path / "out", max_shard_bytes=1 << 30)
    path = tmp_path / "out" / "foldprune.safetensors.index.json"
    values = json.loads(path.read_text())
    header = json.loads(values["metadata"]["foldprune"])
    HOSTILE_HEADERS[lie](header)
    text = json.dumps(header)
    crc = str(zlib.crc32(text.encode()))
    values["metadata"] = {"foldprune": text, "foldprune_crc32": crc}
    path.write_text(json.dumps(values))
    with pytest.raises(foldprune.FormatError):
        foldprune.load(tmp_path / "out")
    if lie != "heads":  # which the dense tensors do not depend on
        with pytest.raises(foldprune.FormatError):
            foldprune.decompress_checkpoint(tmp_path / "out", tmp_path / "dense")


# ---- torch's files ------------------------------------------------------------------------------


def rezip(source: Path, target: Path, change: Callable[[str, bytes], bytes], method: int) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for record in old.infolist():
            new.writestr(record.filename, change(record.filename, old.read(record)))
    return target


@pytest.fixture
def torch_file(tmp_path) -> Path:
    torch = pytest.importorskip("torch")
    path = tmp_path / "plain.pt"
    torch.save({"a.weight": torch.ones(64, 64)}, path)
    return path


def test_zip_bombs(torch_file, tmp_path):
    """A record of a gigabyte of zeros in a megabyte."""

    def bomb(name: str, data: bytes) -> bytes:
        return bytes(1 << 27) if name.endswith("data/0") else data

    assert "compressed" in refused(
        rezip(torch_file, tmp_path / "bomb.pt", bomb, zipfile.ZIP_DEFLATED)
    )


def test_records_that_overlap(torch_file, tmp_path):
    """Many records of the central directory that are the same bytes."""
    data = torch_file.read_bytes()
    at = data.index(b"PK\x01\x02")
    end = data.index(b"PK\x06\x06") if b"PK\x06\x06" in data else data.index(b"PK\x05\x06")
    path = tmp_path / "overlap.pt"
    with zipfile.ZipFile(torch_file) as archive:
        count = len(archive.infolist())
    central = data[at:end] * 50
    tail = (
        b"PK\x05\x06" + bytes(4) + (count * 50).to_bytes(2, "little") * 2
        + len(central).to_bytes(4, "little") + at.to_bytes(4, "little") + bytes(2)
    )  # fmt: skip
    path.write_bytes(data[:at] + central + tail)
    refused(path)


@pytest.mark.parametrize("size", [1 << 13, 1 << 31, 1 << 45])
def test_storages_larger_than_their_record(size, torch_file, tmp_path):
    """The pickle's number of elements is not the record's: reading as many would leave it."""

    def lie(name: str, data: bytes, shape: bool) -> bytes:
        if not name.endswith("data.pkl"):
            return data
        number, pair = b"M" + (64 * 64).to_bytes(2, "little"), b"K\x40K\x40\x86"
        assert number in data and pair in data
        data = data.replace(number, b"\x8a\x07" + size.to_bytes(7, "little"))
        rows = b"\x8a\x07" + (size // 64).to_bytes(7, "little")
        return data.replace(pair, rows + b"K\x40\x86") if shape else data

    path = tmp_path / "lie.pt"
    rezip(torch_file, path, lambda name, data: lie(name, data, True), zipfile.ZIP_STORED)
    refused(path)
    # a tensor that stays within its record is what it was
    rezip(torch_file, path, lambda name, data: lie(name, data, False), zipfile.ZIP_STORED)
    assert (foldprune.compress(path, recipe=Recipe(fpp=0.0))["a.weight"] == 1).all()


def test_tensors_expanded_from_one_number(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "wide.pt"
    torch.save({"a.weight": torch.ones(1).expand(1 << 20, 1 << 20)}, path)
    assert "expanded" in refused(path)
    torch.save({f"{i}.weight": torch.ones(9000)[i:8000].view(-1, 1) for i in range(100)}, path)
    many = torch.ones(9000)
    torch.save({f"{i}.weight": many[i : 8000 + i] for i in range(100)}, path)
    assert "overlap" in refused(path)


def test_old_torch_files_that_lie(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "old.pt"
    tensors = {"a.weight": torch.arange(4096.0).reshape(64, 64)}
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    assert len(foldprune.compress(path, recipe=Recipe(fpp=0.5))) == 1
    data = path.read_bytes()
    assert data.count((4096).to_bytes(8, "little")) == 1  # the storage's size, before its data
    for size in (1 << 13, 1 << 40, (1 << 63) - 1):
        path.write_bytes(data.replace((4096).to_bytes(8, "little"), size.to_bytes(8, "little")))
        refused(path)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/foldprune-was-here",)


def test_pickles_that_would_run_code(tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "evil.bin"
    path.write_bytes(pickle.dumps({"a": Evil()}))
    refused(path)
    assert not os.path.exists("/tmp/foldprune-was-here")


# ---- disks and signals --------------------------------------------------------------------------

FULL = """
import resource, signal, sys, warnings
import foldprune
warnings.simplefilter("ignore")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
source, out, what, limit = sys.argv[1:]
compressed = foldprune.load(source) if what == "decompress" else foldprune.compress(source, 0.4)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    if what == "save":
        compressed.save(out)
    elif what == "shards":
        compressed.save(out, max_shard_bytes=50_000)
    elif what == "compress":
        foldprune.compress_checkpoint(source, out, 0.4)
    else:
        foldprune.decompress_checkpoint(source, out)
except OSError as error:
    print(error)
    sys.exit(3)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize("limit", [0, 10_000, 60_000])
@pytest.mark.parametrize("what", ["save", "shards", "compress", "decompress"])
def test_a_full_disk(what, limit, tmp_path):
    """What was there stays; nothing half-written is left; with room again it works."""
    state = reference.llama_state(d=96, ff=256, vocab=200)
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    save_file(state, source / "model.safetensors")
    (source / "config.json").write_text('{"num_attention_heads": 4}')
    if what == "decompress":
        foldprune.compress_checkpoint(source, tmp_path / "packed", 0.4)
        source = tmp_path / "packed"
    elif what != "save":
        foldprune.compress_checkpoint(source, out, 0.1)
    else:
        foldprune.compress(source, 0.1).save(out)
    before = None if what == "decompress" else foldprune.load(out).report.to_dict()
    command = [sys.executable, "-c", FULL, source, out, what]
    full = subprocess.run([*command, str(limit)], capture_output=True, text=True)
    assert full.returncode == 3, full.stderr
    assert "File too large" in full.stdout
    assert not list(tmp_path.rglob("*.tmp"))
    if before is not None:
        assert foldprune.load(out).report.to_dict() == before
    subprocess.run([*command, str(1 << 30)], check=True)
    if what != "decompress":
        assert foldprune.load(out).report.removed == pytest.approx(0.4, abs=0.005)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that nobody can write")
def test_places_that_nobody_can_write(tmp_path):
    save_file(reference.llama_state(), tmp_path / "model.safetensors")
    compressed = foldprune.compress(tmp_path, 0.3, num_heads=4)
    for place in ("/proc/foldprune", "/dev/null/out", str(tmp_path / "model.safetensors" / "x")):
        with pytest.raises(OSError):
            compressed.save(place)
        with pytest.raises(OSError):
            compressed.save(place, max_shard_bytes=1000)
        with pytest.raises(OSError):
            foldprune.compress_checkpoint(tmp_path, place, num_heads=4)


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


# ---- what fuzzing starts from, and has found ----------------------------------------------------

FUZZ = Path(__file__).parent / "fuzz"


@pytest.mark.parametrize("target", ["file", "header", "restore", "unpack"])
def test_the_fuzzers_corpus(target, monkeypatch):
    monkeypatch.syspath_prepend(str(FUZZ))
    import targets

    seeds = sorted((targets.CORPUS / target).iterdir())
    assert seeds
    rng = np.random.default_rng(0)
    for seed in seeds:
        data = seed.read_bytes()
        targets.TARGETS[target](data)
        for _ in range(50):
            damaged = bytearray(data)
            for at in rng.integers(0, max(len(data), 1), 3).tolist():
                damaged[at : at + 1] = rng.bytes(int(rng.integers(3)))
            targets.TARGETS[target](bytes(damaged))
