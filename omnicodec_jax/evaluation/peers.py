"""Other codecs to compare with, from transformers. They need the extra `torch`.

A new codec of transformers needs one more entry of `PEERS`. UniCodec is in no library and has no licence, so that it is
measured from a folder of its reconstructions.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from omnicodec_jax.data import audio as audio_files
from omnicodec_jax.errors import ConfigError, ModelError
from omnicodec_jax.evaluation.auv_codec import HUB_ID, AuvCodec
from omnicodec_jax.evaluation.systems import Codec, Opus, Output, System, fingerprint, first_line
from omnicodec_jax.version import with_extra

OPUS_BIT_RATES = (6_000, 12_000)
"""The default bit rates of Opus, bit/s."""
OPUS_RANGE = 500, 256_000
"""The lowest and the highest bit rate that libopus takes for mono, bit/s."""


class Peer(NamedTuple):
    """A codec of transformers, with `encode(…).audio_codes` and `decode(…).audio_values`."""

    title: str
    model: str
    """The name of its class in transformers."""
    hub: str
    """The hub id of its weights, the default source."""
    codebooks: Callable[[Any], tuple[int, int, float]]
    """The function from a config to the number of codebooks, the entries of each, and the frame rate in Hz."""
    count: str | None = None
    """The argument of `encode` that sets the number of codebooks; None: there is none. `bandwidth` takes kbit/s."""
    extracts: bool = False
    """Whether the codec takes the output of the feature extractor in its directory, and not the samples alone."""
    chunked: bool = False
    """Whether the codes are [chunks, B, K, N], and `decode` takes the scale of each chunk."""


def _quantizers(config: Any) -> tuple[int, int, float]:
    """Returns the codebooks of Mimi, EnCodec, X-Codec and Higgs Audio, as `Peer.codebooks` does."""
    return config.num_quantizers, config.codebook_size, float(config.frame_rate)


def _dac_codebooks(config: Any) -> tuple[int, int, float]:
    return config.n_codebooks, config.codebook_size, config.sampling_rate / config.hop_length


def _wavtokenizer_codebook(config: Any) -> tuple[int, int, float]:
    return 1, config.codebook_size, config.sampling_rate / config.hop_length


def _levels(config: Any) -> tuple[int, int, float]:
    """Returns the one codebook of X-Codec 2 and NeuCodec, whose entries are all combinations of levels."""
    return 1, math.prod(config.quantization_levels), _sample_rates(config)[0] / math.prod(config.downsampling_ratios)


def _sample_rates(config: Any) -> tuple[int, int]:
    """Returns the sample rates in Hz of a codec's input and output."""
    names = ("sampling_rate", "sample_rate", "input_sampling_rate")
    given = next(getattr(config, name) for name in names if getattr(config, name, None))
    return given, getattr(config, "output_sampling_rate", given)


PEERS = {
    "mimi": Peer("Mimi", "MimiModel", "kyutai/mimi", _quantizers, "num_quantizers"),
    "dac": Peer("DAC", "DacModel", "descript/dac_24khz", _dac_codebooks, "n_quantizers"),
    "encodec": Peer("EnCodec", "EncodecModel", "facebook/encodec_24khz", _quantizers, "bandwidth", chunked=True),
    "xcodec": Peer("X-Codec", "XcodecModel", "hf-audio/xcodec-hubert-general", _quantizers, "bandwidth"),
    "wavtokenizer": Peer(
        "WavTokenizer", "WavTokenizerModel", "swiss-ai/wavtokenizer-large-unify-40token", _wavtokenizer_codebook
    ),
    "xcodec2": Peer("X-Codec-2", "Xcodec2Model", "HKUSTAudio/xcodec2-hf", _levels, extracts=True),
    "neucodec": Peer("NeuCodec", "NeuCodecModel", "neuphonic/neucodec", _levels, extracts=True),
    "higgs": Peer(
        "Higgs-Audio-v2",
        "HiggsAudioV2TokenizerModel",
        "bosonai/higgs-audio-v2-tokenizer",
        _quantizers,
        "bandwidth",
    ),
    "qwen3tts": Peer(
        "Qwen3-TTS-12Hz",
        "Qwen3TTSTokenizerMultiCodebookModel",
        "Qwen/Qwen3-TTS-Tokenizer-12Hz",
        _quantizers,
        "num_quantizers",
    ),
}
"""The codecs by their names on the command line."""


