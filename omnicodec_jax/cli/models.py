"""`omnicodec init`, `export-model`, `export`: the commands that make models and export them."""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from omnicodec_jax.cli.options import BUNDLED_CLIPS, ModelOption, model_name
from omnicodec_jax.config import files as config_files
from omnicodec_jax.data import audio as audio_files
from omnicodec_jax.data import discovery
from omnicodec_jax.errors import AudioError, ConfigError, ModelError

INIT_BATCH = 16
"""Number of segments of audio that `init` encodes at once."""
INIT_SECONDS = 2
"""Length of these segments, in seconds."""


def init(
    config: str | Path, out: Path, audio: Path = BUNDLED_CLIPS, seed: int = 0, encoder: str | Path | None = None
) -> int:
    """Make an untrained model to try things out: its weights are random, its codebooks are fitted to some audio.

    Args:
        config: Recipe, such as demo, or config file.
        out: Model directory to write. One that holds another model is refused.
        audio: Audio that the codebooks are fitted to. Default: the bundled clips.
        seed: Seed of the random weights.
        encoder: Directory of the frozen encoder of the semantic branch, or of a codec that has one, such as small, for
            configs whose semantic source is not log_mel. It is copied to OUT/encoder, where every command finds it.
    """
    import jax

    from omnicodec_jax import model_directory
    from omnicodec_jax.codec_directory import encoder_directory
    from omnicodec_jax.models.initialize import init_variables, initialize_codebooks, on_cpu
    from omnicodec_jax.semantic import read_encoder_of, semantic_features

    codec = config_files.load(config).codec
    if encoder is None and codec.semantic is not None and codec.semantic.source != "log_mel":
        raise ConfigError(
            f"{config}: semantic.source = {codec.semantic.source!r}: init needs the directory of its --encoder"
        )
    frozen = None if encoder is None else read_encoder_of(encoder_directory(encoder), codec.semantic)
    segments = _segments(audio, codec.sample_rate, codec.input_peak)
    # All batches are of one size, so that one program is compiled. A rest that fills no batch is left out.
    size = min(INIT_BATCH, len(segments))
    sounds = [np.stack(segments[i : i + size])[:, None] for i in range(0, len(segments) - size + 1, size)]

    @jax.jit
    def features(sound: jax.Array, variables: Any) -> jax.Array:
        return semantic_features(sound, codec.sample_rate, None if frozen is None else (frozen[0], variables))

    variables = None if frozen is None else jax.tree.map(jax.numpy.asarray, frozen[1])
    batches = [(sound, None if codec.semantic is None else features(sound, variables)) for sound in sounds]
    model, (weights_key, codebooks_key) = model_directory.build(codec), jax.random.split(jax.random.key(seed))
    drawn = on_cpu(partial(init_variables, model), weights_key)
    untrained = initialize_codebooks(model, drawn, batches, codebooks_key)
    if (out / model_directory.CONFIG).is_file():
        held = model_directory.model_hash(*model_directory.load(out))
        if held != model_directory.model_hash(codec, untrained):
            raise ModelError(f"{out}: holds model {held}, which would be lost; choose another --out, or remove it")
    if encoder is not None:
        model_directory.copy(encoder_directory(encoder), out / model_directory.ENCODER)
    model_directory.save(out, codec, untrained)
    print(f"{out}: untrained model of {config}")
    return 0


def _segments(audio: Path, sample_rate: int, peak: float | None) -> list[np.ndarray]:
    """Returns segments of a directory's audio. They overlap, so that k-means has more vectors than codebook entries.

    Raises AudioError if no clip is long enough.
    """
    size = INIT_SECONDS * sample_rate
    segments = []
    for file in discovery.take(audio).files:
        samples = audio_files.load(file, sample_rate, peak).samples
        segments += [samples[i : i + size] for i in range(0, samples.size - size + 1, size // 4)]
    if not segments:
        raise AudioError(
            f"{audio}: holds no clip of {INIT_SECONDS} s or more to fit codebooks to; give another --audio"
        )
    return segments


def export_model(
    *,
    workdir: Path,
    out: Path,
    step: int | None = None,
    ema: bool = False,
    number: Literal["float32", "float16"] = "float32",
    encoder: Path | None = None,
) -> int:
    """Turn a checkpoint of a training run into a model directory, with its discriminators in OUT/discriminators.

    Args:
        workdir: Directory of the run.
        out: Model directory to write.
        step: Step of a kept checkpoint. Default: the last one.
        ema: Take the moving average of the parameters, if the run keeps one, in place of the parameters.
        number: Number format that the weights are stored in. float16 halves the file and rounds the weights;
            commands compute in float32 all the same.
        encoder: Directory of the frozen encoder of the semantic branch, or of a codec that has one, such as small. It
            goes into OUT/encoder, where every command finds it. Default: the one that lies there already, if any.
    """
    from omnicodec_jax import model_directory
    from omnicodec_jax.training import export

    step = export.export_model(workdir, out, step, ema, number, encoder)
    print(f"{out}: model of {workdir} after {step} steps")
    own = out / model_directory.ENCODER
    if encoder is None and (own / model_directory.CONFIG).is_file():
        print(f"{own}: the encoder that was there stays")
    return 0


def export(
    *,
    what: Literal["decoder-step", "decoder", "encoder", "encoder-from-audio"],
    out: Path,
    model: ModelOption = None,
    format: Literal["stablehlo", "onnx"] = "stablehlo",
    seconds: float = 10.0,
) -> int:
    """Write a program that runs without this package: StableHLO with jax alone, ONNX with ONNX Runtime.

    Args:
        what: What the program computes: one frame of a live stream, or whole clips. The batch may have any size. An
            encoder takes audio and semantic features; encoder-from-audio, for ONNX, computes the features of models
            whose source is log_mel, or whisper where the encoder lies with the model.
        out: File to write. Its name ends in .stablehlo (the weights go into a second file beside it) or in .onnx (the
            weights are in it).
        model: Model directory or hub id; default $OMNICODEC_MODEL, or the bundled codec.
        format: What the program is written in.
        seconds: Length of the clips that a StableHLO program takes. An ONNX program takes any.
    """
    if format == "onnx":
        from omnicodec_jax.converters import onnx_program

        signature = onnx_program.export_directory(model_name(model), what, out)
    elif what == "encoder-from-audio":
        raise ModelError("--what encoder-from-audio: only with --format onnx")
    else:
        from omnicodec_jax.stablehlo import export_stablehlo
        from omnicodec_jax.tokenizer import OmniCodecTokenizer

        signature = export_stablehlo(OmniCodecTokenizer.from_pretrained(model_name(model)), what, seconds, out)
    print(f"{out}: {signature}")
    return 0
