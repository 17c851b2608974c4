"""The systems that are evaluated: codecs that reconstruct a clip and count the bits, and folders of reconstructions."""

import contextlib
import hashlib
import io
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from omnicodec_jax import names
from omnicodec_jax.data import audio as audio_files
from omnicodec_jax.data import discovery
from omnicodec_jax.errors import AudioError, ModelError, OmniCodecError
from omnicodec_jax.tokenizer import OmniCodecTokenizer

DESCRIPTION = ("about", "codebook_sizes", "frame_rate")
"""The fields of `System` that the system.json of a folder can have."""


class System(NamedTuple):
    """A system: a codec at one bit rate, which is a row of the tables."""

    name: str
    about: str
    """A few words that say what the system is."""
    codebook_sizes: tuple[int, ...] = ()
    frame_rate: float | None = None
    """The frame rate of the tokens in Hz; None: the system has no tokens."""

    @property
    def bits_per_frame(self) -> float:
        """The bits that the codes of a frame take, over all codebooks."""
        return sum(math.log2(size) for size in self.codebook_sizes)


class Output(NamedTuple):
    """A system's reconstruction of a clip."""

    samples: np.ndarray
    """The reconstruction: float32 [T] at the codec's sample rate, at the level of the clip and without delay."""
    bits: float
    """The number of bits that the decoder needs."""
    codes: np.ndarray | None
    """The codes [K, N]; None: the system has none."""
    seconds: float
    """The seconds that encoding and decoding took."""


@runtime_checkable
class Codec(Protocol):
    """A codec that can be evaluated, at one bit rate or at several, each of which is a system.

    To add a codec, write a class with these members, and add its name to `peers.PeerRequest`.
    """

    systems: Sequence[System]
    """The codec at each bit rate, the one with the most codebooks last."""
    sample_rate: int
    any_length: bool
    """Whether memory suffices for a clip of any length."""

    def identity(self, known: str | None = None) -> str:
        """Returns a text that changes if the weights change, or anything else that the outputs depend on.

        Clips that were reconstructed with another identity are reconstructed again.

        Args:
            known: The identity of an earlier reconstruction. It is returned if an earlier version of this package gave
                it to this very codec.
        """
        ...

    def encode(self, samples: np.ndarray) -> np.ndarray | None:
        """Returns the codes [K, N] of the last of the systems, or None if it has no codes.

        Args:
            samples: float32 [T] at `sample_rate`.

        Raises:
            AudioError: If the clip cannot be encoded.
        """
        ...

    def reconstruct(self, samples: np.ndarray, systems: Sequence[System] | None = None) -> Iterator[Output]:
        """Yields the reconstruction of each system.

        Args:
            samples: float32 [T] at `sample_rate`.
            systems: Some of `systems`; None: all.

        Raises:
            AudioError: If the clip cannot be encoded.
        """
        ...


@contextlib.contextmanager
def told_faults() -> Iterator[None]:
    """A context in which any error of a codec becomes an AudioError.

    Packages raise errors of any type for a clip that they cannot process, and may still process the others.
    """
    try:
        yield
    except OmniCodecError:
        raise
    except Exception as error:
        raise AudioError(f"{type(error).__name__}: {error}") from error


def outputs(codec: Codec, samples: np.ndarray, systems: Sequence[System] | None = None) -> Iterator[Output]:
    """Yields the outputs of `codec.reconstruct`. Any error of it becomes an AudioError."""
    with told_faults():
        yield from codec.reconstruct(samples, systems)


def first_line(error: Exception) -> str:
    """Returns the first line of an error that is not empty; for an error without a message, the name of its class."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


def fingerprint(model: Any) -> str:
    """Returns a hash of all weights of a PyTorch model, without holding them twice in memory."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class TokenizerCodec:
    """A model directory of this package, OmniCodec or Mimi, at several numbers of codebooks."""

    any_length = True

    def __init__(self, name: str, tokenizer: OmniCodecTokenizer, counts: Sequence[int]):
        """Describes the systems of a model.

        Args:
            name: The name of the model, with which the names of its systems begin.
            tokenizer: The model.
            counts: Numbers of codebooks, the semantic one included. For a larger number, all codebooks are taken.

        Raises:
            ModelError: If the model needs semantic features and has no encoder for them.
        """
        if not tokenizer.computes_features:
            raise ModelError(f"{name}: needs semantic features: give --encoder DIR, the encoder that computes them")
        sizes, kind = tokenizer.config.codebook_sizes, type(tokenizer.config).__name__.removesuffix("Config")
        self._tokenizer, self._peak = tokenizer, tokenizer.config.input_peak
        self._identities = dict[str | None, str]()
        self.systems: Sequence[System] = [
            System(f"{name}-{k}L", f"{kind} at {tokenizer.frame_rate:g} Hz", sizes[:k], tokenizer.frame_rate)
            for k in sorted({min(count, len(sizes)) for count in counts})
        ]
        self.sample_rate = tokenizer.sample_rate

    def identity(self, known: str | None = None) -> str:
        """Returns the hashes of the model and of its encoder; those of version 0.1 if `known` has them."""
        if known not in self._identities:  # hashing the encoder takes as long as a clip of a second
            model, _, encoder = (known or "").partition(" ")
            hashes = self._tokenizer.model_hash_as(model or None), self._tokenizer.encoder_hash_as(encoder or None)
            self._identities[known] = "{} {}".format(*hashes)
        return self._identities[known]

    def _gain(self, samples: np.ndarray) -> np.float32:
        """Returns the gain that a clip is encoded with."""
        return np.float32(1 if self._peak is None else self._peak / np.abs(samples).max())

    def _all_codes(self, samples: np.ndarray) -> np.ndarray:
        """Returns all codes of a clip: [1, K, N]."""
        return self._tokenizer.encode((self._gain(samples) * samples)[None, None], self.sample_rate)

    def encode(self, samples: np.ndarray) -> np.ndarray:
        """Returns the codes of the last of the systems: [K, N]."""
        return self._all_codes(samples)[0, : len(self.systems[-1].codebook_sizes)]

    def reconstruct(self, samples: np.ndarray, systems: Sequence[System] | None = None) -> Iterator[Output]:
        """Yields the reconstruction of each system. The clip is encoded once, and decoded from the first codebooks."""
        start, gain = time.perf_counter(), self._gain(samples)
        codes = self._all_codes(samples)
        encoding = time.perf_counter() - start
        for system in self.systems if systems is None else systems:
            start, some = time.perf_counter(), codes[:, : len(system.codebook_sizes)]
            decoded = self._tokenizer.decode(some)[0, 0, : samples.size] / gain
            seconds = encoding + time.perf_counter() - start
            yield Output(decoded, codes.shape[2] * system.bits_per_frame, some[0], seconds)


