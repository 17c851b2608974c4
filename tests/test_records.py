"""The formats of prepared audio and of stored features."""

import dataclasses
import json
import resource
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnicodec_jax.data import crops, features, records
from omnicodec_jax.data.features import FeatureFormat, FeatureStore
from omnicodec_jax.data.prepare_unit import PrepareConfig, read_settings
from omnicodec_jax.data.records import SAMPLE_RATE, Header, Shard
from omnicodec_jax.errors import DataError

pytestmark = pytest.mark.quick

RNG = np.random.default_rng(0)
HEADER = Header("speech/ä b.wav", "speech", 48_000, 96_017, 1.7, 44_100, 176_432)


def shard(name="speech-train-000000", digest="0123", clips=(100,)):
    return Shard(name=name, domain="speech", split="train", digest=digest, clips=clips, bytes=1)


@given(st.integers(1, 10**8) | st.integers(1, 4000).map(lambda s: s * SAMPLE_RATE), st.integers(10, 120))
def test_segments_tile_a_clip(samples, seconds):
    pieces = records.segments(samples, seconds)
    starts, sizes = zip(*pieces, strict=True)
    assert list(starts) == [sum(sizes[:i]) for i in range(len(sizes))]
    assert sum(sizes) == samples
    assert all(start % SAMPLE_RATE == 0 for start in starts)
    assert max(sizes) <= seconds * SAMPLE_RATE
    assert len(pieces) == 1 or min(sizes) >= seconds // 2 * SAMPLE_RATE
    assert len(pieces) == records.num_segments(samples, seconds)
    np.testing.assert_array_equal(records.num_segments(np.array([samples, 1]), seconds), [len(pieces), 1])


@pytest.mark.parametrize("length", [1, 599, 24_000, 100_001])
def test_a_record_gives_back_what_it_was_made_of(length):
    samples = RNG.integers(-32_768, 32_768, length, np.int16)
    record = records.encode(HEADER, samples)
    assert records.read_header(record) == HEADER
    np.testing.assert_array_equal(records.read_samples(record), samples)
    assert records.encode(HEADER, samples) == record
    for start, count in [(0, length // 3), (length // 3, length // 2), (length - 1, 1)]:
        np.testing.assert_array_equal(records.read_samples(record, start, count), samples[start : start + count])


@pytest.fixture
def contents():
    return [RNG.integers(0, 256, size, np.uint8).tobytes() for size in (70_000, 1, 90_000, 0, 30_000)]


def test_shards_are_equal_for_equal_records(tmp_path, contents):
    sizes = {records.write_shard(tmp_path / name, contents) for name in ("a", "b", "c/d")}
    assert sizes == {(tmp_path / "a").stat().st_size}
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c/d").read_bytes()
    assert [records.read_record(tmp_path / "a", i) for i in range(5)] == contents


def test_a_damaged_record_is_refused_and_its_neighbours_are_read(tmp_path, contents):
    path = tmp_path / "a"
    records.write_shard(path, contents)
    data = bytearray(path.read_bytes())
    data[data.index(contents[2][500:600])] ^= 1
    path.write_bytes(data)
    for _ in range(2):
        with pytest.raises(DataError, match=f"{path}: record 2 cannot be read"):
            records.read_record(path, 2)
        assert [records.read_record(path, i) for i in (0, 1, 3, 4)] == [contents[i] for i in (0, 1, 3, 4)]
    with pytest.raises(DataError, match="record 5 cannot be read"):
        records.read_record(path, 5)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: data[:-1]])
def test_a_truncated_shard_is_refused(tmp_path, contents, damage):
    path = tmp_path / "a"
    records.write_shard(path, contents)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match="record 0 cannot be read"):
        records.read_record(path, 0)
    path.unlink()
    records._reader.cache_clear()
    with pytest.raises(DataError, match="no such shard"):
        records.read_record(path, 0)


def test_a_full_disk_leaves_nothing(tmp_path, contents):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large; .*/a'"):
            records.write_shard(tmp_path / "a", contents)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"name": "a"}', '{"name": "a", "clips": []}'])
def test_a_damaged_index_is_refused(tmp_path, text):
    with pytest.raises(DataError, match="no prepared audio here; run: omnicodec prepare"):
        records.read_index(tmp_path)
    (tmp_path / records.INDEX).write_text(text + "\n")
    with pytest.raises(DataError, match=r"index\.jsonl: damaged: .*run omnicodec prepare again"):
        records.read_index(tmp_path)
    with pytest.raises(DataError, match=r"prepared\.json.*run omnicodec prepare again"):
        read_settings(tmp_path)


