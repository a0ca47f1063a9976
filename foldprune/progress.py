"""A progress bar on standard error: rich's where it is installed, a plain line otherwise."""

from __future__ import annotations

import sys
from collections.abc import Callable

__all__ = ["bar"]


def bar(description: str = "compressing") -> Callable[[int, int, str], None]:
    """A function of (done, total, name); the bar ends when done reaches total."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        return _plain(description)
    shown = Progress(console=Console(stderr=True), transient=True)
    task = shown.add_task(description, total=None)
    shown.start()

    def update(done: int, total: int, name: str) -> None:
        shown.update(task, completed=done, total=total, description=f"{description} {name}".strip())
        if done >= total:
            shown.stop()

    return update


def _plain(description: str) -> Callable[[int, int, str], None]:
    def update(done: int, total: int, name: str) -> None:
        end = "\n" if done >= total else ""
        print(f"\r{description}: {done}/{total}", end=end, file=sys.stderr, flush=True)

    return update
