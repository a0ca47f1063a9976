"""Whisper: mBART's blocks with a key that has no bias, on convolved audio."""

from dataclasses import replace

from .bart import MBART

WHISPER = replace(
    MBART,
    name="whisper",
    model_types=("whisper",),
    embeddings=(r"embed_tokens\.weight", r"proj_out\.weight"),
    output_embeddings=(r"proj_out\.weight",),
    shared_embedding=r"embed_tokens\.weight",
    dense=(
        r"conv[12]\.(weight|bias)",
        r"embed_positions\.weight",
        r"layer_norm\.(weight|bias)",
        r"projector\.(weight|bias)",
        r"classifier\.(weight|bias)",
    ),
    note="cross-attention too; the key has no bias, positions stay dense",
)
