"""What ``import foldprune`` brings in, and what it offers."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

import foldprune

HEAVY = ("torch", "transformers", "safetensors.torch", "rich", "matplotlib")


@pytest.mark.parametrize(
    "module", ["foldprune", "foldprune.api", "foldprune.files", "foldprune.verify"]
)
def test_import_brings_in_no_framework(module):
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def test_public_names():
    assert len(foldprune.__all__) == len(set(foldprune.__all__))
    for name in foldprune.__all__:
        assert getattr(foldprune, name) is not None
        assert getattr(foldprune, name).__doc__, name
    assert {"compress", "load", "verify", "Recipe", "Compressed", "Report", "Verification"} <= set(
        foldprune.__all__
    )
    namespace: dict[str, object] = {}
    exec("from foldprune import *", namespace)
    assert set(foldprune.__all__) <= set(namespace)


def test_errors_are_also_the_built_in_ones():
    for name, kind in {
        "TensorError": ValueError,
        "TensorTypeError": TypeError,
        "ModelError": ValueError,
        "RateError": ValueError,
        "FormatError": ValueError,
    }.items():
        error = getattr(foldprune, name)
        assert issubclass(error, kind) and issubclass(error, foldprune.FoldpruneError)
    for name in ("HeadSizeWarning", "UnmatchedTensorWarning"):
        assert issubclass(getattr(foldprune, name), foldprune.FoldpruneWarning)
    assert issubclass(foldprune.FoldpruneWarning, UserWarning)


def test_one_version_string():
    version = importlib.metadata.version("foldprune")
    assert foldprune.__version__ == version


def test_importing_twice_and_from_threads():
    code = """
import threading, importlib
def load():
    import foldprune
    foldprune._core.isa()
threads = [threading.Thread(target=load) for _ in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
import foldprune
importlib.reload(foldprune)
print(foldprune._core.isa())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == foldprune._core.isa()
