"""Whether a device gives the numbers of a CPU, of numpy, of the reference implementation and of another process."""

import hashlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks.accelerator.settings import Settings, bundled_audio, codec_config
from omnicodec_jax.blocks import AudioBlocks, encode_block
from omnicodec_jax.config import Precision
from omnicodec_jax.lanes import ACCELERATOR_BLOCKS, ACCELERATOR_ROWS, CPU_BLOCKS, batch_step
from omnicodec_jax.models.conv import CausalConvTranspose1d
from omnicodec_jax.models.residual_stage import BlockParameters, in_one_kernel, one_by_one
from omnicodec_jax.tokenizer import OmniCodecTokenizer


class Row(NamedTuple):
    """A row of the table."""

    what: str
    here: str
    """On this device."""
    beside: str
    """What it is compared with."""


def codes_of(settings: Settings, model: Path, device: Any, precision: Precision = "float32") -> np.ndarray:
    """Tokenizes the bundled clips on a device: codes [K, N] of all of them, one after the other."""
    tokenizer = OmniCodecTokenizer.from_pretrained(model, devices=[device], precision=precision)
    clips = [tokenizer.prepare(clip) for clip in bundled_audio(settings, tokenizer.sample_rate)]
    codes = dict(tokenizer.encode_each(enumerate(clips)))
    return np.concatenate([codes[number] for number in sorted(codes)], axis=1)


def mismatches(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Says how many codes are others, in all and of some codebooks."""
    differ = ours != theirs
    books = {"semantic": differ[0], "first acoustic": differ[1], "last": differ[-1]}
    each = ", ".join(f"{name} {found.mean():.2%}" for name, found in books.items())
    return f"{differ.sum()} of {differ.size} differ ({each})"


def codes_of_a_cpu(settings: Settings, model: Path) -> Row:
    """Compares the codes of the bundled clips with those of this machine's CPU."""
    ours, theirs = (codes_of(settings, model, device) for device in (jax.devices()[0], jax.devices("cpu")[0]))
    return Row("codes of the bundled clips", mismatches(ours, theirs), "the CPU of this machine")


def codes_in_bfloat16(settings: Settings, model: Path) -> Row:
    """Compares the codes in bfloat16 with those in float32."""
    device = jax.devices()[0]
    ours, theirs = (codes_of(settings, model, device, precision) for precision in ("bfloat16", "float32"))
    return Row("codes with --precision bfloat16", mismatches(ours, theirs), "float32 on this device")


def fingerprint(settings: Settings, model: Path) -> str:
    """Returns digests of the codes of the bundled clips and of the compiled encoder, with the algorithms chosen."""
    device = jax.devices()[0]
    tokenizer = OmniCodecTokenizer.from_pretrained(model, devices=[device])
    frames = (CPU_BLOCKS if device.platform == "cpu" else ACCELERATOR_BLOCKS)[0]
    clip, hidden = np.zeros(frames * tokenizer.hop_length, np.float32), np.zeros((1, tokenizer.config.dimension))
    block = AudioBlocks(clip, hidden.astype(np.float32), tokenizer.hop_length).block(0, frames)
    rows = np.ones(1 if device.platform == "cpu" else ACCELERATOR_ROWS, np.bool_)
    inputs = tuple(np.stack([part] * rows.size) for part in block)
    program = batch_step(tokenizer.model, encode_block, Mesh(np.array([device]), ("rows",)))
    state = jax.eval_shape(program.on_one_device, tokenizer.variables, {}, rows, rows, *inputs)[1]
    lowered = program.on_all_devices.lower(tokenizer.variables, state, rows, rows, *inputs)
    text = lowered.compile().as_text() or ""
    codes = codes_of(settings, model, device)
    return " ".join(hashlib.sha256(data).hexdigest()[:12] for data in (codes.tobytes(), text.encode()))


def two_processes(settings: Settings, model: Path) -> Row:
    """Compares two processes that compile for themselves: their codes, and their programs with the algorithms chosen.

    They are this command again, so the device must not be in use by this process.
    """
    command = [sys.executable, "-m", "benchmarks.accelerator", *sys.argv[1:], "--fingerprint"]
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    found = [subprocess.check_output(command, text=True, env=environment).split()[-2:] for _ in range(2)]
    same = ["the same" if one == two else "NOT the same" for one, two in zip(*found, strict=True)]
    return Row("two processes", f"codes {same[0]}, compiled programs {same[1]}", "each other, without a cache")


def upsampler(settings: Settings, model: Path) -> Row:
    """Compares the depthwise transposed convolution with its definition in numpy.

    XLA has computed such convolutions wrongly on GPUs where the window is reversed. Ours is written without one.
    """
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 50, 64), np.float32), rng.standard_normal((4, 1, 64), np.float32)
    layer = CausalConvTranspose1d(64, 2, use_bias=False, depthwise=True)
    y = np.asarray(jax.jit(layer.apply)({"params": {"kernel": kernel}}, x))
    expected = np.zeros((2, 102, 64))
    for tap in range(4):
        expected[:, tap : tap + 100 : 2] += x * kernel[tap]
    error = np.abs(y - expected[:, :100]).max() / np.abs(expected).max()
    return Row("depthwise upsampler", f"off by {error:.1e} of the largest value", "numpy")


