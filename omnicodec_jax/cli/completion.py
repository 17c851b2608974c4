"""Tab completion: the scripts that tyro writes for shells, which also complete the names of files."""

import contextlib
import io
from collections.abc import Callable, Mapping
from typing import Any

import tyro

FILES = "__TYRO_COMPLETE_FILES__"
"""What tyro's scripts take for "names of files", which it asks for after options only, not for positional arguments."""
REGISTERED = """\
  # Evaluated, as in ~/.zshrc, rather than called for a completion.
  if (( ! ${+compstate} )); then
    (( ${+functions[compdef]} )) || { autoload -Uz compinit && compinit }
    compdef $0 ${0#_tyro_}
    return
  fi
  local python_cmd
"""
"""How the function of tyro's script for zsh begins, which only works as a file on fpath otherwise."""
CHANGES = {
    "bash": (
        ("for completion in completions:", f"for completion in completions or ['{FILES}']:"),
        ("complete -F", "complete -o default -o filenames -F"),
    ),
    "zsh": (
        ("for completion in completions:", f"for completion in completions or ['{FILES}']:"),
        ("  local python_cmd\n", REGISTERED),
    ),
    "fish": (("complete --no-files", "complete"),),
}
"""By shell, what is replaced in tyro's script, and by what."""


def script(commands: Mapping[str, Callable[..., Any]], prog: str, shell: str) -> str:
    """Returns the script that a shell must run to complete the subcommands, options and file names of a program.

    Raises KeyError for a shell that is not in `CHANGES`.
    """
    changes, text = CHANGES[shell], io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        arguments = ["--tyro-write-completion", shell, "-"]
        tyro.extras.subcommand_cli_from_dict(dict(commands), prog=prog, args=arguments)
    result = text.getvalue()
    for before, after in changes:
        result = result.replace(before, after)
    return result
