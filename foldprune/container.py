"""The file format: safetensors, with the parts of every tensor named after it and a JSON header.

A tensor stored whole keeps its own name; a part of an encoded one is called ``name::part``. The
header is in the file's metadata under "foldprune" (its CRC-32 under "foldprune_crc32"); it holds
the format's version, the order of names, each tensor's shape, dtype and encoding, ties, recipe,
report, and every part's CRC-32. A folder of shards has the header in its index instead. The files
are written beside their place, synced and renamed, so that a reader sees the old state or the new
one.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import zlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (dtype names such as "bfloat16")
import numpy as np
from safetensors.numpy import save_file

from .compressed import Compressed
from .encodings import Array, Encoding, describe, restore
from .errors import FormatError
from .files import read_safetensors
from .options import resolve_threads
from .recipe import Recipe
from .report import Report

__all__ = ["VERSION", "load", "save", "write_atomically"]

VERSION = 1
INDEX = "foldprune.safetensors.index.json"
_SEPARATOR = "::"


def save(compressed: Compressed, path: str, max_shard_bytes: int | None = None) -> None:
    """See ``Compressed.save``."""
    parts: dict[str, Array] = {}
    described = []
    for name, encoding in compressed.encodings.items():
        own = {_part_name(name, part): array for part, array in encoding.parts().items()}
        if clash := set(own) & {*parts, "__metadata__"}:
            raise FormatError(
                f"the names {sorted(clash)} cannot be told apart in a file; rename them"
            )
        parts |= {name: np.asarray(array, order="C") for name, array in own.items()}
        described.append(
            {
                "name": name,
                "shape": list(encoding.shape),
                "dtype": encoding.dtype.name,
                "encoding": describe(encoding),
                "parts": list(encoding.parts()),
            }
        )
    header = {
        "version": VERSION,
        "framework": compressed.framework,
        "names": list(compressed),
        "tensors": described,
        "tied": dict(compressed.tied),
        "recipe": compressed.recipe.to_dict(),
        "report": compressed.report.to_dict(),
        "crc32": {name: _crc(array) for name, array in parts.items()},
    }
    text = json.dumps(header, separators=(",", ":"))
    metadata = {"foldprune": text, "foldprune_crc32": str(zlib.crc32(text.encode()))}
    if max_shard_bytes is None:
        if os.path.isdir(path):
            raise IsADirectoryError(
                f"{path} is a folder; pass max_shard_bytes= to write shards into it"
            )
        write_atomically(path, lambda temporary: save_file(parts, temporary, metadata))
    else:
        _save_shards(parts, metadata, path, max_shard_bytes)


def load(path: str | os.PathLike[str], *, threads: int | None = None) -> Compressed:
    """Opens what ``Compressed.save`` wrote: a file, a folder of shards, or its index.

    Tensors stay packed in memory and are unpacked when read. Raises FormatError (a ValueError) if
    the file is damaged, truncated or of a newer version, OSError if it cannot be read.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        path = os.path.join(path, INDEX)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file")
    if path.endswith(".index.json"):
        parts, metadata = _read_shards(path)
    else:
        parts, metadata = read_safetensors(path)
    text = metadata.get("foldprune")
    if text is None:
        raise FormatError(
            f"{path} is not a foldprune file; a dense checkpoint goes to foldprune.compress"
        )
    if str(zlib.crc32(text.encode())) != metadata.get("foldprune_crc32"):
        raise FormatError(f"{path}: the header is damaged (its checksum does not fit)")
    try:
        return _decode(json.loads(text), parts, resolve_threads(threads))
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{path}: the header is malformed: {error!r}") from None


