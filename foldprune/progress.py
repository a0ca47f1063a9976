"""A progress bar on standard error: rich's where it is installed, a plain line otherwise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["bar"]

Update = Callable[[int, int, str], None]


@contextmanager
def bar(description: str = "compressing") -> Iterator[Update]:
    """A function of (done, total, name) while the bar is shown; it goes away whatever happens. A
    total of 0 means that it is not known."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield from _plain(description)
        return
    with Progress(console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(description, total=None)

        def update(done: int, total: int, name: str) -> None:
            text = f"{description} {name}".strip()
            shown.update(task, completed=done, total=total or None, description=text)

        yield update


def _plain(description: str) -> Iterator[Update]:
    def update(done: int, total: int, name: str) -> None:
        of = f"/{total}" if total else ""
        print(f"\r{description}: {done}{of} {name:<60.60}", end="", file=sys.stderr, flush=True)

    try:
        yield update
    finally:
        print(file=sys.stderr)
