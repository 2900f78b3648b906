"""The repository's pages are consistent: every page is linked, links resolve, and there is one version."""

import re
from pathlib import Path

import pytest
import yaml

from mc2_hpc import __version__

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def links(page):
    """A page's links within the repository: (file, heading or nothing)."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in LINK.findall(text):
        if not re.match(r"[a-z]+:", target):
            path, _, heading = target.partition("#")
            yield (page.parent / path).resolve() if path else page, heading


def headings(page):
    """A page's headings, in the form used by links."""
    lines = re.findall(r"^#+ +(.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_resolves(page):
    for path, heading in links(page):
        assert path.exists(), f"{page.name} links to {path}"
        assert not heading or heading in headings(path), f"{page.name} links to {path.name}#{heading}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_the_readme_links_every_page(page):
    assert page in {path for path, _ in links(ROOT / "README.md")}


def test_the_version_is_one():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[([\d.]+)\] - \d{4}-\d\d-\d\d$", changes, flags=re.MULTILINE)
    assert __version__ in released or f"To be {__version__}." in changes
    assert released and len(set(released)) == len(released)


def test_the_citation_names_what_it_must():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == "Apache-2.0"
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2507.22062" and paper["authors"]
