"""FPP of the rows that IRC keeps, against NumPy's least squares and the logits of data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from test_folds_calibrated import bert, data, moments, qwen2

from foldprune import irc, schemas, sparse_rows
from foldprune.inputs import BlockInputs
from foldprune.schemas.layout import find_layout

Array = np.ndarray[Any, np.dtype[Any]]

BLOCKS = {"bert": bert, "qwen2": lambda: qwen2(True), "llama": lambda: qwen2(False)}


def parts(fold: Any, role: str) -> tuple[Array, Array]:
    """Mask and numbers of the stored rows."""
    weight = fold.weights[role]
    rows = int(weight.ranks.sum()) * (2 if weight.kind == "planes" else 1)
    keep = reference.unbits(weight.mask, (rows, weight.cols)).astype(bool)
    whole = np.zeros(keep.shape)
    whole[keep] = weight.values
    return keep, whole


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_every_row_loses_the_share(name, given):
    state, block = BLOCKS[name]()
    cols = block.query.cols
    known = moments(data(cols)) if given else None
    for share in (0.3, 0.75, 0.99):
        fold = sparse_rows.fold(block, state, 3, share, moments=known, source=known)
        for role in ("query", "key"):
            keep, _ = parts(fold, role)
            assert (keep.sum(axis=1) == cols - round(share * cols)).all()
            assert fold.weights[role].numbers == keep.sum()


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_nothing_removed_is_the_fold_itself(name, given):
    state, block = BLOCKS[name]()
    known = moments(data(block.query.cols)) if given else None
    plain = irc.fold(block, state, 3, moments=known, source=known)
    fold = sparse_rows.fold(block, state, 3, 1e-6, moments=known, source=known)
    assert fold.error == pytest.approx(plain.error, rel=1e-9)


@pytest.mark.parametrize("name", BLOCKS)
def test_without_data_the_largest_stay(name):
    state, block = BLOCKS[name]()
    scale = BlockInputs(block, state, None).scale
    fold = sparse_rows.fold(block, state, 2, 0.5)
    plain = irc.fold(block, state, 2, plain=True)
    for role in ("query", "key"):
        weight = plain.weights[role]
        rows = weight.values.reshape(-1, weight.cols)
        scores = reference.scores(rows, col_scale=scale)
        keep, whole = parts(fold, role)
        assert (keep == reference.keep_rows(scores, round(0.5 * weight.cols))).all()
        np.testing.assert_array_equal(whole[keep], rows[keep])


@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_kept_is_the_least_squares_fit(name):
    """Of what each row gave, and the bias makes up for the mean."""
    state, block = BLOCKS[name]()
    x = data(block.query.cols, rows=20_000)
    known = moments(x)
    plain = irc.fold(block, state, 3, moments=known, source=known, plain=True)
    fold = sparse_rows.fold(block, state, 3, 0.6, moments=known, source=known)
    inputs = BlockInputs(block, state, known)
    covariance = inputs.centred @ inputs.centred.T
    for role in ("query", "key"):
        rows = plain.weights[role].values.reshape(-1, block.query.cols)
        keep, whole = parts(fold, role)
        bias = plain.biases.get(role)
        constant_matters = role == "query" or block.rope
        second = covariance
        if bias is None and constant_matters:
            second = covariance + np.outer(inputs.mean, inputs.mean)
        damped = second + 0.01 * np.diagonal(second).mean() * np.eye(len(second))
        for row, new, kept in zip(rows, whole, keep, strict=True):
            want = np.linalg.solve(damped[np.ix_(kept, kept)], damped[kept] @ row)
            np.testing.assert_allclose(new[kept], want, rtol=1e-6, atol=1e-9 * np.abs(want).max())
        if bias is not None and constant_matters:
            means = [(x @ r.T).mean(0) + b.values for r, b in (
                (rows, bias), (whole, fold.biases[role])
            )]  # fmt: skip
            np.testing.assert_allclose(*means, atol=1e-8 * np.abs(means[0]).max())


def test_the_error_is_that_of_the_logits():
    """Over all pairs of rows, each query's mean over the keys taken out."""
    state, block = bert()
    x = data(48, rows=20_000)
    known = moments(x)
    y, prefix = x[:2000], "encoder.layer.0.attention.self"

    def logits(query: Array, bias: Array, key: Array) -> list[Array]:
        """Of every head, in factors whose product they are."""
        parts = query.reshape(4, 12, 48), bias.reshape(4, 12), key.reshape(4, 12, 48)
        heads = zip(*parts, strict=True)
        return [(y @ q.T + b, (x - x.mean(0)) @ k.T) for q, b, k in heads]

    names = ("query.weight", "query.bias", "key.weight")
    whole = logits(*(state[f"{prefix}.{name}"] for name in names))

    def error(fold: Any) -> float:
        own = logits(
            fold.weights["query"].unpack(),
            fold.biases["query"].unpack(),
            fold.weights["key"].unpack(),
        )
        lost = energy = 0.0
        for (q, k), (q_new, k_new) in zip(whole, own, strict=True):
            want, got = q @ k[:3000].T, q_new @ k_new[:3000].T
            lost += np.square(want - got).sum()
            energy += np.square(want).sum()
        return lost / energy

    pruned = sparse_rows.fold(block, state, 4, 0.75, moments=known, source=known)
    assert pruned.error == pytest.approx(error(pruned), rel=0.05)
    plain = irc.fold(block, state, 4, moments=known, source=known)
    assert plain.error < pruned.error < irc.fold(block, state, 1, moments=known).error


