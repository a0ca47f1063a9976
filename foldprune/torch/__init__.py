"""PyTorch adapters. Importing this package imports torch; ``import foldprune`` does not."""

from .calibrate import calibrate
from .sequential import compress
from .tensors import from_numpy, to_numpy

__all__ = ["calibrate", "compress", "from_numpy", "to_numpy"]
