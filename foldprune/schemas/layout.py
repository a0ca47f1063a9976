"""Finds a schema's blocks in a state dict, checks that they are whole, and settles the heads."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..encodings import Array
from ..errors import HeadSizeWarning, ModelError, TensorError, UnmatchedTensorWarning
from .heads import ASSUMED_HEAD_DIM, known_head_dim
from .schema import Schema, Slot

__all__ = [
    "AttentionBlock",
    "FeedForwardBlock",
    "Layout",
    "Matrix",
    "find_layout",
    "generic_layout",
]


@dataclass(frozen=True)
class Matrix:
    """A logical (out x in) matrix: rows [begin, end) of the tensor ``weight`` after
    transposition."""

    slot: Slot
    weight: str
    bias: str | None
    begin: int
    end: int
    cols: int

    @property
    def rows(self) -> int:
        return self.end - self.begin

    def view(self, array: Array, heads: int) -> Array:
        """The (out x in) matrix in the whole tensor's array: a view, or a copy if it is
        interleaved. ``heads`` is the number of heads that interleaved parts alternate by."""
        return self._part(array.T if self.slot.transposed else array, heads)

    def bias_view(self, array: Array, heads: int) -> Array:
        """The matrix's piece of the (fused) bias."""
        return self._part(array, heads)

    def _part(self, array: Array, heads: int) -> Array:
        if not self.slot.interleaved:
            return array[self.begin : self.end]
        by_head = array.reshape(heads, self.slot.parts, -1, *array.shape[1:])
        return by_head[:, self.slot.part].reshape(-1, *array.shape[1:])


@dataclass
class AttentionBlock:
    """One self-attention. ``norm`` is the tensor prefix of the normalisation before it, if known;
    ``forbidden`` maps a method to the reason why it is invalid here."""

    name: str
    query: Matrix
    key: Matrix
    value: Matrix
    output: Matrix
    rope: str | None
    scaled: bool
    heads: int = 0
    groups: int = 0
    norm: str | None = None
    forbidden: dict[str, str] = field(default_factory=dict)

    @property
    def head_dim(self) -> int:
        return self.query.rows // self.heads


@dataclass
class FeedForwardBlock:
    name: str
    up: Matrix
    down: Matrix
    gate: Matrix | None


@dataclass
class Layout:
    """What every tensor of a state dict is. ``groups``: name to "embedding", "feed_forward",
    "attention_output", "qkv" or "other"; ``transposed``: weights stored (in x out);
    ``output_embeddings``: what the logits come from, ``output_patterns``: how the schema calls
    them."""

    schema: str | None
    attentions: list[AttentionBlock]
    feed_forwards: list[FeedForwardBlock]
    groups: dict[str, str]
    transposed: set[str]
    notes: list[str]
    head_source: str = ""
    output_embeddings: set[str] = field(default_factory=set)
    output_patterns: tuple[str, ...] = ()

    def names_output(self, name: str) -> bool:
        """Whether a tensor of this name, in the checkpoint or not, would give the logits."""
        return _ends_with(self.output_patterns, name)


def find_layout(
    arrays: Mapping[str, Array],
    schemas: Sequence[Schema],
    config: Mapping[str, Any] | None,
    num_heads: int | None,
    need_heads: bool = True,
    tied: Mapping[str, str] | None = None,
) -> Layout:
    """The layout of a known model. Without ``need_heads`` heads that are not known are left at 0.

    Raises ModelError for an unknown or incomplete one, or one that its configuration contradicts.
    """
    schema = _choose(arrays, schemas, config)
    finder = _Finder(arrays, schema)
    layout = finder.find()
    layout.output_embeddings = finder.output_embeddings(tied or {})
    layout.output_patterns = schema.output_embeddings
    _set_heads(layout, schema, config, num_heads, need_heads)
    for key, (fine, methods, reason) in schema.refuses.items():
        value = (config or {}).get(key)
        if value is None and isinstance(rope := (config or {}).get("rope_parameters"), Mapping):
            value = rope.get(key)
        if value is not None and value != fine:
            for attention in layout.attentions:
                attention.forbidden.update(dict.fromkeys(methods, f"{key} is {value}: {reason}"))
    return layout


