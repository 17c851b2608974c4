"""A Hugging Face hub that has one repository, whose files are copied as a download would bring them."""

import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest


def put_on_hub(monkeypatch: pytest.MonkeyPatch, repository: str, source: Path, local: Path) -> None:
    """Makes downloads of a repository copy those files of `source` that are asked for to the new folder `local`."""
    local.mkdir()

    def snapshot_download(name: str, allow_patterns: list[str], revision: str | None = None) -> str:
        assert name == repository
        for path in (path.relative_to(source) for path in source.rglob("*") if path.is_file()):
            if any(fnmatch(str(path), pattern) for pattern in allow_patterns):
                (local / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source / path, local / path)
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
