"""torch.nn's own modules: the layers of TransformerEncoder and TransformerDecoder, and
MultiheadAttention by itself, whose key and value may have widths of their own.

A zero that is attended to (``add_zero_attn``) leaves no trace in a state dict: pass the module
itself, or config={"add_zero_attn": True}.
"""

from .schema import Attention, FeedForward, Forbidden, Refusal, Schema, Slot


def _fused(name: str) -> tuple[Slot, Slot, Slot, Slot]:
    """One in_proj_weight for query, key and value; the output."""
    query, key, value = (Slot(f"{name}in_proj", part=i, parts=3, joint="_") for i in range(3))
    return query, key, value, Slot(f"{name}out_proj")


def _separate() -> tuple[Slot, Slot, Slot, Slot]:
    """Weights apart, which differ in width; their biases are fused all the same."""
    *biases, output = _fused("")
    query, key, value = (
        Slot(f"{role}_proj", joint="_", bias=bias) for role, bias in zip("qkv", biases, strict=True)
    )
    return query, key, value, output


_REFUSES = (
    Refusal(
        ("add_zero_attn",),
        fine=False,
        default=False,
        methods=("irc", "dwc"),
        reason="a key and value of zeros, without bias, is attended to",
    ),
)
TRANSFORMER = Schema(
    name="torch.nn.Transformer",
    model_types=(),
    block=r"layers\.(\d+)\.",
    attention=(
        Attention(*_fused("self_attn.")),
        Attention(*_fused("multihead_attn."), cross="multihead_attn"),
    ),
    feed_forward=FeedForward(up=Slot("linear1"), down=Slot("linear2")),
    requires=("norm1.weight", "norm2.weight"),
    block_dense=(r"norm[123]\.(weight|bias)",),
    dense=(r"norm\.(weight|bias)",),
    refuses=_REFUSES,
    note="TransformerEncoder, TransformerDecoder, Transformer",
)
MULTIHEAD_ATTENTION = Schema(
    name="torch.nn.MultiheadAttention",
    model_types=(),
    # tensors that are all of one module, anywhere
    block=r"(?=(?:in_proj_|[qkv]_proj_weight|bias_[kv]$|out_proj\.(?:weight|bias)$))",
    attention=(Attention(*_fused(""), cross=""), Attention(*_separate(), cross="")),
    feed_forward=None,
    forbidden=(
        Forbidden(
            r"bias_[kv]",
            ("irc", "dwc"),
            "a learned key and value (add_bias_kv) is attended to beside the projected ones",
        ),
    ),
    refuses=_REFUSES,
    note="key and value of their own widths (kdim, vdim) too",
)
