"""The folds of the C core against float64 references: errors, spectra, gauges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from fold_cases import SIZES, Heads, make

import foldprune  # noqa: F401  (loads the library that _core is linked to)
from foldprune import _core


def products(heads: Heads) -> list[np.ndarray]:
    left, bias, right, _, count, groups = heads
    return reference.products(left, bias, right, count, groups)


def written(fold: tuple[Any, ...], heads: int, groups: int) -> list[np.ndarray]:
    """M of every group, from what the fold wrote, the extra column left out."""
    left, right = fold[0], fold[1]
    per_group = heads // groups
    return [
        np.concatenate([left[j * per_group + i].T @ right[j] for i in range(per_group)])
        for j in range(groups)
    ]


def check_shape(fold: tuple[Any, ...], heads: Heads, capacity: int, gauge: bool) -> None:
    left, right, pivots, ranks, error, energy = fold[:6]
    n = heads[0].shape[1] + (heads[1] is not None)
    d = heads[2].shape[1] + (heads[3] is not None)
    count, groups = heads[4:]
    assert left.shape == (count, capacity, n) and right.shape == (groups, capacity, d)
    assert left.dtype == right.dtype == error.dtype == energy.dtype == np.float64
    assert (pivots is not None) == gauge and ranks.shape == error.shape == energy.shape == (groups,)
    for j, rank in enumerate(ranks.tolist()):
        assert not right[j, rank:].any()
        per_group = count // groups
        assert not left[j * per_group : (j + 1) * per_group, rank:].any()
        if gauge:
            own = pivots[j]
            assert len(set(own[:rank].tolist())) == rank and np.all(own[rank:] == -1)
            assert np.array_equal(right[j, :rank][:, own[:rank]], np.eye(rank))


# ---- IRC ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_irc_spectrum(size, bias):
    heads = make(size, bias)
    head_dim = SIZES[size][2]
    got = _core.irc_spectrum(heads)
    want = np.array([reference.spectrum(m, head_dim) for m in products(heads)])
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12 * want.max())
    assert np.all(np.diff(got, axis=1) <= 0)


@pytest.mark.parametrize("gauge", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_irc_is_the_best_approximation_of_its_rank(size, bias, gauge):
    heads = make(size, bias)
    count, groups, head_dim = SIZES[size][:3]
    for rank in sorted({0, 1, 2, head_dim // 2, head_dim} & set(range(head_dim + 1))):
        ranks = np.full(groups, rank, np.int32)
        fold = _core.irc(heads, ranks, gauge)
        check_shape(fold, heads, max(rank, 1), gauge)
        for m, got, error, energy in zip(
            products(heads), written(fold, count, groups), fold[4], fold[5], strict=True
        ):
            scale = np.linalg.norm(m)
            np.testing.assert_allclose(got, reference.best_rank(m, rank), atol=1e-9 * scale)
            tail = reference.spectrum(m, head_dim)[rank:].sum()
            assert error == pytest.approx(tail, rel=1e-9, abs=1e-12 * scale**2)
            assert energy == pytest.approx(scale**2, rel=1e-12)


@pytest.mark.parametrize("size", ["plain", "grouped", "odd"])
def test_irc_ranks_may_differ(size):
    heads = make(size, True)
    count, groups, head_dim = SIZES[size][:3]
    ranks = np.array([(3 * j + 1) % (head_dim + 1) for j in range(groups)], np.int32)
    for gauge in (False, True):
        fold = _core.irc(heads, ranks, gauge)
        assert np.array_equal(fold[3], ranks)
        check_shape(fold, heads, int(ranks.max()), gauge)
        for m, got, rank in zip(products(heads), written(fold, count, groups), ranks, strict=True):
            want = reference.best_rank(m, int(rank))
            np.testing.assert_allclose(got, want, atol=1e-9 * np.linalg.norm(m))


def test_irc_balances_its_factors():
    heads = make("plain")
    left, right, *_ = _core.irc(heads, np.full(4, 3, np.int32), False)
    for i, m in enumerate(products(heads)):
        singular = np.sqrt(reference.spectrum(m, 3))
        for factor in (left[i], right[i]):
            np.testing.assert_allclose(
                factor @ factor.T, np.diag(singular), atol=1e-9 * singular[0]
            )


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_irc_lossless(size, bias, extra):
    heads = make(size, bias, extra)
    left, right_in, extra_in = heads[0], heads[2], heads[3]
    count, groups, head_dim, _, d = SIZES[size]
    fold = _core.irc(heads, None, True)
    check_shape(fold, heads, head_dim, True)
    whole = heads
    if extra:  # the extra column is carried along, as one more column of right
        whole = (
            left,
            heads[1],
            np.concatenate([right_in, extra_in[:, None]], 1),
            None,
            count,
            groups,
        )
    for m, got, rank in zip(products(whole), written(fold, count, groups), fold[3], strict=True):
        assert np.abs(m[:, :d] - got[:, :d]).max() <= 1e-9 * np.abs(m).max()
        assert rank == np.linalg.matrix_rank(m[:, :d])
        if extra and rank == min(head_dim, m.shape[0]):  # in the span of the pivots
            assert np.abs(m - got).max() <= 1e-9 * np.abs(m).max()
    assert np.array_equal(fold[4], np.zeros(groups))


@pytest.mark.parametrize("size", ["plain", "grouped", "wide"])
def test_gauges_are_well_conditioned(size):
    """Column-pivoted QR: entries of the stored factor stay moderate."""
    for seed in range(3):
        left, bias, right, extra, count, groups = make(size)
        rng = np.random.default_rng(seed)
        right = right * 10.0 ** rng.uniform(-3, 0, right.shape[1])
        fold = _core.irc((left, bias, right, extra, count, groups), None, True)
        assert np.abs(fold[1]).max() < 50


# ---- degenerate heads ---------------------------------------------------------------------------


def degenerate(case: str) -> Heads:
    left, bias, right, extra, heads, groups = make("plain", True)
    head_dim = 8
    if case == "zero key head":
        right[head_dim : 2 * head_dim] = 0
    elif case == "zero query head":
        left[:head_dim] = 0
        bias[:head_dim] = 0
    elif case == "all zero":
        left[:], bias[:], right[:] = 0, 0, 0
    elif case == "duplicated rows":
        right[head_dim : 2 * head_dim] = np.repeat(right[head_dim : head_dim + 4], 2, axis=0)
    elif case == "one distinct row":
        right[:head_dim] = right[0]
    elif case == "rank two":
        rng = np.random.default_rng(1)
        left[:head_dim] = rng.standard_normal((head_dim, 2)) @ rng.standard_normal(
            (2, left.shape[1])
        )
        bias[:head_dim] = 0
    elif case == "duplicated columns":
        right[:, 1::2] = right[:, ::2]
    elif case == "wide range":
        right *= 10.0 ** -np.arange(right.shape[0])[:, None].clip(0, 12)
    return left, bias, right, extra, heads, groups


CASES = [
    "zero key head",
    "zero query head",
    "all zero",
    "duplicated rows",
    "one distinct row",
    "rank two",
    "duplicated columns",
    "wide range",
]


@pytest.mark.parametrize("case", CASES)
def test_degenerate_heads(case):
    heads = degenerate(case)
    ms = products(heads)
    largest = max(np.linalg.norm(m) for m in ms)
    want = np.array([reference.spectrum(m, 8) for m in ms])
    np.testing.assert_allclose(_core.irc_spectrum(heads), want, atol=1e-12 * max(want.max(), 1e-30))
    for fold in (
        _core.irc(heads, None, True),
        _core.irc(heads, None, False),
        _core.irc(heads, np.full(4, 8, np.int32), True),
        _core.irc(heads, np.full(4, 8, np.int32), False),
        _core.dwc_remainder((heads[0], None, *heads[2:]), np.full(4, 8, np.int32)),
    ):
        assert all(np.isfinite(part).all() for part in fold if part is not None)
        wanted = ms if fold[0].shape[2] == 33 else products((heads[0], None, *heads[2:]))
        if len(fold) > 6:  # the remainder's factors stand beside the identity
            fold = (fold[0], fold[1] + np.einsum("jrk,jkd->jrd", fold[6], fold[7]), *fold[2:6])
        for m, got, rank in zip(wanted, written(fold, 4, 4), fold[3], strict=True):
            assert np.abs(m - got).max() <= 1e-9 * max(np.linalg.norm(m), 1e-30) + 1e-12 * largest
            if case != "wide range":
                assert rank == (np.linalg.matrix_rank(m) if m.any() else 0)
    pivoted = _core.dwc_select((heads[0], None, *heads[2:]), None, 8)
    assert all(np.isfinite(part).all() for part in pivoted)


# ---- DWC ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("extra", [False, True])
def test_dwc_pivot_takes_the_columns_of_largest_norm(size, extra):
    heads = make(size, extra=extra)
    count, groups, head_dim, _, d = SIZES[size]
    take = min(head_dim, d)
    fold = _core.dwc_select(heads, None, take)
    check_shape(fold, heads, take, True)
    for j, m in enumerate(products(heads)):
        norms = (m**2).sum(axis=0)
        chosen = np.sort(np.argsort(-norms, kind="stable")[:take])
        assert np.array_equal(fold[2][j], chosen)
        got = written(fold, count, groups)[j]
        np.testing.assert_allclose(got[:, chosen], m[:, chosen], atol=1e-12 * np.linalg.norm(m))
        assert not np.delete(got[:, :d], chosen, axis=1).any()
        left_out = np.delete(norms, chosen).sum()
        assert fold[4][j] == pytest.approx(left_out, rel=1e-9, abs=1e-12 * norms.sum())
        assert fold[5][j] == pytest.approx(norms.sum(), rel=1e-12)


def test_dwc_pivot_ties_go_to_the_first():
    right = np.tile(np.eye(2), (1, 3))  # columns 0, 2, 4 and 1, 3, 5 are equal
    fold = _core.dwc_select((np.eye(2), None, right, None, 1, 1), None, 2)
    assert fold[2].tolist() == [[0, 1]]


@pytest.mark.parametrize("size", ["plain", "grouped", "odd"])
def test_dwc_with_given_columns(size):
    heads = make(size)
    count, groups, head_dim, _, d = SIZES[size]
    rng = np.random.default_rng(0)
    columns = np.stack([rng.choice(d, head_dim, replace=False) for _ in range(groups)])
    fold = _core.dwc_select(heads, np.ascontiguousarray(columns, np.int32), head_dim)
    assert np.array_equal(fold[2], columns)
    for j, m in enumerate(products(heads)):
        want = np.zeros_like(m)
        want[:, columns[j]] = m[:, columns[j]]
        np.testing.assert_allclose(
            written(fold, count, groups)[j], want, atol=1e-12 * np.linalg.norm(m)
        )
        error = ((m - want) ** 2).sum()
        assert fold[4][j] == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("size", ["plain", "grouped", "more rows than columns"])
def test_dwc_fits_the_extra_column(size):
    """Where no output bias takes up the value's, it is fitted in the chosen columns."""
    heads = make(size, extra=True)
    count, groups, head_dim, _, d = SIZES[size]
    per_group = count // groups
    fold = _core.dwc_select(heads, None, min(head_dim, d))
    for j, m in enumerate(products(heads)):
        own = heads[3][j * head_dim : (j + 1) * head_dim]
        left = heads[0].reshape(count, head_dim, -1)[j * per_group : (j + 1) * per_group]
        target = np.concatenate([block.T @ own for block in left])
        chosen = m[:, fold[2][j]]
        best = chosen @ np.linalg.lstsq(chosen, target, rcond=None)[0]
        got = chosen @ fold[1][j, :, d]
        np.testing.assert_allclose(got, best, atol=1e-9 * np.linalg.norm(target))


