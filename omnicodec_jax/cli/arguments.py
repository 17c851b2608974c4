"""Reads command lines with tyro: options come from the signatures of functions and the dataclasses of a config."""

import dataclasses
import difflib
import functools
import importlib
import inspect
import platform
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructTypeInfo,
    UnsupportedTypeAnnotationError,
)

from omnicodec_jax.buckets import as_path
from omnicodec_jax.cli import completion
from omnicodec_jax.config import files as config_files
from omnicodec_jax.errors import UsageError
from omnicodec_jax.version import __version__

Command = Callable[..., int | None]
Call = Callable[[], int | None]


class WithConfig(NamedTuple):
    """A command that has its own options and an option for every field of the config that --config names."""

    function: Command
    """The function of the command. Its last parameter is `settings`, the config."""
    most_used: Mapping[type, Mapping[str, str]]
    """The fields that the short help shows, for each dataclass that the config can be: a sentence for each dotted name,
    such as "data.batch_size"."""


class Group(NamedTuple):
    """A command that has commands of its own, in a module that is imported when one of them is called."""

    module: str
    """The name of the module, which has the commands in its `COMMANDS`."""
    about: str
    """A sentence that says what the commands do."""

    @property
    def commands(self) -> "Commands":
        """The functions of the commands by name."""
        commands: Commands = importlib.import_module(self.module).COMMANDS
        return commands


Commands = Mapping[str, Command | WithConfig | Group]


HELP, HELP_ALL, VERSION, COMPLETION = ("-h", "--help"), "--help-all", "--version", "--completion"

_REGISTRY = ConstructorRegistry()


@_REGISTRY.primitive_rule
def _path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Makes tyro take URLs of buckets wherever a path is asked for."""
    if info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda texts: _path_of(texts[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )


def _path_of(text: str) -> Path:
    """Returns the path that a word names. Raises UsageError for an empty word, which would be the current directory."""
    if not text:
        raise UsageError("an empty path: is a variable of the shell not set?")
    return as_path(text)


@_REGISTRY.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | UnsupportedTypeAnnotationError | None:
    """Makes tyro show `PATH` in place of `{None}|PATH` for a value that may be None. None can still be given."""
    options = typing.get_args(info.type) if info.type_origin in (typing.Union, UnionType) else ()
    if NoneType not in options:
        return None
    others = tuple(option for option in options if option is not NoneType)
    rest: Any = typing.Union[others]  # noqa: UP007
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(rest, info.markers))
    if isinstance(spec, UnsupportedTypeAnnotationError):
        return spec
    return dataclasses.replace(
        spec,
        instance_from_str=lambda texts: None if texts == ["None"] else spec.instance_from_str(texts),
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else spec.str_from_instance(value),
        choices=None if spec.choices is None else (*spec.choices, "None"),
    )


_JOINED = object()
"""A marker of classes whose texts `_joined` is asked for already."""


@_REGISTRY.struct_rule
def _joined(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Makes tyro join the lines of the text of a field, which it breaks where the source does."""
    if not dataclasses.is_dataclass(info.type) or _JOINED in info.markers:
        return None
    spec = ConstructorRegistry.get_struct_spec(dataclasses.replace(info, markers=(*info.markers, _JOINED)))
    if not isinstance(spec, StructConstructorSpec):
        return None  # tyro finds the same again, and reports it
    fields = [dataclasses.replace(each, helptext=functools.partial(_one_line, each.helptext)) for each in spec.fields]
    return dataclasses.replace(spec, fields=tuple(fields))


def _one_line(text: str | Callable[[], str | None] | None) -> str | None:
    """Returns the text of a field, or what the function that finds it returns, without line breaks."""
    found = text() if callable(text) else text
    return found and " ".join(found.split())


def parse(commands: Commands, prog: str, words: Sequence[str], given: int = 0) -> Call:
    """Returns the call that a command line describes. The call itself is left to the caller.

    The process ends with exit code 2 and a message for wrong options, and with 0 after printing help, the version or a
    completion script.

    Args:
        commands: The functions by name.
        prog: The name of the program in its help.
        words: The command line: names of commands, then options.
        given: How many of the first words are part of `prog` already.

    Raises:
        UsageError: For a command that does not exist.
    """
    if not words or words[0].startswith("-"):
        return _about(commands, prog, words)
    name, *rest = words[0].replace("_", "-"), *words[1:]
    if name not in commands:
        close = [known for known in commands if known.startswith(name)]
        close = close or difflib.get_close_matches(name, commands, n=2)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(commands)}"
        raise UsageError(f"{prog} {words[0]}: no such command; {hint}")
    found, prog = commands[name], prog if given else f"{prog} {name}"
    if isinstance(found, Group):
        return parse(found.commands, prog, rest, max(0, given - 1))
    return _parse_with_config(found, prog, rest) if isinstance(found, WithConfig) else parse_one(found, prog, rest)


def parse_one(command: Command, prog: str | None, words: Sequence[str]) -> Call:
    """Returns the call of one function with the options of a command line. The process can end as in `parse`."""
    config = (tyro.conf.PositionalMetavarFromFieldName,)
    return tyro.cli(_deferred(command), prog=prog, args=_without_end(words), registry=_REGISTRY, config=config)


def _without_end(words: Sequence[str]) -> list[str]:
    """Returns a command line without `--`, the end of its options. Paths after it that begin with "-" get "./" before
    them, which names the same file, since tyro takes all such words for options."""
    options, rest = list(words), []
    if "--" in options:
        end = options.index("--")
        options, rest = options[:end], options[end + 1 :]
    return [*options, *(f"./{word}" if word.startswith("-") and word != "-" else word for word in rest)]


