import contextlib
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_formats import mux, sweep

from omnicodec_jax.data import audio, decoders
from omnicodec_jax.errors import AudioError

pytestmark = pytest.mark.quick

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


def long_integers(path, sound):
    """A WAV of integers of 64 bits."""
    data = bytearray(write(path, sound, subtype="DOUBLE").read_bytes())
    data[data.index(b"fmt ") + 8] = 1
    path.write_bytes(data)
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
    "only files are read": lambda folder, sound: os.mkfifo(folder / "a.wav") or folder / "a.wav",
    "a directory, a pipe": lambda folder, sound: (folder / "a.wav").mkdir() or folder / "a.wav",
    "a device": lambda folder, sound: (folder / "a.wav").symlink_to(os.devnull) or folder / "a.wav",
    "s64, which are not read": lambda folder, sound: long_integers(folder / "a.wav", sound),
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


def test_integers_are_written_by_their_full_scale(tmp_path, sound):
    integers = np.rint(32_767 * sound).astype(np.int16)
    audio.save(tmp_path / "a.wav", integers, RATE)
    np.testing.assert_allclose(soundfile.read(tmp_path / "a.wav", dtype="int16")[0], integers, atol=1)


@pytest.mark.parametrize("samples", [np.zeros((1, 100)), np.zeros((100, 2)), np.array([0.1, np.nan, 0.1])])
def test_what_is_no_row_of_samples_is_not_written(tmp_path, samples):
    with pytest.raises(AudioError, match=r"a\.wav: samples of shape .*: must be \[T\], mono, without NaN"):
        audio.save(tmp_path / "a.wav", samples, RATE)
    assert not list(tmp_path.iterdir())


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


# -- Parts


@pytest.mark.parametrize("name", ["a.wav", "a.m4a"])
@pytest.mark.parametrize(("offset", "over", "is_read"), [(1.0, 0.0008, True), (1.0, 0.49, True), (1.0, 0.51, False)])
def test_a_part_may_reach_past_the_end_by_half_a_second(tmp_path, sound, name, offset, over, is_read):
    path = tmp_path / name
    mux(path, "alac", sound, RATE) if name == "a.m4a" else write(path, sound)
    duration = sound.size / RATE - offset + over
    if is_read:
        assert audio.load(path, RATE, offset=offset, duration=duration).num_samples == sound.size - RATE
    else:
        with pytest.raises(AudioError, match=r"ends at .* s; .* s were asked for"):
            audio.load(path, RATE, offset=offset, duration=duration)


@pytest.mark.parametrize("offset", [60.0, 1e18])
def test_a_part_that_begins_long_after_the_end_of_an_m4a_is_refused(tmp_path, sound, offset):
    path = mux(tmp_path / "a.m4a", "alac", sound, RATE)
    with pytest.raises(AudioError, match=r"ends before .* where the part that was asked for begins"):
        audio.load(path, 24_000, offset=offset, duration=1.0)


@pytest.mark.parametrize("part", [(-1.0, 1.0), (0.0, -1.0), (1e308, None), (0.0, 1e308), (float("nan"), None)])
def test_a_part_that_no_file_has_is_called_so(tmp_path, sound, part):
    with pytest.raises(AudioError, match=r"a\.wav: offset .*, duration .*: must be seconds, from 0 on"):
        audio.load(write(tmp_path / "a.wav", sound), 24_000, None, *part)


def test_a_part_of_no_length_is_called_so(tmp_path, sound):
    with pytest.raises(AudioError, match="too short: 0 samples"):
        audio.load(write(tmp_path / "a.wav", sound), 24_000, offset=0.5, duration=1e-9)


def test_a_part_that_begins_after_the_end_is_refused(tmp_path, sound):
    path = write(tmp_path / "a.wav", sound)
    for duration in (None, 0.4, 5.0):
        with pytest.raises(AudioError, match=r"ends before 99\.00 s"):
            audio.load(path, 24_000, offset=99.0, duration=duration)


# -- Levels


def dither(seconds=1.0, level=0.0):
    rng = np.random.default_rng(0)
    return level + np.round(rng.random(round(seconds * RATE)) + rng.random(round(seconds * RATE)) - 1) / 32768


