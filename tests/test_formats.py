"""docs/formats.md, row by row: what is whole is read, what is cut is refused, a part is what the whole has there."""

import re
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import soundfile

from omnicodec_jax.data import audio, decoders, ffmpeg, mpeg
from omnicodec_jax.errors import AudioError

pytestmark = pytest.mark.quick

RATE, SECONDS = 16_000, 4
TABLE = Path(__file__).parents[1] / "docs" / "formats.md"

SNDFILE = {
    "WAV": "PCM_16 PCM_U8 PCM_24 PCM_32 FLOAT DOUBLE ULAW ALAW IMA_ADPCM MS_ADPCM GSM610 G721_32 NMS_ADPCM_32",
    "WAVEX": "PCM_16 FLOAT ULAW",
    "RF64": "PCM_16 FLOAT",
    "W64": "PCM_16 ULAW MS_ADPCM GSM610",
    "AIFF": "PCM_16 PCM_S8 PCM_24 FLOAT ULAW IMA_ADPCM GSM610",
    "AU": "PCM_16 ULAW ALAW G721_32 G723_24",
    "CAF": "PCM_16 FLOAT ULAW ALAC_16",
    "NIST": "PCM_16 ULAW",
    "SVX": "PCM_16 PCM_S8",
    "SDS": "PCM_16",
    "HTK": "PCM_16",
    "FLAC": "PCM_16 PCM_24",
    "OGG": "VORBIS OPUS",
    "MP3": "MPEG_LAYER_III",
}
FFMPEG = {
    "aac.m4a": ("aac", 44_100),
    "alac.m4a": ("alac", 44_100),
    "opus.mp4": ("libopus", 48_000),
    "amr.3gp": ("libopencore_amrnb", 8000),
    "pcm.mov": ("pcm_s16le", 44_100),
    "opus.webm": ("libopus", 48_000),
    "aac.mka": ("aac", 44_100),
    "flac.mkv": ("flac", 44_100),
    "pcm.avi": ("pcm_s16le", 44_100),
    "wma.wma": ("wmav2", 44_100),
    "aac.aac": ("aac", 44_100),
    "ac3.ac3": ("ac3", 48_000),
    "ac3.rm": ("ac3", 48_000),
    "amr.amr": ("libopencore_amrnb", 8000),
    "g722.g722": ("g722", 16_000),
    "flac.ogg": ("flac", 44_100),
    "wavpack.wv": ("wavpack", 44_100),
    "tta.tta": ("tta", 44_100),
    "pcm.voc": ("pcm_u8", 16_000),
    "g722.wav": ("g722", 16_000),
    "ac3.wav": ("ac3", 48_000),
    "mp2.ts": ("mp2", 48_000),
    "mp2.mpg": ("mp2", 48_000),
}
NOISY = {"aac", "ac3", "libopencore_amrnb", "libopus"}
"""Codecs that draw noise as they go, or come to the same samples only after a while."""


def sweep(rate: int, seconds: float = SECONDS) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(0).standard_normal(time.size)
    return (0.4 * np.sin(2 * np.pi * (200 + 100 * time) * time) + 0.01 * noise).astype(np.float32)


