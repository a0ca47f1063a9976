"""Loads the OpenBLAS that ``_core`` is linked to, from the package scipy_openblas32.

Importing that package loads it too, but takes as long as half of foldprune: it serves builds.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path


def _load() -> None:
    spec = importlib.util.find_spec("scipy_openblas32")
    folders = (spec.submodule_search_locations if spec is not None else None) or []
    found = [p for folder in folders for p in Path(folder, "lib").glob("libscipy_openblas*.so*")]
    if sys.platform == "linux" and found:
        ctypes.CDLL(str(found[0]), ctypes.RTLD_GLOBAL)
    else:
        import scipy_openblas32  # noqa: F401


_load()
