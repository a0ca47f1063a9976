"""ALBERT: the blocks' tensors are used by several layers, and folded once."""

from .schema import Attention, FeedForward, Schema, Slot

ALBERT = Schema(
    name="albert",
    model_types=("albert",),
    block=r"albert_layer_groups\.(\d+)\.albert_layers\.\d+\.",
    attention=Attention(
        query=Slot("attention.query"),
        key=Slot("attention.key"),
        value=Slot("attention.value"),
        output=Slot("attention.dense"),
        # what all but the first of the layers that share the block read
        norm="full_layer_layer_norm",
    ),
    feed_forward=FeedForward(up=Slot("ffn"), down=Slot("ffn_output")),
    requires=("full_layer_layer_norm.weight", "attention.LayerNorm.weight"),
    block_dense=(r"(full_layer_layer_norm|attention\.LayerNorm)\.(weight|bias)",),
    embeddings=(
        r"embeddings\.(word|position|token_type)_embeddings\.weight",
        r"predictions\.decoder\.weight",
    ),
    output_embeddings=(r"predictions\.decoder\.weight",),
    dense=(
        r"embeddings\.LayerNorm\.(weight|bias)",
        r"embeddings\.(position_ids|token_type_ids)",
        r"embedding_hidden_mapping_in\.(weight|bias)",
        r"pooler\.(weight|bias)",
        r"predictions\.(bias|decoder\.bias|(LayerNorm|dense)\.(weight|bias))",
        r"(classifier|qa_outputs|sop_classifier\.classifier)\.(weight|bias)",
    ),
    note="layers share their tensors: folded once",
)
