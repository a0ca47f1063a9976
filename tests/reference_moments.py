"""Samples for sums over rows, and what they must come to, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np


def rows(shape: tuple[int, ...], dtype: Any = "f4", seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, *shape])
    return (rng.standard_normal(shape) + 0.3).astype(dtype)


def second_moment(x: np.ndarray, w: np.ndarray | None = None) -> np.ndarray:
    """sum of w x x^T over the rows of (..., d), in float64."""
    flat = x.reshape(-1, x.shape[-1]).astype(np.float64)
    w = np.ones(len(flat)) if w is None else w.reshape(-1).astype(np.float64)
    return (flat * w[:, None])[w > 0].T @ flat[w > 0]


def close(have: np.ndarray, want: np.ndarray, tolerance: float = 1e-12) -> bool:
    return have.shape == want.shape and bool(
        np.abs(have - want).max() <= tolerance * max(np.abs(want).max(), 1e-300)
    )


def weights_of(kind: str, count: int) -> np.ndarray | None:
    rng = np.random.default_rng(count)
    if kind == "none":
        return None
    w = rng.random(count) < 0.6 if kind == "mask" else rng.random(count) * (rng.random(count) < 0.7)
    return w.astype(np.float64)
