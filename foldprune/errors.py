"""Exceptions and warnings. Every exception is also the built-in one a caller would expect."""

from __future__ import annotations

__all__ = [
    "DataError",
    "FoldRefusedWarning",
    "FoldpruneError",
    "FoldpruneWarning",
    "FormatError",
    "HeadSizeWarning",
    "LoadedDenseWarning",
    "ModelError",
    "ModuleError",
    "RateError",
    "TensorError",
    "TensorTypeError",
    "UnmatchedTensorWarning",
]


class FoldpruneError(Exception):
    """Base class of every error that foldprune raises on purpose."""


class TensorError(FoldpruneError, ValueError):
    """A tensor's values or shape cannot be compressed; the message names the tensor."""


class TensorTypeError(FoldpruneError, TypeError):
    """An entry is not a tensor, or of a dtype that weights cannot have."""


class ModelError(FoldpruneError, ValueError):
    """The model is unknown, incomplete, or contradicts its configuration."""


class ModuleError(FoldpruneError, RuntimeError):
    """A torch module or operator was given a tensor that does not fit it: what torch itself raises
    a RuntimeError for."""


class RateError(FoldpruneError, ValueError):
    """The asked rate cannot be reached; the message says which is the largest that can."""


class FormatError(FoldpruneError, ValueError):
    """A file is not a foldprune file, is damaged, or is of a newer version."""


class DataError(FoldpruneError, ValueError):
    """A data set is unknown, incomplete, or its rows do not fit what they are to be."""


class FoldpruneWarning(UserWarning):
    """Base class of foldprune's warnings."""


class FoldRefusedWarning(FoldpruneWarning):
    """A fold that the recipe asks for is invalid for some tensors, which stay as they are."""


class HeadSizeWarning(FoldpruneWarning):
    """The head size was assumed, not known."""


class LoadedDenseWarning(FoldpruneWarning):
    """A compressed tensor has no form to run in where the model uses it, and was unpacked."""


class UnmatchedTensorWarning(FoldpruneWarning):
    """Tensors outside the known architecture were left as they are."""
