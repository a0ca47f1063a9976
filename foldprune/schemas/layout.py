"""Finds a schema's blocks in a state dict, checks that they are whole, and settles the heads."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from ..encodings import Array
from ..errors import ModelError, TensorError, UnmatchedTensorWarning
from .heads import set_heads
from .quantised import block_prefix, find_quantised
from .schema import Attention, FeedForward, Forbidden, Refusal, Schema, Slot

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
    """A logical (out x in) matrix: ``rows`` of the tensor ``weight`` after transposition, those
    that the slot says."""

    slot: Slot
    weight: str
    bias: str | None
    rows: int
    cols: int

    def slot_of(self, name: str) -> Slot:
        """Of its weight or of its bias."""
        return self.slot if name == self.weight else self.slot.bias_slot

    def view(self, array: Array, heads: int) -> Array:
        """The (out x in) matrix in the whole tensor's array: a view, or a copy if it is
        interleaved. ``heads`` is the number of heads that interleaved parts alternate by."""
        return _part(array.T if self.slot.transposed else array, self.slot, heads)

    def bias_view(self, array: Array, heads: int) -> Array:
        """The matrix's piece of the (fused) bias."""
        return _part(array, self.slot.bias_slot, heads)


def _part(array: Array, slot: Slot, heads: int) -> Array:
    if not slot.interleaved:
        size = len(array) // slot.parts
        return array[slot.part * size : (slot.part + 1) * size]
    by_head = array.reshape(heads, slot.parts, -1, *array.shape[1:])
    return by_head[:, slot.part].reshape(-1, *array.shape[1:])


