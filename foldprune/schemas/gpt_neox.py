"""GPT-NeoX and Pythia: fused head by head; a part of each head's rows rotates."""

from .schema import Attention, FeedForward, Refusal, Schema, Slot

_FUSED = "attention.query_key_value"

GPT_NEOX = Schema(
    name="gpt_neox",
    model_types=("gpt_neox",),
    block=r"layers\.(\d+)\.",
    attention=Attention(
        query=Slot(_FUSED, part=0, parts=3, interleaved=True),
        key=Slot(_FUSED, part=1, parts=3, interleaved=True),
        value=Slot(_FUSED, part=2, parts=3, interleaved=True),
        output=Slot("attention.dense"),
        rope="half",
        norm="input_layernorm",
    ),
    feed_forward=FeedForward(up=Slot("mlp.dense_h_to_4h"), down=Slot("mlp.dense_4h_to_h")),
    requires=("input_layernorm.weight", "post_attention_layernorm.weight"),
    block_dense=(
        r"(input|post_attention)_layernorm\.(weight|bias)",
        r"attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    ),
    embeddings=(r"embed_in\.weight", r"embed_out\.weight", r"lm_head\.weight"),
    output_embeddings=(r"embed_out\.weight", r"lm_head\.weight"),
    dense=(
        r"final_layer_norm\.(weight|bias)",
        r"rotary_emb\.(original_)?inv_freq",
        r"(score|classifier|qa_outputs)\.(weight|bias)",
    ),
    refuses=(
        Refusal(
            ("partial_rotary_factor", "rotary_pct"),
            fine=1.0,
            default=0.25,
            methods=("irc",),
            reason="only part of each head rotates",
        ),
    ),
    note="fused head by head",
)
