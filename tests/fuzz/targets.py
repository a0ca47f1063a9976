"""What is fuzzed: functions of bytes that raise nothing but what bad input may raise."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import foldprune
from foldprune import _core, container, encodings
from foldprune.tensor_files import SafetensorsFile, write_safetensors

CORPUS = Path(__file__).parent / "corpus"
REFUSED = (ValueError, TypeError, OSError)  # FormatError and its kin are among them
_DTYPES = [np.dtype(d) for d in ("f4", "f8", "f2", ml_dtypes.bfloat16, "i4", "u1", "i8", "?")]
_MOST = 1 << 22  # numbers that a few bytes may claim: results are that large at most


@contextlib.contextmanager
def _file(data: bytes) -> Any:
    shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        path = os.path.join(folder, "model.safetensors")
        Path(path).write_bytes(data)
        yield path


def read_file(data: bytes) -> None:
    """Any bytes as a safetensors file, dense and compressed."""
    with _file(data) as path:
        with contextlib.suppress(*REFUSED):
            file = SafetensorsFile(path)
            assert sum(file.read(name).nbytes for name in file.specs) <= len(data)
        with contextlib.suppress(*REFUSED):
            dict(foldprune.load(path))


def read_header(data: bytes) -> None:
    """Any text as the header of a sound file's parts, with sound checksums."""
    sample = SafetensorsFile(str(CORPUS / "sample.safetensors"))
    arrays = {name: sample.read(name) for name in sample.specs}
    with contextlib.suppress(*REFUSED, RecursionError):
        header = json.loads(data)
        header["crc32"] = {name: container.crc(array) for name, array in arrays.items()}
        data = json.dumps(header).encode()
    metadata = {
        "foldprune": data.decode("utf-8", "replace"),
        "foldprune_crc32": str(zlib.crc32(data)),
    }
    with _file(b"") as path:
        write_safetensors(path, arrays, arrays.values(), metadata)
        with contextlib.suppress(*REFUSED):
            dict(foldprune.load(path))


class _Bytes:
    """Small choices, made from the front of the bytes; zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def take(self, count: int) -> bytes:
        taken, self.data = self.data[:count], self.data[count:]
        return taken.ljust(count, b"\0")

    def number(self, most: int) -> int:
        return self.take(1)[0] % (most + 1)

    def array(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
        raw = self.take(int(np.prod(shape, dtype=int)) * dtype.itemsize)
        return np.frombuffer(raw, np.uint8).copy().view(dtype).reshape(shape)

    def pick(self, options: Any) -> Any:
        return options[self.number(len(options) - 1)]


_PARTS = (
    "", "mask", "values", "ranks", "pivots", "planes", "columns", "remainder_ranks", "left",
    "right", "0.values", "0.mask", "0.", "1.", "1.values", "1.ranks",
)  # fmt: skip
_PARAMS = (
    "kept", "block", "transposed", "heads", "head_dim", "cols", "groups", "pairing", "segments",
    "interleave",
)  # fmt: skip


def restore(data: bytes) -> None:
    """Any parts and parameters as an encoding."""
    source = _Bytes(data)
    kind = source.pick(("dense", "zeros", "packed", "rows", "planes", "diagonal", "fused", "none"))
    shape = tuple(source.number(40) for _ in range(source.number(3)))
    dtype = source.pick(_DTYPES)
    values: list[Any] = [None, True, "half", "adjacent", -1, 1 << 40, 1 << 70, [2, 2], [0, 1]]

    def value() -> Any:
        return source.number(48) if source.number(3) else source.pick(values)

    described: dict[str, Any] = {source.pick(_PARAMS): value() for _ in range(source.number(6))}
    if kind == "fused" and source.number(3):
        kinds = ("dense", "packed", "rows", "zeros", "fused")
        described["segments"] = [
            {"kind": source.pick(kinds), "rows": value(), source.pick(_PARAMS): value()}
            for _ in range(source.number(3))
        ]
    parts = {}
    for _ in range(source.number(5)):
        part_shape = tuple(source.number(24) for _ in range(source.number(2)))
        parts[source.pick(_PARTS)] = source.array(source.pick(_DTYPES), part_shape)
    with contextlib.suppress(*REFUSED):
        encoding = encodings.restore(shape, dtype, {**described, "kind": kind}, parts)
        dense = encoding.unpack()
        assert dense.shape == shape and dense.dtype == dtype


def unpack(data: bytes) -> None:
    """Any sizes, masks and values in the core's unpackers."""
    source = _Bytes(data)
    rows, cols = source.number(70), source.number(70)
    block = (source.number(9), source.number(9))
    dtype = source.pick(_DTYPES[:4])
    exact = source.number(3)
    bits = (rows * cols + 7) // 8 if exact else source.number(255)
    mask = source.array(np.dtype("u1"), (bits,))
    with contextlib.suppress(*REFUSED):
        grid = -(-rows // max(block[0], 1)) * -(-cols // max(block[1], 1))
        _core.mask_blocks(mask[: (grid + 7) // 8], rows, cols, *block, 1)
    with contextlib.suppress(*REFUSED):
        kept = _core.mask_count(mask, rows * cols)
        values = source.array(dtype, (kept if exact > 1 else source.number(255),))
        dense = _core.unpack(values, mask, (rows, cols), 1)
        again = _core.pack(dense, mask, 1)
        assert again.tobytes() == values.tobytes()


TARGETS: dict[str, Callable[[bytes], None]] = {
    "file": read_file,
    "header": read_header,
    "restore": restore,
    "unpack": unpack,
}
