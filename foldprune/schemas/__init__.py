"""Architectures as data. One file per family; ``register`` adds one of your own."""

from __future__ import annotations

from .bert import BERT
from .gpt2 import GPT2
from .llama import LLAMA
from .opt import OPT
from .schema import Attention, FeedForward, Forbidden, Schema, Slot

__all__ = ["Attention", "FeedForward", "Forbidden", "Schema", "Slot", "known", "register"]

_schemas: list[Schema] = [BERT, GPT2, LLAMA, OPT]


def known() -> tuple[Schema, ...]:
    """Every schema, registered ones last."""
    return tuple(_schemas)


def register(schema: Schema) -> None:
    """Adds a family, or replaces the one of the same name."""
    if not isinstance(schema, Schema):
        raise TypeError(f"expected a Schema, got {type(schema).__name__}")
    _schemas[:] = [other for other in _schemas if other.name != schema.name] + [schema]