def mux(
    file, codec: str, samples, rate: int, picture=0.0, coder="mpeg4", format=None, pause=0.0, bit_rate=0, **options
):
    """Writes mono audio with FFmpeg, and if wanted so many seconds of a picture. Returns the path.

    In the middle, the times of the audio go on so many seconds later, as where a recorder paused.
    """
    target = str(file) if isinstance(file, Path) else file
    with av.open(target, "w", format=format, options=options) as container:
        video: Any = container.add_stream(coder, rate=25) if picture else None
        stream: Any = container.add_stream(codec, rate=rate, layout="mono")
        if bit_rate or codec.startswith("wma"):
            stream.bit_rate = bit_rate or 64_000
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        fifo = av.AudioFifo()
        for part in av.AudioResampler(stream.format, "mono", rate).resample(frame):
            fifo.write(part)
        packets, place = [], 0
        while piece := fifo.read(stream.codec_context.frame_size or 1024, partial=True):
            piece.pts, place = place, place + piece.samples
            packets += stream.encode(piece)
        packets += stream.encode(None)
        for packet in packets[len(packets) // 2 :] if pause else ():
            packet.pts = packet.dts = packet.pts + round(pause / packet.time_base)
        if picture:
            video.width = video.height = 16
            for number in range(round(25 * picture)):
                image = av.VideoFrame.from_ndarray(np.full((16, 16, 3), number % 256, np.uint8), format="rgb24")
                image.pts = number
                packets += video.encode(image)
            packets += video.encode(None)
        for packet in sorted(packets, key=lambda packet: (packet.dts or 0) * packet.time_base):
            container.mux(packet)
    return file


def write(path, samples, rate=RATE, **options) -> Path:
    soundfile.write(path, samples, rate, **options)
    return Path(path)


def make(folder: Path, row: tuple[str, ...]) -> Path:
    if len(row) == 1:
        codec, rate = FFMPEG[row[0]]
        if codec not in av.codecs_available:
            pytest.skip(f"this FFmpeg writes no {codec}")
        return mux(folder / row[0], codec, sweep(rate), rate)
    return write(folder / f"clip.{row[0].lower()}", sweep(RATE), format=row[0], subtype=row[1])


ROWS = [(kind, subtype) for kind, subtypes in SNDFILE.items() for subtype in subtypes.split()] + [(n,) for n in FFMPEG]


def part(path, offset=0.0, duration=None) -> tuple[np.ndarray, int]:
    with decoders.reading(Path(path), offset, duration) as source:
        return np.concatenate([np.zeros((0, source.channels), np.float32), *source.blocks])[:, 0], source.sample_rate


@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_what_is_whole_is_read_and_what_is_cut_is_refused(tmp_path, row):
    path = make(tmp_path, row)
    clip = audio.load(path, 24_000)
    assert clip.num_samples / clip.sample_rate == pytest.approx(SECONDS, abs=0.11)  # codecs fill up their last block
    data = path.read_bytes()
    cuts = [round(share * len(data)) + more for share in (0.3, 0.5, 0.93) for more in (1, 6)]
    refusals = [refusal(path, data[:cut]) for cut in cuts]
    assert all(why is None or why.startswith(f"{path}: ") for why in refusals)
    # Where there is no length, nothing tells of a cut between two frames, or in padding; G.722's frames are bytes.
    frames = 2 if row[0] in ("aac.aac", "ac3.ac3", "amr.amr", "mp2.ts", "mp2.mpg") else 0
    assert refusals.count(None) <= (len(cuts) if row[0] == "g722.g722" else frames)


def refusal(path: Path, data: bytes) -> str | None:
    path.write_bytes(data)
    try:
        audio.load(path, 24_000)
    except AudioError as error:
        return str(error)
    return None


@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_a_part_is_what_the_whole_has_there(tmp_path, row):
    path = make(tmp_path, row)
    whole, rate = part(path)
    for offset, duration in ((0.3, 0.5), (2.7013, 0.5), (3.8, 0.1)):
        samples, start = part(path, offset, duration)[0], round(offset * rate)
        expected = whole[start : start + round(duration * rate)]
        assert samples.shape == expected.shape
        if len(row) == 1 and FFMPEG[row[0]][0] in NOISY:
            lags = [np.corrcoef(samples[9:-9], np.roll(expected, lag)[9:-9])[0, 1] for lag in (-1, 0, 1)]
            assert np.argmax(lags) == 1
            assert lags[1] > 0.95
        else:
            np.testing.assert_allclose(samples, expected, atol=2e-3)


@pytest.mark.parametrize(("kind", "subtype"), [("VORBIS", "OGG"), ("OPUS", "OGG"), ("MPEG_LAYER_III", "MP3")])
def test_a_part_of_a_lossy_file_is_exact_to_its_last_page(tmp_path, kind, subtype):
    path = write(tmp_path / "a", np.stack([sweep(RATE), sweep(RATE)[::-1]], 1), format=subtype, subtype=kind)
    whole, _ = part(path)
    for start in range(1000, whole.size - 1000, 7321):
        samples, _ = part(path, start / RATE, 0.05)
        np.testing.assert_allclose(samples, whole[start : start + 800], atol=2e-3, err_msg=str(start))


def test_an_offset_in_m4a_and_webm_does_not_decode_what_is_before_it(tmp_path, monkeypatch):
    counted = []
    frames = ffmpeg._frames
    monkeypatch.setattr(
        ffmpeg, "_frames", lambda container: (counted.append(frame.samples) or frame for frame in frames(container))
    )
    for name in ("alac.m4a", "opus.webm"):
        codec, rate = FFMPEG[name]
        path = mux(tmp_path / name, codec, sweep(rate, 30), rate)
        counted.clear()
        part(path, 27.5, 0.5)
        assert sum(counted) < 8 * rate


PAUSED = [("webm", "libopus", 48_000), ("mka", "aac", 44_100), ("m4a", "aac", 44_100), ("m4a", "alac", 44_100)]


@pytest.mark.parametrize(("suffix", "codec", "rate"), PAUSED)
@pytest.mark.parametrize("pause", [0.3, 3.0])
def test_a_part_behind_a_pause_of_the_recorder_is_what_the_whole_has_there(tmp_path, suffix, codec, rate, pause):
    path = mux(tmp_path / f"a.{suffix}", codec, sweep(rate, 10), rate, pause=pause)
    whole, rate = part(path)
    assert len(whole) / rate == pytest.approx(10, abs=0.1)
    for offset in (2.5, 8.3):
        samples, start = part(path, offset, 0.5)[0], round(offset * rate)
        assert np.corrcoef(samples, whole[start : start + len(samples)])[0, 1] > 0.99


def with_edits(path: Path, *edits: tuple[float, int]) -> Path:
    """Writes an MP4 anew with another list of edits: their lengths in seconds, and the sample that each begins at."""
    data = bytearray(path.read_bytes())
    place, ticks = data.index(b"edts") - 4, data.index(b"mvhd") + 16
    second = int.from_bytes(data[ticks : ticks + 4], "big")
    rows = b"".join(struct.pack(">Iihh", round(second * seconds), first, 1, 0) for seconds, first in edits)
    box = struct.pack(">I4sI4sII", 24 + len(rows), b"edts", 16 + len(rows), b"elst", 0, len(edits)) + rows
    more = len(box) - int.from_bytes(data[place : place + 4], "big")
    data[place : place + len(box) - more] = box
    for name in (b"moov", b"trak"):
        at = data.index(name) - 4
        data[at : at + 4] = (int.from_bytes(data[at : at + 4], "big") + more).to_bytes(4, "big")
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("codec", ["aac", "alac", "pcm_s16le"])
def test_an_mp4_with_a_list_of_edits_is_read_and_so_are_its_parts(tmp_path, codec):
    path = mux(tmp_path / "a.mov", codec, sweep(44_100, 10), 44_100)
    begins_later = with_edits(path, (2, -1), (6, 88_200))
    assert audio.load(begins_later, 24_000).num_samples == pytest.approx(6 * 44_100, abs=5000)
    path = with_edits(path, (3, 0), (3, 5 * 44_100))
    whole, rate = part(path)
    samples = part(path, 4.5, 0.5)[0]
    start = round(4.5 * rate)
    assert np.corrcoef(samples, whole[start : start + len(samples)])[0, 1] > 0.99


@pytest.mark.parametrize("kbits", [32, 64])
def test_an_mp3_of_small_frames_has_no_holes(tmp_path, kbits):
    """Its frames lean on more frames than mpg123 goes back when it seeks."""
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 10 * 44_100).astype(np.float32)
    path = mux(tmp_path / "a.mp3", "libmp3lame", noise, 44_100, bit_rate=1000 * kbits)
    with av.open(str(path)) as container:
        expected = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    whole, rate = part(path)
    np.testing.assert_allclose(whole, expected[: whole.size], atol=1e-3)
    samples = part(path, 4.2, 2.0)[0]  # more than a block
    np.testing.assert_allclose(samples, whole[round(4.2 * rate) :][: 2 * rate], atol=1e-3)


