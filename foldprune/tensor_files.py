"""One file of tensors, safetensors or torch's: what is in it is known without reading the data."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from .encodings import Array
from .errors import FormatError, TensorTypeError
from .tensors import from_mapping

__all__ = [
    "TORCH_SUFFIXES",
    "SafetensorsFile",
    "TorchFile",
    "is_stored_dtype",
    "open_tensors",
    "stand_in",
    "unique",
    "write_safetensors",
]

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
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
_VIEWS = 2  # how often a tensor may be in a torch file: as itself and in a fused one
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def stand_in(shape: Iterable[int], dtype: np.dtype[Any]) -> Array:
    """An array of that shape and dtype that takes no memory, for what only asks about those."""
    return np.broadcast_to(np.zeros((), dtype), tuple(shape))


def is_stored_dtype(dtype: np.dtype[Any]) -> bool:
    """Whether a safetensors file can hold it."""
    return dtype in _NAMES


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's items as a dict; ValueError if a name is there twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return values


class SafetensorsFile:
    """A safetensors file, of which only the header has been read. FormatError if it is damaged.

    ``specs`` holds a stand-in for every tensor, in the file's order; ``tied``: those that are
    another one's memory, and are in ``specs`` too.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.tied: dict[str, str] = {}
        _check_regular(path)
        try:
            with safe_open(path, framework="numpy") as file:  # validates every size and offset
                self.metadata = dict(file.metadata() or {})
        except (SafetensorError, UnicodeDecodeError) as error:
            raise FormatError(f"{path}: {error}") from None
        # the library cannot hand out every dtype (float8), so the numbers are read here
        with open(path, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            try:
                header = json.loads(stream.read(size), object_pairs_hook=unique)
            except ValueError as error:
                raise FormatError(f"{path}: {error}") from None
        header.pop("__metadata__", None)
        self._start = 8 + size
        self._offsets: dict[str, int] = {}
        self.specs: dict[str, Array] = {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype = _DTYPES.get(entry["dtype"])
            if dtype is None:
                raise TensorTypeError(
                    f"{path}: {name!r} has the unsupported dtype {entry['dtype']}"
                )
            self._offsets[name] = entry["data_offsets"][0]
            self.specs[name] = stand_in(entry["shape"], dtype)

    def read(self, name: str) -> Array:
        """The tensor; FormatError if the file has become shorter since it was opened."""
        spec = self.specs[name]
        raw = np.fromfile(
            self.path, np.uint8, spec.nbytes, offset=self._start + self._offsets[name]
        )
        if raw.size < spec.nbytes:
            raise FormatError(f"{self.path}: {name!r} is cut short")
        return raw.view(spec.dtype).reshape(spec.shape)


class TorchFile:
    """As above, of what ``torch.save`` wrote. Opened with ``weights_only``, and its numbers mapped
    rather than read, which also keeps them within the file: torch trusts a pickle's sizes."""

    def __init__(self, path: str) -> None:
        try:
            import torch
        except ImportError:
            raise ImportError(
                f"reading {path} needs PyTorch: pip install 'foldprune[torch]'"
            ) from None
        _check_regular(path)
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _check_zip(path)
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except OSError:
            raise
        except Exception as error:  # torch raises many kinds for damaged and for unsafe files
            reason = str(error).partition("\n")[0]
            raise FormatError(
                f"{path}: torch.load(weights_only=True) refused it: {reason}"
            ) from None
        if not isinstance(loaded, Mapping):
            raise TensorTypeError(f"{path}: expected a state dict, found {type(loaded).__name__}")
        checkpoint = from_mapping(loaded)
        self.tied: dict[str, str] = checkpoint.tied
        self.specs: dict[str, Array] = dict(checkpoint.tensors())
        size = sum(array.nbytes for array in checkpoint.arrays.values())
        if size > _VIEWS * os.path.getsize(path):
            raise FormatError(
                f"{path}: its tensors are {size:,} bytes, the file {os.path.getsize(path):,}: they "
                "are expanded from few numbers, or overlap"
            )

    def read(self, name: str) -> Array:
        """The tensor, mapped to the file."""
        return self.specs[name]


def open_tensors(path: str) -> SafetensorsFile | TorchFile:
    """By the file's suffix. FormatError, TensorTypeError or OSError if it is not what it seems."""
    if path.endswith(".safetensors"):
        return SafetensorsFile(path)
    if path.endswith(TORCH_SUFFIXES):
        return TorchFile(path)
    raise FormatError(
        f"{path}: unknown kind of file; expected .safetensors, {', '.join(TORCH_SUFFIXES)}, an "
        "index (.index.json) or a model folder"
    )


def write_safetensors(
    path: str, specs: Mapping[str, Array], arrays: Iterable[Array], metadata: Mapping[str, str]
) -> None:
    """Writes ``arrays``, one for each of ``specs`` and in their order, one at a time, so that they
    need never be in memory together. What specs hold besides shape and dtype is not used."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, spec in specs.items():
        begin, end = end, end + spec.nbytes
        header[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        made = iter(arrays)
        for spec in specs.values():
            array = next(made)
            if (array.shape, array.dtype) != (spec.shape, spec.dtype):
                raise ValueError(f"{array.dtype}{array.shape} is not {spec.dtype}{spec.shape}")
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            del array  # before the next one is made


def _check_regular(path: str) -> None:
    """Nothing that could block or never end (a pipe, a device) is opened."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise FormatError(f"{path}: not a regular file")


def _check_zip(path: str) -> None:
    """torch stores records as they are: one that is compressed, or that claims more than the file
    has, is none of torch's."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise FormatError(f"{path}: {error}") from None
    packed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
    if packed or sum(record.file_size for record in records) > os.path.getsize(path):
        raise FormatError(f"{path}: compressed or overlapping records; torch.save writes neither")
