"""Folds weighted by second moments, against references written from the definitions: the weighted
product formed explicitly, NumPy's SVD and least squares, and data whose moments they are."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import reference
from test_folds import SIZES, check_shape, make, written

from foldprune import _core, dwc, irc, schemas
from foldprune.errors import TensorError
from foldprune.schemas.layout import find_layout

Array = np.ndarray[Any, np.dtype[Any]]
NAMES = ["plain", "grouped", "one key head", "more rows than columns", "one column", "odd", "wide"]


class Given(NamedTuple):
    """Moments as calibration gives them."""

    count: float
    mean: Array
    second: Array


def moments(x: Array) -> Given:
    return Given(float(len(x)), x.mean(axis=0), x.T @ x / len(x))


def factor(n: int, seed: int, rank: int | None = None) -> Array:
    """A square F whose F F^T has strong correlations and unequal scales."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((n, n)) * 10.0 ** rng.uniform(-1, 1, n)
    mixed[:, n if rank is None else rank :] = 0
    return np.ascontiguousarray(mixed * 10.0 ** rng.uniform(-1, 1, n)[:, None])


def weighted(m: Array, per_group: int, left: Array | None, right: Array) -> Array:
    """F_left^T M_i F_right of every head of the group, stacked."""
    blocks = m.reshape(per_group, -1, m.shape[1])
    return np.concatenate([(b if left is None else left.T @ b) @ right for b in blocks])


class Case:
    """Heads with factors on both sides (or on the right alone), and their weighted products."""

    def __init__(self, size: str, bias: bool = True, left: bool = True, rank: int | None = None):
        self.plain = make(size, bias)
        self.count, self.groups, self.head_dim, n, self.d = SIZES[size]
        self.per_group = self.count // self.groups
        self.left = factor(n + bias, 1) if left else None
        self.right = factor(self.d, 2, rank)
        self.heads = (*self.plain, None, None, self.left, self.right)
        self.products = reference.products(*self.plain[:3], self.count, self.groups)
        self.weighted = [self.weigh(m) for m in self.products]

    def weigh(self, m: Array) -> Array:
        return weighted(m, self.per_group, self.left, self.right)

    def written(self, fold: tuple[Any, ...]) -> list[Array]:
        return [self.weigh(m) for m in written(fold, self.count, self.groups)]


