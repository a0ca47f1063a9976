"""A calibration as one model's tensors see it, and what removing numbers costs by it.

Damage is in one unit everywhere, the expected loss per token to second order: with g the loss's
gradient at a matrix's output, sum_i E[g_i^2] dw_i C dw_i^T over its rows (Fisher's diagonal). A
calibration without gradients gives relative squared output errors instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from . import _core, dwc, irc
from .allocate import Unit
from .calibration import Calibration, layer_name
from .encodings import Array
from .errors import ModelError, TensorError
from .fit import Gram, row_damage, sweep
from .moments import Moments
from .prune import Target
from .schemas.layout import AttentionBlock, Layout, Matrix

__all__ = ["SHARES", "Measured", "expected_use"]

# shares of a matrix's weights at which its damage is measured, and to which it is interpolated
_MEASURED_SHARES = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
SHARES = np.linspace(0, 1, 101)

_LEAST_UPDATES = 8  # parts of the data, for what is new in one to be told from the others
_LEAST_HEAD = 1e-3  # of the mean head's size, for a smaller head's costs
_PRIOR_TOKENS = 8  # how many tokens the mean gradient counts for against those of a class of rows


def expected_use(counts: Array, local: Array | None = None) -> Array:
    """How often each row of an embedding is expected to be used, as a share of all tokens, from the
    counts of its use, (rows,).

    Rows that the data did not use share the probability that Good and Turing give to the unseen:
    the share of tokens that were seen once. Words come in bursts, so that this is too little for
    other texts: ``local`` tells which rows one part of the data alone used, whose tokens are as
    many as new ones in a part that has not been seen.
    """
    counts = counts.astype(np.float64)
    unseen = counts == 0
    mass = max(float((counts == 1).sum()), 1.0)
    if local is not None:
        mass = max(mass, float(counts[local].sum()))
    if unseen.any():
        counts[unseen] = min(mass / float(unseen.sum()), 1.0)
    share: Array = counts / counts.sum()
    return share


@dataclass
class Measured:
    """What is known of a model's layers.

    ``tied``: names that share another one's tensor. ``grams``: of tensors whose statistics are not
    the calibration's own (the input of an output projection after its values were folded).
    """

    arrays: Mapping[str, Array]
    tied: Mapping[str, str]
    layout: Layout
    calibration: Calibration
    threads: int
    grams: dict[str, Gram] = field(default_factory=dict)

    def check(self, names: Sequence[str]) -> None:
        """ModelError for statistics of layers that the model does not have, or of another width."""
        layers = {layer_name(name) for name in names}
        unknown = [n for n in self.calibration.names if n not in layers and not self._is_output(n)]
        if unknown:
            listed = ", ".join(unknown[:6]) + (" ..." if len(unknown) > 6 else "")
            raise ModelError(
                f"the calibration has statistics of layers that this model does not have: {listed}."
                " Layers are named as in the state dict, without '.weight'; was it another model's?"
            )
        for name, array in self.arrays.items():
            if array.ndim != 2:
                continue
            rows, cols = array.shape[::-1] if name in self.layout.transposed else array.shape
            for layer in self._layers(name):
                moments, gradient = (
                    self.calibration.moments(layer),
                    self.calibration.gradient(layer),
                )
                use = self.calibration.row_use(layer)
                width = cols if moments is None else moments.width
                outputs = rows if gradient is None or use is not None else len(gradient)
                used = rows if use is None else len(use)
                if (width, outputs, used) != (cols, rows, rows):
                    raise ModelError(
                        f"{name!r} is {rows} x {cols} (out x in), but was calibrated with {width} "
                        f"inputs, {outputs} outputs and {used} embedding rows: the calibration is "
                        "another model's"
                    )

    def _is_output(self, layer: str) -> bool:
        """An output embedding that a checkpoint leaves out, as it is tied."""
        return bool(self.layout.output_embeddings) and self.layout.names_output(f"{layer}.weight")

    def _layers(self, name: str) -> list[str]:
        """The layers that use a tensor: its own and those tied to it."""
        names = [name, *(alias for alias, source in self.tied.items() if source == name)]
        layers = [layer_name(n) for n in names]
        if name in self.layout.output_embeddings:
            layers += [n for n in self.calibration.names if self._is_output(n) and n not in layers]
        return layers

    # ---- statistics -----------------------------------------------------------------------------

    def moments(self, name: str) -> Moments | None:
        """Of the input of the layer with the weight ``name``."""
        for layer in self._layers(name):
            if (moments := self.calibration.moments(layer)) is not None:
                return moments
        return None

    def query_moments(self, block: AttentionBlock) -> Moments | None:
        """Of what the block's query reads."""
        return self.moments(block.query.weight) if block.cross else self.source_moments(block)

    def source_moments(self, block: AttentionBlock) -> Moments | None:
        """Of what the block's key and value read."""
        same = (block.key, block.value) if block.cross else (block.query, block.key, block.value)
        for matrix in same:
            if (moments := self.moments(matrix.weight)) is not None:
                return moments
        return None

    def gram(self, name: str) -> Gram | None:
        """Of the input of ``name``; the same object for layers that share their input."""
        if name in self.grams:
            return self.grams[name]
        for layer in self._layers(name):
            source = self.calibration.shared.get(layer, layer)
            if (moments := self.calibration.moments(source)) is not None:
                self.grams[name] = self.grams.get(f"{source}.weight") or Gram(moments, self.threads)
                self.grams.setdefault(f"{source}.weight", self.grams[name])
                return self.grams[name]
        return None

    def require_gram(self, name: str) -> Gram:
        """As ``gram``; TensorError if there are no statistics."""
        if (gram := self.gram(name)) is None:
            raise TensorError(
                f"{name!r}: the calibration has no statistics of this layer's input; update it "
                "with them, or leave the layer out (Recipe overrides, fpp=None)"
            )
        return gram

    def row_use(self, name: str) -> Array | None:
        """How often each row of an embedding is expected to be used, as a share of all tokens."""
        for layer in self._layers(name):
            if (counts := self.calibration.row_use(layer)) is not None:
                updates = self.calibration.row_updates(layer)
                local = None
                if updates is not None and updates[1] >= _LEAST_UPDATES:
                    local = updates[0] == 1
                return expected_use(counts, local)
        return None

    @property
    def unit(self) -> str:
        """What damage means."""
        if self.has_gradients:
            return "expected loss per token"
        return "relative squared output error"

    @property
    def notes(self) -> list[str]:
        if not len(self.calibration):
            return ["no calibration: inputs are taken as white up to the gain of the norm before"]
        if self.has_gradients:
            return [
                f"{name}: the calibration has no gradient at this embedding's output; it is priced "
                "by relative error"
                for name, group in self.layout.groups.items()
                if group == "embedding"
                and self.arrays[name].ndim == 2
                and self.row_use(name) is not None
                and self._embedding_gradient(name, self.arrays[name].shape[1]) is None
            ]
        return [
            "the calibration has no gradients: damage is relative output error, not what the "
            "model's loss sees (foldprune.torch.calibrate counts them)"
        ]

    @cached_property
    def has_gradients(self) -> bool:
        """Whether the gradients of all matrices of the blocks are known."""
        names = [
            name
            for name, group in self.layout.groups.items()
            if group in ("qkv", "attention_output", "feed_forward") and self.arrays[name].ndim == 2
        ]
        return bool(names) and all(self.gradient(name) is not None for name in names)

    def gradient(self, name: str) -> Array | None:
        return self.calibration.gradient(layer_name(name))

    # ---- damage ---------------------------------------------------------------------------------

    def row_weight(self, target: Target) -> Array:
        """What a squared error of each output costs, (out,) float64.

        The mean square of the loss's gradient; without gradients the same for every row, such that
        losing the whole output costs 1 (2 L + 1 for what gives the logits, which is no mere term
        of the residual stream of L blocks).
        """
        gradient = self.gradient(target.name) if self.has_gradients else None
        if gradient is not None:
            # rows that the data did not reach may matter to other data
            weight = np.maximum(gradient, 1e-3 * float(gradient.mean()))
            for block in self.layout.attentions:
                for matrix in (block.query, block.key):
                    if matrix.weight == target.name and block.heads:
                        rows = matrix.bias_view(np.arange(len(weight)), block.heads)
                        weight[rows] = self._logit_costs(block, matrix, weight[rows])
            return weight
        gram = self.require_gram(target.name)
        total = float(row_damage(target.matrix, np.zeros_like(target.matrix), gram)[1].sum())
        terms = self._terms if target.name in self.layout.output_embeddings else 1
        return np.full(len(target.matrix), terms / total if total > 0 else 1.0)

    @property
    def _terms(self) -> int:
        return 2 * len(self.layout.attentions) + 1

    def fpp_unit(self, target: Target) -> Unit:
        """The damage of removing a share of one matrix's weights, the others made up for it."""
        size = target.matrix.size
        if not len(self.calibration):
            damage = self._data_free(target)
        elif self.is_embedding(target.name):
            damage = _curve_of_scores(self.embedding_scores(target), self.threads)
        else:
            gram = self.require_gram(target.name)
            weight = self.row_weight(target)
            points = []
            for share in _MEASURED_SHARES:
                _, swept = sweep(target.matrix, gram, share, weight)
                lost, whole = row_damage(target.matrix, swept, gram)
                points.append(float(weight @ lost))
            damage = _interpolate([*points, float(weight @ whole)])
        return Unit(target.name, "FPP", SHARES, SHARES * size, damage, smooth=True)

    def _data_free(self, target: Target) -> Array:
        """Share of the matrix's squared norm that zeroing its smallest weights loses."""
        scores = np.abs(target.matrix.astype(np.float32))
        damage = _curve_of_scores(scores, self.threads)
        terms = self._terms if target.name in self.layout.output_embeddings else 1
        return damage * (terms / damage[-1] if damage[-1] > 0 else 1.0)

    def is_embedding(self, name: str) -> bool:
        """Whether a tensor is looked up by rows (as a tied output embedding is too)."""
        return self.layout.groups[name] == "embedding" and (
            self.row_use(name) is not None
            or self.gram(name) is None
            or not self.layout.names_output(name)  # tied, and its lookups were not counted
        )

    def embedding_scores(self, target: Target) -> Array:
        """Root of the price of every weight of an embedding, (rows, cols) float32: how often the
        row is used, times what an error of such a row costs to the mean one, times what an error
        of the column costs; where the logits come from the same tensor, that too."""
        matrix = np.abs(target.matrix.astype(np.float32))
        rows, cols = matrix.shape
        use = self.row_use(target.name)
        if use is None:
            use = np.full(rows, 1 / rows)
        gradient = self._embedding_gradient(target.name, cols)
        if gradient is None:
            energy = float(use @ np.square(matrix, dtype=np.float64).sum(axis=1))
            gradient = np.full(cols, 1 / energy if energy > 0 else 1.0)
        by_row = use * self._row_gradient(target.name, rows)
        price = np.outer(by_row.astype(np.float32), gradient.astype(np.float32))
        gram = self.gram(target.name)
        if gram is not None:
            price += np.outer(
                self._output_weight(target, use).astype(np.float32),
                np.diagonal(gram.second).astype(np.float32),
            )
        scores = np.sqrt(price, out=price)
        scores *= matrix
        return scores

    def _embedding_gradient(self, name: str, cols: int) -> Array | None:
        """Mean square of the loss's gradient at each column of what the embedding gives."""
        if not self.has_gradients:
            return None
        for layer in self._layers(name):
            gradient = self.calibration.gradient(layer)
            if gradient is not None and self.calibration.row_use(layer) is not None:
                return gradient if len(gradient) == cols else None
        return None

    def _row_gradient(self, name: str, rows: int) -> Array:
        """Mean square of the loss's gradient where each row of an embedding is used, to that over
        all tokens: (rows,).

        A rare word says more than a frequent one, and its gradient is larger. Rows are classed by
        powers of two of their use; those without use are like those used once.
        """
        for layer in self._layers(name):
            found, counts = self.calibration.row_gradient(layer), self.calibration.row_use(layer)
            if self.has_gradients and found is not None and counts is not None:
                squares, tokens = found
                mean = squares.sum() / max(tokens.sum(), 1.0)
                if mean <= 0:
                    break
                classes = np.log2(np.maximum(counts, 1.0)).astype(int)
                by_class = np.bincount(classes, squares) + _PRIOR_TOKENS * mean
                by_class /= (np.bincount(classes, tokens) + _PRIOR_TOKENS) * mean
                scale: Array = by_class[classes]
                return scale
        return np.ones(rows)

    def _output_weight(self, target: Target, use: Array) -> Array:
        """What a squared error of each logit costs. A token that was never the label is due as
        often as it is expected to be read."""
        if self.has_gradients:
            for layer in self._layers(target.name):
                gradient = self.calibration.gradient(layer)
                if gradient is not None and self.calibration.row_use(layer) is None:
                    return np.maximum(gradient, use)
        return self.row_weight(target)

    def fold_units(self, block: AttentionBlock, kind: str) -> list[Unit]:
        """IRC or DWC of a block, a unit per key head. Where the loss's gradient is known, IRC costs
        what the keys lose; else a fold costs its share of what losing the whole key (or value)
        would."""
        source = self.source_moments(block)
        if kind == "IRC":
            matrix, query = block.key, self.query_moments(block)
            curve = irc.curve(block, self.arrays, self.threads, query, source)
        else:
            matrix = block.value
            curve = dwc.curve(block, self.arrays, self.threads, source)
        losses = self._dimension_losses(block) if kind == "IRC" else None
        if losses is not None:
            damage = [np.append(own[::-1].cumsum()[::-1], 0.0) for own in losses]
        else:
            worth = self._worth(block, matrix)
            damage = [worth * np.asarray(error) for error in curve.error]
        units = []
        for j, stored in enumerate(curve.stored):
            ranks = np.arange(len(stored) - 1, -1, -1)
            if kind == "IRC":
                ranks = ranks[ranks > 0]  # rank 0 is uniform attention
            removed = curve.dense / len(curve.stored) - stored[ranks]
            name = f"{block.name}:{j}"
            units.append(Unit(name, kind, ranks, removed.astype(float), damage[j][ranks]))
        return units

    def _dimension_losses(self, block: AttentionBlock) -> Array | None:
        """What every dimension (plane, with rotation) of a key head costs that IRC leaves out,
        the ones that it keeps longest first: (key heads, dimensions). None without gradients.

        The fold at rank r is the dense model with keys P k, and what they lose is
        sum_i E[g_i^2] E[((I - P) k)_i^2] over the head's rows. Without rotation, with
        A = E[q q^T]^(1/2) and u_i the eigenvectors of A Cov(k) A, P = A^-1 U_r U_r^T A.
        """
        gradient = self.gradient(block.key.weight) if self.has_gradients else None
        query, source = self.query_moments(block), self.source_moments(block)
        if gradient is None or query is None or source is None:
            return None
        g = block.key.bias_view(gradient, block.heads)
        g = self._logit_costs(block, block.key, g).reshape(block.groups, -1)
        keys = self._output_moments(block, block.key, source, centred=block.rope is None)
        if block.rope:
            pairs = (-1, 2) if block.rope == "adjacent" else (2, -1)
            rows = (g * np.einsum("jaa->ja", keys)).reshape(block.groups, *pairs)
            planes = rows.sum(axis=2 if block.rope == "adjacent" else 1)
            scores = irc.plane_scores(block, self.arrays, query, self.threads)
            return np.take_along_axis(planes, np.argsort(-scores, axis=1), axis=1)
        queries = self._output_moments(block, block.query, query, centred=False)
        losses = np.zeros(g.shape)
        for j, second in enumerate(queries.reshape(block.groups, -1, *queries.shape[1:]).sum(1)):
            values, vectors = np.linalg.eigh(second)
            if values[-1] <= 0:  # queries of zeros: keys do not matter
                continue
            root = np.sqrt(np.maximum(values, values[-1] * 1e-12))
            a = vectors * root
            squared, u = np.linalg.eigh(a.T @ keys[j] @ a)
            lost = (vectors / root) @ u  # A^-1 u_i, up to a rotation that drops out
            losses[j] = (np.maximum(squared, 0.0) * (g[j] @ lost**2))[::-1]
        return losses

    def _logit_costs(self, block: AttentionBlock, matrix: Matrix, gradient: Array) -> Array:
        """What a squared error of each row of a query or key costs, of which ``gradient`` is the
        estimate.

        A softmax that is all but certain has no gradient, and yet everything to lose: no head's
        rows together cost less than the mean head's.
        """
        moments = self.query_moments(block) if matrix is block.query else self.source_moments(block)
        if moments is None:
            return gradient
        centred = matrix is block.key and block.rope is None
        out = self._output_moments(block, matrix, moments, centred)
        energy = np.einsum("jaa->ja", out)
        by_head = gradient.reshape(energy.shape)
        mean_cost = float((by_head * energy).sum(axis=1).mean())
        size = energy.sum(axis=1)
        size = np.maximum(size, _LEAST_HEAD * size.mean())  # a head of zeros stays cheap
        if not size.all():
            return gradient
        return np.asarray(np.maximum(by_head, mean_cost / size[:, None])).ravel()

    def _output_moments(
        self, block: AttentionBlock, matrix: Matrix, moments: Moments, centred: bool
    ) -> Array:
        """Second moments of what every head's rows put out, or covariances: (heads, head_dim,
        head_dim)."""
        rows = matrix.view(self.arrays[matrix.weight], block.heads).astype(np.float64)
        rows = rows.reshape(-1, block.head_dim, matrix.cols)
        out = rows @ moments.covariance @ rows.swapaxes(1, 2)
        if centred:
            return np.asarray(out)
        mean = rows @ moments.mean
        if matrix.bias is not None:
            bias = matrix.bias_view(self.arrays[matrix.bias], block.heads)
            mean = mean + bias.astype(np.float64).reshape(mean.shape)
        return np.asarray(out + mean[:, :, None] * mean[:, None, :])

    def _worth(self, block: AttentionBlock, matrix: Matrix) -> float:
        """Sum over a key's or value's rows of E[g^2] times the output's variance."""
        gradient = self.gradient(matrix.weight) if self.has_gradients else None
        moments = self.source_moments(block)
        if gradient is None or moments is None:
            return 1.0
        # what is the same for all tokens drops out of the softmax, or is a bias
        covariances = self._output_moments(block, matrix, moments, centred=True)
        rows = matrix.bias_view(gradient, block.heads)
        return float(rows @ np.einsum("jaa->ja", covariances).ravel())