def residual_stage(settings: Settings, model: Path) -> Row:
    """Compares the kernel that runs the residual blocks of SEANet's first stage on a TPU with the blocks by themselves.

    Forward and backward, in bfloat16, of two clips. Where there is no TPU, the kernel is interpreted.
    """
    rng, interpret = np.random.default_rng(0), jax.devices()[0].platform != "tpu"
    seanet = codec_config(settings).seanet
    channels, dilations = seanet.n_filters, tuple(seanet.dilation_base**i for i in range(seanet.n_residual_layers))
    hidden = channels // seanet.compress
    shapes = ((seanet.residual_kernel_size, channels, hidden), (hidden,), (1, hidden, channels), (channels,))
    block = BlockParameters(*(jnp.asarray(0.1 * rng.standard_normal(shape), jnp.float32) for shape in shapes))
    blocks = [block] * len(dilations)
    x = jnp.asarray(rng.standard_normal((2, round(settings.seconds * 24_000), channels)), jnp.bfloat16)

    @partial(jax.jit, static_argnums=0)
    def result_and_gradients(stage: Any, x: jax.Array, blocks: Any) -> Any:
        run = partial(stage, conv_in=None, conv_out=None, dilations=dilations, dtype=x.dtype)
        y, vjp = jax.vjp(run, x, blocks)
        return y, vjp(jnp.sin(y))

    ours = result_and_gradients(partial(in_one_kernel, interpret=interpret), x, blocks)
    theirs = result_and_gradients(one_by_one, x, blocks)

    def error(ours: Any, theirs: Any) -> float:
        pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
        each = ((np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs)
        return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in each)

    here = f"result off by {error(ours[0], theirs[0]):.1e}, gradients by up to {error(ours[1], theirs[1]):.1e}"
    return Row(f"residual stage in one kernel{', interpreted' * interpret}", here, "the blocks one by one, bfloat16")


def golden_steps(settings: Settings, model: Path) -> Row:
    """Runs three training steps that the reference implementation has run, at full float32, and compares all losses."""
    tests = Path(__file__).parents[2] / "tests"
    sys.path[:0] = [str(tests), str(tests / "parity")]
    import golden  # pyright: ignore[reportMissingImports]
    import test_golden_steps as steps  # pyright: ignore[reportMissingImports]

    if not golden.DIRECTORY.is_dir():
        raise FileNotFoundError(f"no golden data in {golden.DIRECTORY}")
    with jax.default_matmul_precision("highest"):
        metrics = steps.run().metrics
    errors = {
        (ours, number): abs(float(metrics[number][ours]) / (wanted[theirs] / steps.WEIGHTED.get(ours, 1)) - 1)
        for number, wanted in enumerate(golden.load().steps)
        for ours, theirs in steps.TERMS.items()
    }
    (name, number), worst = max(errors.items(), key=lambda item: item[1])
    return Row("three golden steps", f"losses off by up to {worst:.1e} ({name}, step {number})", "PyTorch on a CPU")
