"""AUV (arXiv 2509.21968), a codec with one codebook of 20,480 entries at 50 Hz, through the package `auv`."""

# pyright: reportMissingImports=false
# The package is optional.

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omnicodec_jax.errors import ModelError
from omnicodec_jax.evaluation.systems import Output, System, fingerprint, first_line

HUB_ID, FILE = "SWivid/AUV", "auv.pt"
HOP = 320


class AuvCodec:
    """AUV as a `systems.Codec`. It is not told the domain of a clip, and so uses its whole codebook."""

    any_length = False
    sample_rate = 16_000

    def __init__(self, source: str):
        """Loads the model from a file that holds no code.

        Args:
            source: A checkpoint, a directory with `auv.pt`, or a hub id.

        Raises:
            ModelError: If the package or PyTorch is not installed, or the source cannot be loaded.
        """
        try:
            from auv.model import AUV
        except (ImportError, OSError) as error:  # a torchaudio for another PyTorch raises OSError
            raise ModelError(
                f"AUV: {str(error).splitlines()[0]}; pip install --no-deps auv einops, and the torchaudio that goes "
                "with your PyTorch"
            ) from None
        model: Any = AUV()
        try:
            model.from_pretrained(str(_checkpoint(source)))
        except Exception as error:  # PyTorch and the package raise errors of any type
            raise ModelError(f"AUV: {source} cannot be loaded: {first_line(error)}") from None
        self._model = model.eval()
        size = model.tokenizer.vq.quantizers[0].codebook_size
        self.systems: Sequence[System] = [System("AUV", f"{source}, by auv", (size,), self.sample_rate / HOP)]
        self._identity = f"AUV {fingerprint(model)}"

    def identity(self, known: str | None = None) -> str:
        """Returns a hash of the weights."""
        return self._identity

    def _encoded(self, samples: np.ndarray) -> dict[str, Any]:
        import torch

        with torch.inference_mode():
            return self._model.encode({"sample": torch.from_numpy(samples)[None], "sample_rate": self.sample_rate})

    def encode(self, samples: np.ndarray) -> np.ndarray:
        """Returns the codes: [1, N]."""
        return self._encoded(samples)["tokens"].reshape(1, -1).cpu().numpy()

    def reconstruct(self, samples: np.ndarray, systems: Sequence[System] | None = None) -> Iterator[Output]:
        """Yields the reconstruction of a clip."""
        import torch

        start = time.perf_counter()
        encoded = self._encoded(samples)
        with torch.inference_mode():
            decoded = self._model.decode(encoded["quantized"])
        codes = encoded["tokens"].reshape(1, -1).cpu().numpy()
        result = decoded.reshape(-1)[: samples.size].float().cpu().numpy()
        yield Output(result, codes.size * self.systems[0].bits_per_frame, codes, time.perf_counter() - start)


def _checkpoint(source: str) -> Path:
    """Returns the file of a checkpoint, which is downloaded if the source is a hub id."""
    path = Path(source)
    if path.exists():
        return path / FILE if path.is_dir() else path
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(source, FILE))
