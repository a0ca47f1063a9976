"""The core in torch's OpenMP team, against its own pool."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import foldprune
from foldprune import _core

pytest.importorskip("torch")

from foldprune.torch.threads import share_threads


@pytest.fixture
def team() -> Iterator[None]:
    if not share_threads():
        pytest.skip("this torch brings no OpenMP runtime of its own")
    yield
    share_threads()  # whatever the test left


def product(tokens: int, threads: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((300, 200), dtype=np.float32)
    x = rng.standard_normal((tokens, 200), dtype=np.float32)
    return foldprune.packed_matmul(x, foldprune.pack(w * (w > 0.5)), threads=threads)


def test_the_linux_wheel_of_torch_has_one():
    import torch

    if sys.platform == "linux" and "OpenMP" in torch.__config__.parallel_info():
        assert share_threads()


@pytest.mark.parametrize("tokens", [1, 3, 200])
@pytest.mark.parametrize("threads", [2, 5])
def test_the_same_bytes(team, tokens, threads):
    shared = product(tokens, threads)
    _core.use_team(0)
    assert np.array_equal(shared, product(tokens, threads))
    assert np.array_equal(shared, product(tokens, 1))


def test_calls_from_several_threads(team):
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: product(200, 2), range(40)))
    assert all(np.array_equal(result, results[0]) for result in results)


def test_a_child_has_threads_of_its_own(team):
    """OpenMP's do not survive a fork: a child that waited for them would wait for ever."""
    script = """
import os, warnings
import numpy as np, torch, foldprune, foldprune.torch

warnings.simplefilter("ignore", DeprecationWarning)
w = np.eye(300, dtype=np.float32)
packed = foldprune.pack(w)
x = np.ones((200, 300), np.float32)
assert (foldprune.packed_matmul(x, packed, threads=3) == x).all()
child = os.fork()
if not child:
    os._exit(0 if (foldprune.packed_matmul(x, packed, threads=3) == x).all() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_an_address_is_a_number():
    with pytest.raises(TypeError):
        _core.use_team("libgomp")
