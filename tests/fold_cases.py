"""Heads of many shapes for the folds of the C core."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

# (heads, groups, head_dim, columns of left, columns of right)
SIZES = {
    "plain": (4, 4, 8, 32, 32),
    "grouped": (6, 2, 8, 48, 48),
    "one key head": (4, 1, 6, 24, 24),
    "one head": (1, 1, 16, 40, 40),
    "more rows than columns": (2, 2, 16, 5, 6),
    "one column": (2, 2, 4, 1, 9),
    "one row": (3, 3, 1, 7, 5),
    "odd": (3, 3, 7, 23, 29),
    "grouped and narrow": (4, 2, 12, 3, 9),
    "wide": (2, 2, 24, 90, 70),
}
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]

Heads = tuple[Any, Any, Any, Any, int, int]


def make(name: str, bias: bool = False, extra: bool = False, dtype: Any = np.float64) -> Heads:
    """Left, its bias, right, an extra column of it, and the counts of heads and groups."""
    heads, groups, head_dim, n, d = SIZES[name]
    rng = np.random.default_rng(len(name))

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    return (
        draw(heads * head_dim, n),
        draw(heads * head_dim) if bias else None,
        draw(groups * head_dim, d),
        draw(groups * head_dim) if extra else None,
        heads,
        groups,
    )