@dataclass
class AttentionBlock:
    """One attention. ``stack`` is what stands before the block's number in its tensors' names.

    ``cross``: key and value read another input than query. ``norm`` and ``norm_cross`` are the
    tensor prefixes of the normalisations that give what query reads and, if ``cross``, what key and
    value read, where known; ``norm_offset`` is added to their gains. ``forbidden`` maps a method to
    the reason why it is invalid here.
    """

    name: str
    query: Matrix
    key: Matrix
    value: Matrix
    output: Matrix
    rope: str | None
    scaled: bool
    heads: int = 0
    groups: int = 0
    stack: str = ""
    cross: bool = False
    norm: str | None = None
    norm_cross: str | None = None
    norm_offset: float = 0.0
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
    them; ``quantised``: weights that pass through untouched with the scales beside them."""

    schema: str | None
    attentions: list[AttentionBlock]
    feed_forwards: list[FeedForwardBlock]
    groups: dict[str, str]
    transposed: set[str]
    notes: list[str]
    head_source: str = ""
    output_embeddings: set[str] = field(default_factory=set)
    output_patterns: tuple[str, ...] = ()
    quantised: set[str] = field(default_factory=set)

    def names_output(self, name: str) -> bool:
        """Whether a tensor of this name, in the checkpoint or not, would give the logits."""
        return _ends_with(self.output_patterns, name)


def find_layout(
    arrays: Mapping[str, Array],
    schemas: Sequence[Schema],
    config: Mapping[str, Any] | None,
    num_heads: int | Mapping[str, int] | None,
    need_heads: bool = True,
    tied: Mapping[str, str] | None = None,
) -> Layout:
    """The layout of a known model. ``num_heads``: of all blocks, or by their names. Without
    ``need_heads`` heads that are not known are left at 0.

    Raises ModelError for an unknown or incomplete one, or one that its configuration contradicts.
    """
    quantised = find_quantised(arrays)
    visible = {name: array for name, array in arrays.items() if name not in quantised.aside}
    if quantised.aside and not any(a.ndim == 2 and block_prefix(n) for n, a in visible.items()):
        return generic_layout(arrays)  # there is nothing to fold
    schema = _choose(visible, schemas, config)
    finder = _Finder(visible, schema)
    layout = finder.find()
    layout.groups.update(dict.fromkeys(quantised.aside, "other"))
    layout.quantised = quantised.scaled
    layout.notes += quantised.notes
    layout.output_embeddings = finder.output_embeddings(tied or {})
    layout.output_patterns = schema.output_embeddings
    set_heads(layout, schema, config or {}, num_heads, need_heads)
    for refusal in schema.refuses:
        if (value := _setting(config or {}, refusal)) != refusal.fine:
            reason = f"{refusal.keys[0]} is {value}: {refusal.reason}"
            for attention in layout.attentions:
                attention.forbidden.update(dict.fromkeys(refusal.methods, reason))
    return layout


def _setting(config: Mapping[str, Any], refusal: Refusal) -> Any:
    rope = config.get("rope_parameters")
    for values in (config, rope if isinstance(rope, Mapping) else {}):
        for key in refusal.keys:
            if values.get(key) is not None:
                return values[key]
    return refusal.default


def generic_layout(arrays: Mapping[str, Array]) -> Layout:
    """Any state dict, for pruning alone: every two-dimensional float tensor is a weight matrix."""
    groups = dict.fromkeys(arrays, "other")
    quantised = find_quantised(arrays)
    untouched = quantised.aside | quantised.scaled
    for name, array in arrays.items():
        if array.ndim == 2 and name not in untouched:
            is_embedding = re.search(r"(^|[._])(embed\w*|wte|wpe|shared)\.", name)
            # integer matrices are buffers (positions, masks) unless they call themselves weights
            if array.dtype.kind not in "iub" or name.endswith("weight"):
                groups[name] = "embedding" if is_embedding else "feed_forward"
    note = (
        "unknown architecture: every two-dimensional weight counts as embedding (by its name) or "
        "feed-forward"
    )
    notes = [note, *quantised.notes]
    return Layout(None, [], [], groups, set(), notes, quantised=quantised.scaled)


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
    scored = [(_Finder(arrays, schema).score(), schema) for schema in candidates]
    (found, _), schema = max(scored, key=lambda pair: pair[0])
    if not found:
        raise ModelError(
            "unknown model: these tensors fit no schema: "
            f"{_listed(arrays)}. Known are {known}. Register one with "
            "foldprune.schemas.register(Schema(...)), pass config={'model_type': ...} if the "
            "family is "
            "known, or prune alone with recipe=Recipe(fpp=...)"
        )
    return schema


# what torch.compile and wrappers of single blocks put into the names
_WRAPPED = r"(?:(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)*"
_QKV = ("query", "key", "value")


class _Finder:
    def __init__(self, arrays: Mapping[str, Array], schema: Schema) -> None:
        self.arrays = arrays
        self.schema = schema
        # groups: the prefix, the stack, the block's number if there is one, the name in the block
        self.block = re.compile(r"^(((?:.*\.)?)" + schema.block + _WRAPPED + ")(.+)$")
        self.blocks: dict[str, list[str]] = {}  # block prefix -> names relative to it
        self.matches: dict[str, re.Match[str]] = {}  # block prefix -> how it was found
        for name in arrays:
            if match := self.block.match(name):
                self.blocks.setdefault(match[1], []).append(match[match.lastindex or 0])
                self.matches.setdefault(match[1], match)
        # what only looks like a block (a series of other layers) stays outside
        own = {getattr(a, role).weight_name for a in schema.attentions for role in _QKV}
        own.update(schema.requires)
        self.blocks = {p: names for p, names in self.blocks.items() if own.intersection(names)}
        inside = {prefix + name for prefix, names in self.blocks.items() for name in names}
        self.outside = [name for name in arrays if name not in inside]

    def score(self) -> tuple[int, int]:
        """How many of the schema's weights there are, 0 without all required tensors in at least
        one block; and, to tell look-alikes apart, minus the number of tensors that it does not
        know."""
        slots = [getattr(a, role) for a in self.schema.attentions for role in (*_QKV, "output")]
        for forward in self.schema.feed_forwards:
            slots += filter(None, (forward.up, forward.down, forward.gate))
        weight = re.compile("|".join({_pattern(slot.weight_name) for slot in slots}))
        patterns = [_pattern(slot.bias_name) for slot in slots]
        patterns += [*self.schema.block_dense, *(f.pattern for f in self.schema.forbidden)]
        found, unknown = 0, len(self._unknown_outside())
        for names in self.blocks.values():
            present = set(names)
            weights = sum(bool(weight.fullmatch(name)) for name in names)
            unknown += sum(not _any_match(patterns, name) for name in names) - weights
            if all(self._has(present, required) for required in self.schema.requires):
                found += weights
        return found, -unknown

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
        self._find_outside(layout)
        inside = (prefix + name for prefix, names in self.blocks.items() for name in names)
        if deep := [name for name in inside if self.arrays[name].ndim > 2]:
            layout.notes.append(
                f"tensors of more than two dimensions stay dense: {_listed(deep)}. Experts that "
                "are fused in memory are apart in a checkpoint on disk: compress that"
            )
        return layout

    def _find_block(self, layout: Layout, prefix: str, names: list[str]) -> list[str]:
        """Adds one block; its tensors that are not known."""
        present = set(names)
        attentions = [
            self._attention(layout, prefix, attention, present)
            for attention in self.schema.attentions
            if present.intersection(getattr(attention, role).weight_name for role in _QKV)
        ]
        if not attentions:  # to say what is missing
            self._attention(layout, prefix, self.schema.attentions[0], present)
        layout.attentions += attentions
        for forward in self._feed_forwards(present):
            layout.feed_forwards.append(
                self._feed_forward(layout, prefix, forward, present, attentions[0])
            )
        unknown = []
        for name in names:
            if prefix + name in layout.groups:
                continue
            layout.groups[prefix + name] = "other"
            reasons = [f for f in self.schema.forbidden if re.fullmatch(f.pattern, name)]
            _forbid(attentions, reasons)
            if not reasons and not _any_match(self.schema.block_dense, name):
                unknown.append(prefix + name)
        return unknown

    def _attention(
        self, layout: Layout, prefix: str, attention: Attention, present: set[str]
    ) -> AttentionBlock:
        query, key, value, output = (
            self._matrix(prefix, role, getattr(attention, role), present)
            for role in (*_QKV, "output")
        )
        match = self.matches[prefix]
        name = prefix + (attention.cross or "")
        block = AttentionBlock(
            name=name.rstrip(".") or self.schema.name,
            query=query,
            key=key,
            value=value,
            output=output,
            rope=attention.rope,
            scaled=attention.scaled,
            stack=match[2],
            cross=attention.cross is not None,
            norm=self._norm(match, attention),
            norm_offset=attention.norm_offset,
        )
        if attention.norm_cross is not None:
            block.norm_cross = self._nearest(attention.norm_cross, block.stack)
        _check_shapes(block)
        for matrix in (query, key, value):
            self._file(layout, matrix, "qkv")
        self._file(layout, output, "attention_output")
        return block

    def _norm(self, match: re.Match[str], attention: Attention) -> str | None:
        """The normalisation before an attention, by its tensors' prefix."""
        prefix = match[1]
        if attention.norm is not None:
            return prefix + attention.norm
        if attention.norm_before is not None and int(match[3]) > 0:
            start, end = match.span(3)
            return f"{prefix[:start]}{int(match[3]) - 1}{prefix[end:]}{attention.norm_before}"
        return self._nearest(attention.norm_first, match[2]) if attention.norm_first else None

    def _nearest(self, norm: str, stack: str) -> str | None:
        """The one outside the blocks whose name has most in common with the stack's; None if
        several have, and there is no telling which is meant."""
        end = re.compile(r"(^|\.)" + re.escape(norm) + r"\.(weight|gamma)$")
        found = [name.rpartition(".")[0] for name in self.outside if end.search(name)]
        parts = [zip(name.split("."), stack.split("."), strict=False) for name in found]
        common = [len(list(takewhile(lambda pair: pair[0] == pair[1], pairs))) for pairs in parts]
        nearest = [n for n, c in zip(found, common, strict=True) if c == max(common)]
        return nearest[0] if len(nearest) == 1 else None

    def _feed_forwards(self, present: set[str]) -> list[FeedForward]:
        """Those of the schema that a block has, one for each expert."""
        forwards = self.schema.feed_forwards
        found = []
        for forward in forwards:
            up = re.compile(_pattern(forward.up.weight_name))
            matches = [match for name in present if (match := up.fullmatch(name))]
            if "*" not in forward.up.name:
                found += [forward] if matches else []
                continue
            for number in sorted({int(match[1]) for match in matches}):
                slots = {
                    role: replace(slot, name=slot.name.replace("*", str(number)))
                    for role in ("up", "down", "gate")
                    if (slot := getattr(forward, role)) is not None
                }
                found.append(FeedForward(**slots))
        if not found and len(forwards) == 1 and "*" not in forwards[0].up.name:
            return list(forwards)  # to say what is missing
        return found

    def _feed_forward(
        self,
        layout: Layout,
        prefix: str,
        forward: FeedForward,
        present: set[str],
        attention: AttentionBlock,
    ) -> FeedForwardBlock:
        up, down = (
            self._matrix(prefix, role, getattr(forward, role), present) for role in ("up", "down")
        )
        gate = self._matrix(prefix, "gate", forward.gate, present) if forward.gate else None
        block = FeedForwardBlock(attention.name, up, down, gate)
        _check_feed_forward(block, attention.output.rows)
        for matrix in (up, down, *([gate] if gate else [])):
            self._file(layout, matrix, "feed_forward")
        return block

    @staticmethod
    def _file(layout: Layout, matrix: Matrix, group: str) -> None:
        for name in (matrix.weight, matrix.bias):
            if name is not None:
                layout.groups[name] = group
        if matrix.slot.transposed:
            layout.transposed.add(matrix.weight)

    def _matrix(self, prefix: str, role: str, slot: Slot, present: set[str]) -> Matrix:
        weight, bias = slot.weight_name, slot.bias_name
        if weight not in present:
            raise ModelError(
                f"{prefix}{weight} ({role}) is missing; the block has {_listed(sorted(present))}. "
                "A fold needs query, key, value and output together"
            )
        array = self.arrays[prefix + weight]
        if array.ndim != 2:
            raise TensorError(f"{prefix + weight!r}: expected two dimensions, got {array.shape}")
        rows, cols = array.shape[::-1] if slot.transposed else array.shape
        if rows % slot.parts:
            raise TensorError(
                f"{prefix + weight!r}: {rows} outputs do not divide into {slot.parts} parts"
            )
        rows //= slot.parts
        outputs = rows * slot.bias_slot.parts
        if bias in present and self.arrays[prefix + bias].shape != (outputs,):
            raise TensorError(
                f"{prefix + bias!r}: shape {self.arrays[prefix + bias].shape} does not fit the "
                f"weight's {outputs} outputs"
            )
        return Matrix(slot, prefix + weight, prefix + bias if bias in present else None, rows, cols)

    def _find_outside(self, layout: Layout) -> None:
        for name in self.outside:
            is_embedding = _ends_with(self.schema.embeddings, name)
            layout.groups[name] = "embedding" if is_embedding else "other"
        for forbidden in self.schema.forbidden:
            if any(_ends_with((forbidden.pattern,), name) for name in self.outside):
                _forbid(layout.attentions, [forbidden])
        if unmatched := self._unknown_outside():
            message = (
                f"{len(unmatched)} tensor(s) outside the blocks are not part of the schema "
                f"{self.schema.name!r} and stay as they are: {_listed(unmatched)}"
            )
            layout.notes.append(message)
            warnings.warn(message, UnmatchedTensorWarning, stacklevel=6)

    def _unknown_outside(self) -> list[str]:
        known = (
            *self.schema.embeddings,
            *self.schema.dense,
            *(f.pattern for f in self.schema.forbidden),
        )
        return [name for name in self.outside if not _ends_with(known, name)]

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


