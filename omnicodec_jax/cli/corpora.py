"""`omnicodec clips`, `prepare`, `tokenize`, `detokenize`, `webdataset`: the commands that work on whole corpora."""

import shutil
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from omnicodec_jax import machine, names
from omnicodec_jax.cli import command
from omnicodec_jax.cli.options import BUNDLED_CLIPS, ModelOption, model_name
from omnicodec_jax.config import Precision
from omnicodec_jax.data.prepare import PrepareConfig
from omnicodec_jax.files import rewriting

PREPARE_DEFAULTS = PrepareConfig()


def prepare(
    *,
    manifest: str,
    out: Path,
    num_workers: int = machine.cores(),
    task: str = "0/1",
    retry_rejected: bool = False,
    settings: Annotated[PrepareConfig, tyro.conf.arg(name="")] = PREPARE_DEFAULTS,
) -> int:
    """Turn raw audio into shards to train on: 24 kHz, mono, peak 0.95, long files in segments.

    When it is run again, it does what is not done yet. Files that cannot be used are listed in OUT/rejects.jsonl.

    Files that the operating system did not give (an unmounted disk, missing rights) are tried again by the next run.

    Runs whose shares overlap are refused.

    Args:
        manifest: The audio of each domain, DOMAIN=PATH,…: a .jsonl(.gz) manifest, a Kaldi .scp file, or a directory.
        out: Directory of the prepared audio.
        num_workers: How many processes decode files.
        task: Share of the work that this process does, i/n: number i, counted from 0, of n. For cluster schedulers.
        retry_rejected: Try once more the files that were refused.
        settings: How audio is prepared.
    """
    from omnicodec_jax.data import manifest as manifests
    from omnicodec_jax.data import prepare as preparation
    from omnicodec_jax.data.units import Share

    sources, share, out = manifests.parse_sources(manifest), Share.parse(task), names.utf8(out)
    done = preparation.run(sources, out, settings, num_workers, share, retry_rejected)
    rejects = out / "rejects.jsonl"
    if done.files:
        rejected = f", {done.rejected} refused (see {rejects})" if done.rejected else ""
        hours = f"{done.low_rate_seconds / 3600:.2f} h in all"
        low_rate = (
            f"; below {settings.min_sample_rate} Hz, and refused: {hours} (--min-sample-rate)"
            if done.low_rate_seconds
            else ""
        )
        print(
            f"prepare: {done.files - done.rejected} of {done.files} files{rejected}, {done.seconds / 3600:.2f} h in "
            f"{done.units} shards, {done.seconds / max(done.elapsed, 1e-9):.0f} x real time{low_rate}"
        )
    else:
        earlier = f"; what was refused is in {rejects}" if rejects.is_file() and rejects.stat().st_size else ""
        print(f"prepare: nothing left to do{earlier}")
    return command.fail_if_none(done.clips, done.listed, rejects)


def tokenize(
    *,
    manifest: str,
    out: Path,
    model: ModelOption = None,
    revision: str | None = None,
    encoder: str | None = None,
    precision: Precision = "float32",
    encoder_precision: Precision = "float32",
    runner: Literal["here", "processes", "ray"] = "here",
    num_workers: int = 2,
    num_readers: int = machine.cores(),
    task: str = "0/1",
    shard_hours: float = 1.0,
    skip_existing: bool = False,
    retry_rejected: bool = False,
) -> int:
    """Turn a corpus into token shards (Parquet).

    When it is run again, it does what is not done yet.

    Files that cannot be used are listed in OUT/__omnicodec__/rejects.jsonl.

    Files that the operating system did not give (an unmounted disk, missing rights) are tried again by the next run.

    When each host of a TPU pod, or of a Slurm, Open MPI or Kubernetes job, runs one process, each does its share.

    Runs whose shares overlap are refused.

    Args:
        manifest: A .jsonl(.gz) manifest, a Kaldi .scp file, or a directory; or one for each domain, DOMAIN=PATH,….
        out: Directory of the token shards.
        model: Model directory or hub id; default $OMNICODEC_MODEL, or the bundled codec.
        revision: Revision of a hub model.
        encoder: Encoder of the semantic features, for models that need one: a directory that `omnicodec convert
            whisper` or `omnicodec convert qwen3-aut` has written, or a codec that has one, such as small. Default: the
            folder `encoder` in the model directory.
        precision: Number format that the model computes in. On GPUs and TPUs, bfloat16 is faster and changes codes
            (docs/tokens.md).
        encoder_precision: Number format that the encoder computes in.
        runner: Who computes: this process on all its devices (here), processes of this machine, or tasks of a Ray
            cluster.
        num_workers: How many workers the runners "processes" and "ray" have.
        num_readers: How many processes decode files ahead of the devices, for each worker.
        task: Share of the work that this process does, i/n: number i, counted from 0, of n. For cluster schedulers.
        shard_hours: About how many hours of audio a shard holds.
        skip_existing: Leave out files whose content OUT already holds as part of another manifest.
        retry_rejected: Try once more the files that were refused.
    """
    from omnicodec_jax.corpus import runners, shards
    from omnicodec_jax.corpus.tokenize import Job
    from omnicodec_jax.data.manifest import parse_sources
    from omnicodec_jax.data.units import Share

    share = Share.parse(task)
    job = Job(
        sources=parse_sources(manifest, unnamed=True),
        out=names.utf8(out),
        model=model_name(model),
        revision=revision,
        encoder=encoder,
        precision=precision,
        encoder_precision=encoder_precision,
        shard_hours=shard_hours,
        skip_existing=skip_existing,
        retry_rejected=retry_rejected,
        num_readers=num_readers,
    )
    if runner == "here" and share.count == 1:
        share = _share_of_this_host()
    done = runners.run(job, runner, num_workers, share)
    speed = f", {done.computed / done.elapsed:.1f} x real time, {done.use}" if done.computed else ""
    speed = speed if done.tried else ", nothing left to do"
    skipped = f", {done.skipped} there already" if done.skipped else ""
    rejects = out / shards.REJECTS
    rejected = f", {done.rejected} refused (see {rejects})" if done.rejected else ""
    print(
        f"tokenize: {done.clips} of {done.listed} files{skipped}{rejected}, {done.seconds / 3600:.2f} h in "
        f"{done.shards} shards{speed}"
    )
    return command.fail_if_none(done.clips + done.skipped, done.listed, rejects)


