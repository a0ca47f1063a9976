"""Recovery and refolding: what trains, what it is trained towards, and how a run can be stopped."""

from __future__ import annotations

import copy
import random
import sys
from typing import Any

import models
import numpy as np
import pytest

import foldprune
from foldprune import FoldpruneWarning, ModelError, Recipe

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from foldprune.torch import compress, convert, recover, refold, to_compressed  # noqa: E402

PAPER = {
    "bert": Recipe(fpp=0.5, irc=1, dwc="slice"),
    "gpt2": Recipe(fpp=0.5, irc=1, dwc="slice"),
    "opt": Recipe(fpp=0.5, irc=4, dwc=2),
    "llama-": Recipe(fpp=0.5, irc=2, dwc="slice"),
    "llama-gqa": Recipe(fpp=0.5, irc=2, dwc="pivot"),
    "qwen2": Recipe(fpp=0.5, irc=2, dwc=3),
}
QUIET: dict[str, Any] = {"progress": False, "threads": 1}


def compressed(model: Any, recipe: Recipe) -> Any:
    made = foldprune.compress(model, recipe=recipe, threads=1)
    return convert(copy.deepcopy(model), made)


def padded(count: int = 6, seed: int = 3) -> list[Any]:
    """Batches with padding on the right."""
    lengths = torch.tensor([16, 9, 12, 5, 16, 7, 11, 16])
    mask = (torch.arange(16) < lengths[:, None]).long()
    return [{"input_ids": ids, "attention_mask": mask} for ids in models.batches(seed, count)]


def run(student: Any, teacher: Any, batches: Any = None, **options: Any) -> Any:
    batches = padded() if batches is None else batches
    return recover(student, teacher, batches, **{"steps": 12, "every": 4, **QUIET, **options})


def state(model: Any) -> dict[str, Any]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# ---- learning -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PAPER)
def test_the_student_comes_nearer(make_model, family):
    teacher = make_model(family)
    student = compressed(teacher, PAPER[family])
    before = state(teacher)
    for layerwise in (1.0, 0.0):
        result = run(student, teacher, steps=40, lr=3e-3, layerwise=layerwise, held=padded(2, 9))
        assert result.stopped is None and len(result.losses) == 40
        assert result.held[-1][1] < 0.9 * result.held[0][1]
    assert same(state(teacher), before)


def test_the_losses_are_those_of_the_definitions(make_model):
    """From the two models' own hidden states and logits, without hooks, in NumPy."""
    teacher = make_model("bert")
    student = compressed(teacher, PAPER["bert"])
    (batch,) = padded(1)
    keep = batch["attention_mask"].bool().numpy()
    outputs: dict[str, list[Any]] = {"student": [], "teacher": []}
    attended: dict[str, list[Any]] = {"student": [], "teacher": []}
    logits = {}
    for name, model in (("student", student), ("teacher", teacher)):
        for layer in model.bert.encoder.layer:
            layer.attention.output.dense.register_forward_hook(
                lambda _, __, y, name=name: attended[name].append(y.detach().double().numpy())
            )
        with torch.no_grad():
            out = model(**batch, output_hidden_states=True)
        outputs[name] = [h.double().numpy() for h in out.hidden_states[1:]]
        logits[name] = out.logits.double().numpy()
    errors = []
    for s, t in zip(outputs["student"], outputs["teacher"], strict=True):
        s, t = s[keep], t[keep]
        errors.append((((s - t) ** 2).sum(-1) / (t**2).sum(-1)).mean())
    for s, t in zip(attended["student"], attended["teacher"], strict=True):
        s, t = s[keep], t[keep]
        errors.append(((s - t) ** 2).sum() / (t**2).sum())
    start = run(student, teacher, [batch], steps=1, layerwise=1)
    assert start.losses[0] == pytest.approx(np.mean(errors), rel=1e-4)

    def log_softmax(x: Any) -> Any:
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    student = compressed(teacher, PAPER["bert"])
    p, q = (log_softmax(logits[name][keep] / 3.0) for name in ("teacher", "student"))
    divergence = 9.0 * (np.exp(p) * (p - q)).sum(-1).mean()
    start = run(student, teacher, [batch], steps=1, layerwise=0, temperature=3.0)
    assert start.losses[0] == pytest.approx(divergence, rel=1e-4)


