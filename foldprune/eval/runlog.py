"""Results of finished runs, a line of JSON each, so that what was stopped goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from ..errors import FormatError

__all__ = ["RunLog"]

Result = dict[str, Any]


class RunLog:
    """Results by configuration (plain JSON values), in a file where a path is given.

    A last line that was cut off by a stop is dropped; FormatError for any other that is none of
    ours.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = path
        self._results: dict[str, Result] = {}
        if path is not None and os.path.exists(path):
            self._read(path)

    def _read(self, path: str | os.PathLike[str]) -> None:
        with open(path, "rb") as file:
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                self._results[self._key(entry["config"])] = entry["result"]
            except (ValueError, KeyError, TypeError) as error:
                raise FormatError(f"{os.fspath(path)}, line {number}: not a run: {error}") from None

    @staticmethod
    def _key(config: Mapping[str, Any]) -> str:
        return json.dumps(config, sort_keys=True)

    def find(self, config: Mapping[str, Any]) -> Result | None:
        return self._results.get(self._key(config))

    def add(self, config: Mapping[str, Any], result: Result) -> None:
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"config": config, "result": result}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self._results[self._key(config)] = result
