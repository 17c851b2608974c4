"""The wheel holds all that the commands need: they run where there is no checkout."""

import importlib.util
import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

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
    "encode clips/sound_bell.flac with_the_one_that_comes_along.safetensors",
    "encode clips/sound_bell.flac bell.safetensors --model {model}",
    "decode bell.safetensors bell.wav --model {model}",
    "prepare --manifest sound=clips/sound.jsonl --out prepared --num-workers 1",
    "inspect prepared",
    "convert to-torch --model {model} --out omnicodec.safetensors",
    "convert from-torch --checkpoint omnicodec.safetensors --config recipe.py --out back",
    "evaluate --reconstructions same=clips --data sound=clips --limit 2 --metrics mel_distance --num-workers 1",
]
"""Each runs to its end."""
REFUSED = {
    "train --config released_12hz --workdir run --data.prepared nowhere": "nowhere",
    "train --config no_recipe --workdir run": "there are ablations/fine_tuned",
    "perplexity --config language_model --tokens nowhere": "nowhere",
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
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    subprocess.run(build, check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    (wheel,) = folder.glob("*.whl")
    (packages,) = (folder / "env").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    # A plain path: what that environment has installed from a checkout is not looked at.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "env" / "bin" / "python"


def test_every_command_runs_in_an_empty_folder(python: Path, demo_model: Path, tmp_path: Path):
    (tmp_path / "recipe.py").write_text(
        "from omnicodec_jax import model_directory\nfrom omnicodec_jax.config import Config\n"
        f"config = Config(codec=model_directory.load({str(demo_model)!r})[0])\n"
    )
    lines = [line.format(model=demo_model) for line in [*COMMANDS, *REFUSED]]
    done = subprocess.run([python, "-c", RUN, json.dumps(lines)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    place, ends = json.loads(done.stdout.splitlines()[-1])
    assert Path(place).is_relative_to(python.parents[1])
    assert ends == dict(zip(lines, [0] * len(COMMANDS) + [1] * len(REFUSED), strict=True)), done.stderr
    for words in REFUSED.values():
        assert words in done.stderr
    assert (tmp_path / "report" / "index.html").is_file()
