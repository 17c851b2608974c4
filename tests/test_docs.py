"""Every command and snippet of the README, of docs/ and of public docstrings runs, reduced where it takes long.

A page is read as the site shows it: with the sections of the README that it includes. What no page includes is read as
the README's own. Each page runs in a folder of its own in which a checkout's files lie, a model with random weights,
and what the pages before it have made.
"""

import contextlib
import doctest
import functools
import importlib
import inspect
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import docstring_parser
import huggingface_hub
import pytest
import tyro

from omnicodec_jax import __version__, cli, compilation_cache, shipped
from omnicodec_jax.cli import command
from omnicodec_jax.cli.options import BUNDLED_CLIPS
from omnicodec_jax.distributed import multihost
from omnicodec_jax.tokenizer import OmniCodecTokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # of runpy

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("docs/*.md"))
INCLUDED = re.compile(r'^--8<-- "README.md:(\w+)"$', re.MULTILINE)
SECTION = r"<!-- --8<-- \[start:{0}\] -->\n(.*?)<!-- --8<-- \[end:{0}\] -->\n"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CLIPS = (
    "music_rock_buildup",
    "sound_bell",
    "speech_english_class",
    "speech_english_fricatives",
    "speech_french_patte_pente",
)
"""Enough of the bundled ones to have each domain in training, and something held out."""
MADE = {
    "data/prepared": "omnicodec prepare ",
    "data/tokens": "omnicodec tokenize ",
    "clips_tokens": "omnicodec encode clips clips_tokens",
}
"""What many pages read, and how the command of the README begins that makes it, which is run once."""


# -- What a page says


def section(name: str) -> str:
    found = re.search(SECTION.format(name), (ROOT / "README.md").read_text(), re.DOTALL)
    assert found, f"README.md has no section {name}"
    return found[1]


def shown(page: Path) -> str:
    """A page with what it includes; the README without what pages include."""
    text = page.read_text()
    if page.name == "README.md":
        for name in included():
            text = text.replace(section(name), "")
    return INCLUDED.sub(lambda match: section(match[1]), text)


def included() -> list[str]:
    return [name for page in PAGES for name in INCLUDED.findall(page.read_text())]


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    return ((match[1], match[2]) for match in BLOCK.finditer(shown(page)))


def commands(code: str) -> list[str]:
    lines = code.replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip() and not line.startswith("#")]


# -- How it is run


def runs(*fewer: str) -> Callable[[list[str]], None]:
    """In this process; with options that make it shorter."""

    def run(words: list[str]) -> None:
        program, *arguments = [*words, *fewer]
        if program == "omnicodec":
            begin, arguments = cli.main, [program, *arguments]
        elif arguments[0] == "-m":
            begin, arguments = functools.partial(runpy.run_module, arguments[1], run_name="__main__"), arguments[1:]
        else:
            begin = functools.partial(runpy.run_path, arguments[0], run_name="__main__")
        with mock.patch.object(sys, "argv", arguments), pytest.raises(SystemExit) as end:
            begin()
        assert not end.value.code, f"{shlex.join(words)} ends with {end.value.code}"

    return run


def parsed(words: list[str]) -> None:
    """By the program's own parser: it needs the hub, a pod, or hours."""
    parse, parse_one_of = tyro.cli, tyro.extras.subcommand_cli_from_dict

    def idle(function: Callable[..., object]) -> Callable[..., object]:
        return functools.wraps(function)(lambda *args, **options: sys.exit())

    def cli_of(function: Callable[..., object], **options: object) -> object:
        return parse(idle(function), **options)

    def cli_from(functions: dict[str, Callable[..., object]], **options: object) -> object:
        return parse_one_of({name: idle(function) for name, function in functions.items()}, **options)

    with mock.patch("tyro.cli", cli_of), mock.patch("tyro.extras.subcommand_cli_from_dict", cli_from):
        runs()(words)


