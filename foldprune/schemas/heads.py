"""Head sizes of well-known shapes, for a state dict that comes without its configuration."""

from __future__ import annotations

__all__ = ["ASSUMED_HEAD_DIM", "known_head_dim"]

ASSUMED_HEAD_DIM = 64

# (family, hidden size, query rows, key rows, feed-forward size) -> head size. Only shapes whose
# public models all agree stand here.
_KNOWN = {
    # MiniLM-L6/L12-H384 and the sentence encoders built on them
    ("bert", 384, 384, 384, 1536): 32,
    # BERT miniatures, base and large; RoBERTa, XLM-R
    ("bert", 128, 128, 128, 512): 64,
    ("bert", 256, 256, 256, 1024): 64,
    ("bert", 512, 512, 512, 2048): 64,
    ("bert", 768, 768, 768, 3072): 64,
    ("bert", 1024, 1024, 1024, 4096): 64,
    # TinyBERT-4L-312D
    ("bert", 312, 312, 312, 1200): 26,
    # GPT-2 small to XL
    ("gpt2", 768, 768, 768, 3072): 64,
    ("gpt2", 1024, 1024, 1024, 4096): 64,
    ("gpt2", 1280, 1280, 1280, 5120): 64,
    ("gpt2", 1600, 1600, 1600, 6400): 64,
    # OPT 125M, 1.3B, 2.7B, 6.7B
    ("opt", 768, 768, 768, 3072): 64,
    ("opt", 2048, 2048, 2048, 8192): 64,
    ("opt", 2560, 2560, 2560, 10240): 80,
    ("opt", 4096, 4096, 4096, 16384): 128,
    # SmolLM and SmolLM2 135M, 360M, 1.7B
    ("llama", 576, 576, 192, 1536): 64,
    ("llama", 960, 960, 320, 2560): 64,
    ("llama", 2048, 2048, 2048, 8192): 64,
    # TinyLlama 1.1B; Llama 3.2 1B and 3B
    ("llama", 2048, 2048, 256, 5632): 64,
    ("llama", 2048, 2048, 512, 8192): 64,
    ("llama", 3072, 3072, 1024, 8192): 128,
    # Llama 7B, 13B, 65B; Llama 2 70B; Mistral 7B and Llama 3 8B; Llama 3 70B
    ("llama", 4096, 4096, 4096, 11008): 128,
    ("llama", 5120, 5120, 5120, 13824): 128,
    ("llama", 8192, 8192, 8192, 22016): 128,
    ("llama", 8192, 8192, 1024, 28672): 128,
    ("llama", 4096, 4096, 1024, 14336): 128,
    # Qwen2 and Qwen2.5 0.5B, 1.5B, 3B, 7B, 14B
    ("llama", 896, 896, 128, 4864): 64,
    ("llama", 1536, 1536, 256, 8960): 128,
    ("llama", 2048, 2048, 256, 11008): 128,
    ("llama", 3584, 3584, 512, 18944): 128,
    ("llama", 5120, 5120, 1024, 13824): 128,
}


def known_head_dim(
    family: str, hidden: int, query_rows: int, key_rows: int, feed_forward: int
) -> int | None:
    """Head size of a known shape, or None."""
    return _KNOWN.get((family, hidden, query_rows, key_rows, feed_forward))