def generic_layout(arrays: Mapping[str, Array]) -> Layout:
    """Any state dict, for pruning alone: every two-dimensional float tensor is a weight matrix."""
    groups = dict.fromkeys(arrays, "other")
    for name, array in arrays.items():
        if array.ndim == 2:
            is_embedding = re.search(r"(^|[._])(embed\w*|wte|wpe|shared)\.", name)
            # integer matrices are buffers (positions, masks) unless they call themselves weights
            if array.dtype.kind not in "iub" or name.endswith("weight"):
                groups[name] = "embedding" if is_embedding else "feed_forward"
    note = (
        "unknown architecture: every two-dimensional weight counts as embedding (by its name) or "
        "feed-forward"
    )
    return Layout(None, [], [], groups, set(), [note])


def _choose(
    arrays: Mapping[str, Array], schemas: Sequence[Schema], config: Mapping[str, Any] | None
) -> Schema:
    model_type = (config or {}).get("model_type")
    known = sorted({model for schema in schemas for model in schema.model_types})
    if model_type is not None:
        candidates = [schema for schema in schemas if model_type in schema.model_types]
        if not candidates:
            raise ModelError(
                f"model_type {model_type!r} has no schema; known are {known}. Register one with "
                "foldprune.schemas.register(Schema(...)), or prune alone with "
                "recipe=Recipe(fpp=...)"
            )
    else:
        candidates = list(schemas)
    scored = [(_Finder(arrays, schema).slots_found(), schema) for schema in candidates]
    found, schema = max(scored, key=lambda pair: pair[0])
    if not found:
        raise ModelError(
            "unknown model: these tensors fit no schema: "
            f"{_listed(arrays)}. Known are {known}. Register one with "
            "foldprune.schemas.register(Schema(...)), pass config={'model_type': ...} if the "
            "family is "
            "known, or prune alone with recipe=Recipe(fpp=...)"
        )
    return schema


