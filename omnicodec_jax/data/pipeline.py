"""The data pipeline of training: from shards of prepared audio to batches on the devices (Grain).

The sample with index i = step · batch_size + row depends on (seed, i) alone, and not on the number of hosts, worker
processes or restarts. Therefore the step is all the state that the iterator has.

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
from typing import Any, NamedTuple, Protocol, runtime_checkable

import grain
import grain.experimental
import jax
import numpy as np
from absl import flags

from omnicodec_jax.buckets import BucketPath, as_path
from omnicodec_jax.config import DataConfig
from omnicodec_jax.data import crops, features, records
from omnicodec_jax.data.features import FeatureStore
from omnicodec_jax.data.prepare_unit import read_settings
from omnicodec_jax.data.records import SAMPLE_RATE, Shard, Split
from omnicodec_jax.data.soundfiles import soundfile
from omnicodec_jax.errors import DataError

LOG = logging.getLogger(__name__)

SUBSTITUTES = 100
"""The number of other clips that are tried in place of one that cannot be read."""
ENDLESS = sys.maxsize // 2
"""The length of a dataset that is never read to its end."""
BATCHES_AHEAD = 2
"""The number of batches that are read before they are asked for."""
AHEAD_IN_BUCKET = 32
"""The number of batches that all worker processes together read at a time from a bucket, whose answers are slow."""

Sample = dict[str, np.ndarray]


@runtime_checkable
class Dataset(Protocol):
    """A sequence of samples that `Batches` can read. It must have a sample for every index that is asked for."""

    def __getitem__(self, index: int, /) -> Any:
        """Returns a sample: a dict of numpy arrays, which have the same names and shapes in all samples."""
        ...


class Place(NamedTuple):
    """The place of a clip's segments in the shards."""

    shard: Shard
    record: int
    """The number of the record that holds the clip's first segment."""
    samples: int
    """Length of the whole clip in samples at 24 kHz."""


