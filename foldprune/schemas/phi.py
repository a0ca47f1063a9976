"""Phi (1, 1.5 and 2): a part of each head's rows rotates."""

from .schema import Attention, FeedForward, Forbidden, Refusal, Schema, Slot

PHI = Schema(
    name="phi",
    model_types=("phi",),
    block=r"layers\.(\d+)\.",
    attention=Attention(
        query=Slot("self_attn.q_proj"),
        key=Slot("self_attn.k_proj"),
        value=Slot("self_attn.v_proj"),
        output=Slot("self_attn.dense"),
        rope="half",
        norm="input_layernorm",
    ),
    feed_forward=FeedForward(up=Slot("mlp.fc1"), down=Slot("mlp.fc2")),
    requires=("input_layernorm.weight", "self_attn.dense.weight"),
    block_dense=(
        r"input_layernorm\.(weight|bias)",
        r"self_attn\.rotary_emb\.inv_freq",
    ),
    embeddings=(r"embed_tokens\.weight", r"lm_head\.weight"),
    output_embeddings=(r"lm_head\.weight",),
    dense=(
        r"final_layernorm\.(weight|bias)",
        r"lm_head\.bias",
        r"rotary_emb\.(original_)?inv_freq",
        r"(score|classifier)\.(weight|bias)",
    ),
    forbidden=(
        Forbidden(
            r"self_attn\.[qk]_layernorm\.(weight|bias)",
            ("irc",),
            "query and key are normalised before they meet, so their product is not bilinear",
        ),
    ),
    refuses=(
        Refusal(
            ("partial_rotary_factor",),
            fine=1.0,
            default=0.5,
            methods=("irc",),
            reason="only part of each head rotates",
        ),
    ),
)