def test_a_long_mp3_of_many_segments_is_gone_through_once(tmp_path, monkeypatch):
    gone_through = []
    monkeypatch.setattr(mpeg, "parts", lambda raw, parts=mpeg.parts: gone_through.append(raw) or parts(raw))
    path = write(tmp_path / "a.mp3", sweep(RATE, 4), format="MP3", subtype="MPEG_LAYER_III")
    for start in (0.5, 1.5, 2.5):
        part(path, start, 0.5)
    assert len(gone_through) == 1
    write(path, sweep(RATE, 3), format="MP3", subtype="MPEG_LAYER_III")
    part(path, 0.5, 0.5)
    assert len(gone_through) == 2


# -- Joined files


def joined(first: Path, *others: Path) -> Path:
    first.write_bytes(b"".join(path.read_bytes() for path in (first, *others)))
    return first


@pytest.mark.parametrize(("kind", "subtype"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")])
@pytest.mark.parametrize("same", [True, False])
def test_streams_one_after_the_other_are_read_to_the_end(tmp_path, kind, subtype, same):
    """As radio recorders write them; the same file twice has the same serial number twice."""
    sounds = [sweep(RATE), sweep(RATE) if same else 0.5 * sweep(RATE, 3)]
    files = [write(tmp_path / f"{n}", x, format=kind, subtype=subtype) for n, x in enumerate(sounds)]
    separate = [part(file)[0] for file in files]
    path = joined(*files)
    np.testing.assert_array_equal(part(path)[0], np.concatenate(separate))
    assert audio.load(path, RATE).num_samples == sum(map(len, separate))
    across = part(path, 3.5, 1.0)[0]
    np.testing.assert_allclose(across, np.concatenate(separate)[56_000:72_000], atol=2e-3)


def test_joined_mp3s_with_tags_are_read_to_the_end(tmp_path):
    tag, title = b"TAG" + b"x" * 125, b"ID3\3\0\0\0\0\7\x68" + bytes(1000)
    sound = write(tmp_path / "a.mp3", sweep(RATE)).read_bytes()
    (tmp_path / "a.mp3").write_bytes((title + sound + tag) * 3)
    assert part(tmp_path / "a.mp3")[0].size == 3 * SECONDS * RATE


@pytest.mark.parametrize("xing", [0, 1])
def test_mp3_of_any_writer_is_read_whole_and_joined(tmp_path, xing):
    files = [mux(tmp_path / f"{n}.mp3", "libmp3lame", sweep(RATE), RATE, write_xing=str(xing)) for n in range(2)]
    alone = part(files[0])[0].size
    assert part(joined(*files))[0].size == pytest.approx(2 * alone, abs=1152)


@pytest.mark.parametrize("kind", ["OGG", "MP3"])
def test_a_sample_rate_that_changes_within_a_file_is_refused(tmp_path, kind):
    files = [write(tmp_path / f"{n}", sweep(rate), rate, format=kind) for n, rate in enumerate((16_000, 24_000))]
    with pytest.raises(AudioError, match="changes from 16000 to 24000 Hz"):
        audio.load(joined(*files), 24_000)


@pytest.mark.parametrize(("name", "codec"), [("mp3", "libmp3lame"), ("aac", "aac")])
def test_a_sample_rate_that_changes_in_a_stream_without_headers_is_refused(tmp_path, name, codec):
    options: Any = {"write_xing": "0"} if name == "mp3" else {}
    files = [mux(tmp_path / f"{r}.{name}", codec, sweep(r), r, **options) for r in (16_000, 24_000)]
    with pytest.raises(AudioError, match="changes"):
        audio.load(joined(*files), 24_000)


def test_where_the_channels_change_each_part_is_mixed_by_itself(tmp_path):
    mono, stereo = sweep(RATE), np.stack([sweep(RATE), 0.5 * sweep(RATE)], 1)
    files = [write(tmp_path / f"{n}.ogg", x) for n, x in enumerate((mono, stereo))]
    mixed = np.concatenate([soundfile.read(file, always_2d=True)[0].mean(axis=1) for file in files])
    np.testing.assert_allclose(audio.load(joined(*files), RATE).samples, mixed, atol=1e-6)


@pytest.mark.parametrize("row", [("WAV", "PCM_16"), ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("CAF", "PCM_16")])
@pytest.mark.parametrize("second", ["itself", "wav"])
def test_joined_files_that_have_one_length_are_refused(tmp_path, row, second):
    path = make(tmp_path, row)
    other = path if second == "itself" else write(tmp_path / "b.wav", sweep(RATE))
    with pytest.raises(AudioError, match="joined"):
        audio.load(joined(path, other), 24_000)


@pytest.mark.parametrize("row", [("W64", "PCM_16"), ("FLAC", "PCM_16"), ("tta.tta",), ("aac.m4a",), ("aac.mka",)])
def test_a_file_joined_to_itself_is_refused(tmp_path, row):
    path = make(tmp_path, row)
    with pytest.raises(AudioError, match="joined"):
        audio.load(joined(path, path), 24_000)


@pytest.mark.parametrize("xing", [0, 1])
def test_a_short_mp3_behind_another_is_read(tmp_path, xing):
    """The last file has 0.3 s, fewer bytes than a tag may have."""
    files = [
        mux(tmp_path / f"{n}.mp3", "libmp3lame", sweep(RATE, seconds), RATE, write_xing=str(xing))
        for n, seconds in enumerate((SECONDS, 0.3, 0.3))
    ]
    separate = [part(file)[0] for file in files]
    np.testing.assert_allclose(part(joined(*files))[0], np.concatenate(separate), atol=0.1 if xing == 0 else 2e-3)


@pytest.mark.parametrize("xing", [0, 1])
def test_a_short_mp3_of_another_rate_behind_another_is_refused(tmp_path, xing):
    files = [
        mux(tmp_path / f"{n}.mp3", "libmp3lame", sweep(rate, seconds), rate, write_xing=str(xing))
        for n, (rate, seconds) in enumerate(((RATE, SECONDS), (48_000, 0.1)))
    ]
    with pytest.raises(AudioError, match="changes from 16000 to 48000 Hz"):
        audio.load(joined(*files), 24_000)


@pytest.mark.parametrize("counted", [3, 100, -3])
def test_an_mp3_whose_header_counts_less_than_there_is_is_refused(tmp_path, counted):
    path = mux(tmp_path / "a.mp3", "libmp3lame", sweep(44_100), 44_100)
    data = bytearray(path.read_bytes())
    at = data.index(b"Info") + 8
    frames = int.from_bytes(data[at : at + 4], "big")
    data[at : at + 4] = (counted % frames).to_bytes(4, "big")
    path.write_bytes(data)
    with pytest.raises(AudioError, match=r"its header counts .* s, and more lie behind"):
        audio.load(path, 24_000)


def vbr(path: Path, seconds: int = 10, xing="0") -> Path:
    """An MP3 whose first half needs far more bits than its second one."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 44_100 * seconds // 2).astype(np.float32)
    with av.open(str(path), "w", options={"write_xing": xing, "id3v2_version": "0"}) as container:
        stream: Any = container.add_stream("libmp3lame", rate=44_100, layout="mono")
        stream.codec_context.flags |= 2  # by quality, not by bit rate
        stream.codec_context.global_quality = 236
        frame = av.AudioFrame.from_ndarray(np.concatenate([noise, 0.01 * noise])[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 44_100, 0
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return path


def test_an_mp3_of_changing_bit_rate_that_nothing_counts_is_read_to_its_end(tmp_path):
    path, other = vbr(tmp_path / "a.mp3"), vbr(tmp_path / "b.mp3", xing="1")
    whole, rate = part(path)
    assert len(whole) == pytest.approx(10 * rate, abs=4000)
    np.testing.assert_allclose(part(path, 8.3, 0.5)[0], whole[round(8.3 * rate) :][: rate // 2], atol=1e-6)
    both = joined(other, path)
    whole, rate = part(both)
    assert len(whole) == pytest.approx(20 * rate, abs=6000)
    np.testing.assert_allclose(part(both, 18.3, 0.5)[0], whole[round(18.3 * rate) :][: rate // 2], atol=2e-3)


def test_an_mp3_whose_header_counts_a_frame_less_is_one_part(tmp_path):
    path = mux(tmp_path / "a.mp3", "libmp3lame", sweep(RATE), RATE)
    data = bytearray(path.read_bytes())
    tag = max(data.find(b"Xing"), data.find(b"Info"))
    size = int.from_bytes(data[tag + 12 : tag + 16], "big")
    whole = part(path)[0]
    data[tag + 12 : tag + 16] = (size - 144).to_bytes(4, "big")
    path.write_bytes(data)
    np.testing.assert_array_equal(part(path)[0], whole)


KINDS = [
    *(("WAV", "PCM_16"), ("WAV", "ULAW"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS")),
    *(("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("CAF", "PCM_16"), ("W64", "PCM_16")),
    *((name,) for name in ("aac.m4a", "opus.webm", "aac.mka", "pcm.avi", "aac.aac", "ac3.ac3", "amr.amr")),
    *((name,) for name in ("flac.ogg", "wavpack.wv", "tta.tta", "wma.wma", "ac3.rm", "pcm.voc")),
]


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> dict[tuple[str, ...], bytes]:
    folder = tmp_path_factory.mktemp("sounds")
    return {row: make(folder, row).read_bytes() for row in KINDS}


@pytest.mark.parametrize("row", KINDS, ids="-".join)
def test_a_file_of_another_type_behind_a_file_is_not_dropped(tmp_path, sounds, row):
    path, streams = tmp_path / "a", {"OGG", "flac.ogg"}
    for other in KINDS:
        if other != row and not {row[0], other[0]} <= streams:
            assert refusal(path, sounds[row] + sounds[other]), other


# -- The ends of files


@pytest.mark.parametrize("row", KINDS, ids="-".join)
@pytest.mark.parametrize("after", [b"TAG" + b"x" * 125, bytes(64), bytes(70_000)], ids=["ID3v1", "64", "70000"])
def test_tags_and_zeros_behind_a_file_of_any_kind_are_passed_over(tmp_path, sounds, row, after):
    (tmp_path / "a").write_bytes(sounds[row] + after)
    (tmp_path / "b").write_bytes(sounds[row])
    np.testing.assert_array_equal(part(tmp_path / "a")[0], part(tmp_path / "b")[0])


@pytest.mark.parametrize("row", KINDS, ids="-".join)
def test_an_id3_tag_before_a_file_of_any_kind_is_passed_over(tmp_path, sounds, row):
    (tmp_path / "a").write_bytes(b"ID3\4\0\0\0\0\1\0" + bytes(128) + sounds[row])
    (tmp_path / "b").write_bytes(sounds[row])
    np.testing.assert_array_equal(part(tmp_path / "a")[0], part(tmp_path / "b")[0])


OLD_TAGS = {
    "APE of version 1": b"x" * 500 + b"APETAGEX" + struct.pack("<4I", 1000, 532, 1, 0) + bytes(8),
    "Lyrics3 of version 1": b"LYRICSBEGIN" + b"x" * 500 + b"LYRICSEND",
}


@pytest.mark.parametrize("tag", OLD_TAGS)
def test_old_tags_behind_an_mp3_are_passed_over(tmp_path, tag):
    path = mux(tmp_path / "a.mp3", "libmp3lame", sweep(44_100), 44_100, write_xing="0", id3v2_version="0")
    length = audio.load(path, 24_000).num_samples
    path.write_bytes(path.read_bytes() + OLD_TAGS[tag] + b"TAG" + b"x" * 125)
    assert audio.load(path, 24_000).num_samples == length


@pytest.mark.parametrize("name", ["a.mp2", "a.mp3", "mp3.wav"])
def test_zeros_behind_mpeg_audio_are_passed_over(tmp_path, name):
    codec = "mp2" if name == "a.mp2" else "libmp3lame"
    options: Any = {"write_xing": "0"} if name == "a.mp3" else {}
    path = mux(tmp_path / name, codec, sweep(RATE), RATE, **options)
    whole = part(path)[0]
    path.write_bytes(path.read_bytes() + bytes(5000))
    np.testing.assert_array_equal(part(path)[0], whole)


def test_a_fragmented_mp4_that_is_cut_in_any_box_is_refused(tmp_path):
    path = mux(
        tmp_path / "a.mp4", "aac", sweep(RATE), RATE, movflags="frag_keyframe+empty_moov", frag_duration="500000"
    )
    data = path.read_bytes()
    boxes = [match.start() - 4 for match in re.finditer(b"moof|mdat", data)]
    assert len(boxes) > 8
    for box in boxes[3:-1]:
        assert all(refusal(path, data[: box + more]) for more in (20, 50, 90))


@pytest.mark.parametrize(
    ("name", "sound"), [("a.mpg", "mp2"), ("a.vob", "ac3"), ("a.mxf", "pcm_s16le"), ("a.ts", "mp2")]
)
def test_a_picture_that_is_cut_behind_the_last_sound_is_refused(tmp_path, name, sound):
    path = mux(tmp_path / name, sound, sweep(48_000), 48_000, picture=2 * SECONDS, coder="mpeg2video")
    data = path.read_bytes()
    assert refusal(path, data) is None
    for share in (0.5, 0.8, 0.95):
        cut = round(share * len(data)) // 2048 * 2048 + 50  # in a packet of it
        assert refusal(path, data[:cut]), share


def test_a_recorder_that_reconnects_without_ending_its_opus_stream_is_read(tmp_path):
    path = make(tmp_path, ("OGG", "OPUS"))
    marked = path.read_bytes()
    separate, unmarked = part(path)[0], ogg_page(marked, flags=0)
    for pieces in ((unmarked, marked), (unmarked, unmarked), (marked, unmarked, marked)):
        path.write_bytes(b"".join(pieces))
        np.testing.assert_array_equal(part(path)[0], np.concatenate([separate] * len(pieces)))
        np.testing.assert_allclose(part(path, 4.5, 1.0)[0], separate[8000:24_000], atol=2e-3)


def test_alac_in_caf_of_ffmpeg_is_read_to_the_end(tmp_path):
    """FFmpeg itself drops the padding of the last packet twice."""
    for seconds in (1, 2.3, 4):
        path = mux(tmp_path / "a.caf", "alac", sweep(RATE, seconds), RATE)
        samples = part(path)[0]
        assert samples.size == seconds * RATE
        np.testing.assert_array_equal(part(path, seconds - 0.5, 0.6)[0], samples[-RATE // 2 :])
    data = path.read_bytes()
    assert refusal(path, data[: len(data) // 2])


@pytest.mark.parametrize(
    ("kind", "place", "lengths"),
    [
        ("WAV", (b"data", 4, "little"), (0, 0xFFFFFFFF)),
        ("AU", (b".snd", 8, "big"), (0, 0xFFFFFFFF)),
        ("AIFF", (b"SSND", 4, "big"), (0, 8, 0xFFFFFFFF)),
        ("W64", (b"data\xf3", 16, "little"), (0, 24, (1 << 64) - 1)),
        ("RF64", (b"ds64", 16, "little"), (0, (1 << 64) - 1)),
    ],
)
def test_a_length_of_0_means_that_the_audio_lasts_to_the_end(tmp_path, kind, place, lengths):
    name, offset, order = place
    path = make(tmp_path, (kind, "PCM_16"))
    whole, data = part(path)[0], bytearray(path.read_bytes())
    at = data.find(name) + offset
    for length in lengths:
        width = 8 if kind in ("W64", "RF64") else 4
        data[at : at + width] = length.to_bytes(width, order)
        path.write_bytes(data)
        np.testing.assert_array_equal(part(path)[0], whole)
        np.testing.assert_array_equal(part(path, 1.0, 0.5)[0], whole[RATE : RATE + RATE // 2])


def test_a_flac_that_ends_in_a_few_samples_of_silence_is_read(tmp_path):
    """Its last frame is shorter than most headers."""
    for size in (300, 4096 + 300, 4608 + 300):
        path = write(tmp_path / "a.flac", np.concatenate([sweep(RATE), np.zeros(size)])[-size:], subtype="PCM_S8")
        assert part(path)[0].size == size


@pytest.mark.parametrize("samples", [500, 2000, 5000])
def test_a_flac_whose_header_counts_a_little_less_than_there_is_is_refused(tmp_path, samples):
    for path in (make(tmp_path, ("FLAC", "PCM_16")), mux(tmp_path / "b.flac", "flac", sweep(RATE), RATE)):
        data = path.read_bytes()
        why = refusal(path, data[:22] + (SECONDS * RATE - samples).to_bytes(4, "big") + data[26:])
        assert "its header counts" in str(why)


def ogg_page(data: bytes, **changes: int) -> bytes:
    """The file with another flag byte in its last page, and the checksum that belongs to it."""
    page = data.rfind(b"OggS")
    changed = bytearray(data[page:])
    changed[5] = changes.get("flags", changed[5])
    changed[22:26] = bytes(4)
    mirror = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
    crc = zlib.crc32(bytes(changed).translate(mirror), 0xFFFFFFFF) ^ 0xFFFFFFFF
    changed[22:26] = int(f"{crc:032b}"[::-1], 2).to_bytes(4, "little")
    return data[:page] + changed


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
@pytest.mark.parametrize("after", [b"", bytes(9000), b"junk" * 50])
def test_ogg_without_an_end_of_stream_mark_is_read(tmp_path, subtype, after):
    path = make(tmp_path, ("OGG", subtype))
    data = path.read_bytes()
    path.write_bytes(ogg_page(data, flags=0) + after)
    clip = audio.load(path, 24_000)
    assert clip.num_samples / clip.sample_rate == pytest.approx(SECONDS, abs=0.03)  # the mark cuts the last block
    path.write_bytes(data[: data.rfind(b"OggS")] + after)  # a recorder that was stopped between two pages
    assert audio.load(path, 24_000).samples.size > 24_000


def test_a_gap_in_an_ogg_stream_is_refused(tmp_path):
    path = make(tmp_path, ("OGG", "VORBIS"))
    data = path.read_bytes()
    pages = [match.start() for match in re.finditer(b"OggS", data)]
    for damaged in (data[: pages[4]] + data[pages[5] :], data[: pages[5]] + data[pages[4] :]):
        path.write_bytes(damaged)
        with pytest.raises(AudioError, match="pages of the Ogg stream are missing, or twice there"):
            audio.load(path, 24_000)


def test_a_recorder_that_came_late_to_an_ogg_stream_is_read(tmp_path):
    path = make(tmp_path, ("OGG", "VORBIS"))
    data = path.read_bytes()
    pages = [match.start() for match in re.finditer(b"OggS", data)]
    path.write_bytes(data[: pages[2]] + data[pages[3] :])  # the headers, and not the first page of sound
    assert audio.load(path, 24_000).samples.size > 24_000


def overwritten(data: bytes, start: int, end: int) -> bytes:
    return data[:start] + bytes(end - start) + data[end:]


def repeated(data: bytes, start: int, end: int) -> bytes:
    return data[:end] + data[start:]


@pytest.mark.parametrize("damage", [overwritten, repeated])
@pytest.mark.parametrize(
    "row",
    [
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("FLAC", "PCM_16"),
        *((name,) for name in ("opus.webm", "aac.mka", "flac.mkv", "flac.ogg", "tta.tta", "wavpack.wv", "aac.m4a")),
    ],
    ids="-".join,
)
def test_a_hole_in_the_middle_is_refused(tmp_path, row, damage):
    path = make(tmp_path, row)
    data = path.read_bytes()
    assert refusal(path, damage(data, len(data) * 4 // 10, len(data) * 6 // 10))


def test_an_avi_of_which_a_part_is_lost_is_refused(tmp_path):
    path = make(tmp_path, ("pcm.avi",))
    data = path.read_bytes()
    assert "could be decoded" in str(refusal(path, overwritten(data, len(data) * 4 // 10, len(data) * 6 // 10)))


@pytest.mark.parametrize("codec", ["pcm_s16le", "pcm_u8", "adpcm_ms", "adpcm_ima_wav"])
@pytest.mark.parametrize("picture", [0, 1])
def test_an_avi_of_a_minute_is_read_and_refused_where_a_part_is_lost(tmp_path, codec, picture):
    """Its length by FFmpeg is none with a picture, and without one it counts the chunks' headers, too."""
    path = mux(tmp_path / "a.avi", codec, sweep(RATE, 60), RATE, picture=picture)
    assert audio.load(path, 24_000).num_samples == pytest.approx(60 * RATE, abs=2100)
    data = path.read_bytes()
    assert "could be decoded" in str(refusal(path, overwritten(data, len(data) * 4 // 10, len(data) * 6 // 10)))


@pytest.mark.parametrize("row", [("WAV", "PCM_16"), ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("OGG", "VORBIS")])
def test_a_tag_before_a_file_does_not_hide_that_it_is_cut(tmp_path, row):
    path = make(tmp_path, row)
    tag, data = b"ID3\3\0\0\0\0\0\x0b" + bytes(11), path.read_bytes()
    assert refusal(path, tag + data) is None
    assert "truncated" in str(refusal(path, tag + data[: len(data) // 2]))


def test_opus_that_does_not_say_its_former_rate_keeps_all_of_its_spectrum(tmp_path):
    path = make(tmp_path, ("OGG", "OPUS"))
    data = path.read_bytes()
    end = 28 + 19
    path.write_bytes(ogg_page(data[: 28 + 12] + bytes(4) + data[28 + 16 : end]) + data[end:])
    clip = audio.load(path, 48_000)
    assert (clip.sample_rate, clip.num_samples) == (48_000, SECONDS * 48_000)


def test_ogg_of_which_the_last_page_is_damaged_is_refused(tmp_path):
    path = make(tmp_path, ("OGG", "OPUS"))
    data = bytearray(path.read_bytes())
    data[-9] ^= 255
    path.write_bytes(data)
    with pytest.raises(AudioError, match="damaged"):
        audio.load(path, 24_000)


def wav(data: bytes, size=None, channels=1, rate=RATE, after=b"") -> bytes:
    """A WAV of 16 bits whose header says what it likes."""
    fields = struct.pack("<IHHIIHH", 16, 1, channels, rate, 2 * rate, 2, 16)
    size = struct.pack("<I", len(data) if size is None else size)
    return b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + fields + b"data" + size + data + after


PCM = (32767 * sweep(RATE)).astype("<i2").tobytes()


@pytest.mark.parametrize(
    "data",
    [
        wav(PCM, len(PCM) + 2 * 20),
        wav(PCM, len(PCM) + 44),
        wav(PCM, 0),
        wav(PCM, 0xFFFFFFFF),
        wav(PCM, after=b"LIST\4\0\0\0abcd"),
        wav(PCM, after=b"TAG" + b"x" * 125),
        wav(PCM, after=bytes(50_000)),
        wav(PCM + b"x", after=b"LIST\4\0\0\0abcd"),
        wav(PCM + b"x", after=b"\0LIST\4\0\0\0abcd"),
    ],
    ids=["few missing", "header counted", "0", "pipe", "metadata", "ID3v1", "zeros", "not padded", "padded"],
)
def test_a_wav_whose_header_is_a_little_wrong_is_read(tmp_path, data):
    (tmp_path / "a.wav").write_bytes(data)
    assert audio.load(tmp_path / "a.wav", 24_000).num_samples == SECONDS * RATE


def test_samples_of_24_bits_in_4_bytes_are_not_read_as_noise(tmp_path):
    path = tmp_path / "a.wav"
    data = bytearray(wav((2.0**31 * sweep(RATE)).astype("<i4").tobytes()))
    data[32:36] = struct.pack("<HH", 4, 24)
    path.write_bytes(data)
    with pytest.raises(AudioError, match="24 bits in 4 bytes"):
        audio.load(path, 24_000)
    data = write(tmp_path / "a.caf", sweep(RATE), subtype="PCM_24").read_bytes()
    at = data.index(b"lpcm") + 8
    path.write_bytes(data[:at] + (4).to_bytes(4, "big") + data[at + 4 :])
    with pytest.raises(AudioError, match="24 bits in 4 bytes"):
        audio.load(path, 24_000)
    for kind in ("WAV", "CAF"):
        assert audio.load(write(path, sweep(RATE), subtype="PCM_24", format=kind), 24_000).num_samples == SECONDS * RATE


@pytest.mark.parametrize("codec", ["libmp3lame", "mp2"])
@pytest.mark.parametrize(("format", "rf64"), [("w64", "never"), ("wav", "always")])
def test_mpeg_audio_in_a_chunk_that_is_filled_up_is_read(tmp_path, codec, format, rf64):
    for seconds in (2, 2.1, 2.2, 2.3):  # some have an odd length
        path = mux(tmp_path / "a", codec, sweep(44_100, seconds), 44_100, format=format, rf64=rf64)
        assert audio.load(path, 24_000).num_samples == pytest.approx(seconds * 44_100, abs=4000)


def test_aac_in_wav_is_read_with_headers_of_frames_and_refused_by_name_without(tmp_path):
    with pytest.raises(AudioError, match=r"AAC in WAV without headers of frames: .* use \.m4a or \.aac"):
        audio.load(mux(tmp_path / "a.wav", "aac", sweep(44_100), 44_100), 24_000)
    data = mux(tmp_path / "a.aac", "aac", sweep(44_100), 44_100).read_bytes()
    whole = bytearray(wav(data, rate=44_100))
    whole[20:22] = b"\xff\0"
    (tmp_path / "a.wav").write_bytes(whole)
    assert audio.load(tmp_path / "a.wav", 24_000).num_samples == pytest.approx(SECONDS * 44_100, abs=3000)
    assert "truncated" in (refusal(tmp_path / "a.wav", bytes(whole[: len(whole) // 2])) or "")


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "AU", "CAF", "NIST", "W64"])
def test_a_header_that_says_less_than_there_is_is_refused(tmp_path, kind):
    path = make(tmp_path, (kind, "PCM_16"))
    path.write_bytes(path.read_bytes() + sweep(RATE, 1).tobytes())
    with pytest.raises(AudioError, match=r"its header counts .* s more lie behind"):
        audio.load(path, 24_000)


def test_a_wav_with_two_pieces_of_audio_is_refused(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav(PCM, after=b"data" + struct.pack("<I", len(PCM)) + PCM))
    with pytest.raises(AudioError, match=r"its header counts 4\.00 s, 4\.00 s more lie behind"):
        audio.load(tmp_path / "a.wav", 24_000)


@pytest.mark.parametrize("samples", [16_000, 16_384, SECONDS * RATE - 1])
def test_a_flac_whose_header_counts_less_than_there_is_is_refused(tmp_path, samples):
    path = make(tmp_path, ("FLAC", "PCM_16"))
    data = path.read_bytes()
    path.write_bytes(data[:22] + samples.to_bytes(4, "big") + data[26:])
    if samples < SECONDS * RATE - 1:
        with pytest.raises(AudioError, match=r"its header counts 1\..* s, and more lie behind"):
            audio.load(path, 24_000)
    else:  # what is left is a part of the last frame
        assert audio.load(path, 24_000).num_samples == samples


@pytest.mark.parametrize(
    ("format", "codec"),
    [
        *[("wav", "pcm_s16le"), ("wav", "g722"), ("aiff", "pcm_s16be"), ("au", "pcm_s16be"), ("caf", "pcm_s16le")],
        *[
            ("avi", "libmp3lame"),
            ("w64", "pcm_s16le"),
            ("flac", "flac"),
            ("ogg", "libopus"),
            ("matroska", "libopus"),
            ("webm", "libopus"),
        ],
        *[("mp3", "libmp3lame"), ("wv", "wavpack"), ("tta", "tta"), ("adts", "aac"), ("asf", "wmav2")],
    ],
)
def test_what_was_written_to_a_pipe_is_read(tmp_path, format, codec):
    """It has no length, or a wrong one."""
    rate = 44_100 if codec == "wmav2" else RATE
    path = tmp_path / "a"
    with open(path, "wb") as file:
        mux(SimpleNamespace(write=file.write), codec, sweep(rate), rate, format=format)
    clip = audio.load(path, 24_000)
    assert clip.num_samples / clip.sample_rate == pytest.approx(SECONDS, abs=0.15)


def test_flac_of_unknown_length_that_is_cut_is_refused(tmp_path):
    path = make(tmp_path, ("FLAC", "PCM_16"))
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    path.write_bytes(data)
    assert audio.load(path, 24_000).num_samples == SECONDS * RATE
    np.testing.assert_array_equal(part(path, 3.0, 0.5)[0], part(path)[0][3 * RATE : 3 * RATE + RATE // 2])
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(AudioError, match="truncated"):
        audio.load(path, 24_000)
    for damaged in (overwritten, lambda data, start, end: data[:start] + data[end:]):
        path.write_bytes(damaged(bytes(data), len(data) // 2, len(data) // 2 + 5000))
        with pytest.raises(AudioError, match="damaged: .* samples are lost in between"):
            audio.load(path, 24_000)


def test_adts_with_a_quiet_beginning_is_read_whole(tmp_path):
    """FFmpeg estimates its duration by the bit rate of its beginning."""
    samples = np.concatenate([1e-4 * sweep(RATE, 20), sweep(RATE, 4)])
    assert audio.load(mux(tmp_path / "a.aac", "aac", samples, RATE), RATE).num_samples >= samples.size


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.avi"])
def test_a_picture_that_goes_on_after_the_sound_is_no_reason(tmp_path, name):
    path = mux(tmp_path / name, "libmp3lame", sweep(44_100), 44_100, picture=3 * SECONDS)
    assert audio.load(path, 24_000).num_samples == pytest.approx(SECONDS * 44_100, abs=4000)


def test_dsd_is_read_and_refused_where_it_is_cut(tmp_path):
    rate, blocks = 2_822_400, 20
    time = np.arange(8 * 4096 * blocks) / rate
    density = 0.5 + 0.4 * np.sin(2 * np.pi * 440 * time)
    data = np.packbits(np.random.default_rng(0).random(time.size) < density, bitorder="little").tobytes()
    fields = struct.pack("<4sQIIIIIIQII", b"fmt ", 52, 1, 0, 1, 1, rate, 1, time.size, 4096, 0)
    whole = struct.pack("<4sQQQ", b"DSD ", 28, 92 + len(data), 0) + fields
    whole += struct.pack("<4sQ", b"data", 12 + len(data)) + data
    path = tmp_path / "a.dsf"
    path.write_bytes(whole)
    clip = audio.load(path, 24_000)
    assert (clip.sample_rate, clip.num_samples) == (rate // 8, 4096 * blocks)
    assert refusal(path, whole[: len(whole) // 2])


# -- The table


UNWRITTEN = {".ape", ".mpc", ".mp+", ".tak"}
"""Suffixes of the row of which neither libsndfile nor FFmpeg writes anything."""


def test_the_table_names_every_suffix_and_what_is_tested_of_each_row():
    rows = [line.split("|")[2] for line in TABLE.read_text().splitlines() if line.startswith("| ") and "`." in line]
    named = [set(re.findall(r"`(\.[a-z0-9+]+)`", row)) for row in rows if "m3u8" not in row]
    named = [row for row in named if row]
    assert set().union(*named) == audio.EXTENSIONS
    tested = {f".{kind.lower()}" for kind in SNDFILE} | {Path(name).suffix for name in FFMPEG} | {".dsf"}
    assert all(row & tested or row == UNWRITTEN for row in named)
