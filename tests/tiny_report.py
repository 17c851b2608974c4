"""A report of an evaluation with audio of a quarter of a second, and names that want to break out."""

from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from omnicodec_jax.evaluation import page

RATE = 24_000
HOSTILE = "</script><script>alert('1')</script><!-- & \"x\""
MISSING = "the recogniser is not there"
QUOTED = [f"Quoted-{number}" for number in range(6)]
SYSTEMS = ["Codec-A", "Codec-B <i>", *QUOTED]


def build(folder: Path) -> dict[str, Any]:
    """Two domains of two clips, two codecs with audio in `folder`, six quoted ones of one bit rate and quality."""
    means = dict(zip(SYSTEMS, [2.0, 10.5, *[2.02] * 6], strict=True))
    cells = {name: {"pesq": figure(mean), "wer": figure(None, MISSING)} for name, mean in means.items()}
    cells[SYSTEMS[1]]["mel"] = figure(0.5)
    kinds, rates = ["codec", "codec", *["quoted"] * 6], [2200.0, 550.0, *[2200.0] * 6]
    return {
        "title": f"Report {HOSTILE}",
        "created": "2026-01-31T12:00:00Z",
        "domains": ["speech", "music"],
        "metrics": [
            {"name": "pesq", "title": "PESQ-WB", "better": "higher", "about": "Quality.", "unavailable": None},
            {"name": "mel", "title": "Mel dis.", "better": "lower", "about": "Distance.", "unavailable": None},
            {"name": "wer", "title": "WER", "better": "lower", "about": "Errors.", "unavailable": MISSING},
        ],
        "systems": [system(*row) for row in zip(SYSTEMS, kinds, rates, strict=True)],
        "summary": {name: dict.fromkeys(("speech", "music"), cell) for name, cell in cells.items()},
        "clips": [
            clip(folder, HOSTILE, "s1", "speech"),
            clip(folder, "second", "s2", "speech"),
            clip(folder, "third", "m1", "music"),
            clip(folder, "fourth", "m2", "music"),
        ],
    }


def system(name: str, kind: str, rate: float) -> dict[str, Any]:
    own = kind == "codec"
    return {
        "name": name,
        "kind": kind,
        "codebook_size": 2048,
        "num_codebooks": 2,
        "bits_per_second": rate,
        "tokens_per_second": None,
        "real_time_factor": None,
        "about": "of this test",
        "usage": {"speech": [1.0, 0.25], "music": [0.5, 0.5]} if own else None,
        "perplexity": {"speech": [1500.0, 77.0], "music": [10.0, 12.0]} if own else None,
    }


def figure(mean: float | None, why: str | None = None) -> dict[str, Any]:
    return {"mean": mean, "ci95": None if mean is None else 0.1, "count": 0 if mean is None else 2, "why": why}


def clip(folder: Path, name: str, file: str, domain: str) -> dict[str, Any]:
    scores = {"pesq": {"value": 2.5, "why": None}, "wer": {"value": None, "why": MISSING}}
    made = {system: {**take(folder, f"system{n}", file), "scores": scores} for n, system in enumerate(SYSTEMS[:2])}
    return {"id": name, "domain": domain, "seconds": 0.25, "original": take(folder, "original", file), "systems": made}


def take(folder: Path, system: str, file: str) -> dict[str, Any]:
    audio, picture = f"audio/{system}/{file} #1 100%.flac", f"spectrograms/{system}/{file}?.png"
    samples = 0.1 * np.sin(2 * np.pi * 440 * np.arange(RATE // 4) / RATE, dtype=np.float32)
    (folder / audio).parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / audio, samples, RATE)
    page.spectrogram(samples, RATE, folder / picture)
    return {"audio": audio, "spectrogram": picture}
