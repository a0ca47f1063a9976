"""FPP without data: masks, scopes and granularities."""

from __future__ import annotations

import numpy as np
import pytest
import reference

import foldprune
from foldprune import Recipe

torch = pytest.importorskip("torch")

GROUPS = ("embedding", "feed_forward", "attention_output")


def pruned_matrices(state: dict[str, np.ndarray], compressed: foldprune.Compressed) -> list[str]:
    """Names of the two-dimensional tensors that FPP works on by default."""
    rows = compressed.report.rows
    return [row.name for row in rows if row.group in GROUPS and state[row.name].ndim == 2]


def nonzero(compressed: foldprune.Compressed, name: str) -> np.ndarray:
    return compressed[name] != 0


def test_global_mask_is_torchs(minilm_state):
    """The same weights as torch.nn.utils.prune.global_unstructured, up to ties at the threshold."""
    from torch.nn.utils import prune

    compressed = foldprune.compress(minilm_state, recipe=Recipe(fpp=0.7))
    names = pruned_matrices(minilm_state, compressed)
    assert len(names) == 3 + 6 * 3
    modules = []
    for name in names:
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(torch.from_numpy(minilm_state[name].copy()))
        modules.append(module)
    prune.global_unstructured(
        [(module, "weight") for module in modules], prune.L1Unstructured, amount=0.7
    )
    total = sum(minilm_state[name].size for name in names)
    kept = 0
    disputed = set()
    for name, module in zip(names, modules, strict=True):
        theirs = module.weight_mask.numpy().astype(bool)
        row = compressed.report[name]
        array = compressed[name]
        stored = reference.Stored(compressed.encodings[name])
        ours = stored.mask() if stored.kind == "packed" else array != 0
        kept += row.stored
        disputed |= set(np.abs(minilm_state[name][ours != theirs]).tolist())
        assert reference.same_bytes(array, np.where(ours, minilm_state[name], np.float32(0)))
    assert total - kept == round(0.7 * total)
    assert len(disputed) <= 1  # only weights of exactly the threshold's size


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_scopes(scope, family):
    state = reference.bert_state() if family == "bert" else reference.llama_state()
    compressed = foldprune.compress(state, recipe=Recipe(fpp=0.55, fpp_scope=scope))
    names = pruned_matrices(state, compressed)
    magnitudes = [reference.scores(state[name]) for name in names]
    if scope == "global":
        k = round(0.55 * sum(m.size for m in magnitudes))
        masks = reference.keep_lowest_removed(magnitudes, k)
    elif scope == "tensor":
        masks = [reference.keep_lowest_removed([m], round(0.55 * m.size))[0] for m in magnitudes]
    else:
        masks = [reference.keep_rows(m, round(0.55 * m.shape[1])) for m in magnitudes]
    for name, mask in zip(names, masks, strict=True):
        want = np.where(mask, state[name], np.float32(0))
        assert reference.same_bytes(compressed[name], want), name
        lost = (
            1 - (want.astype(np.float64) ** 2).sum() / (state[name].astype(np.float64) ** 2).sum()
        )
        assert compressed.report[name].error == pytest.approx(lost, rel=1e-6)


@pytest.mark.parametrize(
    ("granularity", "rate"),
    [("2:4", 0.5), ("1:4", 0.75), ("4:8", 0.5), ("3:7", 4 / 7), ("1:1", 0.0)],
)
def test_n_of_m(granularity, rate):
    state = reference.bert_state()
    n, m = map(int, granularity.split(":"))
    compressed = foldprune.compress(state, recipe=Recipe(fpp=rate, fpp_granularity=granularity))
    for name in pruned_matrices(state, compressed):
        mask = reference.keep_nm(reference.scores(state[name]), n, m)
        assert reference.same_bytes(compressed[name], np.where(mask, state[name], np.float32(0)))


