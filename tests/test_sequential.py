"""``foldprune.torch.compress``: what every matrix is fitted to, against least squares on the inputs
that the compressed model really gives it; and that the model stays as it was, whatever happens."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import reference
from models import FAMILIES, batches, loaded, out_in, output_error

import foldprune
from foldprune import Compressed, ModelError, Recipe, TensorError
from foldprune.fit import SEARCH_DAMPING

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from foldprune.torch import compress  # noqa: E402

Array = np.ndarray[Any, np.dtype[Any]]
BLOCKS = ("feed_forward", "attention_output", "qkv")
HALF = Recipe(fpp=0.5, fpp_on=BLOCKS, fpp_scope="tensor")


@pytest.fixture(autouse=True)
def _refusals_are_expected() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", foldprune.FoldRefusedWarning)
        yield


def run(model: Any, data: Any = None, rate: float = 0.3, **options: Any) -> Compressed:
    data = batches(count=4) if data is None else data
    return compress(model, data, rate, **{"progress": False, "threads": 1, **options})


def padded(seed: int = 1, pad: int = 0) -> list[dict[str, Any]]:
    """Batches of three lengths, padded on the right with that token."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for length in (14, 9, 16):
        ids = torch.randint(3, 89, (8, length), generator=generator)
        lengths = torch.tensor([length, length - 3, 5, length] * 2)
        mask = torch.arange(length) < lengths[:, None]
        out.append({"input_ids": ids.where(mask, pad), "attention_mask": mask.long()})
    return out


def met_by(model: Any, data: list[Any]) -> dict[str, Array]:
    """The input of every linear layer over the data, padding left out, (rows, d) float64."""
    met: dict[str, list[Array]] = {}
    mask: Any = None

    def note(name: str, x: Any) -> None:
        flat = x if mask is None else x[mask]
        met.setdefault(name, []).append(flat.double().numpy().reshape(-1, x.shape[-1]))

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=f"{name}.weight": note(name, args[0]))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
    ]
    for batch in data:
        named = isinstance(batch, dict)
        mask = batch["attention_mask"].bool() if named and "attention_mask" in batch else None
        with torch.no_grad():
            model(**batch) if named else model(batch)
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(x) for name, x in met.items()}


def slope(w: Array, new: Array, x: Array, damping: float = SEARCH_DAMPING) -> float:
    """Of the damped squared error by the kept weights, as a share of what it is before any fit; 0
    where they are its minimum."""
    second = x.T @ x / len(x)
    h = second + damping * np.diagonal(second).mean() * np.eye(len(second))
    w, new = w.astype(np.float64), new.astype(np.float64)
    masked = np.where(new != 0, w, 0)
    before = ((w - masked) @ h)[new != 0]
    return float(np.linalg.norm(((w - new) @ h)[new != 0]) / np.linalg.norm(before))


# ---- what is fitted to what ---------------------------------------------------------------------


@pytest.mark.parametrize("data", [batches(count=4), padded()], ids=["even", "padded"])
@pytest.mark.parametrize(
    "family", ["bert", "gpt2", "llama-gqa", "llama-bias", "llama-tied", "qwen2", "qwen3"]
)
def test_every_matrix_is_fitted_to_what_the_compressed_model_gives_it(make_model, family, data):
    model = make_model(family)
    got = run(model, data, recipe=HALF, held_out=None)
    met, met_before = met_by(loaded(model, got), data), met_by(model, data)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    fitted = [row for row in got.report.rows if "FPP" in row.method]
    assert len(fitted) == sum(
        row.group in BLOCKS and len(row.shape) == 2 for row in got.report.rows
    )
    first, later = [], []
    for row in fitted:
        w, new = (out_in(model, row.name, s) for s in (state, got))
        assert (new == 0).sum() == w.size // 2
        assert slope(w, new, met[row.name]) < 2e-3, row.name
        change = new.astype(np.float64) - w
        x = met[row.name]
        lost = np.square(x @ change.T).sum() / np.square(x @ w.T.astype(np.float64)).sum()
        assert row.error == pytest.approx(lost, rel=2e-3)
        is_first = ".0." in row.name and row.group == "qkv"
        (first if is_first else later).append(slope(w, new, met_before[row.name]))
    assert max(first) < 2e-3 < 0.01 < min(later), "the dense model's inputs were others"


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-gqa"])
def test_after_folds_and_pruned_embeddings(make_model, family):
    model, data = make_model(family), padded()
    recipe = Recipe(fpp=0.4, fpp_on=("embedding", "feed_forward"), fpp_scope="tensor", irc=4, dwc=6)
    got = run(model, data, recipe=recipe, held_out=None)
    met = met_by(loaded(model, got), data)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    checked = 0
    for row in got.report.rows:
        if row.group == "feed_forward" and "FPP" in row.method:
            w, new = (out_in(model, row.name, s) for s in (state, got))
            assert slope(w, new, met[row.name]) < 2e-3, row.name
            checked += 1
        elif row.group == "qkv" and len(row.shape) == 2:
            assert "IRC" in row.method or "DWC" in row.method
    assert checked == (6 if family == "llama-gqa" else 4)


