"""`omnicodec detokenize`: turns token shards into audio files."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from omnicodec_jax import names
from omnicodec_jax.buckets import BucketPath, in_threads
from omnicodec_jax.config import files as config_files
from omnicodec_jax.corpus import shards
from omnicodec_jax.corpus.shards import Clip
from omnicodec_jax.data import audio
from omnicodec_jax.data.claim import claim
from omnicodec_jax.data.units import Share, read_settings
from omnicodec_jax.errors import DataError, TokenError
from omnicodec_jax.files import remove_leftovers, rewriting
from omnicodec_jax.origin import Origin, relative
from omnicodec_jax.token_file import check_clip
from omnicodec_jax.tokenizer import OmniCodecTokenizer

SETTINGS = "detokenized.json"
"""Name of the file that says what the audio of a directory was made with."""
WRITERS = 4
"""Number of threads that resample and write while the devices go on."""


class Decoded(NamedTuple):
    """An audio file that has been written, or the reason why it has not."""

    path: Path
    """Path of the file."""
    seconds: float
    """Audio in it; 0 if it has not been written."""
    error: Exception | None = None
    """The reason why the clip has not been written; None if it has."""


def detokenize(
    tokens: Path, out: Path, tokenizer: OmniCodecTokenizer, num_quantizers: int | None, suffix: str, share: Share
) -> Iterator[Decoded]:
    """Writes OUT/<domain>/<id><suffix> for each clip, at the original's rate and length. Files that are there stay.

    Args:
        tokens: Directory of token shards.
        out: Directory of the audio.
        tokenizer: The model that the tokens are of.
        num_quantizers: Number of codebooks to decode from; None: all.
        suffix: Format of the files.
        share: Which shards this process does.

    Yields:
        What became of each file.

    Raises:
        TokenError: If the tokens are of another model.
        DataError: If clips cannot be told apart, or `out` holds audio that was made otherwise, or of something else.
    """
    held = shards.contract(tokens)
    if held["model"] != tokenizer.model_hash_as(held["model"], held.get("tokens_hash")):
        raise TokenError(f"{tokens}: tokens of model {held['model']}, but --model is {tokenizer.model_hash}")
    tokenizer.check_num_quantizers(num_quantizers)
    shards.check_apart(out, "detokenized audio")
    with claim(out, share, "detokenized audio"):
        yield from _decode_left(tokens, out, tokenizer, num_quantizers, suffix, share)


def _decode_left(
    tokens: Path, out: Path, tokenizer: OmniCodecTokenizer, num_quantizers: int | None, suffix: str, share: Share
) -> Iterator[Decoded]:
    """Does what `detokenize` does, while no other run is at work on `out`."""
    kept = _kept(out)
    made = {
        "model": tokenizer.model_hash_as(kept.get("model")),
        "num_quantizers": num_quantizers or tokenizer.num_quantizers,
    }
    if problem := config_files.unknown_field(kept, made):
        raise DataError(f"{out / SETTINGS}: {problem}")
    if kept not in ({}, made):
        changed = "; ".join(
            f"{name} = {kept.get(name)!r}, now {value!r}" for name, value in made.items() if value != kept.get(name)
        )
        raise DataError(f"{out}: holds audio that was made otherwise ({changed}); use another OUT")
    mine = dict(list(targets(tokens, suffix).items())[share.index :: share.count])
    origin = partial(_origin, relative(tokens.resolve(), out))
    left = _left(out, itertools.chain.from_iterable(mine.values()), origin)

    def clips() -> Iterator[tuple[tuple[Target, Clip], np.ndarray]]:
        for path, made in mine.items():
            for target, clip in zip(made, shards.read_shard(path), strict=True):
                if target.path in left:
                    codes = clip.codes.T[:num_quantizers]
                    try:
                        check_clip(tokenizer, codes, clip.sample_rate, clip.num_samples)
                    except TokenError as error:
                        damaged = TokenError(f"{path}: {target.clip}: {error}")
                        writing.append(threads.submit(Decoded, out / target.path, 0.0, damaged))
                    else:
                        yield (target, clip), codes

    def write(target: Target, clip: Clip, samples: np.ndarray) -> Decoded:
        path = out / target.path
        try:
            samples /= np.float32(clip.gain)  # in place, since the clip may have hours
            restored = audio.resample(samples, tokenizer.sample_rate, clip.sample_rate)
            fitted = audio.fit_length(restored, clip.num_samples)
            audio.save(path, fitted, clip.sample_rate, origin(target).to_json())
        except Exception as error:  # an error in one file must not end the work on the others
            return Decoded(path, 0.0, error)
        return Decoded(path, clip.num_samples / clip.sample_rate)

    writing: list[Future[Decoded]] = []
    with ThreadPoolExecutor(WRITERS) as threads:
        with rewriting(out / SETTINGS) as temporary:
            temporary.write_text(json.dumps(made) + "\n")
        remove_leftovers(*(out / path for path in left))
        for (target, clip), samples in tokenizer.decode_each(clips()):
            writing.append(threads.submit(write, target, clip, samples[0]))
            if len(writing) > 2 * WRITERS:
                yield writing.pop(0).result()
        for future in writing:
            yield future.result()


def _kept(out: Path) -> dict[str, Any]:
    """Reads which model and how many codebooks have made the audio that is in `out`; empty if there is none."""
    path = out / SETTINGS
    return read_settings(path) if path.is_file() else {}


class Target(NamedTuple):
    """The file that a clip is written to."""

    path: str
    """Path of the file inside OUT: DOMAIN/ID with the suffix."""
    clip: str
    """DOMAIN/ID of the clip itself."""
    source: str
    """Hash of the audio that its tokens were made of."""


def targets(tokens: Path, suffix: str) -> dict[Path, list[Target]]:
    """Returns the file of each clip, shard by shard. Raises DataError for clips that cannot be told apart."""
    rows = {path: list(shards.read_ids(path)) for path in shards.shards(tokens)}
    clips = [
        (f"{domain}/{names.inside(id) or 'clip'}", source) for held in rows.values() for domain, id, source in held
    ]
    paths = names.distinct(tokens, [clip for clip, _ in clips], suffix, audio.EXTENSIONS)
    made = (Target(path, *clip) for path, clip in zip(paths, clips, strict=True))
    return {path: list(itertools.islice(made, len(held))) for path, held in rows.items()}


def _origin(tokens: str, target: Target) -> Origin:
    """Returns the origin that a file gives. `tokens` is the directory of the shards, as seen from OUT."""
    return Origin(f"{tokens}/{target.clip}", target.source)


def _comment(path: Path) -> str | None:
    """Returns the comment of an audio file; None if it is not there, or empty, as a power failure may leave it."""
    if not path.is_file() or not (isinstance(path, BucketPath) or path.stat().st_size):
        return None
    return audio.comment(path)


def _left(out: Path, targets: Iterable[Target], origin: Callable[[Target], Origin]) -> set[str]:
    """Returns the paths in `out` that are to be written: files that are not there, or whose audio has been replaced.

    Raises DataError for a file that was made of something else.
    """
    left, is_older, targets = set(), (out / SETTINGS).is_file(), list(targets)
    many = in_threads if isinstance(out, BucketPath) else itertools.starmap
    comments = many(_comment, ((out / target.path,) for target in targets))
    for target, comment in zip(targets, comments, strict=True):
        path, wanted = out / target.path, origin(target)
        if comment is None:
            left.add(target.path)
        elif (held := Origin.from_json(comment)) is None:
            if not is_older:  # where `SETTINGS` stands, an older version has written it
                raise DataError(f"{path}: is there already, and was not made by detokenize; use another OUT")
        elif held.digest != wanted.digest:
            if held.path != wanted.path:
                raise DataError(f"{path}: was made of {held.path}, not of {wanted.path}; use another OUT")
            left.add(target.path)
    return left
