"""A training step of the codec on a CPU beside the same step in PyTorch: python -m benchmarks.pytorch_step

The step is that of a recipe before its discriminators begin. PyTorch's is made of the modules of our port
(`converters/pytorch`), with the same weights, audio and features; quantizer dropout and the dropouts of the branches
are off in both. Before anything is measured, losses and norms of gradients of the first steps are compared, so that
both compute the same, and move weights and codebooks alike.

Each system has a process of its own, and the processes take turns, a step each. Ours keeps the memory that it frees, as
all commands do; PyTorch gives it back, which is its default, and is measured a second time as it keeps it, too.

On a machine with other work, PyTorch needs OMP_WAIT_POLICY=passive in the environment: its threads wait for each other
by computing, and without it a step took 5.8 s of processor time in place of 1.05 s.
"""

import dataclasses
import functools
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from omnicodec_jax import compilation_cache, dsp, losses, machine
from omnicodec_jax.config import CodebookConfig, Config
from omnicodec_jax.config import files as config_files
from omnicodec_jax.errors import OmniCodecError

TOLERANCE = 1e-3
"""Largest relative difference between the losses, and between the norms of the gradient, of the same work."""
COMPARED = 3
"""Number of steps that are compared. The learning rate of the first is 0: only codebooks move in it."""


class Step(NamedTuple):
    """What a step tells of itself."""

    loss: float
    norm: float
    """Norm of the codec's gradient before it is clipped."""


class Work(NamedTuple):
    """What all systems compute a step of."""

    config: Config
    variables: dict[str, Any]
    audio: np.ndarray
    """float32 [B, 1, T]."""
    features: np.ndarray | None
    """Semantic features float32 [B, S, F]."""


def make_work(name: str, clips: int, seconds: float) -> Work:
    """Makes weights, audio and features of random numbers for a recipe of which nothing is left to chance."""
    from benchmarks.train_speed import random_variables
    from omnicodec_jax.model_directory import build
    from omnicodec_jax.semantic import num_vectors

    config = config_files.load(name)
    codec: Any = config.codec
    acoustic = dataclasses.replace(codec.acoustic, min_quantizers=codec.acoustic.num_quantizers)
    codec = dataclasses.replace(codec, acoustic=acoustic)
    train = dataclasses.replace(
        config.train, compute_dtype="float32", remat=False, semantic_dropout=0.0, acoustic_dropout=0.0
    )
    config = dataclasses.replace(config, codec=codec, train=train)
    rng = np.random.default_rng(0)
    variables = random_variables(build(codec), rng)
    for books in variables["codebooks"].values():
        books["cluster_usage"] = np.ones_like(books["cluster_usage"])
        books["initialized"] = np.ones_like(books["initialized"])
        books["steps_until_check"] = np.full_like(books["steps_until_check"], codec.codebook.check_every)
    samples, features = round(seconds * codec.sample_rate), None
    if codec.semantic is not None:
        steps = num_vectors(codec.semantic.source, samples, codec.sample_rate)
        features = rng.standard_normal((clips, steps, codec.semantic.feature_dim), np.float32)
    audio = 0.1 * rng.standard_normal((clips, 1, samples), np.float32)
    return Work(config, variables, audio, features)


# -- Ours


def ours(work: Work) -> Callable[[], Step]:
    """Returns our step, without discriminators in it. They are in its state, as in a run."""
    import jax
    import jax.numpy as jnp

    from benchmarks.train_speed import random_variables
    from omnicodec_jax.config import MeshConfig
    from omnicodec_jax.discriminators import Discriminators
    from omnicodec_jax.distributed import sharding
    from omnicodec_jax.training.gan import FrozenVariables, Gan
    from omnicodec_jax.training.state import start_state
    from omnicodec_jax.training.step import jit_step

    discriminators = random_variables(Discriminators(work.config.discriminators), np.random.default_rng(1))
    variables = jax.tree.map(jnp.asarray, work.variables)
    # A step gives its state away, and the moving average of the parameters begins as the parameters themselves.
    state = jax.tree.map(jnp.copy, start_state(work.config, variables, discriminators.get("params", {})))
    batch: Any = {"audio": jnp.asarray(work.audio)}
    if work.features is not None:
        batch["features"] = jnp.asarray(work.features)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    run = jit_step(Gan(work.config), mesh, state, FrozenVariables(), with_discriminators=False)
    compiled = run.lower(state, batch, FrozenVariables()).compile()

    def step() -> Step:
        nonlocal state
        state, metrics = compiled(state, batch, FrozenVariables())
        return Step(float(metrics["total"]), float(metrics["grad_norm_codec"]))

    return step