def test_an_output_embedding_of_its_own_is_fitted_last(make_model):
    model, data = make_model("llama-gqa"), batches(count=4)
    recipe = Recipe(fpp=0.5, fpp_on=("embedding", *BLOCKS), fpp_scope="tensor")
    got = run(model, data, recipe=recipe, held_out=None)
    x, x_before = (met_by(m, data)["lm_head.weight"] for m in (loaded(model, got), model))
    w = model.lm_head.weight.detach().numpy()
    assert (got["lm_head.weight"] == 0).sum() == w.size // 2
    assert (
        slope(w, got["lm_head.weight"], x) < 2e-3 < 0.01 < slope(w, got["lm_head.weight"], x_before)
    )


@pytest.mark.parametrize("family", ["bert", "llama-gqa"])
def test_hidden_units(make_model, family):
    """Down is fitted to what all units gave, and up and gate lose their rows."""
    model, data = make_model(family), batches(count=4)
    recipe = Recipe(fpp=0.3, fpp_on=("feed_forward",), fpp_granularity="neuron")
    got = run(model, data, recipe=recipe, held_out=None)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    block = "model.layers.1.mlp." if family == "llama-gqa" else "bert.encoder.layer.1."
    ups, down = (
        (["gate_proj.weight", "up_proj.weight"], "down_proj.weight")
        if family == "llama-gqa"
        else (["intermediate.dense.weight"], "output.dense.weight")
    )
    new = np.asarray(got[block + down])
    kept = (new != 0).any(axis=0)
    assert (~kept).sum() == 24
    other = loaded(model, got)
    for up in ups:
        assert np.array_equal(np.asarray(got[block + up]), state[block + up] * kept[:, None])
        other.state_dict()[block + up].copy_(torch.from_numpy(state[block + up]))
    assert slope(state[block + down], new, met_by(other, data)[block + down]) < 2e-3


def test_layers_with_masks_of_their_own(make_model):
    """Full and sliding attention, of which a short batch without padding shows no difference."""
    import transformers

    config = make_model("qwen2").config.to_dict()
    config |= {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    config["layer_types"] = ["full_attention", "sliding_attention"]
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config))
    model.load_state_dict(make_model("qwen2").state_dict())
    model.eval()
    short = torch.randint(3, 89, (40, 5), generator=torch.Generator().manual_seed(5))
    data = [{"input_ids": short}, *padded()]
    got = run(model, data, recipe=HALF, held_out=None)
    met = met_by(loaded(model, got), data)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for name in met.keys() & {row.name for row in got.report.rows if "FPP" in row.method}:
        assert slope(state[name], np.asarray(got[name]), met[name]) < 2e-3, name


