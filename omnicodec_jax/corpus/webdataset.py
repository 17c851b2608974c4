"""Turns token shards into WebDataset shards, for pipelines that read those."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np

from omnicodec_jax.corpus import shards
from omnicodec_jax.data.claim import claim
from omnicodec_jax.errors import DataError
from omnicodec_jax.files import rewriting


def convert(tokens: Path, out: Path) -> int:
    """Writes a tar file for each shard, with `<number>.npy` (uint16 [N, K]) and `<number>.json` for each clip.

    Numbers stand for ids, which may hold what WebDataset takes for a suffix. Returns how many clips there are. Raises
    DataError where `out` holds tokens of another contract, or tars that are not of these shards.
    """
    shards.check_apart(out, "tars")
    settings, contract = out / shards.SETTINGS, shards.contract(tokens)
    with claim(out, makes="tokens"):
        if shards.settings(out) not in (None, contract):
            raise DataError(f"{out}: holds tokens that were made otherwise (see {settings}); use another OUT")
        made = {f"{path.stem}.tar" for path in shards.shards(tokens)}
        if others := sorted({path.name for path in out.glob("[!.]*.tar")} - made):
            raise DataError(f"{out}: holds tars that are not of {tokens}, such as {others[0]}; use another OUT")
        with rewriting(settings) as temporary:  # first, so that a later run knows the settings of a run that was killed
            temporary.write_text(json.dumps(contract, indent=2) + "\n")
        return sum(_convert(path, out) for path in shards.shards(tokens))


def _convert(path: Path, out: Path) -> int:
    """Writes the tar file of one shard; returns how many clips it has."""
    number = -1
    with rewriting(out / f"{path.stem}.tar") as temporary, tarfile.open(temporary, "w") as archive:
        for number, clip in enumerate(shards.read_shard(path)):
            codes = io.BytesIO()
            np.save(codes, clip.codes)
            fields = {name: value for name, value in clip._asdict().items() if name != "codes"}
            _add(archive, f"{number:08d}.npy", codes.getvalue())
            _add(archive, f"{number:08d}.json", json.dumps(fields).encode())
    return number + 1


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))
