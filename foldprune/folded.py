"""Attention over folded heads: softmax attention whose queries and keys have few dimensions.

With one dimension (IRC at rank 1, no rotary embedding) it takes linear time: a query is then one
number, and its output a smooth function of that number, which is evaluated at a few Chebyshev nodes
and interpolated. The error is checked and bounded by ``tol``; where it would be larger, the exact
method is used.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import _core
from .encodings import Array
from .errors import TensorError, TensorTypeError
from .options import resolve_threads
from .tensors import is_weight_dtype

__all__ = ["NodesState", "folded_attention"]

_METHODS = ("auto", "exact", "nodes")
_MOST_NODES = 256  # FP_MOST_NODES
_NODES_STEP = 16  # FP_LEAST_NODES


def folded_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float = 1.0,
    causal: bool = False,
    key_mask: Array | None = None,
    method: str = "auto",
    tol: float = 1e-6,
    threads: int | None = None,
) -> Array:
    """Softmax attention, softmax(scale * q k^T) v over the last two dimensions.

    Parameters
    ----------
    q, k, v
        Arrays (batch, heads, n, r), (batch, kv_heads, m, r) and (batch, kv_heads, m, d), of one
        dtype: float32 or float64, or float16 or bfloat16, which are computed in float32. kv_heads
        divides heads: query head h reads key/value head h // (heads // kv_heads). r = 0 is uniform
        attention. Views are read where they are if their last dimension is contiguous.
    causal
        Query i sees keys j <= i + m - n: aligned at the end, as with a cache of keys.
    key_mask
        (batch, m) bool, True where a key may be seen. A query that sees no key gives zeros.
    method
        "exact": time n * m, memory of a tile. "nodes": r = 1 alone, time n + m; a key/value head
        for which 256 nodes do not reach ``tol``, or with a number that is not finite, is computed
        exactly. "auto": nodes where r = 1 (or 0) and the sizes make them faster.
    tol
        Error of the nodes' method, relative to the head's largest |v|; below 1e-6 rounding
        dominates in float32, and 1e-6 is used.
    threads
        At most this many threads; None is as many as the process may run on. The result has the
        same bytes for any number.

    Returns
    -------
    (batch, heads, n, d) in q's dtype, a view of (batch, n, heads, d): joining the heads by
    ``out.transpose(0, 2, 1, 3).reshape(batch, n, heads * d)`` copies nothing.

    Raises TensorError (a ValueError) for shapes that disagree or arguments out of range and
    TensorTypeError (a TypeError) for other types.
    """
    arrays = _checked(q=q, k=k, v=v)
    _check_shapes(*arrays)
    scale, tol = _number("scale", scale), _positive("tol", tol)
    if method not in _METHODS:
        raise TensorError(f"method={method!r}: expected one of {', '.join(_METHODS)}")
    rank = q.shape[3]
    if method == "nodes" and rank > 1:
        raise TensorError(
            f"method='nodes' needs queries and keys of one dimension, q has {rank}; use "
            "method='auto' or 'exact'"
        )
    mask = _checked_mask(key_mask, k)
    first, second, third = (_rows(x) for x in arrays)
    if rank == 0:  # logits of zero, which one dimension of zeros gives too, in linear time
        first, second = _zeros(first), _zeros(second)
    out, _, _ = _core.attention(
        first, second, third, scale, bool(causal), mask, method, tol, resolve_threads(threads)
    )
    return out if out.dtype == q.dtype else out.astype(q.dtype)


class NodesState:
    """What decoding with rank-1 keys keeps of one layer instead of a cache of keys and values.

    For each key/value head ``nodes`` * (d + 2) float64 numbers (and five more), however many tokens
    have been seen: softmax sums over all keys so far, for queries at Chebyshev nodes of the range
    that queries may take.

    Parameters
    ----------
    k, v, key_mask
        The prefix, as for ``folded_attention``: (batch, kv_heads, m, 1), (batch, kv_heads, m, d)
        and (batch, m); m may be 0. float16 and bfloat16 are kept in float32.
    low, high
        The range of scale * q for all queries to come: numbers, or arrays that broadcast to (batch,
        kv_heads). A bound from the weights will do; the narrower, the fewer nodes.
    nodes
        A multiple of 16, at most 256. None: twice what the prefix needs, at least 64.
    tol
        As for ``folded_attention``; checked at every call of ``attend``.

    Raises TensorError where no number of nodes does: keep keys and values, and call
    ``folded_attention``.
    """

    def __init__(
        self,
        k: Array,
        v: Array,
        low: float | Array,
        high: float | Array,
        *,
        scale: float = 1.0,
        key_mask: Array | None = None,
        nodes: int | None = None,
        tol: float = 1e-6,
        threads: int | None = None,
    ) -> None:
        (k, v), mask = self._keys(k, v, key_mask)
        self._scale, self._tol = _number("scale", scale), _positive("tol", tol)
        self._dtype, self._shape, self._dim = k.dtype, k.shape[:2], v.shape[3]
        self._low, self._high = (
            np.array(np.broadcast_to(np.asarray(x, np.float64), self._shape)) for x in (low, high)
        )
        if not (np.isfinite(self._low).all() and np.isfinite(self._high).all()):
            raise TensorError("low, high: expected finite numbers, bounds of scale * q")
        if (self._low > self._high).any():
            raise TensorError("low is above high: expected bounds of scale * q")
        self.length = 0
        if nodes is not None:
            if nodes % _NODES_STEP or not 0 < nodes <= _MOST_NODES:
                raise TensorError(f"nodes={nodes}: expected a multiple of 16 from 16 to 256")
            self._start(nodes)
            self.append(k, v, key_mask=mask, threads=threads)
            return
        self._start(_MOST_NODES)
        self.append(k, v, key_mask=mask, threads=threads)
        self._start(self._enough(k, v, mask, resolve_threads(threads)))
        self.append(k, v, key_mask=mask, threads=threads)

    @property
    def nodes(self) -> int:
        return self._sum.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the state, whatever the length."""
        return sum(x.nbytes for x in self._arrays)

    def append(
        self, k: Array, v: Array, *, key_mask: Array | None = None, threads: int | None = None
    ) -> None:
        """Takes in the keys and values of more tokens, (batch, kv_heads, m, 1) and (..., m, d).

        TensorError where they are not finite or their range is too wide for the nodes; the state
        is then as it was.
        """
        (k, v), mask = self._keys(k, v, key_mask)
        if k.shape[:2] != self._shape or v.shape[3] != self._dim or k.dtype != self._dtype:
            raise TensorError(
                f"k, v: expected {k.dtype} with {self._shape[1]} heads for a batch of "
                f"{self._shape[0]} and values of {self._dim}, as the state began; got "
                f"{tuple(k.shape)} and {tuple(v.shape)} of {k.dtype}"
            )
        try:
            fits = _core.nodes_append(self._arrays, k, v, mask, resolve_threads(threads))
        except ValueError as error:
            raise TensorError(f"k, v: {error}") from error
        if not fits:
            raise TensorError(
                f"k: the keys' range times the queries' is too wide for {self.nodes} nodes; "
                + self._remedy()
            )
        self.length += k.shape[2]

    def attend(self, q: Array, *, threads: int | None = None) -> Array:
        """(batch, heads, n, d) for queries (batch, heads, n, 1), each over all keys so far.

        TensorError where a query is outside ``low`` .. ``high`` or the nodes do not reach ``tol``.
        """
        (given,) = _checked(q=q)
        x = _rows(given)
        batch, kv_heads = self._shape
        if x.shape[0] != batch or x.shape[3] != 1 or x.shape[1] % kv_heads:
            raise TensorError(
                f"q: expected shape ({batch}, a multiple of {kv_heads}, n, 1), got {given.shape}"
            )
        if x.dtype != self._dtype:
            raise TensorTypeError(f"q: expected {self._dtype}, the state's, got {given.dtype}")
        out, needed = _core.nodes_attend(
            self._arrays, x, kv_heads, self._dim, self._scale, self._tol, resolve_threads(threads)
        )
        if out is None and needed.any():
            raise TensorError(
                f"{self.nodes} nodes do not reach tol={self._tol:g} any more; " + self._remedy()
            )
        if out is None:
            raise TensorError(
                "q: scale * q is outside low .. high (or NaN); build the state with a wider range"
            )
        return out if out.dtype == given.dtype else out.astype(given.dtype)

    def _remedy(self) -> str:
        if self.nodes < _MOST_NODES:
            return f"build the state with more nodes (at most {_MOST_NODES}) or a narrower range"
        return "narrow low .. high, or keep keys and values and call folded_attention"

    @staticmethod
    def _keys(k: Array, v: Array, mask: Array | None) -> tuple[tuple[Array, Array], Array | None]:
        k, v = _checked(k=k, v=v)
        _check_keys(k, v)
        if k.shape[3] != 1:
            raise TensorError(f"k: expected keys of one dimension, got {k.shape[3]}")
        return (_rows(k), _rows(v)), _checked_mask(mask, k)

    def _start(self, nodes: int) -> None:
        rows = (*self._shape, nodes)
        self._range = np.full((*self._shape, 2), (np.inf, -np.inf))
        self._size = np.zeros(self._shape)
        self._sum = np.zeros(rows)
        self._reference = np.zeros(rows)
        self._out = np.zeros((*rows, self._dim))
        self.length = 0

    @property
    def _arrays(self) -> tuple[Array, Array, Array, Array, Array, Array, Array]:
        return (
            self._low,
            self._high,
            self._range,
            self._size,
            self._sum,
            self._reference,
            self._out,
        )

    def _enough(self, k: Array, v: Array, mask: Array | None, threads: int) -> int:
        """Twice what the prefix needs: later keys may be further apart."""
        queries = np.zeros((*self._shape, 0, 1), self._dtype)
        nodes = _NODES_STEP
        while nodes < _MOST_NODES:
            self._start(nodes)
            needed = 2 * nodes
            if _core.nodes_append(self._arrays, k, v, mask, threads):
                args = (self._shape[1], self._dim, self._scale, self._tol, threads)
                needed = int(_core.nodes_attend(self._arrays, queries, *args)[1].max(initial=0))
            if not needed:
                return min(_MOST_NODES, max(64, 2 * nodes))
            nodes = min(needed, _MOST_NODES)
        return _MOST_NODES


