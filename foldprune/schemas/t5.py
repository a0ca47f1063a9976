"""T5: no biases, logits without 1/sqrt(head size), relative position biases added to them."""

from .schema import Attention, FeedForward, Schema, Slot


def _attention(name: str) -> tuple[Slot, Slot, Slot, Slot]:
    query, key, value, output = (Slot(f"{name}.{letter}") for letter in "qkvo")
    return query, key, value, output


def _feed_forwards(name: str) -> tuple[FeedForward, FeedForward]:
    """As it is in T5, and with a gate, as in T5 v1.1, mT5 and FLAN-T5."""
    up, gate, down = (Slot(f"{name}.DenseReluDense.{part}") for part in ("wi", "wi_0", "wo"))
    return (
        FeedForward(up, down),
        FeedForward(up=Slot(f"{name}.DenseReluDense.wi_1"), down=down, gate=gate),
    )


T5 = Schema(
    name="t5",
    model_types=("t5", "mt5", "umt5"),
    block=r"block\.(\d+)\.",
    attention=(
        Attention(*_attention("layer.0.SelfAttention"), scaled=False, norm="layer.0.layer_norm"),
        Attention(
            *_attention("layer.1.EncDecAttention"),
            scaled=False,
            cross="layer.1.EncDecAttention",
            norm="layer.1.layer_norm",
            norm_cross="encoder.final_layer_norm",
        ),
    ),
    # an encoder's block has no cross-attention before it
    feed_forward=(*_feed_forwards("layer.1"), *_feed_forwards("layer.2")),
    requires=("layer.0.layer_norm.weight", "layer.1.layer_norm.weight"),
    block_dense=(
        r"layer\.[012]\.layer_norm\.weight",
        r"layer\.[01]\.(SelfAttention|EncDecAttention)\.relative_attention_bias\.weight",
    ),
    embeddings=(r"shared\.weight", r"embed_tokens\.weight", r"lm_head\.weight"),
    output_embeddings=(r"lm_head\.weight",),
    shared_embedding=r"shared\.weight",
    dense=(
        r"final_layer_norm\.weight",
        r"classification_head\..*",
        r"classifier\.(weight|bias)",
        r"qa_outputs\.(weight|bias)",
    ),
    note="cross-attention too; logits are not scaled, relative biases are added to them",
)