@pytest.mark.parametrize(
    ("samples", "subtype"),
    [
        (dither(), "PCM_16"),
        (dither(level=0.3), "PCM_16"),
        (np.full(RATE, 0.5), "PCM_16"),
        (np.resize([1, -1], RATE) / 32768, "PCM_16"),
        (np.resize([1, -1], RATE) / 128, "PCM_U8"),
        (np.resize([1, -1], RATE) / 4096, "ULAW"),
        (np.resize([1e-4, -1e-4], RATE), "FLOAT"),
    ],
    ids=["dither", "dither and an offset", "constant", "last bit", "last bit of 8", "last step of µ-law", "float"],
)
def test_what_is_no_sound_is_silent(tmp_path, samples, subtype):
    path = write(tmp_path / "a.wav", samples, subtype=subtype)
    with pytest.raises(AudioError, match="silent"):
        audio.load(path, 24_000, peak=0.95)


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
@pytest.mark.parametrize(("rate", "pitch"), [(192_000, 50_000), (44_100, 15_000)])
def test_what_lies_above_the_models_rate_is_silent_and_not_amplified(tmp_path, rate, pitch, subtype):
    tone = 0.5 * np.hanning(rate) * np.sin(2 * np.pi * pitch * np.arange(rate) / rate)
    path = write(tmp_path / "a.wav", tone.astype(np.float32), rate, subtype=subtype)
    with pytest.raises(AudioError, match="silent below 12000 Hz: what it holds lies higher, and is lost at 24000 Hz"):
        audio.load(path, 24_000, peak=0.95)
    assert np.abs(audio.load(path, rate, peak=0.95).samples).max() == pytest.approx(0.95)


@pytest.mark.parametrize(("scale", "subtype"), [(1e-3, "PCM_16"), (1e-3, "PCM_24"), (0.05, "PCM_U8"), (0.01, "ULAW")])
def test_a_quiet_recording_is_read(tmp_path, sound, scale, subtype):
    path = write(tmp_path / "a.wav", scale * sound / np.abs(sound).max(), subtype=subtype)
    clip = audio.load(path, RATE, peak=0.95)
    assert clip.gain == pytest.approx(0.95 / scale, rel=0.2)


@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.ogg", "a.flac"])
def test_channels_that_cancel_each_other_are_silent(tmp_path, sound, name):
    path = write(tmp_path / name, np.stack([sound, -sound], 1))
    with pytest.raises(AudioError, match="silent: its channels cancel each other"):
        audio.load(path, 24_000, peak=0.95)


def test_a_silent_channel_is_no_reason(tmp_path, sound):
    path = write(tmp_path / "a.wav", np.stack([sound, 0 * sound], 1))
    np.testing.assert_allclose(audio.load(path, RATE).samples, sound / 2, atol=1e-4)


@pytest.mark.parametrize("scale", [32_767, 2147483647, 127])
def test_floats_on_the_scale_of_integers_are_refused(tmp_path, sound, scale):
    path = write(tmp_path / "a.wav", sound / np.abs(sound).max() * scale, subtype="FLOAT")
    with pytest.raises(AudioError, match="out of range: float samples reach .* where full scale is 1"):
        audio.load(path, 24_000, peak=0.95)


def test_floats_above_full_scale_are_brought_down_to_it_with_a_note(tmp_path, sound, caplog):
    sound = sound / np.abs(sound).max()
    path = write(tmp_path / "a.wav", 3 * sound, subtype="FLOAT")
    np.testing.assert_allclose(audio.load(path, RATE).samples, sound, atol=1e-6)
    assert f"{path}: samples reach 3, where full scale is 1" in caplog.text
    clip = audio.load(path, 24_000, peak=0.95)
    assert np.abs(clip.samples).max() == pytest.approx(0.95)
    assert np.abs(clip.samples / np.float32(clip.gain)).max() < 1.1  # decoded, it is not clipped


# -- Names, headers and remarks


NAMES = ["a:b", "http:b", "concat:b", "-x", "-", "%d", "b?c", "caf\udce9"]


READER = """
import sys
import warnings
from omnicodec_jax.corpus.readers import Reader, Request
from omnicodec_jax.data.entries import Entry
reader = Reader()
reader(Request(sys.argv[1], Entry("a", sys.argv[1]), 24_000, 0.95))
reader.close()
"""


