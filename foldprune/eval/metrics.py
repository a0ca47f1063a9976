"""Perplexity, accuracy and macro F1, and means over seeds with their confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..encodings import Array
from ..errors import ModelError
from ..options import Progress, reporter

__all__ = ["Interval", "Perplexity", "Scores", "classification", "interval", "perplexity"]


# ---- language models ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Perplexity:
    """``loss``: mean negative log-likelihood in nats of the ``tokens`` that were scored;
    ``bits_per_byte``: None where the text's bytes are not known."""

    loss: float
    tokens: int
    bits_per_byte: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def perplexity(
    model: torch.nn.Module,
    tokens: torch.Tensor | Sequence[int],
    *,
    window: int = 512,
    stride: int | None = None,
    bytes: int | None = None,
    progress: Progress | bool | None = True,
) -> Perplexity:
    """Perplexity of one text by a sliding window.

    The model sees ``window`` tokens at a time; the next window begins ``stride`` tokens later, and
    of it only the tokens that no window has reached yet are scored. So every token is scored once,
    with at least window - stride tokens before it, but for those at the beginning. The first token
    of all is not scored, nor with stride = window the first of each window: nothing comes before
    it. The method is that of transformers' documentation, "Perplexity of fixed-length models".

    Parameters
    ----------
    model
        A causal language model: ``model(input_ids=...)`` gives ``logits`` (1 x tokens x
        vocabulary). It runs in eval mode and is left in the mode it was in.
    tokens
        Token ids, one dimension, at least 2.
    window, stride
        In tokens, 1 <= stride <= window; by default the stride is half a window.
    bytes
        Length of the text in bytes of UTF-8, for ``bits_per_byte``; tokens that are not scored
        count with the mean of the others.
    progress
        True for a bar on standard error, or a function called with (done, total, name).

    Raises
    ------
    ValueError
        Fewer than two tokens, or a window, stride or number of bytes that cannot be.
    TypeError
        Tokens that are not whole numbers.
    ModelError
        (ValueError) a loss that is not finite, or ids or positions that the model has not.
    """
    ids = _token_ids(tokens)
    stride = max(1, window // 2) if stride is None else stride
    if window < 2 or not 1 <= stride <= window:
        raise ValueError(
            f"window={window}, stride={stride}: expected window >= 2 and 1 <= stride <= window"
        )
    if bytes is not None and bytes < 1:
        raise ValueError(f"bytes={bytes}: expected the length of the text, at least 1")
    loss, scored, reached = 0.0, 0, 0
    training = model.training
    model.eval()
    try:
        with reporter(progress, "perplexity") as report:
            for begin in range(0, len(ids), stride):
                end = min(begin + window, len(ids))
                first = max(reached, begin + 1)
                if first < end:
                    loss += _loss(model, ids[begin:end], first - begin)
                    scored += end - first
                reached = end
                report(end, len(ids), "tokens")
                if end == len(ids):
                    break
    finally:
        model.train(training)
    mean = loss / scored
    bits = None if bytes is None else mean * len(ids) / bytes / math.log(2)
    return Perplexity(mean, scored, bits)


def _token_ids(tokens: torch.Tensor | Sequence[int]) -> torch.Tensor:
    ids = torch.as_tensor(tokens)
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"tokens: expected whole numbers, got {ids.dtype}")
    if ids.ndim != 1 or len(ids) < 2:
        raise ValueError(
            f"tokens of shape {tuple(ids.shape)}: expected one dimension and at least 2 tokens"
        )
    return ids


