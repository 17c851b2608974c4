"""Tab completion: the scripts of tyro for shells, changed so that they also complete the names of files."""

import contextlib
import io
from collections.abc import Callable, Mapping
from typing import Any

import tyro

FILES = "__TYRO_COMPLETE_FILES__"
"""The word by which tyro's scripts ask for names of files. tyro uses it for options, not for positional arguments."""
REGISTERED = """\
  # Evaluated, as in ~/.zshrc, rather than called for a completion.
  if (( ! ${+compstate} )); then
    (( ${+functions[compdef]} )) || { autoload -Uz compinit && compinit }
    compdef $0 ${0#_tyro_}
    return
  fi
  local python_cmd
"""
"""The new beginning of the function in tyro's script for zsh. Without it, the script works only as a file on fpath."""
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
"""For each shell, the texts that are replaced in tyro's script, with their replacements."""


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
