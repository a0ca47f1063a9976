"""Smaller transformer checkpoints by pruning and by folding attention.

>>> import foldprune
>>> compressed = foldprune.compress(model.state_dict(), 0.3, num_heads=12)  # doctest: +SKIP
>>> print(compressed.report)  # doctest: +SKIP
>>> compressed.save("model.safetensors")  # doctest: +SKIP
>>> model.load_state_dict(foldprune.load("model.safetensors").state_dict())  # doctest: +SKIP
"""

from . import (
    _openblas,  # noqa: F401  (first: loads the library that _core is linked to)
    schemas,
)
from .api import compress
from .calibration import Calibration
from .checkpoints import compress_checkpoint, decompress_checkpoint
from .compressed import Compressed
from .container import load
from .errors import (
    FoldpruneError,
    FoldpruneWarning,
    FoldRefusedWarning,
    FormatError,
    HeadSizeWarning,
    LoadedDenseWarning,
    ModelError,
    ModuleError,
    RateError,
    TensorError,
    TensorTypeError,
    UnmatchedTensorWarning,
)
from .folded import NodesState, folded_attention
from .moments import Moments
from .packed import Packed, pack, packed_matmul
from .recipe import Recipe
from .report import Report, Row, Total
from .sensitivity import Point, Sensitivity, sensitivity
from .verify import Verification, verify
from .version import version as _version

__all__ = [
    "Calibration",
    "Compressed",
    "FoldRefusedWarning",
    "FoldpruneError",
    "FoldpruneWarning",
    "FormatError",
    "HeadSizeWarning",
    "LoadedDenseWarning",
    "ModelError",
    "ModuleError",
    "Moments",
    "NodesState",
    "Packed",
    "Point",
    "RateError",
    "Recipe",
    "Report",
    "Row",
    "Sensitivity",
    "TensorError",
    "TensorTypeError",
    "Total",
    "UnmatchedTensorWarning",
    "Verification",
    "compress",
    "compress_checkpoint",
    "decompress_checkpoint",
    "folded_attention",
    "load",
    "pack",
    "packed_matmul",
    "schemas",
    "sensitivity",
    "verify",
]


def __getattr__(name: str) -> str:
    if name == "__version__":  # read when asked for: it takes longer than the import of foldprune
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
