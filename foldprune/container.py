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
import re
import secrets
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ml_dtypes  # noqa: F401  (dtype names such as "bfloat16")
import numpy as np
from safetensors.numpy import save_file

from .compressed import Compressed
from .encodings import Array, Encoding, describe, restore
from .errors import FoldpruneError, FormatError
from .files import read_json
from .options import resolve_threads
from .recipe import Recipe
from .report import Report
from .tensor_files import SafetensorsFile, is_stored_dtype, stand_in

__all__ = [
    "INDEX",
    "VERSION",
    "check_distinct",
    "crc",
    "flatten",
    "load",
    "make_metadata",
    "open_header",
    "part_name",
    "read_tensor",
    "remove_leftovers",
    "save",
    "shard_name",
    "tensor_spec",
    "write_atomically",
    "write_index",
    "write_json",
]

VERSION = 1
INDEX = "foldprune.safetensors.index.json"
_SEPARATOR = "::"
_MOST_DIMENSIONS = 32  # of any NumPy's


def save(compressed: Compressed, path: str, max_shard_bytes: int | None = None) -> None:
    """See ``Compressed.save``."""
    parts, described = flatten(compressed.encodings)
    crc32 = {name: crc(array) for name, array in parts.items()}
    metadata = make_metadata(compressed, described, crc32)
    if max_shard_bytes is None:
        if os.path.isdir(path):
            raise IsADirectoryError(
                f"{path} is a folder; pass max_shard_bytes= to write shards into it"
            )
        write_atomically(path, lambda temporary: save_file(parts, temporary, metadata))
    else:
        _save_shards(parts, metadata, path, max_shard_bytes)


def flatten(encodings: Mapping[str, Encoding]) -> tuple[dict[str, Array], list[dict[str, Any]]]:
    """Every part under the name that it has in a file, and what the header says of every
    tensor."""
    parts: dict[str, Array] = {}
    described = []
    for name, encoding in encodings.items():
        own = {part_name(name, part): array for part, array in encoding.parts().items()}
        check_distinct(parts, own)
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
    return parts, described


def check_distinct(names: Iterable[str], more: Iterable[str]) -> None:
    """FormatError if a name is in both, or is the format's own."""
    if clash := set(more) & {*names, "__metadata__"}:
        raise FormatError(f"the names {sorted(clash)} cannot be told apart in a file; rename them")


def make_metadata(
    compressed: Compressed, described: list[dict[str, Any]], crc32: dict[str, int]
) -> dict[str, str]:
    """The header and its checksum. Of ``compressed`` everything but the encodings is used."""
    header = {
        "version": VERSION,
        "framework": compressed.framework,
        "names": list(compressed),
        "tensors": described,
        "tied": dict(compressed.tied),
        "recipe": compressed.recipe.to_dict(),
        "report": compressed.report.to_dict(),
        "crc32": crc32,
    }
    text = json.dumps(header, separators=(",", ":"))
    return {"foldprune": text, "foldprune_crc32": str(zlib.crc32(text.encode()))}


def load(path: str | os.PathLike[str], *, threads: int | None = None) -> Compressed:
    """Opens what ``Compressed.save`` wrote: a file, a folder of shards, or its index.

    Tensors stay packed in memory and are unpacked when read. Raises FormatError (a ValueError) if
    the file is damaged, truncated or of a newer version, OSError if it cannot be read.
    """
    header, files = open_header(path)
    with _malformed(path):
        encodings = {
            tensor["name"]: read_tensor(tensor, files, header["crc32"])
            for tensor in header["tensors"]
        }
        return Compressed(
            list(header["names"]),
            encodings,
            dict(header["tied"]),
            Report.from_dict(header["report"]),
            Recipe.from_dict(header["recipe"]),
            header["framework"],
            threads=resolve_threads(threads),
        )


def open_header(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, SafetensorsFile]]:
    """The header of what ``load`` opens, and the file that each part is in, of which nothing has
    been read. Raises as ``load`` does."""
    path = os.fspath(path)
    if os.path.isdir(path):
        path = os.path.join(path, INDEX)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file")
    if path.endswith(".index.json"):
        files, metadata = _open_shards(path)
    else:
        file = SafetensorsFile(path)
        files, metadata = dict.fromkeys(file.specs, file), file.metadata
    text = metadata.get("foldprune")
    if not isinstance(text, str):
        raise FormatError(
            f"{path} is not a foldprune file; a dense checkpoint goes to foldprune.compress"
        )
    if str(zlib.crc32(text.encode())) != metadata.get("foldprune_crc32"):
        raise FormatError(f"{path}: the header is damaged (its checksum does not fit)")
    with _malformed(path):
        header: dict[str, Any] = json.loads(text)
        _check_header(header, files)
    return header, files


@contextmanager
def _malformed(path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever a header of the wrong shape makes Python raise is a FormatError."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{os.fspath(path)}: {error}") from None
    except (
        KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError,
    ) as error:  # fmt: skip
        raise FormatError(f"{os.fspath(path)}: the header is malformed: {error!r}") from None


