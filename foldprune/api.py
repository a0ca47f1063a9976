"""``compress``, the way in. What it does is in job.py."""

from __future__ import annotations

import numbers
from typing import Any

from . import calibrated, uncalibrated
from .calibration import Calibration
from .compressed import Compressed
from .job import Job
from .options import Progress, reporter, resolve_threads
from .recipe import Recipe

__all__ = [
    "DEFAULT_RATE",
    "check_arguments",
    "check_calibration",
    "compress",
    "note_unused_rate",
]

DEFAULT_RATE = 0.3


def compress(
    state_dict: Any,
    rate: float = DEFAULT_RATE,
    *,
    recipe: Recipe | None = None,
    config: Any = None,
    num_heads: int | None = None,
    calibration: Calibration | None = None,
    progress: Progress | bool | None = None,
    threads: int | None = None,
) -> Compressed:
    """Compresses a transformer checkpoint, without data or with a calibration's statistics.

    Parameters
    ----------
    state_dict
        A mapping of names to NumPy arrays or torch tensors (float32, float64, float16, bfloat16;
        other dtypes pass through), a torch module or Hugging Face model, or a path:
        ``.safetensors``, a sharded index, a folder with config.json, a torch ``.pt``/``.bin``
        (read with weights_only). It is not modified, and the result shares no memory with it.
    rate
        The share of all the model's numbers to remove, in [0, 1). It is spread over the methods by
        least estimated relative output error per number removed, and reached within 0.5 points. 0
        removes only what the model cannot see (the lossless level).
    recipe
        Sets every method by hand instead; ``rate`` is then not used.
    config
        The model's configuration, for its heads: a mapping, a Hugging Face config, or a path. By
        default the model's own, that of the models inside a module if they agree, or the
        config.json beside a file.
    num_heads
        Number of query heads, where there is no configuration. Without either, known shapes are
        recognised; else the head size is assumed to be 64 with a ``HeadSizeWarning``.
    calibration
        Statistics of the layers' inputs on data like the user's (see ``Calibration`` and
        ``foldprune.torch.calibrate``): masks, folds and the spread of a rate go by what the model's
        output loses on them, and kept weights are refitted. ``foldprune.torch.compress`` goes one
        step further and calibrates each block on what the compressed ones before it put out.
    progress
        True for a bar on standard error, or a function called with (done, total, name).
    threads
        Number of threads; by default as many as processors. The result does not depend on it.

    Returns
    -------
    Compressed

    Raises
    ------
    TensorError, TensorTypeError
        (ValueError, TypeError) a tensor that cannot be compressed: NaN or Inf in any floating
        tensor, complex, object or integer weights, shapes that disagree.
    ModelError
        (ValueError) an unknown or incomplete architecture, or heads that do not divide it.
    RateError
        (ValueError) the rate cannot be reached; says the largest that can.
    """
    check_calibration(calibration)
    given = recipe
    recipe, rate = check_arguments(rate, recipe)
    with reporter(progress) as report:
        job = Job.begin(state_dict, recipe, config, num_heads, report, resolve_threads(threads))
        if given is not None:
            note_unused_rate(job, rate, given)
        if calibration is not None:
            recipe = calibrated.run(job, calibration, rate, recipe)
        else:
            recipe = uncalibrated.run(job, rate, recipe)
        return job.finish(recipe)


def check_arguments(rate: Any, recipe: Any) -> tuple[Recipe | None, float]:
    """The recipe, if any, and the rate; rate 0 is the lossless recipe. TypeError or ValueError."""
    if not isinstance(rate, numbers.Real) or isinstance(rate, bool):
        raise TypeError(f"rate={rate!r}: expected a number in [0, 1)")
    rate = float(rate)
    if not 0 <= rate < 1:
        raise ValueError(f"rate={rate!r}: the share of numbers removed lies in [0, 1)")
    if recipe is not None and not isinstance(recipe, Recipe):
        raise TypeError(f"recipe: expected a Recipe, got {type(recipe).__name__}")
    if recipe is None and rate == 0:
        recipe = Recipe.lossless()
    return recipe, rate


def note_unused_rate(job: Job, rate: float, recipe: Recipe) -> None:
    """Says so where a rate was given beside a recipe that does something else."""
    if rate not in (DEFAULT_RATE, recipe.fpp):
        job.note(f"rate={rate:g} is not used: the recipe sets every method")


def check_calibration(calibration: Any) -> None:
    """TypeError unless it is a Calibration or None."""
    if calibration is not None and not isinstance(calibration, Calibration):
        raise TypeError(
            f"calibration: expected a foldprune.Calibration, got {type(calibration).__name__}"
        )