class Opus:
    """Opus, a classical codec to compare with: libopus through FFmpeg, 24 kHz mono, variable bit rate.

    It uses at least about 4.3 kbit/s, even if a lower bit rate is set. Reports have the bits that it has really used.
    """

    sample_rate = 24_000
    any_length = True

    def __init__(self, bit_rates: Sequence[int]):
        """Describes a system for each bit rate. `bit_rates` are in bit/s."""
        import av

        self._bit_rates = list(bit_rates)
        lines = (System(f"Opus-{rate / 1000:g}k", "libopus, variable bit rate") for rate in bit_rates)
        self.systems: Sequence[System] = list(lines)
        self._identity = f"libopus {av.__version__} {self._bit_rates}"

    def identity(self, known: str | None = None) -> str:
        """Returns the version of FFmpeg's bindings, and the bit rates."""
        return self._identity

    def encode(self, samples: np.ndarray) -> None:
        """Returns None, since Opus has no codes."""

    def reconstruct(self, samples: np.ndarray, systems: Sequence[System] | None = None) -> Iterator[Output]:
        """Yields the reconstruction at each bit rate. The bits of packets count, those of the container do not."""
        for system, bit_rate in zip(self.systems, self._bit_rates, strict=True):
            if systems is not None and system not in systems:
                continue
            start = time.perf_counter()
            stream, bits = self._stream(samples, bit_rate)
            decoded = self._decode(stream)
            yield Output(decoded, bits, None, time.perf_counter() - start)

    def _stream(self, samples: np.ndarray, bit_rate: int) -> tuple[io.BytesIO, int]:
        import av

        file, bits = io.BytesIO(), 0
        with av.open(file, "w", format="ogg") as container:
            stream = container.add_stream("libopus", rate=self.sample_rate, layout="mono", options={"vbr": "on"})
            stream.bit_rate = bit_rate
            frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
            frame.sample_rate = self.sample_rate
            for packet in (*stream.encode(frame), *stream.encode(None)):
                bits += 8 * packet.size
                container.mux(packet)
        file.seek(0)
        return file, bits

    def _decode(self, file: io.BytesIO) -> np.ndarray:
        import av

        container: Any
        with av.open(file) as container:
            stream = container.streams.audio[0]
            decoded = np.concatenate([frame.to_ndarray().reshape(-1) for frame in container.decode(stream)])
            return audio_files.resample(decoded.astype(np.float32, copy=False), stream.rate, self.sample_rate)


class Folder:
    """A folder of reconstructions by some other system: files that are named like the clips, in any format.

    FOLDER/system.json may describe the system's tokens: {"about": "…", "codebook_sizes": [4096], "frame_rate": 75}. All
    of these fields are optional.
    """

    def __init__(self, name: str, folder: Path):
        """Lists the files of a folder. Raises ModelError if there is no such folder, or its system.json is wrong."""
        if not folder.is_dir():
            raise ModelError(f"--reconstructions {name}={folder}: no such directory")
        self.system = _described(System(name, f"reconstructions in {folder.name}/"), folder / "system.json")
        self._folder = folder
        self._files: defaultdict[str, set[Path]] = defaultdict(set)
        for file in discovery.find(folder):
            inside = file.relative_to(folder)
            for known in (inside, inside.with_suffix("")):
                self._files[names.text(known.as_posix())].add(file)

    def file(self, clip_id: str, domain: str) -> Path | None:
        """Returns the file of a clip, or None if there is none.

        The file is called ID or ID.*, alone or in the folder DOMAIN; or NAME or NAME.*, if the clip's id is
        FOLDER/NAME. Raises AudioError if several files have this name.
        """
        for name in (f"{domain}/{clip_id}", clip_id, clip_id.rpartition("/")[2]):
            if found := self._files.get(name):
                if len(found) > 1:
                    several = ", ".join(sorted(names.text(file.name) for file in found))
                    raise AudioError(f"the folder holds several files of this name: {several}; remove all but one")
                return min(found)
        return None


def _described(system: System, file: Path) -> System:
    """Returns a system with the description in a file, if the file exists. Raises ModelError."""
    if not file.is_file():
        return system
    try:
        known = json.loads(file.read_text())
        about, sizes, rate = (known.pop(key, default) for key, default in zip(DESCRIPTION, system[1:], strict=True))
        valid = not known and isinstance(about, str) and all(type(size) is int and size > 1 for size in sizes)
        if not valid or (rate is not None and not 0 < rate < math.inf):
            raise ValueError(f"has {sorted(known)}" if known else "a value of another kind")
    except (ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"{file}: must be an object with some of {', '.join(DESCRIPTION)}: {error}") from None
    return System(system.name, about, tuple(sizes), rate)
