"""Arguments that several functions take, settled in one place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from . import files

__all__ = ["Progress", "reporter", "resolve_config", "resolve_threads", "silent"]

Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, name: str) -> None:
    """Progress that nobody is shown."""


def resolve_threads(threads: int | None) -> int:
    """The number of threads to use; None means as many as this process may run on."""
    if threads is None:
        affinity = getattr(os, "sched_getaffinity", None)
        return len(affinity(0)) if affinity else os.cpu_count() or 1
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(f"threads={threads!r}: expected a whole number")
    if threads < 1:
        raise ValueError(f"threads={threads}: expected at least 1")
    return threads


def resolve_config(config: Any) -> Mapping[str, Any] | None:
    """A mapping from a mapping, a Hugging Face config object, or a path."""
    if config is None or isinstance(config, Mapping):
        return config
    if isinstance(config, (str, os.PathLike)):
        return files.read_config(os.fspath(config))
    if callable(to_dict := getattr(config, "to_dict", None)):
        values: Mapping[str, Any] = to_dict()
        return values
    raise TypeError(
        f"config: expected a mapping, a config object or a path, got {type(config).__name__}"
    )


@contextmanager
def reporter(
    progress: Progress | bool | None, description: str = "compressing"
) -> Iterator[Progress]:
    """The function that progress is reported to: the caller's, a bar's, or one that does
    nothing."""
    if callable(progress):
        yield progress
    elif progress:
        from .progress import bar

        with bar(description) as update:
            yield update
    else:
        yield silent