def _interpolate(points: list[float]) -> Array:
    """Damage at SHARES: geometric between the measured shares, a power law below the first."""
    shares = np.array([*_MEASURED_SHARES, 1.0])
    values = np.maximum.accumulate(np.maximum(points, 0.0))
    if values[0] <= 0:
        return np.interp(SHARES, [0.0, *shares], [0.0, *values])
    damage = np.exp(np.interp(SHARES, shares, np.log(values)))
    power = np.log(values[1] / values[0]) / np.log(shares[1] / shares[0])
    low = shares[0] > SHARES
    damage[low] = values[0] * (SHARES[low] / shares[0]) ** max(power, 1.0)
    return damage


def _curve_of_scores(scores: Array, threads: int) -> Array:
    """Damage at SHARES if single weights leave by their scores: sums of the lowest squares, to the
    resolution of a histogram (1 part in 128)."""
    counts = _core.histogram([(scores, 1.0, None)], threads).astype(np.float64)
    finite = np.arange(0x7F80, dtype=np.uint32)  # the upper halves of finite floats
    middles = ((finite << 16) + (1 << 15)).view(np.float32)
    counts, squares = counts[: len(finite)], np.square(middles.astype(np.float64))
    total = np.concatenate([[0.0], np.cumsum(counts * squares)])
    below = np.concatenate([[0.0], np.cumsum(counts)])
    return np.interp(SHARES * scores.size, below, total)
