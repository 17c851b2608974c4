"""Codecs as ONNX programs, which ONNX Runtime runs on servers, phones and in browsers, through the PyTorch model.

Batch and time may have any size. Weights are inside.
"""

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from omnicodec_jax import model_directory
from omnicodec_jax.codec_directory import find_encoder, load_codec
from omnicodec_jax.config import CodecConfig
from omnicodec_jax.converters import pytorch_model
from omnicodec_jax.converters.tensors import ConversionError, import_torch
from omnicodec_jax.files import rewriting
from omnicodec_jax.names import an
from omnicodec_jax.version import with_extra

Part = Literal["decoder-step", "decoder", "encoder", "encoder-from-audio"]
"""Which part of a codec a program computes."""
SUFFIX = ".onnx"
OPSET = 20


def export_onnx(
    config: Any, variables: Mapping[str, Any], what: Part, out: Path, encoder: pytorch_model.Whisper | None = None
) -> str:
    """Writes an ONNX program, which holds its weights.

    Args:
        config: The codec's config.
        variables: Its parameters and codebooks.
        what: "decoder": codes to audio; "decoder-step": the next frames of streams; "encoder": audio and semantic
            features to codes; "encoder-from-audio": audio to codes, for models that compute their features.
        out: File to write the program to; it must end in .onnx.
        encoder: Encoder of Whisper that "encoder-from-audio" computes the features with, where the model takes its.

    Returns:
        The signature of the program, to be read by people.

    Raises:
        ConversionError: If `out` does not end in .onnx, the model is no OmniCodec, or it lacks such a part.
    """
    if out.suffix != SUFFIX:
        raise ConversionError(f"{out}: must end in {SUFFIX}")
    if not isinstance(config, CodecConfig):
        raise ConversionError(f"{an(model_directory.model_type(config))} model: only OmniCodec models go to ONNX")
    own = encoder if what == "encoder-from-audio" else None
    if what == "encoder-from-audio" and config.semantic is not None and config.semantic.source != "log_mel" and not own:
        lacking = ", and no encoder of Whisper lies with it" if config.semantic.source == "whisper" else ""
        raise ConversionError(
            f"semantic.source = {config.semantic.source!r}{lacking}: this model's program takes its features; use "
            "--what encoder"
        )
    torch = import_torch()
    try:
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError:
        raise ConversionError(f"this needs onnx and onnxscript: {with_extra('onnx')}") from None
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is missing
    module, inputs, outputs, dynamic = _program(pytorch_model.build(config, variables, own), what)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamo=True,
            verbose=False,
            optimize=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=dynamic,
        )
    program.model.metadata_props.update(
        model=model_directory.model_hash(config, variables),
        sample_rate=str(config.sample_rate),
        hop_length=str(config.hop_length),
        num_quantizers=str(config.num_quantizers),
        input_peak="" if config.input_peak is None else str(config.input_peak),
    )
    with rewriting(out) as path:
        program.save(str(path), external_data=False)
    shapes = [f"{value.name} [{', '.join(map(str, value.shape or ()))}]" for value in program.model.graph.inputs]
    shown = [*shapes[:2], "…"] if len(shapes) > 3 else shapes
    return f"({', '.join(shown)}) → {', '.join(outputs[:1])}{', …' if outputs[1:] else ''}"


def export_directory(name: str, what: Part, out: Path) -> str:
    """Writes the ONNX program of a codec in a model directory, or on the hub; see `export_onnx`."""
    config, variables = load_codec(name)
    encoder = None
    if isinstance(config, CodecConfig) and (beside := find_encoder(name)) is not None:
        encoder = pytorch_model.read_whisper(beside, config)
    return export_onnx(config, variables, what, out, encoder)


def _program(model: Any, what: Part) -> tuple[Any, dict[str, Any], list[str], Any]:
    """Returns a module of a part of a codec, example inputs by name, names of outputs, and the sizes that may vary."""
    torch = import_torch()
    config = model.config
    frames, samples = 7, 7 * config.frame_size + 11
    if model.frozen_encoder is not None:  # two windows, as what is one in the example is taken to be one always
        samples += config.encoder_window_seconds * config.sampling_rate
    codes = torch.zeros(2, config.num_quantizers, frames, dtype=torch.long)
    audio = torch.zeros(2, 1, samples)

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, audio_codes: Any) -> Any:
            return self.model.decode(audio_codes).audio_values

    class Step(Decoder):
        def forward(self, audio_codes: Any, *cache: Any) -> Any:
            output = self.model.decode(audio_codes, decoder_cache=dict(zip(names, cache, strict=True)))
            return output.audio_values, *(output.decoder_cache[name] for name in names)

    class Encoder(Decoder):
        def forward(self, input_values: Any, semantic_features: Any = None) -> Any:
            return self.model.encode(input_values, semantic_features=semantic_features).audio_codes

    codes_sizes = {0: "batch", 2: "frames"}
    if what == "decoder":
        return Decoder(), {"audio_codes": codes}, ["audio_values"], (codes_sizes,)
    if what == "decoder-step":
        cache = model.empty_decoder_cache(2)
        names = list(cache)
        inputs = {"audio_codes": codes} | {f"cache.{name}": tensor for name, tensor in cache.items()}
        outputs = ["audio_values", *(f"next.{name}" for name in names)]
        return Step(), inputs, outputs, (codes_sizes, tuple({0: "batch"} for _ in names))
    sizes: tuple[Any, ...] = ({0: "batch", 2: "samples"},)
    inputs = {"input_values": audio}
    if what == "encoder" and config.num_semantic_quantizers:
        inputs["semantic_features"] = torch.zeros(2, 9, config.semantic_feature_dim)
        sizes = (*sizes, {0: "batch", 1: "vectors"})
    return Encoder(), inputs, ["audio_codes"], sizes
