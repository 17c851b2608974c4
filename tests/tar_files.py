"""Archives for tests."""

import io
import tarfile
from pathlib import Path


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    """Writes a tar of members by name, and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
