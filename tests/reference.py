"""Float64 NumPy references, written from the definitions of the methods and of the format.

Nothing here calls the C core or the package's own decoding: masks come from a stable argsort, folds
from NumPy's SVD, and attention from the stored parts of a compressed checkpoint.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

# ---- pruning ------------------------------------------------------------------------------------


def scores(x: Array, scale: float = 1.0, col_scale: Array | None = None) -> Array:
    """|x| * scale * col_scale in the precision that the core promises."""
    kind = np.float64 if x.dtype == np.float64 else np.float32
    s = np.abs(x.astype(kind)) * kind(scale)
    return s if col_scale is None else s * col_scale.astype(kind)


def keep_lowest_removed(all_scores: list[Array], k: int) -> list[Array]:
    """Boolean masks (True: kept) that remove the k lowest of all; of equal ones the first go."""
    flat = np.concatenate([s.astype(np.float64).ravel() for s in all_scores])
    keep = np.ones(flat.size, bool)
    keep[np.argsort(flat, kind="stable")[:k]] = False
    cuts = np.cumsum([s.size for s in all_scores])[:-1]
    return [m.reshape(s.shape) for m, s in zip(np.split(keep, cuts), all_scores, strict=True)]


def keep_rows(s: Array, k: int) -> Array:
    """k lowest of every row removed, the first of equal ones first."""
    keep = np.ones(s.shape, bool)
    order = np.argsort(s.astype(np.float64), axis=1, kind="stable")[:, :k]
    np.put_along_axis(keep, order, False, axis=1)
    return keep


def keep_nm(s: Array, n: int, m: int) -> Array:
    """The n highest of every m consecutive columns kept, the first of equal ones first."""
    keep = np.zeros(s.shape, bool)
    for begin in range(0, s.shape[1], m):
        group = s[:, begin : begin + m].astype(np.float64)
        order = np.argsort(-group, axis=1, kind="stable")[:, :n]
        np.put_along_axis(keep[:, begin : begin + m], order, True, axis=1)
    return keep


def block_rms(s: Array, rows: int, cols: int) -> Array:
    """Root mean square of every block; blocks at the edges may be smaller."""
    grid = np.empty((-(-s.shape[0] // rows), -(-s.shape[1] // cols)))
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            block = s[i * rows : (i + 1) * rows, j * cols : (j + 1) * cols].astype(np.float64)
            grid[i, j] = np.sqrt(np.mean(block**2))
    return grid


def expand_blocks(keep: Array, shape: tuple[int, int], rows: int, cols: int) -> Array:
    full = np.repeat(np.repeat(keep, rows, axis=0), cols, axis=1)
    return full[: shape[0], : shape[1]]


def bits(keep: Array) -> Array:
    """A bit per element in row-major order, least significant first."""
    return np.packbits(keep.ravel(), bitorder="little")


def unbits(mask: Array, shape: tuple[int, ...]) -> Array:
    count = int(np.prod(shape))
    return np.unpackbits(mask, bitorder="little")[:count].astype(bool).reshape(shape)


# ---- folds --------------------------------------------------------------------------------------


def input_scale(gain: Array) -> Array:
    """What a normalisation with this gain puts out, per column: |gain|, no less than a thousandth
    of the largest."""
    size = np.abs(gain.astype(np.float64))
    return np.maximum(size, 1e-3 * size.max())


def products(
    left: Array,
    left_bias: Array | None,
    right: Array,
    heads: int,
    groups: int,
    left_scale: Array | None = None,
    right_scale: Array | None = None,
) -> list[Array]:
    """M of every group: [left bias]^T right of each of its heads, stacked: (per_group * n) x d.

    The scales weigh the columns of left (not its bias) and of right.
    """
    left = left.astype(np.float64)
    if left_scale is not None:
        left = left * left_scale
    if left_bias is not None:
        left = np.concatenate([left, left_bias.astype(np.float64)[:, None]], axis=1)
    left = left.reshape(heads, -1, left.shape[1])
    right = right.astype(np.float64)
    if right_scale is not None:
        right = right * right_scale
    right = right.reshape(groups, -1, right.shape[1])
    per_group = heads // groups
    return [
        np.concatenate([left[j * per_group + i].T @ right[j] for i in range(per_group)])
        for j in range(groups)
    ]


def spectrum(m: Array, count: int) -> Array:
    """The ``count`` largest squared singular values, zeros past their number."""
    squared = np.linalg.svd(m, compute_uv=False) ** 2
    out = np.zeros(count)
    out[: min(count, len(squared))] = squared[:count]
    return out


def best_rank(m: Array, rank: int) -> Array:
    """Best approximation of this rank in the Frobenius norm (Eckart and Young)."""
    u, s, vt = np.linalg.svd(m, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def plane_rows(head_dim: int, pairing: str) -> list[tuple[int, int]]:
    half = head_dim // 2
    if pairing == "half":
        return [(p, p + half) for p in range(half)]
    return [(2 * p, 2 * p + 1) for p in range(half)]


def plane_scores(
    left: Array,
    left_bias: Array | None,
    right: Array,
    right_bias: Array | None,
    heads: int,
    groups: int,
    pairing: str,
    left_scale: Array | None = None,
    right_scale: Array | None = None,
) -> Array:
    """|q_p|^2 |k_p|^2 of every plane, query heads of a group summed: groups x head_dim / 2."""
    left = left if left_scale is None else left.astype(np.float64) * left_scale
    right = right if right_scale is None else right.astype(np.float64) * right_scale

    def by_head(w: Array, b: Array | None, count: int) -> Array:
        w = w.astype(np.float64)
        if b is not None:
            w = np.concatenate([w, b.astype(np.float64)[:, None]], axis=1)
        return (w.reshape(count, -1, w.shape[1]) ** 2).sum(axis=2)

    q = by_head(left, left_bias, heads)
    k = by_head(right, right_bias, groups)
    q = q.reshape(groups, heads // groups, -1).sum(axis=1)
    pairs = plane_rows(k.shape[1], pairing)
    return np.stack([(q[:, a] + q[:, b]) * (k[:, a] + k[:, b]) for a, b in pairs], axis=1)


def rotate(y: Array, positions: Array, frequency: float) -> Array:
    """Rotates the pairs in the last axis (..., tokens, 2) by position * frequency."""
    angle = positions * frequency
    cos, sin = np.cos(angle), np.sin(angle)
    first, second = y[..., 0], y[..., 1]
    return np.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)


# ---- attention from what is stored --------------------------------------------------------------


class Stored:
    """One logical (out x in) matrix or bias of a compressed checkpoint, read from its parts.

    ``part`` of ``count``: where in a fused tensor; ``transposed``: the tensor is (in x out);
    ``interleave``: by so many heads.
    """

    def __init__(
        self,
        encoding: Any,
        part: int = 0,
        count: int = 1,
        transposed: bool = False,
        interleave: int = 1,
    ) -> None:
        self.params = {"kind": encoding.kind, **encoding.params()}
        self.parts = dict(encoding.parts())
        self.dtype = encoding.dtype
        shape = tuple(encoding.shape)
        if transposed and len(shape) == 2:
            shape = shape[::-1]
        if self.params["kind"] == "fused":
            self.params = self.params["segments"][part]
            prefix = f"{part}."
            self.parts = {
                name[len(prefix) :]: array
                for name, array in self.parts.items()
                if name.startswith(prefix)
            }
            self.shape = (self.params["rows"], *shape[1:])
        else:
            assert shape[0] % count == 0
            self.shape = (shape[0] // count, *shape[1:])
            if self.params["kind"] == "dense" and (count > 1 or transposed):
                array = self.parts[""]
                array = array.T if transposed and array.ndim == 2 else array
                by_head = array.reshape(interleave, count, -1, *array.shape[1:])
                self.parts = {"": by_head[:, part].reshape(-1, *array.shape[1:])}
            elif count > 1:
                raise AssertionError("a fused tensor is stored as one piece of another kind")

    @property
    def kind(self) -> str:
        return str(self.params["kind"])

    @property
    def cols(self) -> int:
        return self.shape[1] if len(self.shape) == 2 else 1

    def matrix(self) -> Array:
        """The dense matrix; for kinds that have one of their own."""
        if self.kind == "dense":
            return self.parts[""].astype(np.float64)
        if self.kind == "zeros":
            return np.zeros(self.shape)
        assert self.kind == "packed", self.kind
        keep = self.mask()
        out = np.zeros(keep.shape)
        out[keep] = self.parts["values"].astype(np.float64)
        return out

    def mask(self) -> Array:
        """Kept elements of a packed (out x in) matrix."""
        rows, cols = self.params.get("block", (1, 1))
        grid = (-(-self.shape[0] // rows), -(-self.shape[1] // cols))
        shape = (self.shape[0], self.shape[1])
        return expand_blocks(unbits(self.parts["mask"], grid), shape, rows, cols)

    def heads(self, count: int) -> list[Array]:
        """Factor rows of every head: (rank x cols), a bias as (rank x 1)."""
        if self.kind in ("dense", "zeros", "packed"):
            return list(self.matrix().reshape(count, self.shape[0] // count, self.cols))
        assert self.params["heads"] == count
        return self._rows(count) if self.kind == "rows" else self._diagonal(count)

    def _row_values(self, rows: int) -> Array:
        """Of so many stored rows; those that a mask leaves out are zero."""
        values = self.parts["values"].astype(np.float64)
        if "mask" not in self.parts:
            return values
        keep = unbits(self.parts["mask"], (rows, self.cols)).astype(bool)
        whole = np.zeros(keep.shape)
        whole[keep] = values
        return whole.ravel()

    def _rows(self, count: int) -> list[Array]:
        assert self.kind == "rows", self.kind
        out, at, pivot_at = [], 0, 0
        values = self._row_values(int(self.parts["ranks"].sum()))
        for rank in self.parts["ranks"].tolist():
            factor = np.zeros((rank, self.cols))
            free = np.ones(self.cols, bool)
            if "pivots" in self.parts:
                pivots = self.parts["pivots"][pivot_at : pivot_at + rank]
                pivot_at += rank
                free[pivots] = False
                factor[range(rank), pivots] = 1.0
            size = rank * int(free.sum())
            factor[:, free] = values[at : at + size].reshape(rank, -1)
            at += size
            out.append(factor)
        assert at == values.size and len(out) == count
        return out

    def planes(self, count: int, pairing: str) -> list[dict[int, Array]]:
        """Every head's kept planes: number to (2 x cols)."""
        if self.kind in ("dense", "zeros", "packed"):
            head_dim = self.shape[0] // count
            pairs = plane_rows(head_dim, pairing)
            return [
                {p: head[list(rows)] for p, rows in enumerate(pairs)} for head in self.heads(count)
            ]
        assert self.kind == "planes" and self.params["pairing"] == pairing
        out: list[dict[int, Array]] = []
        values, at, plane = self._row_values(2 * int(self.parts["ranks"].sum())), 0, 0
        half = self.shape[0] // count // 2
        # no list: every head keeps all
        where = self.parts.get("planes", np.tile(np.arange(half), count))
        for rank in self.parts["ranks"].tolist():
            head = {}
            for _ in range(rank):
                pair = np.zeros((2, self.cols))
                free = np.ones(self.cols, bool)
                if "pivots" in self.parts:
                    pivot = self.parts["pivots"][plane]
                    pair[:, pivot] = (1.0, 0.0)
                    free[pivot] = False
                size = 2 * int(free.sum())
                pair[:, free] = values[at : at + size].reshape(2, -1)
                head[int(where[plane])] = pair
                at, plane = at + size, plane + 1
            out.append(head)
        assert at == values.size and len(out) == count
        return out

    def _diagonal(self, count: int) -> list[Array]:
        """Value heads (head_dim x cols): identity in the pivots, the remainder elsewhere."""
        assert self.kind == "diagonal", self.kind
        head_dim = self.shape[0] // count
        left, right = (self.parts[side].astype(np.float64) for side in ("left", "right"))
        out, a_at, b_at, pivot_at = [], 0, 0, 0
        ranks = self.parts["ranks"].tolist()
        for rank, k in zip(ranks, self.parts["remainder_ranks"].tolist(), strict=True):
            pivots = self.parts["pivots"][pivot_at : pivot_at + rank]
            pivot_at += rank
            free = np.ones(self.cols, bool)
            free[pivots] = False
            head = np.zeros((head_dim, self.cols))
            head[range(rank), pivots] = 1.0
            width = self.cols - rank
            if k and k * self.cols >= rank * width:  # the remainder itself
                head[:rank, free] = right[b_at : b_at + rank * width].reshape(rank, width)
                b_at += rank * width
            elif k:
                a = left[a_at : a_at + rank * k].reshape(rank, k)
                head[:rank, free] = a @ right[b_at : b_at + k * width].reshape(k, width)
                a_at, b_at = a_at + rank * k, b_at + k * width
            out.append(head)
        assert a_at == left.size and b_at == right.size
        return out


