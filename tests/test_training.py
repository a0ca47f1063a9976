"""FPP in training: which weights leave and when, that none comes back, and that packing changes
nothing of how the others train."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest
from fpp_cases import SOON, batch, train

import foldprune
from foldprune import FoldpruneWarning, Recipe

torch = pytest.importorskip("torch")

from ranks import enter, leave  # noqa: E402

from foldprune.torch import FPP, PackedLinear, Schedule, to_compressed  # noqa: E402

FAMILIES = ["bert", "gpt2", "llama-gqa", "llama-tied"]


def dense_state(model: Any) -> Any:
    """Weights by name, packed or not."""
    packed = any(isinstance(module, PackedLinear) for module in model.modules())
    return to_compressed(model).state_dict() if packed else model.state_dict()


def masks(fpp: FPP) -> dict[str, Any]:
    return fpp.state_dict()["keep"]


# ---- which and when -----------------------------------------------------------------------------


def test_schedule():
    schedule = Schedule(10, 110, 20)
    assert [step for step in range(200) if schedule.due(step)][:5] == [30, 50, 70, 90, 110]
    assert schedule.share(10) == 0 and schedule.share(110) == 1 and schedule.share(500) == 1
    assert schedule.share(60) == pytest.approx(1 - 0.5**3)
    assert Schedule(0, 7, 3).due(7)
    for wrong in ({"end": 0}, {"start": 5, "end": 5}, {"interval": 0}, {"start": 1.5}):
        with pytest.raises(ValueError, match="Schedule"):
            Schedule(**wrong)


def test_scores_against_the_definition(model_of):
    """|w| times the root mean square of the input without padding, lowest first, by matrix."""
    model = model_of("bert")
    fpp = FPP(
        model,
        Recipe(fpp=0.4, fpp_scope="tensor", fpp_on=("feed_forward",)),
        schedule=Schedule(0, 1, 1),
    )
    name = "bert.encoder.layer.0.intermediate.dense"
    met = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: met.append(args[0].detach())
    )
    data = batch()
    data["attention_mask"] = torch.ones(4, 16, dtype=torch.int64)
    data["attention_mask"][2:, 9:] = 0
    model(**data)
    handle.remove()
    x = met[0][data["attention_mask"].bool()].double().numpy()
    weight = model.get_submodule(name).weight.detach().double().numpy()
    score = np.abs(weight) * np.sqrt(np.square(x).mean(0))
    fpp.step()
    expected = score >= np.sort(score, axis=None)[round(0.4 * score.size)]
    found = masks(fpp)[f"{name}.weight"].numpy()
    assert (found != expected).sum() <= 2  # of equal scores in float32


def test_embedding_rows_count_by_their_use(model_of):
    model = model_of("bert")
    recipe = Recipe(
        fpp=0.5,
        fpp_on=("embedding",),
        fpp_granularity="row",
        overrides={"*position*": {"fpp": None}, "*token_type*": {"fpp": None}},
    )
    fpp = FPP(model, recipe, schedule=Schedule(0, 1, 1))
    ids = torch.arange(40, 80).repeat(2).view(4, 20)
    model(input_ids=ids)
    fpp.step()
    kept = masks(fpp)["bert.embeddings.word_embeddings.weight"].all(1)
    # 45 of 89 rows stay: the 40 used ones, and 5 of those that were not seen
    assert kept[40:80].all() and kept.sum() == 45


def test_padding_makes_no_difference(model_of):
    found = []
    for filler in (0, 50):
        model = model_of("bert").eval()
        fpp = FPP(model, Recipe(fpp=0.5), schedule=Schedule(0, 1, 1))
        model.train()
        data = batch()
        mask = torch.ones(4, 16, dtype=torch.int64)
        mask[:, 8:] = 0
        data["input_ids"] = torch.where(mask == 1, data["input_ids"], filler)
        model(**data, attention_mask=mask)
        fpp.step()
        found.append(masks(fpp))
    for name in found[0]:
        assert (found[0][name] != found[1][name]).float().mean() < 1e-3, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_rate_is_reached_in_steps(model_of, family, scope):
    model = model_of(family)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    fpp = FPP(model, Recipe(fpp=0.6, fpp_scope=scope), schedule=SOON)
    rates = []
    for step in range(7):
        train(model, optimizer, fpp, 1, seed=step)
        rates.append(fpp.rate)
    shares = [0, 0, SOON.share(2), SOON.share(2), SOON.share(4), SOON.share(4), 1]
    slack = 0.01 if scope == "row" else 1e-4  # rows lose whole numbers
    np.testing.assert_allclose(rates, 0.6 * np.array([*shares[1:], 1]), atol=slack)
    assert fpp.done and [event.step for event in fpp.history] == [2, 4, 6]


@pytest.mark.parametrize("granularity", ["2:4", "4x1", "neuron", "row"])
def test_granularities(model_of, granularity):
    model = model_of("llama-gqa")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    recipe = Recipe(fpp=0.5, fpp_granularity=granularity, fpp_on=("feed_forward",))
    if granularity == "4x1":
        recipe = Recipe(fpp=0.5, fpp_granularity=granularity)
    fpp = FPP(model, recipe, schedule=SOON, optimizer=optimizer)
    train(model, optimizer, fpp, 8)
    assert fpp.done
    layer = model.model.layers[0].mlp
    up, down = (module.weight.numpy() != 0 for module in (layer.up_proj, layer.down_proj))
    if granularity == "2:4":
        assert (up.reshape(len(up), -1, 4).sum(-1) == 2).all()
    elif granularity == "4x1":
        blocks = up.reshape(-1, 4, up.shape[1])
        assert (blocks.all(1) | ~blocks.any(1)).all()
    else:
        assert (up.all(1) | ~up.any(1)).all()
    if granularity == "neuron":
        assert np.array_equal(up.any(1), down.any(0)) and up.any(1).mean() == 0.5
    stored = to_compressed(model).encodings["model.layers.0.mlp.up_proj.weight"]
    assert getattr(stored, "block", None) == {
        "2:4": (1, 1), "4x1": (4, 1), "neuron": (1, 48), "row": (1, 48),
    }[granularity]  # fmt: skip


# ---- no zero comes back -------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_after_a_thousand_steps(packed):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    with pytest.warns(foldprune.UnmatchedTensorWarning):
        fpp = FPP(
            model,
            Recipe(fpp=0.7, fpp_on=("feed_forward",)),
            schedule=Schedule(0, 50, 10),
            optimizer=optimizer if packed else None,
        )
    for step in range(1050):
        x = torch.randn(16, 32)
        (model(x) - x[:, :8].sin()).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        fpp.step()
        if step == 49:
            kept = {name: mask.clone() for name, mask in masks(fpp).items()}
    assert isinstance(model[0], PackedLinear) == packed
    state = dense_state(model)
    for name, mask in kept.items():
        assert not state[name][~mask].any() and state[name][mask].all()


def test_what_others_write_is_zeroed_again(model_of):
    model = model_of("bert")
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    fpp = FPP(model, Recipe(fpp=0.5), schedule=SOON)
    train(model, optimizer, fpp, 6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    for name, mask in masks(fpp).items():
        assert not model.state_dict()[name][~mask].any()


def test_merged_lora(model_of):
    peft = pytest.importorskip("peft")
    model = model_of("bert")
    fpp = FPP(model, Recipe(fpp=0.5, fpp_on=("feed_forward",)), schedule=Schedule(0, 1, 1))
    train(model, torch.optim.AdamW(model.parameters(), 1e-3), fpp, 1)
    kept = masks(fpp)
    config = peft.LoraConfig(r=4, target_modules=["dense"], init_lora_weights=False)
    merged = peft.get_peft_model(model, config).merge_and_unload()
    changed = merged.state_dict()
    for name, mask in kept.items():
        assert not changed[name][~mask].any()
    before = model_of("bert").state_dict()
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert not torch.equal(changed[name][kept[name]], before[name][kept[name]])


def test_zeros_from_the_beginning(model_of):
    """They stay, and count as removed."""
    model = model_of("bert")
    weight = model.bert.encoder.layer[0].output.dense.weight
    with torch.no_grad():
        zero = torch.rand(weight.shape) < 0.5
        weight[zero] = 0
    recipe = Recipe(fpp=0.6, fpp_scope="tensor", fpp_on=("feed_forward",))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    fpp = FPP(model, recipe, schedule=SOON)
    name = "bert.encoder.layer.0.output.dense.weight"
    train(model, optimizer, fpp, 3)
    assert torch.equal(~masks(fpp)[name], zero)  # 0.42 wanted so far
    train(model, optimizer, fpp, 3)
    assert not masks(fpp)[name][zero].any()
    assert float(masks(fpp)[name].float().mean()) == pytest.approx(0.4, abs=1e-3)


# ---- packing ------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5),
    "radam": lambda p: torch.optim.RAdam(p, 1e-3),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_packed_training_is_that_of_the_masked_model(model_of, family, kind):
    if kind not in ("adamw", "sgd") and family != "gpt2":
        pytest.skip("one family will do")
    states = []
    for packs in (False, True):
        model = model_of(family).double()  # or Adam makes steps of what is rounding in key biases
        optimizer = OPTIMIZERS[kind](model.parameters())
        fpp = FPP(model, Recipe(fpp=0.6), schedule=SOON, optimizer=optimizer)
        if not packs:
            fpp.pack = lambda: None
        train(model, optimizer, fpp, 12)
        assert packs == any(isinstance(m, PackedLinear) for m in model.modules())
        states.append(dense_state(model))
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-6, atol=1e-8)


def _muon(matrix: Any) -> Any:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    return torch.optim.Muon([matrix], lr=1e-3)


@pytest.mark.parametrize("make", [_muon, lambda matrix: torch.optim.LBFGS([matrix], max_iter=2)])
def test_optimizers_of_whole_weights_go_on_masked(model_of, make):
    model = model_of()
    matrix = model.bert.encoder.layer[0].intermediate.dense.weight
    optimizer = make(matrix)
    fpp = FPP(
        model,
        Recipe(fpp=0.5, fpp_on=("feed_forward",)),
        schedule=SOON,
        optimizer=[torch.optim.SGD(model.cls.parameters(), lr=0.1), optimizer],
    )

    def closure(step: int) -> Any:
        loss = model(**batch(step)).loss
        loss.backward()
        return loss

    with pytest.warns(FoldpruneWarning, match=r"masked; call pack\(\)") as said:
        for step in range(9):
            optimizer.step(functools.partial(closure, step))
            optimizer.zero_grad()
            fpp.step()
    assert len([w for w in said if w.category is FoldpruneWarning]) == 1
    assert fpp.done and not any(isinstance(m, PackedLinear) for m in model.modules())
    zeros = {name: ~keep for name, keep in masks(fpp).items()}
    state = fpp.pack() and dense_state(model)
    assert any(isinstance(m, PackedLinear) for m in model.modules())
    for name, left in zeros.items():
        assert left.any() and not np.asarray(state[name])[left.numpy()].any(), name


def test_optimizer_state_of_kept_values_alone(model_of):
    model = model_of("gpt2")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    fpp = FPP(model, Recipe(fpp=0.7, fpp_on=("feed_forward",)), schedule=SOON, optimizer=optimizer)
    train(model, optimizer, fpp, 7)
    owned = {id(p) for p in model.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == owned
    values = model.transformer.h[0].mlp.c_fc.values
    assert optimizer.state[values]["exp_avg"].shape == values.shape
    assert 0 < values.numel() < 0.5 * 48 * 4 * 48


def test_gradient_accumulation_and_several_optimizers(model_of):
    model = model_of("bert")
    decay = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizers = [torch.optim.AdamW(decay, 1e-3), torch.optim.SGD(others, 1e-3)]
    fpp = FPP(model, Recipe(fpp=0.6), schedule=SOON, optimizer=optimizers)
    for step in range(8):
        for part in range(3):
            (model(**batch(3 * step + part)).loss / 3).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        fpp.step()
    assert fpp.done and isinstance(model.bert.encoder.layer[0].output.dense, PackedLinear)
    assert to_compressed(model).report.totals["feed_forward"].removed > 0.4


@pytest.mark.parametrize("family", ["bert", "llama-gqa"])
def test_autocast_and_checkpointing(model_of, family):
    losses = {}
    for way in ("plain", "bfloat16", "checkpointing"):
        model = model_of(family)
        if way == "checkpointing":
            model.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        fpp = FPP(model, Recipe(fpp=0.5), schedule=SOON, optimizer=optimizer)
        for step in range(9):
            with torch.autocast("cpu", torch.bfloat16, enabled=way == "bfloat16"):
                loss = model(**batch(step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            fpp.step()
        assert fpp.done
        losses[way] = float(loss.detach())
    assert losses["checkpointing"] == pytest.approx(losses["plain"], rel=1e-4)
    assert losses["bfloat16"] == pytest.approx(losses["plain"], rel=0.02)


@pytest.mark.parametrize("outer", [True, False])
def test_a_compiled_model_is_pruned_alike(model_of, outer):
    losses = []
    for compiled in (True, False):
        torch.compiler.reset()
        model = model_of()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        fpp = FPP(run if outer else model, Recipe(fpp=0.6), schedule=SOON, optimizer=optimizer)
        losses.append(train(run, optimizer, fpp, 9))
        assert fpp.done and any(isinstance(m, PackedLinear) for m in model.modules())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_on_a_folded_model(model_of):
    """Folded attention trains in its folded form while what is dense beside it is pruned."""
    dense = model_of("bert").eval()
    compressed = foldprune.compress(dense, recipe=Recipe(irc=4, dwc="slice"))
    model = foldprune.torch.convert(dense, compressed).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1)
    fpp = FPP(model, Recipe(fpp=0.7), schedule=SOON, optimizer=optimizer)
    query = model.bert.encoder.layer[0].attention.self.query.values.detach().clone()
    train(model, optimizer, fpp, 8)
    assert fpp.done
    result = to_compressed(model)
    totals = result.report.totals
    assert totals["feed_forward"].removed > 0.6 and totals["qkv"].removed > 0.6
    assert not torch.equal(model.bert.encoder.layer[0].attention.self.query.values, query)
    ids = batch()["input_ids"]
    other = model_of("bert").eval()
    other.load_state_dict(result.state_dict())
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-4)


# ---- checks on a held batch ---------------------------------------------------------------------


def test_suspects_thaw(model_of):
    model = model_of("bert")
    before = copy.deepcopy(model.state_dict())
    fpp = FPP(
        model,
        Recipe(fpp=0.9, fpp_on=("feed_forward",)),
        schedule=Schedule(0, 1, 1),
        held=batch(),
        tolerance=0.0,
        loss=lambda model, held: -model.bert.encoder.layer[0].output.dense.weight.norm(),
    )
    fpp.step()
    assert fpp.rate == 0 and not fpp.done and fpp.history[0].share == 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_part_of_the_suspects_thaws(model_of):
    model = model_of("bert")
    recipe = Recipe(fpp=0.8, fpp_on=("feed_forward",))

    def share_removed(model: Any, held: Any) -> Any:
        weights = [layer.output.dense.weight for layer in model.bert.encoder.layer]
        return 1 + torch.cat([w.ravel() for w in weights]).eq(0).double().mean()

    fpp = FPP(
        model, recipe, schedule=Schedule(0, 1, 1), held=batch(), tolerance=0.5, loss=share_removed
    )
    fpp.step()
    (event,) = fpp.history
    assert event.wanted == 1 and event.share == 0.5 and event.after <= 1.5
    assert fpp.rate == pytest.approx(0.4, abs=1e-3) and not fpp.done
    fpp.step()  # after the schedule's end too
    assert len(fpp.history) == 2 and fpp.done and fpp.rate == pytest.approx(0.8, abs=1e-3)


def test_losses_that_are_not_finite(model_of):
    model = model_of("bert")
    fpp = FPP(
        model,
        Recipe(fpp=0.5),
        schedule=Schedule(0, 1, 1),
        held=batch(),
        loss=lambda model, held: torch.tensor(float("nan")),
    )
    with pytest.raises(foldprune.ModelError, match="step 1: the held batch's loss is nan"):
        fpp.step()
    assert fpp.rate == 0
    fpp = FPP(model, Recipe(fpp=0.5), schedule=Schedule(0, 1, 1))
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = float("inf")
    with pytest.raises(foldprune.TensorError, match=r"output\.dense\.weight"):
        fpp.step()
    assert fpp.rate == 0


# ---- training loops -----------------------------------------------------------------------------


def test_a_resumed_run_is_the_same(model_of, tmp_path):
    def begin() -> Any:
        model = model_of("gpt2")
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        return model, optimizer, FPP(model, Recipe(fpp=0.6), schedule=SOON, optimizer=optimizer)

    for stop in (3, 7):  # before and after packing
        model, optimizer, fpp = begin()
        train(model, optimizer, fpp, 10)
        expected = model.state_dict()
        model, optimizer, fpp = begin()
        train(model, optimizer, fpp, stop)
        saved = [x.state_dict() for x in (fpp, model, optimizer)]
        torch.save(saved, tmp_path / "run.pt")
        saved = torch.load(tmp_path / "run.pt")
        model, optimizer, fpp = begin()
        for part, state in zip((fpp, model, optimizer), saved, strict=True):
            part.load_state_dict(state)
        train(model, optimizer, fpp, 10 - stop, seed=1 + stop)
        found = model.state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


def _rank(rank: int, path: str) -> None:
    enter(rank, path)
    model = torch.load(f"{path}/model.pt", weights_only=False)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), 0.01, momentum=0.9)
    # ranks see different data, also to check on
    fpp = FPP(parallel, Recipe(fpp=0.6), schedule=SOON, optimizer=optimizer, held=batch(90 + rank))
    train(parallel, optimizer, fpp, 7, seed=10 * rank)
    fpp.pack()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    train(parallel, optimizer, fpp, 2, seed=100 + 10 * rank)
    torch.save((model.state_dict(), fpp.history, fpp.done), f"{path}/rank{rank}.pt")
    leave()


def test_distributed(model_of, tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    torch.save(model_of("bert"), tmp_path / "model.pt")
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    states, histories, done = zip(
        *(torch.load(tmp_path / f"rank{i}.pt", weights_only=False) for i in range(2)), strict=True
    )
    assert histories[0] == histories[1] and all(done)
    assert any(name.endswith(".values") for name in states[0])
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


# ---- bad input ----------------------------------------------------------------------------------


def test_what_is_refused(model_of):
    model = model_of("bert")
    with pytest.raises(TypeError, match="torch module"):
        FPP(model.state_dict(), Recipe(fpp=0.5))
    with pytest.raises(TypeError, match="Recipe"):
        FPP(model, 0.5)
    with pytest.raises(ValueError, match="fold beforehand"):
        FPP(model, Recipe.paper())
    with pytest.raises(foldprune.ModelError, match="no dense matrix"):
        FPP(model, Recipe())
    with pytest.raises(ValueError, match="tolerance"):
        FPP(model, Recipe(fpp=0.5), tolerance=-1)
    with pytest.raises(TypeError, match="torch optimiser, got str"):
        FPP(model, Recipe(fpp=0.5), optimizer="adamw")
    with pytest.raises(ValueError, match="none of this"):
        FPP(model, Recipe(fpp=0.5), optimizer=torch.optim.SGD(model_of().parameters(), lr=0.1))
    fpp = FPP(model, Recipe(fpp=0.5), schedule=SOON, held={"input_ids": batch()["input_ids"]})
    fpp.step()
    with pytest.raises(foldprune.ModelError, match="no loss for the held batch"):
        fpp.step()
    other = FPP(model_of("gpt2"), Recipe(fpp=0.5))
    with pytest.raises(foldprune.ModelError, match="another model"):
        other.load_state_dict(fpp.state_dict())


def test_packing_early_says_so(model_of):
    model = model_of("bert")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    fpp = FPP(model, Recipe(fpp=0.6), schedule=SOON)
    train(model, optimizer, fpp, 3)
    with pytest.warns(foldprune.FoldpruneWarning, match="the rate not reached"):
        fpp.pack(optimizer)
    train(model, optimizer, fpp, 3)
    assert [event.step for event in fpp.history] == [2]
