"""How an architecture names and lays out its tensors: data only.

A model is a series of blocks (``encoder.layer.0.``), each with named tensors; everything about a
family stands in one ``Schema``. ``layout.py`` finds these in a state dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Attention", "FeedForward", "Forbidden", "Schema", "Slot"]


@dataclass(frozen=True)
class Slot:
    """Where one logical (out x in) matrix and its bias live: ``<block><name>.weight`` and
    ``.bias``.

    ``part`` of ``parts``: several matrices fused along the output dimension, one after another, or
    head by head if ``interleaved``. ``transposed``: stored (in x out).
    """

    name: str
    part: int = 0
    parts: int = 1
    interleaved: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Attention:
    """Self-attention of a block. ``rope`` says which rows of a head rotate together: "half" (row i
    with i + head_dim / 2), "adjacent" (2i with 2i + 1), or None. ``scaled``: logits are divided by
    sqrt(head_dim).

    The normalisation whose output the block's projections read, without ".weight": ``norm`` in the
    block itself (pre-norm models), or ``norm_before`` in the block before and, for the first one,
    ``norm_first`` outside the blocks (post-norm). Its gain says how large each input is; None:
    unknown.
    """

    query: Slot
    key: Slot
    value: Slot
    output: Slot
    rope: str | None = None
    scaled: bool = True
    norm: str | None = None
    norm_before: str | None = None
    norm_first: str | None = None


@dataclass(frozen=True)
class FeedForward:
    """Feed-forward layer of a block: down(act(gate) * up), or down(act(up)) without a gate."""

    up: Slot
    down: Slot
    gate: Slot | None = None


@dataclass(frozen=True)
class Forbidden:
    """If a block has a tensor that fits ``pattern`` (a regular expression), ``methods`` ("irc",
    "dwc") are mathematically invalid there."""

    pattern: str
    methods: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Schema:
    """A family of models.

    Parameters
    ----------
    name
        Shown in reports.
    model_types
        The values of ``model_type`` in a Hugging Face config.json that this schema is right for.
    block
        Regular expression of a block's prefix; its one group is the block's number.
    requires
        Tensors (relative to the block) whose presence sets the family apart from look-alikes.
    block_dense, dense
        Regular expressions of tensors that are known and stay dense: inside a block (relative to
        it), and elsewhere.
    embeddings
        Regular expressions of embedding tensors outside the blocks.
    output_embeddings, shared_embedding
        Which of the embeddings turn the last hidden state into logits; and for language models the
        input embedding that does so where the checkpoint has no output embedding of its own.
    refuses
        Configuration values that make methods invalid: key to (value that is fine, methods,
        reason).
    """

    name: str
    model_types: tuple[str, ...]
    block: str
    attention: Attention
    feed_forward: FeedForward | None
    requires: tuple[str, ...] = ()
    block_dense: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    output_embeddings: tuple[str, ...] = ()
    shared_embedding: str | None = None
    dense: tuple[str, ...] = ()
    forbidden: tuple[Forbidden, ...] = ()
    refuses: Mapping[str, tuple[Any, tuple[str, ...], str]] = field(default_factory=dict)
