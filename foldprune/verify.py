"""Whether a compressed checkpoint does what it says, measured against the original."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from . import schemas, tensors
from .compressed import Compressed
from .encodings import Array
from .errors import ModelError, TensorError
from .schemas.layout import AttentionBlock, Layout, find_layout

__all__ = ["BlockCheck", "TensorCheck", "Verification", "verify"]

_TOKENS = 64
# relative error that rounding to a dtype explains: about a hundred units in the last place, which
# is what sums over a few thousand inputs collect
_ROUNDING = {"float64": 1e-12, "float32": 1e-5, "float16": 0.05, "bfloat16": 0.3}


@dataclass(frozen=True)
class BlockCheck:
    """One attention block on random inputs. ``logit_error``: largest absolute error of a logit (up
    to the constant per row that softmax does not see); ``logit_scale``: largest logit;
    ``output_error``: relative error of the attention's output under random attention weights."""

    name: str
    logit_error: float
    logit_scale: float
    output_error: float

    @property
    def relative_logit_error(self) -> float:
        return self.logit_error / self.logit_scale if self.logit_scale else self.logit_error


@dataclass(frozen=True)
class TensorCheck:
    """One tensor. ``error`` is ||W - W'|| / ||W||; where a fold replaced W by an equivalent, the
    error of what it is equivalent in: the block's logits (IRC) or outputs (DWC). ``lossless``:
    None if that was not promised, else whether the promise holds."""

    name: str
    method: str
    error: float
    lossless: bool | None