def with_pip(words: list[str]) -> None:
    """Extras are those of pyproject.toml, wheels have the name that they get."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        assert set(re.findall(r"\w+", word.partition("[")[2])) <= set(extras), word
        if word.endswith(".whl"):
            assert Path(word).name == f"omnicodec_jax-{__version__}-py3-none-any.whl"


def with_make(words: list[str]) -> None:
    subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)


def with_hf(words: list[str]) -> None:
    """The hub's own command has these options."""
    program = Path(sys.executable).with_name("hf")
    known = subprocess.run([program, words[1], "--help"], check=True, capture_output=True, text=True).stdout
    assert [word for word in words if word.startswith("--") and word not in known] == []


def of_a_host(words: list[str]) -> None:
    """What a host of a cluster is told to run, in one word or in those that follow."""
    told = [part for word in words for part in word.split("&&") if "omnicodec " in part]
    for line in told or [shlex.join(words)]:
        if "omnicodec " in line:
            parsed(shlex.split(line[line.index("omnicodec ") :]))


def elsewhere(words: list[str]) -> None:
    """Nothing of ours, and not to be tried in a test."""


HOW: dict[str, Callable[[list[str]], None]] = {
    "omnicodec": runs(),
    "omnicodec prepare": runs("--num-workers", "1"),
    "omnicodec tokenize": runs("--num-readers", "1"),
    "omnicodec init": parsed,
    "omnicodec export-model": parsed,
    "omnicodec goodput": parsed,
    "omnicodec encode clips clips_tokens --model models/omnicodec": parsed,
    "omnicodec stream-decode bell.safetensors --model models/untrained |": parsed,
    "python ": runs(),
    "omnicodec train": parsed,
    "omnicodec evaluate": runs(
        *("--data", "sound=clips/sound.jsonl", "--codebooks", "4"),
        *("--metrics", "mel_distance", "--num-workers", "1"),
    ),
    "omnicodec evaluate --model models/first --data speech=LibriSpeech": parsed,
    "omnicodec evaluate --model trained=": parsed,
    "omnicodec evaluate --model models/first --peers mimi": parsed,
    "omnicodec evaluate --table": parsed,
    "omnicodec evaluate --data speech=corpus/": parsed,
    "omnicodec convert from-torch --checkpoint omnicodec.safetensors": runs("--config", "half_demo.py"),
    "omnicodec convert to-torch --model models/first/discriminators": parsed,
    "omnicodec convert from-torch --checkpoint discriminators.safetensors": parsed,
    "omnicodec convert from-torch --checkpoint downloads": parsed,
    "omnicodec convert mimi": parsed,
    "omnicodec convert wavlm": parsed,
    "omnicodec convert qwen3-aut": parsed,
    "omnicodec convert whisper": parsed,
    "omnicodec convert semantic-features": parsed,
    "omnicodec plan": parsed,
    "omnicodec perplexity": parsed,
    "omnicodec listening": parsed,
    "omnicodec clips": parsed,
    "python -m benchmarks": parsed,
    "python -m benchmarks.open_corpus": elsewhere,
    "make": with_make,
    "pip": with_pip,
    "hf": with_hf,
    "on ": of_a_host,
    "on()": elsewhere,
    "for host in": of_a_host,
    "sbatch": of_a_host,
    "gcloud": elsewhere,
    "export": elsewhere,
    "python3 -m venv": elsewhere,
    "source .venv/bin/activate": elsewhere,
}
"""By how a command begins; the longest that fits."""

FEWER = {"num_workers=2": "num_workers=0"}
"""In Python: no worker processes, which would import this file."""


def obey(line: str) -> None:
    begins = max((known for known in HOW if f"{line} ".startswith(known)), key=len, default=None)
    assert begins is not None, f"{line!r}: nobody has said in tests/test_docs.py how to try this"
    words = shlex.split(line, comments=True)
    HOW[begins](words[: words.index("|")] if "|" in words else words)


