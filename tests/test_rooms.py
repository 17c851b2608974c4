"""Rooms of the package, which are its folders and the files beside them: imports between them run downwards only."""

import ast
import functools
import graphlib
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

PACKAGE = Path(__file__).parents[1] / "omnicodec_jax"
FACE = "__init__.py"
"""The public face of the package, which imports from rooms, and which no room imports from."""


LONGEST = 400
"""Largest number of lines of a file."""
ONE_FILE = PACKAGE / "converters" / "pytorch" / "modeling_omnicodec.py"
"""The code of exported models, which transformers loads from one file."""


def room(module: str) -> str | None:
    """The folder or file of a module of the package; None for a module that is not in it."""
    package, _, rest = module.partition(".")
    if package != PACKAGE.name:
        return None
    name = rest.partition(".")[0]
    return name if (PACKAGE / name).is_dir() else f"{name}.py"


def imported(tree: ast.Module) -> set[str]:
    """The modules that a module imports, in its functions, too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE.name:
            found |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module)
    return found


@functools.cache
def imports() -> dict[str, set[str]]:
    """The rooms that each room imports from."""
    graph: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0]
        rooms = {room(module) for module in imported(ast.parse(path.read_text()))}
        graph.setdefault(own, set()).update(name for name in rooms - {own} if name is not None)
    return graph


def test_imports_between_rooms_have_no_circle():
    graphlib.TopologicalSorter(imports()).prepare()


def test_every_room_that_is_imported_is_there_and_is_not_the_public_face():
    names = set().union(*imports().values())
    assert "data" in names
    assert [name for name in names if name == FACE or not (PACKAGE / name).exists()] == []


def test_rooms_whose_work_others_need_stand_on_their_own():
    assert "training" not in imports()["corpus"] | imports()["evaluation"] | imports()["distributed"]
    assert "evaluation" not in imports()["language_model"]
    assert not [room for room, needed in imports().items() if "cli" in needed and room not in ("__main__.py", "cli")]


def test_tensors_are_written_in_one_place():
    """safetensors' own writer takes no notice of the order in which an array lies in memory."""
    users = {path.name for path in PACKAGE.rglob("*.py") if "save_file" in path.read_text()}
    assert users == {"files.py"}


def test_no_file_of_the_package_is_too_long_to_be_read_at_once():
    lines = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py") if path != ONE_FILE}
    assert {path.name: count for path, count in lines.items() if count > LONGEST} == {}


def test_soundfile_is_used_through_one_module():
    """It calls soundfile once before any thread does."""
    users = [path for path in PACKAGE.rglob("*.py") if "soundfile" in imported(ast.parse(path.read_text()))]
    assert users == [PACKAGE / "data" / "soundfiles.py"]
