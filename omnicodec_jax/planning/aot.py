"""Compiles a config's training step for TPUs that are not there: does it fit, and how fast could it be?

    omnicodec plan --config released_12hz --topology v5e:4x4 --clips-per-chip 6

Nothing is allocated and no device is needed, only libtpu: pip install -e '.[tpu]'. It stops where machine code would
be written, which takes libtpu many times as long as all before, and changes none of the figures.
"""

import dataclasses
import importlib.util
import logging
import os
import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from omnicodec_jax.config import Config, PerplexityConfig
from omnicodec_jax.data.features import num_vectors
from omnicodec_jax.distributed import sharding
from omnicodec_jax.errors import ConfigError
from omnicodec_jax.language_model import perplexity
from omnicodec_jax.models.initialize import init_variables
from omnicodec_jax.planning import hlo
from omnicodec_jax.pretrained.qwen3_aut import Qwen3AuT, Qwen3AuTConfig
from omnicodec_jax.pretrained.wavlm import WavLM, WavLMConfig
from omnicodec_jax.training.accumulation import TrainBatch
from omnicodec_jax.training.gan import FrozenVariables, Gan
from omnicodec_jax.training.start import state_template
from omnicodec_jax.training.step import jit_step

LOG = logging.getLogger(__name__)
GIB = 2**30
FRAME_RATE = 12.5
"""Of the tokens that a language model is planned for."""


class Chip(NamedTuple):
    """One TPU chip; of a v4, whose two cores are devices of their own here, one core."""

    flops: float
    """A second, bfloat16."""
    bandwidth: float
    """Bytes a second, of its memory."""
    memory: float
    """Bytes that a program can use."""


CHIPS = {
    "v4": Chip(137.5e12, 614e9, 15.25 * GIB),
    "v5e": Chip(197e12, 819e9, 15.75 * GIB),
    "v5p": Chip(459e12, 2765e9, 95.74 * GIB),
    "v6e": Chip(918e12, 1640e9, 31.25 * GIB),
}
"""Speeds: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. Memory: what libtpu 0.0.42 says is available when a program
does not fit."""


class Report(NamedTuple):
    """Of one step, per chip."""

    chip: Chip
    arguments: int
    """Bytes: state, batch, frozen networks."""
    temporaries: int
    """Bytes: activations, and results that do not take the place of an argument; machine code is not counted."""
    totals: hlo.Totals
    seconds_of_audio: float

    @property
    def step_seconds(self) -> float:
        """No step is faster: the longer of computing and of moving memory, both at full speed."""
        return max(self.totals.flops / self.chip.flops, self.totals.bytes_accessed / self.chip.bandwidth)

    def __str__(self) -> str:
        total, bound = self.arguments + self.temporaries, self.step_seconds
        by = "memory" if bound > self.totals.flops / self.chip.flops else "compute"
        kinds = ", ".join(f"{kind} {size / 1e9:.3f} GB" for kind, size in sorted(self.totals.collectives.items()))
        share = sum(self.totals.collectives.values()) / max(1, self.totals.bytes_accessed)
        return f"""per chip
  arguments       {self.arguments / GIB:8.2f} GiB
  temporaries     {self.temporaries / GIB:8.2f} GiB
  total           {total / GIB:8.2f} GiB of {self.chip.memory / GIB:.2f}
  FLOPs           {self.totals.flops / 1e12:8.2f} T, {1e3 * self.totals.flops / self.chip.flops:.0f} ms
  bytes accessed  {self.totals.bytes_accessed / 1e9:8.1f} GB, \
{1e3 * self.totals.bytes_accessed / self.chip.bandwidth:.0f} ms
  collectives     {kinds or "none"}: {share:.2%} of the bytes accessed
roofline          {1e3 * bound:8.0f} ms a step, bound by {by}; {self.seconds_of_audio * 24 / bound:.0f} hours of audio \
a day and chip"""


class Plan(NamedTuple):
    """What XLA has decided of a program when it begins to write machine code."""

    arguments: int
    """Bytes a chip."""
    memory: int
    """Bytes a chip, arguments included."""
    program: str
    """HLO, scheduled."""

    @classmethod
    def read(cls, folder: Path) -> "Plan":
        """From what libtpu 0.0.42 dumps."""

        def dumped(what: str) -> str:
            (file,) = folder.glob(f"*.after_optimizations{what}.txt")
            return file.read_text()

        total = re.search(r"Memory Space: default.*\nTotal bytes: (\d+)", dumped("-memory-usage-report"))
        if total is None:
            raise ValueError(f"{folder}: the memory report has no total")
        allocations = dumped("-buffer-assignment")
        arguments = re.findall(r"^allocation \d+: size (\d+),.* parameter \d+,", allocations, re.MULTILINE)
        return cls(sum(map(int, arguments)), int(total[1]), dumped(""))


PLANNED = "*.after_optimizations_after_buffer_assignment.txt"
"""Written after all that `Plan.read` reads."""


def plan(chip: Chip, lowered: jax.stages.Lowered) -> Plan:
    """Compiles until the plan is made; a thread goes on after that, so leave through `exit_with`.

    Raises ConfigError if XLA finds that it does not fit.
    """
    LOG.info("traced; compiling, which takes minutes")
    start = time.perf_counter()
    failures: list[Exception] = []
    with tempfile.TemporaryDirectory() as folder:

        def compile_all() -> None:
            try:
                lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
            except jax.errors.JaxRuntimeError as failure:
                failures.append(failure)

        compiling = threading.Thread(target=compile_all, daemon=True)
        compiling.start()
        while compiling.is_alive() and not any(Path(folder).glob(PLANNED)):
            compiling.join(timeout=0.5)
        if failures:
            if (shortfall := missing_memory(str(failures[0]), chip)) is None:
                raise failures[0]
            raise does_not_fit(shortfall, chip) from None
        LOG.info("compiled in %.0f s, but for machine code", time.perf_counter() - start)
        return Plan.read(Path(folder))