def _loss(model: torch.nn.Module, ids: torch.Tensor, first: int) -> float:
    """Summed over the tokens from the ``first`` on."""
    device = next((p.device for p in model.parameters()), ids.device)
    ids = ids.to(device)
    try:
        logits = model(input_ids=ids[None]).logits[0, first - 1 : -1].float()
    except IndexError as error:
        raise ModelError(
            f"{type(model).__name__} failed on a window of {len(ids)} tokens with ids from "
            f"{int(ids.min())} to {int(ids.max())}: {error}; has it so many positions, and are the "
            "ids those of its tokenizer?"
        ) from error
    losses = torch.nn.functional.cross_entropy(logits, ids[first:], reduction="none")
    total = float(losses.double().sum())
    if not math.isfinite(total):
        raise ModelError(f"{type(model).__name__}: the loss of a window is {total}")
    return total


# ---- classification -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Shares in [0, 1] of ``rows`` predictions."""

    accuracy: float
    macro_f1: float
    rows: int


def classification(labels: Any, predicted: Any, *, classes: int | None = None) -> Scores:
    """Accuracy and macro F1 of predicted classes.

    Macro F1 is the plain mean of the F1 of every class that occurs in ``labels`` or ``predicted``.

    Parameters
    ----------
    labels, predicted
        Classes from 0, (rows,) whole numbers.
    classes
        How many classes there are; by default that is not checked.

    Raises
    ------
    ValueError
        No rows, lengths that differ, labels outside [0, classes).
    TypeError
        Labels that are not whole numbers.
    """
    truth, guess = _classes("labels", labels, classes), _classes("predicted", predicted, classes)
    if truth.shape != guess.shape:
        raise ValueError(f"{len(truth)} labels and {len(guess)} predictions: expected as many")
    if not len(truth):
        raise ValueError("labels: the split is empty, there is nothing to score")
    hit = truth[truth == guess]
    size = int(max(truth.max(), guess.max())) + 1
    found, real, claimed = (np.bincount(x, minlength=size) for x in (hit, truth, guess))
    occurs = real + claimed > 0
    f1 = 2 * found[occurs] / (real + claimed)[occurs]
    return Scores(len(hit) / len(truth), float(f1.mean()), len(truth))


def _classes(name: str, values: Any, classes: int | None) -> Array:
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected whole numbers, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name} of shape {array.shape}: expected one dimension")
    wrong = array[(array < 0) | (array >= (math.inf if classes is None else classes))]
    if wrong.size:
        limit = "" if classes is None else f", with {classes} classes below {classes}"
        raise ValueError(f"{name}: {wrong[0]} is out of range: classes are counted from 0{limit}")
    return array.astype(np.int64)


# ---- seeds --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """Mean of ``count`` values, their spread (sample standard deviation; 0 of one value), and the
    confidence interval of the mean (without bounds for one value)."""

    mean: float
    spread: float
    low: float
    high: float
    count: int


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean of independent runs, such as seeds, and its confidence interval by Student's t
    distribution. ValueError without values, or for a level outside (0, 1)."""
    if not len(values):
        raise ValueError("values: there are none")
    if not 0 < level < 1:
        raise ValueError(f"level={level}: a confidence level lies in (0, 1)")
    array = np.asarray(values, np.float64)
    mean, count = float(array.mean()), len(array)
    if count == 1:
        return Interval(mean, 0.0, -math.inf, math.inf, 1)
    spread = float(array.std(ddof=1))
    half = _t_quantile((1 + level) / 2, count - 1) * spread / math.sqrt(count)
    return Interval(mean, spread, mean - half, mean + half, count)


def _t_quantile(probability: float, freedom: int) -> float:
    """Of Student's distribution, above the median. With t = sqrt(freedom) tan(a) the density is
    proportional to cos(a)^(freedom - 1), which Gauss and Legendre's rule integrates."""
    nodes, weights = np.polynomial.legendre.leggauss(128)

    def mass(angle: float) -> float:
        return float(weights @ np.cos(angle * (nodes + 1) / 2) ** (freedom - 1)) * angle / 2

    target = (2 * probability - 1) * mass(math.pi / 2)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mass(middle) < target else (low, middle)
    return math.sqrt(freedom) * math.tan(low)
