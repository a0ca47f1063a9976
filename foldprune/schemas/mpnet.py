"""MPNet: one table of relative position biases, added to the logits of every block."""

from .schema import Attention, FeedForward, Schema, Slot

MPNET = Schema(
    name="mpnet",
    model_types=("mpnet",),
    block=r"encoder\.layer\.(\d+)\.",
    attention=Attention(
        query=Slot("attention.attn.q"),
        key=Slot("attention.attn.k"),
        value=Slot("attention.attn.v"),
        output=Slot("attention.attn.o"),
        norm_before="output.LayerNorm",
        norm_first="embeddings.LayerNorm",
    ),
    feed_forward=FeedForward(up=Slot("intermediate.dense"), down=Slot("output.dense")),
    requires=("attention.LayerNorm.weight", "output.LayerNorm.weight"),
    block_dense=(r"(attention|output)\.LayerNorm\.(weight|bias)",),
    embeddings=(r"embeddings\.(word|position)_embeddings\.weight", r"lm_head\.decoder\.weight"),
    output_embeddings=(r"lm_head\.decoder\.weight",),
    dense=(
        r"embeddings\.LayerNorm\.(weight|bias)",
        r"embeddings\.position_ids",
        r"encoder\.relative_attention_bias\.weight",
        r"pooler\.dense\.(weight|bias)",
        r"lm_head\..*",
        r"classifier\..*",
        r"qa_outputs\..*",
    ),
    note="relative biases are added to the logits",
)