def test_padding_takes_no_part(make_model):
    teacher = make_model("bert")
    one, other = padded(1)[0], padded(1)[0]
    other["input_ids"] = torch.where(other["attention_mask"].bool(), other["input_ids"], 5)
    assert not torch.equal(one["input_ids"], other["input_ids"])
    losses = []
    for batch in (one, other):
        for layerwise in (0, 1):
            student = compressed(teacher, PAPER["bert"])
            losses.append(run(student, teacher, [batch], steps=1, layerwise=layerwise).losses[0])
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-5)


def test_a_model_without_a_head_learns_its_hidden_states(make_model):
    teacher = make_model("bert").bert
    student = compressed(teacher, PAPER["bert"])
    result = run(student, teacher, steps=40, layerwise=0.0, lr=3e-3, held=padded(2, 9))
    assert result.held[-1][1] < 0.8 * result.held[0][1]


def test_only_what_requires_gradients_trains(make_model):
    teacher = make_model("bert")
    student = compressed(teacher, PAPER["bert"])
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("attention" in name and parameter.is_floating_point())
    before = state(student)
    student.train()
    run(student, teacher)
    after = state(student)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("attention" in name for name in moved)
    assert student.training and student.bert.encoder.layer[0].training
    assert all(parameter.grad is None for parameter in student.parameters())


def test_the_callers_optimizer_is_used(make_model):
    teacher = make_model("bert")
    student = compressed(teacher, PAPER["bert"])
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    run(student, teacher, optimizer=optimizer)
    assert all(group["lr"] < 0.5 for group in optimizer.param_groups)
    # a schedule that ends near 0
    assert optimizer.param_groups[0]["lr"] < 0.05


# ---- folded attention ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", PAPER)
def test_gradients_are_those_of_the_dense_model(make_model, family):
    """Of the folded parts, by the chain rule: the dense tensors are affine in every single number
    of a folded part, and their gradients are those of the dense model."""
    teacher = make_model(family)
    student = compressed(teacher, PAPER[family]).double()
    ids = models.batches(4, 1)[0]
    dense = copy.deepcopy(teacher).double()
    before = to_compressed(student).state_dict()
    dense.load_state_dict(before)
    for model in (student, dense):
        model(ids).logits.square().mean().backward()
    gradients = {name: p.grad for name, p in dense.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    checked = set()
    for name, parameter in student.named_parameters():
        if "attn" not in name and "attention" not in name:
            continue
        largest = parameter.grad.abs().max()
        for i in torch.randint(parameter.numel(), (3,), generator=generator).tolist():
            with torch.no_grad():
                parameter.view(-1)[i] += 1
                after = to_compressed(student).state_dict()
                parameter.view(-1)[i] -= 1
            expected = sum(
                float((gradients[n] * (after[n] - before[n])).sum())
                for n in gradients
                if gradients[n] is not None
            )
            found = float(parameter.grad.view(-1)[i])
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-5 * float(largest)), name
        checked.add(name.split(".")[-2])
    assert len(checked) >= 3  # queries, keys, values or output projections


@pytest.mark.parametrize("family", PAPER)
def test_nothing_comes_back_under_weight_decay(make_model, family):
    teacher = make_model(family)
    student = compressed(teacher, PAPER[family])
    start = to_compressed(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0.3)
    run(student, teacher, optimizer=optimizer, steps=30)
    end = to_compressed(student)
    assert end.report.totals == start.report.totals
    changed = 0
    for name, encoding in start.encodings.items():
        after = end.encodings[name]
        assert type(after) is type(encoding) and after.numbers == encoding.numbers
        one, other = encoding.unpack(), after.unpack()
        changed += not np.array_equal(one, other)
        if isinstance(encoding, foldprune.encodings.Packed):
            assert not other[~kept(encoding)].any()
    assert changed > 10
    # and exactly back: a model converted from it gives the same bits
    again = convert(copy.deepcopy(teacher), end)
    assert same(state(again), state(student))
    dense = models.loaded(teacher, end)
    ids = models.batches(4, 1)[0]
    np.testing.assert_allclose(models.logits(student, ids), models.logits(dense, ids), atol=2e-5)


