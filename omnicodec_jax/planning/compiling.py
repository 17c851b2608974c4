"""Compiling for chips that are not there, until the compiler has decided what the program needs.

Nothing is allocated and no device is needed, only libtpu: pip install -e '.[tpu]'. The compilation is left as soon as
memory is assigned. Writing machine code would come next: it takes libtpu many times as long as everything before it,
and it would change nothing in the plan.
"""

import logging
import re
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax

from omnicodec_jax.errors import ConfigError
from omnicodec_jax.planning.chips import GIB, Chip

LOG = logging.getLogger(__name__)

ASSIGNED = "*.after_optimizations_after_buffer_assignment.txt"
"""The file that XLA dumps after all the files that `CompiledProgram.read` reads."""


class CompiledProgram(NamedTuple):
    """A compiled program with its memory, as XLA has decided before it writes machine code."""

    arguments: int
    """Bytes of the arguments on each chip."""
    memory: int
    """Bytes on each chip, arguments included."""
    text: str
    """The scheduled HLO."""

    @classmethod
    def read(cls, folder: Path) -> "CompiledProgram":
        """Reads what libtpu 0.0.42 has dumped into a folder."""

        def dumped(what: str) -> str:
            (file,) = folder.glob(f"*.after_optimizations{what}.txt")
            return file.read_text()

        total = re.search(r"Memory Space: default.*\nTotal bytes: (\d+)", dumped("-memory-usage-report"))
        if total is None:
            raise ValueError(f"{folder}: the memory report has no total")
        allocations = dumped("-buffer-assignment")
        arguments = re.findall(r"^allocation \d+: size (\d+),.* parameter \d+,", allocations, re.MULTILINE)
        return cls(sum(map(int, arguments)), int(total[1]), dumped(""))


def compile_for(chip: Chip, lowered: jax.stages.Lowered) -> CompiledProgram:
    """Compiles a program for a chip, until its memory is assigned.

    A thread of the compiler goes on after that and cannot be stopped: end the process with `command.exit_at_once`.

    Raises:
        ConfigError: If the program does not fit into the memory of the chip.
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
        while compiling.is_alive() and not any(Path(folder).glob(ASSIGNED)):
            compiling.join(timeout=0.5)
        if failures:
            if (shortfall := missing_memory(str(failures[0]), chip)) is None:
                raise failures[0]
            raise does_not_fit(shortfall, chip) from None
        program = CompiledProgram.read(Path(folder))
    LOG.info("compiled in %.0f s, except for machine code", time.perf_counter() - start)
    if (shortfall := program.memory - chip.memory) > 0:
        raise does_not_fit(shortfall / GIB, chip)
    return program


def does_not_fit(shortfall: float, chip: Chip) -> ConfigError:
    """Returns the error for a program that needs more memory than a chip has; `shortfall` is in GiB."""
    return ConfigError(
        f"the step does not fit: {shortfall:.2f} GiB more than the {chip.memory / GIB:.2f} GiB of a chip; smaller "
        "batches, optimizer.accumulation, remat or a larger mesh.fsdp may help"
    )


def missing_memory(message: str, chip: Chip) -> float | None:
    """Returns by how many GiB a program is too large, as XLA's error says, or None where the error is another one."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    units = {"K": 2**-20, "M": 2**-10, "G": 1, "T": 2**10}
    if exceeded := re.search(r"by ([\d.]+)([KMGT])", message):
        return float(exceeded[1]) * units[exceeded[2]]
    needed = [float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)([KMGT])\b", message)]
    return max(needed, default=0) - chip.memory / GIB
