"""PyTorch adapters. Importing this package imports torch; ``import foldprune`` does not."""

from .attention import FoldedAttention
from .calibrate import calibrate
from .collect import to_compressed
from .convert import convert
from .dropout import Dropout
from .modules import PackedEmbedding, PackedLinear
from .recover import Recovery, recover
from .refold import refold
from .sequential import compress
from .tensors import from_numpy, to_numpy
from .threads import share_threads
from .training import FPP, Event, Schedule

__all__ = [
    "FPP",
    "Dropout",
    "Event",
    "FoldedAttention",
    "PackedEmbedding",
    "PackedLinear",
    "Recovery",
    "Schedule",
    "calibrate",
    "compress",
    "convert",
    "from_numpy",
    "recover",
    "refold",
    "to_compressed",
    "to_numpy",
]

share_threads()
