"""The installed version, of which pyproject.toml is the only copy."""


def version() -> str:
    """For example ``"0.1.0"``, or ``"(not installed)"`` where foldprune runs from a source tree."""
    import importlib.metadata  # slow to import

    try:
        return importlib.metadata.version("foldprune")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
