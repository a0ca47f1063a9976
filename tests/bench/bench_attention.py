"""Attention over folded heads: time by length, error, and torch's attention in the same run.

    python tests/bench/bench_attention.py [--threads 1 2]

Every head has 64 values; "torch" is scaled_dot_product_attention with 64-dimensional queries and
keys, what the folded head replaces. Times are medians, in ms, of calls in turn, so that other work
on the machine falls on all of them alike.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import numpy as np
import torch

import foldprune
from foldprune import NodesState, _core, folded_attention

HEADS, DIM = 4, 64
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536)
LARGEST = 20.0  # |a * b|


def medians(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats + 1):  # the first is for warming up
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in times.items()}


def rows(rng: np.random.Generator, n: int, size: int, heads: int = HEADS) -> np.ndarray:
    """As a projection leaves them."""
    return rng.standard_normal((1, n, heads, size), np.float32).transpose(0, 2, 1, 3)


def rank1(rng: np.random.Generator, n: int, heads: int = HEADS) -> list[np.ndarray]:
    q, k, v = rows(rng, n, 1, heads), rows(rng, n, 1, heads), rows(rng, n, DIM, heads)
    return [q * np.float32(LARGEST / (np.abs(q).max() * np.abs(k).max())), k, v]


def slope(lengths: tuple[int, ...], times: list[float]) -> float:
    return float(np.polyfit(np.log(lengths), np.log(times), 1)[0])


def bench_slope(threads: int) -> None:
    print(f"\nmethod='nodes', largest |a b| = {LARGEST:g}, ms by length")
    for causal in (False, True):
        times, nodes = [], []
        for n in LENGTHS:
            arrays = rank1(np.random.default_rng(n), n)
            args = (1.0, causal, None, "nodes", 1e-6, threads)
            call = {"nodes": lambda a=arrays, o=args: _core.attention(*a, *o)}
            times.append(medians(call, 5)["nodes"])
            nodes.append(int(_core.attention(*arrays, *args)[2].max()))
        print(
            f"  causal={causal!s:6}"
            + "".join(
                f"{n:>8}: {t:7.1f} ({p})" for n, t, p in zip(LENGTHS, times, nodes, strict=True)
            )
            + f"   slope {slope(LENGTHS, times):.2f}"
        )


def bench_error() -> None:
    print("\nerror to float64 softmax over max |v|, n = 4096: nodes / exact (nodes used)")
    for largest in (5, 10, 20, 40):
        line = f"  |a b| <= {largest:3}"
        for causal in (False, True):
            q, k, v = rank1(np.random.default_rng(largest), 4096, 1)
            q = q * np.float32(largest / LARGEST)
            expected = np.empty((1, 1, 4096, DIM))
            for i in range(0, 4096, 512):
                s = q[0, 0, i : i + 512].astype(float) @ k[0, 0].T.astype(float)
                if causal:
                    s[np.arange(4096)[None] > np.arange(i, i + 512)[:, None]] = -np.inf
                p = np.exp(s - s.max(axis=1, keepdims=True))
                expected[0, 0, i : i + 512] = p @ v[0, 0].astype(float) / p.sum(1, keepdims=True)
            size = np.abs(v).max()
            out, _, nodes = _core.attention(q, k, v, 1.0, causal, None, "nodes")
            exact = folded_attention(q, k, v, causal=causal, method="exact")
            line += (
                f"   causal={causal!s:6}{np.abs(out - expected).max() / size:.1e}"
                f" / {np.abs(exact - expected).max() / size:.1e} ({nodes.max()})"
            )
        print(line)


def torch_call(
    arrays: list[np.ndarray], causal: bool, dout: np.ndarray | None = None, dropout: float = 0.0
) -> Callable[[], object]:
    tensors = [torch.from_numpy(np.ascontiguousarray(x)) for x in arrays]
    attention = torch.nn.functional.scaled_dot_product_attention
    if dout is None:
        return lambda: attention(*tensors, is_causal=causal)
    leaves = [x.requires_grad_() for x in tensors]
    gradient = torch.from_numpy(dout)
    options = {"is_causal": causal, "dropout_p": dropout}
    return lambda: torch.autograd.grad(attention(*leaves, **options), leaves, gradient)


def own_call(
    arrays: list[np.ndarray],
    causal: bool,
    method: str,
    threads: int,
    dout: np.ndarray | None = None,
    dropout: float = 0.0,
) -> Callable[[], object]:
    scale = 1.0 if arrays[0].shape[3] == 1 else 1 / math.sqrt(arrays[0].shape[3])

    def forward() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return _core.attention(*arrays, scale, causal, None, method, 1e-6, threads, dropout=dropout)

    if dout is None:
        return forward
    return lambda: _core.attention_backward(
        dout, *arrays, *forward(), scale, causal, None, threads, dropout=dropout
    )


def print_ratios(line: str, found: dict[str, float]) -> None:
    """Torch's time, which comes first, and the others' beside it."""
    torchs, *others = found.values()
    line += f"   torch {torchs:8.2f}"
    for name, own in zip(list(found)[1:], others, strict=True):
        line += f"   {name} {own:8.2f} ({torchs / own:5.2f})"
    print(line, flush=True)


def bench_torch(threads: int, backward: bool) -> None:
    what = "forward and backward" if backward else "forward"
    print(f"\n{what}, ms: torch at 64; ours by rank, and torch's time over it")
    for causal in (False, True):
        for n in (128, 256, 512, 1024, 2048, 4096):
            rng = np.random.default_rng(n)
            dout = rng.standard_normal((1, HEADS, n, DIM), np.float32) if backward else None
            full = [rows(rng, n, 64), rows(rng, n, 64), rows(rng, n, DIM)]
            folded = [rows(rng, n, 16), rows(rng, n, 16), full[2]]
            one = rank1(rng, n)
            calls = {
                "torch": torch_call(full, causal, dout),
                "64": own_call(full, causal, "exact", threads, dout),
                "16": own_call(folded, causal, "exact", threads, dout),
                "1 exact": own_call(one, causal, "exact", threads, dout),
                "1 auto": own_call(one, causal, "auto", threads, dout),
            }
            found = medians(calls, 11 if n < 2048 else 3)
            print_ratios(f"  causal={causal!s:6}n {n:5}", found)


def bench_dropout(threads: int) -> None:
    print("\nforward and backward with dropout of 0.1, ms: as above")
    for n in (128, 256, 512):
        rng = np.random.default_rng(n)
        dout, values = rng.standard_normal((1, HEADS, n, DIM), np.float32), rows(rng, n, DIM)
        calls = {
            "torch": torch_call([rows(rng, n, 64), rows(rng, n, 64), values], False, dout, 0.1)
        }
        for rank in (64, 16, 8, 1):
            folded = [rows(rng, n, rank), rows(rng, n, rank), values]
            calls[str(rank)] = own_call(folded, False, "exact", threads, dout, 0.1)
        found = medians(calls, 11)
        print_ratios(f"  n {n:5}", found)


def bench_decode() -> None:
    print("\none token, 12 heads, one thread, us: torch at 64 with its cache, NodesState, bytes")
    for n in (512, 4096, 32768):
        rng = np.random.default_rng(n)
        q, k, v = rank1(rng, n, 12)
        bound = float(np.abs(q).max())
        state = NodesState(k, v, -bound, bound)
        one = [x[:, :, :1] for x in (q, k, v)]
        full = [rows(rng, 1, 64, 12), rows(rng, n, 64, 12), v]

        def step(state: NodesState = state, one: list[np.ndarray] = one) -> None:
            state.append(one[1], one[2], threads=1)
            state.attend(one[0], threads=1)

        found = medians({"torch": torch_call(full, False), "state": step}, 51)
        cache = 2 * 12 * n * 64 * 4
        print(
            f"  n {n:6}   torch {1e3 * found['torch']:8.0f}   state {1e3 * found['state']:6.0f}"
            f" ({state.nodes} nodes)   {cache:,} against {state.nbytes:,} bytes"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    print(f"foldprune {foldprune._core.isa()}, torch {torch.__version__}; {HEADS} heads")
    torch.set_num_threads(1)
    bench_error()
    bench_decode()
    for threads in args.threads:
        torch.set_num_threads(threads)
        print(f"\n==== threads: {threads} ====")
        bench_slope(threads)
        bench_torch(threads, backward=False)
        bench_torch(threads, backward=True)
        bench_dropout(threads)


if __name__ == "__main__":
    main()
