"""`omnicodec encode`, `decode`, `stream-decode`: files to tokens and back."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tyro
from tqdm import tqdm

from omnicodec_jax import names, targets
from omnicodec_jax.cli.options import BUNDLED_CLIPS, ModelOption, model_name
from omnicodec_jax.data import audio as audio_files
from omnicodec_jax.data import discovery
from omnicodec_jax.errors import AudioError, ModelError, OmniCodecError, TokenError, told
from omnicodec_jax.files import replacing
from omnicodec_jax.origin import Origin
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
    """Turn audio into token files. Those that the same model has made of the same audio before are made again.

    Args:
        input: An audio file, or a directory whose tree is mirrored; by itself, the bundled clips.
        output: Token file or directory. Default: beside the input, named after it.
        model: Model directory or hub id; default $OMNICODEC_MODEL.
        revision: Revision of a hub model.
        features: Semantic features [S, F], for models that need them: a .npy file, or a directory that mirrors input.
        encoder: Or the encoder to compute them with: what `omnicodec convert qwen3-aut` has written.
        overwrite: Replace token files of another model, and of other audio, too.
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
            source=Origin.of(source, target),
        ).save(target)
        return clip.samples.size / tokenizer.sample_rate, f"{codes.shape[0]} codebooks x {codes.shape[1]} frames"

    files = targets.choose(input, output, audio_files.EXTENSIONS, SUFFIX, "_tokens")
    makers = _makers([target for _, target in files if target.exists()])
    if not overwrite:
        _check_model(makers, tokenizer.model_hash)
        targets.check_replaced(files, lambda target: makers[target][1])
    rate = f"{tokenizer.frame_rate:g} Hz, {tokenizer.bitrate:.10g} bit/s"
    return _each_file("encode", files, encode_file, rate)


def decode(
    input: Positional[Path],
    output: Positional[Path | None] = None,
    /,
    model: ModelOption = None,
    revision: str | None = None,
    num_quantizers: int | None = None,
    overwrite: bool = False,
) -> int:
    """Turn token files into audio at the original's sample rate, exactly as long as the original.

    Args:
        input: A token file, or a directory whose tree is mirrored.
        output: Audio file (.wav, .flac) or directory. Default: beside the input, "_decoded" added to its name.
        model: Model directory or hub id; default $OMNICODEC_MODEL.
        revision: Revision of a hub model.
        num_quantizers: Decode from the first n codebooks only, the semantic one included.
        overwrite: Replace audio that was not decoded from the same tokens, too.
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
        fitted, origin = audio_files.fit_length(audio, tokens.num_samples), Origin.of(source, target)
        audio_files.save(target, fitted, tokens.sample_rate, origin.to_json())
        return tokens.num_samples / tokens.sample_rate, f"{num_quantizers or held} codebooks x {frames} frames"

    files = targets.choose(input, output, frozenset({SUFFIX}), ".wav", "_decoded")
    if not overwrite:
        targets.check_replaced(files, lambda target: Origin.from_json(audio_files.comment(target)))
    return _each_file("decode", files, decode_file, f"{tokenizer.frame_rate:g} Hz")


def stream_decode(
    input: Positional[Path],
    output: Positional[Path | None] = None,
    /,
    model: ModelOption = None,
    revision: str | None = None,
    num_quantizers: int | None = None,
    overwrite: bool = False,
) -> int:
    """Decode a token file a frame at a time, as a live stream would be: raw 16 bit samples, mono, as they come.

    omnicodec stream-decode clip.safetensors --model DIR | ffplay -f s16le -ar 24000 -

    Args:
        input: A token file.
        output: File to write to. Default: standard output.
        model: Model directory or hub id; default $OMNICODEC_MODEL.
        revision: Revision of a hub model.
        num_quantizers: Decode from the first n codebooks only, the semantic one included.
        overwrite: Replace a file that is there.
    """
    from omnicodec_jax.streaming import StreamingDecoder

    if output is not None and output.is_file() and not overwrite:  # raw samples cannot say what they were made of
        raise OmniCodecError(f"{output}: is there already; choose another output, or replace with --overwrite")
    tokenizer = _load_model(model, revision)
    tokenizer.check_num_quantizers(num_quantizers)
    tokens = _tokens_of(tokenizer, input)
    _check_held(input, len(tokens.codes), num_quantizers)
    codes = tokens.codes[None, :num_quantizers]
    decode = StreamingDecoder(tokenizer)
    decode(codes[:, :, :1])  # compiles
    milliseconds = []
    with _raw_output(output) as file:
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


@contextlib.contextmanager
def _raw_output(path: Path | None) -> Iterator[BinaryIO]:
    """Standard output, a pipe or a device, which get samples as they come, or a file, which is whole or not there."""
    if path is None:
        yield sys.stdout.buffer
    elif path.exists() and not path.is_file():
        with open(path, "wb") as file:
            yield file
    else:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            yield file


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


def _makers(files: list[Path]) -> dict[Path, tuple[str, Origin | None]]:
    """Which model has made each token file, and of what. Raises TokenError for what is none: it is never replaced."""
    try:
        return {path: TokenFile.made_by(path) for path in files}
    except TokenError as error:
        raise TokenError(f"{error}; it is not replaced: choose another output, or remove it") from None


def _check_model(makers: dict[Path, tuple[str, Origin | None]], model: str) -> None:
    """Raises TokenError, before any work, if encoding would replace tokens of another model."""
    others = [(path, maker) for path, (maker, _) in makers.items() if maker != model]
    if others:
        path, maker = others[0]
        raise TokenError(
            f"{path}: holds tokens of model {maker}, and --model is {model}"
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
    inside = targets.distinct(input, files, audio_files.EXTENSIONS, ".npy")
    return lambda source: features / inside[source]


def _load_features(path: Path, source: Path) -> np.ndarray:
    """The array that belongs to an audio file."""
    try:
        return np.asarray(np.load(path, allow_pickle=False), np.float32)
    except (OSError, ValueError, TypeError) as error:
        raise AudioError(f"{source}: no semantic features in {path}: {error}") from None


def _each_file(
    verb: str, files: list[tuple[Path, Path]], work: Callable[[Path, Path], tuple[float, str]], summary: str
) -> int:
    """Does every file that can be done; the others are named with the reason, and make the exit code 1."""
    seconds, failed, start = 0.0, 0, time.perf_counter()
    for source, target in tqdm(files, verb, unit="file", disable=not sys.stderr.isatty() or len(files) == 1):
        try:
            length, what = work(source, target)
        except Exception as error:  # whatever is wrong with one file, the others are done
            known = isinstance(error, (OmniCodecError, OSError))
            message = told(error) if known else f"{source}: {type(error).__name__}: {error}"
            tqdm.write(f"error: {message}", file=sys.stderr)
            failed += 1
        else:
            seconds += length
            tqdm.write(names.text(f"{target}: {what}"))
    elapsed = time.perf_counter() - start
    done = len(files) - failed
    print(
        f"{verb}: {done} of {len(files)} files, {seconds:.1f} s of audio, {summary}, "
        f"{seconds / elapsed:.1f} x real time"
    )
    return int(failed > 0)
