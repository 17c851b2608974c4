"""Functions as commands: arguments from their signatures, user errors as one line and an exit code."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omnicodec_jax.errors import OmniCodecError

GOOGLE = "0x1ae0"
"""PCI vendor of TPUs."""
NO_TPU = {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
"""Variables that libtpu reads before it looks for chips."""


def run(command: Callable[..., int | None] | dict[str, Callable[..., int | None]], **tyro_options: Any) -> None:
    """Parses sys.argv for one function, or for a dict of subcommands, calls it and exits with what it returns."""
    import tyro

    if isinstance(command, dict):
        exit_with(lambda: tyro.extras.subcommand_cli_from_dict(command, **tyro_options))
    else:
        exit_with(lambda: tyro.cli(command, **tyro_options))


def exit_with(work: Callable[[], int | None]) -> None:
    """Exits with what it returns, or with 1 and one line if it raises an error that a user can mend."""
    _keep_libtpu_quiet()
    try:
        status = work()
    except (OmniCodecError, OSError) as error:
        fail(error)
        status = 1
    except KeyboardInterrupt:
        fail("interrupted")
        status = 130
    sys.exit(status)


def fail(error: object) -> None:
    """One line on standard error."""
    print(f"error: {error}", file=sys.stderr)


def _keep_libtpu_quiet() -> None:
    """Describes a TPU to libtpu on a machine that has none.

    libtpu is installed there to plan a step for TPUs. JAX asks it for chips at every start; it finds none either way,
    but without these variables it prints at length what it could not find out about them.
    """
    if not has_tpu():
        for name, value in NO_TPU.items():
            os.environ.setdefault(name, value)


def has_tpu() -> bool:
    """Says whether a TPU may be attached to this machine: whether a PCI device of its maker is."""
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(vendor.read_text().strip() == GOOGLE for vendor in vendors)


def log_progress() -> None:
    """Shows what this package logs of its progress, and warnings of others, on standard error."""
    # By force: a library may have set up its own way when it was imported.
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    logging.getLogger("omnicodec_jax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs the traceback of what it raises, too


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, in $OMNICODEC_CACHE or the user's cache directory."""
    import jax

    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update(
        "jax_compilation_cache_dir", os.environ.get("OMNICODEC_CACHE") or str(Path(cache) / "omnicodec_jax")
    )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