def detokenize(
    tokens: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    /,
    model: ModelOption = None,
    revision: str | None = None,
    num_quantizers: int | None = None,
    suffix: Literal[".flac", ".wav"] = ".flac",
    task: str = "0/1",
) -> int:
    """Turn token shards into audio files OUT/<domain>/<id>, each at the sample rate and the length of its original.

    Files that are there already stay as they are.

    Args:
        tokens: Directory of token shards.
        out: Directory of the audio.
        model: Model directory or hub id; default $OMNICODEC_MODEL, or the bundled codec.
        revision: Revision of a hub model.
        num_quantizers: Decode from the first n codebooks only, the semantic one included.
        suffix: Format of the files.
        task: Share of the shards that this process does, i/n: number i, counted from 0, of n.
    """
    import jax
    from tqdm import tqdm

    from omnicodec_jax.corpus.detokenize import detokenize
    from omnicodec_jax.data.attempts import reason
    from omnicodec_jax.data.units import Share
    from omnicodec_jax.tokenizer import OmniCodecTokenizer

    tokenizer = OmniCodecTokenizer.from_pretrained(model_name(model), revision, devices=jax.local_devices())
    files, seconds, failed = 0, 0.0, 0
    decoded = detokenize(tokens, out, tokenizer, num_quantizers, suffix, Share.parse(task))
    for file in tqdm(decoded, "detokenize", unit="file", disable=not sys.stderr.isatty()):
        files, seconds = files + 1, seconds + file.seconds
        if file.error is not None:
            failed += 1
            command.fail(f"{file.path}: {reason(file.path, file.error)}")
    print(f"detokenize: {files - failed} of {files} files, {seconds / 3600:.2f} h")
    return int(failed > 0)


def webdataset(tokens: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path], /) -> int:
    """Turn token shards into WebDataset shards: tar files with a .npy of codes [N, K] and a .json for each clip.

    Args:
        tokens: Directory of token shards.
        out: Directory of the tar files.
    """
    from omnicodec_jax.corpus.webdataset import convert

    clips = convert(tokens, out)
    print(f"webdataset: {clips} clips in {out}")
    return 0


def _share_of_this_host():
    """Returns the share of this process on a pod or in a cluster's job; elsewhere, all of the work."""
    from omnicodec_jax.data.units import Share
    from omnicodec_jax.distributed import multihost

    return Share(*multihost.share_of_work())


def clips(out: tyro.conf.Positional[Path], /) -> int:
    """Copy the clips that come with the package, and lists of them, to try the other commands on.

    Args:
        out: Directory to write them to. Files of the same names in it are replaced.
    """
    for file in sorted(BUNDLED_CLIPS.iterdir()):
        with rewriting(out / file.name) as temporary:
            shutil.copyfile(file, temporary)
    print(f"clips: {len(list(BUNDLED_CLIPS.glob('*.flac')))} clips in {out}, with lists by domain; {out / 'README.md'}")
    return 0
