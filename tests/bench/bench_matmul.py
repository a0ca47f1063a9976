"""Products with packed matrices against dense and sparse ones of other libraries, in the same run.

    python tests/bench/bench_matmul.py [SECTION ...] [--threads 1 2] [--density 0.3]

The sections are spmm (many tokens), gemv (1 to 4 tokens), training (forward and backward) and
crossover (which kernel is fastest, by tokens and density); by default all are run. Everything
compared is timed in turn, round after round; times are medians, numbers are how many times as fast
as a peer foldprune is. Peers: OpenBLAS (NumPy's), torch dense, torch CSR,
scipy.sparse CSR, and where they are installed SparseProp (training) and OpenVINO with sparse
weights decompression. Extra packages: pip install threadpoolctl scipy sparseprop openvino.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

import foldprune
from foldprune import Packed, _core

Array = np.ndarray[Any, np.dtype[Any]]
Timed = dict[str, Callable[[], object]]

SHAPES = [(3072, 768), (768, 3072), (4096, 11008)]  # out x in
TOKENS = (64, 128, 256, 512, 1024)
CALLS, PAUSE, WARM_UP = 4, 0.1, 0.005
DTYPES = ("float32", "bfloat16", "float16", "int8")


def medians(calls: Timed, rounds: int) -> dict[str, float]:
    """Seconds of every call: in each round every one has a few calls in a row, after a pause in
    which the threads of the one before, which look for more work, go to sleep, and a time in which
    its own wake up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(-(-rounds // CALLS)):
        for name, call in calls.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            call()
            while time.perf_counter() - start < WARM_UP:
                call()
            for _ in range(CALLS):
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def rounds_for(work: float) -> int:
    """Fewer of what takes long; ``work`` in multiplications and additions of dense."""
    return max(CALLS, min(10 * CALLS, int(1e11 / max(work, 1))))


def matrix(rows: int, cols: int, density: float) -> Array:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((rows, cols), np.float32)
    return np.where(rng.random((rows, cols), np.float32) < density, w, np.float32(0))


def activations(tokens: int, features: int) -> Array:
    return np.random.default_rng(1).standard_normal((tokens, features), np.float32)


def ours(packed: Packed, x: Array, threads: int, method: str = "auto") -> Callable[[], object]:
    return lambda: _core.matmul(packed._core, x, None, threads, method)


def line(*cells: object) -> None:
    first, *rest = (f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells)
    print("  " + first.ljust(26) + "".join(c.rjust(12) for c in rest), flush=True)


def dense_peers(w: Array, x: Array) -> Timed:
    out = np.empty((len(x), len(w)), np.float32)
    weight, rows = torch.from_numpy(w), torch.from_numpy(x)
    return {
        "OpenBLAS": lambda: np.matmul(x, w.T, out=out),
        "torch": lambda: torch.nn.functional.linear(rows, weight),
    }


def sparse_peers(w: Array, x: Array) -> Timed:
    import scipy.sparse

    csr, columns = scipy.sparse.csr_matrix(w), np.ascontiguousarray(x.T)
    torch_csr, torch_columns = torch.from_numpy(w).to_sparse_csr(), torch.from_numpy(columns)
    return {"scipy CSR": lambda: csr @ columns, "torch CSR": lambda: torch_csr @ torch_columns}


def openvino_peer(w: Array, x: Array, threads: int) -> Timed:
    """OpenVINO's plugin for CPUs with sparse weights decompression where it has it."""
    if importlib.util.find_spec("openvino") is None:
        return {}
    import openvino as ov
    from openvino import opset13 as ops

    parameter = ops.parameter(list(x.shape), np.float32)
    product = ops.matmul(parameter, ops.constant(w), False, True)
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.5,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = ov.Core().compile_model(ov.Model([product], [parameter]), "CPU", options)
    request = compiled.create_infer_request()
    return {"OpenVINO": lambda: request.infer([x], share_inputs=True, share_outputs=True)}


# ---- sections -----------------------------------------------------------------------------------


def spmm(threads: int, density: float) -> None:
    print(
        f"\nmany tokens, float32, {1 - density:.0%} removed, threads: {threads}; times as fast as"
    )
    line("out x in, tokens", "OpenBLAS", "torch", "scipy CSR", "torch CSR", "OpenVINO", "ms")
    for rows, cols in SHAPES:
        w = matrix(rows, cols, density)
        packed = foldprune.pack(w)
        for tokens in TOKENS:
            x = activations(tokens, cols)
            peers = {**dense_peers(w, x), **openvino_peer(w, x, threads)}
            found = medians(
                {"ours": ours(packed, x, threads), **peers}, rounds_for(rows * cols * tokens)
            )
            if tokens in (64, 512):  # slow: a few rounds will do
                found.update(medians(sparse_peers(w, x), CALLS))
            line(
                f"{rows} x {cols}, {tokens}",
                *(
                    found[name] / found["ours"] if name in found else ""
                    for name in ("OpenBLAS", "torch", "scipy CSR", "torch CSR", "OpenVINO")
                ),
                found["ours"] * 1e3,
            )


def gemv(threads: int, density: float) -> None:
    print(f"\nfew tokens, {1 - density:.0%} removed, threads: {threads}; times as fast as OpenBLAS")
    print("float32 dense (as torch dense), by the dtype of the packed values; memory of dense")
    line("out x in, tokens", *DTYPES, "G weights/s")
    for rows, cols in [(768, 768), *SHAPES, (11008, 4096), (32000, 4096)]:
        w = matrix(rows, cols, density)
        packed = {dtype: foldprune.pack(w, dtype=dtype) for dtype in DTYPES}
        for tokens in (1, 2, 4):
            x = activations(tokens, cols)
            calls = {dtype: ours(packed[dtype], x, threads) for dtype in DTYPES}
            found = medians({**calls, **dense_peers(w, x)}, rounds_for(40 * rows * cols * tokens))
            line(
                f"{rows} x {cols}, {tokens}",
                *(
                    f"{found['OpenBLAS'] / found[d]:.2f} ({found['torch'] / found[d]:.2f})"
                    for d in DTYPES
                ),
                rows * cols * tokens / found["float32"] / 1e9,
            )
        line("  memory", *(packed[dtype].nbytes / w.nbytes for dtype in DTYPES))


def training(threads: int, density: float) -> None:
    print(f"\nforward and backward, 512 tokens, {1 - density:.0%} removed, threads: {threads}")
    line("out x in", "torch, ms", "ours, ms", "x torch", "SparseProp", "x SparseProp")
    for rows, cols in SHAPES:
        w = matrix(rows, cols, density)
        core = foldprune.pack(w)._core
        x, dy = activations(512, cols), activations(512, rows)
        weight = torch.from_numpy(w.copy()).requires_grad_()
        leaf, grad = torch.from_numpy(x).requires_grad_(), torch.from_numpy(dy)

        def dense(weight: Any = weight, leaf: Any = leaf, grad: Any = grad) -> None:
            torch.nn.functional.linear(leaf, weight).backward(grad)
            weight.grad = leaf.grad = None

        def packed(core: Any = core, x: Array = x, dy: Array = dy) -> None:
            _core.matmul(core, x, None, threads)
            _core.matmul_backward(core, dy, threads)
            _core.matmul_gradient(core, dy, x, threads)

        calls: Timed = {"torch": dense, "ours": packed}
        if importlib.util.find_spec("sparseprop") is not None:
            from sparseprop.modules.linear import SparseLinear

            layer = SparseLinear(torch.from_numpy(w))
            tokens = torch.from_numpy(x).view(1, *x.shape).requires_grad_()

            def sparseprop(layer: Any = layer, tokens: Any = tokens, grad: Any = grad) -> None:
                layer(tokens).backward(grad[None])
                tokens.grad = layer.W_val.grad = None

            calls["SparseProp"] = sparseprop
        found = medians(calls, CALLS)
        theirs = found.get("SparseProp")
        line(
            f"{rows} x {cols}",
            found["torch"] * 1e3,
            found["ours"] * 1e3,
            found["torch"] / found["ours"],
            *(("", "") if theirs is None else (theirs * 1e3, theirs / found["ours"])),
        )


def crossover(threads: int, _: float) -> None:
    rows, cols = 3072, 768
    densities = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    print(f"\n{rows} x {cols}, threads: {threads}; the fastest kernel (the chosen one, if another)")
    print("and how many times as fast as OpenBLAS dense that one is, by tokens and share kept")
    line("tokens", *densities)
    dense = {density: matrix(rows, cols, density) for density in densities}
    packed = {density: foldprune.pack(w) for density, w in dense.items()}
    lines = [("forward", tokens) for tokens in (1, 2, 4, 5, 6, 8, 12, 16, 32, 64, 256)]
    for product, tokens in [*lines, ("backward", 512), ("gradient", 512)]:
        x, dy, cells = activations(tokens, cols), activations(tokens, rows), []
        for density, w in dense.items():
            core = packed[density]._core
            calls, peer = products(core, w, x, dy, threads)[product]
            found = medians({**calls, "OpenBLAS": peer}, rounds_for(10 * rows * cols * tokens))
            best = min(calls, key=found.__getitem__)
            chosen = _core.matmul_choice(core, tokens, product)
            label = best[0] if best == chosen else f"{best[0]}({chosen[0]})"
            cells.append(f"{label} {found['OpenBLAS'] / found[chosen]:.2f}")
        line(f"{tokens}, {product}", *cells)


def products(
    core: Any, w: Array, x: Array, dy: Array, threads: int
) -> dict[str, tuple[Timed, Callable[[], object]]]:
    """Each by our methods, and OpenBLAS's."""

    def blas(a: Array, b: Array) -> Callable[[], object]:
        return partial(np.matmul, a, b, out=np.empty((len(a), b.shape[1]), np.float32))

    def by_method(function: Any, *arguments: Any) -> Timed:
        methods = ("vector", "sparse", "dense") if function is _core.matmul else ("sparse", "dense")
        return {m: partial(function, core, *arguments, threads, m) for m in methods}

    return {
        "forward": (by_method(_core.matmul, x, None), blas(x, w.T)),
        "backward": (by_method(_core.matmul_backward, dy), blas(dy, w)),
        "gradient": (by_method(_core.matmul_gradient, dy, x), blas(dy.T, x)),
    }


SECTIONS = {"spmm": spmm, "gemv": gemv, "training": training, "crossover": crossover}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("sections", nargs="*", metavar="section", help=", ".join(SECTIONS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--density", type=float, default=0.3)
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"unknown section {unknown.pop()!r}: expected {', '.join(SECTIONS)}")
    print(f"kernels: {_core.isa()}")
    for section in args.sections or SECTIONS:
        for threads in args.threads:
            torch.set_num_threads(threads)
            with threadpool_limits(threads, user_api="blas"):
                SECTIONS[section](threads, args.density)


if __name__ == "__main__":
    main()