def _check_shapes(block: AttentionBlock) -> None:
    q, k, v, o = block.query, block.key, block.value, block.output
    if not q.rows or not q.cols:
        raise TensorError(f"{q.weight!r}: empty")
    if k.rows != v.rows or not (block.cross or q.cols == k.cols == v.cols):
        raise TensorError(
            f"{block.name}: query {q.rows}x{q.cols}, key {k.rows}x{k.cols} and value "
            f"{v.rows}x{v.cols} ({q.weight!r}, {k.weight!r}, {v.weight!r}) do not fit each "
            "other"
        )
    if o.cols != q.rows or o.rows != q.cols:
        raise TensorError(
            f"{o.weight!r}: {o.rows}x{o.cols} does not fit {q.weight!r}, {q.rows}x{q.cols}"
        )


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


def _forbid(blocks: Sequence[AttentionBlock], reasons: Sequence[Forbidden]) -> None:
    for forbidden in reasons:
        for block in blocks:
            block.forbidden.update(dict.fromkeys(forbidden.methods, forbidden.reason))


def _pattern(name: str) -> str:
    return re.escape(name).replace(r"\*", r"(\d+)")


def _ends_with(patterns: Sequence[str], name: str) -> bool:
    return any(re.search(r"(^|\.)" + pattern + "$", name) for pattern in patterns)


def _any_match(patterns: Sequence[str], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _listed(names: Any, limit: int = 12) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