class DomainClips:
    """The places of the clips of one domain, by number.

    Every clip has one number, or with sample_by="hours" one number for each of its seconds, so that long clips are
    drawn more often.
    """

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
class RandomCrop:
    """The function that makes a sample: it draws a random crop of a clip and reads it."""

    directory: Path
    clips: tuple[DomainClips, ...]
    store: FeatureStore | None
    crop_samples: int

    def __call__(self, chosen: tuple[int, int], rng: np.random.Generator) -> Sample:
        """Returns a random crop of a clip. Where the clip cannot be read, another clip of its domain is taken.

        Args:
            chosen: Numbers of the domain and of the clip in it.
            rng: Draws the crop.

        Returns:
            audio: float32 [1, T]; features: bfloat16 [S, F], where they are stored; replaced: how many clips could not
            be read.

        Raises:
            DataError: If `SUBSTITUTES` clips in a row cannot be read.
        """
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
        """Returns a crop of a segment. A segment is drawn with a probability in proportion to its length."""
        pieces = records.segments(place.samples, self.clips[0].segment_seconds)
        moment = rng.integers(place.samples)
        index = bisect.bisect_right([start for start, _ in pieces], moment) - 1
        number, length, wanted = place.record + index, pieces[index][1], self.crop_samples
        record = records.read_record(records.shard_path(self.directory, place.shard.name), number)
        if self.store is None:
            start = int(rng.integers(crops.num_starts(length, wanted)))
            return {"audio": crops.read(record, length, start, wanted)[None]}
        if self.store.format.crop_samples is None:
            return self._crop_at_seconds(place, number, record, length, rng)
        starts = self.store.format.starts(length)
        chosen = int(rng.integers(len(starts)))
        return {
            "audio": crops.read(record, length, starts[chosen], wanted)[None],
            "features": self.store.read_crop(place.shard, number, self.store.format.position(length, chosen)),
        }

    def _crop_at_seconds(
        self, place: Place, number: int, record: bytes, length: int, rng: np.random.Generator
    ) -> Sample:
        """Returns a crop with features of an older directory. Such a crop begins at a whole second of its segment."""
        assert self.store is not None
        wanted = self.crop_samples
        count = features.num_vectors(wanted)
        if length >= crops.PAD_FROM * wanted:
            start = int(rng.integers(max(0, length - wanted) // SAMPLE_RATE + 1))
            first = start * features.PER_SECOND
            return {
                "audio": crops.read(record, length, start * SAMPLE_RATE, wanted)[None],
                "features": self.store.read_seconds(place.shard, number, first, count),
            }
        period = -(-length // SAMPLE_RATE)
        start = int(rng.integers(period))
        whole = np.zeros(period * SAMPLE_RATE, np.float32)
        whole[:length] = records.read_samples(record).astype(np.float32) / 32768
        stored = self.store.read_seconds(place.shard, number, 0, period * features.PER_SECOND)
        return {
            "audio": np.resize(np.roll(whole, -start * SAMPLE_RATE), (1, wanted)),
            "features": np.resize(np.roll(stored, -start * features.PER_SECOND, axis=0), (count, stored.shape[1])),
        }


@dataclasses.dataclass(frozen=True)
class Samples:
    """The samples of a run: an endless sequence in which every sample can be read by its index.

    `samples[i]` has `audio`, float32 [1, T], `features`, bfloat16 [S, F], where they are stored, and `replaced`, the
    number of clips that could not be read before this one.

    Examples:
        >>> from omnicodec_jax.config import DataConfig
        >>> samples = Samples.open(DataConfig(prepared="data/prepared"), seed=0)
        >>> samples[1_000_000]["audio"].shape
        (1, 240000)
    """

    choices: grain.MapDataset
    """The number of the domain and the number of the clip of every sample."""
    crops: grain.MapDataset
    """The samples themselves."""
    clips: tuple[DomainClips, ...]
    """The clips of every domain, in the order of the config."""
    directory: Path
    """The directory of the prepared audio."""
    features: Path | None
    """The directory of the stored features that are read with it."""
    fingerprint: str
    """A hash of the list of shards. It tells a run that goes on whether the prepared data is still the same."""

    @classmethod
    def open(cls, config: DataConfig, seed: int, split: Split = "train", stored_features: bool = False) -> "Samples":
        """Opens prepared audio.

        Args:
            config: Where the audio is, which domains are mixed in which shares, how long a sample is.
            seed: The seed of the order of the clips and of the crops.
            split: "train", or "validation" for the clips that `omnicodec prepare` has held out.
            stored_features: Whether semantic features are read, too.

        Returns:
            The samples. Sample i depends only on the prepared audio, `config`, `seed` and i.

        Raises:
            DataError: If something is missing; the message names the command that makes it.
        """
        directory = as_path(config.prepared)
        shards = [shard for shard in records.read_index(directory) if shard.split == split and shard.clips]
        known = sorted({shard.domain for shard in shards})
        if missing := [domain.name for domain in config.domains if domain.name not in known]:
            held = f"those of {', '.join(known)}" if known else "none"
            left = [f"DomainConfig(name={name!r})" for name in known if name in [each.name for each in config.domains]]
            advice = f"; to leave {', '.join(missing)} out, write data.domains = ({', '.join(left)},) in a config"
            raise DataError(
                f"{directory}: no {split} clips of {', '.join(missing)}; it holds {held}{advice if left else ''}"
            )
        store = None
        if stored_features:
            if config.features is None:
                raise DataError("semantic.source is 'stored': data.features must name the directory of the features")
            store = FeatureStore.open(as_path(config.features), shards, config.segment_samples)
        seconds = read_settings(directory).segment_seconds
        if config.segment_samples > (longest := seconds // 2 * SAMPLE_RATE):
            raise DataError(
                f"{directory}: holds long clips in segments of {seconds} s, good for crops of half of that: "
                f"data.segment_samples = {config.segment_samples} must be at most {longest}, or prepare with longer "
                "--segment-seconds"
            )
        by_hours = config.sample_by == "hours"
        clips = tuple(
            DomainClips([shard for shard in shards if shard.domain == domain.name], seconds, by_hours)
            for domain in config.domains
        )
        numbers = [
            grain.MapDataset.range(len(own)).seed(seed + i).shuffle().repeat().map(_Tagged(i))
            for i, own in enumerate(clips)
        ]
        choices = grain.MapDataset.mix(numbers, [domain.weight for domain in config.domains])
        crops = choices.seed(seed).random_map(RandomCrop(directory, clips, store, config.segment_samples))
        features = None if store is None else store.directory
        return cls(choices, crops, clips, directory, features, records.fingerprint(shards))

    def __getitem__(self, index: int) -> Sample:
        return _element(self.crops, index)

    def id(self, index: int) -> str:
        """Returns the name of the clip that a sample is a crop of, for messages.

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
    """A function that puts the number of the domain before the number of a clip."""

    domain: int

    def __call__(self, number: int) -> tuple[int, int]:
        return self.domain, number


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A function that returns the samples of some rows of each batch, one after the other."""

    dataset: Dataset
    batch_size: int
    rows: tuple[int, ...]

    def __call__(self, position: int) -> Sample:
        step, row = divmod(position, len(self.rows))
        return self.dataset[step * self.batch_size + self.rows[row]]


def _element(dataset: grain.MapDataset, index: int) -> Any:
    """Returns an element. Grain's own signature says that it may be None, as it is where a filter leaves none."""
    return dataset[index]


def batches_ahead(dataset: Dataset, num_workers: int) -> int:
    """Returns how many batches a process reads at a time: more where audio or features lie in a bucket."""
    places = (getattr(dataset, "directory", None), getattr(dataset, "features", None))
    in_bucket = any(isinstance(place, BucketPath) for place in places)
    return max(BATCHES_AHEAD, AHEAD_IN_BUCKET // max(1, num_workers)) if in_bucket else BATCHES_AHEAD


def host_batches(
    dataset: Dataset, batch_size: int, rows: Sequence[int], step: int = 0, num_workers: int = 0
) -> grain.IterDataset:
    """Returns the batches of one host, which hold some rows of each global batch, as numpy arrays.

    Args:
        dataset: The samples.
        batch_size: How many rows the global batch has.
        rows: The rows of this host.
        step: The number of the first batch.
        num_workers: Processes that read; 0: this process reads.
    """
    positions = grain.MapDataset.range(step * len(rows), ENDLESS)
    batches = positions.map(_Rows(dataset, batch_size, tuple(rows))).batch(len(rows))
    # Grain's own buffer of 500 elements is meant for small ones; these are batches.
    ahead = batches_ahead(dataset, num_workers)
    reading = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
    options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1)
    return batches.to_iter_dataset(reading).mp_prefetch(options)


class Batches(Iterator[dict[str, jax.Array]]):
    """An endless iterator of batches as global arrays, whose rows are sharded over the devices.

    Each process reads its own rows only. Two batches are on their way to the devices while one is used. To go on later
    from the same place, save `step`.

    Examples:
        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> data = DataConfig(prepared="data/prepared", batch_size=8, num_workers=0)
        >>> sharding = NamedSharding(jax.make_mesh((jax.device_count(),), ("data",)), PartitionSpec("data"))
        >>> batches = Batches(Samples.open(data, seed=0), data.batch_size, data.num_workers, sharding, step=100)
        >>> next(batches)["audio"].shape, batches.step
        ((8, 1, 240000), 101)
        >>> batches.close()
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        num_workers: int,
        sharding: jax.sharding.NamedSharding,
        step: int = 0,
    ):
        """Starts the processes that read.

        Args:
            dataset: The samples: `Samples`, or any other `Dataset`.
            batch_size: Samples in a batch, over all devices.
            num_workers: Processes that read on each host; 0: this process reads.
            sharding: Which devices hold which rows.
            step: The number of the first batch. A run that goes on gives the number of steps that it has done.
        """
        self.step, self._sharding, self._size = step, sharding, batch_size
        local = host_batches(dataset, batch_size, self.rows, step, num_workers)
        placed = local.map(self._to_devices)
        if not flags.FLAGS.is_parsed():  # Grain's worker processes look at flags of absl, which nobody parses here
            flags.FLAGS.mark_as_parsed()
        self._batches = iter(grain.experimental.ThreadPrefetchIterDataset(placed, prefetch_buffer_size=BATCHES_AHEAD))

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """The rows of the global batch that this process's devices hold."""
        return tuple(sorted({row for rows in self._device_rows.values() for row in rows}))

    @cached_property
    def _device_rows(self) -> dict[Any, range]:
        """The rows of the global batch that each device of this process holds."""
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
        """Returns the batch of `step`, and adds one to `step`."""
        batch = next(self._batches)
        self.step += 1
        return batch

    def close(self) -> None:
        """Ends the worker processes."""
        self._batches.close()
