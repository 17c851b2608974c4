"""Live streams: audio comes out a frame at a time, and codes as soon as the audio that they depend on is there.

Many sessions run side by side as rows of one batch. `OmniCodecTokenizer` runs the same models offline in longer blocks.
Audio and acoustic codes are the same up to rounding, and so are Whisper's features, which are always computed in
windows. Other semantic features differ: offline they are normalised over the whole clip, and here over windows.

A session may go on for ever: its memory, and the time that a chunk takes, do not grow.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from omnicodec_jax import dsp, exact
from omnicodec_jax.blocks import Array, encode_block
from omnicodec_jax.data.levels import as_float, check_range
from omnicodec_jax.errors import AudioError, ModelError, TokenError
from omnicodec_jax.given import as_array, whole_number, whole_numbers
from omnicodec_jax.lanes import stream_step
from omnicodec_jax.models.codec import OmniCodec
from omnicodec_jax.tokenizer import OmniCodecTokenizer

NOT_YET = -1
"""The value that fills a session's row of codes where another session has more codes."""


@lru_cache
def session_step(model: nn.Module, method: Any) -> Any:
    """Makes the jitted `stream_step` of a causal method of a model; all streams of that model share it."""
    return exact.jit(partial(stream_step, model, method), donate_argnums=1)


class Stream:
    """Applies a causal method of a model to one block after the other of a batch of sessions."""

    def __init__(self, tokenizer: OmniCodecTokenizer, method: Any):
        """Takes the codec, and the method of its model to apply."""
        self._step = session_step(tokenizer.model, method)
        self._variables, self._state = tokenizer.variables, None

    def __call__(self, fresh: np.ndarray | None, held: np.ndarray | None, *inputs: Array) -> jax.Array:
        """Applies the method to the next block of every session.

        Args:
            fresh: Booleans [B] that mark the sessions that begin with this block; None if there are none.
            held: Booleans [B] that mark the sessions whose state stays as it is; None if there are none.
            inputs: Inputs of the method, [B, …] each.

        Returns:
            Output of the method, [B, …]. Do not use the rows of held sessions.
        """
        if self._state is None:
            rows = np.zeros(len(inputs[0]), np.bool_)
            shapes = jax.eval_shape(self._step, self._variables, {}, rows, None, *inputs)[1]
            self._state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        output, self._state = self._step(self._variables, self._state, fresh, held, *inputs)
        return output


def check_sessions(sessions: Any, count: int) -> list[int]:
    """Returns numbers of sessions sorted, each once. Raises ModelError for one that is not from 0 to `count` - 1."""
    given = list(sessions) if np.iterable(sessions) else sessions
    if isinstance(given, list) and any(as_array(mark, "sessions", ModelError).dtype == bool for mark in given):
        raise ModelError("sessions are named by their numbers, not marked: np.flatnonzero(marks) gives the numbers")
    numbers = sorted(set(whole_numbers(given, "sessions", ModelError)))
    if wrong := [number for number in numbers if not 0 <= number < count]:
        raise ModelError(f"session {wrong[0]}: there are {count}, counted from 0")
    return numbers


def _check_count(sessions: int) -> int:
    """Returns a number of sessions. Raises ModelError for one below 1."""
    if (count := whole_number(sessions, "sessions", ModelError)) < 1:
        raise ModelError(f"sessions = {sessions}: must be how many streams there are, 1 or more")
    return count


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
        """Begins one stream for each session.

        Args:
            tokenizer: The codec.
            sessions: Number of streams side by side; they are rows of one batch.

        Raises:
            ModelError: If `sessions` is below 1.
        """
        self._tokenizer, self._sessions = tokenizer, _check_count(sessions)
        self._stream = Stream(tokenizer, type(tokenizer.model).decode)

    def __call__(self, codes: Array, reset: Iterable[int] = ()) -> np.ndarray:
        """Decodes the next frames of all sessions.

        Args:
            codes: Integers [sessions, k, n] of the first k ≤ K codebooks. Each pair of k and n is compiled once.
            reset: Numbers of the sessions that begin anew with these frames.

        Returns:
            Audio float32 [sessions, 1, n · hop] at the model's rate.

        Raises:
            TokenError: If the codes cannot be of this model.
            ModelError: If the number of sessions is another, or `reset` names a session that does not exist.
        """
        codes = as_array(codes, "codes", TokenError)
        self._tokenizer.check_codes(codes)
        if codes.shape[0] != self._sessions:
            raise ModelError(f"codes of {codes.shape[0]} sessions: this decoder has {self._sessions}")
        fresh = np.zeros(self._sessions, np.bool_)
        fresh[check_sessions(reset, self._sessions)] = True
        return np.asarray(self._stream(fresh if fresh.any() else None, None, codes.astype(np.int32)))


