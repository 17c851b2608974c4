"""Compiles programs for chips that are not there, until the compiler has decided what a program needs.

Nothing is allocated and no device is needed, only the compilers: pip install -e '.[plan]'. The compilation is left as
soon as memory is assigned. Writing machine code would come next. It takes libtpu many times as long as everything
before it, and it would change nothing in the plan.
"""

import logging
import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

from omnicodec_jax.errors import ConfigError
from omnicodec_jax.planning.speeds import GIB, JAX_TAKES, Chip

LOG = logging.getLogger(__name__)


class CompiledProgram(NamedTuple):
    """A compiled program with its memory, as XLA has decided before it writes machine code."""

    arguments: int
    """The bytes of the arguments on each chip."""
    memory: int
    """The bytes that the program takes on each chip, arguments included."""
    text: str
    """The scheduled HLO of the program."""


READ = ("", "-buffer-assignment", "-memory-usage-report")
"""The suffixes of the names of dumped files that are read: the HLO, its buffer assignment, and its memory usage."""


class Compiler(NamedTuple):
    """The way in which a compiler is called, and the names of the files that it dumps."""

    options: dict[str, Any]
    dumped: str
    """The pattern of the names of dumped files, which `READ` completes."""

    def is_done(self, folder: Path) -> bool:
        """Returns whether all files that `read` reads are complete in a folder.

        XLA of JAX 0.11 writes the files of a stage side by side, so that none of them shows that the others are
        complete. But when all of them are written, XLA writes its options again, in JAX 0.10 and in 0.11.
        """
        found = self._files(folder)
        written = max((file.stat().st_mtime_ns for files in found for file in files), default=0)
        return all(found) and any(file.stat().st_mtime_ns >= written for file in folder.glob("*.debug_options"))

    def _files(self, folder: Path) -> list[list[Path]]:
        return [list(folder.glob(f"{self.dumped}{what}.txt")) for what in READ]

    def read(self, folder: Path) -> CompiledProgram:
        """Reads the files of libtpu 0.0.42 or 0.0.48, or of jax-cuda13-pjrt 0.10.2 or 0.11.2, from a folder."""
        (text,), (allocations,), (report,) = self._files(folder)
        total = re.search(r"Memory Space: default.*\nTotal bytes: (\d+)", report.read_text())
        if total is None:
            raise ValueError(f"{folder}: the memory report has no total")
        arguments = re.findall(r"^allocation \d+: size (\d+),.* parameter \d+,", allocations.read_text(), re.MULTILINE)
        return CompiledProgram(sum(map(int, arguments)), int(total[1]), text.read_text())


OF_TPUS = Compiler({}, "*.after_optimizations")
OF_GPUS = Compiler(
    # Triton times its products on the device. Without a device, it cannot compile some of them.
    {"xla_gpu_enable_triton_gemm": False},
    "*_gpu_after_optimizations",
)


def compile_for(chip: Chip, lowered: jax.stages.Lowered) -> CompiledProgram:
    """Compiles a program for a chip, until its memory is assigned.

    A thread of the compiler goes on after that and cannot be stopped: end the process with `command.exit_at_once`.

    Raises:
        ConfigError: If the program does not fit into the memory of the chip.
    """
    LOG.info("traced; compiling, which takes minutes")
    start = time.perf_counter()
    compiler = OF_TPUS if chip.target is None else OF_GPUS
    failures: list[Exception] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)

        def compile_all() -> None:
            try:
                lowered.compile({**compiler.options, "xla_dump_to": name, "xla_dump_hlo_as_text": True})
            except Exception as failure:
                failures.append(failure)

        compiling = threading.Thread(target=compile_all, daemon=True)
        compiling.start()
        while compiling.is_alive() and not compiler.is_done(folder):
            compiling.join(timeout=0.5)
        if failures and not compiler.is_done(folder):
            if (shortfall := missing_memory(str(failures[0]), chip)) is None:
                raise failures[0]
            raise does_not_fit(shortfall, chip) from None
        program = compiler.read(folder)
    LOG.info("compiled in %.0f s, except for machine code", time.perf_counter() - start)
    if (shortfall := program.memory - chip.memory) > 0:
        raise does_not_fit(shortfall / GIB, chip)
    return program


def does_not_fit(shortfall: float, chip: Chip) -> ConfigError:
    """Returns the error for a program that needs more memory than a chip has; `shortfall` is in GiB."""
    taken = "" if chip.target is None else f"; JAX takes {JAX_TAKES:.0%} of a GPU's, XLA_CLIENT_MEM_FRACTION=.9 more"
    return ConfigError(
        f"the program does not fit: {shortfall:.2f} GiB more than the {chip.memory / GIB:.2f} GiB of a chip; smaller "
        f"batches, optimizer.accumulation, remat or a larger mesh.fsdp may help{taken}"
    )


def missing_memory(message: str, chip: Chip) -> float | None:
    """Returns by how many GiB a program is too large, as XLA's error says; None if the error says something else."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    units = {"K": 2**-20, "M": 2**-10, "G": 1, "T": 2**10}
    if exceeded := re.search(r"by ([\d.]+)([KMGT])", message):
        return float(exceeded[1]) * units[exceeded[2]]
    needed = [float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)([KMGT])\b", message)]
    return max(needed, default=0) - chip.memory / GIB
