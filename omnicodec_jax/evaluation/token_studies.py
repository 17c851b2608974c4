"""Studies the tokens of codecs: stability of their codes, drift over long clips, and probes of labels.

Each codec is measured while it is loaded, and the results are kept in the journal, so that they are not computed again.
A codec with several systems is measured with the most codebooks.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omnicodec_jax import names
from omnicodec_jax.data import audio
from omnicodec_jax.data.attempts import Seen, reason
from omnicodec_jax.data.units import Progress
from omnicodec_jax.errors import AudioError, ConfigError, OmniCodecError
from omnicodec_jax.evaluation import drift, probes, stability, summary
from omnicodec_jax.evaluation.journal import Journal
from omnicodec_jax.evaluation.metrics import Unavailable
from omnicodec_jax.evaluation.reconstruct import ORIGINAL, RATE, Original, audio_path
from omnicodec_jax.evaluation.study import Curves, Study, StudyRow
from omnicodec_jax.evaluation.systems import Codec, outputs, told_faults
from omnicodec_jax.files import replacing

LOG = logging.getLogger(__name__)

DRIFT_COLUMNS = ("SI-SDR of the first minute", "of the last", "lowest", "highest", "dB per hour")
STABILITY, DRIFT, PROBE = "stability", "drift", "probe"
"""The first words of the keys that rows of the journal have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenStudies:
    """The options of the studies of tokens."""

    stability: int = 0
    """The number of clips of a domain on which stability is measured; 0: it is not measured."""
    drift: int = 0
    """The length in minutes of the clip over which drift is measured; 0: drift is not measured."""
    probes: dict[str, Path] = dataclasses.field(default_factory=dict)
    """Manifests of labelled clips, by the name of the label."""

    def __post_init__(self):
        for name in ("stability", "drift"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name} {getattr(self, name)}: must be 0 or more")


