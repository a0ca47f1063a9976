"""How many heads a block has: by its configuration, or for a state dict that comes without one, by
the head sizes of well-known shapes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import HeadSizeWarning, ModelError
from .schema import Schema

if TYPE_CHECKING:
    from .layout import AttentionBlock, Layout

__all__ = ["ASSUMED_HEAD_DIM", "known_head_dim", "set_heads"]

ASSUMED_HEAD_DIM = 64

_KEYS = ("num_attention_heads", "n_head", "num_heads", "n_heads")

# (family, hidden size, query rows, key rows, feed-forward size) -> head size. Only shapes whose
# public models all agree stand here.
_KNOWN = {
    # MiniLM-L6/L12-H384 and the sentence encoders built on them
    ("bert", 384, 384, 384, 1536): 32,
    # BERT miniatures, base and large; RoBERTa, XLM-R
    ("bert", 128, 128, 128, 512): 64,
    ("bert", 256, 256, 256, 1024): 64,
    ("bert", 512, 512, 512, 2048): 64,
    ("bert", 768, 768, 768, 3072): 64,
    ("bert", 1024, 1024, 1024, 4096): 64,
    # TinyBERT-4L-312D
    ("bert", 312, 312, 312, 1200): 26,
    # GPT-2 small to XL
    ("gpt2", 768, 768, 768, 3072): 64,
    ("gpt2", 1024, 1024, 1024, 4096): 64,
    ("gpt2", 1280, 1280, 1280, 5120): 64,
    ("gpt2", 1600, 1600, 1600, 6400): 64,
    # OPT 125M, 1.3B, 2.7B, 6.7B
    ("opt", 768, 768, 768, 3072): 64,
    ("opt", 2048, 2048, 2048, 8192): 64,
    ("opt", 2560, 2560, 2560, 10240): 80,
    ("opt", 4096, 4096, 4096, 16384): 128,
    # SmolLM and SmolLM2 135M, 360M, 1.7B
    ("llama", 576, 576, 192, 1536): 64,
    ("llama", 960, 960, 320, 2560): 64,
    ("llama", 2048, 2048, 2048, 8192): 64,
    # TinyLlama 1.1B; Llama 3.2 1B and 3B
    ("llama", 2048, 2048, 256, 5632): 64,
    ("llama", 2048, 2048, 512, 8192): 64,
    ("llama", 3072, 3072, 1024, 8192): 128,
    # Llama 7B, 13B, 65B; Llama 2 70B; Mistral 7B and Llama 3 8B; Llama 3 70B
    ("llama", 4096, 4096, 4096, 11008): 128,
    ("llama", 5120, 5120, 5120, 13824): 128,
    ("llama", 8192, 8192, 8192, 22016): 128,
    ("llama", 8192, 8192, 1024, 28672): 128,
    ("llama", 4096, 4096, 1024, 14336): 128,
    # Qwen2 and Qwen2.5 0.5B, 1.5B, 3B, 7B, 14B
    ("llama", 896, 896, 128, 4864): 64,
    ("llama", 1536, 1536, 256, 8960): 128,
    ("llama", 2048, 2048, 256, 11008): 128,
    ("llama", 3584, 3584, 512, 18944): 128,
    ("llama", 5120, 5120, 1024, 13824): 128,
    # Gemma 2B and 7B, which have LLaMA's names
    ("llama", 2048, 2048, 256, 16384): 256,
    ("llama", 3072, 4096, 4096, 24576): 256,
    # DistilBERT, MPNet
    ("distilbert", 768, 768, 768, 3072): 64,
    ("mpnet", 768, 768, 768, 3072): 64,
    # ALBERT base and large
    ("albert", 768, 768, 768, 3072): 64,
    ("albert", 1024, 1024, 1024, 4096): 64,
    # DeBERTa v3 base and large
    ("deberta-v2", 768, 768, 768, 3072): 64,
    ("deberta-v2", 1024, 1024, 1024, 4096): 64,
    # GPT-Neo 125M, 1.3B, 2.7B
    ("gpt_neo", 768, 768, 768, 3072): 64,
    ("gpt_neo", 2048, 2048, 2048, 8192): 128,
    ("gpt_neo", 2560, 2560, 2560, 10240): 128,
    # Pythia 70M, 160M, 410M, 2.8B (1B and 1.4B differ in nothing but their heads)
    ("gpt_neox", 512, 512, 512, 2048): 64,
    ("gpt_neox", 768, 768, 768, 3072): 64,
    ("gpt_neox", 1024, 1024, 1024, 4096): 64,
    ("gpt_neox", 2560, 2560, 2560, 10240): 80,
    # Phi 1.5 and 2
    ("phi", 2048, 2048, 2048, 8192): 64,
    ("phi", 2560, 2560, 2560, 10240): 80,
    # BART base and large, mBART large; Whisper tiny to large
    ("bart", 768, 768, 768, 3072): 64,
    ("bart", 1024, 1024, 1024, 4096): 64,
    ("mbart", 1024, 1024, 1024, 4096): 64,
    ("whisper", 384, 384, 384, 1536): 64,
    ("whisper", 512, 512, 512, 2048): 64,
    ("whisper", 768, 768, 768, 3072): 64,
    ("whisper", 1024, 1024, 1024, 4096): 64,
    ("whisper", 1280, 1280, 1280, 5120): 64,
    # T5 and FLAN-T5 small, base, large
    ("t5", 512, 512, 512, 2048): 64,
    ("t5", 768, 768, 768, 3072): 64,
    ("t5", 1024, 1024, 1024, 4096): 64,
    ("t5", 512, 384, 384, 1024): 64,
    ("t5", 768, 768, 768, 2048): 64,
    ("t5", 1024, 1024, 1024, 2816): 64,
    # ViT base, large, huge
    ("vit", 768, 768, 768, 3072): 64,
    ("vit", 1024, 1024, 1024, 4096): 64,
    ("vit", 1280, 1280, 1280, 5120): 80,
    # both towers of CLIP
    ("clip", 512, 512, 512, 2048): 64,
    ("clip", 768, 768, 768, 3072): 64,
    ("clip", 1024, 1024, 1024, 4096): 64,
}


def known_head_dim(
    family: str, hidden: int, query_rows: int, key_rows: int, feed_forward: int
) -> int | None:
    """Head size of a known shape, or None."""
    return _KNOWN.get((family, hidden, query_rows, key_rows, feed_forward))


def set_heads(
    layout: Layout,
    schema: Schema,
    config: Mapping[str, Any],
    num_heads: int | Mapping[str, int] | None,
    need_heads: bool,
) -> None:
    """Settles the heads of every block; ModelError for those that do not divide it.

    ``num_heads``: of all blocks, or by their names. Without ``need_heads`` heads that are not known
    are left at 0.
    """
    for block in layout.attentions:
        given = num_heads.get(block.name) if isinstance(num_heads, Mapping) else num_heads
        _set_heads(layout, block, schema, config, given, need_heads)
    if layout.head_source == "assumed":
        message = (
            f"head size {ASSUMED_HEAD_DIM} is assumed: this state dict comes without a "
            "configuration and its shape is not a known one. Pass num_heads=... or config=... (a "
            "dict, a config.json or a folder) if that is wrong; folds are wrong with the wrong "
            "head size"
        )
        layout.notes.append(message)
        warnings.warn(message, HeadSizeWarning, stacklevel=5)


def _set_heads(
    layout: Layout,
    block: AttentionBlock,
    schema: Schema,
    config: Mapping[str, Any],
    num_heads: int | None,
    need_heads: bool,
) -> None:
    rows, key_rows = block.query.rows, block.key.rows
    configured = _configured(schema, config, block.stack)
    if num_heads is not None:
        source = "num_heads"
        _check_count("num_heads", num_heads)
        if configured not in (None, num_heads):
            raise ModelError(
                f"num_heads={num_heads} contradicts the configuration's {configured}; pass only one"
            )
    elif configured is not None:
        num_heads, source = configured, "config"
        _check_count("num_attention_heads", num_heads)
    if num_heads is not None:
        if rows % num_heads:
            raise ModelError(
                f"{block.query.weight!r}: {rows} rows do not divide into {num_heads} heads"
            )
        head_dim = rows // num_heads
        if source == "config" and config.get("head_dim") not in (None, head_dim):
            raise ModelError(
                f"{block.query.weight!r}: {rows} rows are not num_attention_heads={num_heads} "
                f"times head_dim={config['head_dim']} of the configuration"
            )
    else:
        forwards = (f for f in layout.feed_forwards if f"{block.name}.".startswith(f"{f.name}."))
        forward = next((f.up.rows for f in forwards), 0)
        table = known_head_dim(schema.name, block.query.cols, rows, key_rows, forward)
        if table is None and not need_heads:
            return
        head_dim = table or ASSUMED_HEAD_DIM
        source = "table of known shapes" if table else "assumed"
    if rows % head_dim or key_rows % head_dim or (rows // head_dim) % (key_rows // head_dim or 1):
        raise ModelError(
            f"{block.key.weight!r}: {rows} query rows and {key_rows} key rows do not divide "
            f"into heads of {head_dim}; pass num_heads= or config="
        )
    block.heads, block.groups = rows // head_dim, key_rows // head_dim
    if not block.groups:
        raise ModelError(f"{block.key.weight!r}: fewer rows than one head of {head_dim}")
    expected = config.get("num_key_value_heads")
    if source == "config" and expected not in (None, block.groups):
        raise ModelError(
            f"{block.key.weight!r}: {key_rows} rows are {block.groups} key heads of "
            f"{head_dim}, the configuration says num_key_value_heads={expected}"
        )
    if block.rope and head_dim % 2:
        block.forbidden["irc"] = f"a head of {head_dim} rows does not divide into 2-planes"
    if layout.head_source != "assumed":
        layout.head_source = source


def _configured(schema: Schema, config: Mapping[str, Any], stack: str) -> Any:
    """The number of heads that the configuration has for a stack of blocks."""
    for pattern, path in schema.heads.items():
        value: Any = config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None and re.search(pattern, stack):
            return value
    return next((config[key] for key in _KEYS if config.get(key) is not None), None)


def _check_count(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what}={value!r}: expected a whole number")
    if value < 1:
        raise ModelError(f"{what}={value}: expected at least one head")
