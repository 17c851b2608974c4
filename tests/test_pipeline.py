"""Batches from prepared audio that tells which sample of which clip it is, and features that tell the same."""

import dataclasses
import json
import logging
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from omnicodec_jax.buckets import as_path
from omnicodec_jax.config import DataConfig, DomainConfig
from omnicodec_jax.data import features, pipeline, records
from omnicodec_jax.data.features import FeatureFormat
from omnicodec_jax.data.pipeline import Batches, Samples
from omnicodec_jax.data.records import SAMPLE_RATE, Header, Shard
from omnicodec_jax.errors import DataError

SEGMENT_SECONDS, CROP = 10, 5 * SAMPLE_RATE
LENGTHS = {"speech": [1.5, 4, 4.5, 5, 7.25], "music": [25.5, 0.3, 4.999]}
"""Seconds: of less than 4 is repeated, up to 5 is padded, more is cropped, above 10 is stored in segments."""
OLDER = FeatureFormat(encoder="none", compute="float32", feature_dim=4)
FORMAT = dataclasses.replace(OLDER, crop_samples=CROP, stride_samples=CROP // 4)


def noise(domain, clip, samples):
    """int16 of which a few samples tell where they are from."""
    seed = [sorted(LENGTHS).index(domain), clip]
    return np.random.default_rng(seed).integers(-32_000, 32_000, samples, np.int16)


def segments(domain, clip):
    """Start and length of a clip's segments."""
    return records.segments(round(LENGTHS[domain][clip] * SAMPLE_RATE), SEGMENT_SECONDS)


def crop_vectors(domain, clip, segment, crop):
    """Clip, segment, crop of the segment, and number within the crop."""
    name = 10 * sorted(LENGTHS).index(domain) + clip
    return np.array([[name, segment, crop, k] for k in range(65)], np.float32)


def vectors(domain, clip, seconds):
    """Makes vectors as an older version stored them, of clip, second and number in it; a second of None is silence."""
    name = 10 * sorted(LENGTHS).index(domain) + clip
    rows = [[name if s is not None else -1, -1 if s is None else s, k, 1] for s in seconds for k in range(13)]
    return np.array(rows, np.float32)


def write_index(directory, shards, segment_seconds=SEGMENT_SECONDS):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / records.INDEX).write_text("".join(json.dumps(dataclasses.asdict(s)) + "\n" for s in shards))
    (directory / records.SETTINGS).write_text(json.dumps({"segment_seconds": segment_seconds}))


