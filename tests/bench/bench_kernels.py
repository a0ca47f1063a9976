"""Kernels against memcpy on one thread: time to pack and unpack, per kernel variant, as multiples
of the time memcpy takes to touch the same bytes (elements, values and mask; memcpy touches every
byte of its source and target).

    python tests/bench/bench_kernels.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import ml_dtypes
import numpy as np

import foldprune  # noqa: F401  (loads OpenBLAS before the core)
from foldprune import _core

REPEATS = 15


def best(function: Callable[[], object], inner: int) -> float:
    """Seconds of one call: the best of several runs, as other work on the machine only ever adds
    time."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(inner):
            function()
        times.append((time.perf_counter() - start) / inner)
    return min(times)


def main() -> None:
    rng = np.random.default_rng(0)
    variants = [name for name, (compiled, runs) in _core.isas().items() if compiled and runs]
    print(f"default variant: {_core.isa()}; 70 % removed; multiples of memcpy's time")
    print("  dtype      elements      variant     pack   unpack")
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64):
        for n in (1 << 17, 1 << 20, 1 << 22, 24 << 20):
            x = rng.standard_normal(n, np.float32).astype(dtype)
            score, ties = _core.select([(x, 1.0, None)], int(0.7 * n))
            mask, _ = _core.mask_threshold((x, 1.0, None), score, ties)
            values = _core.pack(x, mask)
            touched = x.nbytes + values.nbytes + mask.nbytes
            source, copied = np.zeros(touched // 2, np.uint8), np.zeros(touched // 2, np.uint8)
            inner = max(1, (1 << 21) // n)
            copy = best(lambda s=source, c=copied: np.copyto(c, s), inner)
            back = np.zeros_like(x)
            for isa in variants:
                pack = best(
                    lambda x=x, m=mask, v=values, isa=isa: _core.pack(x, m, 1, isa, v), inner
                )
                unpack = best(
                    lambda v=values, m=mask, x=back, isa=isa: _core.unpack(
                        v, m, x.shape, 1, isa, x
                    ),
                    inner,
                )
                print(
                    f"  {np.dtype(dtype).name:9}{n:11,}   "
                    f"{isa:>10}{pack / copy:9.2f}{unpack / copy:9.2f}"
                )


if __name__ == "__main__":
    main()
