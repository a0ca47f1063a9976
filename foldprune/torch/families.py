"""How the attention modules of transformers are built, as data: one entry for each way."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

__all__ = ["Family", "family_of"]


@dataclass(frozen=True)
class Family:
    """Names of a self-attention module's children and attributes.

    ``fused``: one layer gives query, key and value; they then become children called ``query``,
    ``key`` and ``value``. ``output``: the output projection, where it is part of the module.
    ``norms``: applied to every head's query and key. ``rope``: both are rotated, row i of a head
    with row i + head_dim / 2. ``dropout``: of the softmax, a module or a number.
    """

    classes: tuple[str, ...]
    query: str
    key: str
    value: str
    dropout: str
    output: str | None = None
    fused: str | None = None
    norms: tuple[str, str] | None = None
    rope: bool = False
    output_dropout: str | None = None
    # attributes with which the module computes something else, unless they are false
    refuses: tuple[str, ...] = ()

    @property
    def roles(self) -> dict[str, str]:
        return {"query": self.query, "key": self.key, "value": self.value}


_LLAMA = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "o_proj",
    "dropout": "attention_dropout",
    "rope": True,
}
FAMILIES = (
    Family(
        (
            "BertSelfAttention",
            "RobertaSelfAttention",
            "XLMRobertaSelfAttention",
            "CamembertSelfAttention",
        ),
        query="query",
        key="key",
        value="value",
        dropout="dropout",
    ),
    Family(
        ("GPT2Attention",),
        query="query",
        key="key",
        value="value",
        fused="c_attn",
        output="c_proj",
        dropout="attn_dropout",
        output_dropout="resid_dropout",
        refuses=("reorder_and_upcast_attn", "is_cross_attention"),
    ),
    Family(
        ("OPTAttention",),
        query="q_proj",
        key="k_proj",
        value="v_proj",
        output="out_proj",
        dropout="dropout",
    ),
    Family(("LlamaAttention", "MistralAttention", "Qwen2Attention"), **_LLAMA),  # type: ignore[arg-type]
    Family(("Qwen3Attention",), norms=("q_norm", "k_norm"), **_LLAMA),  # type: ignore[arg-type]
)


def family_of(module: nn.Module) -> Family | None:
    """The family whose self-attention this is; None if it is of none."""
    name = type(module).__name__
    return next((family for family in FAMILIES if name in family.classes), None)
