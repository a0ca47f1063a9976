"""LLaMA and what shares its names and rotary embedding: Mistral, Qwen2 and Qwen3, SmolLM."""

from .schema import Attention, FeedForward, Forbidden, Refusal, Schema, Slot

LLAMA = Schema(
    name="llama",
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    block=r"layers\.(\d+)\.",
    attention=Attention(
        query=Slot("self_attn.q_proj"),
        key=Slot("self_attn.k_proj"),
        value=Slot("self_attn.v_proj"),
        output=Slot("self_attn.o_proj"),
        rope="half",
        norm="input_layernorm",
    ),
    feed_forward=FeedForward(
        gate=Slot("mlp.gate_proj"), up=Slot("mlp.up_proj"), down=Slot("mlp.down_proj")
    ),
    requires=("input_layernorm.weight", "post_attention_layernorm.weight"),
    block_dense=(
        r"(input|post_attention)_layernorm\.weight",
        r"self_attn\.rotary_emb\.inv_freq",
    ),
    embeddings=(r"embed_tokens\.weight", r"lm_head\.weight"),
    output_embeddings=(r"lm_head\.weight",),
    shared_embedding=r"embed_tokens\.weight",
    dense=(
        r"norm\.weight",
        r"rotary_emb\.(original_)?inv_freq",
        r"(score|classifier|qa_outputs)\..*",
    ),
    forbidden=(
        Forbidden(
            r"self_attn\.[qk]_norm\.weight",
            ("irc",),
            "query and key are normalised before they meet, so their product is not bilinear",
        ),
    ),
    refuses=(
        Refusal(("partial_rotary_factor",), 1.0, 1.0, ("irc",), "only part of each head rotates"),
    ),
    note="SmolLM, SmolLM2, TinyLlama too; slice without grouped queries",
)
