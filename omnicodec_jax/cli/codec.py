"""`omnicodec encode`, `decode`, `stream-decode`: the commands that turn files into tokens and back."""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tyro

from omnicodec_jax import names, targets
from omnicodec_jax.buckets import BucketPath
from omnicodec_jax.cli.many_files import ManyFiles, WrittenFile
from omnicodec_jax.cli.options import BUNDLED_CLIPS, ModelOption, model_name
from omnicodec_jax.config import Precision
from omnicodec_jax.data import audio as audio_files
from omnicodec_jax.data import discovery
from omnicodec_jax.errors import AudioError, ModelError, OmniCodecError, TokenError
from omnicodec_jax.files import rewriting
from omnicodec_jax.origin import Origin
from omnicodec_jax.token_file import SUFFIX, Maker, TokenFile, check_clip

Positional = tyro.conf.Positional


def encode(
    input: Positional[Path] = BUNDLED_CLIPS,
    output: Positional[Path | None] = None,
    /,
    model: ModelOption = None,
    revision: str | None = None,
    features: Path | None = None,
    encoder: Path | None = None,
    precision: Precision = "float32",
    encoder_precision: Precision = "float32",
    overwrite: bool = False,
) -> int:
    """Turn audio into token files.

    Token files that the same model has made of the same audio before are made again.

    Args:
        input: An audio file, or a directory whose tree is mirrored. Default: the bundled clips.
        output: Token file or directory. Default: beside the input, named after it.
        model: Model directory or hub id; default $OMNICODEC_MODEL, or the bundled codec.
        revision: Revision of a hub model.
        features: Semantic features [S, F], for models that need them: a .npy file, or a directory of such files
            in the same tree as the audio.
        encoder: Encoder that computes the features, in place of --features: a directory that `omnicodec convert
            whisper` or `omnicodec convert qwen3-aut` has written, or a codec that has one, such as small. Default: the
            folder `encoder` in the model directory.
        precision: Number format that the model computes in. On GPUs and TPUs, bfloat16 is faster and changes codes
            (docs/tokens.md).
        encoder_precision: Number format that the encoder computes in.
        overwrite: Replace also token files of another model or precision, and of other audio.
    """
    tokenizer = _load_model(model, revision, encoder, precision, encoder_precision)
    if features is None and not tokenizer.computes_features:
        raise ModelError(
            "this model needs the semantic features of each clip: give --features FILE|DIR, or --encoder DIR"
        )

    if features is not None and tokenizer.semantic is None:
        raise ModelError("--features: this model has no semantic branch, and takes none")
    features_of = None if features is None else _features_of(features, input)

    def read(source: Path, target: Path) -> tuple[tuple[audio_files.LoadedClip, Origin], Any]:
        origin = Origin.of(source, target)
        clip = audio_files.load(source, tokenizer.sample_rate, tokenizer.config.input_peak)
        given = None if features_of is None else _load_features(features_of(source), source)
        try:
            return (clip, origin), tokenizer.prepare(clip.samples, given)
        except AudioError as error:
            raise AudioError(f"{source}: {error}") from None

    def write(target: Path, known: tuple[audio_files.LoadedClip, Origin], codes: np.ndarray) -> WrittenFile:
        clip, origin = known
        TokenFile(
            codes=codes.astype(np.uint16),
            model=tokenizer.model_hash,
            frame_rate=tokenizer.frame_rate,
            sample_rate=clip.sample_rate,
            num_samples=clip.num_samples,
            gain=clip.gain,
            source=origin,
            precision=tokenizer.precision,
            encoder_precision=tokenizer.encoder_precision or "float32",
            tokens_hash=tokenizer.tokens_hash,
        ).save(target)
        return WrittenFile(
            clip.samples.size / tokenizer.sample_rate, f"{codes.shape[0]} codebooks x {codes.shape[1]} frames"
        )

    files = targets.choose(input, output, audio_files.EXTENSIONS, SUFFIX, "_tokens")
    makers = _makers([target for _, target in files if target.exists()])
    if not overwrite:
        _check_maker(makers, tokenizer)
        targets.check_replaced(files, lambda target: makers[target][1])
    _tell_superseded(input, files, SUFFIX, _origin_of_tokens)
    rate = f"{tokenizer.frame_rate:g} Hz, {tokenizer.bitrate:.10g} bit/s"
    return ManyFiles("encode", files, read, write).run(tokenizer.encode_each, rate)


