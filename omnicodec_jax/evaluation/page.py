"""The page of an evaluation: one HTML file that opens from disk, with tables, plots, clips and a listening test.

Markup, style and scripts are in `page_files/`. They go into the one file together with the report as JSON, and the page
fetches nothing. Audio files and spectrograms lie beside it.

The report has the form below. Any number may be null, and `why` then says why there is none:

    title, created: text
    domains: [name, …]
    metrics: [{name, title, better: "higher" or "lower", about, unavailable: why none has a value, or null,
               range: [lowest, highest] that there can be, each null without a bound}, …]
    systems: [{name, kind: "codec", "folder", "quoted" or "original", about, codebook_size (of the largest),
               codebook_sizes (of each; not of "quoted"), num_codebooks, bits_per_second, tokens_per_second,
               real_time_factor, usage, perplexity: {domain: [of each codebook, …]} or null}, …]
    summary: {system: {domain: {metric: {mean, ci95, count, why}}}}, means over the clips that all systems have
    clips: [{id, domain, seconds, original: {audio, spectrogram},
             systems: {system: {audio, spectrogram, scores: {metric: {value, why}}}}}, …]
    left_out: {codec: why it could not be loaded}; none if the report has no such field
    studies: [the fields of study.Study, …]; none if the report has no such field

Audio and spectrograms are paths relative to the page. Quoted systems have figures and no clips. If the original is
among the systems, it does not count for the best of a column.

The listening test is blind for those who look at the page: it plays copies of the audio under names that say nothing,
and shows neither names of systems nor paths. It is not blind for those who read the source of the page, since the page
itself writes the names of the systems into the ratings.
"""

import hashlib
import html
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jaxtyping import Float32

from omnicodec_jax.dsp import hann_window
from omnicodec_jax.errors import DataError
from omnicodec_jax.evaluation.listening import REFERENCE
from omnicodec_jax.files import replacing, rewriting

SOURCES = Path(__file__).parent / "page_files"
STIMULI = "stimuli"
"""The folder of the listening test's audio, beside the page."""

WINDOW, HOP = 768, 192
"""The window and the hop of the spectrograms, in samples."""
ROWS, COLUMNS = WINDOW // 4, 900
"""The height of a spectrogram and its greatest width, in pixels."""
DECIBELS = -100.0, -20.0
"""The levels of the darkest and the brightest colour, in dB. A sine of amplitude 1 has 0 dB."""
SHADES = 48
"""The number of colours, which is about as many as people can tell apart. Four times as many make files half as large
again."""


# -- The page


def write(report: dict[str, Any], folder: Path) -> Path:
    """Writes folder/index.html, and the audio of the listening test to folder/stimuli.

    Returns:
        The path of the page.

    Raises:
        DataError: If audio that the report names is not in `folder`, or a system has the name that stands for hidden
            originals in ratings.
    """
    if any(system["name"] == REFERENCE for system in report["systems"]):
        raise DataError(f"a system is named {REFERENCE!r}, which stands for originals in ratings: give it another name")
    clips = [
        {
            **clip,
            "original": _take(clip["original"], folder),
            "systems": {name: _take(take, folder) for name, take in clip["systems"].items()},
        }
        for clip in report["clips"]
    ]
    parts = {
        "title": html.escape(report["title"]),
        "created": html.escape(report["created"]),
        "style": (SOURCES / "page.css").read_text(encoding="utf-8"),
        # "<" is the one character that can end the script element or begin a comment in it.
        "report": json.dumps({**report, "clips": clips}, allow_nan=False).replace("<", "\\u003c"),
        "report_script": (SOURCES / "report.js").read_text(encoding="utf-8"),
        "listening_script": (SOURCES / "listening.js").read_text(encoding="utf-8"),
    }
    template = (SOURCES / "page.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
    path = folder / "index.html"
    with rewriting(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _take(take: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the files of a clip with their paths as URLs, and with the file that the listening test plays."""
    urls = {kind: quote(take[kind]) for kind in ("audio", "spectrogram")}
    return {**take, **urls, "stimulus": _write_stimulus(take["audio"], folder)}


def _write_stimulus(audio: str, folder: Path) -> str:
    """Gives a file a second name that says nothing and depends on its path alone, and returns that name.

    It is a hard link, or a copy where the file system has no hard links.
    """
    source = folder / audio
    if not source.is_file():
        raise DataError(f"{source}: the report names this audio, but it is not there: write the audio before the page")
    name = f"{STIMULI}/{hashlib.sha256(audio.encode()).hexdigest()[:20]}{source.suffix}"
    with replacing(folder / name) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
    return name


# -- Spectrograms


def spectrogram(samples: Float32[np.ndarray, "T"], sample_rate: int, path: Path) -> None:
    """Writes a PNG of the power spectrum over time, from 0 Hz at the bottom to half the sample rate at the top.

    The image is `ROWS` high and at most `COLUMNS` wide. For a long clip, a column shows the mean power of several
    frames. The scale of brightness is the same for all clips.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    decibels = 10 * np.log10(np.maximum(_power(samples), 1e-12))
    low, high = DECIBELS
    shades = np.clip((decibels - low) / (high - low) * (SHADES - 1), 0, SHADES - 1).round().astype(np.uint8)
    image = Image.fromarray(shades.T[::-1], mode="P")
    image.putpalette(cubehelix(SHADES).tobytes())
    about = PngInfo()
    about.add_text("Description", f"0 to {sample_rate / 2:g} Hz, {len(samples) / sample_rate:.3f} s")
    with replacing(path) as temporary:
        image.save(temporary, optimize=True, pnginfo=about)


def _power(samples: Float32[np.ndarray, "T"]) -> Float32[np.ndarray, "N F"]:
    """Returns the power of `ROWS` bands in centred frames, relative to a sine of amplitude 1."""
    padded = np.pad(samples, WINDOW // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]
    group = -(-len(frames) // COLUMNS)
    window = hann_window(WINDOW) * 4 / WINDOW
    columns = []
    for first in range(0, len(frames), group):
        spectrum = np.fft.rfft(frames[first : first + group] * window)[:, : 2 * ROWS]
        pairs = (np.abs(spectrum) ** 2).reshape(-1, ROWS, 2)
        columns.append(pairs.max(axis=2).mean(axis=0))
    return np.array(columns, np.float32)


def cubehelix(count: int) -> np.ndarray:
    """Returns colours of evenly growing brightness, from black through violet, red and sand to white: uint8 [count, 3].

    Source: Green 2011, "A colour scheme for the display of astronomical intensity images", arXiv 1108.5083; start
    -0.3, 0.6 rotations, hue 1, gamma 1.
    """
    brightness = np.linspace(0, 1, count)
    angle = 2 * np.pi * (-0.3 / 3 + 0.6 * brightness)
    amplitude = brightness * (1 - brightness) / 2
    waves = np.array([[-0.14861, 1.78277], [-0.29227, -0.90649], [1.97294, 0.0]])
    turned = waves @ np.array([np.cos(angle), np.sin(angle)])
    return (255 * np.clip(brightness + amplitude * turned, 0, 1)).round().astype(np.uint8).T