@pytest.mark.parametrize("size", SIZES)
def test_dwc_remainder(size):
    heads = make(size)
    count, groups, head_dim, _, _d = SIZES[size]
    squared, energy = _core.dwc_spectrum(heads)
    for k in sorted({0, 1, 3, head_dim - 1, head_dim} & set(range(head_dim + 1))):
        fold = _core.dwc_remainder(heads, np.full(groups, k, np.int32))
        left, right, pivots, ranks, error, energies, a, b = fold
        check_shape(fold, heads, head_dim, True)
        total = right + np.einsum("jrk,jkd->jrd", a, b)
        got = written((left, total), count, groups)
        for j, m in enumerate(products(heads)):
            rank, scale = int(ranks[j]), np.linalg.norm(m)
            assert rank == np.linalg.matrix_rank(m)
            own = pivots[j, :rank]
            rest = np.delete(m, own, axis=1)
            # pivots exact; elsewhere the best rank-k part of what they leave
            np.testing.assert_allclose(got[j][:, own], m[:, own], atol=1e-9 * scale)
            if rest.shape[1]:
                want = reference.best_rank(rest, min(k, min(rest.shape)))
                np.testing.assert_allclose(np.delete(got[j], own, axis=1), want, atol=1e-8 * scale)
            tail = reference.spectrum(rest, head_dim) if rest.shape[1] else np.zeros(head_dim)
            assert error[j] == pytest.approx(tail[k:].sum(), rel=1e-8, abs=1e-12 * scale**2)
            np.testing.assert_allclose(squared[j], tail, rtol=1e-8, atol=1e-12 * scale**2)
            assert energies[j] == pytest.approx(scale**2, rel=1e-12)
            assert energy[j] == energies[j]
            assert not a[j, :, k:].any() and not b[j, k:].any() and not b[j][:, own].any()


