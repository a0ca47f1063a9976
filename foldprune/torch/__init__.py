"""PyTorch adapters. Importing this package imports torch; ``import foldprune`` does not."""

from .calibrate import calibrate
from .modules import PackedEmbedding, PackedLinear
from .sequential import compress
from .tensors import from_numpy, to_numpy

__all__ = [
    "PackedEmbedding",
    "PackedLinear",
    "calibrate",
    "compress",
    "from_numpy",
    "to_numpy",
]
