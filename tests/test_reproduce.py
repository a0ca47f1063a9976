"""The tables: small random models and tiny files through the whole path, and what stops it."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import foldprune
from foldprune.cli import main
from foldprune.errors import FoldpruneWarning, FormatError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from foldprune.eval import protocols, students  # noqa: E402
from foldprune.eval.finetune import HEAD_LR, Classifier, Texts, predict, train  # noqa: E402
from foldprune.eval.protocols import Budget  # noqa: E402
from foldprune.eval.reproduce import reproduce  # noqa: E402
from foldprune.eval.runlog import RunLog  # noqa: E402
from foldprune.eval.table import Metric, Run, Table  # noqa: E402

WORDS = [f"w{i}" for i in range(80)]
BUDGET = Budget(
    length=12,
    batch=8,
    calibration=64,
    recovery=2,
    recovery_lr=1e-3,
    steps=3,
    lr=1e-3,
    test=20,
)


def quiet(done: int, total: int, name: str) -> None:
    """No progress."""


def tokenizer() -> Any:
    """A word is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    base = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=base, pad_token="[PAD]", unk_token="[UNK]"
    )


def sentences(seed: int, count: int, first: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    low, high = (first, first + 40)
    lengths = rng.integers(4, 20, count)
    return [" ".join(f"w{i}" for i in rng.integers(low, high, n)) for n in lengths]


@pytest.fixture(scope="module")
def encoder_folder(make_model, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("encoder")
    make_model("bert").bert.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def lm_folder(make_model, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("lm")
    make_model("llama-gqa").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> list[str]:
    """Two sets whose classes have words of their own."""
    folder = tmp_path_factory.mktemp("sets")
    paths = []
    for seed in (0, 10):
        path = folder / f"set{seed}.csv"
        rows = [(text, n) for n in (0, 1) for text in sentences(seed + n, 60, 40 * n)]
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
        paths.append(str(path))
    return paths


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("texts")
    paths = []
    for seed in (0, 1):
        path = folder / f"text{seed}.txt"
        path.write_text("\n\n".join(sentences(seed, 100)))
        paths.append(str(path))
    return paths


@pytest.fixture(scope="module")
def classified(encoder_folder, labelled, tmp_path_factory) -> tuple[Path, Table, dict[str, Any]]:
    """A whole table, the folder it is in and the arguments that made it."""
    out = tmp_path_factory.mktemp("table")
    options = {
        "out": out,
        "models": [encoder_folder],
        "sets": labelled,
        "rates": [0.4, "paper"],
        "seeds": [0],
        "budget": BUDGET,
        "progress": False,
        "threads": 1,
    }
    return out, reproduce("classification", **options), options


# ---- the whole path -----------------------------------------------------------------------------


def test_classification_table(classified, labelled):
    out, table, _ = classified
    assert table.planned == len(table.runs) == 2 * (1 + 2 * 5)
    for run in table.runs:
        assert 0 <= run.result["accuracy"] <= 1 and run.result["steps"] == BUDGET.steps
        assert run.result["rows"] == 20
        removed = run.result["removed"]
        if run.method == "dense":
            assert removed == 0
        elif run.rate == 0.4:
            # Wanda takes whole weights of every row, which here has 48
            assert removed == pytest.approx(0.4, abs=1 / 48)
    paper = {run.method: run.result for run in table.runs if run.rate == "paper"}
    for method, result in paper.items():
        for share in ("removed", "qkv_removed"):
            want = paper["foldprune"][share]
            assert result[share] == pytest.approx(want, abs=1 / 48), (method, share)
    names = {path.name for path in out.iterdir()}
    assert {"classification.md", "classification.csv", "classification.json"} <= names
    assert any(name.endswith(".png") for name in names)
    with open(out / "classification.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == table.planned and {row["set"] for row in rows} == set(labelled)
    values = json.loads((out / "classification.json").read_text())
    assert len(values["runs"]) == table.planned
    markdown = (out / "classification.md").read_text()
    assert "| foldprune | paper |" in markdown and "| sparsegpt | 0.4 |" in markdown


def test_a_finished_table_is_not_made_again(classified, monkeypatch):
    _, table, options = classified

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("a run was made again")

    monkeypatch.setattr(protocols.Classification, "run", fail)
    assert reproduce("classification", **options) == table


def test_a_stopped_table_goes_on(classified, monkeypatch, tmp_path):
    _, table, options = classified
    options = {**options, "out": tmp_path, "methods": ["dense", "magnitude"], "rates": [0.4]}
    run, made = protocols.Classification.run, []

    def stop(self: Any, *args: Any) -> Any:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(args)
        return run(self, *args)

    monkeypatch.setattr(protocols.Classification, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        reproduce("classification", **options)
    partial = json.loads((tmp_path / "classification.json").read_text())
    assert len(partial["runs"]) == 3 and partial["planned"] == 4, "what is done is shown"
    with open(tmp_path / "classification.jsonl", "a") as log:
        log.write('{"config": {"table": "classif')  # as a power cut leaves it
    monkeypatch.setattr(protocols.Classification, "run", run)
    whole = reproduce("classification", **options)
    want = {(r.method, r.rate, r.set, r.seed): r.result["accuracy"] for r in table.runs}
    assert len(whole.runs) == 4
    for done in whole.runs:
        key = (done.method, done.rate, done.set, done.seed)
        assert done.result["accuracy"] == want[key], "the same run gives the same"


def test_models_are_made_once_and_kept(classified, monkeypatch, tmp_path):
    out, _, _ = classified
    assert len(list((out / "models").glob("*.safetensors"))) == 10
    for path in (out / "models").glob("*.safetensors"):
        foldprune.load(path)


def test_language_table(lm_folder, texts, tmp_path):
    table = reproduce(
        "lm",
        out=tmp_path,
        models=[lm_folder],
        sets=texts,
        rates=[0.3, "paper"],
        seeds=[0],
        budget=Budget(16, 2, 16, 2, 1e-3, 3, 1e-3, 100),
        progress=False,
        threads=1,
    )
    assert len(table.runs) == table.planned == 2 * (2 + 2 * 5)
    for run in table.runs:
        assert run.result["steps"] == (0 if run.method == "original" else 3)
        assert math.isfinite(run.result["perplexity"]) and run.result["tokens"] == 99
        assert run.result["bits_per_byte"] > 0
        if run.rate == 0.3:
            assert run.result["removed"] == pytest.approx(0.3, abs=1 / 48)
    assert "± " not in str(table), "one seed has no spread"
    assert (tmp_path / "lm.md").exists() and not (tmp_path / "models").exists()


def test_filters_do_not_change_what_models_are_calibrated_on(monkeypatch, tmp_path):
    seen = []

    class Stop(Exception):
        pass

    def note(self: Any, *args: Any) -> Any:
        seen.append((self.corpus, args))
        raise Stop

    kind = protocols.Classification
    monkeypatch.setattr(kind, "run", note)
    monkeypatch.setattr(protocols, "load", lambda name: Table)  # has no classes
    monkeypatch.setattr(Table, "classes", ("a", "b"), raising=False)
    for sets in (["trec"], ["mine.csv"]):
        with pytest.raises(Stop):
            reproduce("classification", out=tmp_path, sets=sets, progress=False)
    assert seen[0][0] == kind.sets and seen[0][1][3] == "trec"
    assert seen[1][0] == ("mine.csv",)


# ---- bad input ----------------------------------------------------------------------------------


def test_bad_arguments(tmp_path, labelled, texts):
    with pytest.raises(ValueError, match="table 'glue'"):
        reproduce("glue", out=tmp_path)
    with pytest.raises(ValueError, match=r"unknown method.*movement"):
        reproduce("lm", out=tmp_path, methods=["movement"])
    for rate in (0.0, 1.0, "lossless"):
        with pytest.raises(ValueError, match="rate"):
            reproduce("lm", out=tmp_path, rates=[rate])
    with pytest.raises(ValueError, match="unknown data set 'glue'"):
        reproduce("classification", out=tmp_path, sets=["glue"])
    with pytest.raises(ValueError, match="has no labels"):
        reproduce("classification", out=tmp_path, sets=texts)
    with pytest.raises(ValueError, match="has labels"):
        reproduce("lm", out=tmp_path, sets=labelled)
    assert not list(tmp_path.iterdir())


def test_a_log_of_something_else(tmp_path):
    path = tmp_path / "classification.jsonl"
    path.write_text('{"loss": 1}\n')
    with pytest.raises(FormatError, match="line 1"):
        RunLog(path)


def test_command(classified, capsys, encoder_folder, labelled, monkeypatch):
    out, table, _ = classified
    monkeypatch.setattr(protocols.Classification, "standard", BUDGET)
    monkeypatch.setattr(protocols.Classification, "standard_paper", BUDGET)
    argv = ["reproduce", "--table", "classification", "--out", str(out), "--threads", "1"]
    argv += [
        "--models",
        encoder_folder,
        "--sets",
        *labelled,
        "--rates",
        "0.4",
        "paper",
        "--seeds",
        "0",
    ]
    assert main(argv) == 0
    assert capsys.readouterr().out == f"{table}\n"
    assert main([*argv, "--methods", "dense", "wanda", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert {run["method"] for run in values["runs"]} == {"dense", "wanda"}
    assert main([*argv, "--methods", "movement"]) == 2
    assert "movement" in capsys.readouterr().err


# ---- training -----------------------------------------------------------------------------------


def test_training_learns_and_keeps_embeddings_and_zeros(make_model, labelled):
    from foldprune.eval.datasets import load

    data, words = load(labelled[0]), tokenizer()
    model = make_model("bert").bert
    model.pooler = None
    made = students.Students(model, [], [], steps=0, lr=0.0, facts={}, folder=None)
    compressed = foldprune.compress(model, 0.4)
    made.compressed = lambda *_: compressed  # type: ignore[method-assign]
    encoder, _ = made.module("foldprune", 0.4, quiet)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    torch.manual_seed(1)
    classifier = Classifier(encoder, 2)
    rows = Texts(words, data.train.texts, 12)
    groups = rows.endless(8, np.random.default_rng(0))

    def loss() -> Any:
        group = next(groups)
        labels = torch.tensor([data.train.labels[i] for i in group])
        return torch.nn.functional.cross_entropy(classifier(rows.batch(group)), labels)

    trained = [p for p in classifier.parameters() if p.requires_grad]
    assert train(trained, loss, steps=150, lr=3e-3, progress=quiet) == 150
    found = predict(classifier, Texts(words, data.test.texts, 12), 8)
    assert np.mean(np.array(found) == data.test.labels) > 0.9
    dense = foldprune.torch.to_compressed(encoder)
    changed = 0
    for name in compressed:
        zeros = compressed[name] == 0
        assert not dense[name][zeros].any() or not zeros.any() or "bias" in name, name
        changed += not np.array_equal(dense[name], compressed[name])
    assert changed > 10
    for name, value in encoder.state_dict().items():
        if "embeddings." in name and "LayerNorm" not in name:
            assert torch.equal(value, before[name]), name


def test_the_new_head_learns_at_a_rate_of_its_own(make_model):
    encoder = make_model("bert").bert
    frozen = encoder.embeddings.requires_grad_(False)
    classifier = Classifier(encoder, 2)
    optimiser = torch.optim.AdamW(classifier.groups(), lr=1e-4)
    rates = {id(p): g["lr"] for g in optimiser.param_groups for p in g["params"]}
    assert not rates.keys() & {id(p) for p in frozen.parameters()}
    for parameter in classifier.parameters():
        if parameter.requires_grad:
            of_head = any(parameter is p for p in classifier.head.parameters())
            assert rates[id(parameter)] == (HEAD_LR if of_head else 1e-4)


def test_the_recipe_paper_has_a_budget_of_its_own(encoder_folder, labelled, monkeypatch, tmp_path):
    recoveries: list[tuple[int, float]] = []
    recover = foldprune.torch.recover

    def noted(*args: Any, steps: int, lr: float, **options: Any) -> foldprune.torch.Recovery:
        recoveries.append((steps, lr))
        return recover(*args, steps=steps, lr=lr, **options)

    monkeypatch.setattr(foldprune.torch, "recover", noted)
    paper = replace(BUDGET, batch=4, recovery=5, recovery_lr=2e-3, steps=6)
    monkeypatch.setattr(protocols.Classification, "standard", BUDGET)
    monkeypatch.setattr(protocols.Classification, "standard_paper", paper)
    options = {"models": [encoder_folder], "sets": labelled[:1], "rates": [0.4, "paper"]}
    table = reproduce(
        "classification",
        out=tmp_path,
        methods=["dense", "magnitude"],
        seeds=[0],
        progress=False,
        threads=1,
        **options,
    )
    assert recoveries == [(BUDGET.recovery, BUDGET.recovery_lr), (5, 2e-3)]
    assert [run.result["steps"] for run in table.runs] == [BUDGET.steps, BUDGET.steps, 6]
    lines = (tmp_path / "classification.jsonl").read_text().splitlines()
    configs = [json.loads(line)["config"] for line in lines]
    assert [c["budget"] for c in configs] == [asdict(BUDGET), asdict(BUDGET), asdict(paper)]
    # texts are chosen for the larger budget, which so is part of every run
    assert {c["texts"] for c in configs} == {max(64 + 2 * 8, 64 + 5 * 4)}


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_training_stops_at_a_loss_that_is_not_finite(poison):
    weight = torch.nn.Parameter(torch.ones(3))
    seen: list[Any] = []

    def loss() -> Any:
        seen.append(weight.detach().clone())
        value = (weight * torch.tensor([1.0, 2.0, 3.0])).sum()
        if len(seen) == 4:
            # the square root of zero has a finite value and an infinite slope
            value = value * math.nan if poison == "loss" else value + (weight[0] * 0).sqrt()
        return value

    with pytest.warns(FoldpruneWarning, match="step 3"):
        assert train([weight], loss, steps=10, lr=0.1, progress=quiet) == 3
    assert torch.equal(weight, seen[2]), "the weights of the last finite loss"


def test_batches_hold_every_text_once():
    texts = Texts(tokenizer(), sentences(0, 50), 12)
    lengths = [len(ids) for ids in texts.ids]
    assert max(lengths) == 12
    for rng in (None, np.random.default_rng(0)):
        groups = texts.groups(8, rng)
        assert sorted(row for group in groups for row in group) == list(range(50))
        for group in groups:
            batch = texts.batch(group)
            assert batch["input_ids"].shape[1] == max(lengths[i] for i in group)
            assert batch["attention_mask"].sum() == sum(lengths[i] for i in group)


# ---- tables -------------------------------------------------------------------------------------


def test_table():
    def run(method: str, rate: Any, name: str, seed: int, value: float) -> Run:
        result = {"accuracy": value, "removed": 0.0 if method == "dense" else 0.4}
        return Run("m", method, rate, name, seed, result)

    runs = [
        run("dense", 0.0, "a", 0, 0.8),
        run("dense", 0.0, "b", 0, 0.6),
        run("dense", 0.0, "a", 1, 0.9),
        run("dense", 0.0, "b", 1, 0.7),
        run("wanda", 0.4, "a", 0, 0.5),
    ]
    metric = Metric("accuracy", percent=True)
    table = Table("t", (metric,), tuple(runs), planned=8)
    dense, wanda = table.rows("m", metric).values()
    assert dense["a"].mean == pytest.approx(0.85)
    assert dense["a"].spread == pytest.approx(0.1 / math.sqrt(2))
    assert dense["mean"].mean == pytest.approx(0.75)
    assert wanda["b"] is None and wanda["mean"] is None, "a mean of some sets would mislead"
    text = str(table)
    assert "85.00 ± 7.07" in text and "5 of 8 runs are done" in text
    assert Metric("perplexity", geometric=True).mean([2, 8]) == pytest.approx(4)
