"""`omnicodec detokenize`: token shards → audio files."""

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from omnicodec_jax import names
from omnicodec_jax.corpus import shards
from omnicodec_jax.corpus.shards import Clip
from omnicodec_jax.data import audio
from omnicodec_jax.data.claim import claim
from omnicodec_jax.data.units import Task
from omnicodec_jax.errors import DataError, TokenError
from omnicodec_jax.files import replacing
from omnicodec_jax.tokenizer import OmniCodecTokenizer

SETTINGS = "detokenized.json"
"""What the audio of a directory was made with."""
WRITERS = 4
"""Threads that resample and write, while the devices go on."""


class Decoded(NamedTuple):
    """A file that is done, or why it is not."""

    path: Path
    seconds: float
    error: Exception | None = None


def detokenize(
    tokens: Path, out: Path, tokenizer: OmniCodecTokenizer, num_quantizers: int | None, suffix: str, task: Task
) -> Iterator[Decoded]:
    """Writes OUT/<domain>/<id><suffix> for each clip, at the original's rate and length; those that are there stay.

    task: this process's share of the shards. Raises TokenError for tokens of another model, DataError for clips that
    cannot be told apart, and where `out` holds audio that was made otherwise.
    """
    held = shards.contract(tokens)
    if held["model"] != tokenizer.model_hash:
        raise TokenError(f"{tokens}: tokens of model {held['model']}, but --model is {tokenizer.model_hash}")
    tokenizer.check_num_quantizers(num_quantizers)
    made = {"model": tokenizer.model_hash, "num_quantizers": num_quantizers or tokenizer.num_quantizers}
    _check(out, made)
    paths = targets(tokens, suffix)

    def clips() -> Iterator[tuple[tuple[Path, Clip], np.ndarray]]:
        for path in list(paths)[task.index :: task.count]:
            for name, clip in zip(paths[path], shards.read_shard(path), strict=True):
                target = out / name
                if not target.is_file():
                    yield (target, clip), clip.codes.T[:num_quantizers]

    def write(target: Path, clip: Clip, samples: np.ndarray) -> Decoded:
        try:
            samples /= np.float32(clip.gain)  # in place, since hours of audio may be at hand
            restored = audio.resample(samples, tokenizer.sample_rate, clip.sample_rate)
            audio.save(target, audio.fit_length(restored, clip.num_samples), clip.sample_rate)
        except Exception as error:  # whatever is wrong with one file, the others are done
            return Decoded(target, 0.0, error)
        return Decoded(target, clip.num_samples / clip.sample_rate)

    writing: list[Future[Decoded]] = []
    with claim(out, task), ThreadPoolExecutor(WRITERS) as threads:
        with replacing(out / SETTINGS) as temporary:
            temporary.write_text(json.dumps(made) + "\n")
        for (target, clip), samples in tokenizer.decode_each(clips()):
            writing.append(threads.submit(write, target, clip, samples[0]))
            if len(writing) > 2 * WRITERS:
                yield writing.pop(0).result()
        for future in writing:
            yield future.result()


def _check(out: Path, made: dict[str, Any]) -> None:
    """Raises DataError where files would stay that another model or other codebooks have given."""
    path = out / SETTINGS
    if path.is_file() and (kept := json.loads(path.read_text())) != made:
        changed = "; ".join(f"{name} = {kept.get(name)!r}, now {made[name]!r}" for name in made)
        raise DataError(f"{out}: holds audio that was made otherwise ({changed}); use another OUT")


def targets(tokens: Path, suffix: str) -> dict[Path, list[str]]:
    """For each shard the relative paths that its clips are written to, DOMAIN/ID.

    Raises DataError for clips that cannot be told apart, in whatever shards they are.
    """
    ids = {path: list(shards.read_ids(path)) for path in shards.shards(tokens)}
    wanted = [f"{domain}/{names.inside(id) or 'clip'}" for rows in ids.values() for domain, id in rows]
    made = iter(names.distinct(tokens, wanted, suffix, audio.EXTENSIONS))
    return {path: list(itertools.islice(made, len(rows))) for path, rows in ids.items()}
