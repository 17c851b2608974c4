"""Functions as commands: arguments from their signatures, user errors as one line and an exit code."""

import sys
from collections.abc import Callable
from typing import Any

from omnicodec_jax.errors import OmniCodecError


def run(command: Callable[..., int | None] | dict[str, Callable[..., int | None]], **tyro_options: Any) -> None:
    """Parses sys.argv for one function, or for a dict of subcommands, calls it and exits with what it returns."""
    import tyro

    try:
        if isinstance(command, dict):
            status = tyro.extras.subcommand_cli_from_dict(command, **tyro_options)
        else:
            status = tyro.cli(command, **tyro_options)
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
