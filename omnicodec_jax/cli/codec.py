"""`omnicodec encode`, `decode`, `stream-decode`: files to tokens and back."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from omnicodec_jax import names
from omnicodec_jax.cli.options import BUNDLED_CLIPS, ModelOption, model_name
from omnicodec_jax.data import audio as audio_files
from omnicodec_jax.data import discovery
from omnicodec_jax.errors import AudioError, ModelError, OmniCodecError, TokenError
from omnicodec_jax.token_file import SUFFIX, TokenFile

Positional = tyro.conf.Positional


def encode(
    input: Positional[Path] = BUNDLED_CLIPS,
    output: Positional[Path | None] = None,
    /,
    model: ModelOption = None,
    revision: str | None = None,
    features: Path | None = None,
    encoder: Path | None = None,
    overwrite: bool = False,
) -> int:
    """Turn audio into token files. Those that the same model has made before are made again.

    Args:
        input: An audio file, or a directory whose tree is mirrored; by itself, the bundled clips.
        output: Token file or directory. Default: beside the input, named after it.
        model: Model directory or hub id; default $OMNICODEC_MODEL.
        revision: Revision of a hub model.
        features: Semantic features [S, F], for models that need them: a .npy file, or a directory that mirrors input.
        encoder: Or the encoder to compute them with: what `omnicodec convert qwen3-aut` has written.
        overwrite: Replace token files of another model, too.
    """
    tokenizer = _load_model(model, revision, encoder)
    needed = tokenizer.semantic is not None and tokenizer.semantic.source != "log_mel"
    if needed and features is None and encoder is None:
        raise ModelError(
            "this model needs the semantic features of each clip: give --features FILE|DIR, or --encoder DIR"
        )

    features_of = None if features is None else _features_of(features, input)

    def encode_file(source: Path, target: Path) -> tuple[float, str]:
        clip = audio_files.load(source, tokenizer.sample_rate, tokenizer.config.input_peak)
        given = None if features_of is None else [_load_features(features_of(source), source)]
        try:
            codes = tokenizer.encode(clip.samples[None, None], tokenizer.sample_rate, semantic_features=given)[0]
        except AudioError as error:
            raise AudioError(f"{source}: {error}") from None
        TokenFile(
            codes=codes.astype(np.uint16),
            model=tokenizer.model_hash,
            frame_rate=tokenizer.frame_rate,
            sample_rate=clip.sample_rate,
            num_samples=clip.num_samples,
            gain=clip.gain,
        ).save(target)
        return clip.samples.size / tokenizer.sample_rate, f"{codes.shape[0]} codebooks x {codes.shape[1]} frames"

    targets = _targets(input, output, audio_files.EXTENSIONS, SUFFIX, "_tokens")
    _check_replaced([target for _, target in targets if target.exists()], tokenizer.model_hash, overwrite)
    rate = f"{tokenizer.frame_rate:g} Hz, {tokenizer.bitrate:.10g} bit/s"
    return _each_file("encode", targets, encode_file, rate)


def decode(
    input: Positional[Path],
    output: Positional[Path | None] = None,
    /,
    model: ModelOption = None,
    revision: str | None = None,
    num_quantizers: int | None = None,
) -> int:
    """Turn token files into audio at the original's sample rate, exactly as long as the original.

    Args:
        input: A token file, or a directory whose tree is mirrored.
        output: Audio file (.wav, .flac) or directory. Default: beside the input, "_decoded" added to its name.
        model: Model directory or hub id; default $OMNICODEC_MODEL.
        revision: Revision of a hub model.
        num_quantizers: Decode from the first n codebooks only, the semantic one included.
    """
    tokenizer = _load_model(model, revision)
    tokenizer.check_num_quantizers(num_quantizers)

    def decode_file(source: Path, target: Path) -> tuple[float, str]:
        tokens = _tokens_of(tokenizer, source)
        held, frames = tokens.codes.shape
        _check_held(source, held, num_quantizers)
        try:
            audio = tokenizer.decode(tokens.codes[None, :num_quantizers])[0, 0]
        except TokenError as error:
            raise TokenError(f"{source}: {error}") from None
        if tokens.codes.shape[1] != tokens.num_frames(tokenizer.sample_rate, tokenizer.hop_length):
            raise TokenError(
                f"{source}: damaged: {frames} frames do not fit {tokens.num_samples} samples; encode the audio again"
            )
        audio = audio_files.resample(audio / np.float32(tokens.gain), tokenizer.sample_rate, tokens.sample_rate)
        audio_files.save(target, audio_files.fit_length(audio, tokens.num_samples), tokens.sample_rate)
        return tokens.num_samples / tokens.sample_rate, f"{num_quantizers or held} codebooks x {frames} frames"

    targets = _targets(input, output, frozenset({SUFFIX}), ".wav", "_decoded")
    return _each_file("decode", targets, decode_file, f"{tokenizer.frame_rate:g} Hz")


def stream_decode(
    input: Positional[Path],
    output: Positional[Path | None] = None,
    /,
    model: ModelOption = None,
    revision: str | None = None,
    num_quantizers: int | None = None,
) -> int:
    """Decode a token file a frame at a time, as a live stream would be: raw 16 bit samples, mono, as they come.

    omnicodec stream-decode clip.safetensors --model DIR | ffplay -f s16le -ar 24000 -

    Args:
        input: A token file.
        output: File to write to. Default: standard output.
        model: Model directory or hub id; default $OMNICODEC_MODEL.
        revision: Revision of a hub model.
        num_quantizers: Decode from the first n codebooks only, the semantic one included.
    """
    from omnicodec_jax.streaming import StreamingDecoder

    tokenizer = _load_model(model, revision)
    tokenizer.check_num_quantizers(num_quantizers)
    tokens = _tokens_of(tokenizer, input)
    _check_held(input, len(tokens.codes), num_quantizers)
    codes = tokens.codes[None, :num_quantizers]
    decode = StreamingDecoder(tokenizer)
    decode(codes[:, :, :1])  # compiles
    milliseconds = []
    with sys.stdout.buffer if output is None else open(output, "wb") as file:
        for frame in range(codes.shape[2]):
            start = time.perf_counter()
            audio = decode(codes[:, :, frame : frame + 1], reset=[0] if frame == 0 else [])
            milliseconds.append(1e3 * (time.perf_counter() - start))
            file.write((audio[0, 0].clip(-1, 1) * 32767).astype("<i2").tobytes())
            file.flush()
    median, late = np.percentile(milliseconds, [50, 99])
    print(
        f"stream-decode: {codes.shape[2]} frames of {1e3 / tokenizer.frame_rate:g} ms at {tokenizer.sample_rate} Hz, "
        f"{median:.1f} ms each (99 %: {late:.1f} ms)",
        file=sys.stderr,
    )
    return 0


def _check_held(path: Path, held: int, num_quantizers: int | None) -> None:
    """Raises TokenError for more codebooks than a token file has."""
    if num_quantizers is not None and num_quantizers > held:
        raise TokenError(f"{path}: holds {held} codebooks, --num-quantizers asks for {num_quantizers}")


def _tokens_of(tokenizer: Any, path: Path) -> TokenFile:
    """Raises TokenError for those of another model."""
    tokens = TokenFile.load(path)
    if tokens.model != tokenizer.model_hash:
        raise TokenError(
            f"{path}: tokens of model {tokens.model}, but --model is {tokenizer.model_hash}; give the one they are of"
        )
    return tokens


def _check_replaced(files: list[Path], model: str, overwrite: bool) -> None:
    """Raises TokenError, before any work, if encoding would replace what is no token file, or tokens of another model.

    Tokens of other models are replaced where `overwrite` says so.
    """
    makers = {}
    for path in files:
        try:
            makers[path] = TokenFile.model_of(path)
        except TokenError as error:
            raise TokenError(f"{error}; it is not replaced: choose another output, or remove it") from None
    others = [path for path, maker in makers.items() if maker != model]
    if others and not overwrite:
        raise TokenError(
            f"{others[0]}: holds tokens of model {makers[others[0]]}, and --model is {model}"
            + (f", as do {len(others) - 1} others" if others[1:] else "")
            + "; choose another output, or replace them with --overwrite"
        )


def _load_model(model: Path | str | None, revision: str | None, encoder: Path | None = None) -> Any:
    from omnicodec_jax.tokenizer import OmniCodecTokenizer

    return OmniCodecTokenizer.from_pretrained(model_name(model), revision, encoder)


def _features_of(features: Path, input: Path) -> Callable[[Path], Path]:
    """The .npy file of each audio file. Raises AudioError where one file is given for a directory."""
    if not input.is_dir():
        return lambda source: features / names.fit(source.stem, ".npy") if features.is_dir() else features
    if not features.is_dir():
        raise AudioError(f"--features {features}: must be a directory of .npy files, as {input} is one of audio")
    files = discovery.find(input)
    inside = _distinct(input, files, audio_files.EXTENSIONS, ".npy")
    return lambda source: features / inside[source]


def _load_features(path: Path, source: Path) -> np.ndarray:
    """The array that belongs to an audio file."""
    try:
        return np.asarray(np.load(path, allow_pickle=False), np.float32)
    except (OSError, ValueError, TypeError) as error:
        raise AudioError(f"{source}: no semantic features in {path}: {error}") from None


def _targets(
    input: Path, output: Path | None, extensions: frozenset[str], suffix: str, folder_suffix: str
) -> list[tuple[Path, Path]]:
    """Where each input file goes. Raises OmniCodecError."""
    if not input.exists():
        raise OmniCodecError(f"{input}: no such file or directory")
    if not input.is_dir():
        # Beside its source, audio gets another name than the original has.
        name = names.fit(input.stem, (folder_suffix if output is None and suffix != SUFFIX else "") + suffix)
        file = input.with_name(name) if output is None else output / name if output.is_dir() else output
        if suffix == SUFFIX and file.suffix != SUFFIX:
            raise OmniCodecError(f"{file}: token files end in {SUFFIX}")
        return [(input, file)]
    found = discovery.take(input, extensions)
    if not found.files:
        raise OmniCodecError(f"{input}: holds no file named {' '.join(sorted(extensions))}; it holds {found}")
    folder = output or _outside(input, folder_suffix)
    targets = _distinct(input, found.files, extensions, suffix)
    return [(source, folder / targets[source]) for source in found.files]


def _outside(folder: Path, suffix: str) -> Path:
    """The directory beside another one that is named after it. Raises OmniCodecError for that of the whole disk."""
    named = folder if folder.name not in ("", "..") else Path(os.path.abspath(folder))
    if not named.name:
        raise OmniCodecError(f"{folder}: name the directory to write to")
    return named.with_name(names.fit(named.name, suffix))


def _distinct(root: Path, files: list[Path], extensions: frozenset[str], suffix: str) -> dict[Path, str]:
    """The names that files of a tree have in a tree that mirrors it."""
    inside = [file.relative_to(root).as_posix() for file in files]
    return dict(zip(files, names.distinct(root, inside, suffix, extensions), strict=True))


def _each_file(
    verb: str, targets: list[tuple[Path, Path]], work: Callable[[Path, Path], tuple[float, str]], summary: str
) -> int:
    """Does every file that can be done; the others are named with the reason, and make the exit code 1."""
    seconds, failed, start = 0.0, 0, time.perf_counter()
    for source, target in tqdm(targets, verb, unit="file", disable=not sys.stderr.isatty() or len(targets) == 1):
        try:
            length, what = work(source, target)
        except Exception as error:  # whatever is wrong with one file, the others are done
            known = isinstance(error, (OmniCodecError, OSError))
            message = str(error) if known else f"{source}: {type(error).__name__}: {error}"
            tqdm.write(f"error: {message}", file=sys.stderr)
            failed += 1
        else:
            seconds += length
            tqdm.write(names.text(f"{target}: {what}"))
    elapsed = time.perf_counter() - start
    done = len(targets) - failed
    print(
        f"{verb}: {done} of {len(targets)} files, {seconds:.1f} s of audio, {summary}, "
        f"{seconds / elapsed:.1f} x real time"
    )
    return int(failed > 0)