# -- PyTorch's


def pytorch(work: Work) -> Callable[[], Step]:
    """Returns the same step of the modules of the port. The learning rate is that of the warm-up."""
    from omnicodec_jax.converters.pytorch_model import build

    torch.set_num_threads(machine.cores())
    codec: Any = work.config.codec
    options, books = work.config.optimizer, codec.codebook
    model = build(codec, work.variables).train()
    audio = torch.from_numpy(work.audio)
    features = None if work.features is None else torch.from_numpy(work.features)
    named = dict(model.named_parameters())
    of_decay: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in named.items():
        of_decay[name.split(".")[0] in options.weight_decay_modules].append(parameter)
    groups = [{"params": group, "weight_decay": options.weight_decay * decays} for decays, group in of_decay.items()]
    adamw = torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas, eps=options.epsilon, fused=True)
    parameters = list(named.values())
    averages = [parameter.detach().clone() for parameter in parameters]
    done = 0

    def step() -> Step:
        nonlocal done
        for group in adamw.param_groups:
            group["lr"] = options.learning_rate * min(1.0, done / max(1, options.warmup_steps))
        adamw.zero_grad()
        loss, assigned = total_loss(model, work.config, audio, features)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        torch.nn.utils.clip_grad_value_(parameters, options.clip_value)
        if math.isfinite(loss.item() + norm.item()):
            adamw.step()
            for codebook, vectors, codes in assigned:
                move(codebook, vectors, codes, books, look=done % books.check_every == books.check_every - 1)
            if options.ema_decay is not None:
                decay = min(options.ema_decay, (1 + done) / (10 + done))
                for average, parameter in zip(averages, parameters, strict=True):
                    average.lerp_(parameter.detach(), 1 - decay)
        done += 1
        return Step(loss.item(), norm.item())

    return step


Assigned = list[tuple[Any, Tensor, Tensor]]
"""Codebooks, with the vectors [M, V] that each has quantized, and their codes [M]."""


