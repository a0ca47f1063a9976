"""GPT-Neo: logits without 1/sqrt(head size); local and global attention differ in their masks."""

from .schema import Attention, FeedForward, Schema, Slot

GPT_NEO = Schema(
    name="gpt_neo",
    model_types=("gpt_neo",),
    block=r"h\.(\d+)\.",
    attention=Attention(
        query=Slot("attn.attention.q_proj"),
        key=Slot("attn.attention.k_proj"),
        value=Slot("attn.attention.v_proj"),
        output=Slot("attn.attention.out_proj"),
        scaled=False,
        norm="ln_1",
    ),
    feed_forward=FeedForward(up=Slot("mlp.c_fc"), down=Slot("mlp.c_proj")),
    requires=("ln_1.weight", "ln_2.weight"),
    block_dense=(r"ln_[12]\.(weight|bias)", r"attn\.attention\.(bias|masked_bias)"),
    embeddings=(r"wte\.weight", r"wpe\.weight", r"lm_head\.weight"),
    output_embeddings=(r"lm_head\.weight",),
    shared_embedding=r"wte\.weight",
    dense=(r"ln_f\.(weight|bias)", r"(score|classifier|qa_outputs)\..*"),
    note="logits are not scaled",
)
