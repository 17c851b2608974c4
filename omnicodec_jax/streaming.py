"""Live streams: audio out a frame at a time, tokens out as soon as what they depend on has been heard.

Many sessions run side by side as rows of one batch. Offline, `OmniCodecTokenizer` runs the same models in longer
blocks; audio and acoustic codes are the same up to rounding. Semantic features are not: offline they see the whole
clip, here windows by themselves.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omnicodec_jax import model_directory, signal
from omnicodec_jax.data.levels import as_float, check_range
from omnicodec_jax.errors import AudioError, ModelError
from omnicodec_jax.lanes import advance
from omnicodec_jax.models.codec import OmniCodec
from omnicodec_jax.tokenizer import OmniCodecTokenizer, encode_block

Array = np.ndarray | jax.Array


class Stream:
    """A causal method of a model, applied to one block after the other of `sessions` rows."""

    def __init__(self, tokenizer: OmniCodecTokenizer, method: Any, sessions: int):
        self._run = partial(advance, model_directory.build(tokenizer.config), method)
        self._step = jax.jit(self._run, donate_argnums=1)
        self._variables, self._sessions, self._state = tokenizer.variables, sessions, None

    def __call__(self, fresh: np.ndarray, *inputs: Array) -> jax.Array:
        """fresh [B]: rows that begin anew."""
        if self._state is None:
            shapes = jax.eval_shape(self._run, self._variables, {}, fresh, None, *inputs)[1]
            self._state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        rows = fresh if fresh.any() else None
        output, self._state = self._step(self._variables, self._state, rows, None, *inputs)
        return output


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
        self._stream = Stream(tokenizer, type(model_directory.build(tokenizer.config)).decode, sessions)

    def __call__(self, codes: Array, reset: Any = ()) -> np.ndarray:
        """Decodes the next frames of all sessions.

        Args:
            codes: Integers [sessions, k, n] of the first k ≤ K codebooks; every k and n is compiled once.
            reset: Numbers of the sessions that begin anew with these frames.

        Returns:
            Audio float32 [sessions, 1, n · hop] at the model's rate.

        Raises:
            TokenError: If these are no codes of this model.
            ModelError: If they are of another number of sessions.
        """
        codes = np.asarray(codes)
        self._tokenizer.check_codes(codes)
        if codes.shape[0] != self._sessions:
            raise ModelError(f"codes of {codes.shape[0]} sessions: this decoder has {self._sessions}")
        fresh = np.zeros(self._sessions, np.bool_)
        fresh[list(reset)] = True
        return np.asarray(self._stream(fresh, codes.astype(np.int32)))


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
        self._tokenizer, self._sessions = tokenizer, sessions
        source = None if tokenizer.semantic is None else tokenizer.semantic.source
        # As many vectors as fill whole seconds: stacked log-mel frames are 80 ms apart.
        seconds, self._vectors = {None: (0, 0), "log_mel": (2, 25)}.get(source, (1, 13))
        self._window = seconds * tokenizer.sample_rate
        self._encode = Stream(tokenizer, encode_block, sessions)
        self._hide = Stream(tokenizer, OmniCodec.semantic_hidden, sessions) if seconds else None
        self._begin()

    def _begin(self) -> None:
        self._audio = np.zeros((self._sessions, 1, 0), np.float32)
        """What may still be needed, from sample `_start` of the stream on."""
        self._start = self._heard = self._frames = 0
        """Samples that windows have covered, frames that are out."""
        self._hidden = np.zeros((self._sessions, 0, 1), np.float32)
        self._loudest = np.full(self._sessions, -np.inf, np.float32)

    @property
    def look_ahead(self) -> float:
        """Seconds after a frame's end that its codes may depend on: the rest of a window, and the next vector's."""
        if not self._window:
            return 0.0
        seconds = self._window / self._tokenizer.sample_rate
        return seconds + seconds / self._vectors

    def __call__(self, audio: Array) -> np.ndarray:
        """Encodes the next samples of all sessions, as far as they are certain.

        Args:
            audio: float32 [sessions, 1, any], full scale ±1, at the model's rate.

        Returns:
            Codes int32 [sessions, K, n] of the n ≥ 0 frames that have become certain.

        Raises:
            AudioError: If the shape is another, or samples are NaN, infinite or out of range.
        """
        audio = as_float(audio)
        if audio.ndim != 3 or audio.shape[:2] != (self._sessions, 1):
            raise AudioError(f"audio of shape {list(audio.shape)}: must be [{self._sessions}, 1, T]")
        check_range(audio)
        self._audio = np.concatenate([self._audio, audio], axis=2)
        end, hop = self._start + self._audio.shape[2], self._tokenizer.hop_length
        if not self._window:
            return self._emit(end // hop, end)
        while self._heard + self._window <= end:
            self._listen()
        # Frame n lies at (n + 0.5)·hop, vector i at (i + 0.5)·window / vectors; it takes the vectors around it.
        certain = self._hidden.shape[1] * 2 * self._window - self._window
        return self._emit(max(0, (certain - hop * self._vectors) // (2 * hop * self._vectors) + (certain > 0)), end)

    def flush(self) -> np.ndarray:
        """Encodes what is left, the last frame filled up with silence. The next samples begin new streams.

        Returns:
            Codes int32 [sessions, K, n] of the frames that were not certain yet.
        """
        end = self._start + self._audio.shape[2]
        if self._window and self._heard < end:
            missing = self._heard + self._window - end
            self._audio = np.pad(self._audio, ((0, 0), (0, 0), (0, missing)))
            self._listen()
        codes = self._emit(self._tokenizer.num_frames(end), end)
        self._begin()
        return codes

    def _listen(self) -> None:
        """The next window's vectors."""
        extract = self._tokenizer.extract
        assert extract is not None
        assert self._hide is not None
        start = self._heard - self._start
        window = self._audio[:, 0, start : start + self._window]
        mels = []
        for row, samples in enumerate(window):
            mel = extract.log10_mel(samples, self._tokenizer.sample_rate)
            self._loudest[row] = max(self._loudest[row], mel.max())
            mels.append(signal.normalize_log_mel(mel, self._loudest[row]))
        features = dict(extract.features(enumerate(mels)))
        stacked = np.stack([features[row] for row in range(self._sessions)])
        hidden = np.asarray(self._hide(np.full(self._sessions, self._heard == 0), stacked))
        self._hidden = hidden if self._heard == 0 else np.concatenate([self._hidden, hidden], axis=1)
        self._heard += self._window

    def _emit(self, frames: int, end: int) -> np.ndarray:
        """Codes up to frame `frames` of a stream of `end` samples so far."""
        hop, codes = self._tokenizer.hop_length, []
        for frame in range(self._frames, frames):
            start = frame * hop
            length = min(hop, end - start)
            block = self._audio[:, :, start - self._start :][:, :, :length]
            block = np.pad(block, ((0, 0), (0, 0), (0, hop - length)))
            inputs = [block, np.full(self._sessions, length, np.int32)]
            if self._window:
                inputs.append(self._between(frame)[:, None])
            codes.append(np.asarray(self._encode(np.full(self._sessions, frame == 0), *inputs)))
        self._frames = max(self._frames, frames)
        kept = min(self._frames * hop, self._heard) if self._window else self._frames * hop
        self._audio, self._start = self._audio[:, :, kept - self._start :], kept
        empty = np.zeros((self._sessions, self._tokenizer.num_quantizers, 0), np.int32)
        return np.concatenate([empty, *codes], axis=2)

    def _between(self, frame: int) -> np.ndarray:
        """Semantic branch [B, D] at a frame, interpolated between the vectors around it."""
        cell = 2 * self._window
        position = max(0, (2 * frame + 1) * self._tokenizer.hop_length * self._vectors - self._window)
        left, last = position // cell, self._hidden.shape[1] - 1
        weight = np.float32(position % cell / cell)
        return self._hidden[:, min(left, last)] * (1 - weight) + self._hidden[:, min(left + 1, last)] * weight
