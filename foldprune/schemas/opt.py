"""OPT: separate query, key and value with biases, learned positions."""

from .schema import Attention, FeedForward, Schema, Slot

OPT = Schema(
    name="opt",
    model_types=("opt",),
    block=r"layers\.(\d+)\.",
    attention=Attention(
        query=Slot("self_attn.q_proj"),
        key=Slot("self_attn.k_proj"),
        value=Slot("self_attn.v_proj"),
        output=Slot("self_attn.out_proj"),
        norm="self_attn_layer_norm",
    ),
    feed_forward=FeedForward(up=Slot("fc1"), down=Slot("fc2")),
    requires=("self_attn_layer_norm.weight", "final_layer_norm.weight"),
    block_dense=(r"(self_attn|final)_layer_norm\.(weight|bias)",),
    embeddings=(r"embed_tokens\.weight", r"lm_head\.weight"),
    output_embeddings=(r"lm_head\.weight",),
    shared_embedding=r"embed_tokens\.weight",
    dense=(
        r"final_layer_norm\.(weight|bias)",
        r"embed_positions\.weight",
        r"project_(in|out)\.weight",
        r"(score|classifier|qa_outputs)\..*",
    ),
    note="learned positions stay dense",
)
