"""Float64 NumPy references of attention over folded heads, written from the definition: logits,
softmax and its Jacobian in full. Nothing here calls the C core."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def visible(shape: tuple[int, int, int], causal: bool, key_mask: Array | None) -> Array:
    """Which keys each query sees: (batch, 1, n, m) from (batch, n, m)."""
    batch, n, m = shape
    seen = np.ones((batch, 1, n, m), bool)
    if causal:
        seen &= np.arange(m)[None, :] <= np.arange(n)[:, None] + m - n
    return seen if key_mask is None else seen & key_mask[:, None, None, :]


def _weights(
    q: Array, k: Array, scale: float, causal: bool, key_mask: Array | None
) -> tuple[Array, Array]:
    """Softmax weights (batch, heads, n, m) and log-sum-exp (batch, heads, n), in float64; zero and
    -inf for a query that sees nothing."""
    keys = np.repeat(k.astype(np.float64), q.shape[1] // k.shape[1], axis=1)
    logits = scale * q.astype(np.float64) @ keys.transpose(0, 1, 3, 2)
    seen = visible((q.shape[0], q.shape[2], k.shape[2]), causal, key_mask)
    logits = np.where(seen, logits, -np.inf)
    top = logits.max(axis=-1, keepdims=True, initial=-np.inf)
    top[top == -np.inf] = 0.0
    e = np.exp(logits - top)
    total = e.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + top)[..., 0]
    return np.divide(e, total, out=np.zeros_like(e), where=total != 0), lse


def attention(
    q: Array,
    k: Array,
    v: Array,
    scale: float = 1.0,
    causal: bool = False,
    key_mask: Array | None = None,
) -> tuple[Array, Array]:
    """Softmax attention and its log-sum-exp."""
    p, lse = _weights(q, k, scale, causal, key_mask)
    return p @ np.repeat(v.astype(np.float64), q.shape[1] // v.shape[1], axis=1), lse


def gradients(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    scale: float = 1.0,
    causal: bool = False,
    key_mask: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of sum(dout * out), by the softmax's Jacobian."""
    dout = dout.astype(np.float64)
    group, kv_heads = q.shape[1] // k.shape[1], k.shape[1]
    keys, values = (np.repeat(x.astype(np.float64), group, axis=1) for x in (k, v))
    p, _ = _weights(q, k, scale, causal, key_mask)
    dp = dout @ values.transpose(0, 1, 3, 2)
    ds = scale * p * (dp - (p * dp).sum(axis=-1, keepdims=True))
    dk = ds.transpose(0, 1, 3, 2) @ q.astype(np.float64)
    dv = p.transpose(0, 1, 3, 2) @ dout

    def of_group(x: Array) -> Array:
        return x.reshape(x.shape[0], kv_heads, group, *x.shape[2:]).sum(axis=2)

    return ds @ keys, of_group(dk), of_group(dv)
