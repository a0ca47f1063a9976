"""Batches of calibration data: a model's arguments, and which of their positions are tokens."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import FoldpruneError, ModelError, TensorError

__all__ = ["Batch", "Stream", "naming"]

# keys and values of cross-attention: in the decoder, but what they read is the encoder's
_CROSS = re.compile(
    r"(encoder_attn|EncDecAttention|cross_?attn|crossattention)\.(self\.)?(k|v|k_proj|v_proj|key|value)$"
)


@contextmanager
def naming(index: int) -> Iterator[None]:
    """Errors that name the batch."""
    try:
        yield
    except FoldpruneError as error:
        raise type(error)(f"batch {index}: {error}") from None
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelError(
            f"batch {index}: the model failed on it: {type(error).__name__}: {error}"
        ) from error


@dataclass(frozen=True)
class Stream:
    """Token positions of a batch, and which of them are not padding."""

    shape: tuple[int, ...]
    mask: torch.Tensor | None


class Batch:
    """A batch as the model's arguments, on its device."""

    def __init__(self, model: torch.nn.Module, value: Any, index: int) -> None:
        self.model, self.index = model, index
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if isinstance(value, Mapping):
            self.value: Any = {name: _moved(item, device) for name, item in value.items()}
        elif isinstance(value, (tuple, list)) and any(isinstance(x, torch.Tensor) for x in value):
            self.value = tuple(_moved(item, device) for item in value)
        elif isinstance(value, torch.Tensor):
            self.value = _moved(value, device)
        else:
            raise TypeError(
                f"batch {index}: expected a mapping of arguments, a tuple of tensors or a tensor, "
                f"got {type(value).__name__}"
            )
        args, kwargs = self.arguments
        signature = inspect.signature(model.forward)
        try:
            bound = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise ModelError(
                f"batch {index}: {type(model).__name__}.forward does not take it: {error}"
            ) from None
        self.named: dict[str, Any] = {**bound, **kwargs}  # positional ones by their names too
        with naming(index):
            self.main = self._stream("attention_mask", ("input_ids", "inputs_embeds"))
            self.decoder = self._stream(
                "decoder_attention_mask", ("decoder_input_ids", "decoder_inputs_embeds")
            )
        labels = self.named.get("labels")
        config = getattr(model, "config", None)
        if (
            self.decoder is None
            and getattr(config, "is_encoder_decoder", False)
            and isinstance(labels, torch.Tensor)
        ):
            self.decoder = Stream(tuple(labels.shape), labels != -100)

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(self.value, dict):
            return (), self.value
        return (self.value if isinstance(self.value, tuple) else (self.value,)), {}

    def _stream(self, mask_name: str, inputs: Iterable[str]) -> Stream | None:
        """The mask's positions, or without a mask the inputs'; None if the batch has neither."""
        values = [self.named.get(name) for name in inputs]
        shape = next((tuple(v.shape[:2]) for v in values if isinstance(v, torch.Tensor)), None)
        mask = self.named.get(mask_name)
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            return Stream(shape, None) if shape else None
        if shape not in (None, tuple(mask.shape)):
            raise TensorError(f"{mask_name} is of shape {tuple(mask.shape)}, the tokens of {shape}")
        if not ((mask == 0) | (mask == 1)).all():
            raise TensorError(f"{mask_name}: expected 1 for tokens and 0 for padding")
        return Stream(tuple(mask.shape), mask.bool())

    def tokens(self, name: str, shape: Sequence[int]) -> Stream:
        """How a layer's rows of that leading shape, which may be flattened, are tokens."""
        streams = [self.main, self.decoder]
        if re.search(r"(^|\.)decoder\.", name) and not _CROSS.search(name):
            streams.reverse()
        for stream in streams:
            if stream and tuple(shape) in (stream.shape, (math.prod(stream.shape),)):
                return stream
        return Stream(tuple(shape), None)

    def sequences(self, most: int) -> list[Batch]:
        """Batches of one sequence each, at most that many."""
        args, kwargs = self.arguments
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.ndim]
        size = self.main.shape[0] if self.main else len(tensors[0]) if tensors else 1

        def one(item: Any, i: int) -> Any:
            fits = isinstance(item, torch.Tensor) and item.ndim and len(item) == size
            return item[i : i + 1] if fits else item

        parts: list[Batch] = []
        for i in range(min(most, size)):
            if isinstance(self.value, dict):
                part: Any = {name: one(item, i) for name, item in self.value.items()}
            elif isinstance(self.value, tuple):
                part = tuple(one(item, i) for item in self.value)
            else:
                part = one(self.value, i)
            parts.append(Batch(self.model, part, self.index))
        return parts


def _moved(item: Any, device: torch.device) -> Any:
    if not isinstance(item, torch.Tensor):
        return item
    return (item.clone() if item.is_inference() else item.detach()).to(device)