# ---- what comes out -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rate_is_reached_and_the_outputs_are_near(known, family):
    model, calibration = known(family)
    got = run(model, batches(), 0.4)
    assert got.report.removed == pytest.approx(0.4, abs=0.005)
    assert output_error(model, got) < 0.5 * output_error(model, foldprune.compress(model, 0.4))
    at_once = foldprune.compress(model, 0.4, calibration=calibration, threads=1)
    assert output_error(model, got) < 1.1 * output_error(model, at_once)


def test_rate_zero_is_lossless(make_model):
    for family in ("bert", "llama-gqa"):
        model = make_model(family)
        got = run(model, rate=0)
        assert got.recipe == Recipe.lossless() and output_error(model, got) < 1e-10


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "bert"])
def test_tied_weights_stay_tied(make_model, family):
    model = make_model(family)
    got = run(model, rate=0.4)
    source = model.get_input_embeddings().weight
    names = [n for n, t in model.state_dict().items() if t.data_ptr() == source.data_ptr()]
    state = got.state_dict()
    assert len(names) == 2 and state[names[0]].data_ptr() == state[names[1]].data_ptr()
    assert (state[names[0]] == 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(make_model, dtype):
    model = make_model("llama-gqa").to(dtype)
    got = run(model, rate=0.4)
    assert {tensor.dtype for tensor in got.state_dict().values()} == {dtype}
    assert output_error(model, got) < 0.6 * output_error(model, foldprune.compress(model, 0.4))


def same(one: Compressed, other: Compressed) -> bool:
    return all(
        reference.same_bytes(np.asarray(other[name]), np.asarray(array))
        for name, array in one.state_dict("numpy").items()
    )


@pytest.mark.parametrize("family", ["bert", "llama-gqa"])
def test_how_batches_come_makes_no_difference(make_model, family):
    model, data = make_model(family), batches(count=3)
    first = run(model, data)
    assert same(first, run(model, [{"input_ids": ids} for ids in data]))
    assert same(first, run(model, [(ids,) for ids in data]))
    assert same(first, run(model, data, threads=3))
    asked: list[int] = []
    assert same(first, run(model, (asked.append(i) or ids for i, ids in enumerate(data))))
    assert asked == [0, 1, 2], "an iterator gives its batches once"
    ones = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in data]
    whole = run(model, ones)
    assert output_error(model, whole) == pytest.approx(output_error(model, first), rel=0.05)


@pytest.mark.parametrize("family", ["bert", "llama-gqa"])
def test_padding_does_not_count(make_model, family):
    model = make_model(family)
    assert same(run(model, padded(pad=0)), run(model, padded(pad=77)))


def test_a_cache_that_the_batch_asks_for_is_not_kept(make_model):
    model, data = make_model("llama-gqa"), batches(count=2)
    asked = [{"input_ids": ids, "use_cache": True} for ids in data]
    assert same(run(model, data), run(model, asked))


def test_without_gradients(make_model):
    model = make_model("bert")
    got = run(model, gradients=0)
    assert any("no gradients" in note for note in got.report.notes)
    assert got.report.removed == pytest.approx(0.3, abs=0.005)


def test_saved_and_loaded(make_model, tmp_path):
    got = run(make_model("gpt2"), rate=0.5)
    got.save(tmp_path / "model.safetensors")
    back = foldprune.load(tmp_path / "model.safetensors")
    assert same(got, back) and back.report.to_dict() == got.report.to_dict()


# ---- the model stays as it was ------------------------------------------------------------------


def everything(model: Any) -> dict[str, Any]:
    """All of a model that could have been changed."""
    modules = dict(model.named_modules())
    return {
        "values": {n: t.float().numpy().tobytes() for n, t in model.state_dict().items()},
        "places": {n: p.data_ptr() for n, p in model.named_parameters()},
        "objects": {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)},
        "gradients": {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()},
        "training": {n: m.training for n, m in modules.items()},
        "hooks": {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for n, m in modules.items()
        },
        "attributes": {n: sorted(vars(m)) for n, m in modules.items()},
        "cache": model.config.use_cache,
    }


@pytest.fixture
def touched(make_model: Any) -> Any:
    """A model in training, with frozen parameters, a module in eval mode and a hook of its own."""
    model = make_model("llama-gqa").train()
    model.model.layers[1].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: None)
    model.config.use_cache = True
    return model


