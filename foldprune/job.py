"""One call of ``compress``: reads the model, applies the methods to its tensors, collects the
results.

What is applied to which tensor is settled in uncalibrated.py and calibrated.py; the methods
themselves are in irc.py, sparse_rows.py, dwc.py, prune.py and fit.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import _core, dwc, irc, schemas, sparse_rows, tensors
from .compressed import Compressed
from .encodings import Array, Dense, Encoding, Fused, nbytes
from .errors import (
    FoldpruneWarning,
    FoldRefusedWarning,
    ModelError,
    TensorError,
    TensorTypeError,
    UnmatchedTensorWarning,
)
from .fold import Fold, Refused, exact_in
from .moments import Moments
from .options import Progress, resolve_config
from .prune import Cut, Pruned, Target
from .recipe import Recipe
from .report import Report, Row
from .schemas.layout import (
    AttentionBlock,
    FeedForwardBlock,
    Layout,
    Matrix,
    find_layout,
    generic_layout,
)

__all__ = ["Job", "head_facts", "residual_terms", "settle_layout"]


@dataclass
class _Result:
    """What became of one tensor."""

    encoding: Encoding
    method: str
    error: float | None = None
    note: str = ""


def head_facts(layout: Layout) -> dict[str, Any]:
    """What the report says of the heads."""
    blocks = [block for block in layout.attentions if block.heads]
    if not blocks:
        return {}
    first = blocks[0]
    facts = {
        "heads": first.heads,
        "key_heads": first.groups,
        "head_dim": first.head_dim,
        "source": layout.head_source,
    }
    if any(block.heads != first.heads for block in blocks):
        facts["by_block"] = {block.name: block.heads for block in blocks}
    return facts


def settle_layout(
    checkpoint: tensors.Checkpoint, recipe: Recipe | None, config: Any, num_heads: int | None
) -> Layout:
    """What the tensors are. Only their shapes and dtypes are looked at. ModelError or TensorError
    for a model that cannot be folded, if it is to be."""
    settled = resolve_config(config)
    settled = checkpoint.config if settled is None else settled
    arrays = checkpoint.arrays
    folds = recipe is None or recipe.folds
    try:
        layout = find_layout(
            arrays, schemas.known(), settled, num_heads, need_heads=folds, tied=checkpoint.tied
        )
    except (ModelError, TensorError) as error:
        if folds:
            raise
        layout = generic_layout(arrays)
        layout.notes.append(f"no schema was used because: {error}")
        warnings.warn("; ".join(layout.notes), UnmatchedTensorWarning, stacklevel=4)
    if recipe is not None:
        recipe.check_overrides(checkpoint.names)
    return layout


def residual_terms(layout: Layout) -> int:
    """How many add up to the last hidden state: the embedding, and an attention and a feed-forward
    layer of every block."""
    return 2 * len(layout.attentions) + 1


@dataclass
class Job:
    """One call of ``compress``: what is known about the model, and what has been settled so far.

    ``segments`` collects the folded parts of a tensor until all are there; ``replaced`` holds new
    output projections (out x in) and biases of DWC, which pruning then starts from.
    """

    checkpoint: tensors.Checkpoint
    layout: Layout
    progress: Progress
    threads: int
    results: dict[str, _Result] = field(default_factory=dict)
    segments: dict[str, dict[int, Encoding]] = field(default_factory=dict)
    methods: dict[str, list[str]] = field(default_factory=dict)
    errors: dict[str, list[float]] = field(default_factory=dict)
    replaced: dict[str, Array] = field(default_factory=dict)
    col_scales: dict[str, Array] = field(default_factory=dict)
    row_scales: dict[str, Array] = field(default_factory=dict)
    tensor_notes: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    done: int = 0
    passes: int = 1  # over all tensors
    # thresholds that were found for more matrices than are here, by rate and granularity
    cuts: Mapping[tuple[float, str], Cut] = field(default_factory=dict)
    terms: int = 0  # what adds up to the model's last hidden state, see uncalibrated._weigh

    @classmethod
    def begin(
        cls,
        source: Any,
        recipe: Recipe | None,
        config: Any,
        num_heads: int | None,
        progress: Progress,
        threads: int,
    ) -> Job:
        checkpoint = tensors.read(source)
        layout = settle_layout(checkpoint, recipe, config, num_heads)
        job = cls(checkpoint, layout, progress, threads, terms=residual_terms(layout))
        job.notes = [*checkpoint.notes, *layout.notes]
        job.check_tensors()
        return job

    @property
    def arrays(self) -> dict[str, Array]:
        return self.checkpoint.arrays

    @property
    def total(self) -> int:
        """Steps that progress counts."""
        return self.passes * len(self.arrays)

    def note(self, text: str) -> None:
        self.notes.append(text)
        warnings.warn(text, FoldpruneWarning, stacklevel=3)

    def check_tensors(self) -> None:
        """Everything that will be read is sound, before anything is computed."""
        self.check_dtypes()
        for name, array in self.arrays.items():
            if tensors.is_weight_dtype(array.dtype):
                contiguous = np.ascontiguousarray(array)
                if not _core.all_finite(contiguous, self.threads):
                    raise TensorError(
                        f"{name!r} holds NaN or Inf; a checkpoint must be finite to be "
                        "compressed. Find the step that broke it, or replace the values "
                        "(numpy.nan_to_num)"
                    )

    def check_dtypes(self) -> None:
        for name, array in self.arrays.items():
            if tensors.is_weight_dtype(array.dtype):
                continue
            if name in self.layout.quantised:  # layout's notes name it
                continue
            if tensors.is_extension_float(array.dtype):
                self.notes.append(f"{name}: {array.dtype} passes through untouched")
            elif self.layout.groups[name] != "other":
                raise TensorTypeError(
                    f"{name!r}: {array.dtype} weights are not supported; convert them to float32, "
                    "float16 or bfloat16 (quantised checkpoints: dequantise first)"
                )

    # ---- folds ----------------------------------------------------------------------------------

    def fold_query_key(
        self,
        block: AttentionBlock,
        ranks: int | Array | None,
        method: str,
        share: float = 0.0,
        moments: Moments | None = None,
        source: Moments | None = None,
    ) -> None:
        """IRC on one block, with ``share`` of what it keeps pruned; left out, with the reason
        noted, where it is invalid or not smaller."""

        def make() -> Fold:
            data = self.threads, moments, source
            if ranks is not None and share:
                return sparse_rows.fold(block, self.arrays, ranks, share, *data)
            return irc.fold(block, self.arrays, ranks, *data)

        matrices = {"query": block.query, "key": block.key}
        self._fold("IRC", matrices, self.refusal(block, "irc", exact=ranks is None), make, method)

    def fold_value(
        self,
        block: AttentionBlock,
        mode: str | int | Array,
        method: str,
        moments: Moments | None = None,
    ) -> None:
        """DWC on one block, as above."""
        exact = isinstance(mode, str) and mode == "lossless"
        fold = self._fold(
            "DWC",
            {"value": block.value},
            self.refusal(block, "dwc", exact),
            lambda: dwc.fold(block, self.arrays, mode, self.threads, moments),
            method,
        )
        if fold is not None:
            self._replace_output(block, fold, method)

    def _fold(
        self,
        name: str,
        matrices: Mapping[str, Matrix],
        reason: str | None,
        make: Callable[[], Fold],
        method: str,
    ) -> Fold | None:
        """Keeps the fold, unless there is a reason not to; the fold if it was kept."""
        if reason is None:
            try:
                fold = make()
            except Refused as error:
                reason = str(error)
            else:
                if self._smaller(fold, matrices):
                    self._keep(fold, matrices, method)
                    return fold
                reason = "the folded form would not be smaller"
        self.refuse(tuple(matrices.values()), f"{name} left out: {reason}")
        return None

    def refusal(self, block: AttentionBlock, method: str, exact: bool) -> str | None:
        """Why "irc" or "dwc" cannot be applied to a block; ``exact``: on its lossless level."""
        if method in block.forbidden:
            return block.forbidden[method]
        changed = (block.query, block.key) if method == "irc" else (block.value, block.output)
        dtypes = [self.arrays[matrix.weight].dtype for matrix in changed]
        for dtype in dtypes:
            if not tensors.is_weight_dtype(dtype):
                return f"{dtype} weights pass through untouched"
        if exact and not exact_in(dtypes[0]):
            return (
                f"in {dtypes[0]} a change of gauge would re-round every weight, which is not "
                "lossless"
            )
        return None

    def refuse(self, matrices: Sequence[Matrix], text: str) -> None:
        for matrix in matrices:
            self.tensor_notes.setdefault(matrix.weight, []).append(text)
        if text not in self.refused:
            self.refused.append(text)
            self.notes.append(text)

    def warn_refused(self) -> None:
        for text in self.refused:
            warnings.warn(text, FoldRefusedWarning, stacklevel=4)

    def _smaller(self, fold: Fold, matrices: Mapping[str, Matrix]) -> bool:
        before = after = 0
        for role, matrix in matrices.items():
            before += matrix.rows * matrix.cols * self.arrays[matrix.weight].dtype.itemsize
            after += nbytes(fold.weights[role])
        return after < before

    def _keep(self, fold: Fold, matrices: Mapping[str, Matrix], method: str) -> None:
        for role, matrix in matrices.items():
            pairs = [(matrix.weight, fold.weights[role])]
            if matrix.bias is not None:
                pairs.append((matrix.bias, fold.biases[role]))
            for name, encoding in pairs:
                self.segments.setdefault(name, {})[matrix.slot_of(name).part] = encoding
                self.methods.setdefault(name, []).append(method)
                self.errors.setdefault(name, []).append(fold.error)

    def _replace_output(self, block: AttentionBlock, fold: Fold, method: str) -> None:
        assert fold.output is not None and fold.output_scale is not None
        name = block.output.weight
        self.replaced[name] = fold.output
        self.col_scales[name] = fold.output_scale
        self.methods.setdefault(name, []).append(method)
        if fold.output_bias is not None:
            assert block.output.bias is not None
            self.replaced[block.output.bias] = fold.output_bias
            self.methods.setdefault(block.output.bias, []).append(method)

    def assemble_folds(self, block: AttentionBlock) -> None:
        """Tensors of the block all or part of which were folded."""
        fused: dict[str, dict[int, Matrix]] = {}
        for matrix in (block.query, block.key, block.value):
            for name in (matrix.weight, matrix.bias):
                if name in self.segments:
                    fused.setdefault(name, {})[matrix.slot_of(name).part] = matrix
        for name, by_part in fused.items():
            matrices = [by_part[part] for part in sorted(by_part)]
            slot = matrices[0].slot_of(name)
            transposed = slot.transposed and name == matrices[0].weight
            if slot.parts == 1 and not transposed:
                encoding = self.segments[name][0]
            else:
                pieces = [self._segment(name, matrix, block.heads) for matrix in matrices]
                interleave = block.heads if slot.interleaved else 0
                encoding = Fused(tuple(pieces), transposed, interleave)
            method = " + ".join(dict.fromkeys(self.methods[name]))
            self.results[name] = _Result(encoding, method, max(self.errors[name]))

    def _segment(self, name: str, matrix: Matrix, heads: int) -> Encoding:
        """A part of a fused tensor: folded, or dense where it was not."""
        if (folded := self.segments[name].get(matrix.slot_of(name).part)) is not None:
            return folded
        array = self.arrays[name]
        view = (
            matrix.view(array, heads) if name == matrix.weight else matrix.bias_view(array, heads)
        )
        return Dense(np.array(view, order="C"))

    # ---- pruning --------------------------------------------------------------------------------

    def target(self, name: str) -> Target | None:
        """The matrix of a tensor, (out x in), if it can be pruned."""
        array = self.arrays[name]
        if array.ndim != 2 or not array.size or not tensors.is_weight_dtype(array.dtype):
            return None
        if name in self.segments:
            self.tensor_notes.setdefault(name, []).append("folded, so not pruned")
            return None
        transposed = name in self.layout.transposed
        matrix = self.replaced.get(name)
        if matrix is None:
            matrix = array.T if transposed else array
        target = Target(name, np.ascontiguousarray(matrix), transposed)
        target.col_scale = self.col_scales.get(name)
        target.row_scale = self.row_scales.get(name)
        return target

    def targets(self, recipe: Recipe) -> list[Target]:
        """The matrices of the recipe's ``fpp_on`` that can be pruned."""
        out = []
        for name in self.arrays:
            at = recipe.at(name)
            if at.fpp is None or self.layout.groups[name] not in at.fpp_on:
                continue
            if (target := self.target(name)) is not None:
                out.append(target)
        return out

    def keep_pruned(self, pruned: Mapping[str, Pruned], label: str) -> None:
        for name, result in pruned.items():
            matrix_size = int(np.prod(result.encoding.shape))
            share = 1 - result.encoding.numbers / matrix_size
            method = " + ".join([*self.methods.get(name, []), f"FPP {share:.1%} {label}"])
            self.results[name] = _Result(result.encoding, method, result.error, result.note)

    def step_target(self, target: Target) -> None:
        self.step(target.name)

    def step(self, name: str) -> None:
        self.done += 1
        self.progress(self.done, self.total, name)

    # ---- what a recipe or a rate asks for -------------------------------------------------------

    def irc_of(self, block: AttentionBlock, recipe: Recipe) -> tuple[int | None, str, float] | None:
        """What ``fold_query_key`` is to do by the recipe: rank (None: lossless), description and
        the share that is pruned."""
        at, of_key = recipe.at(block.query.weight), recipe.at(block.key.weight)
        for what in ("irc", "irc_fpp"):
            if getattr(at, what) != getattr(of_key, what):
                raise ValueError(
                    f"overrides give {block.query.weight!r} and {block.key.weight!r} different "
                    f"{what!r}: they fold together; match both"
                )
        if at.irc is None:
            return None
        if at.irc == "lossless":
            return None, "IRC lossless", 0.0
        share = at.irc_fpp or 0.0
        pruned = f" FPP {share:.1%}" if share else ""
        return int(at.irc), f"IRC {'planes' if block.rope else 'r'}={at.irc}{pruned}", share

    def dwc_of(self, block: AttentionBlock, recipe: Recipe) -> tuple[str | int, str] | None:
        """What ``fold_value`` is to do by the recipe."""
        mode = recipe.at(block.value.weight).dwc
        if mode is None:
            return None
        return mode, f"DWC remainder k={mode}" if isinstance(mode, int) else f"DWC {mode}"

    def neuron_members(self, block: FeedForwardBlock, names: Container[str]) -> list[str]:
        """The layer's matrices, if they are among the names; ValueError if only some are."""
        members = [m.weight for m in (block.up, block.down, block.gate) if m is not None]
        present = [name for name in members if name in names]
        if present and present != members:
            raise ValueError(
                f"{block.name}: fpp_granularity 'neuron' takes {', '.join(members)} together; an "
                "override leaves one of them out"
            )
        return present

    def is_hidden(self, name: str) -> bool:
        """Whether the tensor holds hidden units' rows or columns. ModelError if that is unknown."""
        if self.layout.schema is None and self.layout.groups[name] == "feed_forward":
            raise ModelError(
                "fpp_granularity 'neuron' needs a known architecture, to tell which rows and "
                "columns belong to one hidden unit"
            )
        return self.layout.groups[name] == "feed_forward"

    @property
    def numbers(self) -> int:
        """How many the tensors of the checkpoint hold that methods could remove."""
        own = [self.arrays[n] for n in self.checkpoint.names if n not in self.checkpoint.tied]
        return sum(array.size for array in own if tensors.is_weight_dtype(array.dtype))

    @property
    def folded_numbers(self) -> int:
        """How many the folds have removed so far."""
        return sum(
            self.arrays[name].size - result.encoding.numbers
            for name, result in self.results.items()
        )

    @staticmethod
    def ranks_of(block: AttentionBlock, ranks: Array, name: str) -> tuple[Array | None, str]:
        """Ranks per key head, None if all are whole, and the method's description."""
        whole = block.head_dim // 2 if name == "IRC" and block.rope else block.head_dim
        if np.all(ranks == whole):
            return None, f"{name} lossless"
        span = f"{ranks.min()}" if ranks.min() == ranks.max() else f"{ranks.min()}..{ranks.max()}"
        unit = ("planes" if block.rope else "r") if name == "IRC" else "remainder k"
        return ranks, f"{name} {unit}={span}"

    # ---- the end --------------------------------------------------------------------------------

    def finish(self, recipe: Recipe) -> Compressed:
        rows, encodings = [], {}
        for name in self.checkpoint.names:
            if name in self.checkpoint.tied:
                rows.append(self.tied_row(name))
                continue
            array = self.arrays[name]
            result = self.results.get(name) or self._dense(name, array)
            encodings[name] = result.encoding
            weight = tensors.is_weight_dtype(array.dtype)
            notes = [note for note in (result.note, *self.tensor_notes.get(name, [])) if note]
            rows.append(
                Row(
                    name,
                    self.layout.groups[name],
                    result.method,
                    array.shape,
                    array.dtype.name,
                    array.size if weight else 0,
                    result.encoding.numbers if weight else 0,
                    array.nbytes,
                    nbytes(result.encoding),
                    result.error,
                    "; ".join(notes),
                )
            )
        self.progress(self.total, self.total, "")
        report = Report(rows, self.layout.schema, head_facts(self.layout), self.notes)
        return Compressed(
            self.checkpoint.names,
            encodings,
            self.checkpoint.tied,
            report,
            recipe,
            self.checkpoint.framework,
            threads=self.threads,
        )

    def tied_row(self, name: str) -> Row:
        """The report's row of a name that is another one's tensor."""
        source = self.checkpoint.tied[name]
        array, group = self.arrays[source], self.layout.groups[source]
        return Row(name, group, f"tied to {source}", array.shape, array.dtype.name, 0, 0, 0, 0)

    def _dense(self, name: str, array: Array) -> _Result:
        """A tensor that no method changed, or only DWC's replacement. A copy: the caller may go on
        training."""
        method = " + ".join(self.methods.get(name, [])) or "dense"
        replaced = self.replaced.get(name)
        if replaced is None:
            return _Result(Dense(np.array(array, order="C")), method)
        if name in self.layout.transposed:
            replaced = replaced.T
        return _Result(Dense(np.ascontiguousarray(replaced)), method)

    def changed(self, name: str) -> Array | None:
        """What a tensor has become so far, dense; None while it is as it was."""
        if (result := self.results.get(name)) is not None:
            return result.encoding.unpack(self.threads)
        if name in self.replaced:
            return self._dense(name, self.arrays[name]).encoding.unpack(self.threads)
        return None
