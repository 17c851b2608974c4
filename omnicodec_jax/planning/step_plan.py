"""The plan of a step: the memory, operations and traffic that it needs on one chip, and the time they take at best."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from omnicodec_jax.planning import parts
from omnicodec_jax.planning.chips import Topology
from omnicodec_jax.planning.collectives import by_kind
from omnicodec_jax.planning.compiling import CompiledProgram
from omnicodec_jax.planning.speeds import GIB, Chip
from omnicodec_jax.planning.totals import Totals, totals

UNTUNED = """\
NVIDIA's libraries choose their algorithms on the device: memory that their convolutions work in comes on top
"""


class StepPlan(NamedTuple):
    """The needs of one step on each chip, and the audio that the step processes there."""

    chip: Chip
    arguments: int
    """The bytes of state, batch and frozen networks."""
    temporaries: int
    """The bytes of activations, and of results that do not reuse an argument's memory. Machine code does not count."""
    totals: Totals
    seconds_of_audio: float
    """The seconds of audio that a chip processes in a step."""
    per_host: int = 1
    """The number of chips that reach each other without the network between hosts of GPUs or slices of TPUs."""
    breakdown: str = ""
    """The tables of what each part and each operation needs (parts.py)."""

    @classmethod
    def from_program(cls, program: CompiledProgram, topology: Topology, seconds_of_audio: float) -> "StepPlan":
        """Returns the plan of a compiled step."""
        temporaries, counts = program.memory - program.arguments, totals(program.text)
        tables = parts.breakdown(program.text, topology.chip)
        return cls(topology.chip, program.arguments, temporaries, counts, seconds_of_audio, topology.per_host, tables)

    @property
    def memory(self) -> int:
        """The bytes that the step takes on a chip."""
        return self.arguments + self.temporaries

    @property
    def compute_seconds(self) -> float:
        """The time that the operations take at full speed."""
        counts = self.totals.operations.items()
        return sum((count / self.chip.speeds[arithmetic] for arithmetic, count in counts), 0.0)

    @property
    def memory_seconds(self) -> float:
        """The time that reading from and writing to memory takes at full speed."""
        return self.totals.bytes_accessed / self.chip.bandwidth

    @property
    def exchange_seconds(self) -> float:
        """The time that the exchanges with other chips take at full speed."""
        exchanges = self.totals.exchanges.items()
        return sum((times * each.seconds(self.chip, self.per_host) for each, times in exchanges), 0.0)

    @property
    def step_seconds(self) -> float:
        """The roofline: no step is faster than its operations, its memory traffic, or its exchanges."""
        return max(self.compute_seconds, self.memory_seconds, self.exchange_seconds)

    @property
    def bound_by(self) -> str:
        """The name of what takes longest: compute, memory or exchanges."""
        times = {"compute": self.compute_seconds, "memory": self.memory_seconds, "exchanges": self.exchange_seconds}
        return max(times, key=lambda name: times[name])

    def __str__(self) -> str:
        bound, kinds = self.step_seconds, sorted(self.totals.collectives.items())
        exchanged = ", ".join(f"{kind} {size / 1e9:.3f} GB" for kind, size in kinds)
        slow = Counter({each: times for each, times in self.totals.exchanges.items() if each.is_slow(self.per_host)})
        between = ", ".join(f"{kind} {size / 1e9:.3f} GB" for kind, size in sorted(by_kind(slow).items()))
        seconds = sum((times * each.seconds(self.chip, self.per_host) for each, times in slow.items()), 0.0)
        where = "slices" if self.chip.target is None else "hosts"
        exchanges = f"{1e3 * self.exchange_seconds:.1f} ms"
        if slow:
            exchanges += f"\n  between {where:8}{between}, {1e3 * seconds:.1f} ms of these"
        share = sum(self.totals.collectives.values()) / max(1, self.totals.bytes_accessed)
        arithmetic = ", ".join(f"{name} {count / 1e12:.3g}" for name, count in sorted(self.totals.operations.items()))
        return f"""per chip
  arguments       {self.arguments / GIB:8.2f} GiB
  temporaries     {self.temporaries / GIB:8.2f} GiB
  total           {self.memory / GIB:8.2f} GiB of {self.chip.memory / GIB:.2f}
  FLOPs           {self.totals.flops / 1e12:8.2f} T ({arithmetic}), {1e3 * self.compute_seconds:.0f} ms
  bytes accessed  {self.totals.bytes_accessed / 1e9:8.1f} GB, {1e3 * self.memory_seconds:.0f} ms
  collectives     {exchanged or "none"}: {share:.2%} of the bytes accessed, {exchanges}
{"" if self.chip.target is None else UNTUNED}\
roofline          {1e3 * bound:8.1f} ms a step, bound by {self.bound_by}; {self.seconds_of_audio / bound:.0f} x real \
time, {self.seconds_of_audio * 24 / bound:.0f} hours of audio a day and chip"""


def table(plans: Mapping[str, StepPlan]) -> str:
    """Returns a table of programs that a chip runs one after the other for the same audio, and their speed together.

    Steps of different programs may process different lengths of audio, so times for a second of audio are added up.
    """
    chip = next(iter(plans.values())).chip
    lines = [f"{'':24}{'GiB':>7}{'TFLOP':>9}{'GB':>9}{'ms':>9}  bound by{'x real time':>15}"]
    for name, plan in plans.items():
        ms, speed = 1e3 * plan.step_seconds, plan.seconds_of_audio / plan.step_seconds
        counts = f"{plan.totals.flops / 1e12:9.3f}{plan.totals.bytes_accessed / 1e9:9.2f}{ms:9.2f}"
        lines.append(f"{name:24}{plan.memory / GIB:7.2f}{counts}  {plan.bound_by:8}{speed:15.0f}")
    fastest = 1 / sum(plan.step_seconds / plan.seconds_of_audio for plan in plans.values())
    needed = sum(plan.arguments for plan in plans.values()) + max(plan.temporaries for plan in plans.values())
    memory = f"{needed / GIB:.2f} GiB of {chip.memory / GIB:.2f}"
    lines.append(f"{memory}; {fastest:.0f} x real time at best, {24 * fastest:.0f} hours of audio a day and chip")
    return "\n".join([*lines, *([] if chip.target is None else [UNTUNED.strip()])])
