"""BART and what shares its names: encoder and decoder, the decoder with cross-attention. BART
normalises after each sublayer, mBART before it."""

from dataclasses import replace

from .schema import Attention, FeedForward, Schema, Slot

_SELF = Attention(
    query=Slot("self_attn.q_proj"),
    key=Slot("self_attn.k_proj"),
    value=Slot("self_attn.v_proj"),
    output=Slot("self_attn.out_proj"),
    norm_before="final_layer_norm",
    norm_first="layernorm_embedding",
)
_CROSS = Attention(
    query=Slot("encoder_attn.q_proj"),
    key=Slot("encoder_attn.k_proj"),
    value=Slot("encoder_attn.v_proj"),
    output=Slot("encoder_attn.out_proj"),
    cross="encoder_attn",
    norm="self_attn_layer_norm",
)
BART = Schema(
    name="bart",
    model_types=("bart",),
    block=r"layers\.(\d+)\.",
    attention=(_SELF, _CROSS),
    feed_forward=FeedForward(up=Slot("fc1"), down=Slot("fc2")),
    requires=("self_attn_layer_norm.weight", "final_layer_norm.weight"),
    block_dense=(r"(self_attn|encoder_attn|final)_layer_norm\.(weight|bias)",),
    embeddings=(r"shared\.weight", r"embed_tokens\.weight", r"lm_head\.weight"),
    output_embeddings=(r"lm_head\.weight",),
    shared_embedding=r"shared\.weight",
    dense=(
        r"embed_positions\.weight",
        r"layernorm_embedding\.(weight|bias)",
        r"final_logits_bias",
        r"classification_head\..*",
        r"qa_outputs\.(weight|bias)",
    ),
    heads={
        r"(^|\.)encoder\.$": "encoder_attention_heads",
        r"(^|\.)decoder\.$": "decoder_attention_heads",
    },
    note="cross-attention too; learned positions stay dense",
)
MBART = replace(
    BART,
    name="mbart",
    model_types=("mbart",),
    attention=(
        replace(_SELF, norm="self_attn_layer_norm", norm_before=None, norm_first=None),
        replace(_CROSS, norm="encoder_attn_layer_norm", norm_cross="encoder.layer_norm"),
    ),
    dense=(*BART.dense, r"layer_norm\.(weight|bias)"),
)