def decode(
    input: Positional[Path],
    output: Positional[Path | None] = None,
    /,
    model: ModelOption = None,
    revision: str | None = None,
    num_quantizers: int | None = None,
    overwrite: bool = False,
) -> int:
    """Turn token files into audio with the sample rate and exactly the length of the original.

    Args:
        input: A token file, or a directory whose tree is mirrored.
        output: Audio file (.wav, .flac) or directory. Default: beside the input, with "_decoded" added to its name.
        model: Model directory or hub id; default $OMNICODEC_MODEL, or the bundled codec.
        revision: Revision of a hub model.
        num_quantizers: Decode from the first n codebooks only, the semantic one included.
        overwrite: Replace also audio that was not decoded from the same tokens.
    """
    tokenizer = _load_model(model, revision)
    tokenizer.check_num_quantizers(num_quantizers)

    def read(source: Path, target: Path) -> tuple[tuple[TokenFile, Origin], np.ndarray]:
        origin = Origin.of(source, target)
        tokens, codes = _tokens_of(tokenizer, source, num_quantizers)
        return (tokens, origin), codes

    def write(target: Path, known: tuple[TokenFile, Origin], audio: np.ndarray) -> WrittenFile:
        tokens, origin = known
        held, frames = tokens.codes.shape
        restored = audio_files.resample(audio[0] / np.float32(tokens.gain), tokenizer.sample_rate, tokens.sample_rate)
        fitted = audio_files.fit_length(restored, tokens.num_samples)
        audio_files.save(target, fitted, tokens.sample_rate, origin.to_json())
        return WrittenFile(
            tokens.num_samples / tokens.sample_rate, f"{num_quantizers or held} codebooks x {frames} frames"
        )

    def origin_of(target: Path) -> Origin | None:
        return Origin.from_json(audio_files.comment(target))

    files = targets.choose(input, output, frozenset({SUFFIX}), ".wav", "_decoded")
    if not overwrite:
        targets.check_replaced(files, origin_of)
    _tell_superseded(input, files, ".wav", origin_of)
    return ManyFiles("decode", files, read, write).run(tokenizer.decode_each, f"{tokenizer.frame_rate:g} Hz")


def stream_decode(
    input: Positional[Path],
    output: Positional[Path | None] = None,
    /,
    model: ModelOption = None,
    revision: str | None = None,
    num_quantizers: int | None = None,
    overwrite: bool = False,
) -> int:
    """Decode a token file frame by frame, as a live stream would be decoded, into raw samples of 16 bits, mono.

    They have the sample rate of the model and the level of the original.

    omnicodec stream-decode clip.safetensors --model DIR | ffplay -f s16le -ar 24000 -

    Args:
        input: A token file.
        output: File to write to. Default: standard output.
        model: Model directory or hub id; default $OMNICODEC_MODEL, or the bundled codec.
        revision: Revision of a hub model.
        num_quantizers: Decode from the first n codebooks only, the semantic one included.
        overwrite: Replace a file that is there.
    """
    from omnicodec_jax.streaming import StreamingDecoder

    if output is not None and output.is_file() and not overwrite:  # raw samples cannot say of what they were made
        raise OmniCodecError(f"{output}: is there already; choose another output, or replace with --overwrite")
    if output is not None:
        if isinstance(output, BucketPath):
            output.check_writable()
        targets.check_apart(input, output)
    elif sys.stdout is None:
        raise OmniCodecError("standard output is closed; name a file to write to")
    tokenizer = _load_model(model, revision)
    tokenizer.check_num_quantizers(num_quantizers)
    tokens, codes = _tokens_of(tokenizer, input, num_quantizers)
    codes, scale = codes[None], 32767 / tokens.gain
    StreamingDecoder(tokenizer)(codes[:, :, :1])  # compiles
    decode = StreamingDecoder(tokenizer)
    milliseconds = []
    with _raw_output(output) as file:
        for frame in range(codes.shape[2]):
            start = time.perf_counter()
            audio = decode(codes[:, :, frame : frame + 1])
            milliseconds.append(1e3 * (time.perf_counter() - start))
            file.write((audio[0, 0] * scale).clip(-32767, 32767).astype("<i2").tobytes())
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
    """Opens the output for raw samples: a file that is whole or not there, or a pipe or a device."""
    if path is None:
        yield sys.stdout.buffer
    elif path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
    else:
        with rewriting(path) as temporary, open(temporary, "wb") as file:
            yield file


