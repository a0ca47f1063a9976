"""Dense checkpoints on disk: safetensors, sharded indexes, model folders, torch files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .encodings import Array
from .errors import FormatError, ModelError, TensorError
from .tensor_files import SafetensorsFile, TorchFile, open_tensors, unique
from .tensors import Checkpoint

__all__ = ["Source", "locate", "read", "read_config", "read_json"]

# in the order in which a model folder is searched
_FOLDER_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


@dataclass
class Source:
    """A checkpoint on disk of which no tensor has been read.

    ``specs``: a stand-in for every tensor that is no other one's memory (``tied``); ``files``:
    where it is; ``names``: all, in order. ``folder`` is the one of the weights.
    """

    path: str
    folder: str
    names: list[str] = field(default_factory=list)
    specs: dict[str, Array] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    opened: dict[str, SafetensorsFile | TorchFile] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def any_torch(self) -> bool:
        return any(isinstance(file, TorchFile) for file in self.opened.values())

    def add(self, name: str, path: str) -> None:
        file = self.opened[path]
        self.names.append(name)
        alias = file.tied.get(name)
        if alias is not None and self.files.get(alias) == path:
            self.tied[name] = alias
        else:
            self.specs[name] = file.specs[name]
            self.files[name] = path


def read_json(path: str, hook: Callable[..., Any] | None = None) -> Any:
    """A JSON file's value; ValueError for what is none. ``hook``: see json's
    ``object_pairs_hook``."""
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file, object_pairs_hook=hook)
        except RecursionError:
            raise ValueError("nested too deeply") from None


def read_config(path: str) -> Mapping[str, Any]:
    """A model's config.json (or the folder it is in)."""
    if os.path.isdir(path):
        path = os.path.join(path, "config.json")
    try:
        config = read_json(path)
    except ValueError as error:  # not JSON, or not UTF-8
        raise ModelError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: a model's configuration is a JSON object")
    return config


def read(path: str) -> Checkpoint:
    """A dense checkpoint by its path; a config.json beside the weights is read too."""
    source = locate(path)
    arrays = {name: source.opened[file].read(name) for name, file in source.files.items()}
    framework = "torch" if source.any_torch or "torch" in sys.modules else None
    return Checkpoint(
        arrays, source.tied, framework, source.names, source.config, path, source.notes
    )


def locate(path: str) -> Source:
    """As ``read``, without reading the tensors."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file or folder")
    weights = _find_weights(path) if os.path.isdir(path) else path
    source = Source(path, os.path.dirname(os.path.abspath(weights)))
    if weights.endswith(".index.json"):
        _locate_shards(source, weights)
    else:
        source.opened[weights] = _open(weights)
        for name in source.opened[weights].specs:
            source.add(name, weights)
    if not source.names:
        raise TensorError(f"{path}: holds no tensors: there is nothing to compress")
    config = os.path.join(source.folder, "config.json")
    if os.path.isfile(config):
        source.config = read_config(config)
        source.notes.append("configuration read from config.json beside the weights")
    return source


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


def _open(path: str) -> SafetensorsFile | TorchFile:
    file = open_tensors(path)
    if isinstance(file, SafetensorsFile) and "foldprune" in file.metadata:
        raise FormatError(f"{path} is already compressed: open it with foldprune.load")
    return file


def _locate_shards(source: Source, index: str) -> None:
    try:
        weight_map = read_json(index, unique)["weight_map"]
        wanted = {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{index}: not an index with a 'weight_map': {error!r}") from None
    for name, shard in wanted.items():
        if os.path.basename(shard) != shard:
            raise FormatError(f"{index}: shard {shard!r} is not a plain file name")
        path = os.path.join(os.path.dirname(index), shard)
        if path not in source.opened:
            source.opened[path] = _open(path)
        if name not in source.opened[path].specs:
            raise FormatError(f"{index}: {name!r} is not in {shard}")
        source.add(name, path)
