"""Figures of the paper (Tables 1 and 3), which a report shows beside measured ones and marks as quoted.

The paper's test sets are LibriSpeech test-clean, GTZAN and a part of AudioSet eval. The paper does not define its mel
distance and its MCD, so these two can be compared only with other figures of the paper.
"""

from collections.abc import Sequence
from typing import Any

DOMAINS = ("speech", "music", "sound")
SOURCE = "quoted from the paper"

_SYSTEMS: dict[str, tuple[int, int, int | None]] = {  # codebook size, bit/s, tokens/s
    "WavTokenizer": (4096, 480, 40),
    "UniCodec": (16384, 1050, 75),
    "AUV": (20480, 716, 50),
    "X-Codec-8L": (1024, 4000, None),
    "Mimi-16L": (2048, 2200, None),
    "OmniCodec-32L": (2048, 4400, None),
    "OmniCodec-16L": (2048, 2200, None),
    "OmniCodec-8L": (2048, 1100, None),
    "OmniCodec-F-32L": (2048, 2200, None),
    "OmniCodec-F-16L": (2048, 1100, None),
}
# Each metric has a text for each of the systems above, with its scores of speech, music and sound.
_TABLE_1 = {
    "pesq_wb": (
        "1.88 1.14 1.35",
        "2.65 1.33 1.59",
        "2.40 1.29 1.54",
        "2.96 1.95 2.07",
        "2.88 1.56 1.71",
        "3.02 1.59 1.89",
        "2.76 1.44 1.75",
        "2.14 1.31 1.55",
        "2.52 1.35 1.61",
        "2.14 1.25 1.49",
    ),
    "pesq_nb": (
        "2.44 1.51 1.77",
        "3.14 1.85 2.15",
        "3.05 1.91 2.13",
        "3.49 2.73 2.72",
        "3.42 2.12 2.39",
        "3.62 2.21 2.60",
        "3.41 2.02 2.44",
        "2.78 1.75 2.16",
        "3.19 1.82 2.28",
        "2.79 1.68 2.13",
    ),
    "stoi": (
        "0.87 0.49 0.36",
        "0.92 0.64 0.49",
        "0.91 0.60 0.47",
        "0.93 0.77 0.65",
        "0.94 0.74 0.60",
        "0.96 0.78 0.66",
        "0.94 0.73 0.61",
        "0.91 0.66 0.52",
        "0.93 0.70 0.58",
        "0.90 0.66 0.50",
    ),
    "mel_distance": (
        "0.97 1.16 1.10",
        "0.79 1.00 0.96",
        "0.89 1.26 1.26",
        "0.79 0.87 0.88",
        "1.12 1.18 1.14",
        "0.75 0.86 0.82",
        "0.81 0.90 0.85",
        "0.90 0.97 0.90",
        "0.84 0.94 0.88",
        "0.89 0.98 0.90",
    ),
    "mcd": (
        "4.79 4.47 5.08",
        "3.46 3.66 4.11",
        "3.60 3.94 4.37",
        "3.35 3.15 4.05",
        "3.93 3.56 4.06",
        "2.54 2.28 2.74",
        "3.05 2.68 3.04",
        "3.78 3.30 3.50",
        "3.15 2.87 3.26",
        "3.83 3.36 3.61",
    ),
}
# Each system has, by metric, its scores of music and sound.
_TABLE_3 = {
    "Mimi-16L": {
        "audiobox_ce": (6.85, 3.72),
        "audiobox_cu": (6.84, 5.10),
        "audiobox_pc": (6.30, 3.92),
        "audiobox_pq": (7.06, 5.82),
    },
    "OmniCodec-16L": {
        "audiobox_ce": (7.17, 3.85),
        "audiobox_cu": (7.13, 5.37),
        "audiobox_pc": (6.41, 3.81),
        "audiobox_pq": (7.24, 5.88),
    },
}


def systems() -> list[dict[str, Any]]:
    """Returns the paper's systems, as rows of a report's `systems`."""
    return [
        {
            "name": f"{name}, paper",
            "kind": "quoted",
            "about": SOURCE,
            "codebook_size": size,
            "num_codebooks": int(name.rpartition("-")[2][:-1]) if name.endswith("L") else 1,
            "bits_per_second": rate,
            "tokens_per_second": tokens,
            "real_time_factor": None,
            "usage": None,
            "perplexity": None,
        }
        for name, (size, rate, tokens) in _SYSTEMS.items()
    ]


def means(name: str, domains: Sequence[str], metrics: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the paper's scores of one of `systems`, in the form of a report's `summary`."""
    quoted = name.removesuffix(", paper")
    row = list(_SYSTEMS).index(quoted)
    known: dict[tuple[str, str], float] = {}
    for metric, cells in _TABLE_1.items():
        known |= {(d, metric): float(text) for d, text in zip(DOMAINS, cells[row].split(), strict=True)}
    for metric, values in _TABLE_3.get(quoted, {}).items():
        known |= {(d, metric): value for d, value in zip(DOMAINS[1:], values, strict=True)}

    def cell(domain: str, metric: str) -> dict[str, Any]:
        value = known.get((domain, metric))
        return {"mean": value, "ci95": None, "count": 0, "why": "not in the paper" if value is None else None}

    return {domain: {metric: cell(domain, metric) for metric in metrics} for domain in domains}