def _check_header(header: Mapping[str, Any], files: Mapping[str, SafetensorsFile]) -> None:
    if header["version"] != VERSION:
        raise FormatError(
            f"format version {header['version']}, this foldprune reads {VERSION}: install a newer "
            "one"
        )
    if set(header["crc32"]) != set(files):
        odd = sorted(set(header["crc32"]) ^ set(files))
        raise FormatError(f"parts that the header and the file disagree on: {odd[:5]}")
    if header["framework"] not in (None, "torch", "numpy"):
        raise FormatError(f"unknown framework {header['framework']!r}")
    stored = [tensor["name"] for tensor in header["tensors"]]
    used = [part_name(t["name"], part) for t in header["tensors"] for part in t["parts"]]
    if sorted(used) != sorted(files):
        raise FormatError("the tensors do not use every part once")
    tied = header["tied"]
    if sorted(header["names"]) != sorted([*stored, *tied]) or not set(tied.values()) <= set(stored):
        raise FormatError("the list of names does not fit the tensors")


def tensor_spec(tensor: Mapping[str, Any]) -> Array:
    """A stand-in for a tensor as the header describes it. FormatError if there can be none."""
    shape, dtype = tensor["shape"], np.dtype(tensor["dtype"])
    sound = len(shape) <= _MOST_DIMENSIONS and all(type(size) is int for size in shape)
    if not sound or any(size < 0 for size in shape) or math.prod(shape) > 1 << 48:
        raise FormatError(f"{tensor['name']!r}: impossible shape {shape}"[:200])
    if not is_stored_dtype(dtype):
        raise FormatError(f"{tensor['name']!r}: a file cannot hold {dtype}")
    return stand_in(shape, dtype)


def read_tensor(
    tensor: Mapping[str, Any], files: Mapping[str, SafetensorsFile], crc32: Mapping[str, int]
) -> Encoding:
    """One tensor as the header describes it. FormatError if its parts are damaged or contradict
    that."""
    name = tensor["name"]
    parts = {}
    for part in tensor["parts"]:
        full = part_name(name, part)
        parts[part] = files[full].read(full)
        if crc(parts[part]) != crc32[full]:
            raise FormatError(f"{full!r} is damaged (its checksum does not fit)")
    spec = tensor_spec(tensor)
    try:
        return restore(spec.shape, spec.dtype, tensor["encoding"], parts)
    except FormatError as error:
        raise FormatError(f"{name!r}: {error}") from None


def part_name(name: str, part: str) -> str:
    return f"{name}{_SEPARATOR}{part}" if part else name


def crc(array: Array) -> int:
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
        except (OSError, FoldpruneError):
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


def remove_leftovers(folder: str) -> None:
    """Removes what ``write_atomically`` left in a folder when its process was killed."""
    for name in os.listdir(folder):
        if re.fullmatch(r"\..+\.[0-9a-f]{12}\.tmp", name):
            os.unlink(os.path.join(folder, name))


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
    for i, shard in enumerate(shards):
        file = shard_name(token, i, len(shards))
        write_atomically(
            os.path.join(folder, file), lambda temporary, shard=shard: save_file(shard, temporary)
        )
        weight_map |= dict.fromkeys(shard, file)
    write_index(folder, metadata, weight_map)


def shard_name(token: str, number: int, count: int) -> str:
    return f"foldprune-{token}-{number + 1:05}-of-{count:05}.safetensors"


def write_index(folder: str, metadata: dict[str, str], weight_map: dict[str, str]) -> None:
    """Puts the folder's shards in place of those that it had, which are removed."""
    index = os.path.join(folder, INDEX)
    old = _shards_of(index)
    write_json(index, {"metadata": metadata, "weight_map": weight_map})
    for file in old - set(weight_map.values()):
        if os.path.exists(stale := os.path.join(folder, file)):
            os.unlink(stale)


def write_json(path: str, values: Any) -> None:
    def write(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8") as stream:
            json.dump(values, stream)

    write_atomically(path, write)


def _shards_of(index: str) -> set[str]:
    """Names of our own shards in an existing index, so that nothing else is ever removed."""
    try:
        files = set(read_json(index)["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return set()
    return {
        file
        for file in files
        if isinstance(file, str)
        and os.path.basename(file) == file
        and file.startswith("foldprune-")
    }


def _open_shards(path: str) -> tuple[dict[str, SafetensorsFile], dict[str, str]]:
    try:
        index = read_json(path)
        weight_map: dict[str, str] = dict(index["weight_map"])
        metadata: dict[str, str] = dict(index["metadata"])
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path}: not an index of foldprune: {error!r}") from None
    opened: dict[str, SafetensorsFile] = {}
    for file in weight_map.values():
        if not isinstance(file, str) or os.path.basename(file) != file:
            raise FormatError(f"{path}: shard {file!r} is not a plain file name")
        if file not in opened:
            opened[file] = SafetensorsFile(os.path.join(os.path.dirname(path), file))
    return {
        name: opened[file] for name, file in weight_map.items() if name in opened[file].specs
    }, metadata
