"""DeBERTa v2 and v3: query and key meet relative positions too, so that they do not fold."""

from .schema import Attention, FeedForward, Forbidden, Schema, Slot

_DISENTANGLED = (
    "disentangled attention: query and key meet relative position embeddings themselves, not only "
    "each other"
)
DEBERTA_V2 = Schema(
    name="deberta-v2",
    model_types=("deberta-v2",),
    block=r"encoder\.layer\.(\d+)\.",
    attention=Attention(
        query=Slot("attention.self.query_proj"),
        key=Slot("attention.self.key_proj"),
        value=Slot("attention.self.value_proj"),
        output=Slot("attention.output.dense"),
        norm_before="output.LayerNorm",
        norm_first="embeddings.LayerNorm",
    ),
    feed_forward=FeedForward(up=Slot("intermediate.dense"), down=Slot("output.dense")),
    requires=("attention.output.LayerNorm.weight", "output.LayerNorm.weight"),
    block_dense=(r"(attention\.)?output\.LayerNorm\.(weight|bias)",),
    embeddings=(
        r"embeddings\.(word|position|token_type)_embeddings\.weight",
        r"predictions\.decoder\.weight",
    ),
    output_embeddings=(r"predictions\.decoder\.weight",),
    dense=(
        r"embeddings\.LayerNorm\.(weight|bias)",
        r"embeddings\.embed_proj\.weight",
        r"embeddings\.position_ids",
        r"encoder\.LayerNorm\.(weight|bias)",
        r"encoder\.conv\.(conv|LayerNorm)\.(weight|bias)",
        r"pooler\.dense\.(weight|bias)",
        r"(cls|lm_predictions|mask_predictions)\..*",
        r"(classifier|qa_outputs)\.(weight|bias)",
    ),
    forbidden=(
        Forbidden(r"encoder\.rel_embeddings\.weight", ("irc",), _DISENTANGLED),
        Forbidden(r"attention\.self\.pos_(key|query)_proj\.(weight|bias)", ("irc",), _DISENTANGLED),
    ),
)
