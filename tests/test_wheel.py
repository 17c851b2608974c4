"""The wheel holds all that the commands need: they run where there is no checkout."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from omnicodec_jax import __version__

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None,
    reason="needs pip and setuptools in the environment of the tests",
)

COMMANDS = [
    "clips clips",
    "inspect clips/sound_bell.flac",
    "inspect {model}",
    "inspect small",
    "encode clips/sound_bell.flac with_the_bundled_codec.safetensors",
    "encode clips/sound_bell.flac bell.safetensors --model {model}",
    "decode bell.safetensors bell.wav --model {model}",
    "stream-decode bell.safetensors bell.raw --model {model}",
    "prepare --manifest sound=clips/sound.jsonl,speech=clips/speech.jsonl --out prepared --validation 0.4",
    "inspect prepared",
    "tokenize --manifest sound=clips/sound.jsonl --out tokens --model {model} --num-readers 1",
    "detokenize tokens decoded --model {model}",
    "webdataset tokens tars",
    "convert to-torch --model {model} --out omnicodec.safetensors",
    "convert from-torch --checkpoint omnicodec.safetensors --config recipe.py --out back",
    "evaluate --reconstructions same=clips --data sound=clips --limit 2 --metrics mel_distance --num-workers 1",
]
"""Each runs to its end."""
LONG_COMMANDS = [
    "init --config demo --out untrained",
    "clips clips",
    "prepare --manifest sound=clips/sound.jsonl,speech=clips/speech.jsonl --out prepared --validation 0.4",
    "convert semantic-features --prepared prepared --encoder small --out features",
    "train --config tiny_experiment.py --workdir run --data.prepared prepared",
    "goodput --workdir run",
    "export-model --workdir run --out trained",
    "export --what decoder --model trained --out decoder.stablehlo --seconds 2",
    "encode clips/sound_bell.flac bell.safetensors --model trained",
]
"""So does each of these, which take longer."""
REFUSED = {
    "train --config released_12hz --workdir run --data.prepared nowhere": "nowhere",
    "train --config no_recipe --workdir run": "there are ablations/fine_tuned",
    "perplexity --config language_model --tokens nowhere": "nowhere",
    "convert mimi --checkpoint nowhere --out mimi": "nowhere",
}
"""These find their recipe or converter, and what they say of what is missing."""
RUN = """
import json, shlex, sys
import omnicodec_jax
from omnicodec_jax import cli
from omnicodec_jax.distributed import multihost

multihost.initialize = lambda: None  # it is for processes in which JAX has not begun
ends = {}
for line in json.loads(sys.argv[1]):
    sys.argv = ["omnicodec", *shlex.split(line)]
    try:
        cli.main()
    except SystemExit as end:
        ends[line] = end.code or 0
print(json.dumps([omnicodec_jax.__file__, ends]))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the wheel, which sees the packages that it needs, but no checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # building leaves files behind
    shutil.copytree(ROOT / "omnicodec_jax", source / "omnicodec_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    (wheel,) = folder.glob("*.whl")
    python = folder / "env" / "bin" / "python"
    # What PYTHONPATH names would pass for installed.
    others = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    into = [*pip, "--python", python, "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(into, check=True, env=others)
    (packages,) = (folder / "env").glob("lib/python*/site-packages")
    # A plain path: what that environment has installed from a checkout is not looked at.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture(autouse=True)
def without_the_checkout(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)


def ended(python: Path, lines: list[str], folder: Path) -> tuple[dict[str, int], str]:
    """Runs commands of the wheel in one process; returns how each has ended, and what they have said."""
    done = subprocess.run([python, "-c", RUN, json.dumps(lines)], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    place, ends = json.loads(done.stdout.splitlines()[-1])
    assert Path(place).is_relative_to(python.parents[1])
    return ends, done.stderr


def test_every_command_runs_in_an_empty_folder(python: Path, demo_model: Path, tmp_path: Path):
    (tmp_path / "recipe.py").write_text(
        "from omnicodec_jax import model_directory\nfrom omnicodec_jax.config import Config\n"
        f"config = Config(codec=model_directory.load({str(demo_model)!r})[0])\n"
    )
    lines = [line.format(model=demo_model) for line in [*COMMANDS, *REFUSED]]
    ends, said = ended(python, lines, tmp_path)
    assert ends == dict(zip(lines, [0] * len(COMMANDS) + [1] * len(REFUSED), strict=True)), said
    for words in REFUSED.values():
        assert words in said
    assert (tmp_path / "report" / "index.html").is_file()


@pytest.mark.slow
def test_a_codec_is_trained_in_an_empty_folder(python: Path, tmp_path: Path):
    shutil.copy(ROOT / "tests" / "tiny_experiment.py", tmp_path)
    ends, said = ended(python, LONG_COMMANDS, tmp_path)
    assert ends == dict.fromkeys(LONG_COMMANDS, 0), said


@pytest.mark.parametrize("program", [["omnicodec"], ["python", "-m", "omnicodec_jax"]], ids=["script", "module"])
def test_the_command_is_installed(python: Path, program: list[str], tmp_path: Path):
    first, *rest = program
    done = subprocess.run([python.with_name(first), *rest, "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.startswith(f"omnicodec {__version__}, jax "), done.stderr
