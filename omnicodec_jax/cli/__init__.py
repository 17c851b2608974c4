"""The command line: `omnicodec COMMAND …`. Each family of commands has a module here; the work is done elsewhere."""

import sys
from collections.abc import Sequence

from omnicodec_jax import compilation_cache
from omnicodec_jax.cli import arguments, command
from omnicodec_jax.cli.arguments import Commands, Group
from omnicodec_jax.cli.codec import decode, encode, stream_decode
from omnicodec_jax.cli.corpora import clips, detokenize, prepare, tokenize, webdataset
from omnicodec_jax.cli.evaluate import evaluate, listening
from omnicodec_jax.cli.inspect import inspect
from omnicodec_jax.cli.models import export, export_model, init
from omnicodec_jax.cli.perplexity import PERPLEXITY
from omnicodec_jax.cli.plan import PLAN
from omnicodec_jax.cli.train import TRAIN

COMMANDS: Commands = {
    "clips": clips,
    "prepare": prepare,
    "train": TRAIN,
    "export-model": export_model,
    "encode": encode,
    "decode": decode,
    "stream-decode": stream_decode,
    "tokenize": tokenize,
    "detokenize": detokenize,
    "webdataset": webdataset,
    "evaluate": evaluate,
    "listening": listening,
    "perplexity": PERPLEXITY,
    "inspect": inspect,
    "init": init,
    "export": export,
    "convert": Group("omnicodec_jax.cli.converters", "Convert checkpoints from and to PyTorch, and store features."),
    "plan": PLAN,
}
"""Functions by the names that `omnicodec` has for them; `convert` has commands of its own."""

LOGGED = ("train", "evaluate", "perplexity", "plan")
"""Commands that tell their progress by the log."""
NOT_CACHED = ("plan", "convert")
"""Commands that compile nothing for this machine."""


def main(given: Sequence[str] = (), prog: str = "omnicodec") -> None:
    """Runs the command that sys.argv names, and exits with what it returns.

    Args:
        given: Command, and command of it, that need not be named, for programs such as train.py that are one command.
        prog: How the program is called, for its help.
    """

    words = [*given, *sys.argv[1:]]
    name = words[0] if words else None

    def work() -> int | None:
        call = arguments.parse(COMMANDS, prog, words, len(given))
        if name in LOGGED:
            command.log_progress()
        if name not in NOT_CACHED:
            compilation_cache.use()
        return call()

    (command.exit_at_once if name == "plan" else command.exit_with)(work)
