"""torch's threads for the core.

torch's OpenMP threads spin for a while after every operation. A second pool on the same processors
would wait for them, and they for it, at each change between torch's operations and ours.
"""

from __future__ import annotations

import ctypes
import os

import torch

from .. import _core

__all__ = ["share_threads"]


def share_threads() -> bool:
    """Lets the core run in the OpenMP team of torch's own runtime; False where none is found (the
    core then keeps its own pool: other systems than Linux, other builds)."""
    folder = torch.__path__[0]
    # wheels have it in torch/lib, or in torch.libs where it was bundled afterwards
    address = _parallel_of((folder + os.sep, f"{folder}.libs{os.sep}"))
    _core.use_team(address)
    return address != 0


def _parallel_of(folders: tuple[str, ...]) -> int:
    """The address of GOMP_parallel in the OpenMP library that this process has loaded from one of
    the folders; 0 if there is none."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
            mapped = {line.split(maxsplit=5)[-1].strip() for line in file}
    except OSError:
        return 0
    for path in sorted(mapped):
        name = os.path.basename(path)
        if path.startswith(folders) and name.startswith(("libgomp", "libiomp5", "libomp")):
            function = getattr(ctypes.CDLL(path), "GOMP_parallel", None)
            if function is not None:
                return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0