# ---- rotary planes ------------------------------------------------------------------------------

ROPE_SIZES = ["plain", "grouped", "one key head", "one head", "more rows than columns", "wide"]


@pytest.mark.parametrize("pairing", ["half", "adjacent"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", ROPE_SIZES)
def test_rope_scores(size, bias, pairing):
    heads = make(size, bias, bias)
    left, left_bias, right, right_bias, count, groups = heads
    want = reference.plane_scores(left, left_bias, right, right_bias, count, groups, pairing)
    got = _core.rope_scores(heads, pairing == "adjacent")
    np.testing.assert_allclose(got, want, rtol=1e-12)


def plane_logits(
    q: np.ndarray, k: np.ndarray, planes: list[int], x: np.ndarray, head_dim: int
) -> np.ndarray:
    """Logits of one head from planes (planes x 2 x columns); x has the bias's column of ones."""
    positions = np.arange(len(x), dtype=np.float64)
    logits = np.zeros((len(x), len(x)))
    for i, plane in enumerate(planes):
        frequency = 10000.0 ** (-2 * plane / head_dim)
        a = reference.rotate(x @ q[i].T, positions, frequency)
        b = reference.rotate(x @ k[i].T, positions, frequency)
        logits += a @ b.T
    return logits


@pytest.mark.parametrize("gauge", [False, True])
@pytest.mark.parametrize("pairing", ["half", "adjacent"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", ["plain", "grouped", "one key head"])
def test_rope_keeps_the_logits_of_the_planes_it_keeps(size, bias, pairing, gauge):
    heads = make(size, bias, bias)
    left, left_bias, right, right_bias, count, groups = heads
    head_dim = SIZES[size][2]
    half, per_group = head_dim // 2, count // groups
    x = np.random.default_rng(3).standard_normal((7, left.shape[1]))
    if bias:
        x = np.concatenate([x, np.ones((7, 1))], axis=1)
        left = np.concatenate([left, left_bias[:, None]], axis=1)
        right = np.concatenate([right, right_bias[:, None]], axis=1)
    pairs = reference.plane_rows(head_dim, pairing)
    scores = _core.rope_scores(heads, pairing == "adjacent")
    for rank in (1, half - 1, half, None):
        ranks = None if rank is None else np.full(groups, rank, np.int32)
        q, k, pivots, kept, error, energy, planes = _core.rope(
            heads, pairing == "adjacent", scores, ranks, gauge
        )
        wanted = half if rank is None else rank
        assert kept.tolist() == [wanted] * groups
        for j in range(groups):
            own = planes[j].tolist()
            best = np.argsort(-scores[j], kind="stable")[:wanted]
            assert own == sorted(best.tolist())
            assert energy[j] == pytest.approx(scores[j].sum(), rel=1e-12)
            left_out = scores[j].sum() - scores[j][own].sum()
            assert error[j] == pytest.approx(left_out, rel=1e-9, abs=1e-12 * energy[j])
            if gauge:
                for i in range(wanted):
                    assert k[j, i, :, pivots[j, i]].tolist() == [1.0, 0.0]
            original_k = right.reshape(groups, head_dim, -1)[j][[list(pairs[p]) for p in own]]
            for i in range(j * per_group, (j + 1) * per_group):
                original_q = left.reshape(count, head_dim, -1)[i][[list(pairs[p]) for p in own]]
                want = plane_logits(original_q, original_k, own, x, head_dim)
                got = plane_logits(q[i], k[j], own, x, head_dim)
                np.testing.assert_allclose(got, want, atol=1e-11 * np.abs(want).max())


def test_rope_drops_planes_that_contribute_nothing():
    heads = make("plain")
    heads[2][[1, 5]] = 0  # plane 1 of key head 0
    heads[0][[8 + 2, 8 + 6]] = 0  # plane 2 of query head 1
    scores = _core.rope_scores(heads, False)
    _, _, pivots, kept, error, _, planes = _core.rope(heads, False, scores, None, True)
    assert kept.tolist() == [3, 3, 4, 4] and not error.any()
    assert planes[0].tolist() == [0, 2, 3, -1] and planes[1].tolist() == [0, 1, 3, -1]
    assert pivots[0, 3] == -1


# ---- scales of the inputs -----------------------------------------------------------------------


def scaled(size: str, bias: bool = True) -> tuple[Any, ...]:
    heads = make(size, bias)
    rng = np.random.default_rng(9)
    _, _, _, n, d = SIZES[size]
    scale = [10.0 ** rng.uniform(-1, 1, count) for count in (n, d)]
    return (*heads, *scale)


@pytest.mark.parametrize("gauge", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_scales_weigh_irc(size, gauge):
    """The best approximation is the scaled M's; what is written is in the weights' own units."""
    heads = scaled(size)
    left, bias, right, _, count, groups, left_scale, right_scale = heads
    head_dim = SIZES[size][2]
    weighed = reference.products(left, bias, right, count, groups, left_scale, right_scale)
    spectra = [reference.spectrum(m, head_dim) for m in weighed]
    got = _core.irc_spectrum(heads)
    np.testing.assert_allclose(got, spectra, rtol=1e-9, atol=1e-12 * np.max(spectra))
    rows = np.tile(np.append(left_scale, 1.0), count // groups)
    for rank in sorted({1, head_dim // 2} - {0}):
        fold = _core.irc(heads, np.full(groups, rank, np.int32), gauge)
        check_shape(fold, heads[:6], rank, gauge)
        for j, m in enumerate(weighed):
            own = rows[:, None] * written(fold, count, groups)[j] * right_scale
            scale = np.linalg.norm(m)
            np.testing.assert_allclose(own, reference.best_rank(m, rank), atol=1e-9 * scale)
            tail = spectra[j][rank:].sum()
            assert fold[4][j] == pytest.approx(tail, rel=1e-9, abs=1e-12 * scale**2)
            assert fold[5][j] == pytest.approx(scale**2, rel=1e-12)
    lossless = _core.irc(heads, None, True)
    check_shape(lossless, heads[:6], head_dim, True)
    for m, own in zip(products(heads[:6]), written(lossless, count, groups), strict=True):
        assert np.abs(m - own).max() <= 1e-9 * np.abs(m).max()


@pytest.mark.parametrize("size", SIZES)
def test_scales_weigh_dwc(size):
    left, _, right, _, count, groups, _, scale = scaled(size, bias=False)
    heads = (left, None, right, None, count, groups, None, scale)
    head_dim, d = SIZES[size][2], SIZES[size][4]
    weighed = reference.products(left, None, right, count, groups, None, scale)
    take = min(head_dim, d)
    fold = _core.dwc_select(heads, None, take)
    check_shape(fold, heads[:6], take, True)
    for j, m in enumerate(weighed):
        norms = (m**2).sum(axis=0)
        assert np.array_equal(fold[2][j], np.sort(np.argsort(-norms, kind="stable")[:take]))
        left_out = np.delete(norms, fold[2][j]).sum()
        assert fold[4][j] == pytest.approx(left_out, rel=1e-9, abs=1e-12 * norms.sum())
    k = min(2, head_dim)
    parts = _core.dwc_remainder(heads, np.full(groups, k, np.int32))
    check_shape(parts[:6], heads[:6], head_dim, True)
    squared, _ = _core.dwc_spectrum(heads)
    total = parts[1] + np.einsum("jrk,jkd->jrd", parts[6], parts[7])
    got = written((parts[0], total), count, groups)
    for j, m in enumerate(weighed):
        rank, size_of = int(parts[3][j]), np.linalg.norm(m)
        own = parts[2][j, :rank]
        rest = np.delete(m, own, axis=1)
        np.testing.assert_allclose((got[j] * scale)[:, own], m[:, own], atol=1e-9 * size_of)
        if rest.shape[1]:
            want = reference.best_rank(rest, min(k, min(rest.shape)))
            left_over = np.delete(got[j] * scale, own, axis=1)
            np.testing.assert_allclose(left_over, want, atol=1e-8 * size_of)
            tail = reference.spectrum(rest, head_dim)
            np.testing.assert_allclose(squared[j], tail, rtol=1e-8, atol=1e-12 * size_of**2)


@pytest.mark.parametrize("size", ROPE_SIZES)
def test_scales_weigh_planes(size):
    left, bias, right, _, count, groups, left_scale, right_scale = scaled(size)
    heads = (left, bias, right, None, count, groups, left_scale, right_scale)
    want = reference.plane_scores(
        left, bias, right, None, count, groups, "half", left_scale, right_scale
    )
    np.testing.assert_allclose(_core.rope_scores(heads, False), want, rtol=1e-12)