def attention(
    x: Array,
    stored: dict[str, Stored],
    heads: int,
    groups: int,
    head_dim: int,
    rope_base: float | None,
    causal: bool = False,
    scaled: bool = True,
    keys: Array | None = None,
    values: Array | None = None,
    added: Array | float = 0.0,
) -> Array:
    """Output of one attention block on x (tokens x d), from its factors.

    ``stored``: "query", "key", "value", "output" and, where there are biases, "query_bias", ...
    ``keys``, ``values``: what key and value read, if not x. ``added``: to the logits, scaled.
    """
    x = x.astype(np.float64)
    keys = x if keys is None else keys.astype(np.float64)
    values = keys if values is None else values.astype(np.float64)
    logits = scaled_logits(x, keys, stored, heads, groups, head_dim, rope_base, scaled) + added
    if causal:
        tokens = len(x)
        logits = np.where(np.tril(np.ones((tokens, tokens), bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return mixed(weights, values, stored, heads, groups, head_dim)


def scaled_logits(
    x: Array,
    keys: Array,
    stored: dict[str, Stored],
    heads: int,
    groups: int,
    head_dim: int,
    rope_base: float | None,
    scaled: bool = True,
) -> Array:
    """Logits of every head (heads x tokens x keys), up to a constant in each row."""
    if rope_base is None:
        logits = _logits(x, keys, stored, heads, groups)
    else:
        logits = _rope_logits(x, stored, heads, groups, head_dim, rope_base)
    return logits / np.sqrt(head_dim) if scaled else logits


def mixed(
    weights: Array, x: Array, stored: dict[str, Stored], heads: int, groups: int, head_dim: int
) -> Array:
    """What a block puts out whose heads attend to x with these weights (heads x tokens x keys)."""
    per_group = heads // groups
    values = stored["value"].heads(groups)
    bias = stored["value_bias"].heads(groups) if "value_bias" in stored else None
    seen = np.zeros((weights.shape[1], heads, head_dim))
    for i in range(heads):
        j = i // per_group
        v = x @ values[j].T + (bias[j][:, 0] if bias is not None else 0.0)
        seen[:, i, : v.shape[1]] = weights[i] @ v
    y = seen.reshape(len(seen), -1) @ stored["output"].matrix().T
    if "output_bias" in stored:
        y = y + stored["output_bias"].matrix()
    return y


def _logits(x: Array, keys: Array, stored: dict[str, Stored], heads: int, groups: int) -> Array:
    query, key = stored["query"].heads(heads), stored["key"].heads(groups)
    query_bias = stored["query_bias"].heads(heads) if "query_bias" in stored else None
    # dropped where the key was folded: a constant per row of the softmax
    key_bias = None
    if "key_bias" in stored and stored["key_bias"].kind != "zeros":
        key_bias = stored["key_bias"].heads(groups)
    logits = np.zeros((heads, len(x), len(keys)))
    for i in range(heads):
        j = i // (heads // groups)
        q = x @ query[i].T + (query_bias[i][:, 0] if query_bias is not None else 0.0)
        k = keys @ key[j].T + (key_bias[j][:, 0] if key_bias is not None else 0.0)
        logits[i] = q @ k.T
    return logits


def _rope_logits(
    x: Array, stored: dict[str, Stored], heads: int, groups: int, head_dim: int, base: float
) -> Array:
    def project(role: str, count: int) -> list[dict[int, Array]]:
        planes = stored[role].planes(count, "half")
        if (bias := stored.get(f"{role}_bias")) is None:
            return [{p: x @ w.T for p, w in head.items()} for head in planes]
        added = bias.planes(count, "half")
        return [
            {p: x @ w.T + shift[p][:, 0] for p, w in head.items()}
            for head, shift in zip(planes, added, strict=True)
        ]

    positions = np.arange(len(x), dtype=np.float64)
    query, key = project("query", heads), project("key", groups)
    logits = np.zeros((heads, len(x), len(x)))
    for i in range(heads):
        other = key[i // (heads // groups)]
        for plane in sorted(set(query[i]) & set(other)):
            frequency = base ** (-2.0 * plane / head_dim)
            q = rotate(query[i][plane], positions, frequency)
            k = rotate(other[plane], positions, frequency)
            logits[i] += q @ k.T
    return logits


# ---- small checkpoints, as NumPy state dicts ----------------------------------------------------


def bert_state(
    layers: int = 2,
    d: int = 48,
    ff: int = 96,
    vocab: int = 60,
    dtype: Any = np.float32,
    seed: int = 0,
) -> dict[str, Array]:
    """Random BERT under Hugging Face's names."""
    rng = np.random.default_rng(seed)
    state: dict[str, Array] = {}

    def add(name: str, *shape: int, mean: float = 0.0) -> None:
        scale = 1 / np.sqrt(shape[-1]) if len(shape) == 2 else 0.1
        state[name] = (mean + scale * rng.standard_normal(shape)).astype(dtype)

    def norm(prefix: str) -> None:
        add(f"{prefix}.weight", d, mean=1.0)
        add(f"{prefix}.bias", d)

    add("embeddings.word_embeddings.weight", vocab, d)
    add("embeddings.position_embeddings.weight", 32, d)
    add("embeddings.token_type_embeddings.weight", 2, d)
    norm("embeddings.LayerNorm")
    for layer in range(layers):
        prefix = f"encoder.layer.{layer}."
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            add(f"{prefix}attention.{name}.weight", d, d)
            add(f"{prefix}attention.{name}.bias", d)
        norm(f"{prefix}attention.output.LayerNorm")
        add(f"{prefix}intermediate.dense.weight", ff, d)
        add(f"{prefix}intermediate.dense.bias", ff)
        add(f"{prefix}output.dense.weight", d, ff)
        add(f"{prefix}output.dense.bias", d)
        norm(f"{prefix}output.LayerNorm")
    return state


def llama_state(
    layers: int = 2,
    d: int = 64,
    heads: int = 4,
    groups: int = 2,
    ff: int = 96,
    vocab: int = 60,
    dtype: Any = np.float32,
    seed: int = 0,
) -> dict[str, Array]:
    """Random LLaMA under Hugging Face's names."""
    rng = np.random.default_rng(seed)
    head_dim = d // heads

    def matrix(rows: int, cols: int) -> Array:
        return (rng.standard_normal((rows, cols)) / np.sqrt(cols)).astype(dtype)

    state = {"model.embed_tokens.weight": matrix(vocab, d)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        state[f"{prefix}self_attn.q_proj.weight"] = matrix(heads * head_dim, d)
        state[f"{prefix}self_attn.k_proj.weight"] = matrix(groups * head_dim, d)
        state[f"{prefix}self_attn.v_proj.weight"] = matrix(groups * head_dim, d)
        state[f"{prefix}self_attn.o_proj.weight"] = matrix(d, heads * head_dim)
        state[f"{prefix}mlp.gate_proj.weight"] = matrix(ff, d)
        state[f"{prefix}mlp.up_proj.weight"] = matrix(ff, d)
        state[f"{prefix}mlp.down_proj.weight"] = matrix(d, ff)
        state[f"{prefix}input_layernorm.weight"] = np.ones(d, dtype)
        state[f"{prefix}post_attention_layernorm.weight"] = np.ones(d, dtype)
    state["model.norm.weight"] = np.ones(d, dtype)
    state["lm_head.weight"] = matrix(vocab, d)
    return state


def same_bytes(a: Array, b: Array) -> bool:
    """Same dtype, shape and bits (so that NaN equals itself and -0 is not 0)."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()
    )
