"""Small random models of the families that conftest.py does not have, and what a forward pass of
theirs does in every attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import models
import numpy as np
import reference
import torch
import transformers as t

from foldprune.encodings import Dense, Encoding

Array = np.ndarray[Any, np.dtype[Any]]


@dataclasses.dataclass(frozen=True)
class Family:
    """``roles``: names of query, key, value and output after a common prefix, of every attention
    that a block may have; ``refused``: why IRC is left out; ``scaled``: logits, by the head size;
    ``rope``: base of the frequencies; ``fused``: query, key and value, head by head."""

    make: Callable[[], Any]
    schema: str
    roles: tuple[tuple[str, str, str, str], ...]
    refused: str | None = None
    scaled: bool = True
    rope: float | None = None
    fused: bool = False
    groups: int | None = None


def _of(config: str, model: str, **values: Any) -> Callable[[], Any]:
    return lambda: getattr(t, model)(getattr(t, config)(**values))


_TEXT = {
    "vocab_size": 89, "hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 80,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
_ENCODER_DECODER = {
    "vocab_size": 89, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}  # fmt: skip
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {
    "vocab_size": 89, "d_model": 48, "d_ff": 80, "num_layers": 2, "num_heads": 4, **_IDS,
    "decoder_start_token_id": 0,
}  # fmt: skip
_IMAGE = {"image_size": 16, "patch_size": 4}
_GROUPED = {**_TEXT, **_IDS, "num_key_value_heads": 2}

_BERT = (("self.query", "self.key", "self.value", "output.dense"),)
_PROJ = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
_CROSS = tuple(name.replace("self", "encoder") for name in _PROJ)
_LLAMA = ((*_PROJ[:3], "self_attn.o_proj"),)
_T5_ROLES = tuple(
    tuple(f"{name}.{letter}" for letter in "qkvo")
    for name in ("layer.0.SelfAttention", "layer.1.EncDecAttention")
)
_PARTIAL = "only part of each head rotates"
_NORMALISED = "normalised before they meet"

FAMILIES = {
    "xlm-roberta": Family(
        _of("XLMRobertaConfig", "XLMRobertaForMaskedLM", **_TEXT), "bert", _BERT
    ),
    "electra": Family(
        _of("ElectraConfig", "ElectraForMaskedLM", **_TEXT, embedding_size=32), "bert", _BERT
    ),
    "distilbert": Family(
        _of(
            "DistilBertConfig", "DistilBertForMaskedLM", vocab_size=89, dim=48, n_layers=2,
            n_heads=4, hidden_dim=80, max_position_embeddings=64,
        ),
        "distilbert",
        (("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),),
    ),
    "mpnet": Family(
        _of("MPNetConfig", "MPNetForMaskedLM", **_TEXT),
        "mpnet",
        (("attn.q", "attn.k", "attn.v", "attn.o"),),
    ),
    "albert": Family(
        _of("AlbertConfig", "AlbertForMaskedLM", **_TEXT, embedding_size=32),
        "albert",
        (("attention.query", "attention.key", "attention.value", "attention.dense"),),
    ),
    "deberta-v2": Family(
        _of(
            "DebertaV2Config", "DebertaV2ForMaskedLM", **_TEXT, relative_attention=True,
            pos_att_type=["c2p", "p2c"], position_buckets=8, share_att_key=True,
            norm_rel_ebd="layer_norm", conv_kernel_size=3,
        ),
        "deberta-v2",
        (("self.query_proj", "self.key_proj", "self.value_proj", "output.dense"),),
        refused="disentangled",
    ),
    "deberta-v2-unshared": Family(
        _of(
            "DebertaV2Config", "DebertaV2ForMaskedLM", **_TEXT, relative_attention=True,
            pos_att_type=["c2p", "p2c"], position_buckets=8, share_att_key=False,
        ),
        "deberta-v2",
        (("self.query_proj", "self.key_proj", "self.value_proj", "output.dense"),),
        refused="disentangled",
    ),
    "gpt-neo": Family(
        _of(
            "GPTNeoConfig", "GPTNeoForCausalLM", vocab_size=89, hidden_size=48, num_layers=2,
            attention_types=[[["global", "local"], 1]], num_heads=4, intermediate_size=80,
            max_position_embeddings=64, window_size=5, bos_token_id=1, eos_token_id=2,
        ),
        "gpt_neo",
        (tuple(f"attention.{name}_proj" for name in ("q", "k", "v", "out")),),
        scaled=False,
    ),
    "gpt-neox": Family(
        _of("GPTNeoXConfig", "GPTNeoXForCausalLM", **_TEXT, **_IDS),
        "gpt_neox",
        ((*("attention.query_key_value",) * 3, "attention.dense"),),
        refused=_PARTIAL,
        fused=True,
    ),
    "gpt-neox-whole": Family(
        _of("GPTNeoXConfig", "GPTNeoXForCausalLM", **_TEXT, **_IDS, rotary_pct=1.0),
        "gpt_neox",
        ((*("attention.query_key_value",) * 3, "attention.dense"),),
        rope=10000.0,
        fused=True,
    ),
    "phi": Family(
        _of("PhiConfig", "PhiForCausalLM", **_TEXT, **_IDS),
        "phi",
        ((*_PROJ[:3], "self_attn.dense"),),
        refused=_PARTIAL,
    ),
    "phi-norms": Family(
        _of(
            "PhiConfig", "PhiForCausalLM", **_TEXT, **_IDS, qk_layernorm=True,
            partial_rotary_factor=1.0,
        ),
        "phi",
        ((*_PROJ[:3], "self_attn.dense"),),
        refused=_NORMALISED,
    ),
    "gemma": Family(
        _of("GemmaConfig", "GemmaForCausalLM", **_GROUPED, head_dim=16),
        "gemma",
        _LLAMA,
        rope=10000.0,
        groups=2,
    ),
    "gemma2": Family(
        _of(
            "Gemma2Config", "Gemma2ForCausalLM", **_GROUPED, head_dim=12, query_pre_attn_scalar=12,
            attn_logit_softcapping=None,
        ),
        "gemma",
        _LLAMA,
        rope=10000.0,
        groups=2,
    ),
    "gemma3": Family(
        _of("Gemma3TextConfig", "Gemma3ForCausalLM", **_GROUPED, head_dim=12),
        "gemma",
        _LLAMA,
        refused=_NORMALISED,
        groups=2,
    ),
    "mixtral": Family(
        _of("MixtralConfig", "MixtralForCausalLM", **_GROUPED, num_local_experts=4),
        "mixtral",
        _LLAMA,
        rope=1000000.0,
        groups=2,
    ),
    "t5": Family(
        _of("T5Config", "T5ForConditionalGeneration", **_T5, d_kv=12), "t5", _T5_ROLES, scaled=False
    ),
    "t5-gated": Family(
        _of(
            "T5Config", "T5ForConditionalGeneration", **_T5, d_kv=16,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        ),
        "t5",
        _T5_ROLES,
        scaled=False,
    ),
    "bart": Family(
        _of(
            "BartConfig", "BartForConditionalGeneration", **_ENCODER_DECODER,
            max_position_embeddings=64,
        ),
        "bart",
        (_PROJ, _CROSS),
    ),
    "mbart": Family(
        _of(
            "MBartConfig", "MBartForConditionalGeneration", **_ENCODER_DECODER,
            max_position_embeddings=64,
        ),
        "mbart",
        (_PROJ, _CROSS),
    ),
    "whisper": Family(
        _of(
            "WhisperConfig", "WhisperForConditionalGeneration", **_ENCODER_DECODER, **_IDS,
            num_mel_bins=8, max_source_positions=32, max_target_positions=32,
            decoder_start_token_id=1,
        ),
        "whisper",
        (_PROJ, _CROSS),
    ),
    "vit": Family(
        _of(
            "ViTConfig", "ViTForImageClassification", hidden_size=48, num_hidden_layers=2,
            intermediate_size=80, num_attention_heads=4, **_IMAGE,
        ),
        "vit",
        (tuple(f"attention.{letter}_proj" for letter in "qkvo"),),
    ),
    "clip": Family(
        _of(
            "CLIPConfig", "CLIPModel", projection_dim=24, text_config={**_TEXT, **_IDS},
            vision_config={
                "hidden_size": 60, "num_hidden_layers": 2, "intermediate_size": 80,
                "num_attention_heads": 5, **_IMAGE,
            },
        ),
        "clip",
        (_PROJ,),
    ),
}  # fmt: skip


def make(name: str) -> Any:
    """In float32 and eval mode, attention weights at hand."""
    model = models.randomise(FAMILIES[name].make(), 0)
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            if name.startswith("gemma") and parameter.endswith("norm.weight"):
                value -= 1.0  # which the norm adds
            if name.startswith("t5") and parameter.endswith("Attention.q.weight"):
                value *= model.config.d_kv**-0.5  # trained that way, as nothing divides later
    model.set_attn_implementation("eager")
    return model


def inputs(model: Any, seed: int = 7) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 89, (2, 13), generator=generator)
    image = torch.randn(2, 3, 16, 16, generator=generator)
    kind = model.config.model_type
    if kind == "vit":
        return {"pixel_values": image}
    if kind == "clip":
        return {"input_ids": ids, "pixel_values": image}
    if kind == "whisper":
        audio = torch.randn(2, 8, 64, generator=generator)
        return {"input_features": audio, "decoder_input_ids": ids[:, :9]}
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids[:, :9]}
    return {"input_ids": ids}


def forward(model: Any) -> Array:
    """What the model is for: logits, or embeddings of both towers."""
    with torch.no_grad():
        out = model(**inputs(model))
    outputs = [out.logits] if "logits" in out else [out.text_embeds, out.image_embeds]
    return np.concatenate([o.double().numpy().ravel() for o in outputs])


# ---- what every attention does ------------------------------------------------------------------


@dataclasses.dataclass
class Call:
    """An attention in a forward pass: inputs of its projections, its weights and its outputs, with
    the batch as first axis. ``prefix`` and ``roles`` name its tensors."""

    prefix: str
    roles: tuple[str, ...]
    queries: Array
    keys: Array
    values: Array
    weights: Array
    outputs: Array

    @property
    def weight_names(self) -> dict[str, str]:
        names = ("query", "key", "value", "output")
        return {n: f"{self.prefix}{role}.weight" for n, role in zip(names, self.roles, strict=True)}


def calls(model: Any, family: Family) -> list[Call]:
    """Every attention of a forward pass."""
    found = []
    for roles in family.roles:
        end = f"{roles[0]}.weight"
        prefixes = [n.removesuffix(end) for n in model.state_dict() if n.endswith(f".{end}")]
        found += [(prefix, roles) for prefix in prefixes]
    seen: dict[tuple[str, str, str], list[Array]] = {}
    handles = []
    for prefix, roles in found:
        for role in dict.fromkeys(roles):

            def note(_: Any, args: Any, output: Any, key: tuple[str, str] = (prefix, role)) -> None:
                seen.setdefault((*key, "in"), []).append(args[0].numpy())
                seen.setdefault((*key, "out"), []).append(output.numpy())

            handles.append(model.get_submodule(prefix + role).register_forward_hook(note))
    with torch.no_grad():
        out = model(**inputs(model), output_attentions=True)
    for handle in handles:
        handle.remove()
    left = {kind: list(weights) for kind, weights in _weights(out).items()}
    traced = []
    for prefix, roles in found:
        passes = len(seen[prefix, roles[3], "out"])  # more than one where layers share tensors
        for i in range(passes):
            weights = left[_kind(prefix, roles[0], left)].pop(0).double().numpy()
            # the first of each pass: DeBERTa then projects its positions with the same modules
            met = [seen[prefix, role, "in"] for role in roles[:3]]
            read = [inputs[i * len(inputs) // passes] for inputs in met]
            queries, keys, values, outputs = (
                a.reshape(len(weights), -1, a.shape[-1]).astype(np.float64)
                for a in (*read, seen[prefix, roles[3], "out"][i])
            )
            traced.append(Call(prefix, roles, queries, keys, values, weights, outputs))
    assert not any(left.values())
    return traced


def _weights(out: Any) -> dict[str, Any]:
    if "encoder_attentions" in out:
        kinds = ("encoder", "decoder", "cross")
        return {kind: out[f"{kind}_attentions"] for kind in kinds}
    if "text_model_output" in out:
        return {n: out[f"{n}_output"].attentions for n in ("text_model", "vision_model")}
    return {"": out.attentions}


def _kind(prefix: str, query: str, kinds: dict[str, Any]) -> str:
    if "cross" in kinds and ("encoder_attn" in query or "EncDec" in query):
        return "cross"
    return next(kind for kind in kinds if kind in prefix)


def dense_encodings(model: Any) -> dict[str, Encoding]:
    """Of the model's own tensors."""
    return {name: Dense(tensor.detach().numpy()) for name, tensor in model.state_dict().items()}


def stored(call: Call, encodings: Any, family: Family, heads: int) -> dict[str, reference.Stored]:
    """The attention's matrices and biases in a checkpoint."""
    out = {}
    for i, (role, name) in enumerate(call.weight_names.items()):
        part = (i, 3) if family.fused and role != "output" else (0, 1)
        interleave = heads if family.fused and role != "output" else 1
        bias = name.removesuffix("weight") + "bias"
        for key, tensor in ((role, name), (f"{role}_bias", bias)):
            if tensor in encodings:
                out[key] = reference.Stored(encodings[tensor], *part, False, interleave)
    return out


def added(call: Call, own: dict[str, reference.Stored], shape: Any) -> Array:
    """What a model adds to the logits (masks, relative positions), up to a constant in each row:
    batch x heads x tokens x keys."""
    with np.errstate(divide="ignore"):
        return np.stack(
            [
                np.log(weights) - reference.scaled_logits(x, keys, own, *shape)
                for weights, x, keys in zip(call.weights, call.queries, call.keys, strict=True)
            ]
        )