@dataclasses.dataclass
class Session:
    """The part of a stream that later codes may depend on, and how far the stream has come."""

    audio: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))
    """The samples of the stream from sample number `start` on."""
    start: int = 0
    """The number of the first sample that is held."""
    windowed: int = 0
    """The number of samples in windows whose semantic features have been computed."""
    hidden: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """The vectors [n, D] of the semantic branch from vector number `first` on."""
    first: int = 0
    """The number of the first vector that is held."""
    loudest: float = -math.inf
    """The log10 of the loudest bin of the log-mel so far."""
    frames: int = 0
    """The number of frames whose codes have been returned."""

    @property
    def end(self) -> int:
        """The number of samples that the stream has had so far."""
        return self.start + self.audio.size

    @property
    def vectors(self) -> int:
        """The number of vectors of the semantic branch that have been computed so far."""
        return self.first + len(self.hidden)

    def add(self, hidden: np.ndarray) -> None:
        """Appends the next vectors [n, D] of the semantic branch."""
        self.hidden = np.concatenate([self.hidden.reshape(-1, hidden.shape[1]), hidden])

    def forget(self, sample: int, vector: int) -> None:
        """Drops the audio before a sample and the vectors before a vector.

        The rest is copied, since a view of it would keep all of it in memory.
        """
        dropped = min(max(0, sample - self.start), self.audio.size)
        self.audio, self.start = self.audio[dropped:].copy(), self.start + dropped
        dropped = min(
            max(0, vector - self.first), max(0, len(self.hidden) - 1)
        )  # the last vector also stands for the vectors after it
        self.hidden, self.first = self.hidden[dropped:].copy(), self.first + dropped