@dataclass(frozen=True)
class Verification:
    """``lossless``: whether everything that was called lossless, or left dense, is. Truth value:
    the same."""

    blocks: tuple[BlockCheck, ...]
    tensors: tuple[TensorCheck, ...]

    @property
    def lossless(self) -> bool:
        return all(check.lossless is not False for check in self.tensors)

    def __bool__(self) -> bool:
        return self.lossless

    @property
    def failures(self) -> list[TensorCheck]:
        return [check for check in self.tensors if check.lossless is False]

    def to_dict(self) -> dict[str, Any]:
        return {
            "lossless": self.lossless,
            "blocks": [asdict(block) for block in self.blocks],
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }

    def __str__(self) -> str:
        promised = [check for check in self.tensors if check.lossless is not None]
        worst = max(self.tensors, key=lambda check: check.error, default=None)
        lines = [
            f"{len(promised) - len(self.failures)} of {len(promised)} tensors that were promised "
            f"to be lossless are; {len(self.tensors) - len(promised)} others changed"
        ]
        lines += [
            f"  NOT lossless: {check.name} ({check.method}), {check.error:.3g}"
            for check in self.failures
        ]
        if worst is not None:
            lines.append(
                f"largest relative error: {worst.error:.3g} in {worst.name} ({worst.method})"
            )
        for block in self.blocks:
            lines.append(
                f"  {block.name}: logits off by at most {block.logit_error:.3g} of "
                f"{block.logit_scale:.3g}, output by {block.output_error:.3g} (relative)"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def verify(original: Any, compressed: Compressed) -> Verification:
    """Compares a compressed checkpoint with the original (anything that ``compress`` takes).

    Raises ValueError if they are not of the same model.
    """
    checkpoint = tensors.read(original)
    _check_same(checkpoint, compressed)
    before = dict(checkpoint.tensors())
    after = {name: compressed[name] for name in compressed}
    layout = _layout(checkpoint, compressed)
    blocks: dict[str, BlockCheck] = {}
    owner: dict[str | None, str] = {}  # tensor, or None for an absent bias -> its block
    for block in layout.attentions if layout else []:
        if block.heads:
            blocks[block.name] = _check_block(block, before, after)
        for matrix in (block.query, block.key, block.value, block.output):
            owner[matrix.weight] = owner[matrix.bias] = block.name
    checks = [
        _check_tensor(name, row.method, before[name], after[name], blocks.get(owner.get(name, "")))
        for name, row in ((row.name, row) for row in compressed.report.rows)
    ]
    return Verification(tuple(blocks.values()), tuple(checks))


def _check_same(checkpoint: tensors.Checkpoint, compressed: Compressed) -> None:
    missing = [name for name in checkpoint.names if name not in compressed]
    extra = [name for name in compressed if name not in set(checkpoint.names)]
    if missing or extra:
        raise TensorError(
            f"not the same model: {missing[:5]} only in the original, {extra[:5]} only in the "
            "compressed one"
        )
    for row in compressed.report.rows:
        name = row.name
        shape = checkpoint.arrays[checkpoint.tied.get(name, name)].shape
        if shape != row.shape:
            raise TensorError(
                f"{name!r}: {shape} in the original, {row.shape} in the compressed one"
            )


def _layout(checkpoint: tensors.Checkpoint, compressed: Compressed) -> Layout | None:
    if not compressed.report.heads:
        return None
    try:
        return find_layout(
            checkpoint.arrays,
            [schema for schema in schemas.known() if schema.name == compressed.report.schema],
            None,
            compressed.report.heads.get("by_block") or compressed.report.heads["heads"],
        )
    except ModelError:
        return None


def _relative(before: Array, after: Array) -> float:
    if before.dtype.kind not in "fV" and before.dtype != np.dtype("f2"):
        return 0.0 if np.array_equal(before, after) else float("inf")
    a, b = before.astype(np.float64), after.astype(np.float64)
    norm = float(np.linalg.norm(a))
    difference = float(np.linalg.norm(a - b))
    return difference / norm if norm else difference


def _check_tensor(
    name: str, method: str, before: Array, after: Array, block: BlockCheck | None
) -> TensorCheck:
    limit = _ROUNDING.get(before.dtype.name, 0.0)
    error = _relative(before, after)
    if method == "dense" or method.startswith("tied"):
        return TensorCheck(name, method, error, bool(np.array_equal(before, after)))
    if block is None or "FPP" in method:
        return TensorCheck(name, method, error, None)
    parts = method.split(" + ")
    seen = [
        block.relative_logit_error if part.startswith("IRC") else block.output_error
        for part in parts
    ]
    promised = all(part.endswith("lossless") for part in parts)
    worst = max(seen)
    return TensorCheck(name, method, worst, worst <= limit if promised else None)


def _check_block(
    block: AttentionBlock, before: Mapping[str, Array], after: Mapping[str, Array]
) -> BlockCheck:
    """On white random inputs, in float64; the seed is fixed, so a check can be repeated."""
    rng = np.random.default_rng(0)
    x = dict.fromkeys(("query", "key", "value"), rng.standard_normal((_TOKENS, block.query.cols)))
    if block.cross:
        x["key"] = rng.standard_normal((_TOKENS, block.key.cols))
        x["value"] = rng.standard_normal((_TOKENS, block.value.cols))
    probabilities = rng.dirichlet(np.ones(_TOKENS), (block.heads, _TOKENS))
    raw = [_logits(block, arrays, x) for arrays in (before, after)]
    # without rotation softmax does not see a constant per row
    logits = raw if block.rope else [rows - rows.mean(axis=2, keepdims=True) for rows in raw]
    error = float(np.abs(logits[0] - logits[1]).max())
    if error <= 1e-12 * max(float(np.abs(rows).max()) for rows in raw):
        error = 0.0  # rounding of this check itself
    outputs = [_outputs(block, arrays, x, probabilities) for arrays in (before, after)]
    norm = float(np.linalg.norm(outputs[0]))
    difference = float(np.linalg.norm(outputs[0] - outputs[1]))
    return BlockCheck(
        block.name,
        error,
        float(np.abs(logits[0]).max()),
        difference / norm if norm else difference,
    )


def _project(
    block: AttentionBlock, arrays: Mapping[str, Array], role: str, inputs: Mapping[str, Array]
) -> Array:
    """x W^T + b by heads: (heads or groups, tokens, head_dim)."""
    matrix, x = getattr(block, role), inputs[role]
    y = x @ matrix.view(arrays[matrix.weight], block.heads).astype(np.float64).T
    if matrix.bias is not None:
        y = y + matrix.bias_view(arrays[matrix.bias], block.heads).astype(np.float64)
    return y.reshape(len(x), -1, block.head_dim).transpose(1, 0, 2)


def _logits(block: AttentionBlock, arrays: Mapping[str, Array], x: Mapping[str, Array]) -> Array:
    q, k = _project(block, arrays, "query", x), _project(block, arrays, "key", x)
    if block.rope:
        q, k = _rotate(q, block.rope), _rotate(k, block.rope)
    k = np.repeat(k, block.heads // block.groups, axis=0)
    logits: Array = q @ k.transpose(0, 2, 1)
    if block.scaled:
        logits /= np.sqrt(block.head_dim)
    return logits


def _rotate(y: Array, pairing: str) -> Array:
    """Rotary embedding with the usual frequencies; what is checked holds for any."""
    half = y.shape[2] // 2
    angle = np.arange(y.shape[1])[:, None] * 10000.0 ** (-np.arange(half) / half)
    planes = [slice(0, half), slice(half, None)]
    if pairing == "adjacent":
        planes = [slice(0, None, 2), slice(1, None, 2)]
    first, second = y[:, :, planes[0]], y[:, :, planes[1]]
    rotated = np.empty_like(y)
    rotated[:, :, planes[0]] = first * np.cos(angle) - second * np.sin(angle)
    rotated[:, :, planes[1]] = second * np.cos(angle) + first * np.sin(angle)
    return rotated


def _outputs(
    block: AttentionBlock, arrays: Mapping[str, Array], x: Mapping[str, Array], probabilities: Array
) -> Array:
    v = np.repeat(_project(block, arrays, "value", x), block.heads // block.groups, axis=0)
    mixed = (probabilities @ v).transpose(1, 0, 2).reshape(_TOKENS, -1)
    matrix = block.output
    y = mixed @ matrix.view(arrays[matrix.weight], block.heads).astype(np.float64).T
    if matrix.bias is not None:
        y = y + arrays[matrix.bias].astype(np.float64)
    return y
