"""`omnicodec inspect`: the command that says what a file or a directory holds."""

from pathlib import Path

import tyro

from omnicodec_jax import shipped
from omnicodec_jax.cli import command
from omnicodec_jax.data import audio as audio_files
from omnicodec_jax.data import discovery
from omnicodec_jax.errors import OmniCodecError
from omnicodec_jax.token_file import SUFFIX, TokenFile

Positional = tyro.conf.Positional


def inspect(path: Positional[Path], /) -> int:
    """Say what a file or a directory holds: what one of these commands has written, or audio.

    Args:
        path: A model (a directory, or small, the bundled codec), prepared audio, semantic features, a training
            run, tokens, or the report of an evaluation; or a token file, an audio file, or a directory of such files.
    """
    from omnicodec_jax.cli import contents

    if not path.exists():
        path = shipped.MODELS.get(str(path), path)
    if not path.exists():
        raise OmniCodecError(f"{path}: no such file or directory")
    if lines := contents.describe(path):
        print("\n  ".join(lines))
        return 0
    files, failed = discovery.find(path, audio_files.EXTENSIONS | {SUFFIX}), 0
    if not files:
        raise OmniCodecError(f"{path}: holds nothing that a command of omnicodec has written, and no audio")
    for file in files:
        try:
            line = _describe(file)
        except (OmniCodecError, OSError) as error:
            command.fail(error)
            failed += 1
        else:
            print(line)
    return int(failed > 0)


def _describe(path: Path) -> str:
    """Returns one line about an audio file or a token file."""
    if path.suffix != SUFFIX:
        samples, rate = audio_files.decode(path)
        length, channels = samples.shape
        return f"{path}: audio, {length / rate:.2f} s at {rate} Hz, {channels} channel(s)"
    tokens = TokenFile.load(path)
    codebooks, frames = tokens.codes.shape
    return (
        f"{path}: {codebooks} codebooks x {frames} frames at {tokens.frame_rate:g} Hz, {tokens.num_samples} samples at "
        f"{tokens.sample_rate} Hz, gain {tokens.gain:.4g}, model {tokens.model}"
    )
