"""Streaming a checkpoint of LLaMA-7B's shape in bfloat16, in shards, of random weights.

    python tests/bench/bench_checkpoint.py [--layers N] [--folder FOLDER] [--rate R]

32 layers take 13.5 GB, and as much again for the results; without --layers as many are made as fit
half of what the disk has free. Prints peak memory, MB/s of source, as a share of what plain reading
and writing reach on the same disk, and the throughput of a pool of two processes against one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import foldprune
from foldprune import Recipe
from foldprune.tensor_files import write_safetensors

HIDDEN, FEED_FORWARD, VOCABULARY, LAYERS = 4096, 11008, 32000, 32
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CONFIG = {
    "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FEED_FORWARD,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": VOCABULARY,
}  # fmt: skip
HOW: dict[str, dict[str, Any]] = {
    "fpp per tensor": {"recipe": Recipe(fpp=0.5, fpp_scope="tensor")},
    "fpp global": {"recipe": Recipe(fpp=0.5)},
    "fpp, pivot": {"recipe": Recipe(fpp=0.5, fpp_scope="tensor", dwc="pivot")},
    "rate": {"rate": 0.3},
}


def layer(number: int) -> dict[str, tuple[int, ...]]:
    prefix = f"model.layers.{number}."
    attention = {f"self_attn.{n}_proj.weight": (HIDDEN, HIDDEN) for n in "qkvo"}
    forward = {f"mlp.{n}_proj.weight": (FEED_FORWARD, HIDDEN) for n in ("gate", "up")}
    down = {"mlp.down_proj.weight": (HIDDEN, FEED_FORWARD)}
    norms = {f"{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
    return {prefix + name: s for name, s in {**attention, **forward, **down, **norms}.items()}


def make(folder: Path, layers: int) -> int:
    """One shard a layer, one for the rest; the bytes of all."""
    folder.mkdir()
    rest = {f"{n}.weight": (VOCABULARY, HIDDEN) for n in ("model.embed_tokens", "lm_head")}
    shards = [{**rest, "model.norm.weight": (HIDDEN,)}, *map(layer, range(layers))]
    rng = np.random.default_rng(0)
    weight_map, total = {}, 0
    for i, shapes in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        arrays = {
            name: np.ones(shape, BFLOAT16)
            if len(shape) == 1
            else (rng.standard_normal(shape, np.float32) / 64).astype(BFLOAT16)
            for name, shape in shapes.items()
        }
        write_safetensors(str(folder / file), arrays, arrays.values(), {"format": "pt"})
        weight_map |= dict.fromkeys(shapes, file)
        total += sum(array.nbytes for array in arrays.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return total


def copy_speed(folder: Path, target: Path) -> float:
    """Bytes a second of reading all shards and writing them, synced."""
    began, size = time.perf_counter(), 0
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        size += len(data)
        with open(target, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    duration = time.perf_counter() - began
    target.unlink()
    return size / duration


def forget(folder: Path) -> None:
    """Drops the files from the system's cache, so that the disk is read."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def peak(_: int = 0) -> int:
    """The most memory that this process has had, in bytes."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def measure(how: str, source: str, out: str, workers: int) -> None:
    """In a process of its own: prints seconds, peak bytes of the largest process, share removed."""
    began, peaks, removed = time.perf_counter(), [], 0.0
    if how == "decompress":
        foldprune.decompress_checkpoint(source, out, threads=1)
    elif workers == 1:
        removed = foldprune.compress_checkpoint(source, out, **HOW[how], threads=1).removed
    else:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            removed = foldprune.compress_checkpoint(source, out, **HOW[how], executor=pool).removed
            peaks = list(pool.map(peak, range(8 * workers)))
    print(json.dumps([time.perf_counter() - began, max(peak(), *peaks, 0), removed]))


def run(how: str, source: Path, out: Path, workers: int = 1) -> tuple[float, float, float]:
    forget(source)
    command = [sys.executable, "-W", "ignore", __file__, "--measure", how, source, out, workers]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds, most, removed = json.loads(done.stdout)
    return seconds, most, removed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--how", nargs="*", default=list(HOW), choices=list(HOW))
    args = parser.parse_args()
    each = 2 * sum(int(np.prod(shape)) for shape in layer(0).values())
    room = (shutil.disk_usage(args.folder).free // 2 - 4 * HIDDEN * VOCABULARY) // (2 * each)
    layers = min(LAYERS, int(room)) if args.layers is None else args.layers
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        source = folder / "source"
        size = make(source, layers)
        forget(source)
        speed = copy_speed(source, folder / "copy")
        print(f"{layers} layers, {size / 1e9:.2f} GB; reading and writing {speed / 1e6:.0f} MB/s")
        print("  how               processes  seconds   MB/s  of disk  peak MB  removed")
        for how in args.how:
            serial = 0.0
            for workers in (1, 2):
                out = folder / "out"
                seconds, most, removed = run(how, source, out, workers)
                serial = serial or seconds
                rate = size / seconds
                print(
                    f"  {how:18}{workers:9}{seconds:9.1f}{rate / 1e6:7.0f}{rate / speed:9.2f}"
                    f"{most / 1e6:9.0f}{removed:9.2%}"
                    + (f"   {serial / seconds:.2f} x one process" if workers > 1 else "")
                )
                if workers == 1:
                    shutil.rmtree(out)
            seconds, most, _ = run("decompress", out, folder / "dense")
            print(
                f"  {'decompressed':18}{1:9}{seconds:9.1f}{size / seconds / 1e6:7.0f}"
                f"{size / seconds / speed:9.2f}{most / 1e6:9.0f}"
            )
            shutil.rmtree(out)
            shutil.rmtree(folder / "dense")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))
    else:
        main()
