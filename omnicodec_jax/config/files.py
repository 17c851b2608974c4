"""Configs as files: JSON beside weights, and Python files, recipes among them. All are checked to the last field."""

import argparse
import dataclasses
import difflib
import json
import os
import runpy
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar

from omnicodec_jax.buckets import as_path, on_disk
from omnicodec_jax.config import CodecConfig, Config, MimiConfig
from omnicodec_jax.config.identity import default_of
from omnicodec_jax.errors import ConfigError
from omnicodec_jax.version import UPGRADE, __version__

T = TypeVar("T")

RECIPES = Path(__file__).parents[1] / "recipes"
"""Configs that come with the package."""
FORMAT = 1
"""Version of the format of these files. It grows when files change so that earlier versions would misread them. A new
option with a default is no such change. Version 0.1 wrote no format."""
MADE_BY = f"omnicodec_jax {__version__}"
RUN = "run"
"""The model type of the config of a training run."""
LEARNS = {"codec": "a codec (omnicodec train)", "model": "to predict tokens (omnicodec perplexity)"}
"""The kinds of run, each by a field that only the config of such a run has."""
CODECS = {"omnicodec": CodecConfig, "mimi": MimiConfig}
"""The codecs that a run can train, by the model type in the codec of its config. A codec without one is the first."""


def to_dict(config: Any, model_type: str) -> dict[str, Any]:
    """Returns what a file holds of a config: its kind, the format, the version that wrote it, and every field."""
    values = dataclasses.asdict(config)
    if isinstance(config, Config) and not isinstance(config.codec, CodecConfig):
        kind = next(name for name, codec in CODECS.items() if codec is type(config.codec))
        values["codec"] = {"model_type": kind, **values["codec"]}
    return {"model_type": model_type, "format": FORMAT, "made_by": MADE_BY, **values}


def to_json(config: Any, model_type: str) -> str:
    """Returns the text of a model directory's config.json."""
    return json.dumps(to_dict(config, model_type), indent=2) + "\n"


def from_json(text: str, types: Mapping[str, type], where: str = "config.json") -> Any:
    """Reads what `to_json` has written. Raises ConfigError as `from_dict` does, and for what is not JSON."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None
    return from_dict(values, types, where)


def from_dict(values: Any, types: Mapping[str, type], where: str) -> Any:
    """Reads what `to_dict` has made, in this version or an earlier one.

    Args:
        values: Parsed JSON. Fields that are absent take their defaults: options have been added since it was written.
        types: The dataclass of each model type.
        where: The file, for messages.

    Returns:
        The config, of the class that `types` has for the file's model type.

    Raises:
        ConfigError: If the format is of a later version, a name is unknown, a field without a default is absent, or a
            value is of the wrong type or out of range.
    """
    values = dict(values) if isinstance(values, dict) else {}
    kind, format, made_by = (values.pop(name, None) for name in ("model_type", "format", "made_by"))
    if problem := format_problem(1 if format is None else format, FORMAT, made_by):
        raise ConfigError(f"{where}: {problem}")
    if not isinstance(kind, str) or kind not in types:
        raise ConfigError(f"{where}: model_type = {kind!r}: must be one of {', '.join(types)}")
    return _build(types[kind], values, where)


def format_problem(format: Any, newest: int, made_by: Any) -> str | None:
    """Returns why a file of a format cannot be read, and what to do; None if it can be.

    Args:
        format: The number that the file gives as its format.
        newest: The newest format of this kind of file that this version reads.
        made_by: What has written the file, if it says so.
    """
    if type(format) is not int or format < 1:
        return f"format = {format!r}: must be a whole number, 1 or more"
    if format <= newest:
        return None
    return (
        f"in format {format}, written by {made_by or 'a later version'}; this is {MADE_BY}, which reads formats up to "
        f"{newest}: {UPGRADE}"
    )


def unknown_field(values: Any, known: Iterable[str]) -> str | None:
    """Returns what to do about a JSON object of this package with a field that is not known; None: it has none."""
    unknown = sorted(values.keys() - set(known)) if isinstance(values, dict) else []
    return f"unknown field {unknown[0]!r}: a later version has written it; {UPGRADE}" if unknown else None


def from_fields(cls: type[T], values: Any, where: str) -> T:
    """Makes a dataclass of what a file holds that a command has written, in this version or an earlier one.

    Fields that are absent take their defaults. Raises ConfigError as `from_dict` does; nobody writes such a file, so
    that an unknown name is one of a later version.
    """
    if problem := unknown_field(values, typing.get_type_hints(cls)):
        raise ConfigError(f"{where}: {problem}")
    return _build(cls, values, where)


def run_config(values: Mapping[str, Any], where: str, kind: type[T] = Config) -> T:
    """Reads the config, of that kind, which a run's checkpoint carries. Raises ConfigError as `from_dict` does."""
    known = typing.get_type_hints(kind)
    if others := [learns for field, learns in LEARNS.items() if field in values and field not in known]:
        raise ConfigError(f"{where}: of a run that learns {others[0]}")
    return from_dict({"model_type": RUN, **values}, {RUN: kind}, where)  # version 0.1 wrote no model type