def test_the_note_on_floats_above_full_scale_comes_through_from_processes_that_read(tmp_path, sound):
    path = write(tmp_path / "loud.wav", 3 * sound / np.abs(sound).max(), subtype="FLOAT")
    command = [sys.executable, "-c", READER, str(path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    assert len(said) == 1
    assert re.fullmatch(r".*loud\.wav: samples reach .*, where full scale is 1; brought down to it", said[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", ["wav", "m4a"])
def test_a_name_is_a_file_and_nothing_else(tmp_path, sound, monkeypatch, name, suffix):
    monkeypatch.chdir(tmp_path)
    path = Path(f"{name}.{suffix}" if len(name) > 1 else name)
    mux(tmp_path / "a.m4a", "alac", sound, RATE) if suffix == "m4a" else write(tmp_path / "a.wav", sound)
    (tmp_path / f"a.{suffix}").rename(path)
    assert audio.load(path, RATE).num_samples == sound.size


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile 'a.wav'\n", "#EXTM3U\n#EXTINF:3,\na.wav\n"])
@pytest.mark.parametrize("name", ["b.mp3", "b.ffconcat", "b.m3u8"])
def test_a_playlist_reads_no_other_file(tmp_path, sound, name, text):
    write(tmp_path / "a.wav", sound)
    (tmp_path / name).write_text(text)
    with pytest.raises(AudioError, match="not audio"):
        audio.load(tmp_path / name, 24_000)


@pytest.mark.parametrize(
    ("channels", "rate", "message"),
    [
        (0, RATE, "0 channels"),
        (1, 1, "1 Hz"),
        (1, 0, "not audio|0 Hz"),
        (1, 999, "999 Hz"),
        (1, 2**32 - 1, "not audio"),
    ],
)
def test_a_header_that_lies_is_one_plain_line(tmp_path, channels, rate, message):
    path = write(tmp_path / "a.wav", np.zeros(RATE))
    data = bytearray(path.read_bytes())
    data[22:28] = channels.to_bytes(2, "little") + rate.to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(AudioError, match=message) as caught:
        audio.load(path, 24_000)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_the_length_of_a_file_is_told_without_decoding_it(tmp_path, sound):
    seconds = sound.size / RATE
    assert decoders.seconds(write(tmp_path / "a:b.wav", sound)) == seconds
    assert decoders.seconds(mux(tmp_path / "a:b.m4a", "alac", sound, RATE)) == pytest.approx(seconds, abs=1e-3)
    (tmp_path / "c.wav").write_bytes(b"no sound")
    assert decoders.seconds(tmp_path / "c.wav") == decoders.seconds(tmp_path / "nothing.wav") == 0.0
    (tmp_path / "d.wav").symlink_to(os.devnull)
    assert decoders.seconds(tmp_path / "d.wav") == 0.0


def test_decoders_do_not_write_to_stderr(tmp_path, sound, capfd):
    data = write(tmp_path / "a.mp3", sound).read_bytes()
    for number, broken in enumerate((data[: len(data) // 2], data[:20_000] + b"xyz" * 99 + data[20_000:], data + data)):
        (tmp_path / f"{number}.mp3").write_bytes(broken)
        with contextlib.suppress(AudioError):
            audio.load(tmp_path / f"{number}.mp3", 24_000)
    print("still there", file=sys.stderr)
    assert capfd.readouterr().err == "still there\n"


def test_telephone_codecs_take_an_offset(tmp_path, sound):
    for subtype in ("GSM610", "G721_32"):
        path = write(tmp_path / "a.wav", sound[::4], 8000, subtype=subtype)
        whole = soundfile.read(path, dtype="float32")[0]
        part = audio.load(path, 8000, offset=1.0, duration=0.5).samples
        np.testing.assert_array_equal(part, whole[8000:12_000])


def test_infinities_of_both_signs_are_refused_without_a_remark_of_numpy(tmp_path):
    samples = np.stack([sweep(16_000), sweep(16_000)], axis=1)
    samples[100] = np.inf, -np.inf
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(AudioError, match="holds samples that are NaN or infinite"):
            audio.load(tmp_path / "a.wav", 24_000)
