"""CLIP: two transformers in one model, of different widths and heads."""

from .schema import Attention, FeedForward, Schema, Slot

CLIP = Schema(
    name="clip",
    model_types=("clip", "clip_text_model", "clip_vision_model"),
    block=r"layers\.(\d+)\.",
    attention=Attention(
        query=Slot("self_attn.q_proj"),
        key=Slot("self_attn.k_proj"),
        value=Slot("self_attn.v_proj"),
        output=Slot("self_attn.out_proj"),
        norm="layer_norm1",
    ),
    feed_forward=FeedForward(up=Slot("mlp.fc1"), down=Slot("mlp.fc2")),
    requires=("layer_norm1.weight", "layer_norm2.weight"),
    block_dense=(r"layer_norm[12]\.(weight|bias)",),
    embeddings=(r"embeddings\.(token|position)_embedding\.weight",),
    dense=(
        r"embeddings\.(class_embedding|position_ids)",
        r"embeddings\.patch_embedding\.weight",
        # as it is spelled
        r"pre_layrnorm\.(weight|bias)",
        r"(final_layer_norm|post_layernorm)\.(weight|bias)",
        r"(visual|text)_projection\.weight",
        r"logit_scale",
        r"classifier\.(weight|bias)",
    ),
    heads={
        r"(^|\.)text_model\.": "text_config.num_attention_heads",
        r"(^|\.)vision_model\.": "vision_config.num_attention_heads",
    },
    note="both towers, each with its own heads",
)
