"""Files made to deceive, disks that are full: an error that names what is wrong, or the right
result; never a crash, a hang, or memory that the input does not justify."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
