"""FPP with update against SparseGPT in torch: time for the 210 matrices of SmolLM2-135M's blocks at
70 %, second moments given, both on two threads. Random weights, inputs with a decaying spectrum.

    python tests/bench/bench_fit.py [repeats]

One layer's seven matrices are timed `repeats` times (3); 30 times the median is shown.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch

import foldprune  # noqa: F401  (loads OpenBLAS before the core)
from foldprune import _core

THREADS, LAYERS, RATE, DAMPING = 2, 30, 0.7, 0.01
# inputs, and the outputs of the matrices that share them: q k v, o, gate up, down
GROUPS = [(576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,))]

Layer = list[tuple[np.ndarray, list[np.ndarray]]]


def layer() -> Layer:
    rng = np.random.default_rng(0)
    out: Layer = []
    for d, outputs in GROUPS:
        basis = np.linalg.qr(rng.standard_normal((d, d)))[0]
        x = rng.standard_normal((4 * d, d)) * np.arange(1, d + 1) ** -0.7
        x = (x @ basis) * np.exp(rng.standard_normal(d) / 2)
        c = x.T @ x / len(x)
        h = c + DAMPING * np.trace(c) / d * np.eye(d)
        out.append((h, [rng.standard_normal((rows, d), np.float32) for rows in outputs]))
    return out


def sparsegpt(w: torch.Tensor, h: torch.Tensor, block: int = 128) -> torch.Tensor:
    """Frantar & Alistarh 2023, algorithm 1: columns in blocks, a threshold for each block. h is
    damped already; as published, every matrix inverts its own."""
    w, d = w.clone(), w.shape[1]
    h = torch.linalg.cholesky(h)
    h = torch.cholesky_inverse(h)
    u = torch.linalg.cholesky(h, upper=True)
    for begin in range(0, d, block):
        end = min(begin + block, d)
        w1, u1 = w[:, begin:end].clone(), u[begin:end, begin:end]
        q1, err1 = torch.zeros_like(w1), torch.zeros_like(w1)
        price = w1**2 / torch.diag(u1).reshape(1, -1) ** 2
        limit = torch.sort(price.flatten())[0][int(price.numel() * RATE)]
        removed = price <= limit
        for j in range(end - begin):
            q = w1[:, j].clone()
            q[removed[:, j]] = 0
            q1[:, j] = q
            err = (w1[:, j] - q) / u1[j, j]
            w1[:, j:] -= err.unsqueeze(1) @ u1[j, j:].unsqueeze(0)
            err1[:, j] = err
        w[:, begin:end] = q1
        w[:, end:] -= err1 @ u[begin:end, end:]
    return w


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Of all layers, the median of several runs of one."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return LAYERS * median(times)


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    torch.set_num_threads(THREADS)
    data = layer()
    tensors = [(torch.from_numpy(h).float(), [torch.from_numpy(w) for w in ws]) for h, ws in data]

    def published() -> list[torch.Tensor]:
        return [sparsegpt(w, h) for h, ws in tensors for w in ws]

    def factor() -> list[tuple[np.ndarray, np.ndarray]]:
        return [_core.obs_factor(h, THREADS) for h, _ in data]

    factors = factor()

    def sweep() -> list[tuple[np.ndarray, np.ndarray | None]]:
        return [
            _core.obs_sweep(w, a, d, "block", round(RATE * w.size), threads=THREADS)
            for (a, d), (_, ws) in zip(factors, data, strict=True)
            for w in ws
        ]

    swept = sweep()
    flat = [
        (h, w, mask)
        for (h, w), (mask, _) in zip([(h, w) for h, ws in data for w in ws], swept, strict=True)
    ]

    def refit() -> list[np.ndarray]:
        return [_core.refit(w, mask, h, threads=THREADS) for h, w, mask in flat]

    def swap() -> list[tuple[np.ndarray, np.ndarray]]:
        return [_core.swap(w, mask, h, 1, threads=THREADS) for h, w, mask in flat]

    def damage(new: list[np.ndarray]) -> list[np.ndarray]:
        return [_core.damage(w, x, h, THREADS)[0] for (h, w, _), x in zip(flat, new, strict=True)]

    weights = {
        "SparseGPT (torch)": [w.numpy() for w in published()],
        "sweep": [w for _, w in swept if w is not None],
        "least squares": refit(),
        "one round of swaps": [w for _, w in swap()],
    }
    whole = [_core.damage(w, w, h, THREADS)[1].sum() for h, w, _ in flat]
    error = {
        name: np.mean([n.sum() / d for n, d in zip(damage(new), whole, strict=True)])
        for name, new in weights.items()
    }
    base = seconds(published, repeats)
    cost = seconds(lambda: damage(weights["sweep"]), repeats)
    once = seconds(factor, repeats)
    times = {
        "SparseGPT (torch)": base,
        "sweep": once + seconds(sweep, repeats),
        "least squares": seconds(refit, repeats),
        "one round of swaps": seconds(swap, repeats),
    }
    print(f"{LAYERS} layers of SmolLM2-135M's shapes, {RATE:.0%} removed, {THREADS} threads")
    print(f"  {'':22}{'seconds':>9}{'relative error':>17}")
    for name, t in times.items():
        print(f"  {name:22}{t:9.2f}{error[name]:17.4f}")
    print(
        f"  sweep: {base / times['sweep']:.1f} x faster; the factors of H take {once:.2f} s of it"
    )
    print(f"  swaps include their least squares; exact damage takes {cost:.2f} s")


if __name__ == "__main__":
    main()