@pytest.mark.parametrize("pairing", ["half", "adjacent"])
@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_the_error_under_rotation_is_over_all_angles(name, pairing):
    state, block = BLOCKS[name]()
    block.rope = pairing
    x = data(64, rows=20_000)
    known = moments(x)
    fold = sparse_rows.fold(block, state, 3, 0.5, moments=known, source=known)
    prefix, half = "model.layers.0.self_attn", block.head_dim // 2
    pairs = np.array(reference.plane_rows(block.head_dim, pairing))

    def planes(rows: Array, bias: Array | float, count: int) -> Array:
        """Complex (tokens, heads, planes)."""
        y = (x @ rows.T + bias).reshape(len(x), count, block.head_dim)[:, :, pairs]
        return np.repeat(y[..., 0] + 1j * y[..., 1], block.heads // count, axis=1)

    def side(letter: str, role: str, count: int) -> tuple[Array, Array]:
        bias = state.get(f"{prefix}.{letter}_proj.bias", 0.0)
        own = fold.biases[role].unpack() if role in fold.biases else 0.0
        return (
            planes(state[f"{prefix}.{letter}_proj.weight"], bias, count),
            planes(fold.weights[role].unpack(), own, count),
        )

    (q, q_new), (k, k_new) = side("q", "query", block.heads), side("k", "key", block.groups)
    assert q.shape[2] == half
    # independent queries and keys: tokens of each half of the data
    q, q_new, k, k_new = q[:10_000], q_new[:10_000], k[10_000:], k_new[10_000:]
    lost = np.square(np.abs(q * k.conj() - q_new * k_new.conj())).sum()
    assert fold.error == pytest.approx(lost / np.square(np.abs(q * k.conj())).sum(), rel=0.1)


def test_more_ranks_in_as_many_numbers(minilm_state):
    """Of real weights the product loses less so than at rank 1."""
    config = {"model_type": "bert", "num_attention_heads": 12}
    blocks = find_layout(minilm_state, schemas.known(), config, None).attentions
    for block in blocks[:3]:
        one = irc.fold(block, minilm_state, 1)
        for rank, share in ((4, 0.75), (2, 0.5)):
            fold = sparse_rows.fold(block, minilm_state, rank, share)
            assert fold.weights["query"].numbers == one.weights["query"].numbers
            assert fold.error < one.error
