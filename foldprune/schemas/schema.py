"""How an architecture names and lays out its tensors: data only.

A model is a series of blocks (``encoder.layer.0.``), each with named tensors; everything about a
family stands in one ``Schema``. ``layout.py`` finds these in a state dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Attention", "FeedForward", "Forbidden", "Refusal", "Schema", "Slot"]


@dataclass(frozen=True)
class Slot:
    """Where one logical (out x in) matrix and its bias live: ``<block><name>.weight`` and
    ``.bias``.

    ``part`` of ``parts``: several matrices fused along the output dimension, one after another, or
    head by head if ``interleaved``. ``transposed``: stored (in x out). ``joint``: what stands
    between the name and "weight" or "bias". ``bias``: the slot of the bias, where it is another
    one. In a feed-forward layer's names a ``*`` stands for any number: one layer for each.
    """

    name: str
    part: int = 0
    parts: int = 1
    interleaved: bool = False
    transposed: bool = False
    joint: str = "."
    bias: Slot | None = None

    @property
    def weight_name(self) -> str:
        return f"{self.name}{self.joint}weight"

    @property
    def bias_slot(self) -> Slot:
        return self.bias or self

    @property
    def bias_name(self) -> str:
        return f"{self.bias_slot.name}{self.bias_slot.joint}bias"


@dataclass(frozen=True)
class Attention:
    """An attention of a block. ``rope`` says which rows of a head rotate together: "half" (row i
    with i + head_dim / 2), "adjacent" (2i with 2i + 1), or None. ``scaled``: logits are divided by
    sqrt(head_dim). What is added to the logits whatever query and key are (masks, relative
    positions) does not concern the folds.

    ``cross`` is the attention's name within its block, if key and value read another input than
    query (an encoder's output), which may be of another width.

    The normalisation whose output the block's projections read, without ".weight": ``norm`` in the
    block itself (pre-norm models), or ``norm_before`` in the block before and, for the first one,
    ``norm_first`` outside the blocks (post-norm). Its gain, plus ``norm_offset``, says how large
    each input is; None: unknown. ``norm_cross``: outside the blocks, what key and value read of a
    ``cross`` attention.
    """

    query: Slot
    key: Slot
    value: Slot
    output: Slot
    rope: str | None = None
    scaled: bool = True
    cross: str | None = None
    norm: str | None = None
    norm_before: str | None = None
    norm_first: str | None = None
    norm_cross: str | None = None
    norm_offset: float = 0.0


@dataclass(frozen=True)
class FeedForward:
    """Feed-forward layer of a block: down(act(gate) * up), or down(act(up)) without a gate."""

    up: Slot
    down: Slot
    gate: Slot | None = None


@dataclass(frozen=True)
class Forbidden:
    """If a block, or the model outside the blocks, has a tensor that fits ``pattern`` (a regular
    expression), ``methods`` ("irc", "dwc") are mathematically invalid there."""

    pattern: str
    methods: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Refusal:
    """A configuration's value that makes ``methods`` invalid: any but ``fine`` under one of
    ``keys``. ``default``: what a configuration without them, or none at all, means."""

    keys: tuple[str, ...]
    fine: Any
    default: Any
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
        Regular expression of a block's prefix; its one group is the block's number, if blocks are
        numbered.
    attention, feed_forward
        One, or several of which a block has some: self-attention first, then cross-attention.
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
    heads
        For models of several transformers: a regular expression of what stands before the block,
        to where the configuration has its number of heads ("text_config.num_attention_heads").
    forbidden, refuses
        When folds are invalid: by tensors, and by the configuration.
    note
        For readers of the table of families.
    """

    name: str
    model_types: tuple[str, ...]
    block: str
    attention: Attention | tuple[Attention, ...]
    feed_forward: FeedForward | tuple[FeedForward, ...] | None
    requires: tuple[str, ...] = ()
    block_dense: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    output_embeddings: tuple[str, ...] = ()
    shared_embedding: str | None = None
    dense: tuple[str, ...] = ()
    heads: Mapping[str, str] = field(default_factory=dict)
    forbidden: tuple[Forbidden, ...] = ()
    refuses: tuple[Refusal, ...] = ()
    note: str = ""

    @property
    def attentions(self) -> tuple[Attention, ...]:
        return self.attention if isinstance(self.attention, tuple) else (self.attention,)

    @property
    def feed_forwards(self) -> tuple[FeedForward, ...]:
        forward = self.feed_forward
        return forward if isinstance(forward, tuple) else (forward,) if forward else ()
