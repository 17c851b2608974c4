"""Other codecs, as transformers has them: Mimi, DAC, EnCodec, X-Codec; needs PyTorch (extra `torch`)."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from omnicodec_jax.errors import ConfigError, ModelError
from omnicodec_jax.evaluation.systems import Codec, Opus, Output, System

OPUS_BIT_RATES = (6_000, 12_000)


class Peer(NamedTuple):
    """How transformers' models differ from each other."""

    title: str
    model: str
    """Class of transformers."""
    hub: str
    """Where its weights are by default."""
    codebooks: Callable[[Any], tuple[int, int, float]]
    """Config → how many codebooks, entries of each, frames per second."""
    run: Callable[[Any, Any, int], tuple[Any, Any]]
    """Model, audio [1, 1, T], codebooks → codes [K, N], audio [1, 1, T']."""
    bandwidths: bool = False
    """Whether only some numbers of codebooks can be asked for, as kbit/s."""


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
    """The kbit/s that mean so many codebooks."""
    return next(kbits for kbits in map(float, config.target_bandwidths) if _codebooks(config, kbits) == count)


def _codebooks(config: Any, kbits: float) -> int:
    return int(1000 * kbits / (config.frame_rate * np.log2(config.codebook_size)))


PEERS = {
    "mimi": Peer(
        *("Mimi", "MimiModel", "kyutai/mimi"),
        lambda config: (config.num_quantizers, config.codebook_size, config.frame_rate),
        _run_mimi,
    ),
    "dac": Peer(
        *("DAC", "DacModel", "descript/dac_24khz"),
        lambda config: (config.n_codebooks, config.codebook_size, config.sampling_rate / config.hop_length),
        _run_dac,
    ),
    "encodec": Peer(
        *("EnCodec", "EncodecModel", "facebook/encodec_24khz"),
        lambda config: (config.num_quantizers, config.codebook_size, config.frame_rate),
        _run_encodec,
        bandwidths=True,
    ),
    "xcodec": Peer(
        *("X-Codec", "XcodecModel", "hf-audio/xcodec-hubert-general"),
        lambda config: (config.num_quantizers, config.codebook_size, config.frame_rate),
        _run_xcodec,
        bandwidths=True,
    ),
}


class TransformersCodec:
    """One of `PEERS`, at several numbers of codebooks."""

    def __init__(self, peer: Peer, source: str, counts: Sequence[int]):
        """source: a local directory or a hub id. Raises ModelError."""
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
        if peer.bandwidths:  # the largest that is no more than what is asked for, or else the smallest
            offered = sorted(_codebooks(model.config, float(kbits)) for kbits in model.config.target_bandwidths)
            self._counts = sorted({max([k for k in offered if k <= n], default=offered[0]) for n in self._counts})
        self.systems: Sequence[System] = [
            System(f"{peer.title}-{k}L", f"{source}, by transformers", (size,) * k, frame_rate) for k in self._counts
        ]
        self.sample_rate: int = getattr(model.config, "sampling_rate", None) or model.config.sample_rate
        self.identity = f"{peer.model} {_fingerprint(model)}"

    def reconstruct(self, samples: np.ndarray) -> Iterator[Output]:
        """Each number of codebooks by itself."""
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
    """Of all weights, without holding them twice."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class Asked(NamedTuple):
    """A peer as the command line names it: NAME or NAME=SOURCE."""

    name: str
    """One of `PEERS`, or "opus"."""
    source: str
    """Where its weights are, or bit rates such as 6000+12000; empty for the default."""

    @classmethod
    def parse(cls, text: str) -> "Asked":
        """Raises ConfigError."""
        name, _, source = text.partition("=")
        if name != "opus" and name not in PEERS:
            raise ConfigError(f"--peers {text}: must be one of opus, {', '.join(PEERS)}, each with =SOURCE if need be")
        if name == "opus" and source and not all(rate.isdecimal() for rate in source.split("+")):
            raise ConfigError(f"--peers {text}: must be opus=BITS+BITS…, bit/s such as 6000+12000")
        return cls(name, source)

    def load(self, counts: Sequence[int]) -> Codec:
        """At several numbers of codebooks, if it has any. Raises ModelError."""
        if self.name == "opus":
            return Opus([int(rate) for rate in self.source.split("+")] if self.source else OPUS_BIT_RATES)
        return TransformersCodec(PEERS[self.name], self.source or PEERS[self.name].hub, counts)