def kept(encoding: Any) -> Any:
    ones = foldprune.encodings.Packed(
        encoding.matrix_shape,
        encoding.mask,
        np.ones_like(encoding.values),
        encoding.block,
        encoding.transposed,
    )
    return ones.unpack() != 0


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_attention_of_rank_one_goes_backward_in_linear_time(make_model, family, monkeypatch):
    from foldprune.torch import attention_ops

    teacher = make_model(family)
    student = compressed(teacher, PAPER[family])
    slow = copy.deepcopy(student)
    slow.set_attn_implementation("eager")
    calls = []
    core = attention_ops._core.attention_backward

    def watched(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return core(*args, **options)

    monkeypatch.setattr(attention_ops._core, "attention_backward", watched)
    batch = padded(1)[0] if family == "bert" else {"input_ids": models.batches(3, 1)[0]}
    mask = batch.get("attention_mask", torch.ones(8, 16)).bool()
    for model in (slow, student):
        assert not calls
        (model(**batch).logits[mask] ** 2).mean().backward()
    assert len(calls) == 2  # layers
    for (name, one), other in zip(student.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6, msg=name)


# ---- stops --------------------------------------------------------------------------------------


class Loader:
    """An iterable that draws its own order from the global random numbers."""

    def __iter__(self) -> Any:
        batches = padded()
        random.shuffle(batches)
        return iter([batches[i] for i in torch.randperm(len(batches)).tolist()])


@pytest.mark.parametrize("make_batches", [padded, Loader])
def test_a_resumed_run_ends_in_the_same_bits(make_model, tmp_path, make_batches):
    teacher = make_model("bert")
    start = compressed(teacher, PAPER["bert"])
    options: dict[str, Any] = {"steps": 20, "held": padded(2, 9), "lr": 1e-3}

    def seeded(student: Any, checkpoint: Any = None, progress: Any = False) -> Any:
        random.seed(1)
        torch.manual_seed(1)
        return run(
            student, teacher, make_batches(), checkpoint=checkpoint, progress=progress, **options
        )

    whole = copy.deepcopy(start)
    result = seeded(whole)

    def stop(done: int, total: int, text: str) -> None:
        if done == 10:
            raise OSError("the machine went down")

    path = tmp_path / "run.pt"
    with pytest.raises(OSError, match="went down"):
        seeded(copy.deepcopy(start), path, stop)
    torch.manual_seed(77)  # another process
    random.seed(77)
    resumed = copy.deepcopy(start)
    steps: list[int] = []
    again = run(
        resumed,
        teacher,
        make_batches(),
        checkpoint=path,
        progress=lambda done, total, text: steps.append(done),
        **options,
    )
    assert steps == list(range(9, 21))
    assert same(state(resumed), state(whole))
    assert again == result
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    # a run that is done is read back
    done = copy.deepcopy(start)
    assert run(done, teacher, make_batches(), checkpoint=path, **options) == result
    assert same(state(done), state(whole))


def test_an_interrupted_run_keeps_the_best(make_model):
    teacher = make_model("bert")
    held = padded(2, 9)
    start = compressed(teacher, PAPER["bert"])

    def interrupt(done: int, total: int, text: str) -> None:
        if done == 11:
            raise KeyboardInterrupt

    best = copy.deepcopy(start)
    options: dict[str, Any] = {"steps": 40, "progress": interrupt, "layerwise": 0}
    result = run(best, teacher, held=held, lr=1e-3, **options)
    assert result.stopped == "interrupted" and len(result.losses) == 11
    assert result.best == min(result.held, key=lambda pair: pair[1])[0] == 8
    last = copy.deepcopy(start)
    assert run(last, teacher, lr=1e-3, **options).best == 11
    assert not same(state(best), state(last))
    # a rate at which nothing gets better leaves the student as it was
    worse = copy.deepcopy(start)
    result = run(worse, teacher, held=held, lr=50.0, **options)
    assert result.best == 0 and same(state(worse), state(start))


@pytest.mark.parametrize(("bad", "good"), [(9, 8), (8, 4)])
def test_a_loss_that_is_not_finite_stops_the_run(make_model, bad, good):
    """The weights of step 8 are not kept where it is they that give no loss."""
    teacher = make_model("bert")
    student = compressed(teacher, PAPER["bert"])
    states: dict[int, Any] = {}

    def poison(done: int, total: int, text: str) -> None:
        states[done] = state(student)
        if done == bad:
            student.bert.encoder.layer[0].output.dense.values.data[0] = float("nan")

    with pytest.warns(FoldpruneWarning, match=rf"not finite at step {bad}.*of step {good}"):
        result = run(student, teacher, progress=poison)
    assert result.best == good and len(result.losses) == bad
    assert same(state(student), states[good])


def test_the_end_of_an_iterator_is_told(make_model):
    teacher = make_model("bert")
    student = compressed(teacher, PAPER["bert"])
    with pytest.warns(FoldpruneWarning, match="ended after 6 of 12 steps"):
        result = run(student, teacher, iter(padded()))
    assert len(result.losses) == 6 == result.best


def test_epochs_are_shuffled_by_the_seed(make_model):
    teacher = make_model("bert")

    class Noting(list[Any]):
        def __getitem__(self, i: Any) -> Any:
            order.append(i)
            return super().__getitem__(i)

    orders = []
    for seed in (0, 0, 1):
        order: list[int] = []
        run(compressed(teacher, PAPER["bert"]), teacher, Noting(padded()), seed=seed)
        orders.append(order)
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0][:6]) == sorted(orders[0][6:]) == list(range(6))
    assert orders[0][:6] != orders[0][6:]


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, r"student has 2 blocks .*teacher 3"),
        ({"hidden_size": 32}, r"word_embeddings.weight.*\(89, 48\) in the student, \(89, 32\)"),
        ({"vocab_size": 97}, r"word_embeddings.weight.*\(89, 48\) in the student, \(97, 48\)"),
    ],
)
def test_a_teacher_of_another_shape_is_refused(make_model, changes, message):
    import transformers

    model = make_model("bert")
    student = compressed(model, PAPER["bert"])
    config = transformers.BertConfig(**{**model.config.to_dict(), **changes})
    before = state(student)
    with pytest.raises(ModelError, match=message):
        run(student, transformers.BertForMaskedLM(config))
    assert same(state(student), before)
    if "vocab_size" in changes:
        with pytest.raises(ModelError, match=r"the logits: shape .*89.*97"):
            run(student, transformers.BertForMaskedLM(config), layerwise=0)