def test_files_of_a_later_version_are_refused_by_the_field_that_is_not_known(tmp_path):
    (tmp_path / records.SETTINGS).write_text('{"validation": 0.1, "loudness": -23}')
    with pytest.raises(DataError, match=r"prepared\.json: unknown field 'loudness': a later version .*; upgrade it"):
        read_settings(tmp_path)
    (tmp_path / records.SETTINGS).write_text('{"validation": 0.1}')
    assert read_settings(tmp_path) == PrepareConfig(validation=0.1)
    (tmp_path / records.INDEX).write_text(json.dumps({**dataclasses.asdict(shard()), "codec": "flac"}) + "\n")
    with pytest.raises(DataError, match=r"index\.jsonl: unknown field 'codec': a later version .*; upgrade it"):
        records.read_index(tmp_path)


def test_the_fingerprint_tells_data_apart():
    shards = [[shard()], [shard(digest="4567")], [shard(clips=(101,))], [shard(), shard(name="b")], []]
    assert len({records.fingerprint(each) for each in shards}) == 5
    assert records.fingerprint([shard()]) == records.fingerprint([shard()])


@given(st.integers(0, 10**7))
def test_number_of_vectors(samples):
    """Mel frames of 10 ms, eight to a vector, anew at every second."""
    frames = [SAMPLE_RATE // 240] * (samples // SAMPLE_RATE) + [samples % SAMPLE_RATE // 240]
    assert features.num_vectors(samples) == sum(-(-count // 8) for count in frames)


def feature_format(number, feature_dim=16, crop=None):
    return FeatureFormat(
        encoder="abc",
        compute="float32",
        feature_dim=feature_dim,
        number=number,
        crop_samples=crop,
        stride_samples=crop,
    )


def vectors(count=39):
    """Makes vectors of very different sizes, and one that is zero."""
    values = RNG.standard_normal((count, 16)) * np.geomspace(1e-3, 1e3, count)[:, None]
    values[5] = 0
    return values.astype(np.float32)


def test_bfloat16_features_are_rounded_once():
    values, format = vectors(), feature_format("bfloat16")
    record = format.encode(values)
    assert len(record) == len(values) * format.bytes_per_vector == values.size * 2
    np.testing.assert_array_equal(format.decode(record, 0, 39), values.astype(ml_dtypes.bfloat16))


def test_int8_features_are_within_half_a_step():
    values, format = vectors(), feature_format("int8")
    record = format.encode(values)
    assert len(record) == len(values) * format.bytes_per_vector == values.size + 4 * len(values)
    decoded = format.decode(record, 0, 39)
    assert decoded.dtype == ml_dtypes.bfloat16
    step = np.abs(values).max(axis=1, keepdims=True) / 127
    error = np.abs(decoded.astype(np.float32) - values)
    assert (error <= step / 2 * 1.001 + 2.0**-8 * np.abs(values)).all()
    assert (error[5] == 0).all()


@pytest.mark.parametrize("number", ["bfloat16", "int8"])
def test_a_part_of_a_record(number):
    format = feature_format(number)
    record = format.encode(vectors())
    whole = format.decode(record, 0, 39)
    assert whole.shape == (39, 16)
    np.testing.assert_array_equal(format.decode(record, 13, 10), whole[13:23])
    np.testing.assert_array_equal(format.decode(record, 30, 13), whole[30:])
    assert format.decode(record, 39, 13).shape == (0, 16)


@pytest.mark.parametrize("number", ["bfloat16", "int8"])
def test_store(tmp_path, number):
    """Two segments of two and one crops of a second."""
    format, segments = feature_format(number, crop=SAMPLE_RATE), [vectors(26), vectors(13)]
    held = [shard(clips=(48_000, 24_000)), shard(name="speech-train-000001")]
    with pytest.raises(DataError, match=r"no semantic features here; run omnicodec convert semantic-features"):
        FeatureStore.open(tmp_path, held[:1], SAMPLE_RATE)
    features.save_format(tmp_path, format)
    features.save_format(tmp_path, format)
    records.write_shard(features.shard_path(tmp_path, held[0]), map(format.encode, segments))
    store = FeatureStore.open(tmp_path, held[:1], SAMPLE_RATE)
    crop = store.read_crop(held[0], 0, format.position(48_000, 1))
    assert crop.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(crop, format.decode(format.encode(segments[0]), 13, 13))
    np.testing.assert_array_equal(store.read_crop(held[0], 1, 0), format.decode(format.encode(segments[1]), 0, 13))
    with pytest.raises(DataError, match="record 1: holds no crop at vector 13"):
        store.read_crop(held[0], 1, 13)

    with pytest.raises(DataError, match="lacks the features of 1 of 2 shards, speech-train-000001 for one"):
        FeatureStore.open(tmp_path, held, SAMPLE_RATE)
    with pytest.raises(DataError, match="lacks"):  # features of what the shard was before
        FeatureStore.open(tmp_path, [shard(digest="4567")], SAMPLE_RATE)
    with pytest.raises(DataError, match=r"of crops of 1 s; .* = 36000 are 1\.5 s: .*--crop-seconds 1\.5"):
        FeatureStore.open(tmp_path, held[:1], 36_000)
    with pytest.raises(DataError, match="another encoder, format or crops"):
        features.save_format(tmp_path, feature_format(number, feature_dim=8, crop=SAMPLE_RATE))
    (tmp_path / features.SETTINGS).write_text('{"encoder": "abc", "of": "later"}')
    with pytest.raises(DataError, match=r"features\.json: unknown field 'of': a later version .*; upgrade it"):
        FeatureStore.open(tmp_path, held[:1], SAMPLE_RATE)
    (tmp_path / features.SETTINGS).write_text("{")
    with pytest.raises(DataError, match=r"features\.json: damaged"):
        features.read_format(tmp_path)


def test_features_that_an_older_version_has_stored_are_read_with_a_warning(tmp_path, caplog):
    format, silence, segment = feature_format("bfloat16"), vectors(13), vectors(26)
    settings = {"encoder": "abc", "compute": "float32", "feature_dim": 16, "number": "bfloat16"}
    (tmp_path / features.SETTINGS).write_text(json.dumps(settings))
    np.save(tmp_path / features.SILENCE, silence)
    held = [shard(clips=(48_000,))]
    records.write_shard(features.shard_path(tmp_path, held[0]), [format.encode(segment)])
    store = FeatureStore.open(tmp_path, held, SAMPLE_RATE)
    assert store.format == format
    assert "of an older version" in caplog.text
    beyond = store.read_seconds(held[0], 0, 13, 30)
    assert beyond.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(beyond[:13], format.decode(format.encode(segment), 13, 13))
    np.testing.assert_array_equal(beyond[13:], np.resize(silence, (17, 16)).astype(ml_dtypes.bfloat16))


# Crops.


@given(st.integers(1, 700), st.integers(1, 300), st.integers(1, 300))
def test_stored_crops_reach_from_a_clips_beginning_to_its_end(length, wanted, stride):
    starts = crops.spread_starts(length, wanted, stride)
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    assert starts[-1] < crops.num_starts(length, wanted)
    if crops.num_starts(length, wanted) > 1:
        end = starts[-1] if length >= wanted else length  # what repeats has no end
        assert np.diff(starts, append=end).max() <= 1.1 * stride + 1
    if length > wanted + stride // 10:
        assert starts[-1] == length - wanted


def test_a_clip_of_ten_seconds_and_some_milliseconds_is_one_crop():
    ten = 10 * SAMPLE_RATE
    assert crops.spread_starts(ten + 160, ten, ten) == [0]
    assert crops.spread_starts(3 * ten, ten, ten) == [0, ten, 2 * ten]
    assert crops.spread_starts(7200, ten, ten) == [0]


@pytest.mark.parametrize(("length", "start"), [(7200, 5000), (191_999, 100_000), (192_000, 0), (240_000, 0)])
def test_a_crop_is_a_part_or_padded_or_repeated_without_a_gap(length, start):
    samples = RNG.integers(1, 30_000, length, np.int16)
    record = records.encode(Header("a", "speech", 0, length, 1.0, SAMPLE_RATE, length), samples)
    heard = np.rint(crops.read(record, length, start, 240_000) * 32_768)
    place = start + np.arange(240_000)
    expected = samples[place % length] if length < 192_000 else np.pad(samples, (0, 240_000 - length))
    np.testing.assert_array_equal(heard, expected)


def test_soundfile_has_been_used_by_one_thread_before_others_read_records():
    """Threads that make its first call at once may abort the process."""
    code = """
import threading, soundfile
calls, begin = [], soundfile.SoundFile.__init__
def noted(*arguments, **options):
    calls.append(threading.current_thread().name)
    begin(*arguments, **options)
soundfile.SoundFile.__init__ = noted
import omnicodec_jax.data.records
print(calls)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['MainThread', 'MainThread', 'MainThread']\n"
