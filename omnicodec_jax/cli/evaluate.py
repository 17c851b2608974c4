"""`omnicodec evaluate`, `listening`: the commands that compare codecs, by metrics and by listening."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from omnicodec_jax import machine
from omnicodec_jax.buckets import as_path
from omnicodec_jax.cli.options import BUNDLED_CLIPS, model_name, named
from omnicodec_jax.errors import ConfigError, DataError

if TYPE_CHECKING:
    from omnicodec_jax.evaluation.run import Evaluation

LOG = logging.getLogger(__name__)

BUNDLED_DATA = ",".join(f"{domain}={BUNDLED_CLIPS / domain}.jsonl" for domain in ("speech", "music", "sound"))


def evaluate(
    *,
    model: str | None = None,
    data: str = BUNDLED_DATA,
    out: Path = Path("report"),
    codebooks: str = "8,16,32",
    peers: str | None = None,
    reconstructions: str | None = None,
    metrics: str = "core",
    encoder: Path | None = None,
    limit: int | None = None,
    shown: int = 30,
    quoted: bool = False,
    stability: int = 0,
    drift: int = 0,
    probes: str | None = None,
    table: int | None = None,
    language_model: str = "language_model",
    num_workers: int = machine.cores(),
) -> int:
    """Score codecs, and write a report with tables and a page to listen to.

    When it is run again, it does what is not done yet.

    Args:
        model: Model directory or hub id of this package; or several, NAME=DIR,NAME=DIR. Default: $OMNICODEC_MODEL, or
            the bundled codec; none if another system is given.
        data: The clips of each domain, DOMAIN=PATH,…: LibriSpeech, GTZAN or AudioSet as they lie on disk, a manifest,
            or any folder of audio. Default: the bundled clips.
        out: Folder of the report.
        codebooks: Numbers of codebooks to decode from, the semantic one included. Each is a line of the tables.
        peers: Other codecs: opus, mimi, dac, encodec, xcodec, wavtokenizer, xcodec2, neucodec, higgs, qwen3tts, auv,
            each with =SOURCE (bit/s for Opus; a directory or a hub id) if not the default.
        reconstructions: Folders of what other systems have written, NAME=DIR,…, with files that are named as the clips.
        metrics: core (pesq_wb, pesq_nb, stoi, mel_distance, mcd), all, or some by name: those of core, si_sdr,
            stft_distance, f0_error, voicing_error, frechet, utmos, dnsmos, dnsmos_signal, dnsmos_background,
            audiobox_ce, audiobox_cu, audiobox_pc, audiobox_pq, wer, speaker_similarity, visqol.
        encoder: Encoder of the semantic features, for models that need one: a directory that `omnicodec convert
            whisper` or `omnicodec convert qwen3-aut` has written, or a codec that has one, such as small. Default: the
            folder `encoder` in the model directory.
        limit: How many clips of each domain are scored, spread evenly over its list. Default: all.
        shown: How many clips of each domain the page has players for.
        quoted: Show the paper's figures beside the measured ones.
        stability: Number of clips of each domain for which the report says how many codes stay the same when the clip
            is shifted, encoded again from its reconstruction, resampled, made softer, or gets some noise.
        drift: Length in minutes, such as 60, of a clip that is put together from each domain. The report gives the
            SI-SDR of each minute of its reconstruction.
        probes: Labels that small classifiers learn to tell from the codes, LABEL=MANIFEST,…. LABEL is a field of the
            lines of the manifest, such as speaker, language or class; or it is text, which a small network spells.
        table: Number of the table of the paper to print, 1 to 4. Its rows are measured with the models (named
            OmniCodec, OmniCodec-F, OmniCodec-FT or as an ablation), codecs, folders and data that are given. The
            paper's figures stand below each row, and notes say why a row was not run. The table decides which metrics
            and numbers of codebooks are measured.
        language_model: Recipe or config file of the language model of Tables 2 and 4.
        num_workers: How many processes compute metrics.
    """
    if not (model or peers or reconstructions):
        model = model_name(None)
    from omnicodec_jax.evaluation import run, scores
    from omnicodec_jax.evaluation.peers import PeerRequest
    from omnicodec_jax.evaluation.token_studies import TokenStudies

    evaluation = run.Evaluation(
        data={name: as_path(path) for name, path in named(data, "--data").items()},
        out=out,
        models=named(model, "--model", "OmniCodec") if model else {},
        peers=tuple(PeerRequest.parse(text) for text in peers.split(",")) if peers else (),
        reconstructions={n: as_path(p) for n, p in named(reconstructions or "", "--reconstructions").items()},
        codebooks=_numbers(codebooks),
        metrics=tuple(scores.choose_metrics(metrics)),
        encoder=encoder,
        limit=limit,
        shown=shown,
        quoted=quoted,
        num_workers=num_workers,
        tokens=TokenStudies(
            stability=stability,
            drift=drift,
            probes={label: as_path(path) for label, path in named(probes or "", "--probes").items()},
        ),
    )
    if table is not None:
        return _paper_table(table, evaluation, language_model)
    status = run.run(evaluation)
    print((out / "tables.md").read_text() + f"\nPage: {out / 'index.html'}")
    return status


def _paper_table(number: int, evaluation: "Evaluation", language_model: str) -> int:
    """Measures and prints a table of the paper."""
    from omnicodec_jax.config import PerplexityConfig
    from omnicodec_jax.config import files as config_files
    from omnicodec_jax.distributed import multihost
    from omnicodec_jax.evaluation import table_run

    config = config_files.load_as((PerplexityConfig,), language_model)
    try:
        status = table_run.run_table(number, evaluation, config)
    except multihost.Interrupted as interrupted:  # a language model saves its last step, and then raises this
        LOG.info("interrupted: what is done is kept, and the same command goes on from there")
        (signal,) = interrupted.args
        return 128 + signal
    print((evaluation.out / f"table_{number}.md").read_text(), end="")
    return status


def _numbers(text: str) -> tuple[int, ...]:
    """Returns the numbers in a comma-separated list. Raises ConfigError."""
    if not all(part.isdecimal() for part in text.split(",")):
        raise ConfigError(f"--codebooks {text}: must be numbers, such as 8,16,32")
    return tuple(int(part) for part in text.split(","))


def listening(
    results: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CSV [CSV ...]")],
    /,
    out: Path | None = None,
    keep_all: bool = False,
) -> int:
    """Print mean opinion scores of a listening test, with 95 % intervals by Student's t over ratings.

    Raters who score more than 15 % of the hidden references below 4, or who have rated none, are named and left out.

    If a rater has rated the same sample several times, the last rating counts.

    Args:
        results: CSV files that raters have downloaded from the page.
        out: CSV file to write the table to.
        keep_all: Leave no rater out.
    """
    from omnicodec_jax.evaluation import listening as ratings_of

    if not results:
        raise DataError("no files: name the CSV files of the raters")
    if missing := [str(path) for path in results if not path.is_file()]:
        raise DataError(
            f"{', '.join(missing)}: no such file; name the CSV files that raters have downloaded from the page"
        )
    read_all = [rating for path in results for rating in ratings_of.read(path)]
    ratings = ratings_of.latest(read_all)
    if len(ratings) < len(read_all):
        print(f"not counted, since there is a later rating of the same sample: {len(read_all) - len(ratings)}")
    flagged = ratings_of.unreliable(ratings)
    for rater, reason in flagged.items():
        print(f"{rater}: {reason}{'' if keep_all else ', left out'}")
    kept = [rating for rating in ratings if keep_all or rating.rater not in flagged]
    if not kept:
        raise DataError("no ratings are left: every rater is left out; see above, and --keep-all")
    rows = ratings_of.summarise(kept)
    print(ratings_of.table(rows))
    if out is not None:
        ratings_of.write(rows, out)
    return 0
