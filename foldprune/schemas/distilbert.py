"""DistilBERT."""

from .schema import Attention, FeedForward, Schema, Slot

DISTILBERT = Schema(
    name="distilbert",
    model_types=("distilbert",),
    block=r"transformer\.layer\.(\d+)\.",
    attention=Attention(
        query=Slot("attention.q_lin"),
        key=Slot("attention.k_lin"),
        value=Slot("attention.v_lin"),
        output=Slot("attention.out_lin"),
        norm_before="output_layer_norm",
        norm_first="embeddings.LayerNorm",
    ),
    feed_forward=FeedForward(up=Slot("ffn.lin1"), down=Slot("ffn.lin2")),
    requires=("sa_layer_norm.weight", "output_layer_norm.weight"),
    block_dense=(r"(sa|output)_layer_norm\.(weight|bias)",),
    embeddings=(r"embeddings\.(word|position)_embeddings\.weight", r"vocab_projector\.weight"),
    output_embeddings=(r"vocab_projector\.weight",),
    dense=(
        r"embeddings\.LayerNorm\.(weight|bias)",
        r"embeddings\.position_ids",
        r"vocab_(transform|layer_norm)\.(weight|bias)",
        r"vocab_projector\.bias",
        r"(pre_)?classifier\.(weight|bias)",
        r"qa_outputs\.(weight|bias)",
    ),
)
