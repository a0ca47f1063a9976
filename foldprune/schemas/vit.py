"""ViT under the names of its checkpoints, and under those that transformers 5 has in memory."""

from dataclasses import replace

from .schema import Attention, FeedForward, Schema, Slot

VIT = Schema(
    name="vit",
    model_types=("vit",),
    block=r"encoder\.layer\.(\d+)\.",
    attention=Attention(
        query=Slot("attention.attention.query"),
        key=Slot("attention.attention.key"),
        value=Slot("attention.attention.value"),
        output=Slot("attention.output.dense"),
        norm="layernorm_before",
    ),
    feed_forward=FeedForward(up=Slot("intermediate.dense"), down=Slot("output.dense")),
    requires=("layernorm_before.weight", "layernorm_after.weight"),
    block_dense=(r"layernorm_(before|after)\.(weight|bias)",),
    dense=(
        r"embeddings\.(cls_token|mask_token|position_embeddings)",
        r"embeddings\.patch_embeddings\.projection\.(weight|bias)",
        r"layernorm\.(weight|bias)",
        r"pooler\.dense\.(weight|bias)",
        r"classifier\.(weight|bias)",
        r"decoder\.0\.(weight|bias)",
    ),
    note="by the names of checkpoints",
)
VIT_IN_MEMORY = replace(
    VIT,
    block=r"layers\.(\d+)\.",
    attention=Attention(
        query=Slot("attention.q_proj"),
        key=Slot("attention.k_proj"),
        value=Slot("attention.v_proj"),
        output=Slot("attention.o_proj"),
        norm="layernorm_before",
    ),
    feed_forward=FeedForward(up=Slot("mlp.fc1"), down=Slot("mlp.fc2")),
    note="by the names that transformers 5 has in memory",
)
