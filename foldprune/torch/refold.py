"""``refold``: a converted model's heads, trained or not, folded to smaller ranks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from ..compressed import Compressed
from ..encodings import Diagonal, Encoding, Fused, Packed, Planes, Rows
from ..errors import ModelError
from ..options import Progress
from ..recipe import Recipe, pattern_of
from ..schemas.layout import AttentionBlock, Matrix
from .collect import resized, to_compressed
from .convert import convert
from .matching import layout_of
from .sequential import compress

__all__ = ["refold"]


def refold(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    batches: Iterable[Any],
    recipe: Recipe,
    *,
    gradients: int = 16,
    progress: Progress | bool | None = True,
    threads: int | None = None,
) -> torch.nn.Module:
    """Folds the attention of a converted model further, calibrated on it as it is now.

    ``refold`` and ``recover`` in turn let ranks fall step by step. What the recipe does not make
    smaller stays as it is stored: packed matrices with their masks, and heads that are at the
    recipe's rank or below it. An output projection that a fold of the values changes and that was
    pruned is pruned again, as many weights as before, since its columns read other coordinates now.

    Parameters
    ----------
    student
        From ``foldprune.torch.convert``; it is not changed.
    teacher
        A dense model of the same class and configuration. Its modules are copied, its weights are
        not used.
    batches, gradients, progress, threads
        As for ``foldprune.torch.compress``.
    recipe
        ``irc``, ``dwc`` and their overrides. With ``fpp`` it is refused.

    Returns
    -------
    torch.nn.Module
        A new converted model. Parameters that are still there keep ``requires_grad``, new ones
        train.

    Raises
    ------
    ModelError
        (ValueError) a student that is not converted, or a teacher that its weights do not fit.
    ValueError
        A recipe with ``fpp``.
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe: expected a Recipe, got {type(recipe).__name__}")
    if any(
        fields.get("fpp") is not None
        for fields in ({"fpp": recipe.fpp}, *recipe.overrides.values())
    ):
        raise ValueError("recipe: fpp is not for refold, which keeps the masks as they are")
    old = to_compressed(student)
    dense = _with_weights(teacher, old)
    settled = _remaining(dense, old, recipe)
    new = compress(
        dense, batches, recipe=settled, gradients=gradients, progress=progress, threads=threads
    )
    model = convert(dense, _merged(old, new, recipe))
    required = {name: p.requires_grad for name, p in student.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(required.get(name, True))
    return model.train(student.training)


def _with_weights(teacher: torch.nn.Module, compressed: Compressed) -> torch.nn.Module:
    dense = copy.deepcopy(teacher)
    try:
        dense.load_state_dict(compressed.state_dict("torch"))
    except RuntimeError as error:
        raise ModelError(f"the student's weights do not fit the teacher: {error}") from None
    return dense


def _remaining(dense: torch.nn.Module, old: Compressed, recipe: Recipe) -> Recipe:
    """The recipe without what is folded as far already, and with the shares of pruned output
    projections that will change."""
    recipe.check_overrides(old)
    own: dict[str, dict[str, Any]] = {}

    def override(name: str, **fields: Any) -> None:
        own.setdefault(pattern_of(name), {}).update(fields)

    for block in layout_of(dense).attentions:
        query, value = recipe.at(block.query.weight), recipe.at(block.value.weight)
        if _irc_done(old, block, query):
            override(block.query.weight, irc=None)
            override(block.key.weight, irc=None)
        output = old.encodings.get(block.output.weight)
        if _dwc_done(old, block, value.dwc):
            override(block.value.weight, dwc=None)
        elif value.dwc is not None and isinstance(output, Packed):
            share = 1 - output.numbers / int(np.prod(output.shape))
            override(block.output.weight, fpp=share)
    return dataclasses.replace(recipe, overrides={**recipe.overrides, **own})


def _encoding(compressed: Compressed, matrix: Matrix) -> Encoding:
    encoding = compressed.encodings[matrix.weight]
    return encoding.segments[matrix.slot.part] if isinstance(encoding, Fused) else encoding


def _irc_done(old: Compressed, block: AttentionBlock, recipe: Recipe) -> bool:
    encoding = _encoding(old, block.query)
    if recipe.irc is None or not isinstance(encoding, (Rows, Planes)):
        return False
    if recipe.irc_fpp and encoding.mask is None:
        return False
    return recipe.irc == "lossless" or bool(encoding.ranks.mean() <= int(recipe.irc))


def _dwc_done(old: Compressed, block: AttentionBlock, dwc: int | str | None) -> bool:
    encoding = _encoding(old, block.value)
    if dwc is None or not isinstance(encoding, Diagonal):
        return False
    rank = dwc if isinstance(dwc, int) else 0
    return dwc == "lossless" or bool(encoding.remainder_ranks.mean() <= rank)


def _merged(old: Compressed, new: Compressed, recipe: Recipe) -> Compressed:
    """The new encodings, and the old ones of whatever has not changed."""
    stored = {
        name: _kept(encoding, old.encodings[name]) for name, encoding in new.encodings.items()
    }
    before = {row.name: row for row in old.report.rows}
    rows = [
        before[row.name] if stored.get(row.name) is old.encodings.get(row.name) else row
        for row in new.report.rows
    ]
    report = resized(dataclasses.replace(new.report, rows=rows), stored)
    return Compressed(
        list(new), stored, dict(new.tied), report, recipe, old.framework, threads=new.threads
    )


def _kept(new: Encoding, old: Encoding) -> Encoding:
    """The old encoding where it gives the same tensor, and of fused ones the old parts."""
    if np.array_equal(new.unpack(), old.unpack()):
        return old
    if isinstance(new, Fused) and isinstance(old, Fused):
        parts = zip(new.segments, old.segments, strict=True)
        return dataclasses.replace(new, segments=tuple(_kept(n, o) for n, o in parts))
    return new