class _Finder:
    def __init__(self, arrays: Mapping[str, Array], schema: Schema) -> None:
        self.arrays = arrays
        self.schema = schema
        self.block = re.compile(r"^((?:.*\.)?" + schema.block + ")(.+)$")
        self.blocks: dict[str, list[str]] = {}  # block prefix -> names relative to it
        self.outside: list[str] = []
        for name in arrays:
            if match := self.block.match(name):
                self.blocks.setdefault(match[1], []).append(match[3])
            else:
                self.outside.append(name)

    def slots(self) -> dict[str, Slot]:
        attention = self.schema.attention
        slots = {role: getattr(attention, role) for role in ("query", "key", "value", "output")}
        if self.schema.feed_forward is not None:
            forward = self.schema.feed_forward
            slots |= {"up": forward.up, "down": forward.down}
            if forward.gate is not None:
                slots["gate"] = forward.gate
        return slots

    def slots_found(self) -> int:
        """How many of the schema's weights and required tensors there are; 0 without all required
        ones in at least one block."""
        weights = [f"{slot.name}.weight" for slot in self.slots().values()]
        found = 0
        for names in self.blocks.values():
            present = set(names)
            if all(self._has(present, required) for required in self.schema.requires):
                found += sum(weight in present for weight in weights)
        return found

    @staticmethod
    def _has(names: set[str], required: str) -> bool:
        # TensorFlow-era BERT checkpoints call a norm's weight gamma
        return required in names or re.sub(r"\.weight$", ".gamma", required) in names

    def find(self) -> Layout:
        layout = Layout(self.schema.name, [], [], {}, set(), [])
        unknown: list[str] = []
        for prefix, names in self.blocks.items():
            unknown += self._find_block(layout, prefix, names)
        if unknown:
            raise ModelError(
                f"tensors inside the blocks that the schema {self.schema.name!r} does not know, "
                f"so their effect on the folds is unknown: {_listed(unknown)}. Register a schema "
                "that names them (foldprune.schemas.register), or prune alone with "
                "recipe=Recipe(fpp=...)"
            )
        self._find_norms(layout)
        self._find_outside(layout)
        return layout

    def _find_norms(self, layout: Layout) -> None:
        attention = self.schema.attention
        prefixes = list(self.blocks)
        for block, prefix in zip(layout.attentions, prefixes, strict=True):
            match = self.block.match(prefix + "x")
            assert match is not None
            number, start = int(match[2]), match.start(2)
            if attention.norm is not None:
                candidates = [prefix + attention.norm]
            elif number > 0 and attention.norm_before is not None:
                before = prefix[:start] + str(number - 1) + prefix[match.end(2) :]
                candidates = [before + attention.norm_before]
            elif attention.norm_first is not None:
                end = re.compile(r"(^|\.)" + re.escape(attention.norm_first) + r"\.(weight|gamma)$")
                candidates = [name.rpartition(".")[0] for name in self.outside if end.search(name)]
            else:
                candidates = []
            # several: more than one model in the dict, and no telling which is meant
            block.norm = candidates[0] if len(candidates) == 1 else None

    def _find_block(self, layout: Layout, prefix: str, names: list[str]) -> list[str]:
        matrices = {
            role: self._matrix(prefix, role, slot, names) for role, slot in self.slots().items()
        }
        attention = self.schema.attention
        block = AttentionBlock(
            name=prefix.rstrip("."),
            query=matrices["query"],
            key=matrices["key"],
            value=matrices["value"],
            output=matrices["output"],
            rope=attention.rope,
            scaled=attention.scaled,
        )
        self._check_shapes(block)
        layout.attentions.append(block)
        if "up" in matrices:
            forward = FeedForwardBlock(
                block.name, matrices["up"], matrices["down"], matrices.get("gate")
            )
            self._check_feed_forward(forward, block.output.rows)
            layout.feed_forwards.append(forward)
        known = set()
        for role, matrix in matrices.items():
            group = {"output": "attention_output"}.get(
                role, "qkv" if role in ("query", "key", "value") else "feed_forward"
            )
            for name in (matrix.weight, matrix.bias):
                if name is not None:
                    layout.groups[name] = group
                    known.add(name[len(prefix) :])
            if matrix.slot.transposed:
                layout.transposed.add(matrix.weight)
        unknown = []
        for name in names:
            if name in known:
                continue
            layout.groups[prefix + name] = "other"
            reasons = [f for f in self.schema.forbidden if re.fullmatch(f.pattern, name)]
            for forbidden in reasons:
                block.forbidden.update(dict.fromkeys(forbidden.methods, forbidden.reason))
            if not reasons and not _any_match(self.schema.block_dense, name):
                unknown.append(prefix + name)
        return unknown

    def _matrix(self, prefix: str, role: str, slot: Slot, names: list[str]) -> Matrix:
        weight, bias = f"{slot.name}.weight", f"{slot.name}.bias"
        if weight not in names:
            raise ModelError(
                f"{prefix}{weight} ({role}) is missing; the block has {_listed(sorted(names))}. A "
                "fold needs query, key, value and output together"
            )
        array = self.arrays[prefix + weight]
        if array.ndim != 2:
            raise TensorError(f"{prefix + weight!r}: expected two dimensions, got {array.shape}")
        rows, cols = array.shape[::-1] if slot.transposed else array.shape
        if rows % slot.parts:
            raise TensorError(
                f"{prefix + weight!r}: {rows} outputs do not divide into {slot.parts} parts"
            )
        size = rows // slot.parts
        if bias in names and self.arrays[prefix + bias].shape != (rows,):
            raise TensorError(
                f"{prefix + bias!r}: shape {self.arrays[prefix + bias].shape} does not fit the "
                f"weight's {rows} outputs"
            )
        return Matrix(
            slot,
            prefix + weight,
            prefix + bias if bias in names else None,
            slot.part * size,
            (slot.part + 1) * size,
            cols,
        )

    @staticmethod
    def _check_shapes(block: AttentionBlock) -> None:
        q, k, v, o = block.query, block.key, block.value, block.output
        if not q.rows or not q.cols:
            raise TensorError(f"{q.weight!r}: empty")
        if k.rows != v.rows or q.cols != k.cols or q.cols != v.cols:
            raise TensorError(
                f"{block.name}: query {q.rows}x{q.cols}, key {k.rows}x{k.cols} and value "
                f"{v.rows}x{v.cols} ({q.weight!r}, {k.weight!r}, {v.weight!r}) do not fit each "
                "other"
            )
        if o.cols != q.rows or o.rows != q.cols:
            raise TensorError(
                f"{o.weight!r}: {o.rows}x{o.cols} does not fit {q.weight!r}, {q.rows}x{q.cols}"
            )

    @staticmethod
    def _check_feed_forward(block: FeedForwardBlock, hidden: int) -> None:
        up, down, gate = block.up, block.down, block.gate
        shapes = (up.cols, down.rows, down.cols)
        if shapes != (hidden, hidden, up.rows) or (
            gate and (gate.rows, gate.cols) != (up.rows, up.cols)
        ):
            raise TensorError(
                f"{block.name}: the shapes of {up.weight!r} ({up.rows}x{up.cols}) and "
                f"{down.weight!r} ({down.rows}x{down.cols}){' and the gate' if gate else ''} do "
                "not fit each other"
            )

    def _find_outside(self, layout: Layout) -> None:
        unmatched = []
        for name in self.outside:
            if _ends_with(self.schema.embeddings, name):
                layout.groups[name] = "embedding"
            else:
                layout.groups[name] = "other"
                if not _ends_with(self.schema.dense, name):
                    unmatched.append(name)
        if unmatched:
            message = (
                f"{len(unmatched)} tensor(s) outside the blocks are not part of the schema "
                f"{self.schema.name!r} and stay as they are: {_listed(unmatched)}"
            )
            layout.notes.append(message)
            warnings.warn(message, UnmatchedTensorWarning, stacklevel=6)

    def output_embeddings(self, tied: Mapping[str, str]) -> set[str]:
        """The tensors that give the logits; of tied ones, the one that is stored."""
        found = {
            tied.get(name, name)
            for name in (*self.outside, *tied)
            if _ends_with(self.schema.output_embeddings, name)
        }
        shared = self.schema.shared_embedding
        if not found and shared is not None:
            found = {name for name in self.outside if _ends_with((shared,), name)}
        return found


