"""Architectures as data. One file per family; ``register`` adds one of your own."""

from __future__ import annotations

from .albert import ALBERT
from .bart import BART, MBART
from .bert import BERT
from .clip import CLIP
from .deberta_v2 import DEBERTA_V2
from .distilbert import DISTILBERT
from .gemma import GEMMA
from .gpt2 import GPT2
from .gpt_neo import GPT_NEO
from .gpt_neox import GPT_NEOX
from .llama import LLAMA
from .mixtral import MIXTRAL
from .mpnet import MPNET
from .opt import OPT
from .phi import PHI
from .schema import Attention, FeedForward, Forbidden, Refusal, Schema, Slot
from .t5 import T5
from .torch_nn import MULTIHEAD_ATTENTION, TRANSFORMER
from .vit import VIT, VIT_IN_MEMORY
from .whisper import WHISPER

__all__ = [
    "Attention",
    "FeedForward",
    "Forbidden",
    "Refusal",
    "Schema",
    "Slot",
    "known",
    "register",
    "table",
]

_schemas: list[Schema] = [
    BERT,
    DISTILBERT,
    MPNET,
    ALBERT,
    DEBERTA_V2,
    GPT2,
    GPT_NEO,
    GPT_NEOX,
    OPT,
    PHI,
    LLAMA,
    GEMMA,
    MIXTRAL,
    BART,
    MBART,
    WHISPER,
    T5,
    VIT,
    VIT_IN_MEMORY,
    CLIP,
    TRANSFORMER,
    MULTIHEAD_ATTENTION,
]


def known() -> tuple[Schema, ...]:
    """Every schema, registered ones last."""
    return tuple(_schemas)


def register(schema: Schema) -> None:
    """Adds a family, or replaces the one of the same name."""
    if not isinstance(schema, Schema):
        raise TypeError(f"expected a Schema, got {type(schema).__name__}")
    _schemas[:] = [other for other in _schemas if other.name != schema.name] + [schema]


def table() -> str:
    """What each method does for each family, as a Markdown table."""
    lines = [
        "| family | model types | FPP | IRC | DWC | notes |",
        "|---|---|---|---|---|---|",
        *(f"| {' | '.join(_row(schema))} |" for schema in known()),
    ]
    return "\n".join(lines)


def _row(schema: Schema) -> tuple[str, ...]:
    groups = {
        "embeddings": schema.embeddings,
        "feed-forward": schema.feed_forward,
        "output projection": schema.attention,
    }
    forms = {
        "irc": "planes, lossless" if schema.attentions[0].rope else "rank, lossless",
        "dwc": "slice, pivot, remainder, lossless",
    }
    for method, form in forms.items():
        why = [f.reason for f in schema.forbidden if method in f.methods]
        why += [
            f"`{r.keys[0]}` is not {r.fine} ({r.default} if not given)"
            for r in schema.refuses
            if method in r.methods
        ]
        forms[method] = f"{form}; refused if {'; or if '.join(dict.fromkeys(why))}" if why else form
    return (
        schema.name,
        ", ".join(schema.model_types) or "-",
        ", ".join(name for name, present in groups.items() if present),
        *forms.values(),
        schema.note,
    )