# ---- arguments ----------------------------------------------------------------------------------


def _checked(**arrays: Any) -> list[Array]:
    """Arrays of four dimensions and one dtype that is computed with."""
    first = next(iter(arrays))
    for name, x in arrays.items():
        if not isinstance(x, np.ndarray):
            raise TensorTypeError(
                f"{name}: expected a NumPy array, got {type(x).__name__} (of a torch tensor: "
                "x.detach().numpy())"
            )
        if not is_weight_dtype(x.dtype) or not x.dtype.isnative:
            raise TensorTypeError(
                f"{name}: expected float32, float64, float16 or bfloat16, got {x.dtype}"
            )
        if x.dtype != arrays[first].dtype:
            raise TensorTypeError(
                f"{name} is {x.dtype} and {first} is {arrays[first].dtype}: convert one of them"
            )
        if x.ndim != 4:
            raise TensorError(
                f"{name}: expected (batch, heads, length, size), got {x.ndim} dimensions"
            )
    return list(arrays.values())


def _check_keys(k: Array, v: Array) -> None:
    if k.shape[:3] != v.shape[:3]:
        raise TensorError(
            f"k and v: expected the same batch, heads and length, got {k.shape} and {v.shape}"
        )
    if k.shape[1] == 0:
        raise TensorError("k: expected at least one head")


