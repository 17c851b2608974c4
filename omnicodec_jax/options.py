"""What several commands take."""

import os
from pathlib import Path
from typing import Annotated

import tyro

from omnicodec_jax.errors import ModelError

BUNDLED_CLIPS = Path(__file__).parents[1] / "examples" / "audio"
"""In a checkout."""

ModelOption = Annotated[
    Path | str | None, tyro.conf.arg(help="Model directory or hub id; default $OMNICODEC_MODEL.", metavar="DIR")
]

NO_MODEL = """no model: give --model DIR or set OMNICODEC_MODEL. To get a model directory:
  python -m convert.from_torch --checkpoint omnicodec.pth --config configs/released_12hz.py --out DIR
  python -m convert.mimi --checkpoint MIMI_DIR --out DIR
  omnicodec init --config configs/demo.py --out DIR      (small and untrained, to try things out)"""


def model_name(model: Path | str | None) -> str:
    """The one that was given, or else the default. Raises ModelError."""
    if name := model or os.environ.get("OMNICODEC_MODEL"):
        return str(name)
    raise ModelError(NO_MODEL)