def test_the_model_is_not_changed(touched):
    before = everything(touched)
    got = run(touched, rate=0.4)
    assert everything(touched) == before
    with torch.no_grad():
        touched.lm_head.weight.zero_()
    assert np.asarray(got["lm_head.weight"]).any(), "no memory is shared"
    clean = run(touched.eval(), rate=0.4)
    assert clean.report.removed == pytest.approx(0.4, abs=0.005)


@pytest.mark.parametrize("stop", [1, 4, 8, 15, 20, -2, -1])
def test_ctrl_c_leaves_the_model_as_it_was(touched, stop):
    """In any phase: the calibration, the curves, the blocks."""
    calls: list[tuple[int, int, str]] = []
    run(touched, progress=lambda *call: calls.append(call))
    assert [call for call in calls if call[2].startswith("model.layers.") and call[1] == 2]
    before, count = everything(touched), 0
    last = stop if stop > 0 else len(calls) + 1 + stop

    def interrupt(done: int, total: int, name: str) -> None:
        nonlocal count
        count += 1
        if count == last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(touched, progress=interrupt)
    assert count == last and everything(touched) == before


def test_a_batch_of_nan_leaves_the_model_as_it_was(touched):
    embedded = touched.model.embed_tokens.weight[batches(count=1)[0]].detach()
    bad = embedded.clone()
    bad[2, 3, 4] = float("nan")
    before = everything(touched)
    data = [{"inputs_embeds": embedded}, {"inputs_embeds": bad}]
    with pytest.raises(TensorError, match=r"batch 1: 'model\.layers\.0\.\S+': activations.*nan"):
        run(touched, data, gradients=0)
    assert everything(touched) == before


def test_an_interrupt_inside_a_block_leaves_the_model_as_it_was(touched, monkeypatch):
    from foldprune.torch import sequential

    before, seen = everything(touched), []

    def interrupt(*args: Any) -> Any:
        seen.append(args)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return as_tokens(*args)

    as_tokens = sequential.as_tokens
    monkeypatch.setattr(sequential, "as_tokens", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(touched)
    assert len(seen) == 5 and everything(touched) == before


# ---- bad input ----------------------------------------------------------------------------------


def test_batches_that_are_none(make_model):
    model = make_model("bert")
    with pytest.raises(ModelError, match="no batches"):
        run(model, [])
    (ids,) = batches(count=1)
    for one in (ids, {"input_ids": ids}):
        with pytest.raises(TypeError, match="pass a list of it"):
            run(model, one)
    with pytest.raises(TypeError, match="batch 1: expected a mapping"):
        run(model, [ids, 3])
    with pytest.raises(ModelError, match=r"batch 1: the model failed on it"):
        run(model, [ids, {"pixels": ids}])
    with pytest.raises(ModelError, match="batch 0: the model failed on it"):
        run(model, [ids + 100])


def test_other_arguments(make_model):
    model, data = make_model("bert"), batches(count=1)
    with pytest.raises(TypeError, match="expected a torch module"):
        run(model.state_dict(), data)
    with pytest.raises(ValueError, match="rate=1"):
        run(model, data, 1.0)
    with pytest.raises(TypeError, match="expected a Recipe"):
        run(model, data, recipe={"fpp": 0.5})
    with pytest.raises(ValueError, match="matches no tensor"):
        run(model, data, recipe=Recipe(fpp=0.5, overrides={"nothing": {"fpp": 0.1}}))


def test_unknown_architectures():
    model = torch.nn.Sequential(torch.nn.Embedding(89, 8), torch.nn.Linear(8, 8))
    with pytest.raises(ModelError):
        run(model)
    with (
        warnings.catch_warnings(),
        pytest.raises(ModelError, match=r"Sequential: .*foldprune\.compress\(model"),
    ):
        warnings.simplefilter("ignore", foldprune.UnmatchedTensorWarning)
        run(model, recipe=Recipe(fpp=0.5))