def write_data(directory):
    """Prepared audio and its features; two shards of speech."""
    shards = []
    parts = [("speech", [0, 1]), ("speech", [2, 3, 4]), ("music", [0, 1, 2])]
    for domain, numbers in parts:
        lengths = {clip: round(LENGTHS[domain][clip] * SAMPLE_RATE) for clip in numbers}
        name = f"{domain}-train-{numbers[0]:06d}"
        shard = Shard(name=name, domain=domain, split="train", digest="d1", clips=tuple(lengths.values()), bytes=1)
        audio, stored, older = [], [], []
        for clip, length in lengths.items():
            samples = noise(domain, clip, length)
            for number, (start, size) in enumerate(segments(domain, clip)):
                header = Header(str(clip), domain, start, length, 1.0, SAMPLE_RATE, length)
                audio.append(records.encode(header, samples[start : start + size]))
                crops = [crop_vectors(domain, clip, number, crop) for crop in range(len(FORMAT.starts(size)))]
                stored.append(FORMAT.encode(np.concatenate(crops)))
                first = start // SAMPLE_RATE
                older.append(OLDER.encode(vectors(domain, clip, range(first, first - -size // SAMPLE_RATE))))
        records.write_shard(records.shard_path(directory, name), audio)
        records.write_shard(features.shard_path(directory / "features", shard), stored)
        records.write_shard(features.shard_path(directory / "older", shard), older)
        shards.append(shard)
    write_index(directory, shards)
    features.save_format(directory / "features", FORMAT)
    settings = {"encoder": "none", "compute": "float32", "feature_dim": 4, "number": "bfloat16"}
    (directory / "older" / features.SETTINGS).write_text(json.dumps(settings))
    np.save(directory / "older" / features.SILENCE, vectors("music", 0, [None]))
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("prepared"))


def data_config(directory, weights=(3.0, 1.0), **options):
    domains = tuple(DomainConfig(name=name, weight=weight) for name, weight in zip(LENGTHS, weights, strict=True))
    defaults: dict[str, Any] = {"segment_samples": CROP, "batch_size": 8, "num_workers": 0}
    defaults["features"] = str(directory / "features")
    return DataConfig(prepared=str(directory), domains=domains, **defaults | options)


def is_equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


# One sample.


def explain(samples, index):
    """Checks that a sample is what the rules make of its clip; returns which rule, where it starts, its features."""
    sample = samples[index]
    domain, clip = samples.id(index).split(":")
    clip, whole = int(clip), noise(domain, int(clip), round(LENGTHS[domain][int(clip)] * SAMPLE_RATE))
    assert sample["audio"].shape == (1, CROP)
    assert sample["audio"].dtype == np.float32
    assert sample["replaced"] == 0
    audio = np.rint(sample["audio"][0] * 32_768).astype(int)
    held = None
    if "features" in sample:
        assert sample["features"].dtype == features.ml_dtypes.bfloat16
        held = sample["features"].astype(np.float32)
    older = held is not None and held[0, 3] == 1
    if whole.size >= CROP:
        (start,) = [s for s in np.flatnonzero(whole == audio[0]) if np.array_equal(whole[s : s + CROP], audio)]
        rule = "cropped"
    elif whole.size >= 0.8 * CROP:
        np.testing.assert_array_equal(audio[: whole.size], whole)
        assert not audio[whole.size :].any()
        rule, start = "padded", 0
    else:
        # What an older version has stored is repeated with silence up to the whole second.
        period = -(-whole.size // SAMPLE_RATE) * SAMPLE_RATE if older else whole.size
        padded = np.pad(whole, (0, period - whole.size))
        rows = np.arange(CROP)
        (start,) = [
            s for s in np.flatnonzero(padded == audio[0]) if (padded[(rows[:9] + s) % period] == audio[:9]).all()
        ]
        np.testing.assert_array_equal(audio, padded[(rows + start) % period])
        rule = "repeated"
    return rule, domain, clip, int(start), held


def open_samples(directory, stored):
    options = {} if stored is None else {"features": str(directory / stored)}
    return Samples.open(data_config(directory, (1.0, 1.0), **options), 0, stored_features=stored is not None)


@pytest.mark.parametrize("stored", [None, "features", "older"])
def test_every_sample_follows_the_rules_to_the_sample(directory, stored):
    samples = open_samples(directory, stored)
    seen = [explain(samples, index) for index in range(80)]
    assert {rule for rule, *_ in seen} == {"cropped", "padded", "repeated"}
    assert {(domain, clip) for _, domain, clip, *_ in seen} == {(d, c) for d in LENGTHS for c in range(len(LENGTHS[d]))}
    starts = {start for _, domain, clip, start, _ in seen if (domain, clip) == ("music", 0)}
    assert len(starts) > 5
    assert {sum(start >= s for s, _ in segments("music", 0)) for start in starts} == {1, 2, 3}
    offsets = {start % SAMPLE_RATE for start in starts}
    assert offsets == {0} if stored == "older" else len(offsets) > 1


def test_stored_features_are_those_of_the_very_crop_that_is_heard(directory):
    samples = open_samples(directory, "features")
    for index in range(80):
        _, domain, clip, start, held = explain(samples, index)
        assert held is not None
        ((number, first, size),) = [
            (number, first, size)
            for number, (first, size) in enumerate(segments(domain, clip))
            if first <= start < first + size and (number == held[0, 1])
        ]
        crop = FORMAT.starts(size).index(start - first)
        np.testing.assert_array_equal(held, crop_vectors(domain, clip, number, crop))


def test_features_of_an_older_version_are_those_of_the_seconds_that_are_heard(directory):
    samples = open_samples(directory, "older")
    for index in range(60):
        rule, domain, clip, start, held = explain(samples, index)
        first, full = start // SAMPLE_RATE, -(-round(LENGTHS[domain][clip] * SAMPLE_RATE) // SAMPLE_RATE)
        seconds = {
            "cropped": range(first, first + 5),
            "padded": [*range(full), *[None] * (5 - full)],
            "repeated": [(first + s) % full for s in range(5)],
        }[rule]
        assert start % SAMPLE_RATE == 0
        np.testing.assert_array_equal(held, vectors(domain, clip, seconds))


@pytest.mark.parametrize("stored", [None, "features"])
def test_short_clips_repeat_without_a_gap_from_anywhere_on(directory, stored):
    samples = open_samples(directory, stored)
    starts = {seen[3] for index in range(60) if (seen := explain(samples, index))[1:3] == ("speech", 0)}
    assert len(starts) > 1
    assert any(start % SAMPLE_RATE for start in starts)


# The order; nothing is read.


def many(tmp_path, **options):
    """Samples of 100 clips of speech of 1 to 100 s and 40 of music, in several shards."""
    shards = [
        Shard(
            name=f"speech-train-{i}",
            domain="speech",
            split="train",
            digest="",
            clips=tuple(SAMPLE_RATE * s for s in range(10 * i + 1, 10 * i + 11)),
            bytes=1,
        )
        for i in range(10)
    ]
    shards.append(
        Shard(name="music-train-0", domain="music", split="train", digest="", clips=40 * (SAMPLE_RATE,), bytes=1)
    )
    write_index(tmp_path, shards)
    return lambda seed: Samples.open(data_config(tmp_path, **options), seed)


def draws(samples, count, domain=0) -> list[Any]:
    """Clips of one domain in the order of the samples."""
    chosen = [samples.choices[index] for index in range(count)]
    places = [samples.clips[d][number] for d, number in chosen if d == domain]
    return [place.samples // SAMPLE_RATE if domain == 0 else (place.shard.name, place.record) for place in places]


def test_each_clip_once_per_epoch_in_a_new_order(tmp_path):
    opened = many(tmp_path)
    order, other = draws(opened(0), 400), draws(opened(1), 400)
    epochs = [order[i : i + 100] for i in range(0, 300, 100)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(1, 101))] * 3
    assert len(set(map(tuple, epochs))) == 3
    assert list(range(1, 101)) not in epochs
    assert other != order
    assert draws(opened(0), 400) == order
    music = draws(opened(0), 400, domain=1)
    assert len(set(music[:40])) == len(set(music[40:80])) == 40
    assert music[:40] != music[40:80]


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1.0, 1.0), (0.2, 1.8)])
def test_domains_are_mixed_by_weight_at_any_time(tmp_path, weights):
    samples = many(tmp_path, weights=weights)(0)
    domains = [pipeline._element(samples.choices, index)[0] for index in range(200)]
    for part in (domains, domains[:100], domains[150:]):
        assert part.count(0) == pytest.approx(len(part) * weights[0] / sum(weights), abs=2)


def test_by_hours_a_clip_is_drawn_in_proportion_to_its_length(tmp_path):
    samples = many(tmp_path, weights=(1.0, 1e-6), sample_by="hours")(0)
    assert len(samples.clips[0]) == 5050
    counts = Counter(samples.clips[0][number].samples // SAMPLE_RATE for number in range(5050))
    assert counts == {length: length for length in range(1, 101)}
    drawn = draws(samples, 1000)
    assert np.mean(drawn) == pytest.approx(67, abs=4)  # Σ s² / Σ s


# Batches.


def reference(samples, step, rows):
    chosen = [samples[step * 8 + row] for row in rows]
    return {name: np.stack([sample[name] for sample in chosen]) for name in chosen[0]}


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 3])
def test_samples_do_not_depend_on_hosts_or_restarts(directory, hosts, start):
    samples = Samples.open(data_config(directory), 5, stored_features=True)
    for host in range(hosts):
        rows = range(host * 8 // hosts, (host + 1) * 8 // hosts)
        batches = iter(pipeline.host_batches(samples, 8, rows, start))
        for step in range(start, start + 2):
            assert is_equal(next(batches), reference(samples, step, rows))
        batches.close()


@pytest.mark.parametrize("audio", ["data/prepared", "s3://bucket/prepared"])
@pytest.mark.parametrize("stored", [None, "data/features", "gs://bucket/features"])
def test_more_is_read_at_a_time_where_audio_or_features_lie_in_a_bucket(directory, audio, stored):
    samples = Samples.open(data_config(directory), 5, stored_features=True)
    features = None if stored is None else as_path(stored)
    samples = dataclasses.replace(samples, directory=as_path(audio), features=features)
    in_bucket = "://" in audio + (stored or "")
    expected = {0: 32, 1: 32, 4: 8, 100: 2} if in_bucket else dict.fromkeys((0, 1, 4, 100), 2)
    assert {workers: pipeline.batches_ahead(samples, workers) for workers in expected} == expected


def mesh(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


SHARDINGS = {
    "one axis": lambda devices: (mesh(data=8), "data"),
    "two axes": lambda devices: (mesh(data=2, fsdp=4), ("data", "fsdp")),
    "replicated": lambda devices: (mesh(data=4, model=2), "data"),
    "one device": lambda devices: (jax.sharding.Mesh(devices[:1], "data"), "data"),
    "backwards": lambda devices: (jax.sharding.Mesh(devices[::-1], "data"), "data"),
}


def sharding_of(name):
    over, axes = SHARDINGS[name](np.array(jax.devices()))
    return NamedSharding(over, PartitionSpec(axes))


@pytest.mark.parametrize("name", SHARDINGS)
def test_batches_are_global_arrays(directory, name):
    sharding, config = sharding_of(name), data_config(directory)
    samples = Samples.open(config, 1, stored_features=True)
    batches = Batches(samples, config.batch_size, config.num_workers, sharding, step=2)
    assert batches.rows == tuple(range(8))
    for step in (2, 3):
        assert batches.step == step
        batch = next(batches)
        assert batch["audio"].shape == (8, 1, CROP)
        assert batch["features"].shape == (8, 65, 4)
        assert all(values.sharding == sharding for values in batch.values())
        assert is_equal({key: np.asarray(values) for key, values in batch.items()}, reference(samples, step, range(8)))
    batches.close()


class OneProcess(NamedSharding):
    """What a process sees that has only the last three of eight devices."""

    def addressable_devices_indices_map(self, global_shape):
        devices = jax.devices()[5:]
        return {device: index for device, index in self.devices_indices_map(global_shape).items() if device in devices}


def test_a_process_reads_its_own_rows_only(directory):
    config = data_config(directory)
    samples = Samples.open(config, 1)
    batches = Batches(samples, config.batch_size, config.num_workers, OneProcess(mesh(data=8), PartitionSpec("data")))
    assert batches.rows == (5, 6, 7)
    batches.close()


def mapped_shared_memory():
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/psm_" in line]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_worker_processes_change_nothing_and_leave_nothing(directory, num_workers):
    config = data_config(directory, num_workers=num_workers)
    samples = Samples.open(config, 1, stored_features=True)
    batches = Batches(samples, config.batch_size, config.num_workers, sharding_of("one axis"), step=1)
    held = [next(batches) for _ in range(3)]
    assert batches.step == 4
    batches.close()
    deadline = time.monotonic() + 5  # Grain gives memory back in a thread
    while mapped_shared_memory() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert mapped_shared_memory() == []
    for step, batch in enumerate(held, 1):
        assert is_equal({key: np.asarray(values) for key, values in batch.items()}, reference(samples, step, range(8)))


# What is damaged or missing.


@pytest.fixture
def damaged(tmp_path):
    """Data in which speech clip 2 and the features of music clip 1 cannot be read."""
    write_data(tmp_path)
    audio = records.shard_path(tmp_path, "speech-train-000002")
    data = bytearray(audio.read_bytes())
    data[data.index(records.read_record(audio, 0)[200:300])] ^= 1
    audio.write_bytes(data)
    stored = tmp_path / "features" / "shards" / "music-train-000000-d1.array_record"
    data = bytearray(stored.read_bytes())
    data[data.index(records.read_record(stored, 3)[:50])] ^= 1
    stored.write_bytes(data)
    records._reader.cache_clear()
    return tmp_path


def test_what_cannot_be_read_is_replaced_logged_and_counted(directory, damaged, caplog):
    whole = Samples.open(data_config(directory), 0, stored_features=True)
    broken = Samples.open(data_config(damaged), 0, stored_features=True)
    ids = [whole.id(index) for index in range(40)]
    with caplog.at_level(logging.WARNING):
        found = [broken[index] for index in range(40)]
    counts = [int(sample["replaced"]) for sample in found]
    assert [count > 0 for count in counts] == [id in ("speech:2", "music:1") for id in ids]
    assert sum(counts) == len(caplog.records) >= 8
    assert all("replaced by another clip: " in record.message for record in caplog.records)
    assert {record.message.split("/shards/")[1].split(":")[0] for record in caplog.records} == {
        "speech-train-000002.array_record",
        "music-train-000000-d1.array_record",
    }
    for index, count in enumerate(counts):
        again = Samples.open(data_config(damaged), 0, stored_features=True)[index]
        assert is_equal(again, found[index])
        assert count or is_equal(found[index], whole[index])


def test_a_lost_shard_does_not_end_the_run_but_the_loss_of_all_does(damaged):
    samples = Samples.open(data_config(damaged), 0)
    records.shard_path(damaged, "speech-train-000002").unlink()
    records._reader.cache_clear()
    assert sum(int(samples[index]["replaced"]) > 0 for index in range(40)) > 10
    for path in (damaged / "shards").iterdir():
        path.unlink()
    records._reader.cache_clear()
    with pytest.raises(DataError, match="100 clips in a row cannot be read"):
        samples[0]


def test_missing_data_is_named_with_what_to_do(directory, tmp_path):
    with pytest.raises(DataError, match="nothing: no prepared audio here; run: omnicodec prepare"):
        Samples.open(data_config(directory / "nothing"), 0)
    config = data_config(directory)
    with pytest.raises(DataError, match="no train clips of sound; it holds those of music, speech$"):
        Samples.open(dataclasses.replace(config, domains=(DomainConfig(name="sound"),)), 0)
    three = tuple(DomainConfig(name=name) for name in ("speech", "sound", "music"))
    with pytest.raises(DataError, match=r"to leave sound out, .* data\.domains = \(DomainConfig\(name='music'\), "):
        Samples.open(dataclasses.replace(config, domains=three), 0)
    with pytest.raises(DataError, match="no validation clips of speech, music; it holds none"):
        Samples.open(config, 0, "validation")
    with pytest.raises(DataError, match=r"data\.features must name the directory"):
        Samples.open(dataclasses.replace(config, features=None), 0, stored_features=True)
    with pytest.raises(DataError, match=r"no semantic features here; run omnicodec .* --data\.features None"):
        Samples.open(dataclasses.replace(config, features=str(tmp_path)), 0, stored_features=True)
    with pytest.raises(DataError, match=r"data\.segment_samples = 120001 must be at most 120000, or prepare with"):
        Samples.open(dataclasses.replace(config, segment_samples=120_001), 0)


def test_the_fingerprint_is_that_of_the_shards_in_use(directory):
    config = data_config(directory)
    one, two = (Samples.open(config, seed) for seed in (0, 1))
    assert one.fingerprint == two.fingerprint == records.fingerprint(records.read_index(directory))
