"""Dense checkpoints on disk: safetensors, sharded indexes, model folders, torch files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from .encodings import Array
from .errors import FormatError, ModelError, TensorTypeError
from .tensors import Checkpoint, from_mapping

__all__ = ["read", "read_config", "read_safetensors"]

_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": "f8",
        "F32": "f4",
        "F16": "f2",
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": "i8",
        "I32": "i4",
        "I16": "i2",
        "I8": "i1",
        "U64": "u8",
        "U32": "u4",
        "U16": "u2",
        "U8": "u1",
        "BOOL": "?",
    }.items()
}
_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
# in the order in which a model folder is searched
_FOLDER_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def read_safetensors(path: str) -> tuple[dict[str, Array], dict[str, str]]:
    """Arrays and metadata of one file, in the file's order. FormatError if it is damaged."""
    try:
        with safe_open(path, framework="numpy") as file:  # validates every offset
            metadata = dict(file.metadata() or {})
    except (SafetensorError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: {error}") from None
    # the library cannot hand out every dtype (float8), so the buffers are viewed here
    with open(path, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        data = np.fromfile(stream, np.uint8)
    arrays: dict[str, Array] = {}
    entries = [
        (entry["data_offsets"], name) for name, entry in header.items() if name != "__metadata__"
    ]
    for (begin, end), name in sorted(entries):
        entry = header[name]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise TensorTypeError(f"{path}: {name!r} has the unsupported dtype {entry['dtype']}")
        raw = data[begin:end]
        if begin % dtype.itemsize:  # the format does not promise alignment
            raw = raw.copy()
        try:
            arrays[name] = raw.view(dtype).reshape(entry["shape"])
        except ValueError as error:
            raise FormatError(f"{path}: {name!r}: {error}") from None
    return arrays, metadata


def read_config(path: str) -> Mapping[str, Any]:
    """A model's config.json (or the folder it is in)."""
    if os.path.isdir(path):
        path = os.path.join(path, "config.json")
    with open(path, encoding="utf-8") as file:
        try:
            config = json.load(file)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ModelError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: a model's configuration is a JSON object")
    return config


def read(path: str) -> Checkpoint:
    """A dense checkpoint by its path; a config.json beside the weights is read too."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file or folder")
    weights = _find_weights(path) if os.path.isdir(path) else path
    if weights.endswith(".index.json"):
        arrays, any_torch = _read_index(weights)
    else:
        arrays, any_torch = _read_file(weights)
    checkpoint = from_mapping(arrays)
    checkpoint.framework = "torch" if any_torch or "torch" in sys.modules else None
    checkpoint.source = path
    config = os.path.join(os.path.dirname(os.path.abspath(weights)), "config.json")
    if os.path.isfile(config):
        checkpoint.config = read_config(config)
        checkpoint.notes.append(
            f"configuration read from {os.path.basename(config)} beside the weights"
        )
    return checkpoint


def _find_weights(folder: str) -> str:
    for name in _FOLDER_FILES:
        if os.path.isfile(candidate := os.path.join(folder, name)):
            return candidate
    files = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    if len(files) == 1:
        return os.path.join(folder, files[0])
    raise FileNotFoundError(
        f"{folder}: expected one of {', '.join(_FOLDER_FILES)} or a single .safetensors file, "
        f"found {', '.join(files) or 'none'}; pass the file itself"
    )


def _read_file(path: str) -> tuple[Mapping[Any, Any], bool]:
    if path.endswith(".safetensors"):
        arrays, metadata = read_safetensors(path)
        if "foldprune" in metadata:
            raise FormatError(f"{path} is already compressed: open it with foldprune.load")
        return arrays, False
    if path.endswith(_TORCH_SUFFIXES):
        return _read_torch(path), True
    raise FormatError(
        f"{path}: unknown kind of file; expected .safetensors, {', '.join(_TORCH_SUFFIXES)}, an "
        "index (.index.json) or a model folder"
    )


def _read_torch(path: str) -> Mapping[Any, Any]:
    try:
        import torch
    except ImportError:
        raise ImportError(f"reading {path} needs PyTorch: pip install 'foldprune[torch]'") from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds for damaged and for unsafe files
        reason = str(error).partition("\n")[0]
        raise FormatError(f"{path}: torch.load(weights_only=True) refused it: {reason}") from None
    if not isinstance(loaded, Mapping):
        raise TensorTypeError(f"{path}: expected a state dict, found {type(loaded).__name__}")
    return loaded


def _read_index(path: str) -> tuple[Mapping[Any, Any], bool]:
    with open(path, encoding="utf-8") as file:
        try:
            weight_map = json.load(file)["weight_map"]
            wanted = {str(name): str(shard) for name, shard in weight_map.items()}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
            raise FormatError(f"{path}: not an index with a 'weight_map'") from None
    folder = os.path.dirname(path)
    shards: dict[str, Mapping[Any, Any]] = {}
    any_torch = False
    for shard in dict.fromkeys(wanted.values()):
        if os.path.basename(shard) != shard:
            raise FormatError(f"{path}: shard {shard!r} is not a plain file name")
        shards[shard], is_torch = _read_file(os.path.join(folder, shard))
        any_torch |= is_torch
    merged = {}
    for name, shard in wanted.items():
        if name not in shards[shard]:
            raise FormatError(f"{path}: {name!r} is not in {shard}")
        merged[name] = shards[shard][name]
    return merged, any_torch
