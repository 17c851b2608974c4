"""Help texts, the version, names of commands and tab completion: what a user meets before anything runs."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import pytest
import tyro

import omnicodec_jax
from omnicodec_jax import cli, compilation_cache, machine
from omnicodec_jax.cli import arguments, command, completion, converters
from omnicodec_jax.cli.options import model_name
from omnicodec_jax.config import Config
from omnicodec_jax.config import files as config_files
from omnicodec_jax.errors import ConfigError, UsageError

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    path
    for folder in ("", "convert", "benchmarks")
    for path in (ROOT / folder).glob("**/*.py" if folder else "*.py")
    if re.search(r"^if __name__ == .__main__.:.*(run|main)\(", path.read_text(), re.DOTALL | re.MULTILINE)
)
"""What is a command by itself."""
WITH_CONFIG = [name for name, found in cli.COMMANDS.items() if isinstance(found, arguments.WithConfig)]
NEEDS = ("torch", "transformers")
"""What some benchmarks and converters import at once."""
CONFIG_FILE = re.compile(r"configs/\w+\.py")
COMMANDS = re.compile(r"(python )?(train|eval)\.py")


def printed(monkeypatch, capsys, call, *words: str) -> str:
    """What a command prints before it exits with 0, on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", list(words))
    # They change more than this test.
    for module, name in (
        (command, "log_progress"),
        (machine, "keep_compilers_quiet"),
        (machine, "keep_freed_memory"),
        (machine, "collect_garbage_less_often"),
    ):
        monkeypatch.setattr(module, name, lambda: None)
    monkeypatch.setattr(compilation_cache, "use", lambda: None)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as stopped:
        call()
    assert stopped.value.code in (0, None)
    return capsys.readouterr().out


def help_of(monkeypatch, capsys, path: Path, option: str) -> str:
    for name in NEEDS:
        if f"import {name}" in path.read_text() and find_spec(name) is None:
            pytest.skip(f"{path.name} needs {name}")
    return printed(monkeypatch, capsys, lambda: runpy.run_path(str(path), run_name="__main__"), str(path), option)


def check(text: str) -> None:
    """A help text is for those who have not read the source."""
    assert text.startswith("usage: ")
    assert "{None}" not in text
    assert "spec §" not in text
    words = COMMANDS.sub("", CONFIG_FILE.sub("", text))
    assert not re.findall(r"\S*\.py\b", words)
    usage, *lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    assert "…" not in usage


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_of_a_script_does_not_speak_of_source_files(path, monkeypatch, capsys):
    check(help_of(monkeypatch, capsys, path, "--help"))


@pytest.mark.parametrize("name", WITH_CONFIG)
def test_help_of_all_options_does_not_speak_of_source_files(name, monkeypatch, capsys):
    check(printed(monkeypatch, capsys, cli.main, "omnicodec", name, "--help-all"))


def test_the_help_of_all_options_breaks_lines_where_they_are_full(monkeypatch, capsys):
    """Texts of fields are wrapped in the source, at other widths than that of a terminal."""
    text = printed(monkeypatch, capsys, cli.main, "omnicodec", "train", "--config", "demo", "--help-all")
    about = text.partition("--train.remat")[2].partition("(default")[0]
    lines = [line.strip("│ ") for line in about.splitlines()[1:-1]]
    words = [line.split()[0] for line in lines[1:]]
    assert len(lines) > 2
    assert all(len(line) + 1 + len(word) > 70 for line, word in zip(lines, words, strict=False))


@pytest.mark.parametrize("name", ["", *cli.COMMANDS, *(f"convert {name}" for name in converters.COMMANDS)])
def test_help_of_omnicodec_does_not_speak_of_source_files(name, monkeypatch, capsys):
    check(printed(monkeypatch, capsys, cli.main, "omnicodec", *name.split(), "--help"))