def _tokens_of(tokenizer: Any, path: Path, num_quantizers: int | None) -> tuple[TokenFile, np.ndarray]:
    """Reads a token file of this model, and the codes [k, N] to decode. Raises TokenError for one that does not fit."""
    tokens = TokenFile.load(path)
    if tokens.model != tokenizer.model_hash_as(tokens.model, tokens.tokens_hash):
        raise TokenError(
            f"{path}: tokens of model {tokens.model}, but --model is {tokenizer.model_hash}; give the one they are of"
        )
    held = len(tokens.codes)
    if num_quantizers is not None and num_quantizers > held:
        raise TokenError(f"{path}: holds {held} codebooks, --num-quantizers asks for {num_quantizers}")
    codes = tokens.codes[:num_quantizers]
    try:
        check_clip(tokenizer, codes, tokens.sample_rate, tokens.num_samples)
    except TokenError as error:
        raise TokenError(f"{path}: {error}") from None
    return tokens, codes


def _makers(files: list[Path]) -> dict[Path, tuple[Maker, Origin | None]]:
    """Reads what has made each token file, and of what. Raises TokenError for a file that is no token file."""
    try:
        return {path: TokenFile.made_by(path) for path in files}
    except TokenError as error:
        raise TokenError(f"{error}; it is not replaced: choose another output, or remove it") from None


def _origin_of_tokens(path: Path) -> Origin | None:
    with contextlib.suppress(TokenError):
        return TokenFile.made_by(path)[1]
    return None


def _tell_superseded(
    input: Path, files: list[tuple[Path, Path]], suffix: str, origin_of: Callable[[Path], Origin | None]
) -> None:
    """Names the files that a tree's files have left under other names; a name that the user has chosen has none."""
    if input.is_dir() and (line := targets.superseded(files, suffix, origin_of)):
        print(names.text(line), file=sys.stderr)


def _check_maker(makers: dict[Path, tuple[Maker, Origin | None]], tokenizer: Any) -> None:
    """Refuses to replace tokens that another model, or the same in another precision, has made. Raises TokenError."""
    computing = (tokenizer.precision, tokenizer.encoder_precision or "float32")

    def as_now(maker: Maker) -> Maker:
        model = tokenizer.model_hash_as(maker.model, maker.tokens_hash)
        return Maker(model, *computing, maker.tokens_hash)

    others = [(path, maker) for path, (maker, _) in makers.items() if maker != as_now(maker)]
    if others:
        path, maker = others[0]
        if maker.model != as_now(maker).model:
            differs = f"model {maker.model}, and --model is {tokenizer.model_hash}"
        elif maker.precision != tokenizer.precision:
            differs = f"--precision {maker.precision}, now {tokenizer.precision}"
        else:
            differs = f"--encoder-precision {maker.encoder_precision}, now {tokenizer.encoder_precision or 'float32'}"
        raise TokenError(
            f"{path}: holds tokens of {differs}"
            + (f", as do {len(others) - 1} others" if others[1:] else "")
            + "; choose another output, or replace them with --overwrite"
        )


def _load_model(
    model: Path | str | None,
    revision: str | None,
    encoder: Path | None = None,
    precision: Precision = "float32",
    encoder_precision: Precision = "float32",
) -> Any:
    from omnicodec_jax.tokenizer import OmniCodecTokenizer

    return OmniCodecTokenizer.from_pretrained(
        model_name(model), revision, encoder, precision=precision, encoder_precision=encoder_precision
    )


def _features_of(features: Path, input: Path) -> Callable[[Path], Path]:
    """Finds the .npy file of each audio file. Raises AudioError where one file is given for a directory."""
    if not input.is_dir():
        return lambda source: features / names.fit(source.stem, ".npy") if features.is_dir() else features
    if not features.is_dir():
        raise AudioError(f"--features {features}: must be a directory of .npy files, as {input} is one of audio")
    files = discovery.find(input)
    inside = targets.mirrored_names(input, files, audio_files.EXTENSIONS, ".npy")
    return lambda source: features / inside[source]


def _load_features(path: Path, source: Path) -> np.ndarray:
    """Loads the semantic features of an audio file. Raises AudioError."""
    try:
        return np.asarray(np.load(io.BytesIO(path.read_bytes()), allow_pickle=False), np.float32)
    except (OSError, ValueError, TypeError) as error:
        raise AudioError(f"{source}: no semantic features in {path}: {error}") from None
