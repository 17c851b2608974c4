"""PyTorch on the same device: the codec that `omnicodec convert to-torch` writes, and Mimi."""

import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.accelerator.sameness import Row, codes_of, mismatches
from benchmarks.accelerator.settings import Settings, bundled_audio, seconds_of
from omnicodec_jax.tokenizer import OmniCodecTokenizer


def device() -> str:
    """Returns what PyTorch calls the device that it computes on, and computes float32 products there in full.

    By default PyTorch lets cuDNN compute convolutions of float32 in TF32.
    """
    import torch

    torch.backends.cudnn.allow_tf32 = False
    return "cuda" if torch.cuda.is_available() else "cpu"


def converted(model: Path) -> Any:
    """Converts the codec to PyTorch, and loads what was written as somebody does who has only transformers."""
    from transformers import AutoModel

    from omnicodec_jax.converters import to_torch

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        to_torch.main(model=model, out=Path(folder))
        return AutoModel.from_pretrained(folder, trust_remote_code=True).eval().to(device())


def codes_and_audio(settings: Settings, model: Path) -> Row:
    """Compares the codes of the bundled clips in PyTorch with ours, and the audio of these codes."""
    import torch

    network, tokenizer = converted(model), OmniCodecTokenizer.from_pretrained(model, devices=[jax.devices()[0]])
    clips = bundled_audio(settings, tokenizer.sample_rate)
    ours = codes_of(settings, model, jax.devices()[0])

    @torch.inference_mode()
    def codes() -> np.ndarray:
        found = (network.encode(torch.from_numpy(clip)[None, None].to(network.device)).audio_codes for clip in clips)
        return np.concatenate([each[0].cpu().numpy() for each in found], axis=1)

    here = mismatches(codes(), ours)
    torch.backends.cudnn.allow_tf32 = True
    with_tf32 = mismatches(codes(), ours)
    torch.backends.cudnn.allow_tf32 = False
    frames = ours[:, : round(10 * tokenizer.frame_rate)]
    with torch.inference_mode():
        batch = torch.from_numpy(frames)[None].to(network.device)
        values = network.decode(batch).audio_values[0, 0].cpu().numpy()
        compiled = torch.compile(network.decode)(batch).audio_values[0, 0].cpu().numpy()
    expected = np.asarray(tokenizer.decode(frames[None])).reshape(-1)
    errors = [np.abs(audio - expected).max() / np.abs(expected).max() for audio in (values, compiled)]
    audio = f"audio off by {errors[0]:.1e} of its peak, compiled by {errors[1]:.1e}"
    return Row("the codec in PyTorch", f"{here}; {audio}", f"Flax on this device; with cuDNN's TF32, {with_tf32}")


def codec_speed(settings: Settings, model: Path) -> Row:
    """Measures the converted codec in PyTorch: encoding, and decoding as it is and compiled."""
    import torch

    network = converted(model)
    audio = 0.1 * torch.randn(settings.torch_batch, 1, round(settings.seconds * 24_000), device=network.device)

    @torch.inference_mode()
    def real_time(run: Callable[[], Any]) -> str:
        # What comes back to the CPU has been computed.
        seconds = seconds_of(lambda: run().cpu(), settings.repeats)
        return f"{settings.torch_batch * settings.seconds / seconds:.0f}"

    with torch.inference_mode():
        codes = network.encode(audio).audio_codes
    compiled = torch.compile(network.decode)
    encode = real_time(lambda: network.encode(audio).audio_codes)
    decode = real_time(lambda: network.decode(codes).audio_values)
    faster = real_time(lambda: compiled(codes).audio_values)
    here = f"encode {encode}, decode {decode}, compiled {faster} x real time"
    return Row("the codec in PyTorch, speed", here, f"{settings.torch_batch} clips at once, float32")


def mimi_speed(settings: Settings, model: Path) -> Row:
    """Measures transformers' Mimi."""
    import torch
    from transformers import MimiConfig, MimiModel

    network: Any = MimiModel(MimiConfig()).eval()
    network.to(device())
    for name, buffer in network.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_()
    audio = torch.randn(settings.torch_batch, 1, round(settings.seconds * 24_000), device=network.device)

    @torch.inference_mode()
    def encode() -> object:
        return network.encode(audio).audio_codes.cpu()

    def real_time() -> str:
        return f"{settings.torch_batch * settings.seconds / seconds_of(encode, settings.repeats):.0f}"

    exact = real_time()
    torch.backends.cudnn.allow_tf32 = True
    here = f"{exact} x real time, {real_time()} with cuDNN's TF32"
    return Row("Mimi in PyTorch, 32 codebooks", here, f"{settings.torch_batch} clips at once, float32")