@pytest.mark.parametrize("granularity", ["4x1", "1x4", "3x5", "16x16"])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_blocks(granularity, scope):
    state = reference.bert_state()
    rows, cols = map(int, granularity.split("x"))
    compressed = foldprune.compress(
        state, recipe=Recipe(fpp=0.5, fpp_granularity=granularity, fpp_scope=scope)
    )
    names = pruned_matrices(state, compressed)
    grids = [reference.block_rms(reference.scores(state[name]), rows, cols) for name in names]
    if scope == "global":
        masks = reference.keep_lowest_removed(grids, round(0.5 * sum(g.size for g in grids)))
    else:
        masks = [reference.keep_lowest_removed([g], round(0.5 * g.size))[0] for g in grids]
    for name, mask in zip(names, masks, strict=True):
        full = reference.expand_blocks(mask, state[name].shape, rows, cols)
        want = np.where(full, state[name], np.float32(0))
        assert reference.same_bytes(compressed[name], want), name
        assert compressed.report[name].stored == int(full.sum())


def test_rows():
    state = reference.bert_state()
    compressed = foldprune.compress(state, recipe=Recipe(fpp=0.5, fpp_granularity="row"))
    for name in pruned_matrices(state, compressed):
        grid = reference.block_rms(reference.scores(state[name]), 1, state[name].shape[1])
        mask = reference.keep_lowest_removed([grid], round(0.5 * len(grid)))[0]
        assert reference.same_bytes(compressed[name], np.where(mask, state[name], np.float32(0)))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_neurons_leave_up_gate_and_down_together(family):
    state = reference.bert_state() if family == "bert" else reference.llama_state()
    compressed = foldprune.compress(state, recipe=Recipe(fpp=0.25, fpp_granularity="neuron"))
    for layer in range(2):
        if family == "bert":
            prefix = f"encoder.layer.{layer}."
            down, rows = prefix + "output.dense.weight", [prefix + "intermediate.dense.weight"]
        else:
            prefix = f"model.layers.{layer}.mlp."
            down = prefix + "down_proj.weight"
            rows = [prefix + "up_proj.weight", prefix + "gate_proj.weight"]
        score = np.linalg.norm(state[down].astype(np.float64), axis=0)
        for name in rows:
            score = score * np.linalg.norm(state[name].astype(np.float64), axis=1)
        keep = reference.keep_lowest_removed([score], round(0.25 * score.size))[0]
        assert reference.same_bytes(compressed[down], np.where(keep, state[down], np.float32(0)))
        for name in rows:
            want = np.where(keep[:, None], state[name], np.float32(0))
            assert reference.same_bytes(compressed[name], want)


def test_groups_can_be_chosen():
    state = reference.bert_state()
    for group in ("embedding", "feed_forward", "attention_output", "qkv"):
        compressed = foldprune.compress(state, recipe=Recipe(fpp=0.5, fpp_on=(group,)))
        for row in compressed.report.rows:
            pruned = row.group == group and len(row.shape) == 2
            assert (row.removed > 0) == pruned, row.name


def test_nothing_to_prune():
    state = reference.bert_state()
    for recipe in (Recipe(fpp=0), Recipe(), Recipe(fpp=0.5, fpp_on=())):
        compressed = foldprune.compress(state, recipe=recipe)
        assert compressed.report.removed == 0
        assert all(reference.same_bytes(compressed[name], state[name]) for name in state)


def test_zeros_and_ties():
    """All-zero and all-equal matrices: exact counts, the first of equal weights go first."""
    state = reference.bert_state(layers=1)
    up, down = "encoder.layer.0.intermediate.dense.weight", "encoder.layer.0.output.dense.weight"
    state[up][:] = 0.25
    state[down][:] = 0
    compressed = foldprune.compress(state, recipe=Recipe(fpp=0.5, fpp_scope="tensor"))
    flat = compressed[up].ravel()
    assert not flat[: flat.size // 2].any() and np.all(flat[flat.size // 2 :] == 0.25)
    assert compressed.report[up].stored == compressed.report[down].stored == flat.size // 2
    assert not compressed[down].any()
    negative = reference.bert_state(layers=1)
    negative[down][:] = -0.0
    assert np.isfinite(foldprune.compress(negative, 0.5, num_heads=4).report.removed)


def test_a_tensor_that_would_grow_stays_dense():
    state = reference.bert_state()
    compressed = foldprune.compress(state, recipe=Recipe(fpp=0.01, fpp_scope="tensor"))
    for row in compressed.report.rows:
        assert row.stored_bytes <= row.bytes
    row = compressed.report["encoder.layer.0.output.dense.weight"]
    assert row.stored_bytes == row.bytes and "dense" in row.note
    assert row.stored == row.numbers - round(0.01 * row.numbers)
    assert int(np.count_nonzero(compressed[row.name])) == row.stored
