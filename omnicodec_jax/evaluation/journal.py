"""What is done already: JSON lines that are added one by one, so that whatever was killed goes on where it was."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omnicodec_jax.files import writing


class Journal:
    """Rows by key; the last one of a key counts. A line that was cut off is as if it had not been begun."""

    def __init__(self, path: Path):
        self._path, self._rows = path, dict[tuple[str, ...], dict[str, Any]]()
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b")  # noqa: SIM115 (closed by __exit__)
        self._file.seek(0)
        line = b"\n"
        for line in self._file:
            with contextlib.suppress(ValueError, AttributeError, KeyError, TypeError):  # no row, whole or cut off
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
        """The row of a key; None: there is none."""
        return self._rows.get(key)

    def add(self, key: Sequence[str], row: dict[str, Any]) -> None:
        """Keeps a row, on disk at once."""
        self._rows[tuple(key)] = row
        with writing(self._path):
            self._file.write(json.dumps({"key": list(key), **row}).encode() + b"\n")
            self._file.flush()
