"""What is evaluated: something that takes a clip, and gives what it makes of it and how many bits that took."""

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
from omnicodec_jax.errors import AudioError, ModelError
from omnicodec_jax.tokenizer import OmniCodecTokenizer

DESCRIPTION = ("about", "codebook_sizes", "frame_rate")
"""What a folder's system.json can say: fields of `System`."""


class System(NamedTuple):
    """A line of the tables."""

    name: str
    about: str
    codebook_sizes: tuple[int, ...] = ()
    frame_rate: float | None = None
    """Hz; None: no tokens."""

    @property
    def bits_per_frame(self) -> float:
        """Of all codebooks."""
        return sum(math.log2(size) for size in self.codebook_sizes)


class Output(NamedTuple):
    """What a system makes of a clip."""

    samples: np.ndarray
    """float32 [T] at the codec's rate, at the clip's level and in time with it."""
    bits: float
    codes: np.ndarray | None
    """[K, N], if there are any."""
    seconds: float
    """That encoding and decoding took."""


@runtime_checkable
class Codec(Protocol):
    """One model that gives one line of the tables or, at several bit rates, several.

    To add another: a class with these, and its name in `peers.Asked`.
    """

    systems: Sequence[System]
    sample_rate: int
    identity: str
    """Of the weights and all that the outputs depend on: what was reconstructed with another is done again."""

    def reconstruct(self, samples: np.ndarray) -> Iterator[Output]:
        """Of each system, what it makes of a clip float32 [T] at `sample_rate`. Raises AudioError."""
        ...


class TokenizerCodec:
    """Any model directory of this package: OmniCodec, or Mimi in our own blocks; at several numbers of codebooks."""

    def __init__(self, name: str, tokenizer: OmniCodecTokenizer, counts: Sequence[int]):
        """counts: numbers of codebooks, the semantic one included; all of them, where there are no more."""
        if not tokenizer.computes_features:
            raise ModelError(f"{name}: needs semantic features: give --encoder DIR, the encoder that computes them")
        sizes, kind = tokenizer.config.codebook_sizes, type(tokenizer.config).__name__.removesuffix("Config")
        self._tokenizer, self._peak = tokenizer, tokenizer.config.input_peak
        self.systems: Sequence[System] = [
            System(f"{name}-{k}L", f"{kind} at {tokenizer.frame_rate:g} Hz", sizes[:k], tokenizer.frame_rate)
            for k in sorted({min(count, len(sizes)) for count in counts})
        ]
        self.sample_rate = tokenizer.sample_rate
        self.identity = f"{tokenizer.model_hash} {tokenizer.encoder_hash}"

    def reconstruct(self, samples: np.ndarray) -> Iterator[Output]:
        """Encodes once, and decodes from the first codebooks."""
        start, codec = time.perf_counter(), self._tokenizer
        gain = np.float32(1 if self._peak is None else self._peak / np.abs(samples).max())
        codes = codec.encode((gain * samples)[None, None], self.sample_rate)
        encoding = time.perf_counter() - start
        for system in self.systems:
            start, some = time.perf_counter(), codes[:, : len(system.codebook_sizes)]
            decoded = codec.decode(some)[0, 0, : samples.size] / gain
            seconds = encoding + time.perf_counter() - start
            yield Output(decoded, codes.shape[2] * system.bits_per_frame, some[0], seconds)


class Opus:
    """The classical floor: libopus through FFmpeg, 24 kHz mono, variable bit rate.

    It goes no lower than about 4.3 kbit/s, whatever is asked for; what is reported is what it has used.
    """

    sample_rate = 24_000

    def __init__(self, bit_rates: Sequence[int]):
        """bit_rates: bit/s."""
        import av

        self._bit_rates = list(bit_rates)
        lines = (System(f"Opus-{rate / 1000:g}k", "libopus, variable bit rate") for rate in bit_rates)
        self.systems: Sequence[System] = list(lines)
        self.identity = f"libopus {av.__version__} {self._bit_rates}"

    def reconstruct(self, samples: np.ndarray) -> Iterator[Output]:
        """The bits are those of the packets, without the container's."""
        for bit_rate in self._bit_rates:
            start = time.perf_counter()
            stream, bits = self._encode(samples, bit_rate)
            decoded = self._decode(stream)
            yield Output(decoded, bits, None, time.perf_counter() - start)

    def _encode(self, samples: np.ndarray, bit_rate: int) -> tuple[io.BytesIO, int]:
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
    """Reconstructions that some other system has written: files named as the clips are, in any format and folders.

    Not a codec: nothing is computed. What its tokens cost can stand in FOLDER/system.json, each of it optional:
    {"about": "…", "codebook_sizes": [4096], "frame_rate": 75}
    """

    def __init__(self, name: str, folder: Path):
        """Raises ModelError if there is no such folder, or its system.json says something else."""
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
        """That of a clip: ID, ID.*, the same in DOMAIN/, or NAME, NAME.* where ID is FOLDER/NAME.

        Raises AudioError where several files could be it.
        """
        for name in (f"{domain}/{clip_id}", clip_id, clip_id.rpartition("/")[2]):
            if found := self._files.get(name):
                if len(found) > 1:
                    several = ", ".join(sorted(names.text(file.name) for file in found))
                    raise AudioError(f"the folder holds several files of this name: {several}; remove all but one")
                return min(found)
        return None


def _described(system: System, file: Path) -> System:
    """With what a file says of it, if there is one. Raises ModelError."""
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