def test_eval_names_every_metric_in_its_help(monkeypatch, capsys):
    from omnicodec_jax.evaluation.scores import METRICS

    text = help_of(monkeypatch, capsys, ROOT / "eval.py", "--help")
    assert [name for name in METRICS if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize("name", WITH_CONFIG)
def test_the_short_help_names_existing_options_and_where_the_others_are(name, monkeypatch, capsys):
    words = ("omnicodec", name)
    short, whole = (printed(monkeypatch, capsys, cli.main, *words, option) for option in ("--help", "--help-all"))
    assert len(short.splitlines()) < 60
    assert "--help-all" in short
    options = [set(re.findall(r"^\W*(--\w[\w.-]*)", text, re.MULTILINE)) for text in (short, whole)]
    assert len(options[0]) <= 14
    assert options[0] < options[1]


def test_the_short_help_of_training_shows_what_the_config_says(monkeypatch, capsys):
    words = ("train.py", "--config", "demo", "--help")
    text = printed(monkeypatch, capsys, lambda: runpy.run_path("train.py", run_name="__main__"), *words)
    config = config_files.load("demo")
    group = text.partition("most-used options")[2]
    assert group.count("(default: ") == 10
    assert f"(default: {config.optimizer.total_steps})" in group


def test_training_takes_what_only_the_long_help_names(monkeypatch):
    taken = {}

    def train(*, config: str, workdir: Path, settings: Config):
        taken.update(workdir=workdir, settings=settings)

    options = "train --config demo --workdir w --codec.input-peak None --run.wavlm x"
    commands = {"train": arguments.WithConfig(train, {Config: {"run.wavlm": "WavLM."}})}
    call = arguments.parse(commands, "omnicodec", options.split())
    assert not taken  # nothing runs while arguments are read
    call()
    assert (taken["settings"].codec.input_peak, taken["settings"].run.wavlm) == (None, "x")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("encod", "did you mean encode?"),
        ("tok", "did you mean tokenize?"),
        ("exports", "did you mean export or export-model?"),
        ("xyz", "there are clips, prepare, train, goodput, export-model"),
    ],
)
def test_a_mistyped_command_names_the_one_that_was_meant(word, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["omnicodec", word, "a.wav"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: omnicodec {word}: no such command; ")
    assert message in line


@pytest.mark.parametrize("words", [["encode", "", "out"], ["encode", "clips", ""], ["inspect", ""]])
def test_an_empty_path_is_no_path(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["omnicodec", *words])  # $UNSET of a shell, and not the current directory
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "an empty path" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--model is empty"):
        model_name("")


def test_a_mistyped_option_is_looked_for_in_its_own_command_only(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["omnicodec", "encode", "--modle", "x"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert "--model DIR" in errors
    assert "decode --help" not in errors


def test_the_package_runs_as_a_module_and_says_its_version():
    words = [sys.executable, "-X", "importtime", "-m", "omnicodec_jax", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.startswith(f"omnicodec {omnicodec_jax.__version__}, jax ")
    assert " jax\n" not in done.stderr  # which takes seconds to import


def test_an_unknown_shell_is_refused_with_those_there_are():
    for words in (["ksh"], [], ["bash", "zsh"]):
        with pytest.raises(UsageError, match="name your shell: bash, zsh, fish"):
            arguments.parse(cli.COMMANDS, "omnicodec", ["--completion", *words])


def test_commands_of_a_group_are_completed_by_the_script_of_the_program(monkeypatch, capsys):
    text = printed(monkeypatch, capsys, cli.main, "omnicodec", "convert", "--help")
    assert 'eval "$(omnicodec --completion bash)"' in text
    with pytest.raises(UsageError, match="convert --completion: `omnicodec --completion SHELL` completes these"):
        arguments.parse(cli.COMMANDS, "omnicodec", ["convert", "--completion", "bash"])


COMPLETIONS = [
    ("enc", "encode"),
    ("encode --mo", "--model"),
    ("export --what encoder-", "encoder-from-audio"),
    ("tokenize --runner r", "ray"),
    ("convert from", "from-torch"),
    ("convert semantic-features --prep", "--prepared"),
]
"""What is typed, and what the tab key makes of it."""


@pytest.mark.parametrize("shell", completion.CHANGES)
def test_tab_completion_knows_every_command_and_completes_files_too(shell):
    script = completion.script(arguments.as_functions(cli.COMMANDS), "omnicodec", shell)
    assert all(f"'{name}'" in script for name in (*cli.COMMANDS, *converters.COMMANDS))
    for before, after in completion.CHANGES[shell]:
        assert after in script, f"tyro's script has no {before!r} any more"


@pytest.mark.parametrize(("words", "expected"), COMPLETIONS)
def test_tab_completion_in_bash(words, expected, tmp_path):
    if shutil.which("bash") is None or shutil.which("python3") is None:
        pytest.skip("needs bash, and python3 on the path")
    (tmp_path / "script").write_text(completion.script(arguments.as_functions(cli.COMMANDS), "omnicodec", "bash"))
    asked = f"COMP_WORDS=(omnicodec {words}); COMP_CWORD={len(words.split())}; _tyro_omnicodec"
    program = f'source "{tmp_path}/script"; {asked}; printf "%s\\n" "${{COMPREPLY[@]}}"; complete -p omnicodec'
    done = subprocess.run(["bash", "-euc", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [expected, "complete -o default -o filenames -F _tyro_omnicodec omnicodec"]


def test_tab_completion_in_zsh_is_there_after_evaluating_the_script(tmp_path):
    if shutil.which("zsh") is None:
        pytest.skip("needs zsh")
    (tmp_path / "script").write_text(completion.script(arguments.as_functions(cli.COMMANDS), "omnicodec", "zsh"))
    for begun in ("autoload -Uz compinit; compinit -u -D;", ""):
        program = f'{begun} eval "$(cat {tmp_path}/script)"; print $_comps[omnicodec]'
        options = {"capture_output": True, "text": True, "check": True, "env": os.environ | {"HOME": str(tmp_path)}}
        done = subprocess.run(["zsh", "-fc", program], **options)
        assert (done.stdout, done.stderr) == ("_tyro_omnicodec\n", "")


@pytest.mark.parametrize(("words", "expected"), COMPLETIONS)
def test_tab_completion_in_fish(words, expected, tmp_path):
    if shutil.which("fish") is None or shutil.which("python3") is None:
        pytest.skip("needs fish, and python3 on the path")
    (tmp_path / "script").write_text(completion.script(arguments.as_functions(cli.COMMANDS), "omnicodec", "fish"))
    program = f'eval "$(cat {tmp_path}/script)"; complete -C "omnicodec {words}"'
    options = {"capture_output": True, "text": True, "check": True, "env": os.environ | {"HOME": str(tmp_path)}}
    done = subprocess.run(["fish", "--no-config", "-c", program], **options, cwd=tmp_path)
    assert [line.split("\t")[0] for line in done.stdout.splitlines() if line != "script"] == [expected]


@pytest.mark.parametrize(
    ("words", "taken"),
    [
        (["--", "-x.wav"], ["./-x.wav"]),
        (["a.wav", "--", "-x.wav", "--suffix"], ["a.wav", "./-x.wav", "./--suffix"]),
        (["--suffix", ".b", "--", "a.wav", "-", "--"], ["a.wav", "-", "./--"]),
    ],
)
def test_two_dashes_end_the_options(words, taken):
    def command(paths: Annotated[list[str], tyro.conf.Positional], /, suffix: str = ".a") -> None:
        found.append(paths)

    found: list[list[str]] = []
    arguments.parse({"try": command}, "omnicodec", ["try", *words])()
    assert found == [taken]
