"""Damaged files and files that lie: an error at load, or exactly the same tensors."""

from __future__ import annotations

import json
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_samples import STATES, sample, sha256
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import foldprune
from foldprune import Recipe
from foldprune import container as container_module

DAMAGE = (ValueError, OSError)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[bytes, dict[str, str]]:
    path = tmp_path_factory.mktemp("saved") / "small"
    compressed = sample()
    compressed.save(path)
    kinds = {encoding.kind for encoding in compressed.encodings.values()}
    assert kinds >= {"packed", "rows", "zeros", "diagonal", "dense"}
    return path.read_bytes(), sha256(compressed.state_dict())


def offsets(data: bytes) -> list[int]:
    """Where the header and every part begins."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    begins = [v["data_offsets"][0] for k, v in header.items() if k != "__metadata__"]
    return [0, 8, 8 + size, *(8 + size + begin for begin in begins), len(data)]


def test_truncated_anywhere(saved, tmp_path):
    data, _ = saved
    rng = np.random.default_rng(0)
    cuts = {at + step for at in offsets(data) for step in (-1, 0, 1)}
    cuts |= set(rng.integers(0, len(data), 300).tolist()) | set(range(20))
    path = tmp_path / "cut"
    for cut in sorted(cut for cut in cuts if 0 <= cut < len(data)):
        path.write_bytes(data[:cut])
        with pytest.raises(DAMAGE):
            foldprune.load(path)


def test_grown(saved, tmp_path):
    data, _ = saved
    for extra in (b"\0", b"\0" * 4096):
        (tmp_path / "grown").write_bytes(data + extra)
        with pytest.raises(DAMAGE):
            foldprune.load(tmp_path / "grown")


@pytest.mark.parametrize("where", ["frame", "header", "data"])
def test_flipped_bits(where, saved, tmp_path):
    """Every bit of a few hundred bytes: an error, or exactly the same tensors."""
    data, want = saved
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    low, high = {"frame": (0, 40), "header": (40, begin), "data": (begin, len(data))}[where]
    count = min(high - low, 150)
    positions = low + np.random.default_rng(1).choice(high - low, count, replace=False)
    path = tmp_path / "flipped"
    found = 0
    for position in positions.tolist():
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                got = foldprune.load(path).state_dict()
            except DAMAGE:
                found += 1
                continue
            assert sha256(got) == want, (position, bit)
    if where == "data":
        assert found == 8 * count  # there is nothing in the data that does not matter


def test_flipped_bits_in_shards(tmp_path):
    compressed = sample()
    want = sha256(compressed.state_dict())
    compressed.save(tmp_path, max_shard_bytes=8000)
    rng = np.random.default_rng(2)
    for file in sorted(tmp_path.iterdir()):
        data = file.read_bytes()
        for position in rng.integers(0, len(data), 40).tolist():
            damaged = bytearray(data)
            damaged[position] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            try:
                got = foldprune.load(tmp_path).state_dict()
            except DAMAGE:
                continue
            assert sha256(got) == want, (file.name, position)
        file.write_bytes(data)
    assert sha256(foldprune.load(tmp_path).state_dict()) == want


def rewrite(source: Path, target: Path, change: Callable[[dict[str, Any], dict], None]) -> None:
    """A file whose header or parts were changed on purpose, its checksums right."""
    with safe_open(source, framework="numpy") as file:
        header = json.loads(file.metadata()["foldprune"])
    parts = load_file(source)
    change(header, parts)
    header["crc32"] = {
        name: zlib.crc32(
            np.ascontiguousarray(array).tobytes(),
            zlib.crc32(f"{array.dtype.name}{list(array.shape)}".encode()),
        )
        for name, array in parts.items()
    }
    text = json.dumps(header)
    metadata = {"foldprune": text, "foldprune_crc32": str(zlib.crc32(text.encode()))}
    save_file(parts, target, metadata)


def tensor(header: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in header["tensors"] if entry["name"] == name)


UP = "encoder.layer.0.intermediate.dense.weight"
QUERY = "encoder.layer.0.attention.self.query.weight"
KEY = "encoder.layer.0.attention.self.key.weight"
VALUE = "encoder.layer.0.attention.self.value.weight"


def test_rewriting_alone_changes_nothing(tmp_path):
    compressed = sample()
    compressed.save(tmp_path / "a")
    rewrite(tmp_path / "a", tmp_path / "b", lambda header, parts: None)
    assert sha256(foldprune.load(tmp_path / "b").state_dict()) == sha256(compressed.state_dict())


def test_newer_version(tmp_path):
    sample().save(tmp_path / "a")
    for version in (container_module.VERSION + 1, 99, "2", None):
        rewrite(tmp_path / "a", tmp_path / "b", lambda h, p, v=version: h.update(version=v))
        with pytest.raises(foldprune.FormatError, match="version"):
            foldprune.load(tmp_path / "b")


def _set(parts: dict, name: str, index: int, value: int) -> None:
    parts[name] = parts[name].copy()
    parts[name][index] = value


CORRUPT: dict[str, Callable[[dict[str, Any], dict], Any]] = {
    "mask too short": lambda h, p: p.update({UP + "::mask": p[UP + "::mask"][:-1]}),
    "mask too long": lambda h, p: p.update(
        {UP + "::mask": np.append(p[UP + "::mask"], np.uint8(0))}
    ),
    "mask of another dtype": lambda h, p: p.update({UP + "::mask": p[UP + "::mask"].view(np.int8)}),
    "one value less": lambda h, p: p.update({UP + "::values": p[UP + "::values"][:-1]}),
    "one bit more": lambda h, p: _set(p, UP + "::mask", 0, p[UP + "::mask"][0] ^ 1),
    "values of another dtype": lambda h, p: p.update(
        {UP + "::values": p[UP + "::values"].astype(np.float64)}
    ),
    "part missing": lambda h, p: (
        p.pop(UP + "::mask"),
        tensor(h, UP)["parts"].remove("mask"),
    ),
    "unknown encoding": lambda h, p: tensor(h, UP)["encoding"].update(kind="fractal"),
    "encoding of another kind": lambda h, p: tensor(h, UP)["encoding"].update(kind="rows", heads=4),
    "huge shape": lambda h, p: tensor(h, UP).update(shape=[1 << 40, 1 << 40]),
    "negative shape": lambda h, p: tensor(h, UP).update(shape=[-48, -32]),
    "another shape": lambda h, p: tensor(h, UP).update(shape=[47, 32]),
    "dimensions swapped by a flag": lambda h, p: tensor(h, KEY)["encoding"].update(heads=8),
    "block of zero": lambda h, p: tensor(h, UP)["encoding"].update(block=[0, 1]),
    "block of text": lambda h, p: tensor(h, UP)["encoding"].update(block="ab"),
    "heads that do not divide": lambda h, p: tensor(h, QUERY)["encoding"].update(heads=5),
    "no heads": lambda h, p: tensor(h, QUERY)["encoding"].update(heads=0),
    "rank above the head": lambda h, p: _set(p, QUERY + "::ranks", 0, 9),
    "negative rank": lambda h, p: _set(p, QUERY + "::ranks", 0, -1),
    "pivot out of range": lambda h, p: _set(p, KEY + "::pivots", 0, 32),
    "negative pivot": lambda h, p: _set(p, VALUE + "::pivots", 0, -1),
    "pivot twice": lambda h, p: _set(p, VALUE + "::pivots", 1, p[VALUE + "::pivots"][0]),
    "remainder above the head": lambda h, p: _set(p, VALUE + "::remainder_ranks", 0, 9),
    "a name too many": lambda h, p: h["names"].append("extra"),
    "a name twice": lambda h, p: h["names"].append(h["names"][0]),
    "a name too few": lambda h, p: h["names"].pop(),
    "tied to nothing": lambda h, p: h["tied"].update({"lm_head.decoder.weight": "nothing"}),
    "tied to itself": lambda h, p: h["tied"].update(
        {"lm_head.decoder.weight": "lm_head.decoder.weight"}
    ),
    "no tensors": lambda h, p: h.pop("tensors"),
    "tensors of another type": lambda h, p: h.update(tensors=3),
    "unknown dtype": lambda h, p: tensor(h, UP).update(dtype="float3"),
    "object dtype": lambda h, p: tensor(h, "embeddings.LayerNorm.bias").update(dtype="object"),
    "a recipe that is none": lambda h, p: h["recipe"].update(fpp=3),
    "a report that is none": lambda h, p: h["report"].update(tensors=[{"name": 1}]),
}


@pytest.mark.parametrize("damage", CORRUPT)
def test_contradictions_are_found(damage, tmp_path):
    """Files with sound checksums that lie: an error at load, never a wrong tensor."""
    sample().save(tmp_path / "a")
    rewrite(tmp_path / "a", tmp_path / "b", CORRUPT[damage])
    with pytest.raises(foldprune.FormatError):
        foldprune.load(tmp_path / "b")


@pytest.mark.parametrize("family", STATES)
@pytest.mark.parametrize("damage", ["bit", "short", "value", "dtype", "pivots"])
def test_contradictions_in_pruned_rows_are_found(family, damage, tmp_path):
    compressed = foldprune.compress(
        STATES[family](), recipe=Recipe(irc=2, irc_fpp=0.5), num_heads=4
    )
    compressed.save(tmp_path / "a")
    name = next(n for n, e in compressed.encodings.items() if "mask" in e.parts())
    mask, values = f"{name}::mask", f"{name}::values"

    def change(header: Any, parts: Any) -> None:
        if damage == "bit":
            _set(parts, mask, 0, parts[mask][0] ^ 1)
        elif damage == "short":
            parts[mask] = parts[mask][:-1]
        elif damage == "value":
            parts[values] = parts[values][1:]
        elif damage == "dtype":
            parts[mask] = parts[mask].view(np.int8)
        else:
            ranks = int(parts[f"{name}::ranks"].sum())
            parts[f"{name}::pivots"] = np.zeros(ranks, np.int32)
            tensor(header, name)["parts"].append("pivots")

    rewrite(tmp_path / "a", tmp_path / "b", change)
    with pytest.raises(foldprune.FormatError):
        foldprune.load(tmp_path / "b")


def test_padding_bits_of_a_mask_are_zero(tmp_path):
    """39 x 33 bits leave one bit of the last byte unused."""
    state = {"layer.weight": np.arange(1, 39 * 33 + 1, dtype=np.float32).reshape(39, 33)}
    with pytest.warns(foldprune.UnmatchedTensorWarning):
        compressed = foldprune.compress(state, recipe=Recipe(fpp=0.5))
    compressed.save(tmp_path / "a")
    mask = "layer.weight::mask"
    rewrite(tmp_path / "a", tmp_path / "b", lambda h, p: _set(p, mask, -1, p[mask][-1] | 0x80))
    with pytest.raises(foldprune.FormatError, match=r"layer\.weight"):
        foldprune.load(tmp_path / "b")


def test_what_is_no_foldprune_file(tmp_path):
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "dense.safetensors")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("hello " * 100)
    (tmp_path / "pickle").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "huge").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "lie", {"foldprune": "{}"})
    save_file(
        {"a": np.ones(3, np.float32)},
        tmp_path / "list",
        {"foldprune": "[]", "foldprune_crc32": str(zlib.crc32(b"[]"))},
    )
    for name in ("dense.safetensors", "empty", "text", "pickle", "huge", "lie", "list"):
        with pytest.raises(foldprune.FormatError, match=name):
            foldprune.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        foldprune.load(tmp_path / "nowhere")
    with pytest.raises(OSError):
        foldprune.load(tmp_path)  # a folder without an index
    with pytest.raises(foldprune.FormatError, match=r"foldprune\.load"):
        sample().save(tmp_path / "small.safetensors")
        foldprune.compress(tmp_path / "small.safetensors", 0.3)


def test_missing_shard(tmp_path):
    sample().save(tmp_path, max_shard_bytes=8000)
    shard = next(file for file in sorted(tmp_path.iterdir()) if file.suffix == ".safetensors")
    shard.unlink()
    with pytest.raises(DAMAGE):
        foldprune.load(tmp_path)


@pytest.mark.parametrize(
    "trick", ["../out.safetensors", "{absolute}", "sub/out.safetensors", "..", ""]
)
def test_the_index_cannot_point_elsewhere(trick, tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    sample().save(folder, max_shard_bytes=1 << 30)
    index = folder / container_module.INDEX
    values = json.loads(index.read_text())
    shard = next(folder.glob("*.safetensors"))
    outside = tmp_path / "out.safetensors"
    for place in (outside, folder / "sub" / "out.safetensors"):
        place.write_bytes(shard.read_bytes())
    name = trick.format(absolute=outside)
    values["weight_map"] = dict.fromkeys(values["weight_map"], name)
    index.write_text(json.dumps(values))
    with pytest.raises(DAMAGE):
        foldprune.load(folder)
    sample().save(folder, max_shard_bytes=1 << 30)  # nor does replacing it remove what it names
    assert outside.exists() and (folder / "sub" / "out.safetensors").exists()
    foldprune.load(folder)


@pytest.mark.parametrize("index", ["[]", "{}", "{", '{"weight_map": 3, "metadata": {}}', "\x00"])
def test_broken_index(index, tmp_path):
    (tmp_path / container_module.INDEX).write_text(index)
    with pytest.raises(foldprune.FormatError):
        foldprune.load(tmp_path)
