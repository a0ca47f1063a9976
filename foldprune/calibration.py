"""Statistics of the inputs that a model's layers meet, counted over the user's own data."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np

from . import _core
from .encodings import WEIGHT_DTYPES, Array
from .errors import TensorError, TensorTypeError
from .moments import Inputs, Moments, Totals
from .options import resolve_threads

__all__ = ["Calibration", "layer_name"]

BLOCK_ROWS = 128  # what is held out together of inputs that do not come in sequences

# the attributes that hold a sum per output or embedding row, by their names in files
TOTALS = {
    "row_use": "_row_use",
    "row_updates": "_row_updates",
    "gradients": "_gradients",
    "row_squares": "_row_squares",
    "row_squares_use": "_row_squares_use",
}


class Calibration:
    """Statistics of a model's layers over calibration data, by layer name.

    Of every layer's input x (d numbers a token) it keeps, in float64, the sums of x x^T and of x
    and the number of tokens; of embeddings, how often each row was used, and in how many updates;
    and, if they are given, the mean squares of the loss's gradient at each output, of embeddings
    also where each row was used. Layers are named as in the model
    ("encoder.layer.0.intermediate.dense"); a trailing ".weight" is ignored.

    Parameters
    ----------
    held_out
        Every held_out-th sequence goes into a second set of sums, on which a fit can be judged by
        data that it has not seen (the choice of a damping). None or 0: no sequence.

    Sequences are counted by layer, in the order of ``update``. Of x with two dimensions, which has
    no sequences, every held_out-th block of 128 consecutive rows is held out. Memory: 2 * 8 * d^2
    bytes per distinct input (8 * d^2 without held-out rows), see ``nbytes``. One thread at a time
    may call ``update`` and ``merge``.

    >>> calibration = Calibration()
    >>> calibration.update("layer.0.dense", np.ones((2, 5, 3), np.float32))
    >>> calibration.moments("layer.0.dense").count
    10.0
    """

    def __init__(self, *, held_out: int | None = 8) -> None:
        if isinstance(held_out, bool) or not isinstance(held_out, (int, type(None))):
            raise TypeError(f"held_out={held_out!r}: expected a whole number or None")
        if held_out is not None and (held_out < 0 or held_out == 1):
            raise ValueError(
                f"held_out={held_out}: every held_out-th sequence is held out, so at least 2; None "
                "holds out nothing"
            )
        self._held_out = held_out or 0
        self._inputs: dict[str, Inputs] = {}
        self._shared: dict[str, str] = {}
        self._row_use: dict[str, Totals] = {}
        self._row_updates: dict[str, Totals] = {}  # how many updates used the row
        self._gradients: dict[str, Totals] = {}
        self._row_squares: dict[str, Totals] = {}  # of the gradients where the row was used
        self._row_squares_use: dict[str, Totals] = {}  # how many tokens those are of

    # ---- counting -------------------------------------------------------------------------------

    def update(self, name: str, x: Any, mask: Any = None, *, threads: int | None = None) -> None:
        """Adds a batch of a layer's inputs.

        Parameters
        ----------
        name
            The layer's.
        x
            (..., d) array or torch tensor of float32, float64, float16 or bfloat16, two dimensions
            or more. With three or more, the second last one runs over the tokens of a sequence.
        mask
            (...) bool, or non-negative weights, per token; None counts all. A token of weight 0
            (padding) may hold anything.

        Raises
        ------
        TensorError, TensorTypeError
            (ValueError, TypeError) NaN or Inf, another d than before, a mask of another shape, an
            unsupported dtype. Nothing is added then.
        """
        name = layer_name(name)
        rows, weights, tokens = _rows(name, x, mask)
        if name in self._shared:
            raise TensorError(
                f"{name!r} shares the input of {self._shared[name]!r}: update that one alone"
            )
        count, width = rows.shape
        inputs = self._inputs.get(name) or Inputs(width)
        _same_width(name, "inputs", inputs.width, width)
        workers = resolve_threads(threads)
        _check(name, "activations", rows, weights, workers)
        if tokens:
            unit = inputs.sequences + np.arange(count) // tokens
        else:
            unit = (inputs.position + np.arange(count)) // BLOCK_ROWS
        held = unit % self._held_out == self._held_out - 1 if self._held_out else None
        if held is None or not held.any():
            inputs.fit.add(rows, weights, workers)
        else:
            known = np.ones(count) if weights is None else weights
            inputs.fit.add(rows, known * ~held, workers)
            inputs.held.add(rows, known * held, workers)
        if tokens:
            inputs.sequences += count // tokens
        else:
            inputs.position += count
        self._inputs[name] = inputs

    def update_tokens(self, name: str, ids: Any, rows: int, mask: Any = None) -> None:
        """Adds to the counts of an embedding's rows.

        ``ids`` is an integer array of any shape with numbers in [0, rows), ``rows`` the number of
        the embedding's rows, ``mask`` as for ``update``, of the shape of ids.
        """
        name = layer_name(name)
        ids = _ids(name, ids)
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise TensorError(f"{name!r}: rows={rows!r}: expected the number of embedding rows")
        if not ids.size:
            raise TensorError(f"{name!r}: no token ids: leave empty batches out")
        totals = self._row_use.get(name) or Totals(np.zeros(rows))
        _same_width(name, "rows", len(totals.sums), rows)
        weights = _weights(name, mask, ids.shape)
        flat = ids.reshape(-1)
        totals.weight += _count_rows(name, flat, weights, totals.sums)
        updates = self._row_updates.setdefault(name, Totals(np.zeros(rows)))
        updates.sums[np.unique(flat if weights is None else flat[weights > 0])] += 1
        updates.weight += 1
        self._row_use[name] = totals

    def update_gradient(
        self,
        name: str,
        gradient: Any,
        mask: Any = None,
        *,
        ids: Any = None,
        threads: int | None = None,
    ) -> None:
        """Adds the squares of the loss's gradient at a layer's output: (..., out), and ``mask`` as
        for ``update``. ``ids``, of an embedding: the rows that were used, (...) integers, so that
        the squares are also known by row; ``update_tokens`` comes first."""
        name = layer_name(name)
        rows, weights, _ = _rows(name, gradient, mask)
        width = rows.shape[1]
        totals = self._gradients.get(name) or Totals(np.zeros(width))
        _same_width(name, "outputs", len(totals.sums), width)
        workers = resolve_threads(threads)
        _check(name, "gradients", rows, weights, workers)
        if ids is not None:
            self._update_row_squares(name, rows, weights, _ids(name, ids).reshape(-1))
        totals.weight += _core.square_sums(rows, weights, totals.sums, workers)[0]
        self._gradients[name] = totals

    def _update_row_squares(
        self, name: str, rows: Array, weights: Array | None, ids: Array
    ) -> None:
        use = self._row_use.get(name)
        if use is None:
            raise TensorError(f"{name!r}: its rows are not counted yet: update_tokens comes first")
        if len(ids) != len(rows):
            raise TensorError(f"{name!r}: ids of {len(ids)} tokens, gradients of {len(rows)}")
        known = np.ones(len(rows)) if weights is None else weights
        counted = known > 0
        squares = np.zeros(len(rows))
        squares[counted] = known[counted] * np.square(rows[counted], dtype=np.float64).sum(axis=1)
        for by_name, amounts in (
            (self._row_squares_use, known),
            (self._row_squares, squares),
        ):
            totals = by_name.get(name) or Totals(np.zeros(len(use.sums)))
            totals.weight += _count_rows(name, ids, amounts, totals.sums)
            by_name[name] = totals

    def share(self, name: str, source: str) -> None:
        """Says that layer ``name`` reads the same input as ``source`` (query, key and value; up and
        gate), whose statistics then stand for both and are kept once."""
        name, source = layer_name(name), layer_name(source)
        source = self._shared.get(source, source)
        if source not in self._inputs:
            raise TensorError(f"{source!r} has no statistics to share: update it first")
        if name in self._inputs or self._shared.get(name, source) != source:
            raise TensorError(
                f"{name!r} has statistics of its own or of another layer; only a layer without can "
                f"share those of {source!r}"
            )
        self._shared[name] = source

    def without_moments(self) -> Calibration:
        """What does not depend on the inputs' values: the gradients and the use of rows, shared
        with self."""
        out = Calibration(held_out=self._held_out)
        for attribute in TOTALS.values():
            setattr(out, attribute, getattr(self, attribute))
        return out

    def merge(self, other: Calibration) -> Calibration:
        """Adds the sums of another calibration of the same model, counted on other data; returns
        self.

        The same as counting all data in one, up to float64 rounding. Which sequences are held out
        is also the same where self had seen a multiple of held_out of them (and of 128 * held_out
        rows without sequences). ValueError if the two do not fit, and self is then unchanged.
        """
        if not isinstance(other, Calibration):
            raise TypeError(f"expected a Calibration, got {type(other).__name__}")
        self._check_mergeable(other)
        for name, theirs in other._inputs.items():
            ours = self._inputs.setdefault(name, Inputs(theirs.width))
            for mine, added in zip(ours.sets, theirs.sets, strict=True):
                mine.merge(added)
            ours.sequences += theirs.sequences
            ours.position += theirs.position
        for attribute in TOTALS.values():
            mine_by_name: dict[str, Totals] = getattr(self, attribute)
            theirs_by_name: dict[str, Totals] = getattr(other, attribute)
            for name, totals in theirs_by_name.items():
                own = mine_by_name.setdefault(name, Totals(np.zeros(len(totals.sums))))
                own.sums += totals.sums
                own.weight += totals.weight
        self._shared |= other._shared
        return self

    def _check_mergeable(self, other: Calibration) -> None:
        if self._held_out != other._held_out:
            raise ValueError(
                f"one calibration holds out every {self._held_out}-th sequence, the other every "
                f"{other._held_out}-th: count both with the same held_out"
            )
        for name in self._inputs.keys() & other._inputs.keys():
            _same_width(name, "inputs", self._inputs[name].width, other._inputs[name].width)
        for name in self._row_use.keys() & other._row_use.keys():
            _same_width(name, "rows", len(self._row_use[name].sums), len(other._row_use[name].sums))
        for name in self._gradients.keys() & other._gradients.keys():
            mine, theirs = self._gradients[name].sums, other._gradients[name].sums
            _same_width(name, "outputs", len(mine), len(theirs))
        for one, two in ((self, other), (other, self)):
            for name, source in one._shared.items():
                if name in two._inputs or two._shared.get(name, source) != source:
                    raise ValueError(
                        f"{name!r} shares the input of {source!r} in one calibration only: count "
                        "both in the same way"
                    )

    def _spill(self, names: Iterable[str]) -> None:
        """Moves these layers' matrices into a temporary file, so that they take disk (TMPDIR), not
        memory; they read and add up as before."""
        for name in self._inputs.keys() & set(names):
            for sums in self._inputs[name].sets:
                if sums.second is not None:
                    with tempfile.TemporaryFile() as file:  # mapped, it outlives its name
                        mapped = np.memmap(file, np.float64, "w+", shape=sums.second.shape)
                    mapped[:] = sums.second
                    mapped.flush()
                    sums.second = mapped

    # ---- reading --------------------------------------------------------------------------------

    @property
    def held_out(self) -> int:
        """Every how many sequences one is held out; 0 for none."""
        return self._held_out

    @property
    def names(self) -> list[str]:
        """Every layer of which anything is known."""
        return list(dict.fromkeys([*self._inputs, *self._shared, *self._row_use, *self._gradients]))

    @property
    def shared(self) -> dict[str, str]:
        """The layers whose input is another one's, and which."""
        return dict(self._shared)

    @property
    def nbytes(self) -> int:
        """Bytes of all sums."""
        arrays = [
            array
            for inputs in self._inputs.values()
            for sums in inputs.sets
            for array in (sums.second, sums.sum)
            if array is not None
        ]
        arrays += [t.sums for kind in TOTALS.values() for t in getattr(self, kind).values()]
        return sum(array.nbytes for array in arrays)

    def __contains__(self, name: object) -> bool:
        known = (self._inputs, self._shared, self._row_use, self._gradients)
        return isinstance(name, str) and any(layer_name(name) in names for names in known)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        count = max((i.fit.weight + i.held.weight for i in self._inputs.values()), default=0.0)
        return (
            f"<Calibration: {len(self)} layers, up to {count:,.0f} tokens each, "
            f"{self.nbytes / 1e6:,.1f} MB>"
        )

    def moments(self, name: str) -> Moments | None:
        """Of a layer's input; None if nothing of it was counted."""
        name = layer_name(name)
        inputs = self._inputs.get(self._shared.get(name, name))
        return Moments(inputs) if inputs and inputs.fit.weight + inputs.held.weight > 0 else None

    def row_use(self, name: str) -> Array | None:
        """How often each row of an embedding was used: (rows,) float64; None if not counted."""
        totals = self._row_use.get(layer_name(name))
        return totals.sums.copy() if totals else None

    def row_updates(self, name: str) -> tuple[Array, int] | None:
        """How many calls of ``update_tokens`` used each row of an embedding, (rows,) float64, and
        how many there were; None if not counted."""
        totals = self._row_updates.get(layer_name(name))
        return (totals.sums.copy(), round(totals.weight)) if totals else None

    def row_gradient(self, name: str) -> tuple[Array, Array] | None:
        """Sums of the squared norm of the loss's gradient at an embedding's output over the tokens
        that used each row, and the number of those tokens: (rows,) float64 each; None if not
        counted."""
        name = layer_name(name)
        squares, use = self._row_squares.get(name), self._row_squares_use.get(name)
        return (squares.sums.copy(), use.sums.copy()) if squares and use else None

    def gradient(self, name: str) -> Array | None:
        """Mean square of the loss's gradient at each output of a layer: (out,) float64; None if
        not counted."""
        totals = self._gradients.get(layer_name(name))
        return totals.sums / totals.weight if totals and totals.weight else None

    # ---- files ----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file; what was there is replaced at once or not at all."""
        from .calibration_file import save

        save(self, os.fspath(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Opens what ``save`` wrote: the same bits. FormatError (a ValueError) if the file is
        damaged, of a newer version or something else, OSError if it cannot be read."""
        from .calibration_file import load

        return load(os.fspath(path))


# ---- arguments ----------------------------------------------------------------------------------


def layer_name(name: str) -> str:
    """A layer by its own name or that of its weight."""
    if not isinstance(name, str):
        raise TypeError(f"name {name!r}: names of layers are strings")
    return name.removesuffix(".weight")


def _array(name: str, value: Any) -> Array:
    torch = sys.modules.get("torch")  # a torch tensor cannot exist before its module does
    if torch is not None and isinstance(value, torch.Tensor):
        from .torch.tensors import to_numpy

        return to_numpy(name, value)
    if not isinstance(value, np.ndarray):
        raise TensorTypeError(
            f"{name!r}: expected a NumPy array or a torch tensor, got {type(value).__name__}"
        )
    return value if value.dtype.isnative else value.astype(value.dtype.newbyteorder("="))


def _rows(name: str, x: Any, mask: Any) -> tuple[Array, Array | None, int]:
    """x as (rows, d), weights, and the tokens of a sequence (0: not in sequences)."""
    array = _array(name, x)
    if array.dtype not in WEIGHT_DTYPES:
        raise TensorTypeError(
            f"{name!r}: dtype {array.dtype}; convert it to float32 (float32, float64, float16 and "
            "bfloat16 are counted)"
        )
    if array.ndim < 2:
        raise TensorError(
            f"{name!r}: shape {array.shape}; expected (..., d) with two dimensions or more: "
            "x[None] makes one row of a vector"
        )
    if not array.size:
        raise TensorError(f"{name!r}: shape {array.shape} is empty: leave empty batches out")
    weights = _weights(name, mask, array.shape[:-1])
    tokens = array.shape[-2] if array.ndim > 2 else 0
    return array.reshape(-1, array.shape[-1]), weights, tokens


def _ids(name: str, ids: Any) -> Array:
    """Row numbers as int64."""
    array = _array(name, ids)
    if array.dtype.kind not in "iu":
        raise TensorTypeError(f"{name!r}: token ids are integers, got {array.dtype}")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise TensorError(f"{name!r}: token ids up to {array.max()}")
    return np.ascontiguousarray(array, np.int64)


def _count_rows(name: str, ids: Array, weights: Array | None, sums: Array) -> float:
    """Adds every id's weight to its row's sum, all or nothing; returns what was added."""
    try:
        return _core.count_rows(ids, weights, sums)
    except ValueError:
        raise TensorError(
            f"{name!r}: token ids from {ids.min()} to {ids.max()}, expected 0 to {len(sums) - 1}; "
            "mask padding with mask="
        ) from None


def _weights(name: str, mask: Any, shape: tuple[int, ...]) -> Array | None:
    if mask is None:
        return None
    array = _array(name, mask)
    if array.dtype.kind not in "biuf" and array.dtype not in WEIGHT_DTYPES:
        raise TensorTypeError(f"{name!r}: a mask of {array.dtype}; expected bool or float weights")
    if array.shape != shape:
        raise TensorError(
            f"{name!r}: a mask of shape {array.shape}; expected one entry per token, {shape}"
        )
    weights = np.ascontiguousarray(array, np.float64).reshape(-1)
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise TensorError(f"{name!r}: the mask's weights are finite and not negative")
    return weights


def _same_width(name: str, what: str, before: int, now: int) -> None:
    if before != now:
        raise TensorError(
            f"{name!r}: {now} {what}, but {before} in what was counted before: a calibration is of "
            "one model"
        )


def _check(name: str, what: str, rows: Array, weights: Array | None, threads: int) -> None:
    bad = _core.check_rows(rows, weights, threads)
    if bad < 0:
        return
    row = rows[bad].astype(np.float64)
    value = row[~np.isfinite(row)][0] if not np.isfinite(row).all() else np.abs(row).max()
    raise TensorError(
        f"{name!r}: {what} of row {bad} hold {value:g}; leave that batch out, mask padding with "
        "mask=, or run a model that overflows in float32"
    )