# ---- IRC ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", NAMES)
def test_irc_is_the_best_of_its_rank_in_the_weighted_norm(size, bias):
    case = Case(size, bias)
    head_dim = case.head_dim
    spectra = np.array([reference.spectrum(m, head_dim) for m in case.weighted])
    got = _core.irc_spectrum(case.heads)
    np.testing.assert_allclose(got, spectra, rtol=1e-9, atol=1e-11 * spectra.max())
    for rank in sorted({0, 1, 2, head_dim // 2, head_dim} & set(range(head_dim + 1))):
        for gauge in (False, True):
            fold = _core.irc(case.heads, np.full(case.groups, rank, np.int32), gauge)
            check_shape(fold, case.plain, max(rank, 1), gauge)
            for j, (m, own) in enumerate(zip(case.weighted, case.written(fold), strict=True)):
                scale = np.linalg.norm(m)
                np.testing.assert_allclose(own, reference.best_rank(m, rank), atol=1e-8 * scale)
                tail = spectra[j][rank:].sum()
                assert fold[4][j] == pytest.approx(tail, rel=1e-9, abs=1e-12 * scale**2)
                assert fold[5][j] == pytest.approx(scale**2, rel=1e-11)


@pytest.mark.parametrize("size", ["plain", "grouped", "wide"])
def test_irc_beats_the_data_free_fold_and_random_factors(size):
    case = Case(size)
    ranks = np.full(case.groups, 3, np.int32)
    rng = np.random.default_rng(4)
    best = _core.irc(case.heads, ranks, True)[4]
    free = case.written(_core.irc(case.plain, ranks, True))
    left, right, *_ = _core.irc(case.heads, ranks, False)
    for j, m in enumerate(case.weighted):
        assert best[j] < np.linalg.norm(m - free[j]) ** 2
    for size_of in (1e-3, 1e-1):
        nudged = [x * (1 + size_of * rng.standard_normal(x.shape)) for x in (left, right)]
        for m, own, least in zip(case.weighted, case.written(tuple(nudged)), best, strict=True):
            assert np.linalg.norm(m - own) ** 2 > least


def test_a_diagonal_factor_is_a_scale():
    heads = make("grouped", True)
    rng = np.random.default_rng(0)
    left, right = (10.0 ** rng.uniform(-1, 1, 48) for _ in range(2))
    by_scale = (*heads, left, right)
    by_factor = (*heads, None, None, np.diag(np.append(left, 1.0)), np.diag(right))
    ranks = np.array([3, 5], np.int32)
    for gauge in (False, True):
        want, got = (_core.irc(h, ranks, gauge) for h in (by_scale, by_factor))
        assert not gauge or np.array_equal(want[2], got[2])
        for a, b in zip(written(want, 6, 2), written(got, 6, 2), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-10 * np.abs(a).max())
    plain = (heads[0], None, *heads[2:])
    by_scale = (*plain, None, right)
    by_factor = (*plain, None, None, None, np.diag(right))
    want, got = (_core.dwc_select(h, None, 8) for h in (by_scale, by_factor))
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", ["plain", "grouped", "odd"])
def test_a_covariance_of_less_rank_than_a_head(size):
    case = Case(size, rank=3)
    whole = np.full(case.groups, case.head_dim, np.int32)
    for gauge in (False, True):
        fold = _core.irc(case.heads, whole, gauge)
        assert fold[3].tolist() == [3] * case.groups  # no more directions are ever met
        assert all(np.isfinite(part).all() for part in fold if part is not None)
        for m, own in zip(case.weighted, case.written(fold), strict=True):
            np.testing.assert_allclose(own, m, atol=1e-8 * np.linalg.norm(m))
    values = Case(size, bias=False, left=False, rank=3)
    fold = _core.dwc_select(values.heads, None, values.head_dim)
    assert fold[3].tolist() == [3] * values.groups
    check_shape(fold, values.plain, values.head_dim, True)
    for m, own in zip(values.weighted, values.written(fold), strict=True):
        np.testing.assert_allclose(own, m, atol=1e-8 * np.linalg.norm(m))


# ---- DWC ----------------------------------------------------------------------------------------


def best_left(m: Array, rows: Array, cov_factor: Array) -> Array:
    """T of least ||(M - T rows) F||, by NumPy's least squares."""
    return np.linalg.lstsq((rows @ cov_factor).T, (m @ cov_factor).T, rcond=None)[0].T


def forward_selection(m: Array, cov_factor: Array, count: int) -> list[int]:
    """One after the other the column that leaves the least error, each trial refitted."""
    chosen: list[int] = []
    for _ in range(count):

        def error(column: int) -> float:
            identity = np.eye(m.shape[1])[[*chosen, column]]
            left = best_left(m, identity, cov_factor)
            return float(np.linalg.norm((m - left @ identity) @ cov_factor))

        free = [j for j in range(m.shape[1]) if j not in chosen]
        chosen.append(min(free, key=error))
    return sorted(chosen)


@pytest.mark.parametrize("size", NAMES)
def test_dwc_pivots_are_those_of_forward_selection(size):
    case = Case(size, bias=False, left=False)
    take = min(case.head_dim, case.d, SIZES[size][3] * case.per_group)
    fold = _core.dwc_select(case.heads, None, take)
    check_shape(fold, case.plain, take, True)
    for j, m in enumerate(case.products):
        assert fold[2][j].tolist() == forward_selection(m, case.right, take)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("size", NAMES)
def test_dwc_refit_is_least_squares_on_the_data(size, given):
    """The new output projection against NumPy's on rows of data with the factor's moments."""
    case = Case(size, bias=False, left=False)
    take = min(case.head_dim, case.d)
    columns = None
    if given:
        rng = np.random.default_rng(0)
        chosen = [rng.choice(case.d, take, replace=False) for _ in range(case.groups)]
        columns = np.ascontiguousarray(chosen, np.int32)
    x = np.sqrt(case.d) * case.right.T  # rows of data: x^T x / d = F F^T
    fold = _core.dwc_select(case.heads, columns, take)
    for j, m in enumerate(case.products):
        own = fold[2][j, : fold[3][j]]
        assert columns is None or np.array_equal(own, columns[j])
        wanted = x @ m.T
        best = x[:, own] @ np.linalg.lstsq(x[:, own], wanted, rcond=None)[0]
        got = x @ written(fold, case.count, case.groups)[j].T
        scale = np.linalg.norm(wanted)
        np.testing.assert_allclose(got, best, atol=1e-8 * scale)
        error = np.linalg.norm(wanted - best) ** 2 / case.d
        assert fold[4][j] == pytest.approx(error, rel=1e-8, abs=1e-12 * scale**2)
        assert fold[5][j] == pytest.approx(scale**2 / case.d, rel=1e-11)


@pytest.mark.parametrize("size", NAMES)
def test_dwc_remainder_is_the_best_with_its_pivots(size):
    case = Case(size, bias=False, left=False)
    head_dim, d = case.head_dim, case.d
    squared, energy = _core.dwc_spectrum(case.heads)
    for k in sorted({0, 1, 3, head_dim} & set(range(head_dim + 1))):
        fold = _core.dwc_remainder(case.heads, np.full(case.groups, k, np.int32))
        left, right, pivots, ranks, error, energies, a, b = fold
        check_shape(fold, case.plain, head_dim, True)
        value = right + np.einsum("jrk,jkd->jrd", a, b)
        assert np.array_equal(energy, energies) or k == head_dim
        for j, m in enumerate(case.weighted):
            rank, scale = int(ranks[j]), np.linalg.norm(m)
            own = pivots[j, :rank]
            rows = case.right[own]
            left_over = m - m @ np.linalg.pinv(rows) @ rows
            tail = reference.spectrum(left_over, head_dim)
            assert error[j] == pytest.approx(tail[k:].sum(), rel=1e-7, abs=1e-11 * scale**2)
            if k < head_dim:
                np.testing.assert_allclose(squared[j], tail, rtol=1e-7, atol=1e-11 * scale**2)
            got = case.written((left, value))[j]
            assert np.linalg.norm(m - got) ** 2 == pytest.approx(
                error[j], rel=1e-6, abs=1e-10 * scale**2
            )
            refit = best_left(case.products[j], value[j, :rank], case.right) @ value[j, :rank]
            np.testing.assert_allclose(case.weigh(refit), got, atol=1e-6 * scale)
            assert not a[j, :, k:].any() and not b[j, k:].any() and not b[j][:, own].any()
            if k == head_dim:
                np.testing.assert_allclose(got, m, atol=1e-7 * scale)
    if d > head_dim:
        assert np.all(squared[:, 0] > 0)


# ---- blocks -------------------------------------------------------------------------------------


def block_of(state: dict[str, Array], config: dict[str, Any]) -> Any:
    return find_layout(state, schemas.known(), config, None).attentions[0]


def bert() -> tuple[dict[str, Array], Any]:
    state = reference.bert_state(1, dtype=np.float64)
    return state, block_of(state, {"model_type": "bert", "num_attention_heads": 4})


def qwen2(value_bias: bool, output_bias: bool = False) -> tuple[dict[str, Array], Any]:
    """Grouped heads and biases where asked for."""
    state = reference.llama_state(1, dtype=np.float64)
    prefix, rng = "model.layers.0.self_attn", np.random.default_rng(5)
    if value_bias:
        for name, rows in (("q", 64), ("k", 32), ("v", 32)):
            state[f"{prefix}.{name}_proj.bias"] = rng.standard_normal(rows)
    if output_bias:
        state[f"{prefix}.o_proj.bias"] = rng.standard_normal(64)
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
    return state, block_of(state, config)


def data(d: int, rows: int = 4000, seed: int = 3) -> Array:
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((d, d)) * 10.0 ** rng.uniform(-1.5, 0.5, d)[:, None]
    return rng.standard_normal((rows, d)) @ mixing + 3.0 * rng.standard_normal(d)


def pieces(state: dict[str, Array], block: Any, fold: Any = None) -> tuple[Array, ...]:
    """W_v, b_v, W_o, b_o, zeros where there is no bias."""

    def read(name: str | None, size: int) -> Array:
        return np.zeros(size) if name is None else state[name]

    w_v, w_o = state[block.value.weight], state[block.output.weight]
    b_v, b_o = read(block.value.bias, len(w_v)), read(block.output.bias, len(w_o))
    if fold is not None:
        w_v, w_o = fold.weights["value"].unpack(), fold.output
        b_v = fold.biases["value"].unpack() if "value" in fold.biases else b_v
        b_o = b_o if fold.output_bias is None else fold.output_bias
    return w_v, b_v, w_o, b_o


def each_token(x: Array, parts: tuple[Array, ...], block: Any) -> Array:
    """The block's output where every token attends to itself alone."""
    w_v, b_v, w_o, b_o = parts
    value = (x @ w_v.T + b_v).reshape(len(x), block.groups, -1)
    seen = np.repeat(value, block.heads // block.groups, axis=1).reshape(len(x), -1)
    return seen @ w_o.T + b_o


BLOCKS = {
    "bert": bert,
    "qwen2": lambda: qwen2(True),
    "llama with biases": lambda: qwen2(True, True),
    "llama": lambda: qwen2(False),
    "output bias alone": lambda: qwen2(False, True),
}


@pytest.mark.parametrize("mode", ["pivot", "slice", 3])
@pytest.mark.parametrize("name", BLOCKS)
def test_dwc_keeps_the_mean_output_and_beats_the_data_free_fold(name, mode):
    state, block = BLOCKS[name]()
    if mode == "slice" and block.groups != block.heads:
        pytest.skip("not defined for grouped heads")
    x = data(block.value.cols)
    fold = dwc.fold(block, state, mode, moments=moments(x))
    free = dwc.fold(block, state, mode)
    want = each_token(x, pieces(state, block), block)
    got, before = (each_token(x, pieces(state, block, f), block) for f in (fold, free))
    scale = np.abs(want).max()
    if name != "llama":  # there a bias takes up the mean
        np.testing.assert_allclose(got.mean(0), want.mean(0), atol=1e-9 * scale)
    assert np.linalg.norm(want - got) < np.linalg.norm(want - before)
    # W_o's inputs at their root mean square
    w_v = fold.weights["value"].unpack()
    rms = np.sqrt(((x @ w_v.T) ** 2).mean(0)).reshape(block.groups, -1)
    rms = np.repeat(rms, block.heads // block.groups, axis=0).ravel()
    np.testing.assert_allclose(fold.output_scale, rms, rtol=0.05)


@pytest.mark.parametrize("name", ["bert", "qwen2", "llama"])
def test_dwc_of_a_block_is_least_squares_on_its_inputs(name):
    """With many rows the fold's error is that of NumPy's regression with a constant, or without one
    where no bias could hold it."""
    state, block = BLOCKS[name]()
    x = data(block.value.cols, rows=50_000)
    fold = dwc.fold(block, state, "pivot", moments=moments(x))
    w_v, _, w_o, _ = pieces(state, block)
    new_v = fold.weights["value"].unpack()
    head_dim, per_group = block.head_dim, block.heads // block.groups
    error = energy = 0.0
    for i in range(block.heads):
        j = i // per_group
        rows, out = slice(j * head_dim, (j + 1) * head_dim), slice(i * head_dim, (i + 1) * head_dim)
        y, z = x @ (w_o[:, out] @ w_v[rows]).T, x @ new_v[rows].T
        if name != "llama":
            y, z = y - y.mean(0), z - z.mean(0)
        coefficients = np.linalg.lstsq(z, y, rcond=None)[0]
        error += np.linalg.norm(y - z @ coefficients) ** 2
        energy += np.linalg.norm(y) ** 2
        given = fold.output[:, out].T
        assert np.linalg.norm(y - z @ given) <= 1.001 * np.linalg.norm(y - z @ coefficients)
    assert fold.error == pytest.approx(error / energy, rel=0.05)  # apart from the shrinkage


def test_irc_of_a_block_fits_the_logits_of_its_inputs():
    """Mean square logit error over all pairs of rows, each query's mean over keys taken out."""
    state, block = bert()
    x = data(48, rows=20_000)
    prefix = "encoder.layer.0.attention.self"
    query, key = (state[f"{prefix}.{n}.weight"].reshape(4, 12, 48) for n in ("query", "key"))
    bias = state[f"{prefix}.query.bias"].reshape(4, 12)
    y = x[:300]
    energy, errors = 0.0, {"data": 0.0, "free": 0.0}
    ranks = np.full(4, 4)
    folds = {
        "data": irc.fold(block, state, ranks, moments=moments(x)),
        "free": irc.fold(block, state, ranks),
    }
    for i in range(4):
        want = (y @ query[i].T + bias[i]) @ key[i] @ x.T
        want -= want.mean(1, keepdims=True)
        energy += np.linalg.norm(want) ** 2
        for name, fold in folds.items():
            q = fold.weights["query"].unpack().reshape(4, 12, 48)[i]
            b = fold.biases["query"].unpack().reshape(4, 12)[i]
            k = fold.weights["key"].unpack().reshape(4, 12, 48)[i]
            got = (y @ q.T + b) @ k @ x.T
            got -= got.mean(1, keepdims=True)
            errors[name] += np.linalg.norm(want - got) ** 2
    assert errors["data"] < errors["free"]
    assert folds["data"].error == pytest.approx(errors["data"] / energy, rel=0.2)
    curve = irc.curve(block, state, moments=moments(x))
    assert sum(e[4] for e in curve.error) == pytest.approx(folds["data"].error, rel=1e-9)


@pytest.mark.parametrize("mean_rank", [0, 1, 2, 5, 12])
def test_one_rank_is_spread_over_the_heads(mean_rank):
    state, block = bert()
    state["encoder.layer.0.attention.self.query.weight"][:12] *= 20.0  # one head's logits are large
    given = moments(data(48))
    fold = irc.fold(block, state, mean_rank, moments=given)
    ranks = [12] * 4 if mean_rank == 12 else fold.weights["query"].ranks.tolist()
    curve = irc.curve(block, state, moments=given)
    squared = np.array([-np.diff(e) for e in curve.error])
    gain = squared / np.sqrt(squared.sum(1, keepdims=True))
    if 0 < mean_rank < 12:  # moving one rank between two heads gains nothing
        for i in range(4):
            for j in range(4):
                if i != j and ranks[i] > 0 and ranks[j] < 12:
                    assert gain[i, ranks[i] - 1] >= gain[j, ranks[j]]
        assert ranks[0] > mean_rank
        assert mean_rank > 1 or min(ranks) == 0
    else:
        assert ranks == [mean_rank] * 4
    assert sum(ranks) == 4 * mean_rank
    free = irc.fold(block, state, mean_rank).weights["query"]
    assert mean_rank == 12 or free.ranks.tolist() == [mean_rank] * 4


@pytest.mark.parametrize("name", ["bert", "qwen2"])
def test_curves_are_the_folds_errors(name):
    state, block = BLOCKS[name]()
    given = moments(data(block.value.cols))
    curve = dwc.curve(block, state, moments=given)
    for k in (0, 2, 5):
        fold = dwc.fold(block, state, k, moments=given)
        assert sum(e[k] for e in curve.error) == pytest.approx(fold.error, rel=1e-8)


@pytest.mark.parametrize("pairing", ["half", "adjacent"])
@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_planes_are_chosen_by_what_the_data_make_of_them(name, pairing):
    state, block = BLOCKS[name]()
    block.rope = pairing
    x = data(64, rows=60_000)
    prefix, half = "model.layers.0.self_attn", block.head_dim // 2
    pairs = np.array(reference.plane_rows(block.head_dim, pairing))

    def energies(projection: str, count: int) -> Array:
        y = x @ state[f"{prefix}.{projection}_proj.weight"].T
        y = y + state.get(f"{prefix}.{projection}_proj.bias", 0.0)
        squared = (y**2).mean(0).reshape(count, block.head_dim)
        return squared[:, pairs].sum(2)

    scores = energies("q", block.heads).reshape(block.groups, -1, half).sum(1)
    scores *= energies("k", block.groups)
    fold = irc.fold(block, state, half // 2, moments=moments(x))
    best = np.sort(np.argsort(-scores, axis=1)[:, : half // 2], axis=1)
    assert fold.weights["key"].planes.reshape(block.groups, -1).tolist() == best.tolist()
    left_out = scores.sum() - np.take_along_axis(scores, best, axis=1).sum()
    assert fold.error == pytest.approx(left_out / scores.sum(), rel=1e-2)
    free = irc.fold(block, state, half // 2)
    assert free.weights["key"].planes.tolist() != fold.weights["key"].planes.tolist()
    curve = irc.curve(block, state, moments=moments(x))
    assert sum(e[half // 2] for e in curve.error) == pytest.approx(fold.error, rel=1e-9)


def test_planes_take_no_factors():
    heads = (*make("plain"), None, None, None, np.eye(32))
    with pytest.raises(ValueError):
        _core.rope_scores(heads, False)


def test_lossless_folds_do_not_depend_on_data():
    state, block = bert()
    given = moments(data(48))
    for fold in (
        lambda m: irc.fold(block, state, None, moments=m),
        lambda m: dwc.fold(block, state, "lossless", moments=m),
    ):
        for a, b in zip(fold(None).weights.values(), fold(given).weights.values(), strict=True):
            assert reference.same_bytes(a.unpack(), b.unpack())


def test_few_rows_are_shrunk_and_stay_sane():
    """Fewer rows than inputs: the covariance is singular, the folds stay finite and better than
    without data."""
    state, block = bert()
    x = data(48)
    few = moments(x[:20])
    errors = {}
    for name, given in (("few", few), ("free", None)):
        fold = dwc.fold(block, state, "pivot", moments=given)
        want = each_token(x, pieces(state, block), block)
        got = each_token(x, pieces(state, block, fold), block)
        assert np.isfinite(got).all()
        errors[name] = np.linalg.norm(want - got)
    assert errors["few"] < errors["free"]
    one_varies = np.zeros((30, 48))
    one_varies[:, 0] = np.arange(30)
    fold = irc.fold(block, state, 4, moments=moments(one_varies))
    assert all(np.isfinite(w.unpack()).all() for w in fold.weights.values())


# ---- views, threads, bad input ------------------------------------------------------------------


@pytest.mark.parametrize("threads", [2, 16])
def test_any_number_of_threads_gives_the_same_bytes(threads):
    case, values = Case("grouped"), Case("grouped", bias=False, left=False)
    ranks = np.array([3, 5], np.int32)

    def results(threads: int) -> list[Array]:
        parts = [
            _core.irc_spectrum(case.heads, threads),
            *_core.irc(case.heads, ranks, True, threads),
            *_core.irc(case.heads, ranks, False, threads),
            *_core.dwc_spectrum(values.heads, threads),
            *_core.dwc_select(values.heads, None, 8, threads),
            *_core.dwc_remainder(values.heads, ranks, threads),
        ]
        return [part for part in parts if part is not None]

    for a, b in zip(results(1), results(threads), strict=True):
        assert reference.same_bytes(a, b)


@pytest.mark.parametrize(
    ("kind", "side", "change"),
    [
        (TypeError, 0, lambda f: f.astype(np.float32)),
        (TypeError, 1, lambda f: f.T),
        (TypeError, 1, lambda f: f.tolist()),
        (ValueError, 0, lambda f: f[:-1, :-1].copy()),
        (ValueError, 1, lambda f: f[0].copy()),
        (ValueError, 1, lambda f: f * (np.arange(len(f)) != 2)[:, None]),
        (ValueError, 0, lambda f: f * np.nan),
        (ValueError, 1, lambda f: f * np.inf),
    ],
)
def test_bad_factors(kind, side, change):
    case = Case("plain")
    factors = [case.left, case.right]
    factors[side] = change(factors[side])
    with pytest.raises(kind) as error:
        _core.irc_spectrum((*case.plain, None, None, *factors))
    assert str(error.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (moments(data(47)), "calibrate with this model"),
        (Given(9.0, np.zeros(48), np.full((48, 48), np.nan)), "NaN or Inf"),
        (moments(data(48)[:1]), "more rows"),
        (moments(np.ones((50, 48))), "do not vary"),
    ],
)
def test_bad_moments(given, said):
    state, block = bert()
    for fold in (
        lambda: irc.fold(block, state, 4, moments=given),
        lambda: dwc.fold(block, state, "pivot", moments=given),
        lambda: irc.curve(block, state, moments=given),
    ):
        with pytest.raises(TensorError, match=said) as error:
            fold()
        assert "encoder.layer.0" in str(error.value)
