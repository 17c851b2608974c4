import numpy as np
import pytest
import soundfile

from omnicodec_jax.data import audio
from omnicodec_jax.errors import AudioError

RATE = 44_100


@pytest.fixture
def sound(clips):
    samples, rate = soundfile.read(clips[-1], dtype="float32")
    assert rate == RATE
    return samples


def write(path, samples, rate=RATE, **options):
    soundfile.write(path, samples, rate, **options)
    return path


@pytest.mark.parametrize("rate", [8000, 16_000, 24_000, 48_000, 192_000])
@pytest.mark.parametrize("channels", [1, 2, 8])
def test_any_rate_and_channel_count_becomes_mono_at_the_models_rate(tmp_path, sound, rate, channels):
    path = write(tmp_path / "a.wav", np.stack([sound] * channels, axis=1), rate)
    clip = audio.load(path, 24_000, peak=0.95)
    assert clip.samples.shape == (-(-sound.size * 24_000 // rate),)
    assert clip.samples.dtype == np.float32
    assert (clip.sample_rate, clip.num_samples) == (rate, sound.size)
    assert np.abs(clip.samples).max() == pytest.approx(0.95, rel=0.1)  # the resampler moves peaks


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.aiff", "a.w64", "a.caf", "without_suffix"])
def test_formats_of_libsndfile(tmp_path, sound, name):
    path = tmp_path / name
    write(path, sound, format=None if path.suffix else "WAV")
    clip = audio.load(path, 24_000)
    assert clip.num_samples == pytest.approx(sound.size, abs=2 * 1152)  # MP3 comes in frames
    reference = audio.resample(sound, RATE, 24_000)
    size = min(reference.size, clip.samples.size)
    assert np.corrcoef(clip.samples[:size], reference[:size])[0, 1] > 0.95


@pytest.mark.parametrize(("codec", "name"), [("aac", "a.m4a"), ("libopus", "a.mkv"), ("alac", "a.m4a")])
def test_formats_of_ffmpeg(tmp_path, sound, codec, name):
    import av

    rate = 48_000
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        fifo, frame = av.AudioFifo(), av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        for resampled in av.AudioResampler(stream.format, "mono", rate).resample(frame):
            fifo.write(resampled)
        size = stream.codec_context.frame_size or 960
        while piece := fifo.read(size, partial=True):
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    clip = audio.load(tmp_path / name, 24_000)
    assert clip.sample_rate == rate
    assert clip.samples.size == pytest.approx(sound.size / 2, abs=4096)
    assert np.abs(clip.samples).max() > 0.3


def truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


BAD = {
    "empty file": lambda folder, sound: (folder / "a.wav").touch() or folder / "a.wav",
    "no such file": lambda folder, sound: folder / "nothing.wav",
    "too short": lambda folder, sound: write(folder / "a.wav", sound[:1]),
    "silent": lambda folder, sound: write(folder / "a.wav", np.zeros(RATE)),
    "NaN or infinite": lambda folder, sound: write(folder / "a.wav", np.append(sound, np.nan), subtype="FLOAT"),
    "samples are missing": lambda folder, sound: truncate(write(folder / "a.wav", sound)),
    "damaged or truncated": lambda folder, sound: truncate(write(folder / "a.flac", sound)),
    "last page": lambda folder, sound: truncate(write(folder / "a.ogg", sound)),
    "not audio": lambda folder, sound: (folder / "a.mp3").write_text("no sound" * 500) and folder / "a.mp3",
}


@pytest.mark.parametrize("reason", BAD)
def test_what_cannot_be_encoded_is_refused_with_name_and_reason(tmp_path, sound, reason):
    path = BAD[reason](tmp_path, sound)
    with pytest.raises(AudioError) as caught:
        audio.load(path, 24_000)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize("size", [b"\xff\xff\xff\xff", b"\x00\xf0\xff\x7f", b"\x00\x00\x00\x80"])
def test_a_wav_from_a_pipe_has_no_length_and_is_read(tmp_path, sound, size):
    path = write(tmp_path / "a.wav", sound)
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = size
    path.write_bytes(data)
    assert audio.load(path, 24_000).num_samples == sound.size


@pytest.mark.parametrize("name", ["a.mka", "a.webm"])
def test_a_truncated_container_is_refused(tmp_path, sound, name):
    import av

    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream("libopus", rate=48_000, layout="mono")
        for start in range(0, sound.size - 960, 960):
            frame = av.AudioFrame.from_ndarray(sound[None, start : start + 960], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 48_000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert audio.load(tmp_path / name, 24_000).samples.size > 60_000
    with pytest.raises(AudioError, match="truncated"):
        audio.load(truncate(tmp_path / name), 24_000)


@pytest.mark.parametrize("name", ["a.mp3", "a.mp9", "a", "a.raw"])
def test_only_wav_and_flac_are_written(tmp_path, name):
    with pytest.raises(AudioError, match=r"use \.wav or \.flac"):
        audio.save(tmp_path / name, np.zeros(10, np.float32), 24_000)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    path.write_text("before")

    def full_disk(self, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(soundfile.SoundFile, "write", full_disk)
    with pytest.raises(OSError, match="No space"):
        audio.save(path, np.zeros(10, np.float32), 24_000)
    assert [p.name for p in tmp_path.iterdir()] == ["a.wav"]
    assert path.read_text() == "before"


@pytest.mark.parametrize(
    ("source", "target", "length"), [(44_100, 24_000, 44_101), (24_000, 16_000, 1), (8000, 24_000, 7)]
)
def test_resampled_length_is_the_ceiling(source, target, length):
    assert audio.resample(np.ones(length, np.float32), source, target).size == -(-length * target // source)
