"""GPT-2: query, key and value fused in one transposed (Conv1D) matrix."""

from .schema import Attention, FeedForward, Schema, Slot

_FUSED = "attn.c_attn"

GPT2 = Schema(
    name="gpt2",
    model_types=("gpt2",),
    block=r"h\.(\d+)\.",
    attention=Attention(
        query=Slot(_FUSED, part=0, parts=3, transposed=True),
        key=Slot(_FUSED, part=1, parts=3, transposed=True),
        value=Slot(_FUSED, part=2, parts=3, transposed=True),
        output=Slot("attn.c_proj", transposed=True),
        norm="ln_1",
    ),
    feed_forward=FeedForward(
        up=Slot("mlp.c_fc", transposed=True), down=Slot("mlp.c_proj", transposed=True)
    ),
    requires=("ln_1.weight", "ln_2.weight"),
    block_dense=(r"ln_[12]\.(weight|bias)", r"attn\.(bias|masked_bias)"),
    embeddings=(r"wte\.weight", r"wpe\.weight", r"lm_head\.weight"),
    output_embeddings=(r"lm_head\.weight",),
    shared_embedding=r"wte\.weight",
    dense=(r"ln_f\.(weight|bias)", r"(score|classifier|qa_outputs)\..*"),
    note="fused, transposed c_attn",
)
