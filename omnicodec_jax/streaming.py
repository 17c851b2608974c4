"""Live streams: audio out a frame at a time, tokens out as soon as what they depend on has been heard.

Many sessions run side by side as rows of one batch. Offline, `OmniCodecTokenizer` runs the same models in longer
blocks; audio and acoustic codes are the same up to rounding. Semantic features are not: offline they see the whole
clip, here windows by themselves.

A session may go on for ever: what is held of it, and what a chunk costs, do not depend on how long it has lasted.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omnicodec_jax import dsp, model_directory
from omnicodec_jax.config import CodecConfig, MimiConfig
from omnicodec_jax.data.audio import fit_length
from omnicodec_jax.data.levels import as_float, check_range
from omnicodec_jax.errors import AudioError, ModelError
from omnicodec_jax.lanes import advance
from omnicodec_jax.models.codec import OmniCodec
from omnicodec_jax.tokenizer import OmniCodecTokenizer, encode_block

Array = np.ndarray | jax.Array

NOT_YET = -1
"""In place of codes that a session does not have yet, where another has more."""


@lru_cache
def program(config: CodecConfig | MimiConfig, method: Any) -> Any:
    """A step of a causal method of a model, compiled once for all streams."""
    return jax.jit(partial(advance, model_directory.build(config), method), donate_argnums=1)


class Stream:
    """A causal method of a model, applied to one block after the other of many rows."""

    def __init__(self, tokenizer: OmniCodecTokenizer, method: Any):
        self._step = program(tokenizer.config, method)
        self._variables, self._state = tokenizer.variables, None

    def __call__(self, fresh: np.ndarray | None, held: np.ndarray | None, *inputs: Array) -> jax.Array:
        """fresh [B]: rows that begin anew. held [B]: rows that stay as they are. None: no row."""
        if self._state is None:
            rows = np.zeros(len(inputs[0]), np.bool_)
            shapes = jax.eval_shape(self._step, self._variables, {}, rows, None, *inputs)[1]
            self._state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        output, self._state = self._step(self._variables, self._state, fresh, held, *inputs)
        return output


def chosen(sessions: Iterable[int], count: int) -> list[int]:
    """Numbers of sessions, each once. Raises ModelError for one that there is not."""
    numbers = sorted({int(number) for number in sessions})
    if wrong := [number for number in numbers if not 0 <= number < count]:
        raise ModelError(f"session {wrong[0]}: there are {count}, counted from 0")
    return numbers


class StreamingDecoder:
    """Decodes live streams, a frame or more at a time, without delay.

    Examples:
        >>> import numpy as np
        >>> from omnicodec_jax.tokenizer import OmniCodecTokenizer
        >>> decode = StreamingDecoder(OmniCodecTokenizer.from_pretrained("models/untrained"), sessions=2)
        >>> codes = np.zeros((2, 9, 1), np.int32)
        >>> decode(codes).shape  # [2, 9, 1] → [2, 1, hop]: 80 ms of both
        (2, 1, 1920)
        >>> decode(codes, reset=[1]).shape  # session 1 begins anew with this frame
        (2, 1, 1920)
    """

    def __init__(self, tokenizer: OmniCodecTokenizer, sessions: int = 1):
        """Begins so many streams.

        Args:
            tokenizer: The codec.
            sessions: Streams side by side, rows of one batch.
        """
        self._tokenizer, self._sessions = tokenizer, sessions
        self._stream = Stream(tokenizer, type(model_directory.build(tokenizer.config)).decode)

    def __call__(self, codes: Array, reset: Iterable[int] = ()) -> np.ndarray:
        """Decodes the next frames of all sessions.

        Args:
            codes: Integers [sessions, k, n] of the first k ≤ K codebooks; every k and n is compiled once.
            reset: Numbers of the sessions that begin anew with these frames.

        Returns:
            Audio float32 [sessions, 1, n · hop] at the model's rate.

        Raises:
            TokenError: If these are no codes of this model.
            ModelError: If they are of another number of sessions, or one is reset that there is not.
        """
        codes = np.asarray(codes)
        self._tokenizer.check_codes(codes)
        if codes.shape[0] != self._sessions:
            raise ModelError(f"codes of {codes.shape[0]} sessions: this decoder has {self._sessions}")
        fresh = np.zeros(self._sessions, np.bool_)
        fresh[chosen(reset, self._sessions)] = True
        return np.asarray(self._stream(fresh if fresh.any() else None, None, codes.astype(np.int32)))


@dataclasses.dataclass
class Session:
    """What of one stream of audio may still be needed, and how far it has come."""

    audio: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))
    """Samples from `start` of the stream on."""
    start: int = 0
    heard: int = 0
    """Samples that windows have covered."""
    hidden: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """Semantic branch [n, D] at the vectors from number `first` on."""
    first: int = 0
    loudest: float = -math.inf
    """log10 of the loudest mel bin so far."""
    frames: int = 0
    """Whose codes are out."""

    @property
    def end(self) -> int:
        """Samples of the stream so far."""
        return self.start + self.audio.size

    @property
    def vectors(self) -> int:
        """Of the semantic branch, so far."""
        return self.first + len(self.hidden)

    def add(self, hidden: np.ndarray) -> None:
        """The next vectors [n, D] of the semantic branch."""
        self.hidden = np.concatenate([self.hidden.reshape(-1, hidden.shape[1]), hidden])

    def forget(self, sample: int, vector: int) -> None:
        """What comes before these is needed no more. Of what is kept, a copy: a view would keep the rest, too."""
        dropped = min(max(0, sample - self.start), self.audio.size)
        self.audio, self.start = self.audio[dropped:].copy(), self.start + dropped
        dropped = min(max(0, vector - self.first), max(0, len(self.hidden) - 1))  # the last stands for those after it
        self.hidden, self.first = self.hidden[dropped:].copy(), self.first + dropped


class StreamingEncoder:
    """Encodes live streams: codes come out as soon as the audio that they depend on has been heard.

    That is `look_ahead` seconds after a frame's end, at most. Semantic features are computed in windows, each as a clip
    of its own but for its loudness, which is measured by the loudest so far; without a semantic branch there are no
    windows and no look-ahead.

    Examples:
        >>> import numpy as np
        >>> from omnicodec_jax.tokenizer import OmniCodecTokenizer
        >>> encode = StreamingEncoder(OmniCodecTokenizer.from_pretrained("models/untrained"))
        >>> encode(np.full((1, 1, 24_000), 0.1, np.float32)).shape  # after 1 s nothing is certain yet
        (1, 9, 0)
        >>> encode.flush().shape  # the rest; other streams may follow
        (1, 9, 13)

    A session may begin anew while the others go on: `encode.flush([3])` gives the rest of session 3, and
    `encode(chunk, reset=[3])` begins it with this chunk. From then on one session may have more frames by now than
    another. The missing codes are `NOT_YET`, -1, at the end of its row: `codes[3][:, codes[3, 0] >= 0]` are those that
    there are.
    """

    def __init__(self, tokenizer: OmniCodecTokenizer, sessions: int = 1):
        """Begins so many streams.

        Args:
            tokenizer: The codec; one that computes its semantic features, if it needs them.
            sessions: Streams side by side, rows of one batch.

        Raises:
            ModelError: If semantic features would have to be given.
        """
        if not tokenizer.computes_features:
            raise ModelError("this model needs semantic features: load it with the encoder that computes them")
        self._tokenizer, self._sessions = tokenizer, [Session() for _ in range(sessions)]
        source = None if tokenizer.semantic is None else tokenizer.semantic.source
        # As many vectors as fill whole seconds: stacked log-mel frames are 80 ms apart.
        seconds, self._vectors = {None: (0, 0), "log_mel": (2, 25)}.get(source, (1, 13))
        self._window = seconds * tokenizer.sample_rate
        self._encode = Stream(tokenizer, encode_block)
        self._hide = Stream(tokenizer, OmniCodec.semantic_hidden) if seconds else None

    @property
    def look_ahead(self) -> float:
        """Seconds after a frame's end that its codes may depend on: the rest of a window, and the next vector's."""
        if not self._window:
            return 0.0
        seconds = self._window / self._tokenizer.sample_rate
        return seconds + seconds / self._vectors

    def __call__(self, audio: Array, reset: Iterable[int] = ()) -> np.ndarray:
        """Encodes the next samples of all sessions, as far as they are certain.

        Args:
            audio: float32 [sessions, 1, any], full scale ±1, at the model's rate.
            reset: Numbers of the sessions that begin anew with these samples; what they still owe is lost.

        Returns:
            Codes int32 [sessions, K, n] of the n ≥ 0 frames that have become certain, `NOT_YET` where a session has
            fewer than another.

        Raises:
            AudioError: If the shape is another, or samples are NaN, infinite or out of range.
            ModelError: If a session is reset that there is not.
        """
        audio = as_float(audio)
        if audio.ndim != 3 or audio.shape[:2] != (len(self._sessions), 1):
            raise AudioError(f"audio of shape {list(audio.shape)}: must be [{len(self._sessions)}, 1, T]")
        check_range(audio)
        for row in chosen(reset, len(self._sessions)):
            self._sessions[row] = Session()
        for session, samples in zip(self._sessions, audio[:, 0], strict=True):
            session.audio = np.concatenate([session.audio, samples])
        while self._window and (rows := [row for row, session in enumerate(self._sessions) if self._whole(session)]):
            self._listen(rows)
        return self._emit([self._certain(session) for session in self._sessions])

    def flush(self, sessions: Iterable[int] | None = None) -> np.ndarray:
        """Encodes what is left, the last frame filled up with silence. The next samples begin new streams.

        Args:
            sessions: Numbers of the sessions that end; None: all of them.

        Returns:
            Codes int32 [sessions, K, n] of the frames that were not certain yet, `NOT_YET` where a session has fewer
            than another.

        Raises:
            ModelError: If one ends that there is not.
        """
        count = len(self._sessions)
        ending = list(range(count)) if sessions is None else chosen(sessions, count)
        behind = [row for row in ending if self._sessions[row].heard < self._sessions[row].end]
        if self._window and behind:
            self._listen(behind)
        wanted = [session.frames for session in self._sessions]
        for row in ending:
            wanted[row] = self._tokenizer.num_frames(self._sessions[row].end)
        codes = self._emit(wanted)
        for row in ending:
            self._sessions[row] = Session()
        return codes

    def _whole(self, session: Session) -> bool:
        """Whether the next window is there."""
        return session.heard + self._window <= session.end

    def _certain(self, session: Session) -> int:
        """Frames whose samples, and the vectors around them, are there."""
        hop = self._tokenizer.hop_length
        whole = session.end // hop
        if not self._window:
            return whole
        # Frame n lies at (n + 0.5)·hop, vector i at (i + 0.5)·window / vectors: no frame may lie behind the last one.
        reach = (2 * session.vectors - 1) * self._window - hop * self._vectors
        return min(whole, max(0, reach // (2 * hop * self._vectors) + 1))

    def _listen(self, rows: list[int]) -> None:
        """The next window's vectors of some sessions; where samples are missing, it is filled up with silence."""
        extract = self._tokenizer.extract
        assert extract is not None
        assert self._hide is not None
        mels = []
        for session in map(self._sessions.__getitem__, rows):
            window = fit_length(session.audio[session.heard - session.start :], self._window)
            mel = extract.log10_mel(window, self._tokenizer.sample_rate)
            session.loudest = max(session.loudest, float(mel.max()))
            mels.append(dsp.normalize_log_mel(mel, np.float32(session.loudest)))
        features = dict(extract.features(zip(rows, mels, strict=True)))
        silent = np.zeros_like(features[rows[0]])
        stacked = np.stack([features.get(row, silent) for row in range(len(self._sessions))])
        hidden = np.asarray(self._hide(*self._states(rows, lambda session: session.heard == 0), stacked))
        for row in rows:
            self._sessions[row].add(hidden[row])
            self._sessions[row].heard += self._window

    def _states(self, rows: list[int], begins: Callable[[Session], bool]) -> tuple[np.ndarray, np.ndarray]:
        """Which rows begin anew and which are held, when some take a step.

        Given always, even where they name no row: with or without them a compiler may round differently, and a
        session's codes must not tell what the others do.
        """
        fresh, held = np.zeros((2, len(self._sessions)), np.bool_)
        held[:] = True
        for row in rows:
            fresh[row], held[row] = begins(self._sessions[row]), False
        return fresh, held

    def _emit(self, wanted: list[int]) -> np.ndarray:
        """Codes up to so many frames of each session."""
        hop, count = self._tokenizer.hop_length, len(self._sessions)
        missing = [max(0, frames - session.frames) for frames, session in zip(wanted, self._sessions, strict=True)]
        codes = np.full((count, self._tokenizer.num_quantizers, max(missing)), NOT_YET, np.int32)
        for step in range(max(missing)):
            rows = [row for row in range(count) if step < missing[row]]
            blocks, lengths = np.zeros((count, 1, hop), np.float32), np.zeros(count, np.int32)
            hidden = np.zeros((count, 1, self._sessions[rows[0]].hidden.shape[1]), np.float32)
            for row in rows:
                session = self._sessions[row]
                samples = session.audio[session.frames * hop - session.start :][:hop]
                blocks[row, 0, : samples.size], lengths[row] = samples, samples.size
                if self._window:
                    hidden[row, 0] = self._between(session)
            inputs = (blocks, lengths, hidden) if self._window else (blocks, lengths)
            output = np.asarray(self._encode(*self._states(rows, lambda session: session.frames == 0), *inputs))
            for row in rows:
                codes[row, :, step] = output[row, :, 0]
                self._sessions[row].frames += 1
        for session in self._sessions:
            start = session.frames * hop
            if self._window:
                session.forget(min(start, session.heard), self._place(session.frames)[0])
            else:
                session.forget(start, 0)
        return codes

    def _place(self, frame: int) -> tuple[int, np.float32]:
        """Where a frame lies between vectors: the number of the one before it, and the weight of the one after."""
        cell = 2 * self._window
        position = max(0, (2 * frame + 1) * self._tokenizer.hop_length * self._vectors - self._window)
        return position // cell, np.float32(position % cell / cell)

    def _between(self, session: Session) -> np.ndarray:
        """Semantic branch [D] at a session's next frame, interpolated between the vectors around it."""
        left, weight = self._place(session.frames)
        before, after = (min(number, session.vectors - 1) - session.first for number in (left, left + 1))
        return session.hidden[before] * (1 - weight) + session.hidden[after] * weight
