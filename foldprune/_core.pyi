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
