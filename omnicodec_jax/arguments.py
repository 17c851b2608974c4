"""Command lines, read by tyro: options come from the signatures of functions and from the dataclasses of a config."""

import dataclasses
import difflib
import functools
import inspect
import platform
import re
import sys
import typing
from collections.abc import Callable, Mapping
from importlib import metadata
from types import NoneType, UnionType
from typing import Annotated, Any

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    UnsupportedTypeAnnotationError,
)

import omnicodec_jax
from omnicodec_jax import completion
from omnicodec_jax.errors import UsageError

Command = Callable[..., int | None]
Call = Callable[[], int | None]

HELP, HELP_ALL, VERSION, COMPLETION = ("-h", "--help"), "--help-all", "--version", "--completion"

_REGISTRY = ConstructorRegistry()


@_REGISTRY.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | UnsupportedTypeAnnotationError | None:
    """What may be None is shown as what else it may be: `PATH` in place of `{None}|PATH`. None can still be given."""
    options = typing.get_args(info.type) if info.type_origin in (typing.Union, UnionType) else ()
    if NoneType not in options:
        return None
    rest: Any = typing.Union[tuple(option for option in options if option is not NoneType)]  # noqa: UP007
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


def parse(command: Command, prog: str | None) -> Call:
    """Returns the call of a function that sys.argv asks for, still to be made.

    Exits with 2 and a message for a wrong command line, and with 0 after printing help.
    """
    return _parse(command, prog, sys.argv[1:])


def parse_subcommand(commands: Mapping[str, Command], prog: str) -> Call:
    """Returns the call of one of several functions, which the first argument names.

    Raises UsageError for another name. Exits as `parse` does, and after printing the version or a completion script.
    """
    arguments = sys.argv[1:]
    if arguments == [VERSION]:
        print(f"{prog} {omnicodec_jax.__version__}, jax {metadata.version('jax')}, Python {platform.python_version()}")
        sys.exit()
    if arguments[:1] == [COMPLETION]:
        if len(arguments) != 2 or arguments[1] not in completion.CHANGES:
            raise UsageError(f"{prog} {COMPLETION}: name your shell: {', '.join(completion.CHANGES)}")
        print(completion.script(commands, prog, arguments[1]))
        sys.exit()
    if not arguments or arguments[0].startswith("-"):
        return tyro.extras.subcommand_cli_from_dict(
            {name: _deferred(command) for name, command in commands.items()},
            prog=prog,
            args=arguments or [HELP[1]],
            description=f"`{prog} COMMAND --help` explains a command, `{prog} {VERSION}` names the release.\n\n"
            f'Tab completion: eval "$({prog} {COMPLETION} bash)" in ~/.bashrc, or zsh or fish in theirs.',
            registry=_REGISTRY,
            config=(tyro.conf.PositionalMetavarFromFieldName,),
        )
    name = arguments[0].replace("_", "-")
    if name not in commands:
        close = [known for known in commands if known.startswith(name)]
        close = close or difflib.get_close_matches(name, commands, n=2)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(commands)}"
        raise UsageError(f"{prog} {arguments[0]}: no such command; {hint}")
    return _parse(commands[name], f"{prog} {name}", arguments[1:])


def parse_with_config(command: Command, prog: str, most_used: Mapping[str, str]) -> Call:
    """The same as `parse` for a function whose last parameter, `settings`, is a config of more options than one reads.

    `--help` shows the function's own options and the most used ones of the config, `--help-all` shows all of them.

    Args:
        command: The function. The default of `settings` is the config that options change.
        prog: How it is called.
        most_used: Dotted names of fields, such as "data.batch_size", each with a sentence of what it is.
    """
    arguments = sys.argv[1:]
    if HELP_ALL in arguments:
        arguments = [HELP[1]]
    elif not set(HELP).isdisjoint(arguments):
        tyro.cli(_with_few_options(command, most_used), prog=prog, args=[HELP[1]], registry=_REGISTRY)
    return _parse(command, prog, arguments)


def _parse(command: Command, prog: str | None, arguments: list[str]) -> Call:
    config = (tyro.conf.PositionalMetavarFromFieldName,)
    return tyro.cli(_deferred(command), prog=prog, args=arguments, registry=_REGISTRY, config=config)


def _deferred(command: Command) -> Callable[..., Call]:
    """A function of the same arguments that returns the call, so that nothing runs while arguments are read."""

    @functools.wraps(command)
    def bind(*arguments: Any, **options: Any) -> Call:
        return functools.partial(command, *arguments, **options)

    bind.__signature__ = inspect.signature(command)  # pyright: ignore[reportAttributeAccessIssue]
    # tyro keeps the line breaks of an argument's text. It would look at what is wrapped, which has them.
    bind.__doc__ = re.sub(r"\n {8,}", " ", inspect.cleandoc(command.__doc__ or ""))
    del bind.__wrapped__
    return bind


def _with_few_options(command: Command, most_used: Mapping[str, str]) -> type:
    """What has a function's own options and some of those of its config: to be shown, not to be called."""
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
    """A field for `dataclasses.make_dataclass` that stands for the option of a field of a nested config."""
    *sections, name = path.split(".")
    section = functools.reduce(getattr, sections, config)
    option = tyro.conf.arg(name=path.replace("_", "-"), prefix_name=False, help=help)
    kind = typing.get_type_hints(type(section))[name]
    return path.replace(".", "_"), Annotated[kind, option], dataclasses.field(default=getattr(section, name))