def _decode(header: Mapping[str, Any], parts: dict[str, Array], threads: int) -> Compressed:
    if header["version"] != VERSION:
        raise FormatError(
            f"format version {header['version']}, this foldprune reads {VERSION}: install a newer "
            "one"
        )
    if set(header["crc32"]) != set(parts):
        odd = sorted(set(header["crc32"]) ^ set(parts))
        raise FormatError(f"parts that the header and the file disagree on: {odd[:5]}")
    for name, array in parts.items():
        if _crc(array) != header["crc32"][name]:
            raise FormatError(f"{name!r} is damaged (its checksum does not fit)")
    encodings: dict[str, Encoding] = {}
    for tensor in header["tensors"]:
        name = tensor["name"]
        own = {part: parts[_part_name(name, part)] for part in tensor["parts"]}
        shape = tuple(int(size) for size in tensor["shape"])
        if any(size < 0 for size in shape) or math.prod(shape) > 1 << 48:
            raise FormatError(f"{name!r}: impossible shape {shape}")
        try:
            encodings[name] = restore(shape, np.dtype(tensor["dtype"]), tensor["encoding"], own)
        except FormatError as error:
            raise FormatError(f"{name!r}: {error}") from None
    tied, names = dict(header["tied"]), list(header["names"])
    if sorted(names) != sorted([*encodings, *tied]) or not set(tied.values()) <= set(encodings):
        raise FormatError("the list of names does not fit the tensors")
    return Compressed(
        names,
        encodings,
        tied,
        Report.from_dict(header["report"]),
        Recipe.from_dict(header["recipe"]),
        header["framework"],
        threads=threads,
    )


def _part_name(name: str, part: str) -> str:
    return f"{name}{_SEPARATOR}{part}" if part else name


def _crc(array: Array) -> int:
    """CRC-32 of shape, dtype and bytes, so that a header that lies about the first two is found
    out."""
    start = zlib.crc32(f"{array.dtype.name}{list(array.shape)}".encode())
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, start)


# ---- writing ------------------------------------------------------------------------------------


def write_atomically(path: str, write: Any) -> None:
    """Calls write(temporary path), then puts the result in place atomically."""
    folder = os.path.dirname(os.path.abspath(path))
    temporary = os.path.join(folder, f".{os.path.basename(path)}.{secrets.token_hex(6)}.tmp")
    try:
        # created here, so that an unwritable folder is an OSError whatever the writer would raise
        with open(temporary, "xb") as stream:
            mode = os.fstat(stream.fileno()).st_mode & 0o777
        try:
            write(temporary)
        except OSError:
            raise
        except Exception as error:  # safetensors has its own kind for failed writes
            raise OSError(f"{path}: could not be written: {error}") from error
        os.chmod(temporary, mode)  # safetensors makes its files private
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    _sync(folder)


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _save_shards(
    parts: dict[str, Array], metadata: dict[str, str], folder: str, max_shard_bytes: int
) -> None:
    """Shards under names of their own, then the index in one rename; what the old index named goes
    last."""
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}: expected at least 1")
    os.makedirs(folder, exist_ok=True)
    shards: list[dict[str, Array]] = [{}]
    size = 0
    for name, array in parts.items():
        if shards[-1] and size + array.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    token = secrets.token_hex(4)
    weight_map: dict[str, str] = {}
    index = os.path.join(folder, INDEX)
    old = _shards_of(index)
    for i, shard in enumerate(shards, 1):
        file = f"foldprune-{token}-{i:05}-of-{len(shards):05}.safetensors"
        write_atomically(
            os.path.join(folder, file), lambda temporary, shard=shard: save_file(shard, temporary)
        )
        weight_map |= dict.fromkeys(shard, file)

    def write_index(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8") as stream:
            json.dump({"metadata": metadata, "weight_map": weight_map}, stream)

    write_atomically(index, write_index)
    for file in old - set(weight_map.values()):
        if os.path.exists(stale := os.path.join(folder, file)):
            os.unlink(stale)


def _shards_of(index: str) -> set[str]:
    """Names of our own shards in an existing index, so that nothing else is ever removed."""
    try:
        with open(index, encoding="utf-8") as stream:
            files = set(json.load(stream)["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return set()
    return {
        file
        for file in files
        if isinstance(file, str)
        and os.path.basename(file) == file
        and file.startswith("foldprune-")
    }


def _read_shards(path: str) -> tuple[dict[str, Array], dict[str, str]]:
    try:
        with open(path, encoding="utf-8") as stream:
            index = json.load(stream)
        weight_map: dict[str, str] = dict(index["weight_map"])
        metadata: dict[str, str] = dict(index["metadata"])
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path}: not an index of foldprune: {error!r}") from None
    parts: dict[str, Array] = {}
    for file in dict.fromkeys(weight_map.values()):
        if not isinstance(file, str) or os.path.basename(file) != file:
            raise FormatError(f"{path}: shard {file!r} is not a plain file name")
        arrays, _ = read_safetensors(os.path.join(os.path.dirname(path), file))
        parts |= {name: array for name, array in arrays.items() if weight_map.get(name) == file}
    return parts, metadata
