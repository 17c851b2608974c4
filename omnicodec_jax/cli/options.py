"""Options that several commands have, and their defaults."""

import os
import re
import sys
from pathlib import Path
from typing import Annotated

import tyro

from omnicodec_jax import names, shipped
from omnicodec_jax.errors import ConfigError

BUNDLED_CLIPS = Path(__file__).parents[1] / "clips"
"""Short clips of speech, music and sound that come with the package."""

ModelOption = Annotated[
    Path | str | None,
    tyro.conf.arg(help="Model directory or hub id; default $OMNICODEC_MODEL, or the bundled codec.", metavar="DIR"),
]


def model_name(model: Path | str | None) -> str:
    """Returns the given model or, without one, that of $OMNICODEC_MODEL or else the codec that comes with the package.

    A line on standard error says where it is the last. Raises ConfigError for an empty name.
    """
    if model == "":
        raise ConfigError("--model is empty: is a variable of the shell not set?")
    if name := model or os.environ.get("OMNICODEC_MODEL"):
        return str(name)
    card = f"omnicodec inspect {shipped.DEFAULT}: what it is good for"
    print(f"model: {shipped.DEFAULT}, which comes with the package ({card})", file=sys.stderr)
    return str(shipped.MODELS[shipped.DEFAULT])


def named(text: str, option: str, default: str | None = None) -> dict[str, str]:
    """Returns the paths in a text NAME=PATH,… by name.

    Args:
        text: The text; it may be empty.
        option: The option that has this text, for messages.
        default: The name of a path that stands alone; None: every path needs a name.

    Raises:
        ConfigError: For a text of another form.
    """
    result: dict[str, str] = {}
    for part in names.assignments(text) if text else ():
        name, _, path = part.partition("=") if "=" in part or default is None else (default, "=", part)
        if not path or not re.fullmatch(r"\w[\w.+-]*", name) or name in result:
            raise ConfigError(f"{option} {part!r}: must be NAME=PATH, each name once, of letters, digits and .+-_")
        result[name] = path
    return result
