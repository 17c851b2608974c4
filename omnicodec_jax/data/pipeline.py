"""From shards to batches on the devices (Grain).

The sample with index i = step · batch_size + row depends on (seed, i) alone: not on hosts, worker processes or
restarts. So the state of the iterator is the step.

    clip number ─ shuffled anew in every epoch ─┐
    clip number ─ of the next domain ───────────┼─ mixed by weight ─ random crop ─ rows of this host ─ batch ─ devices
    clip number ─ … ────────────────────────────┘
"""

import bisect
import dataclasses
import logging
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import grain
import grain.experimental
import jax
import numpy as np
import soundfile
from absl import flags

from omnicodec_jax.config import DataConfig
from omnicodec_jax.data import features, records
from omnicodec_jax.data.features import FeatureStore
from omnicodec_jax.data.records import SAMPLE_RATE, Shard, Split
from omnicodec_jax.errors import DataError

LOG = logging.getLogger(__name__)

PAD_FROM = 0.8
"""A clip of at least this share of a crop is padded with silence, a shorter one repeats (spec §4)."""
SUBSTITUTES = 100
"""Clips tried in place of one that cannot be read."""
BATCHES_AHEAD = 2

Sample = dict[str, np.ndarray]


class Place(NamedTuple):
    """Where a clip's segments are."""

    shard: Shard
    record: int
    """Its first segment."""
    samples: int
    """Length of the whole clip, at 24 kHz."""


