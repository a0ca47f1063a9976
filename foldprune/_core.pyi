"""Types of the C core. Private: use the functions of foldprune."""

from typing import Any

import numpy as np

_Array = np.ndarray[Any, np.dtype[Any]]
# (x, scale, col_scale): the score is |x| * scale * col_scale
_Scored = tuple[_Array, float, _Array | None]
# (left, left_bias, right, right_extra, heads, groups[, left_scale, right_scale[, left_factor,
# right_factor]]); see fp_heads in csrc/include/foldprune.h
_Heads = (
    tuple[_Array, _Array | None, _Array, _Array | None, int, int]
    | tuple[_Array, _Array | None, _Array, _Array | None, int, int, _Array | None, _Array | None]
    | tuple[
        _Array,
        _Array | None,
        _Array,
        _Array | None,
        int,
        int,
        _Array | None,
        _Array | None,
        _Array | None,
        _Array | None,
    ]
)
# left, right, pivots, ranks, error, energy; see fp_fold_out
_Fold = tuple[_Array, _Array, _Array | None, _Array, _Array, _Array]

def isa() -> str: ...
def isas() -> dict[str, tuple[bool, bool]]: ...
def use_team(address: int, /) -> None: ...
def all_finite(x: _Array, threads: int = 1) -> bool: ...
def energy(scored: _Scored, threads: int = 1) -> float: ...
def histogram(scored: list[_Scored], threads: int = 1) -> _Array: ...
def select(
    scored: list[_Scored], k: int, threads: int = 1, isa: str | None = None
) -> tuple[float, int]: ...
def mask_threshold(
    scored: _Scored, score: float, ties: int, threads: int = 1, isa: str | None = None
) -> tuple[_Array, int]: ...
def mask_rows(scored: _Scored, k: int, threads: int = 1) -> _Array: ...
def mask_nm(scored: _Scored, n: int, m: int, threads: int = 1) -> _Array: ...
def mask_blocks(
    block_mask: _Array, rows: int, cols: int, block_rows: int, block_cols: int, threads: int = 1
) -> _Array: ...
def mask_count(mask: _Array, n: int) -> int: ...
def block_scores(scored: _Scored, block_rows: int, block_cols: int, threads: int = 1) -> _Array: ...
def pack(
    x: _Array,
    mask: _Array,
    threads: int = 1,
    isa: str | None = None,
    out: _Array | None = None,
) -> _Array: ...
def unpack(
    values: _Array,
    mask: _Array,
    shape: tuple[int, ...],
    threads: int = 1,
    isa: str | None = None,
    out: _Array | None = None,
) -> _Array: ...
def irc_spectrum(heads: _Heads, threads: int = 1) -> _Array: ...
def irc(heads: _Heads, ranks: _Array | None, gauge: bool, threads: int = 1) -> _Fold: ...
def dwc_spectrum(heads: _Heads, threads: int = 1) -> tuple[_Array, _Array]: ...
def dwc_select(heads: _Heads, columns: _Array | None, count: int, threads: int = 1) -> _Fold: ...
def dwc_remainder(
    heads: _Heads, ranks: _Array, threads: int = 1
) -> tuple[_Array, _Array, _Array | None, _Array, _Array, _Array, _Array, _Array]: ...
def rope_scores(heads: _Heads, adjacent: bool, threads: int = 1) -> _Array: ...
def rope(
    heads: _Heads,
    adjacent: bool,
    scores: _Array,
    ranks: _Array | None,
    gauge: bool,
    threads: int = 1,
) -> tuple[_Array, _Array, _Array | None, _Array, _Array, _Array, _Array]: ...
def check_rows(x: _Array, weights: _Array | None = None, threads: int = 1) -> int: ...
def moments_update(
    x: _Array, weights: _Array | None, second: _Array, sum: _Array, threads: int = 1
) -> tuple[float, int]: ...
def square_sums(
    x: _Array, weights: _Array | None, squares: _Array, threads: int = 1
) -> tuple[float, int]: ...
def count_rows(ids: _Array, weights: _Array | None, counts: _Array) -> float: ...

# Below, w (out x in) has any of the four dtypes, a mask is bits as above, h and c are float64
# (in x in) and symmetric. ValueError for NaN or infinite numbers, sizes that disagree, and an h
# that is not positive definite.

# h = (I + A) diag(d) (I + A)^T: A float32 (in x in), strictly upper; d float64 (in,)
def obs_factor(h: _Array, threads: int = 1) -> tuple[_Array, _Array]: ...

# The mask and swept weights, float32 (None with out=False). rule and amount:
#   "block", weights to remove from the matrix (rows compete within a block of columns)
#   "row", weights to remove from every row
#   "threshold", the price row_weight * d * w'^2 below which a weight goes
#   "n:m", (n, m): n of every m consecutive columns stay
#   "given", None: mask says what stays
# row_weight: float64 (out,), not negative; it matters to "block" and "threshold".
def obs_sweep(
    w: _Array,
    a: _Array,
    d: _Array,
    rule: str,
    amount: int | float | tuple[int, int] | None,
    row_weight: _Array | None = None,
    mask: _Array | None = None,
    block_cols: int = 128,
    out: bool = True,
    threads: int = 1,
) -> tuple[_Array, _Array | None]: ...

# Each row's least squares on its support: h_SS w'_S = rhs_S. rhs: float64 (out x in), None for w h.
# float64 if w is, else float32.
def refit(
    w: _Array, mask: _Array, h: _Array, rhs: _Array | None = None, threads: int = 1
) -> _Array: ...