def _check_shapes(q: Array, k: Array, v: Array) -> None:
    _check_keys(k, v)
    if q.shape[0] != k.shape[0]:
        raise TensorError(f"q and k: batch sizes {q.shape[0]} and {k.shape[0]} disagree")
    if q.shape[3] != k.shape[3]:
        raise TensorError(f"q and k: sizes {q.shape[3]} and {k.shape[3]} disagree")
    if q.shape[1] % k.shape[1]:
        raise TensorError(
            f"q has {q.shape[1]} heads, k has {k.shape[1]}: the second must divide the first"
        )


def _checked_mask(mask: Array | None, k: Array) -> Array | None:
    if mask is None:
        return None
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        kind = getattr(mask, "dtype", type(mask).__name__)
        raise TensorTypeError(f"key_mask: expected a bool array, got {kind}; use mask != 0")
    expected = (k.shape[0], k.shape[2])
    if mask.shape != expected:
        raise TensorError(f"key_mask: expected shape (batch, keys) = {expected}, got {mask.shape}")
    return np.ascontiguousarray(mask)


def _number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TensorTypeError(f"{name}={value!r}: expected a number")
    if not math.isfinite(value):
        raise TensorError(f"{name}={value!r}: expected a finite number")
    return float(value)


def _positive(name: str, value: float) -> float:
    if _number(name, value) <= 0:
        raise TensorError(f"{name}={value!r}: expected a positive number")
    return float(value)


def _rows(x: Array) -> Array:
    """The same numbers as the core takes them: float32 or float64, contiguous in the last
    dimension, rows that do not overlap. A copy only where they are not so already."""
    if x.dtype.itemsize == 2:
        return x.astype(np.float32)
    item, (batch, head, row, column) = x.itemsize, x.strides
    sound = (
        x.flags.aligned
        and (x.shape[3] < 2 or column == item)
        and (x.shape[2] < 2 or row >= x.shape[3] * item)
        and not any(stride % item for stride in (batch, head, row))
    )
    return x if sound else np.ascontiguousarray(x)


def _zeros(x: Array) -> Array:
    return np.zeros((*x.shape[:3], 1), x.dtype)
