"""`omnicodec goodput`: the command that says which share of a run's time was learning."""

import time
from pathlib import Path


def goodput(*, workdir: Path) -> None:
    """Say which share of a run's wall time was learning, over all its starts, and what the rest was lost to.

    Args:
        workdir: Directory of the run.
    """
    from omnicodec_jax.training import lost_time

    spent = lost_time.of_run(workdir)
    print(f"{workdir}: {spent}")
    for cause, share in spent.shares.items():
        print(f"  {cause:<18}{lost_time.span(spent.seconds[cause]):>10}{100 * share:>8.1f} %")
    for number, start in enumerate(spent.starts, 1):
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start.first.began))
        steps = "no step" if start.steps is None else f"steps {start.steps[0]} to {start.steps[1]}"
        memory = f"{start.first.host_gib:.2f} GiB of host memory at first, {start.last.host_gib:.2f} at last"
        print(f"start {number}, {began}: {steps} in {lost_time.span(start.last.at - start.first.began)}, {memory}")