def _ends_with(patterns: Sequence[str], name: str) -> bool:
    return any(re.search(r"(^|\.)" + pattern + "$", name) for pattern in patterns)


def _any_match(patterns: Sequence[str], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _listed(names: Any, limit: int = 12) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _set_heads(
    layout: Layout,
    schema: Schema,
    config: Mapping[str, Any] | None,
    num_heads: int | None,
    need_heads: bool,
) -> None:
    config = config or {}
    configured = next((config[k] for k in ("num_attention_heads", "n_head") if k in config), None)
    if num_heads is not None:
        source = "num_heads"
        _check_count("num_heads", num_heads)
        if configured is not None and configured != num_heads:
            raise ModelError(
                f"num_heads={num_heads} contradicts the configuration's {configured}; pass only one"
            )
    elif configured is not None:
        num_heads, source = configured, "config"
        _check_count("num_attention_heads", num_heads)
    else:
        source = ""
    for block in layout.attentions:
        rows, key_rows = block.query.rows, block.key.rows
        if num_heads is not None:
            if rows % num_heads:
                raise ModelError(
                    f"{block.query.weight!r}: {rows} rows do not divide into {num_heads} heads"
                )
            head_dim = rows // num_heads
            if source == "config" and config.get("head_dim") not in (None, head_dim):
                raise ModelError(
                    f"{block.query.weight!r}: {rows} rows are not num_attention_heads={num_heads} "
                    f"times head_dim={config['head_dim']} of the configuration"
                )
        else:
            forward = next((f.up.rows for f in layout.feed_forwards if f.name == block.name), 0)
            table = known_head_dim(schema.name, block.query.cols, rows, key_rows, forward)
            if table is None and not need_heads:
                continue
            head_dim = table or ASSUMED_HEAD_DIM
            source = source or ("table of known shapes" if table else "assumed")
        if (
            rows % head_dim
            or key_rows % head_dim
            or (rows // head_dim) % (key_rows // head_dim or 1)
        ):
            raise ModelError(
                f"{block.key.weight!r}: {rows} query rows and {key_rows} key rows do not divide "
                f"into heads of {head_dim}; pass num_heads= or config="
            )
        block.heads, block.groups = rows // head_dim, key_rows // head_dim
        if not block.groups:
            raise ModelError(f"{block.key.weight!r}: fewer rows than one head of {head_dim}")
        expected = config.get("num_key_value_heads")
        if source == "config" and expected not in (None, block.groups):
            raise ModelError(
                f"{block.key.weight!r}: {key_rows} rows are {block.groups} key heads of "
                f"{head_dim}, the configuration says num_key_value_heads={expected}"
            )
        if block.rope and head_dim % 2:
            block.forbidden["irc"] = f"a head of {head_dim} rows does not divide into 2-planes"
    layout.head_source = source
    if source == "assumed":
        message = (
            f"head size {ASSUMED_HEAD_DIM} is assumed: this state dict comes without a "
            "configuration and its shape is not a known one. Pass num_heads=... or config=... (a "
            "dict, a config.json or a folder) if that is wrong; folds are wrong with the wrong "
            "head size"
        )
        layout.notes.append(message)
        warnings.warn(message, HeadSizeWarning, stacklevel=5)


def _check_count(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what}={value!r}: expected a whole number")
    if value < 1:
        raise ModelError(f"{what}={value}: expected at least one head")