class StreamingEncoder:
    """Encodes live streams: codes come out as soon as the audio that they depend on is there.

    The codes of a frame come out at most `look_ahead` seconds after the end of the frame. Semantic features are
    computed in windows, each as a clip of its own. The log-mel of a window is normalised by the loudest bin of the
    stream so far, or, for Whisper, by the window's own loudest bin. Without a semantic branch, there are no windows and
    no look-ahead.

    Examples:
        >>> import numpy as np
        >>> from omnicodec_jax.tokenizer import OmniCodecTokenizer
        >>> encode = StreamingEncoder(OmniCodecTokenizer.from_pretrained("models/untrained"))
        >>> encode(np.full((1, 1, 24_000), 0.1, np.float32)).shape  # after 1 s nothing is certain yet
        (1, 9, 0)
        >>> encode.flush().shape  # the rest; other streams may follow
        (1, 9, 13)

    A session may begin anew while the others go on: `encode.flush([3])` gives the rest of session 3, and
    `encode(chunk, reset=[3])` begins it with this chunk. From then on, one session may have more frames than another.
    The end of the shorter row is filled with `NOT_YET`, which is -1. So `codes[3][:, codes[3, 0] >= 0]` are the codes
    of session 3.
    """

    def __init__(self, tokenizer: OmniCodecTokenizer, sessions: int = 1):
        """Begins one stream for each session.

        Args:
            tokenizer: The codec. If its model needs semantic features, the tokenizer must have the encoder for them.
            sessions: Number of streams side by side; they are rows of one batch.

        Raises:
            ModelError: If the tokenizer cannot compute the semantic features that its model needs, or `sessions` is
                below 1.
        """
        if not tokenizer.computes_features:
            raise ModelError("this model needs semantic features: load it with the encoder that computes them")
        self._tokenizer, self._sessions = tokenizer, [Session() for _ in range(_check_count(sessions))]
        windows = None if tokenizer.extract is None else tokenizer.extract.windows
        seconds, self._vectors = (0, 0) if windows is None else (windows.live_seconds, windows.live_vectors)
        self._window = seconds * tokenizer.sample_rate
        self._encoder_stream = Stream(tokenizer, encode_block)
        self._semantic_stream = Stream(tokenizer, OmniCodec.semantic_hidden) if seconds else None

    @property
    def look_ahead(self) -> float:
        """The seconds after a frame's end that its codes may depend on: the rest of a window, and the next vector."""
        if not self._window:
            return 0.0
        seconds = self._window / self._tokenizer.sample_rate
        return seconds + seconds / self._vectors

    def __call__(self, audio: Array, reset: Iterable[int] = ()) -> np.ndarray:
        """Encodes the next samples of all sessions, as far as their codes are certain.

        Args:
            audio: float32 [sessions, 1, any], full scale ±1, at the model's rate.
            reset: Numbers of the sessions that begin anew with these samples. Their codes that were not returned yet
                are lost.

        Returns:
            Codes int32 [sessions, K, n] of the n ≥ 0 frames that have become certain; `NOT_YET` where a session has
            fewer frames than another.

        Raises:
            AudioError: If the shape is another, or samples are NaN, infinite or out of range.
            ModelError: If `reset` names a session that does not exist.
        """
        audio = as_float(audio)
        if audio.ndim != 3 or audio.shape[:2] != (len(self._sessions), 1):
            raise AudioError(f"audio of shape {list(audio.shape)}: must be [{len(self._sessions)}, 1, T]")
        check_range(audio)
        for row in check_sessions(reset, len(self._sessions)):
            self._sessions[row] = Session()
        for session, samples in zip(self._sessions, audio[:, 0], strict=True):
            session.audio = np.concatenate([session.audio, samples])
        while self._window and (
            rows := [row for row, session in enumerate(self._sessions) if self._has_window(session)]
        ):
            self._compute_hidden(rows)
        return self._encode_frames([self._certain_frames(session) for session in self._sessions])

    def flush(self, sessions: Iterable[int] | None = None) -> np.ndarray:
        """Encodes the rest of sessions that end, with the last frame filled up with silence. New streams may follow.

        A session gets a frame even if it is shorter than 25 ms, which `OmniCodecTokenizer.encode` refuses as too short
        for semantic features. So one session cannot end the flush of the others with an error.

        Args:
            sessions: Numbers of the sessions that end; None: all.

        Returns:
            Codes int32 [sessions, K, n] of the frames that were not certain yet; `NOT_YET` where a session has fewer
            frames than another.

        Raises:
            ModelError: If `sessions` names a session that does not exist.
        """
        count = len(self._sessions)
        ending = list(range(count)) if sessions is None else check_sessions(sessions, count)
        behind = [row for row in ending if self._sessions[row].windowed < self._sessions[row].end]
        if self._window and behind:
            self._compute_hidden(behind)
        wanted = [session.frames for session in self._sessions]
        for row in ending:
            wanted[row] = self._tokenizer.num_frames(self._sessions[row].end)
        codes = self._encode_frames(wanted)
        for row in ending:
            self._sessions[row] = Session()
        return codes

    def _has_window(self, session: Session) -> bool:
        """Returns whether a session has all samples of its next window."""
        return session.windowed + self._window <= session.end

    def _certain_frames(self, session: Session) -> int:
        """Returns the number of frames of a session for which all samples and all semantic vectors are there."""
        hop = self._tokenizer.hop_length
        whole = session.end // hop
        if not self._window:
            return whole
        # Frame n lies at (n + 0.5)·hop, vector i at (i + 0.5)·window / vectors. No frame may lie after the last vector.
        reach = (2 * session.vectors - 1) * self._window - hop * self._vectors
        return min(whole, max(0, reach // (2 * hop * self._vectors) + 1))

    def _compute_hidden(self, rows: list[int]) -> None:
        """Computes the semantic branch for the next window of some sessions, or for the rest of their audio."""
        extract, rate = self._tokenizer.extract, self._tokenizer.sample_rate
        assert extract is not None
        assert self._semantic_stream is not None
        mels = []
        for session in map(self._sessions.__getitem__, rows):
            window = session.audio[session.windowed - session.start :][: self._window]
            mel, session.loudest = extract.live_log_mel(window, rate, session.loudest)
            mels.append(mel)
        features = dict(extract.features(zip(rows, mels, strict=True)))
        # The branch is causal, so that padding after a session's vectors does not change its results.
        inputs = np.zeros((len(self._sessions), self._vectors, features[rows[0]].shape[1]), np.float32)
        for row in rows:
            inputs[row, : len(features[row])] = features[row]
        hidden = np.asarray(self._semantic_stream(*self._marks(rows, lambda session: session.windowed == 0), inputs))
        for row in rows:
            self._sessions[row].add(hidden[row, : len(features[row])])
            self._sessions[row].windowed += self._window

    def _marks(self, rows: list[int], begins: Callable[[Session], bool]) -> tuple[np.ndarray, np.ndarray]:
        """Returns masks [B] of the sessions that begin and of those that are held while `rows` take a step.

        Neither is None, even if it marks no session. A compiler may round differently with a mask and without one,
        and the codes of a session must not depend on what the others do.
        """
        fresh, held = np.zeros((2, len(self._sessions)), np.bool_)
        held[:] = True
        for row in rows:
            fresh[row], held[row] = begins(self._sessions[row]), False
        return fresh, held

    def _encode_frames(self, wanted: list[int]) -> np.ndarray:
        """Computes the codes of each session up to a number of frames, and drops inputs that no later code needs."""
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
                    hidden[row, 0] = self._hidden_at_next_frame(session)
            inputs = (blocks, lengths, hidden) if self._window else (blocks, lengths)
            output = np.asarray(self._encoder_stream(*self._marks(rows, lambda session: session.frames == 0), *inputs))
            for row in rows:
                codes[row, :, step] = output[row, :, 0]
                self._sessions[row].frames += 1
        for session in self._sessions:
            start = session.frames * hop
            if self._window:
                left, _ = dsp.interpolation_cells(np.array([session.frames]), *self._ratio)
                session.forget(min(start, session.windowed), int(left[0]))
            else:
                session.forget(start, 0)
        return codes

    @property
    def _ratio(self) -> tuple[int, int]:
        """The rate of the semantic branch's vectors divided by that of frames, as numerator and denominator."""
        return self._tokenizer.hop_length * self._vectors, self._window

    def _hidden_at_next_frame(self, session: Session) -> np.ndarray:
        """Interpolates the semantic branch at the next frame of a session: [D]."""
        place = np.array([session.frames])
        return dsp.interpolate_part(session.hidden[None], session.first, place, *self._ratio)[0, 0]