def execute(code: str) -> None:
    for more, fewer in FEWER.items():
        code = code.replace(more, fewer)
    # Not the class: a snippet may be the first to import transformers, whose annotations name it.
    uploads = {"create_repo": mock.DEFAULT, "upload_folder": mock.DEFAULT}
    with mock.patch.multiple(huggingface_hub.HfApi, autospec=True, **uploads):
        exec(compile(code, "a snippet", "exec"), {"__name__": "__main__"})


TRIED: dict[str, Callable[[str], object]] = {
    "bash": lambda code: [obey(line) for line in commands(code) if line not in MAKING],
    "python": execute,
    "json": json.loads,
    "text": lambda code: None,
    "bibtex": lambda code: None,
}
"""By the language that a block names."""


# -- Where


@pytest.fixture(scope="module", autouse=True)
def in_one_process(demo_model: Path):
    """Programs leave the log and the cache of the tests alone, and share one model and what is compiled of it."""
    loaded = OmniCodecTokenizer.from_pretrained(demo_model)

    def load(name: Path | str = "small", *_: object, **__: object) -> OmniCodecTokenizer:
        those = ("models/untrained", "models/first", "small", str(shipped.MODELS["small"]))
        assert str(name) in those, f"{name} is no model that a page has made"
        return loaded

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(command, "log_progress", lambda: None)
        patched.setattr(compilation_cache, "use", lambda: None)
        patched.setattr(OmniCodecTokenizer, "from_pretrained", load)
        patched.setattr(multihost, "initialize", lambda: None)  # JAX has begun
        patched.setattr("os._exit", sys.exit)
        patched.setenv("JAX_PLATFORMS", "cpu")
        yield


def checkout(folder: Path, model: Path) -> Path:
    """A folder that looks as a checkout does, with a model and fewer clips."""
    for name in ("benchmarks",):
        (folder / name).symlink_to(ROOT / name)
    (folder / "half_demo.py").write_text(
        "from omnicodec_jax import model_directory\nfrom omnicodec_jax.config import Config\n"
        "config = Config(codec=model_directory.load('models/untrained')[0])\n"
    )
    for name in ("untrained", "first"):
        shutil.copytree(model, folder / "models" / name)
    audio = folder / "clips"
    audio.mkdir()
    for name in CLIPS:
        (audio / f"{name}.flac").symlink_to(BUNDLED_CLIPS / f"{name}.flac")
    for manifest in BUNDLED_CLIPS.glob("*.jsonl"):
        lines = manifest.read_text().splitlines(keepends=True)
        kept = [line for line in lines if Path(json.loads(line)["audio_filepath"]).stem in CLIPS]
        (audio / manifest.name).write_text("".join(kept))
    return folder