def test_bad_arguments_are_refused(make_model, tmp_path):
    teacher = make_model("bert")
    student = compressed(teacher, PAPER["bert"])
    with pytest.raises(ModelError, match="share parameters"):
        run(teacher, teacher)
    with pytest.raises(ModelError, match="no batches"):
        run(student, teacher, [])
    with pytest.raises(ModelError, match="no batches"):
        run(student, teacher, iter([]))
    with pytest.raises(ModelError, match="held: there are no batches"):
        run(student, teacher, held=[])
    with pytest.raises(ModelError, match=r"no 'bert\.encoder"):
        run(student.bert, teacher)
    with pytest.raises(ModelError, match="batch 0"):
        run(student, teacher, [{"nonsense": torch.zeros(1)}])
    for options in ({"steps": 0}, {"every": 0}, {"lr": 0}, {"layerwise": 2}, {"temperature": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            run(student, teacher, **options)
    frozen = compressed(teacher, PAPER["bert"]).requires_grad_(False)
    with pytest.raises(ModelError, match="requires_grad"):
        run(frozen, teacher)
    path = tmp_path / "run.pt"
    run(student, teacher, checkpoint=path)
    with pytest.raises(ModelError, match="steps=12, this one has 20"):
        run(student, teacher, checkpoint=path, steps=20)
    other = compressed(teacher, Recipe(fpp=0.25))
    with pytest.raises(ModelError, match="another student"):
        run(other, teacher, checkpoint=path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="not a checkpoint"):
        run(student, teacher, checkpoint=path)


# ---- ranks that fall ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-gqa"])
def test_refolding_lowers_ranks_and_keeps_masks(make_model, family):
    teacher = make_model(family)
    data = models.batches()
    recipe = Recipe(fpp=0.5, irc=4, dwc=4)
    student = convert(copy.deepcopy(teacher), compress(teacher, data, recipe=recipe, **QUIET))
    run(student, teacher, data, lr=1e-2)
    before, trained = state(student), to_compressed(student)
    lower = Recipe(irc=2, dwc="pivot")
    folded = refold(student, teacher, data, lower, **QUIET)
    assert same(state(student), before)
    after = to_compressed(folded)
    blocks = 0
    for row in after.report.rows:
        if row.name in after.tied:
            continue
        old, new = trained.encodings[row.name], after.encodings[row.name]
        if row.group == "qkv" and len(row.shape) == 2:
            assert new.numbers < old.numbers
            blocks += 1
        elif isinstance(old, foldprune.encodings.Packed):
            assert new.numbers == old.numbers, row.name
            if row.group != "attention_output":
                assert np.array_equal(new.mask, old.mask) and np.array_equal(new.values, old.values)
    assert blocks
    totals = after.report.totals["model"]
    assert totals.numbers == trained.report.totals["model"].numbers
    assert totals.stored < trained.report.totals["model"].stored
    # it is the trained model that is folded
    ids = models.batches(4, 1)[0]
    reached = models.logits(folded, ids)
    whole = convert(
        copy.deepcopy(teacher),
        compress(teacher, data, recipe=Recipe(fpp=0.5, irc=2, dwc="pivot"), **QUIET),
    )

    def distance(one: Any, other: Any) -> float:
        return float(np.square(one - other).sum() / np.square(other).sum())

    mine = models.logits(student, ids)
    assert distance(reached, mine) < distance(models.logits(whole, ids), mine)
    result = run(folded, teacher, data, steps=20, lr=1e-3, layerwise=0.0, held=data[:2])
    assert result.held[-1][1] < result.held[0][1]


def test_refolding_to_the_same_ranks_changes_nothing(make_model):
    teacher, data = make_model("gpt2"), models.batches()
    recipe = Recipe(irc=3, dwc=2, fpp=0.5)
    student = convert(copy.deepcopy(teacher), compress(teacher, data, recipe=recipe, **QUIET))
    student.transformer.wte.requires_grad_(False)
    again = refold(student.train(), teacher, data, Recipe(irc=3, dwc=2), **QUIET)
    assert same(state(again), state(student)) and again.training
    frozen = [n for n, p in again.named_parameters() if not p.requires_grad]
    assert frozen == [n for n, p in student.named_parameters() if not p.requires_grad] != []
    # the values alone: queries, keys and everything else that was compressed stay as they are
    lower = to_compressed(refold(student, teacher, data, Recipe(irc=3, dwc="slice"), **QUIET))
    before = to_compressed(student)
    weight = "transformer.h.0.attn.c_attn.weight"
    one, other = before.encodings[weight].segments, lower.encodings[weight].segments
    assert np.array_equal(one[0].values, other[0].values)
    assert np.array_equal(one[1].values, other[1].values)
    assert one[2].remainder_ranks.any() and not other[2].remainder_ranks.any()


def test_refolding_prunes_rows_once(make_model):
    teacher, data = make_model("bert"), models.batches()
    student = convert(
        copy.deepcopy(teacher), compress(teacher, data, recipe=Recipe(irc=3), **QUIET)
    )
    lower = Recipe(irc=3, irc_fpp=0.5)
    pruned = refold(student, teacher, data, lower, **QUIET)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    before, after = (to_compressed(m).encodings[name] for m in (student, pruned))
    assert after.numbers == before.numbers // 2 and "mask" in after.parts()
    assert same(state(refold(pruned, teacher, data, lower, **QUIET)), state(pruned))


def test_what_refolding_refuses(make_model):
    teacher, data = make_model("bert"), models.batches()
    student = compressed(teacher, PAPER["bert"])
    with pytest.raises(ModelError, match="not made by"):
        refold(teacher, teacher, data, Recipe(irc=1), **QUIET)
    for recipe in (Recipe(fpp=0.5, irc=1), Recipe(irc=1, overrides={"*": {"fpp": 0.5}})):
        with pytest.raises(ValueError, match="fpp is not for refold"):
            refold(student, teacher, data, recipe, **QUIET)
    with pytest.raises(ModelError, match="do not fit the teacher"):
        refold(student, make_model("roberta"), data, Recipe(irc=1), **QUIET)


# ---- progress, and real weights -----------------------------------------------------------------


def test_the_plain_bar_shows_the_loss(make_model, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    teacher = make_model("bert")
    result = run(compressed(teacher, PAPER["bert"]), teacher, steps=2, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"recovering: 1/2 layers {result.losses[0]:.4g} " in shown.err
    assert f"recovering: 2/2 output {result.losses[1]:.4g} " in shown.err


def test_minilm_recovers(minilm_folder):
    """Rank 1 with a diagonal value, on a few sentences that it learns by heart."""
    import transformers

    teacher = transformers.AutoModel.from_pretrained(minilm_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder)
    sentences = [
        "A diagonal matrix reads its own coordinates.",
        "Heavy rain had fallen all night.",
        "What does the teacher give for this one?",
        "Two ships left the harbour at dawn, and one of them came back.",
    ]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    student = compressed(teacher, Recipe(irc=1, dwc="slice"))
    student.embeddings.requires_grad_(False)
    result = run(student, teacher, [batch], held=[batch], steps=30, layerwise=1.0)
    assert result.held[-1][1] < 0.5 * result.held[0][1]
