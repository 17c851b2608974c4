"""Other codecs to compare with, from transformers: Mimi, DAC, EnCodec, X-Codec. They need the extra `torch`."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from omnicodec_jax.errors import ConfigError, ModelError
from omnicodec_jax.evaluation.systems import Codec, Opus, Output, System

OPUS_BIT_RATES = (6_000, 12_000)
"""The default bit rates of Opus, bit/s."""


class Peer(NamedTuple):
    """A codec of transformers, with what differs between its codecs."""

    title: str
    model: str
    """The name of its class in transformers."""
    hub: str
    """The hub id of its weights, the default source."""
    codebooks: Callable[[Any], tuple[int, int, float]]
    """Returns from a config the number of codebooks, the entries of each, and the frame rate in Hz."""
    run: Callable[[Any, Any, int], tuple[Any, Any]]
    """Takes a model, audio [1, 1, T] and a number of codebooks. Returns codes [K, N] and decoded audio [1, 1, T']."""
    has_bandwidths: bool = False
    """Whether only some numbers of codebooks can be chosen, by their bit rates."""


# -- One function for each class: `Peer.run`


def _run_mimi(model: Any, audio: Any, count: int) -> tuple[Any, Any]:
    codes = model.encode(audio, num_quantizers=count).audio_codes
    return codes[0], model.decode(codes).audio_values


def _run_dac(model: Any, audio: Any, count: int) -> tuple[Any, Any]:
    encoded = model.encode(audio, n_quantizers=count)
    return encoded.audio_codes[0], model.decode(encoded.quantized_representation).audio_values[:, None]


def _run_encodec(model: Any, audio: Any, count: int) -> tuple[Any, Any]:
    encoded = model.encode(audio, bandwidth=_bandwidth(model.config, count))
    return encoded.audio_codes[0, 0], model.decode(encoded.audio_codes, encoded.audio_scales).audio_values


def _run_xcodec(model: Any, audio: Any, count: int) -> tuple[Any, Any]:
    codes = model.encode(audio, bandwidth=_bandwidth(model.config, count)).audio_codes
    return codes[0], model.decode(codes).audio_values


def _bandwidth(config: Any, count: int) -> float:
    """Returns the bandwidth of a number of codebooks, in kbit/s."""
    return next(kbits for kbits in map(float, config.target_bandwidths) if _num_codebooks(config, kbits) == count)


def _num_codebooks(config: Any, kbits: float) -> int:
    """Returns the number of codebooks that a bandwidth in kbit/s has room for."""
    return int(1000 * kbits / (config.frame_rate * np.log2(config.codebook_size)))


def _quantizers(config: Any) -> tuple[int, int, float]:
    """Returns the codebooks of Mimi, EnCodec and X-Codec, as `Peer.codebooks` does."""
    return config.num_quantizers, config.codebook_size, float(config.frame_rate)


def _dac_codebooks(config: Any) -> tuple[int, int, float]:
    return config.n_codebooks, config.codebook_size, config.sampling_rate / config.hop_length


PEERS = {
    "mimi": Peer("Mimi", "MimiModel", "kyutai/mimi", _quantizers, _run_mimi),
    "dac": Peer("DAC", "DacModel", "descript/dac_24khz", _dac_codebooks, _run_dac),
    "encodec": Peer(
        "EnCodec", "EncodecModel", "facebook/encodec_24khz", _quantizers, _run_encodec, has_bandwidths=True
    ),
    "xcodec": Peer(
        "X-Codec", "XcodecModel", "hf-audio/xcodec-hubert-general", _quantizers, _run_xcodec, has_bandwidths=True
    ),
}
"""The codecs by the names that the command line has for them."""


class TransformersCodec:
    """A codec of transformers at several numbers of codebooks, as `systems.Codec` wants it."""

    def __init__(self, peer: Peer, source: str, counts: Sequence[int]):
        """Loads the model.

        Args:
            peer: Which codec.
            source: A local directory or a hub id.
            counts: Numbers of codebooks. The largest that the codec offers and that is no larger is taken for each.

        Raises:
            ModelError: If PyTorch is not installed, or the source cannot be loaded.
        """
        try:
            import torch
            import transformers
        except ImportError:
            raise ModelError(
                f"{peer.title}: PyTorch is not installed; in the checkout, pip install -e '.[torch]'"
            ) from None
        try:
            model = getattr(transformers, peer.model).from_pretrained(source)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"{peer.title}: {source} cannot be loaded: {reason}") from None
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._peer, self._model = peer, model.eval().to(self._device)
        whole, size, frame_rate = peer.codebooks(model.config)
        self._counts = sorted({min(count, whole) for count in counts})
        if peer.has_bandwidths:  # the largest that is no larger than the given one, or else the smallest
            offered = sorted(_num_codebooks(model.config, float(kbits)) for kbits in model.config.target_bandwidths)
            self._counts = sorted({max([k for k in offered if k <= n], default=offered[0]) for n in self._counts})
        self.systems: Sequence[System] = [
            System(f"{peer.title}-{k}L", f"{source}, by transformers", (size,) * k, frame_rate) for k in self._counts
        ]
        self.sample_rate: int = getattr(model.config, "sampling_rate", None) or model.config.sample_rate
        self._identity = f"{peer.model} {_fingerprint(model)}"

    def identity(self, known: str | None = None) -> str:
        """Returns the name of the model's class, and a hash of its weights."""
        return self._identity

    def reconstruct(self, samples: np.ndarray) -> Iterator[Output]:
        """Yields the reconstruction of each system. Each number of codebooks is encoded by itself."""
        import torch

        audio = torch.from_numpy(samples)[None, None].to(self._device)
        for system, count in zip(self.systems, self._counts, strict=True):
            start = time.perf_counter()
            with torch.inference_mode():
                codes, decoded = self._peer.run(self._model, audio, count)
            result = decoded.reshape(-1)[: samples.size].float().cpu().numpy()
            bits = codes.shape[1] * system.bits_per_frame
            yield Output(result, bits, codes.cpu().numpy(), time.perf_counter() - start)


def _fingerprint(model: Any) -> str:
    """Returns a hash of all weights, without holding them twice in memory."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class PeerRequest(NamedTuple):
    """A codec as the command line names it: NAME or NAME=SOURCE."""

    name: str
    """One of the names in `PEERS`, or "opus"."""
    source: str
    """The directory or hub id of its weights, or bit rates such as 6000+12000; empty: the default."""

    @classmethod
    def parse(cls, text: str) -> "PeerRequest":
        """Returns the request that a text stands for. Raises ConfigError for an unknown name or bit rate."""
        name, _, source = text.partition("=")
        if name != "opus" and name not in PEERS:
            raise ConfigError(f"--peers {text}: must be one of opus, {', '.join(PEERS)}, each with =SOURCE if need be")
        if name == "opus" and source and not all(rate.isdecimal() for rate in source.split("+")):
            raise ConfigError(f"--peers {text}: must be opus=BITS+BITS…, bit/s such as 6000+12000")
        return cls(name, source)

    def load(self, counts: Sequence[int]) -> Codec:
        """Loads the codec, at several numbers of codebooks if it has any. Raises ModelError."""
        if self.name == "opus":
            return Opus([int(rate) for rate in self.source.split("+")] if self.source else OPUS_BIT_RATES)
        return TransformersCodec(PEERS[self.name], self.source or PEERS[self.name].hub, counts)
