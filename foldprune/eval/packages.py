"""Files of PyPI packages that are installed beside foldprune, found without importing them."""

from __future__ import annotations

import importlib.metadata
import os

__all__ = ["package_path"]


def package_path(requirement: str, file: str, root: str | None = None) -> str:
    """The path of a package's file or folder, installed or under ``root``. ``requirement``:
    "name==version". ModuleNotFoundError, with the command, where it is missing."""
    name = requirement.partition("==")[0]
    if root is None:
        try:
            located = importlib.metadata.distribution(name).locate_file(file)
        except importlib.metadata.PackageNotFoundError:
            raise _missing(requirement, f"{name} is not installed") from None
        path = str(located)
    else:
        path = os.path.join(root, file)
    if not os.path.exists(path):
        raise _missing(requirement, f"{path} is not there")
    return path


def _missing(requirement: str, what: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"{what}: pip install --no-deps {requirement}")
