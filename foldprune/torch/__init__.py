"""PyTorch adapters. Importing this package imports torch; ``import foldprune`` does not."""

from .tensors import from_numpy, to_numpy

__all__ = ["from_numpy", "to_numpy"]