def report(planned: Plan, chip: Chip, seconds_of_audio: float) -> Report:
    """What a step needs; `seconds_of_audio`: of a chip's clips. Raises ConfigError if it does not fit."""
    if (shortfall := planned.memory - chip.memory) > 0:
        raise does_not_fit(shortfall / GIB, chip)
    temporaries = planned.memory - planned.arguments
    return Report(chip, planned.arguments, temporaries, hlo.totals(planned.program), seconds_of_audio)


def does_not_fit(shortfall: float, chip: Chip) -> ConfigError:
    """What to say of so many GiB."""
    return ConfigError(
        f"the step does not fit: {shortfall:.2f} GiB more than the {chip.memory / GIB:.2f} GiB of a chip; smaller "
        "batches, optimizer.accumulation, remat or a larger mesh.fsdp may help"
    )


def lower_step(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """The very step that training runs, from shapes alone. The mesh's devices need not exist."""
    gan, frozen = networks(config, mesh)
    state = state_template(config, mesh)
    return jit_step(gan, mesh, state, frozen).lower(state, batch(config, mesh), frozen)


def missing_memory(message: str, chip: Chip) -> float | None:
    """GiB by which a program is too large, from what XLA says when it gives up; None: it gave up for another reason."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    units = {"K": 2**-20, "M": 2**-10, "G": 1, "T": 2**10}
    if exceeded := re.search(r"by ([\d.]+)([KMGT])", message):
        return float(exceeded[1]) * units[exceeded[2]]
    needed = [float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)([KMGT])\b", message)]
    return max(needed, default=0) - chip.memory / GIB


def networks(config: Config, mesh: Mesh) -> tuple[Gan, FrozenVariables]:
    """The networks of a run and shapes of the frozen ones: WavLM base-plus and the released encoder."""
    wavlm = encoder = wavlm_variables = encoder_variables = None
    if config.discriminators.wavlm is not None or config.loss.wavlm_distillation:
        wavlm = WavLMConfig()
        wavlm_variables = variables(WavLM(wavlm), mesh)
    if config.codec.semantic is not None and config.codec.semantic.source == "qwen3_aut":
        encoder = Qwen3AuTConfig()
        encoder_variables = variables(Qwen3AuT(encoder), mesh, jnp.dtype(config.train.compute_dtype))
    return Gan(config, wavlm, encoder), FrozenVariables(wavlm_variables, encoder_variables)


def variables(module: Any, mesh: Mesh, dtype: Any = jnp.float32) -> Any:
    """Shapes and shardings of a network's variables."""

    def cast() -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(dtype), init_variables(module, jax.random.key(0)))

    return sharding.template(mesh, cast)


def batch(config: Config, mesh: Mesh) -> TrainBatch:
    """Shapes and shardings of a batch: audio, and the features if they are stored."""
    size, samples, semantic = config.data.batch_size, config.data.segment_samples, config.codec.semantic
    held: NamedSharding = sharding.batch_sharding(mesh)
    shapes: dict[str, Any] = {"audio": jax.ShapeDtypeStruct((size, 1, samples), jnp.float32, sharding=held)}
    if semantic is not None and semantic.source == "stored":
        features = (size, num_vectors(samples), semantic.feature_dim)
        shapes["features"] = jax.ShapeDtypeStruct(features, jnp.bfloat16, sharding=held)
    return shapes


def devices(topology: str) -> list[Any]:
    """Those of a topology such as v5e:4x4, none of which has to exist. Raises ConfigError if libtpu knows it not."""
    from jax.experimental import topologies

    if topology.partition(":")[0] not in CHIPS:
        raise ConfigError(f"--topology {topology}: must be one of {', '.join(CHIPS)}, and chips, such as v5e:4x4")
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("libtpu is not installed; in the checkout, pip install -e '.[tpu]'")
    # Else libtpu asks the network which machine this is, and lets no second process compile.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    try:
        return topologies.get_topology_desc(topology, "tpu").devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ConfigError(f"--topology {topology}: {error}") from None


def plan_training(config: Config, topology: str, clips_per_chip: int) -> Report:
    """What the codec's training step needs on chips that need not exist, with so many clips on each.

    Raises ConfigError for a topology that there is not, and where it does not fit.
    """
    chips, chip = devices(topology), CHIPS[topology.partition(":")[0]]
    data = dataclasses.replace(config.data, batch_size=clips_per_chip * len(chips))
    whole = dataclasses.replace(config, data=data)
    LOG.info("%s on %d devices, %d clips a step", topology, len(chips), data.batch_size)
    planned = plan(chip, lower_step(whole, sharding.make_mesh(config.run.mesh, chips)))
    return report(planned, chip, clips_per_chip * data.segment_samples / config.codec.sample_rate)


def plan_language_model(config: PerplexityConfig, topology: str) -> Report:
    """What the training step of a language model on tokens at 12.5 Hz needs. Raises ConfigError as `plan_training`."""
    chips, chip = devices(topology), CHIPS[topology.partition(":")[0]]
    planned = plan(chip, perplexity.lower_step(config, sharding.make_mesh(config.mesh, chips)))
    return report(planned, chip, config.batch_size * config.window_frames / FRAME_RATE / len(chips))
