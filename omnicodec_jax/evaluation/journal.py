"""A journal of finished work: JSON lines, added one by one, from which a killed evaluation is resumed."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omnicodec_jax.files import writing


class Journal:
    """A file of rows with keys. The last row of a key counts, and a line that was cut off does not count."""

    def __init__(self, path: Path):
        """Reads the rows that the file holds already, and opens it for more."""
        self._path, self._rows = path, dict[tuple[str, ...], dict[str, Any]]()
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b")  # noqa: SIM115 (closed by __exit__)
        self._file.seek(0)
        line = b"\n"
        for line in self._file:
            with contextlib.suppress(
                ValueError, AttributeError, KeyError, TypeError
            ):  # a killed process has cut off the last line
                row = json.loads(line)
                self._rows[tuple(row.pop("key"))] = row
        if not line.endswith(b"\n"):
            self._file.write(b"\n")

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        with writing(self._path):
            self._file.close()

    def get(self, *key: str) -> dict[str, Any] | None:
        """Returns the row of a key, or None if there is none."""
        return self._rows.get(key)

    def add(self, key: Sequence[str], row: dict[str, Any]) -> None:
        """Adds a row, which is on disk when this returns."""
        self._rows[tuple(key)] = row
        with writing(self._path):
            self._file.write(json.dumps({"key": list(key), **row}).encode() + b"\n")
            self._file.flush()