@pytest.fixture(scope="module")
def made(in_one_process: None, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which everything of MADE is there."""
    folder = checkout(tmp_path_factory.mktemp("made"), demo_model)
    with contextlib.chdir(folder):
        for line in MAKING:
            obey(line)
    return folder


@pytest.fixture
def sandbox(tmp_path: Path, demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(checkout(tmp_path, demo_model))
    return tmp_path


MAKING = tuple(
    line
    for language, code in BLOCK.findall((ROOT / "README.md").read_text())
    for line in (commands(code) if language == "bash" else ())
    if line.startswith(tuple(MADE.values()))
)


# -- Tests


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_every_command_and_snippet_runs(page: Path, sandbox: Path, request: pytest.FixtureRequest):
    for name in MADE:
        if name in shown(page):
            shutil.copytree(request.getfixturevalue("made") / name, sandbox / name)
    for language, code in blocks(page):
        assert language in TRIED, f"{page.name}: a block names its language, one of {', '.join(TRIED)}:\n{code}"
        TRIED[language](code)


@pytest.mark.slow
def test_commands_that_train_run(sandbox: Path, made: Path):
    """Two steps of each; the tests above only parse them."""
    shutil.rmtree(sandbox / "clips")
    (sandbox / "clips").symlink_to(BUNDLED_CLIPS)
    shutil.copytree(made / "data" / "tokens", sandbox / "data" / "tokens")
    steps = ("--optimizer.total-steps", "2", "--optimizer.warmup-steps", "1")
    shorter = {
        "omnicodec prepare": runs(),
        "omnicodec train --config demo": runs(
            *steps, "--run.validate-every", "2", "--run.save-every", "2", "--data.batch-size", "8"
        ),
        "omnicodec export-model": runs(),
        "omnicodec perplexity": runs(*steps),
    }
    shutil.rmtree(sandbox / "models" / "first")
    ran = set()
    for page in ("prepare", "train", "evaluate"):
        for language, code in blocks(ROOT / "docs" / f"{page}.md"):
            for line in commands(code) if language == "bash" else []:
                for begins, run in shorter.items():
                    if line.startswith(begins):
                        run(shlex.split(line, comments=True))
                        ran.add(begins)
    assert ran == set(shorter)
    assert (sandbox / "models" / "first" / "discriminators" / "model.safetensors").is_file()
    assert "ppl_mean" in (sandbox / "ppl.json").read_text()


def test_what_many_pages_read_is_made_by_one_command_each():
    assert len(MAKING) == len(MADE)


def test_each_section_of_the_readme_is_on_one_page():
    marked = re.findall(r"\[start:(\w+)\]", (ROOT / "README.md").read_text())
    assert sorted(included()) == sorted(marked)


def test_sections_that_pages_include_link_to_no_file():
    """A path that is right in the README would be wrong in docs/."""
    links = [link for name in included() for link in re.findall(r"\]\(([^)]+)\)", section(name))]
    assert not [link for link in links if not link.startswith("https://")]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name: str):
    """Those of the pages are checked where the site is built."""
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / name).read_text())
    assert not [link for link in links if not (ROOT / link).exists()]


def test_the_citation_names_this_version():
    assert f"version = {{{__version__}}}" in section("cite")


def test_every_page_is_in_the_table_of_contents():
    navigation = (ROOT / "zensical.toml").read_text()
    assert not [page.name for page in PAGES if f'"{page.name}"' not in navigation]


def public() -> dict[str, object]:
    """What the reference names."""
    names = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    found = {}
    for name in names:
        module, _, attribute = name.rpartition(".")
        if attribute != "errors":
            found[name] = getattr(importlib.import_module(module), attribute)
    return found


def test_every_example_in_a_public_docstring_gives_what_it_says(
    made: Path, sandbox: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("data/prepared", "data/tokens"):
        shutil.copytree(made / name, sandbox / name)
    monkeypatch.chdir(sandbox)
    examples = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(verbose=False)
    for name, thing in public().items():
        module = sys.modules[thing.__module__]
        tests = examples.find(thing, name, module, globs=dict(vars(module)))
        if not name.startswith(("omnicodec_jax.config", "omnicodec_jax.corpus.Clip")):
            assert any(test.examples for test in tests), f"{name} has no example"
        for test in tests:
            assert not runner.run(test).failed, f"an example of {name} gives something else; see above"


def functions(thing: object) -> Iterator[Callable[..., object]]:
    """A function itself, or the public methods of a class that explain themselves."""
    if inspect.isfunction(thing):
        yield thing
    for name, member in () if inspect.isfunction(thing) else vars(thing).items():
        function = getattr(member, "__func__", member)
        if inspect.isfunction(function) and inspect.getdoc(function) and name.lstrip("_") in ("init__", "call__", name):
            yield function


def test_public_docstrings_explain_every_argument():
    wrong = []
    for name, thing in public().items():
        assert "." in inspect.getdoc(thing).splitlines()[0], f"{name}: its first line is no sentence"
        for function in functions(thing):
            arguments = [each for each in inspect.signature(function).parameters if each not in ("self", "cls")]
            explained = [each.arg_name for each in docstring_parser.parse(inspect.getdoc(function)).params]
            made_by_dataclass = function.__name__ == "__init__" and hasattr(thing, "__dataclass_fields__")
            if explained != arguments and not made_by_dataclass:
                wrong.append(f"{name}: {function.__name__} has {arguments}, its docstring explains {explained}")
    assert not wrong, "\n".join(wrong)
