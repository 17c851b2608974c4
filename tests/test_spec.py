"""Every section of the specification that the code points to is there, and names its source."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
SPEC = (ROOT / "docs" / "spec.md").read_text()
SECTIONS = re.findall(r"^#{2,3} ([\d.]+) ", SPEC, re.MULTILINE)
CITATION = re.compile(r"spec (§[\d.]*\d(?:–[\d.]*\d)?(?:(?:,| and) §[\d.]*\d(?:–[\d.]*\d)?)*)")


def cited(text: str) -> set[str]:
    """Sections that a text points to; both ends of a range."""
    return {number for citation in CITATION.findall(text) for number in re.findall(r"[\d.]*\d", citation)}


def test_a_citation_is_read_with_its_ranges_and_lists():
    assert cited("(arXiv 2210.13438 §3.4; spec §2.1)") == {"2.1"}
    assert cited("EMA codebooks (spec §1.8–1.9, §8.3–8.4).") == {"1.8", "1.9", "8.3", "8.4"}
    assert cited("# Source: spec §4.") == {"4"}


def test_every_section_that_the_code_points_to_is_in_the_specification():
    files = [path for folder in ("omnicodec_jax", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    found = {path.relative_to(ROOT): cited(path.read_text()) for path in files if path != Path(__file__)}
    assert sum(map(bool, found.values())) > 10
    missing = {str(path): sections - set(SECTIONS) for path, sections in found.items() if sections - set(SECTIONS)}
    assert not missing
    assert len(SECTIONS) == len(set(SECTIONS))


@pytest.mark.parametrize("section", [number for number in SECTIONS if "." in number])
def test_every_section_names_its_source(section):
    text = re.split(r"^#{2,3} ", SPEC.split(f"### {section} ", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    assert re.search(r"paper|`[\w/]+\.(py|yaml)`|[Ss]ource|arXiv", text), f"{section} does not say where it is from"
