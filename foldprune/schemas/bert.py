"""BERT and what shares its names: RoBERTa, MiniLM, XLM-R, CamemBERT, ELECTRA."""

from .schema import Attention, FeedForward, Forbidden, Schema, Slot

BERT = Schema(
    name="bert",
    model_types=("bert", "roberta", "xlm-roberta", "camembert", "electra"),
    block=r"encoder\.layer\.(\d+)\.",
    attention=Attention(
        query=Slot("attention.self.query"),
        key=Slot("attention.self.key"),
        value=Slot("attention.self.value"),
        output=Slot("attention.output.dense"),
        norm_before="output.LayerNorm",
        norm_first="embeddings.LayerNorm",
    ),
    feed_forward=FeedForward(up=Slot("intermediate.dense"), down=Slot("output.dense")),
    requires=("attention.output.LayerNorm.weight", "output.LayerNorm.weight"),
    block_dense=(r"(attention\.)?output\.LayerNorm\.(weight|bias|gamma|beta)",),
    embeddings=(
        r"embeddings\.(word|position|token_type)_embeddings\.weight",
        r"cls\.predictions\.decoder\.weight",
        r"lm_head\.decoder\.weight",
        r"generator_lm_head\.weight",
    ),
    output_embeddings=(
        r"cls\.predictions\.decoder\.weight",
        r"lm_head\.decoder\.weight",
        r"generator_lm_head\.weight",
    ),
    dense=(
        r"embeddings\.LayerNorm\.(weight|bias|gamma|beta)",
        r"embeddings\.(position_ids|token_type_ids)",
        r"embeddings_project\.(weight|bias)",
        r"pooler\.dense\.(weight|bias)",
        r"cls\..*",
        r"lm_head\..*",
        r"(discriminator|generator)_predictions\..*",
        r"generator_lm_head\.bias",
        r"sequence_summary\.summary\.(weight|bias)",
        r"classifier\..*",
        r"qa_outputs\..*",
    ),
    forbidden=(
        Forbidden(
            r"attention\.self\.distance_embedding\.weight",
            ("irc",),
            "relative position embeddings meet the query and key themselves, not only their "
            "product",
        ),
    ),
    note="MiniLM too",
)