# A better mask and its least squares: in each round every row exchanges kept weights for as many
# removed ones, anywhere (group 0) or within groups of consecutive columns, if its exact cost falls.
def swap(
    w: _Array,
    mask: _Array,
    h: _Array,
    rounds: int,
    group: int = 0,
    rhs: _Array | None = None,
    threads: int = 1,
) -> tuple[_Array, _Array]: ...

# Per row (w_new - w) c (w_new - w)^T and w c w^T, float64 (out,)
def damage(w: _Array, w_new: _Array, c: _Array, threads: int = 1) -> tuple[_Array, _Array]: ...

# Below, q (batch, heads, n, rank), k (batch, kv_heads, m, rank), v (batch, kv_heads, m, dim): all
# float32 or all float64, last dimension contiguous, rows that do not overlap, else any strides;
# key_mask: bool (batch, m), True = visible. See csrc/include/foldprune_attention.h.

# out (batch, heads, n, dim), a view of (batch, n, heads, dim); lse: float64 (batch, heads, n);
# nodes: int32 (batch, kv_heads), 0 where exact. method: "auto", "exact", "nodes". dropout: of the
# softmax's weights, in [0, 1), by the seed.
def attention(
    q: _Array,
    k: _Array,
    v: _Array,
    scale: float = 1.0,
    causal: bool = False,
    key_mask: _Array | None = None,
    method: str = "auto",
    tol: float = 1e-6,
    threads: int = 1,
    isa: str | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[_Array, _Array, _Array]: ...

# (dq, dk, dv) of sum(dout * out), in q's, k's and v's shapes; out, lse and nodes as returned.
def attention_backward(
    dout: _Array,
    q: _Array,
    k: _Array,
    v: _Array,
    out: _Array,
    lse: _Array,
    nodes: _Array,
    scale: float = 1.0,
    causal: bool = False,
    key_mask: _Array | None = None,
    threads: int = 1,
    isa: str | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[_Array, _Array, _Array]: ...

# A state of decoding by nodes, see fp_nodes_state: low, high, key_range, size, sum, reference, out;
# all float64, the last five are written to.
_Nodes = tuple[_Array, _Array, _Array, _Array, _Array, _Array, _Array]

# False where the nodes are too few for the range of the keys; then nothing has changed.
def nodes_append(
    state: _Nodes,
    k: _Array,
    v: _Array,
    key_mask: _Array | None = None,
    threads: int = 1,
    isa: str | None = None,
) -> bool: ...

# out (batch, heads, n, dim) and needed, int32 (batch, kv_heads): how many nodes might reach tol, 0
# where there are enough. out is None where they are not, or a query is outside the range.
def nodes_attend(
    state: _Nodes,
    q: _Array,
    kv_heads: int,
    dim: int,
    scale: float = 1.0,
    tol: float = 1e-6,
    threads: int = 1,
) -> tuple[_Array | None, _Array]: ...

# x (float32 or float64, contiguous) with dropout of probability p in [0, 1), by the seed
def dropout(x: _Array, p: float, seed: int, threads: int = 1, isa: str | None = None) -> _Array: ...

# Packed matrices: (rows, cols, mask, offset, values, scale), see fp_packed in
# csrc/include/foldprune.h. mask: uint64 words; offset: uint64, packed_offsets' answer for the mask,
# and trusted; values None where they are not needed; scale: float32 (rows,) for int8 values.
_Packed = tuple[int, int, _Array, _Array, _Array | None, _Array | None]

# bits: a mask as above
def packed_mask(bits: _Array, rows: int, cols: int, threads: int = 1) -> _Array: ...
def packed_offsets(mask: _Array, rows: int, cols: int, threads: int = 1) -> _Array: ...

# The kept elements of w, of its dtype
def packed_fill(packed: _Packed, w: _Array, threads: int = 1, isa: str | None = None) -> _Array: ...

# From float32 values: int8 values and scales
def packed_quantise(packed: _Packed, threads: int = 1) -> tuple[_Array, _Array]: ...
def packed_unpack(packed: _Packed, threads: int = 1, isa: str | None = None) -> _Array: ...

# Rows ids (int64, contiguous) of the matrix: (ids.size x cols)
def packed_lookup(
    packed: _Packed, ids: _Array, threads: int = 1, isa: str | None = None
) -> _Array: ...
def packed_lookup_gradient(
    packed: _Packed,
    ids: _Array,
    drows: _Array,
    ignored: int = -1,
    threads: int = 1,
    isa: str | None = None,
) -> _Array: ...

# Activations are two-dimensional, contiguous, float32 (float64 where the values are).
# y = x W^T + bias. method: "auto", "vector", "sparse", "dense".
def matmul(
    packed: _Packed,
    x: _Array,
    bias: _Array | None = None,
    threads: int = 1,
    method: str = "auto",
    isa: str | None = None,
) -> _Array: ...

# dx = dy W. method: not "vector".
def matmul_backward(
    packed: _Packed, dy: _Array, threads: int = 1, method: str = "auto", isa: str | None = None
) -> _Array: ...

# Of the values: dy^T x where they are kept. method: not "vector".
def matmul_gradient(
    packed: _Packed,
    dy: _Array,
    x: _Array,
    threads: int = 1,
    method: str = "auto",
    isa: str | None = None,
) -> _Array: ...

# What "auto" is at so many tokens. product: "forward", "backward", "gradient".
def matmul_choice(packed: _Packed, tokens: int, product: str = "forward") -> str: ...
