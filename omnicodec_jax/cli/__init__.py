"""The command line: `omnicodec COMMAND …`. Each family of commands has a module here, and other rooms do the work."""

import sys
from collections.abc import Sequence

from omnicodec_jax import compilation_cache
from omnicodec_jax.cli import arguments, command
from omnicodec_jax.cli.arguments import Commands, Group
from omnicodec_jax.cli.codec import decode, encode, stream_decode
from omnicodec_jax.cli.corpora import clips, detokenize, prepare, tokenize, webdataset
from omnicodec_jax.cli.evaluate import evaluate, listening
from omnicodec_jax.cli.goodput import goodput
from omnicodec_jax.cli.inspect import inspect
from omnicodec_jax.cli.models import export, export_model, init
from omnicodec_jax.cli.perplexity import PERPLEXITY
from omnicodec_jax.cli.plan import PLAN
from omnicodec_jax.cli.train import TRAIN

COMMANDS: Commands = {
    "clips": clips,
    "prepare": prepare,
    "train": TRAIN,
    "goodput": goodput,
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
"""The functions of the commands by name; `convert` has commands of its own."""

LOGGED = ("train", "evaluate", "perplexity", "plan")
"""The commands that show their progress by log lines."""
NOT_CACHED = ("plan", "convert")
"""The commands that compile nothing for this machine, so that they need no compilation cache."""


def main(given: Sequence[str] = (), prog: str = "omnicodec") -> None:
    """Runs the command that sys.argv names, and exits with its exit code.

    Args:
        given: Words that stand before those of sys.argv, for programs such as train.py that are one command.
        prog: The name of the program in its help.
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

    if name == "plan":
        command.exit_at_once(work)
    command.exit_with(work)
