"""What the codecs use of torchaudio, which has no build for every PyTorch; in its place where it cannot be loaded."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def install() -> None:
    """Puts the stand-in where torchaudio would be, unless that can be loaded.

    It has to be there before transformers is imported, which then finds out what there is.
    """
    try:
        if importlib.util.find_spec("torchaudio") is None:
            raise ImportError
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        names = ("torchaudio", "torchaudio.functional", "torchaudio.compliance", "torchaudio.compliance.kaldi")
        modules = {name: types.ModuleType(name) for name in names}
        for name, module in modules.items():
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(modules[parent], child, module)
        modules["torchaudio.functional"].resample = _resample
        modules["torchaudio.compliance.kaldi"].fbank = _fbank
        sys.modules.update(modules)


def _resample(waveform: torch.Tensor, orig_freq: int, new_freq: int) -> torch.Tensor:
    import torch

    size = round(waveform.shape[-1] * new_freq / orig_freq)
    return torch.nn.functional.interpolate(waveform, size=size, mode="linear")


def _fbank(waveform: torch.Tensor, *, num_mel_bins: int, frame_length: float, frame_shift: float, **_) -> torch.Tensor:
    """The logarithmic power of as many bins: [frames, bins]. Lengths are in ms at 16 kHz."""
    import torch

    frames = waveform[0].unfold(0, round(16 * frame_length), round(16 * frame_shift))
    return torch.log(torch.fft.rfft(frames).abs().square()[:, :num_mel_bins] + 1)