def total_loss(model: Any, config: Config, audio: Tensor, features: Tensor | None) -> tuple[Tensor, Assigned]:
    """Runs the codec on a batch, and adds up its losses; the codebooks stay as they are."""
    weights, codec = config.loss, model.config
    encoded = model.encoder_transformer(model.encoder(audio, None)[0].transpose(1, 2))
    latent = model.downsample["conv"](encoded.transpose(1, 2)).transpose(1, 2)
    frames, total, assigned, image, rest = latent.shape[1], torch.zeros(()), [], 0.0, latent
    if features is not None:
        hidden = interpolate(model.semantic_encoder(model.proj_gt_se_emb(features)), frames)
        quantizer = model.semantic_quantizer
        x, commitment = quantized(quantizer.project_in(hidden), [quantizer._codebook], assigned)
        total, semantic = total + weights.commitment_semantic * commitment, quantizer.project_out(x)
        image = model.proj_se_q_ac_q(semantic)
        rest = latent - model.proj_se_q_ac_emb(semantic) if codec.use_adapter_1 else latent
    quantizer = model.acoustic_quantizer
    books = [layer["_codebook"] for layer in quantizer._layers]
    x, commitment = quantized(F.linear(rest, quantizer.input_proj.weight[:, :, 0]), books, assigned)
    total = total + weights.commitment_acoustic * commitment
    joined = F.linear(x, quantizer.output_proj.weight[:, :, 0]) + image
    upsampled = model.upsample["convtr"](joined.transpose(1, 2)).transpose(1, 2)
    states = model.decoder_transformer(upsampled)
    with torch.no_grad():
        guide = model.decoder_transformer(interpolate(latent, 2 * frames))
    distance = F.l1_loss if weights.self_guidance_norm == "l1" else F.mse_loss
    total = total + weights.self_guidance * distance(states, guide)
    if features is not None:
        restored = model.proj_se_q_gt(interpolate(model.semantic_decoder(upsampled), features.shape[1]))
        total = total + weights.semantic * F.l1_loss(restored, features)
    if weights.latent_cepstrum:
        target = cepstrum(audio, frames, codec.frame_size, codec.sampling_rate)
        near = F.mse_loss(latent[:, :, : target.shape[2]], target[:, :, : latent.shape[2]])
        total = total + weights.latent_cepstrum * near
    decoded = model.decoder(states.transpose(1, 2))[:, :, : audio.shape[2]]
    for window, bands in losses.MEL_SCALES:
        scale = (window, window // 4, bands, codec.sampling_rate)
        with torch.no_grad():
            of_real = mel(audio[:, 0], *scale).clamp(min=1e-5).log10()
        total = total + weights.mel * F.l1_loss(mel(decoded[:, 0], *scale).clamp(min=1e-5).log10(), of_real)
    return total, assigned


def interpolate(x: Tensor, size: int) -> Tensor:
    """Interpolates linearly along time: [B, S, C] → [B, size, C]."""
    return F.interpolate(x.transpose(1, 2), size, mode="linear").transpose(1, 2)


def quantized(x: Tensor, codebooks: Sequence[Any], assigned: Assigned) -> tuple[Tensor, Tensor]:
    """Quantizes x [B, N, V] with straight-through gradients, and computes the commitment loss."""
    total, distances = torch.zeros_like(x), []
    for codebook in codebooks:
        with torch.no_grad():
            left = x - total
            codes = codebook.encode(left)
            total = total + codebook.decode(codes)
        assigned.append((codebook, left.flatten(0, 1), codes.flatten()))
        distances.append(F.mse_loss(x, total))
    return x + (total - x).detach(), torch.stack(distances).mean()


@torch.no_grad()
def move(codebook: Any, vectors: Tensor, codes: Tensor, config: CodebookConfig, look: bool) -> None:
    """Moves a codebook towards the vectors that it was nearest to, after a look for dead entries where there is one."""
    usage, sums = codebook.cluster_usage, codebook.embedding_sum
    if look and (dead := usage < config.dead_threshold * usage.mean()).any():
        drawn = vectors[torch.randint(len(vectors), (len(usage),))]
        sums.copy_(torch.where(dead[:, None], usage.mean() * drawn, sums))
        usage.copy_(torch.where(dead, usage.mean(), usage))
    counts = torch.bincount(codes, minlength=len(usage)).to(usage.dtype)
    usage.lerp_(counts, 1 - config.decay)
    sums.lerp_(torch.zeros_like(sums).index_add_(0, codes, vectors), 1 - config.decay)


@functools.cache
def mel_filters(rate: int, window: int, bands: int) -> tuple[Tensor, Tensor]:
    """Computes the window of an STFT, and the filters [bins, bands]."""
    return torch.hann_window(window), torch.from_numpy(dsp.mel_filterbank(rate, window, bands).copy())


def mel(audio: Tensor, window: int, hop: int, bands: int, rate: int) -> Tensor:
    """Computes mel magnitudes of audio [B, T], centred: [B, N, bands]."""
    hann, filters = mel_filters(rate, window, bands)
    spectrum = torch.stft(audio, window, hop, window=hann, return_complex=True)
    return spectrum.abs().transpose(1, 2) @ filters


@torch.no_grad()
def cepstrum(audio: Tensor, frames: int, frame_size: int, rate: int) -> Tensor:
    """Computes the target of the first channels of the latent; see `losses.latent_cepstrum`."""
    slices, bands = losses.CEPSTRUM_SLICES, losses.CEPSTRUM_MELS
    hop = frame_size // slices
    whole = F.pad(audio[:, 0], (0, frames * frame_size - audio.shape[2]))
    levels = mel(whole, 4 * hop, hop, bands, rate)[:, : frames * slices].clamp(min=1e-3).log10()
    basis = torch.from_numpy(losses.cepstral_basis())
    result = levels.reshape(len(audio), frames, -1) @ basis.reshape(slices * bands, -1)
    return result - result.mean((0, 1))


# -- Measuring


SYSTEMS: dict[str, tuple[Callable[[Work], Callable[[], Step]], bool]] = {
    "ours": (ours, True),
    "PyTorch": (pytorch, False),
    "PyTorch, freed memory kept": (pytorch, True),
}
"""For each system: what makes its step, and whether its process keeps freed memory."""


def serve(connection: Connection, system: str, options: tuple[str, int, float], threads: int) -> None:
    """Sends the first steps of a system, then a step's seconds, on the clock and of processors, when asked."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    make, keeps = SYSTEMS[system]
    machine.keep_compilers_quiet()
    if keeps:
        machine.keep_freed_memory()
    compilation_cache.use()
    step = make(make_work(*options))
    connection.send([step() for _ in range(COMPARED)])
    while connection.recv():
        start, busy = time.perf_counter(), time.process_time()
        step()
        connection.send((time.perf_counter() - start, time.process_time() - busy))


def check_same(first: dict[str, list[Step]]) -> None:
    """Raises OmniCodecError where the first steps of a system are not those of ours."""
    for system, steps in first.items():
        if not np.allclose(steps, first["ours"], rtol=TOLERANCE, atol=0):
            told = f"(loss, gradient's norm) of the first steps {np.array(steps).tolist()}"
            raise OmniCodecError(f"{system}: {told}, ours {np.array(first['ours']).tolist()}: not the same work")


def main(config: str = "small", clips: int = 8, seconds: float = 1.28, repeats: int = 15, threads: int = 2) -> None:
    """Measure a step of the codec, without discriminators, in turns with PyTorch.

    Args:
        config: Recipe.
        clips: Clips in a batch.
        seconds: Length of each clip.
        repeats: Turns.
        threads: Cores that each system may use.
    """
    context, connections = multiprocessing.get_context("spawn"), {}
    first: dict[str, list[Step]] = {}
    for system in SYSTEMS:
        connections[system], other = context.Pipe()
        options = (config, clips, seconds)
        context.Process(target=serve, args=(other, system, options, threads), daemon=True).start()
        other.close()
        first[system] = connections[system].recv()
    check_same(first)
    print("first losses: " + ", ".join(f"{system} {steps[0].loss:.6g}" for system, steps in first.items()), flush=True)
    taken: dict[str, list[tuple[float, float]]] = {system: [] for system in first}
    for turn in range(repeats + 1):
        for system in sorted(first, reverse=bool(turn % 2)):
            connections[system].send(True)
            taken[system].append(connections[system].recv())
    for connection in connections.values():
        connection.send(False)
    medians = {system: [statistics.median(x) for x in zip(*taken[system][1:], strict=True)] for system in first}
    print(f"| {config}, {clips} clips of {seconds} s | s a step | clips/s | × ours | processor s | × ours |")
    print("| --- | --- | --- | --- | --- | --- |")
    for system, (wall, busy) in medians.items():
        parts = wall / medians["ours"][0], busy / medians["ours"][1]
        print(f"| {system} | {wall:.3f} | {clips / wall:.1f} | {parts[0]:.2f} | {busy:.3f} | {parts[1]:.2f} |")


if __name__ == "__main__":
    from omnicodec_jax.cli import command

    command.run(main, prog="python -m benchmarks.pytorch_step")
