"""The C core as an extension module: variants by processor, threads, references, memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import reference

import foldprune  # noqa: F401  (loads the library that _core is linked to)
from foldprune import _core


def normal(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def upper_half(x: np.ndarray, threads: int = 1) -> np.ndarray:
    """The mask of what stays where half of the numbers goes."""
    scored = (x, 1.0, None)
    score, ties = _core.select([scored], x.size // 2, threads=threads)
    mask, used = _core.mask_threshold(scored, score, ties, threads=threads)
    assert used == ties
    return mask


def run(code: str, isa: str | None) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "FOLDPRUNE_ISA"}
    if isa is not None:
        env["FOLDPRUNE_ISA"] = isa
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


@pytest.mark.parametrize("isa", _core.isas())
def test_the_variant_can_be_forced(isa):
    compiled, supported = _core.isas()[isa]
    done = run("import foldprune; print(foldprune._core.isa())", isa)
    if supported:
        assert compiled and done.returncode == 0, done.stderr
        assert done.stdout.strip() == isa
    else:
        assert done.returncode != 0 and "ImportError" in done.stderr


@pytest.mark.parametrize("isa", ["sse9", "AVX2", " scalar"])
def test_an_unknown_variant_makes_import_fail(isa):
    done = run("import foldprune", isa)
    assert done.returncode != 0
    assert "ImportError" in done.stderr and "FOLDPRUNE_ISA" in done.stderr


def test_the_best_variant_is_the_default():
    best = [isa for isa, (compiled, supported) in _core.isas().items() if compiled and supported][
        -1
    ]
    for unset in (None, ""):
        assert run("import foldprune; print(foldprune._core.isa())", unset).stdout.strip() == best
    assert _core.isas()["scalar"] == (True, True)


def test_threads_compute_at_once():
    """Calls from several Python threads share nothing; the lock is free while they compute."""
    shape = (1500, 1001)
    inputs = [normal(shape, seed=i) for i in range(4)]
    want = [upper_half(x).tobytes() for x in inputs]
    got: list[list[bytes]] = [[] for _ in inputs]
    start = threading.Barrier(len(inputs))

    def work(i: int) -> None:
        start.wait()
        for _ in range(3):
            mask = upper_half(inputs[i], threads=2)
            values = _core.pack(inputs[i], mask, 2)
            dense = _core.unpack(values, mask, shape, 2)
            assert np.count_nonzero(dense) == values.size
            got[i].append(mask.tobytes())

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert got == [[mask] * 3 for mask in want]


def test_the_lock_is_released():
    """A long call lets another Python thread count."""
    x = normal((3000, 2000))
    ticks = 0
    stop = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.is_set():
            ticks += 1
            time.sleep(0)  # gives the lock back once the call wants it

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # only a call that releases the lock lets the other thread run
    worker = threading.Thread(target=tick)
    try:
        worker.start()
        before = after = ticks
        for _ in range(100):  # the other thread may be slow to come where processors are busy
            _core.select([(x, 1.0, None)], x.size // 2)
            after = ticks
            if after > before:
                break
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        worker.join()
    assert after > before


def test_references_are_stable():
    rng = np.random.default_rng(0)
    x = normal((24, 16))
    columns = np.ones(16, np.float32)
    mask = reference.bits(rng.random(x.shape) < 0.5)
    values = _core.pack(x, mask)
    grid = np.zeros(3, np.uint8)
    ranks = np.ones(2, np.int32)
    bias = np.ones(24, np.float32)
    heads = (x, bias, x, None, 2, 2)
    scores = _core.rope_scores(heads, False)
    held = [x, columns, mask, values, grid, ranks, bias, scores, np.dtype(np.float32)]

    def everything() -> None:
        scored = (x, 1.0, columns)
        _core.all_finite(x)
        _core.energy(scored)
        _core.histogram([scored])
        score, ties = _core.select([scored], 100)
        _core.mask_threshold(scored, score, ties)
        _core.mask_rows(scored, 3)
        _core.mask_nm(scored, 2, 4)
        _core.block_scores(scored, 4, 4)
        _core.mask_blocks(grid, 24, 16, 4, 4)
        _core.mask_count(mask, x.size)
        _core.pack(x, mask)
        _core.unpack(values, mask, x.shape)
        _core.irc_spectrum(heads)
        _core.irc(heads, ranks, True)
        _core.irc(heads, None, False)
        _core.dwc_spectrum(heads)
        _core.dwc_select(heads, None, 2)
        _core.dwc_remainder(heads, ranks)
        _core.rope_scores(heads, False)
        _core.rope(heads, False, scores, ranks, True)
        for bad in (
            lambda: _core.pack(x, mask[:-1]),
            lambda: _core.unpack(values[:-1], mask, x.shape),
            lambda: _core.select([scored, (x, 1.0, mask)], 1),
            lambda: _core.irc(heads, ranks[:1], True),
            lambda: _core.irc(heads, ranks * 100, True),
            lambda: _core.dwc_select(heads, None, 99),
            lambda: _core.rope(heads, False, scores[:1], ranks, True),
        ):
            with pytest.raises((ValueError, TypeError)):
                bad()

    everything()
    before = [sys.getrefcount(one) for one in held]
    for _ in range(50):
        everything()
    after = [sys.getrefcount(one) for one in held]
    assert after == before


def test_memory_is_stable():
    resource = pytest.importorskip("resource")
    x = normal((200, 200))
    bias = np.ones(200, np.float32)
    heads = (x, bias, x, None, 10, 10)

    def work(times: int) -> int:
        for _ in range(times):
            mask = upper_half(x)
            _core.unpack(_core.pack(x, mask), mask, x.shape)
            _core.irc(heads, None, True)
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    work(20)
    before = work(20)
    # 120 more calls would leak tens of megabytes if one buffer of any kind were kept
    assert work(120) - before < 8 * 1024