class TokenMeasurer:
    """Measures the tokens of one codec after the other, and makes studies of what was measured."""

    def __init__(self, options: TokenStudies, clips: Sequence[Original], out: Path, journal: Journal):
        """Prepares the measurements.

        Args:
            options: The options of the studies.
            clips: The clips of the evaluation.
            out: The folder of the report.
            journal: Where the results are kept.

        Raises:
            DataError: If a manifest of labelled clips cannot be used.
        """
        self._options, self._out, self._journal = options, out, journal
        self._domains: dict[str, list[Original]] = {}
        for clip in clips:
            self._domains.setdefault(clip.clip.domain, []).append(clip)
        self._labelled = {label: probes.read(path, label) for label, path in options.probes.items()}
        for label, labelled in self._labelled.items():
            probes.split(labelled, label)  # reports clips that cannot be divided before any work
        self._rows: dict[tuple[str, str], list[StudyRow]] = {}
        """The rows of each study by its kind and its domain or label."""
        self._notes: dict[tuple[str, str], list[str]] = {}
        """The notes of each study by its kind and its domain or label."""
        self._drifts: dict[str, dict[str, list[tuple[float, float]]]] = {}

    def measure(self, codec: Codec) -> None:
        """Measures a codec by all studies that the options ask for."""
        name = codec.systems[-1].name
        for domain, clips in self._domains.items():
            if self._options.stability:
                self._stability(codec, name, domain, clips[: self._options.stability])
            if self._options.drift:
                self._drift(codec, name, domain, clips)
        for label in self._labelled:
            self._probe(codec, name, label)

    def studies(self) -> list[Study]:
        """Returns the studies of all codecs that have been measured."""
        about = {STABILITY: self._about_stability, DRIFT: self._about_drift, PROBE: self._about_probe}
        found = sorted(self._rows.items(), key=lambda item: item[0][0])
        made = ((key, about[key[0]](key[1], rows)) for key, rows in found)
        return [_filled(dataclasses.replace(study, notes=self._notes.get(key, []))) for key, study in made]

    def _note_clips(self, key: tuple[str, str], name: str, count: int, of: int, why: Sequence[str]) -> None:
        """Adds a note to a study: how many clips a codec was measured on, and why it was not measured on the others."""
        others = f"; the others: {summary.most_common(why)}" if count < of else ""
        self._notes.setdefault(key, []).append(f"{name}: {count} of {of} clips{others}")

    def _known(self, codec: Codec, key: tuple[str, ...], what: Any) -> dict[str, Any] | None:
        """Returns the row of the journal under a key, if it is of this codec and of this clip."""
        row = self._journal.get(*key)
        return row if row is not None and row["of"] == [codec.identity(row["of"][0]), what] else None

    def _samples(self, clip: Original, sample_rate: int) -> np.ndarray:
        samples = audio.load(audio_path(self._out, ORIGINAL, clip.clip), RATE).samples
        return audio.resample(samples, RATE, sample_rate)

    # -- Stability of ids

    def _stability(self, codec: Codec, name: str, domain: str, clips: Sequence[Original]) -> None:
        if not codec.systems[-1].codebook_sizes:
            return  # the codec has no codes
        kept, why = [], []
        progress = Progress(f"{name} stability", len(clips))
        for clip in clips:
            key = (STABILITY, name, domain, clip.clip.id)
            if (row := self._known(codec, key, clip.digest)) is None:
                try:
                    with told_faults():
                        shares = stability.shares_kept(codec, self._samples(clip, codec.sample_rate))
                    row = {"of": [codec.identity(), clip.digest], "kept": shares}
                    self._journal.add(key, row)
                except OmniCodecError as error:
                    why.append(str(error))
            kept += [] if row is None else [row["kept"]]
            progress.add(clip.seconds)
        progress.bar.close()
        rows = self._rows.setdefault((STABILITY, domain), [])
        if not kept:
            rows.append(StudyRow(name=name, cells=[], why=summary.most_common(why)))
            return
        self._note_clips((STABILITY, domain), name, len(kept), len(clips), why)
        for title in stability.titles():
            shares = np.array([clip[title] for clip in kept if title in clip])
            if shares.size:
                cells = [float(shares.mean()), *shares.mean(axis=0).tolist()]
                fewer = f" (n = {len(shares)})" if len(shares) < len(kept) else ""
                rows.append(StudyRow(name=f"{name}, {title}{fewer}", cells=cells))

    def _about_stability(self, domain: str, rows: list[StudyRow]) -> Study:
        width = max(len(row.cells) for row in rows) - 1
        return Study(
            title="Stability of ids",
            about="Share of the codes that stay the same when a clip begins later by a part of a frame, is encoded "
            "again from its own reconstruction, goes through another sample rate, is made softer, or gets white noise "
            "so far below it. Means over clips, of all codebooks, and of each. The number of clips stands below, or in "
            "the row where the others were too short. Chance: the share that two frames of a clip have in common "
            "which are drawn at random.",
            domain=domain,
            columns=["all", *map(str, range(width))],
            rows=rows,
        )

    # -- Drift

    def _drift(self, codec: Codec, name: str, domain: str, clips: Sequence[Original]) -> None:
        minutes, system = self._options.drift, codec.systems[-1]
        digests, key = [clip.digest for clip in clips], (DRIFT, name, domain, str(minutes))
        rows = self._rows.setdefault((DRIFT, domain), [])
        if not codec.any_length:
            rows.append(StudyRow(name=name, cells=[], why="its memory grows with the length of a clip"))
            return
        if (row := self._known(codec, key, digests)) is None:
            LOG.info("%s: %d minutes of %s, to measure drift", name, minutes, domain)
            try:
                first = [self._samples(clip, codec.sample_rate) for clip in clips]
                whole = drift.repeated_minute(first, codec.sample_rate, minutes)
                (output,) = outputs(codec, whole, [system])
                made = audio.fit_length(output.samples, whole.size)
                decibels = drift.by_minute(whole, made, codec.sample_rate)
                mels = drift.mel_of_ends(whole, made, codec.sample_rate)
            except (OmniCodecError, Unavailable) as error:
                rows.append(StudyRow(name=name, cells=[], why=str(error)))
                return
            row = {"of": [codec.identity(), digests], "decibels": decibels, "mels": mels}
            self._journal.add(key, row)
        decibels = row["decibels"]
        cells = [*row["mels"], decibels[0], decibels[-1], min(decibels), max(decibels), *_slope(decibels)]
        rows.append(StudyRow(name=name, cells=cells))
        points = [(float(minute), value) for minute, value in enumerate(decibels, 1)]
        self._drifts.setdefault(domain, {})[name] = points

    def _about_drift(self, domain: str, rows: list[StudyRow]) -> Study:
        columns = ["mel dis. of the first minute", "of the last", *DRIFT_COLUMNS]
        series = self._drifts.get(domain)
        return Study(
            title="Drift",
            about=f"{self._options.drift} minutes are encoded and decoded as one clip. Each minute has the same "
            "content, so that a codec that does not drift has the same numbers in all. SI-SDR is in dB, far below 0 "
            "for codecs that do not keep phases, of which the mel distance tells more.",
            domain=domain,
            columns=columns,
            rows=rows,
            curves=Curves(x="Minute", y="SI-SDR (dB)", series=series) if series else None,
        )

    # -- Probes

    def _probe(self, codec: Codec, name: str, label: str) -> None:
        rows, system = self._rows.setdefault((PROBE, label), []), codec.systems[-1]
        if not system.codebook_sizes or system.frame_rate is None:
            return  # the codec has no codes
        clips, codes, why = [], [], []
        for clip, found in self._codes(codec, name, label, system.frame_rate):
            if isinstance(found, str):
                why.append(found)
                continue
            clips.append(clip)
            codes.append(found)
        self._note_clips((PROBE, label), name, len(clips), len(self._labelled[label]), why)
        key, what = (PROBE, name, label), _digest(clips, codes)
        columns = [*probes.GROUPS, probes.CHANCE]
        if (row := self._known(codec, key, what)) is None:
            LOG.info("%s: probes of %s on the codes of %d clips", name, label, len(clips))
            try:
                figures = probes.measure(clips, codes, system.codebook_sizes, system.frame_rate, label)
            except OmniCodecError as error:
                rows.append(StudyRow(name=name, cells=[], why=str(error)))
                return
            row = {"of": [codec.identity(), what], "figures": figures}
            self._journal.add(key, row)
        figures = row["figures"]
        told = f"{name}, {figures[probes.CLIPS]:g} clips"
        rows.append(StudyRow(name=told, cells=[figures.get(column) for column in columns]))

    def _codes(
        self, codec: Codec, name: str, label: str, frame_rate: float
    ) -> Iterator[tuple[probes.LabelledClip, np.ndarray | str]]:
        """Yields the clips with a label, each with its codes [K, N] or with the reason why it has none."""
        labelled = self._labelled[label]
        progress = Progress(f"{name} {label}", len(labelled))
        for number, clip in enumerate(labelled):
            key, path = (PROBE, name, label, str(number)), self._out / "probes" / label / name / f"{number}.npy"
            try:
                what = [str(clip.path), *Seen.of(clip.path), clip.offset, clip.duration]
                if self._known(codec, key, what) is None or not path.is_file():
                    loaded = audio.load(clip.path, codec.sample_rate, offset=clip.offset, duration=clip.duration)
                    with told_faults():
                        made = codec.encode(loaded.samples)
                    if made is None:
                        raise AudioError(f"{name} has no codes")
                    with replacing(path) as temporary:
                        np.save(temporary, made)
                    self._journal.add(key, {"of": [codec.identity(), what]})
                codes = np.load(path)
                progress.add(codes.shape[1] / frame_rate)
                yield clip, codes
            except (OmniCodecError, OSError) as error:
                LOG.warning(names.text(f"{name}, {clip.path}: left out of the probes of {label}: {error}"))
                progress.add(0.0)
                yield clip, reason(clip.path, error)
        progress.bar.close()

    def _about_probe(self, label: str, rows: list[StudyRow]) -> Study:
        columns = [*probes.GROUPS, probes.CHANCE]
        what = (
            "Words that a small CTC network gets wrong, misses or adds, as a share of those that are said (lower is "
            "better; a network that says nothing has 1)"
            if label == probes.TRANSCRIPT
            else f"Share of clips whose {label} a logistic regression tells from how often each code occurs"
        )
        return Study(
            title=f"Probe of {'words' if label == probes.TRANSCRIPT else label}",
            about=f"{what}, from the frozen codes of a group of codebooks, on so many clips that it has not learnt. "
            "Chance: what the same makes of all codebooks when it has learnt from labels in another order. "
            "Where the first codebook is semantic, the others are acoustic."
            + ("" if label == probes.TRANSCRIPT else f" {probes.labels_told(self._labelled[label], label)}"),
            domain=None,
            columns=columns,
            rows=rows,
        )


def _digest(clips: Sequence[probes.LabelledClip], codes: Sequence[np.ndarray]) -> str:
    """Returns a hash of labelled clips and of their codes."""
    found = hashlib.blake2b(digest_size=8)
    for clip, of in zip(clips, codes, strict=True):
        found.update(repr((clip.label, clip.group, of.shape)).encode(errors="surrogateescape"))
        found.update(of.tobytes())
    return found.hexdigest()


def _filled(study: Study) -> Study:
    """Returns a study whose rows have a cell for each column. Cells that a row does not have are None."""
    missing = [[None] * (len(study.columns) - len(row.cells)) for row in study.rows]
    rows = [dataclasses.replace(row, cells=[*row.cells, *none]) for row, none in zip(study.rows, missing, strict=True)]
    return dataclasses.replace(study, rows=rows)


def _slope(decibels: Sequence[float]) -> list[float]:
    """Returns the change in dB an hour, by a straight line through the minutes.

    It returns no number for fewer than ten minutes, as the change in an hour would be a guess.
    """
    if len(decibels) < 10:
        return []
    return [60 * float(np.polyfit(np.arange(len(decibels)), decibels, 1)[0])]