def _build(cls: type[T], values: Any, where: str, usual: Any = None) -> T:
    """Makes a dataclass of parsed JSON: no name unknown, each value of its field's type.

    Fields that are absent are as in `usual`, the owner's default for it, or else have the defaults of the class.
    """
    hints = typing.get_type_hints(cls)
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: {values!r}: must be an object with the fields of {cls.__name__}")
    for name in values:
        if name not in hints:
            close = difflib.get_close_matches(name, hints, n=1)
            raise ConfigError(f"{where}: unknown field {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    fields = dataclasses.fields(typing.cast(Any, cls))
    made = {f.name: getattr(usual, f.name) if type(usual) is cls else default_of(f) for f in fields}
    if missing := [name for name, value in made.items() if value is dataclasses.MISSING and name not in values]:
        raise ConfigError(f"{where}: missing field(s) {', '.join(missing)}")
    try:
        for name, value in values.items():
            made[name] = convert(hints[name], value, f"{where}: {name}", made[name])
        return cls(**made)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if not str(error).startswith(where) else str(error)) from None


def convert(hint: Any, value: Any, where: str, usual: Any = None) -> Any:
    """Makes the value of a field of parsed JSON or YAML. Raises ConfigError that names `where` for another type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where, usual)
    if origin is UnionType and NoneType in arguments:
        (inner,) = (a for a in arguments if a is not NoneType)
        return None if value is None else convert(inner, value, where, usual)
    if origin is UnionType and isinstance(value, dict):  # of several codecs
        kind = value.get("model_type", next(iter(CODECS)))
        if kind not in CODECS:
            raise ConfigError(f"{where}: model_type = {kind!r}: must be one of {', '.join(CODECS)}")
        return _build(CODECS[kind], {name: item for name, item in value.items() if name != "model_type"}, where, usual)
    if origin is tuple and isinstance(value, list | tuple):
        if ... not in arguments and len(value) != len(arguments):
            raise ConfigError(f"{where} = {value!r}: must be {len(arguments)} values")
        return tuple(convert(arguments[0], item, where) for item in value)
    if origin is Literal and value in arguments:
        return value
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (int, bool, str) and type(value) is hint:
        return value
    raise ConfigError(f"{where} = {value!r}: must be {getattr(hint, '__name__', hint)}")


def named_by(arguments: Sequence[str], kinds: tuple[type, ...]) -> Any:
    """Returns the config that a command line names with --config: the default of its other options.

    A command line without one gets the first kind as it is, for its help; that --config is missing is for its parser
    to say. Raises ConfigError for a config of none of these kinds.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    name = parser.parse_known_args(arguments)[0].config
    return kinds[0]() if name is None else load_as(kinds, name)


def load(name: str | os.PathLike[str]) -> Config:
    """Loads the experiment in a Python file, or one of the recipes by its name, such as "released_12hz".

    Raises ConfigError with the file's name.
    """
    return load_as((Config,), name)


def load_as(kinds: tuple[type[T], ...], name: str | os.PathLike[str]) -> T:
    """Loads the `config` of a Python file or of a recipe, which must be of one of these kinds.

    Raises ConfigError with the file's name.
    """
    path = find(name, kinds)
    try:
        with on_disk(path) as here:
            config: Any = runpy.run_path(str(here)).get("config")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except Exception as error:  # a config is a program, and may fail like one
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from None
    if not isinstance(config, kinds):
        wanted = " or ".join(f"omnicodec_jax.config.{kind.__name__}" for kind in kinds)
        other = "" if config is None else f", but one of type {type(config).__name__}"
        raise ConfigError(f"{path}: defines no `config` of type {wanted}{other}; recipes that do: {_listed(kinds)}")
    kind = type(config)
    return from_json(to_json(config, kind.__name__), {kind.__name__: kind}, str(path))  # checks every type


def recipes(kinds: tuple[type, ...]) -> list[str]:
    """Returns the names of the recipes whose config is of one of these kinds."""
    files = sorted(RECIPES.rglob("[!_]*.py"))
    own = [file for file in files if isinstance(runpy.run_path(str(file)).get("config"), kinds)]
    return [str(file.relative_to(RECIPES).with_suffix("")) for file in own]


def _listed(kinds: tuple[type, ...]) -> str:
    return ", ".join(recipes(kinds))


def find(name: str | os.PathLike[str], kinds: tuple[type, ...]) -> Path:
    """Finds the file of a config: the file of that path, or that of a recipe. Raises ConfigError where there is
    neither, with the recipes of these kinds."""
    path, recipe = as_path(name), RECIPES / f"{name}.py"
    if path.is_file():
        return path
    if recipe.is_file() and recipe.resolve().is_relative_to(RECIPES):
        return recipe
    known = recipes(kinds)
    close = difflib.get_close_matches(str(name).lower().removesuffix(".py"), known, n=2)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
    raise ConfigError(f"{path}: no such config file, nor a recipe; {hint}")