def _about(commands: Commands, prog: str, words: Sequence[str]) -> Call:
    """Prints the list of commands, the version or a completion script, and ends the process."""
    if list(words) == [VERSION]:
        print(f"{prog} {__version__}, jax {metadata.version('jax')}, Python {platform.python_version()}")
        sys.exit()
    program = prog.partition(" ")[0]
    if words[:1] == [COMPLETION]:
        if program != prog:
            raise UsageError(f"{prog} {COMPLETION}: `{program} {COMPLETION} SHELL` completes these commands, too")
        if len(words) != 2 or words[1] not in completion.CHANGES:
            raise UsageError(f"{prog} {COMPLETION}: name your shell: {', '.join(completion.CHANGES)}")
        print(completion.script(as_functions(commands), prog, words[1]))
        sys.exit()
    return tyro.extras.subcommand_cli_from_dict(
        {name: _deferred(command) for name, command in as_functions(commands).items()},
        prog=prog,
        args=words or [HELP[1]],
        description=f"`{prog} COMMAND --help` explains a command, `{prog} {VERSION}` names the release.\n\n"
        f'Tab completion: eval "$({program} {COMPLETION} bash)" in ~/.bashrc, or zsh or fish in theirs.',
        registry=_REGISTRY,
        config=(tyro.conf.PositionalMetavarFromFieldName,),
    )


def as_functions(commands: Commands) -> dict[str, Command]:
    """Returns the functions of a table of commands. A group becomes a function that takes one of its commands."""
    functions = {}
    for name, found in commands.items():
        if isinstance(found, Group):
            found = _standing_for(found)
        elif isinstance(found, WithConfig):
            found = _with_settings(found, next(iter(found.most_used))())
        functions[name] = found
    return functions


def _standing_for(group: Group) -> Command:
    """Returns a function that stands for a group in lists of commands, and whose only argument is one of its own."""

    def choose(command: Any) -> None:
        raise UsageError(group.about)

    own: Any = [
        Annotated[Any, tyro.conf.subcommand(name=name, constructor=function)]
        for name, function in as_functions(group.commands).items()
    ]
    choose.__annotations__["command"] = Annotated[typing.Union[tuple(own)], tyro.conf.arg(name="")]  # noqa: UP007
    choose.__doc__ = group.about
    return choose


def _parse_with_config(command: WithConfig, prog: str, words: Sequence[str]) -> Call:
    """Returns the call of a command with a config.

    `--help` shows its own options and the most used options of the config, `--help-all` shows all of them.
    """
    config = config_files.named_by(words, tuple(command.most_used))
    function = _with_settings(command, config)
    if HELP_ALL in words:
        words = [HELP[1]]
    elif not set(HELP).isdisjoint(words):
        tyro.cli(
            _with_few_options(function, command.most_used[type(config)]), prog=prog, args=[HELP[1]], registry=_REGISTRY
        )
    return parse_one(function, prog, words)


def _with_settings(command: WithConfig, config: Any) -> Command:
    """Returns the function of a command with a config as the default of its last parameter, `settings`."""
    signature = inspect.signature(command.function)
    *own, settings = signature.parameters.values()
    annotation = Annotated[type(config), tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands]

    @functools.wraps(command.function)
    def call(*arguments: Any, **options: Any) -> int | None:
        return command.function(*arguments, **options)

    call.__signature__ = signature.replace(  # pyright: ignore[reportAttributeAccessIssue]
        parameters=[*own, settings.replace(default=config, annotation=annotation)]
    )
    call.__annotations__ = {**call.__annotations__, "settings": annotation}
    del call.__wrapped__  # tyro would look there for annotations
    return call


def _deferred(command: Command) -> Callable[..., Call]:
    """Returns a function with the same arguments that returns a call, so that nothing runs while they are parsed."""

    @functools.wraps(command)
    def bind(*arguments: Any, **options: Any) -> Call:
        return functools.partial(command, *arguments, **options)

    bind.__signature__ = inspect.signature(command)  # pyright: ignore[reportAttributeAccessIssue]
    # tyro keeps the line breaks in the text of an argument, so they are removed. tyro would read the text of
    # `__wrapped__`, which still has them.
    bind.__doc__ = re.sub(r"\n {8,}", " ", inspect.cleandoc(command.__doc__ or ""))
    del bind.__wrapped__
    return bind


def _with_few_options(command: Command, most_used: Mapping[str, str]) -> type:
    """Returns a class with the options of a function and some options of its config, for tyro to show in the help."""
    *own, settings = inspect.signature(command).parameters.values()
    few = dataclasses.make_dataclass(
        "MostUsed", [_field(settings.default, *each) for each in most_used.items()], frozen=True
    )
    few.__doc__ = f"They replace what the config says. {HELP_ALL} shows all of its options."
    fields = [
        (each.name, each.annotation)
        if each.default is each.empty
        else (each.name, each.annotation, dataclasses.field(default=each.default))
        for each in own
    ]
    shown = dataclasses.make_dataclass("Shown", [*fields, ("most_used", few, few())], kw_only=True)
    shown.__doc__ = command.__doc__
    return shown


def _field(config: Any, path: str, help: str) -> tuple[str, Any, Any]:
    """Returns a field for `dataclasses.make_dataclass` that stands for a field of a nested config."""
    *sections, name = path.split(".")
    section = functools.reduce(getattr, sections, config)
    option = tyro.conf.arg(name=path.replace("_", "-"), prefix_name=False, help=help)
    kind = typing.get_type_hints(type(section))[name]
    return path.replace(".", "_"), Annotated[kind, option], dataclasses.field(default=getattr(section, name))
