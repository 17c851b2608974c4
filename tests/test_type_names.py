"""A name of the package stands for one thing, and what it says on hover makes sense by itself."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

PACKAGE = Path(__file__).parents[1] / "omnicodec_jax"
ROOMS = sorted({path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")})
"""Folders and files of the package."""
COMMANDS = ("omnicodec ", "--")
"""How the last line of a docstring begins that ends with a command line."""
EXAMPLES = "Examples:\n"
"""The heading of the last part of a docstring, whose lines are code."""
ARGUMENT = re.compile("[a-z_]+: ")
"""The beginning of a docstring that explains an argument before it says what the function does."""
FRAGMENTS = (
    "Of ",
    "From ",
    "That ",
    "After ",
    "By ",
    "To ",
    "Those ",
    "With ",
    "As ",
    "Else ",
    "Here, ",
    "The same of ",
)
BARE = re.compile(r"[a-z`\[]|(None|True|False|[0-9.]+):")
"""The beginning of a field's docstring that says a type, a shape or a value before it says what the field is."""
NOUNS = ("The ", "A ", "An ", "Whether ", "How ", "What ")
"""Beginnings of the docstrings of fields and contexts. That of a function begins with its verb."""


def types(tree: ast.Module) -> Iterator[str]:
    """Public classes of a module, and aliases such as `Metrics = dict[str, Array]`."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Those of the module, its classes and functions, and the strings that stand below a field or a constant."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            for child in node.body:
                value = child.value if isinstance(child, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value.strip()


def fields(tree: ast.Module) -> Iterator[str]:
    """The strings that stand below a field or a constant, and the docstrings of properties."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            is_property = isinstance(node, ast.FunctionDef) and "property" in decorators(node)
            for child in node.body[0 if is_property else 1 :]:
                value = child.value if isinstance(child, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value.strip()


def functions(tree: ast.Module) -> Iterator[str]:
    """The docstrings of functions, other than properties and contexts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not re.search("property|contextmanager", decorators(node)):
            yield ast.get_docstring(node) or ""


def decorators(node: ast.FunctionDef) -> str:
    return " ".join(map(ast.unparse, node.decorator_list))


def parts(text: str) -> Iterator[str]:
    """The first paragraph of a docstring, and what it says of each argument."""
    yield text.partition("\n\n")[0]
    arguments = re.search(r"^ *Args:\n(.*?)(\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
    if arguments:
        yield from (part.strip() for part in re.split(r"^ *[a-z]\w*: ", arguments[1], flags=re.MULTILINE)[1:])


def ends_its_sentence(text: str) -> bool:
    """Whether a text ends in a full stop, or with a shape, a drawing or a command line."""
    last = text.splitlines()[-1].lstrip()
    return text[-1] in ".]" or "→" in text or "─" in last or last.startswith(COMMANDS)


@pytest.fixture(scope="module")
def modules() -> dict[Path, ast.Module]:
    return {path.relative_to(PACKAGE): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


@pytest.mark.parametrize("room", ROOMS)
def test_a_type_has_a_name_of_its_own_in_the_whole_package(modules, room):
    counts = Counter(name for tree in modules.values() for name in types(tree) if not name.startswith("_"))
    own = {name for path, tree in modules.items() if path.parts[0] == room for name in types(tree)}
    assert sorted(name for name in own if counts[name] > 1) == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_docstring_names_its_subject_and_ends_its_sentence(modules, room):
    said = [text for path, tree in modules.items() if path.parts[0] == room for text in docstrings(tree)]
    assert said
    assert [text for text in said if text.startswith(FRAGMENTS)] == []
    assert [text for text in said if ARGUMENT.match(text)] == []
    assert [part for text in said for part in parts(text) if part.startswith(FRAGMENTS)] == []
    assert [part for text in said for part in parts(text) if not ends_its_sentence(part)] == []
    assert [text for text in said if not ends_its_sentence(text.partition(EXAMPLES)[0].rstrip())] == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_field_says_what_it_is_and_a_function_what_it_does(modules, room):
    trees = [tree for path, tree in modules.items() if path.parts[0] == room]
    assert [text for tree in trees for text in fields(tree) if BARE.match(text)] == []
    assert [text for tree in trees for text in functions(tree) if text.startswith(NOUNS)] == []
