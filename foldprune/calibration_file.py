"""A calibration on disk: one safetensors file and, in its metadata, a versioned JSON header.

Of the symmetric matrices the file holds the lower triangle, row by row. Parts are written straight
from the sums, as a second copy of those might not fit in memory.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from .calibration import TOTALS, Calibration
from .container import write_atomically
from .encodings import Array
from .encodings.base import in_range
from .errors import FormatError
from .moments import Inputs, Sums, Totals

__all__ = ["load", "save"]

VERSION = 1
_KEY = "foldprune_calibration"
_MOST = 1 << 53  # of any count


def save(calibration: Calibration, path: str) -> None:
    """See ``Calibration.save``."""
    parts: dict[str, Array] = {}  # (d, d) matrices and vectors
    inputs = []
    for i, (name, one) in enumerate(calibration._inputs.items()):
        sets = {}
        for kind, sums in zip(("fit", "held"), one.sets, strict=True):
            if sums.second is not None and sums.sum is not None:
                parts[f"inputs.{i}.{kind}.second"] = sums.second
                parts[f"inputs.{i}.{kind}.sum"] = sums.sum
                sets[kind] = {"weight": sums.weight, "rows": sums.rows}
        inputs.append(
            {
                "name": name,
                "width": one.width,
                "sequences": one.sequences,
                "position": one.position,
                **sets,
            }
        )
    header: dict[str, Any] = {
        "version": VERSION,
        "held_out": calibration.held_out,
        "inputs": inputs,
        "shared": calibration.shared,
    }
    for kind, attribute in TOTALS.items():
        header[kind] = []
        for i, (name, totals) in enumerate(getattr(calibration, attribute).items()):
            parts[f"{kind}.{i}"] = totals.sums
            header[kind].append({"name": name, "weight": totals.weight})
    header["crc32"] = {name: _crc(array) for name, array in parts.items()}
    text = json.dumps(header, separators=(",", ":"))
    metadata = {_KEY: text, f"{_KEY}_crc32": str(zlib.crc32(text.encode()))}
    write_atomically(path, _writer(parts, metadata))


def _stored_rows(array: Array) -> Iterator[Array]:
    """A vector whole; of a symmetric matrix, each row up to its diagonal."""
    if array.ndim == 1:
        yield array
    else:
        for i in range(len(array)):
            yield array[i, : i + 1]


def _crc(array: Array) -> int:
    crc = 0
    for row in _stored_rows(array):
        crc = zlib.crc32(row.data, crc)
    return crc


def _stored_size(array: Array) -> int:
    return len(array) if array.ndim == 1 else len(array) * (len(array) + 1) // 2


def _writer(parts: Mapping[str, Array], metadata: Mapping[str, str]) -> Callable[[str], None]:
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, array in parts.items():
        begin, end = end, end + 8 * _stored_size(array)
        header[name] = {
            "dtype": "F64",
            "shape": [_stored_size(array)],
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned

    def write(path: str) -> None:
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for array in parts.values():
                for row in _stored_rows(array):
                    file.write(row.data)

    return write


def load(path: str) -> Calibration:
    """See ``Calibration.load``."""
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder; a calibration is one file")
    try:
        with safe_open(path, framework="numpy") as file:  # validates every offset
            metadata = file.metadata() or {}
            text = metadata.get(_KEY)
            if text is None:
                raise FormatError(
                    "not a calibration; Calibration.save writes them, foldprune.load opens "
                    "compressed checkpoints"
                )
            if str(zlib.crc32(text.encode())) != metadata.get(f"{_KEY}_crc32"):
                raise FormatError("the header is damaged (its checksum does not fit)")
            return _decode(json.loads(text), set(file.keys()), file.get_tensor)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    except (SafetensorError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: damaged or not a safetensors file: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: the header is malformed: {error!r}") from None


def _decode(
    header: Mapping[str, Any], found: set[str], read: Callable[[str], Array]
) -> Calibration:
    if header["version"] != VERSION:
        raise FormatError(
            f"format version {header['version']}, this foldprune reads {VERSION}: install a newer "
            "one"
        )
    if set(header["crc32"]) != found:
        odd = sorted(set(header["crc32"]) ^ found)
        raise FormatError(f"parts that the header and the file disagree on: {odd[:5]}")

    def vector(part: str, size: int | None = None) -> Array:
        array = read(part)
        found.discard(part)
        if array.dtype != np.float64 or array.ndim != 1 or size not in (None, array.size):
            raise FormatError(f"{part!r} is {array.dtype}{array.shape}, expected {size} float64")
        if _crc(array) != header["crc32"][part]:
            raise FormatError(f"{part!r} is damaged (its checksum does not fit)")
        if not np.isfinite(array).all():
            raise FormatError(f"{part!r} has numbers that are not finite")
        return array

    def sums(entry: Mapping[str, Any], i: int, kind: str, width: int) -> Sums:
        if kind not in entry:
            return Sums()
        total = vector(f"inputs.{i}.{kind}.sum", width)  # an array of that width exists
        second = _full(vector(f"inputs.{i}.{kind}.second", width * (width + 1) // 2), width)
        own = entry[kind]
        return Sums(second, total, _weight(own), in_range(own["rows"], 0, _MOST, "rows"))

    calibration = Calibration(held_out=in_range(header["held_out"], 0, _MOST, "held_out"))
    for i, entry in enumerate(header["inputs"]):
        width = in_range(entry["width"], 1, _MOST, "width")
        calibration._inputs[_name(entry, calibration._inputs)] = Inputs(
            width,
            sums(entry, i, "fit", width),
            sums(entry, i, "held", width),
            in_range(entry["sequences"], 0, _MOST, "sequences"),
            in_range(entry["position"], 0, _MOST, "position"),
        )
    for kind, attribute in TOTALS.items():
        known: dict[str, Totals] = getattr(calibration, attribute)
        for i, entry in enumerate(header.get(kind, [])):  # the first files had fewer kinds
            array = vector(f"{kind}.{i}")
            if not array.size or (array < 0).any():
                raise FormatError(f"{kind}.{i}: counts and squares are not negative")
            name = _name(entry, known)
            known[name] = Totals(array, _weight(entry))
            use = calibration.row_use(name)
            if kind.startswith("row_") and (use is None or len(use) != len(array)):
                raise FormatError(f"{kind}.{i}: not of as many rows as were counted")
    for name, source in header["shared"].items():
        calibration.share(name, source)
    if found:
        raise FormatError(f"parts that the header does not use: {sorted(found)[:5]}")
    return calibration


def _name(entry: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    name = entry["name"]
    if not isinstance(name, str) or name.endswith(".weight") or name in known:
        raise FormatError(f"{name!r} is not a layer's name, or there twice")
    return name


def _weight(entry: Mapping[str, Any]) -> float:
    weight = entry["weight"]
    if not isinstance(weight, float) or not math.isfinite(weight) or weight < 0:
        raise FormatError(f"weight {weight!r} is not a sum of weights")
    return weight


def _full(triangle: Array, width: int) -> Array:
    full = np.empty((width, width))
    begin = 0
    for i in range(width):
        row = triangle[begin : begin + i + 1]
        full[i, : i + 1] = row
        full[: i + 1, i] = row
        begin += i + 1
    return full
