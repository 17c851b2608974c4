"""The plan of a step: the memory, operations and traffic that it needs on one chip, and the time they take at best."""

from typing import NamedTuple

from omnicodec_jax.planning import hlo
from omnicodec_jax.planning.chips import GIB, Chip
from omnicodec_jax.planning.compiling import CompiledProgram


class StepPlan(NamedTuple):
    """The needs of one step on each chip, and the audio that it processes there."""

    chip: Chip
    arguments: int
    """Bytes of state, batch and frozen networks."""
    temporaries: int
    """Bytes of activations, and of results that do not take the place of an argument. Machine code does not count."""
    totals: hlo.Totals
    seconds_of_audio: float
    """Audio that a chip processes in a step."""

    @classmethod
    def from_program(cls, program: CompiledProgram, chip: Chip, seconds_of_audio: float) -> "StepPlan":
        """Returns the plan of a compiled step."""
        temporaries = program.memory - program.arguments
        return cls(chip, program.arguments, temporaries, hlo.totals(program.text), seconds_of_audio)

    @property
    def compute_seconds(self) -> float:
        """The time that the operations take at full speed."""
        return self.totals.flops / self.chip.flops

    @property
    def memory_seconds(self) -> float:
        """The time that reading from and writing to memory takes at full speed."""
        return self.totals.bytes_accessed / self.chip.bandwidth

    @property
    def step_seconds(self) -> float:
        """The roofline: no step is faster than its operations, nor faster than its memory traffic."""
        return max(self.compute_seconds, self.memory_seconds)

    def __str__(self) -> str:
        total, bound = self.arguments + self.temporaries, self.step_seconds
        by = "memory" if bound > self.compute_seconds else "compute"
        kinds = ", ".join(f"{kind} {size / 1e9:.3f} GB" for kind, size in sorted(self.totals.collectives.items()))
        share = sum(self.totals.collectives.values()) / max(1, self.totals.bytes_accessed)
        return f"""per chip
  arguments       {self.arguments / GIB:8.2f} GiB
  temporaries     {self.temporaries / GIB:8.2f} GiB
  total           {total / GIB:8.2f} GiB of {self.chip.memory / GIB:.2f}
  FLOPs           {self.totals.flops / 1e12:8.2f} T, {1e3 * self.compute_seconds:.0f} ms
  bytes accessed  {self.totals.bytes_accessed / 1e9:8.1f} GB, {1e3 * self.memory_seconds:.0f} ms
  collectives     {kinds or "none"}: {share:.2%} of the bytes accessed
roofline          {1e3 * bound:8.0f} ms a step, bound by {by}; {self.seconds_of_audio * 24 / bound:.0f} hours of audio \
a day and chip"""