class TransformersCodec:
    """A codec of transformers as a `systems.Codec`, at several numbers of codebooks."""

    any_length = False

    def __init__(self, peer: Peer, source: str, counts: Sequence[int]):
        """Loads the model.

        Args:
            peer: The codec.
            source: A local directory or a hub id.
            counts: Numbers of codebooks. If the codec does not offer one, the largest below it is taken.

        Raises:
            ModelError: If PyTorch is not installed, this transformers lacks the codec, or the source cannot be loaded
                or lacks weights.
        """
        model_class = _model_class(peer)
        import torch
        import transformers

        try:
            model, found = model_class.from_pretrained(source, output_loading_info=True)
            self._extract = transformers.AutoFeatureExtractor.from_pretrained(source) if peer.extracts else None
        except Exception as error:  # transformers and safetensors raise errors of any type
            raise ModelError(f"{peer.title}: {source} cannot be loaded: {first_line(error)}") from None
        if missing := found["missing_keys"]:  # transformers would leave these weights random
            raise ModelError(f"{peer.title}: {source} lacks {len(missing)} weights, {min(missing)} for one")
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._peer, self._model = peer, model.eval().to(self._device)
        whole, size, frame_rate = peer.codebooks(model.config)
        self._bandwidths: dict[int, float] = {}
        self._counts = sorted({min(count, whole) for count in counts})
        if peer.count is None:
            self._counts = [whole]
        elif peer.count == "bandwidth":  # the largest bandwidth that is not above the given number, or the smallest
            rates = map(float, model.config.target_bandwidths)
            self._bandwidths = {_num_codebooks(size, frame_rate, kbits): kbits for kbits in rates}
            offered = sorted(self._bandwidths)
            self._counts = sorted({max([k for k in offered if k <= n], default=offered[0]) for n in self._counts})
        names = [peer.title if peer.count is None else f"{peer.title}-{k}L" for k in self._counts]
        self.systems: Sequence[System] = [
            System(name, f"{source}, by transformers", (size,) * count, frame_rate)
            for name, count in zip(names, self._counts, strict=True)
        ]
        self.sample_rate, self._decoded_rate = _sample_rates(model.config)
        self._identity = f"{peer.model} {fingerprint(model)}"

    def identity(self, known: str | None = None) -> str:
        """Returns the name of the model's class, and a hash of its weights."""
        return self._identity

    def encode(self, samples: np.ndarray) -> np.ndarray:
        """Returns the codes of the last of the systems: [K, N]."""
        codes = self._encoded(samples, self._counts[-1]).audio_codes.cpu().numpy()
        return codes[0, 0] if self._peer.chunked else codes[0]

    def reconstruct(self, samples: np.ndarray, systems: Sequence[System] | None = None) -> Iterator[Output]:
        """Yields the reconstruction of each system. Each number of codebooks is encoded by itself."""
        import torch

        for system, count in zip(self.systems, self._counts, strict=True):
            if systems is not None and system not in systems:
                continue
            start = time.perf_counter()
            encoded = self._encoded(samples, count)
            scales = {"audio_scales": encoded.audio_scales} if self._peer.chunked else {}
            with torch.inference_mode():
                decoded = self._model.decode(audio_codes=encoded.audio_codes, **scales).audio_values
            result = audio_files.resample(
                decoded.reshape(-1).float().cpu().numpy(), self._decoded_rate, self.sample_rate
            )[: samples.size]
            codes = encoded.audio_codes.reshape(count, -1).cpu().numpy()
            yield Output(result, codes.shape[1] * system.bits_per_frame, codes, time.perf_counter() - start)

    def _encoded(self, samples: np.ndarray, count: int) -> Any:
        """Returns what the model's `encode` gives for a clip and a number of codebooks."""
        import torch

        if self._extract is None:
            inputs: Any = {"input_values": torch.from_numpy(samples)[None, None]}
        else:
            inputs = self._extract(samples, sampling_rate=self.sample_rate, return_tensors="pt")
        chosen = {self._peer.count: self._bandwidths.get(count, count)} if self._peer.count else {}
        with torch.inference_mode():
            given = {name: value.to(self._device) for name, value in inputs.items() if value is not None}
            return self._model.encode(**given, **chosen)


def _model_class(peer: Peer) -> Any:
    """Returns the class of a codec in transformers. Raises ModelError."""
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError:
        raise ModelError(f"{peer.title}: PyTorch is not installed; {with_extra('torch')}") from None
    try:
        return getattr(transformers, peer.model)
    except AttributeError:
        raise ModelError(f"{peer.title}: transformers {transformers.__version__} has no {peer.model}") from None
    except (ImportError, OSError, RuntimeError) as error:  # some codecs need a torchaudio of the same build as PyTorch
        raise ModelError(f"{peer.title}: {str(error).strip().splitlines()[0]}") from None


def _num_codebooks(size: int, frame_rate: float, kbits: float) -> int:
    """Returns the number of codebooks that fit into a bandwidth in kbit/s."""
    return int(1000 * kbits / (frame_rate * np.log2(size)))


class PeerRequest(NamedTuple):
    """A codec as the command line names it: NAME or NAME=SOURCE."""

    name: str
    """One of `names()`."""
    source: str
    """The directory or hub id of the codec's weights, or bit rates such as 6000+12000; empty: the default."""

    @staticmethod
    def names() -> list[str]:
        """Returns the names of all codecs."""
        return ["opus", *PEERS, "auv"]

    @classmethod
    def parse(cls, text: str) -> "PeerRequest":
        """Returns the request that a text stands for. Raises ConfigError for an unknown name or bit rate."""
        name, _, source = text.partition("=")
        if name not in cls.names():
            raise ConfigError(f"--peers {text}: must be one of {', '.join(cls.names())}, each with =SOURCE if need be")
        if name == "opus" and source:
            rates = [int(rate) if rate.isdecimal() else 0 for rate in source.split("+")]
            low, high = OPUS_RANGE
            if not all(low <= rate <= high for rate in rates):
                raise ConfigError(
                    f"--peers {text}: must be opus=BITS+BITS…, bit/s from {low} to {high}, such as 6000+12000"
                )
        return cls(name, source)

    def load(self, counts: Sequence[int]) -> Codec:
        """Loads the codec, at several numbers of codebooks if it has any. Raises ModelError."""
        if self.name == "opus":
            return Opus(sorted({int(rate) for rate in self.source.split("+")}) if self.source else OPUS_BIT_RATES)
        if self.name == "auv":
            return AuvCodec(self.source or HUB_ID)
        return TransformersCodec(PEERS[self.name], self.source or PEERS[self.name].hub, counts)