class Clips:
    """The clips of one domain, by number: each once, or once per second of it (sample_by="hours")."""

    def __init__(self, shards: Sequence[Shard], segment_seconds: int, by_hours: bool):
        self.segment_seconds = segment_seconds
        # Lengths as arrays alone: every worker process gets a copy, and a large corpus has tens of millions.
        self.shards = tuple(dataclasses.replace(shard, clips=()) for shard in shards)
        self.samples = np.concatenate([np.array(shard.clips, np.int64) for shard in shards])
        seconds = np.maximum(1, (self.samples + SAMPLE_RATE // 2) // SAMPLE_RATE)
        self.ends = np.cumsum(seconds if by_hours else np.ones_like(seconds))
        counts = records.num_segments(self.samples, segment_seconds)
        self.first_clips = np.cumsum([0] + [len(shard.clips) for shard in shards])
        self.records = np.cumsum(counts) - counts

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, number: int) -> Place:
        clip = int(np.searchsorted(self.ends, number, side="right"))
        shard = int(np.searchsorted(self.first_clips, clip, side="right")) - 1
        record = self.records[clip] - self.records[self.first_clips[shard]]
        return Place(self.shards[shard], int(record), int(self.samples[clip]))


@dataclasses.dataclass(frozen=True)
class Crop:
    """A random crop of a random clip: the sample itself."""

    directory: Path
    clips: tuple[Clips, ...]
    store: FeatureStore | None
    crop_samples: int

    def __call__(self, chosen: tuple[int, int], rng: np.random.Generator) -> Sample:
        """audio float32 [1, T]; features bfloat16 [S, F] if stored; replaced: how many clips could not be read."""
        domain, number = chosen
        clips = self.clips[domain]
        for replaced in range(SUBSTITUTES):
            try:
                return {**self._crop(clips[number], rng), "replaced": np.array(replaced, np.int32)}
            except (DataError, soundfile.LibsndfileError, ValueError) as error:
                LOG.warning("replaced by another clip: %s", error)
                number = int(rng.integers(len(clips)))  # not the next one: a shard may be lost as a whole
        raise DataError(f"{self.directory}: {SUBSTITUTES} clips in a row cannot be read; see the log")

    def _crop(self, place: Place, rng: np.random.Generator) -> Sample:
        """One of the clip's segments, by length; then the reference's rule (spec §4) within it."""
        pieces = records.segments(place.samples, self.clips[0].segment_seconds)
        moment = rng.integers(place.samples)
        index = bisect.bisect_right([start for start, _ in pieces], moment) - 1
        record, length, wanted = place.record + index, pieces[index][1], self.crop_samples
        path = records.shard_path(self.directory, place.shard.name)
        # Stored features begin anew at every second, and so do crops and repetitions that must have their own.
        grid = 1 if self.store is None else SAMPLE_RATE
        if length >= wanted:
            start = int(rng.integers((length - wanted) // grid + 1)) * grid
            audio = records.read_samples(records.read_record(path, record), start, wanted)
        elif length >= PAD_FROM * wanted:
            start, audio = 0, records.read_samples(records.read_record(path, record))
        else:
            period = -(-length // grid) * grid
            whole = np.zeros(period, np.int16)
            whole[:length] = records.read_samples(records.read_record(path, record))
            start = int(rng.integers(period // grid)) * grid
            audio = np.resize(np.roll(whole, -start), wanted)
        sample = {"audio": np.zeros((1, wanted), np.float32)}
        sample["audio"][0, : audio.size] = audio.astype(np.float32) / 32768
        if self.store is not None:
            count, first = features.num_vectors(wanted), start // SAMPLE_RATE * features.PER_SECOND
            if length >= PAD_FROM * wanted:
                sample["features"] = self.store.read(place.shard, record, first, count)
            else:
                whole = self.store.read(place.shard, record, 0, features.num_vectors(period))
                sample["features"] = np.resize(np.roll(whole, -first, axis=0), (count, whole.shape[1]))
        return sample


@dataclasses.dataclass(frozen=True)
class Samples:
    """Holds all samples of a run: an endless sequence, any of which can be had by its index.

    `samples[i]` has `audio`, float32 [1, T], `features`, bfloat16 [S, F], if they are stored, and `replaced`: how many
    clips could not be read before this one.

    Examples:
        >>> from omnicodec_jax.config import DataConfig
        >>> samples = Samples.open(DataConfig(prepared="data/prepared"), seed=0)
        >>> samples[1_000_000]["audio"].shape
        (1, 240000)
    """

    choices: grain.MapDataset
    """(domain, clip number)"""
    crops: grain.MapDataset
    clips: tuple[Clips, ...]
    directory: Path
    fingerprint: str
    """Identifies the prepared data; a run that is resumed on other data sees other samples."""

    @classmethod
    def open(cls, config: DataConfig, seed: int, split: Split = "train", stored_features: bool = False) -> "Samples":
        """Opens prepared audio.

        Args:
            config: Where it is, which domains in which shares, how long a sample is.
            seed: Of the order of the clips and of the crops.
            split: "train", or "validation" for the clips that `omnicodec prepare` has held out.
            stored_features: Whether semantic features are read, too.

        Returns:
            The samples. What sample i is depends on the prepared audio, `config`, `seed` and i alone.

        Raises:
            DataError: If something is not there, with the command that makes it.
        """
        directory = Path(config.prepared)
        shards = [shard for shard in records.read_index(directory) if shard.split == split and shard.clips]
        known = sorted({shard.domain for shard in shards})
        if missing := [domain.name for domain in config.domains if domain.name not in known]:
            held = f"those of {', '.join(known)}" if known else "none"
            raise DataError(f"{directory}: no {split} clips of {', '.join(missing)}; it holds {held}")
        store = None
        if stored_features:
            if config.features is None:
                raise DataError("semantic.source is 'stored': data.features must name the directory of the features")
            store = FeatureStore.open(Path(config.features), shards)
        seconds = records.read_settings(directory)["segment_seconds"]
        if config.segment_samples > (longest := seconds // 2 * SAMPLE_RATE):
            raise DataError(
                f"{directory}: holds long clips in segments of {seconds} s, good for crops of half of that: "
                f"data.segment_samples = {config.segment_samples} must be at most {longest}, or prepare with longer "
                "--segment-seconds"
            )
        clips = tuple(
            Clips([shard for shard in shards if shard.domain == domain.name], seconds, config.sample_by == "hours")
            for domain in config.domains
        )
        numbers = [
            grain.MapDataset.range(len(own)).seed(seed + i).shuffle().repeat().map(_Tagged(i))
            for i, own in enumerate(clips)
        ]
        choices = grain.MapDataset.mix(numbers, [domain.weight for domain in config.domains])
        crops = choices.seed(seed).random_map(Crop(directory, clips, store, config.segment_samples))
        return cls(choices, crops, clips, directory, records.fingerprint(shards))

    def __getitem__(self, index: int) -> Sample:
        return _element(self.crops, index)

    def id(self, index: int) -> str:
        """Names the clip that a sample is a crop of, for messages.

        Args:
            index: The sample's number.

        Returns:
            "domain:id".
        """
        domain, number = _element(self.choices, index)
        place = self.clips[domain][number]
        record = records.read_record(records.shard_path(self.directory, place.shard.name), place.record)
        return f"{place.shard.domain}:{records.read_header(record).id}"


@dataclasses.dataclass(frozen=True)
class _Tagged:
    """A clip's number with its domain's."""

    domain: int

    def __call__(self, number: int) -> tuple[int, int]:
        return self.domain, number


@dataclasses.dataclass(frozen=True)
class _Rows:
    """This host's samples one after the other: those of its rows of each batch."""

    crops: grain.MapDataset
    batch_size: int
    rows: tuple[int, ...]

    def __call__(self, position: int) -> Sample:
        step, row = divmod(position, len(self.rows))
        return _element(self.crops, step * self.batch_size + self.rows[row])


def _element(dataset: grain.MapDataset, index: int) -> Any:
    """An element; Grain's own signature admits that filters leave none, of which there are none here."""
    return dataset[index]


def host_batches(
    samples: Samples, batch_size: int, rows: Sequence[int], step: int = 0, num_workers: int = 0
) -> grain.IterDataset:
    """Batches of the given rows of the global batch, from a step on, as numpy arrays."""
    positions = grain.MapDataset.range(step * len(rows), sys.maxsize // 2)
    batches = positions.map(_Rows(samples.crops, batch_size, tuple(rows))).batch(len(rows))
    # Grain's own buffer of 500 elements is meant for small ones; these are batches.
    reading = grain.ReadOptions(num_threads=2, prefetch_buffer_size=BATCHES_AHEAD)
    options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1)
    return batches.to_iter_dataset(reading).mp_prefetch(options)


class Batches(Iterator[dict[str, jax.Array]]):
    """Gives batches as global arrays, their rows sharded over the devices; each process reads its own rows only.

    Two batches are on their way to the devices while one is used. `step` is all there is to save.

    Examples:
        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> data = DataConfig(prepared="data/prepared", batch_size=8, num_workers=0)
        >>> sharding = NamedSharding(jax.make_mesh((jax.device_count(),), ("data",)), PartitionSpec("data"))
        >>> batches = Batches(Samples.open(data, seed=0), data, sharding, step=100)
        >>> next(batches)["audio"].shape, batches.step
        ((8, 1, 240000), 101)
        >>> batches.close()
    """

    def __init__(self, samples: Samples, config: DataConfig, sharding: jax.sharding.NamedSharding, step: int = 0):
        """Starts the processes that read.

        Args:
            samples: What to read.
            config: Clips of a batch, worker processes.
            sharding: Who holds which rows.
            step: The first batch: where a run that goes on stands.
        """
        self.samples, self.step, self._sharding, self._size = samples, step, sharding, config.batch_size
        local = host_batches(samples, config.batch_size, self.rows, step, config.num_workers)
        placed = local.map(self._to_devices)
        if not flags.FLAGS.is_parsed():  # Grain's worker processes look at flags of absl, which nobody parses here
            flags.FLAGS.mark_as_parsed()
        self._batches = iter(grain.experimental.ThreadPrefetchIterDataset(placed, prefetch_buffer_size=BATCHES_AHEAD))

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """Rows of the global batch that this process's devices hold."""
        return tuple(sorted({row for rows in self._device_rows.values() for row in rows}))

    @cached_property
    def _device_rows(self) -> dict[Any, range]:
        slices: Any = self._sharding.addressable_devices_indices_map((self._size,))
        return {device: range(*part.indices(self._size)) for device, (part,) in slices.items()}

    def _to_devices(self, batch: Sample) -> dict[str, jax.Array]:
        def place(local: np.ndarray) -> jax.Array:
            parts = [
                # A copy: Grain's shared memory goes back when its array dies, which JAX may put off to the end.
                jax.device_put(np.array(local[self.rows.index(rows[0]) :][: len(rows)]), device)
                for device, rows in self._device_rows.items()
            ]
            return jax.make_array_from_single_device_arrays((self._size, *local.shape[1:]), self._sharding, parts)

        return {name: place(values) for name, values in batch.items()}

    def __next__(self) -> dict[str, jax.Array]:
        """The batch of `step`, which then moves on."""
        batch = next(self._batches)
        self.step += 1
        return batch

    def close(self) -> None:
        """Ends the worker processes."""
        self._batches.close()
