"""docs/statistics.md has every formula that the code cites, and the tests that it names hold them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")
SOURCES = [
    path for name in ("policies", "monitors", "pipeline", "serving") for path in (ROOT / name).rglob("*.py")
]
OURS = [
    *SOURCES,
    *(ROOT / "kernels").rglob("*.py"),
    *(path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)),
    *(ROOT / "docs").rglob("*.md"),
    *ROOT.glob("*.md"),
]
CITED = sorted(
    {name for path in SOURCES for name in re.findall(r"\bF(?:1[0-7]|[1-9])\b", path.read_text("utf-8"))}
)
SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
FORMULAS = {text.split(":")[0]: text for text in SECTIONS if re.match(r"F\d", text)}


def named_tests(section: str) -> list[tuple[str, str]]:
    """File and test of every `file.py::test` of a section; `::test` stands for one more of the same file."""
    found, file = [], ""
    for name in re.findall(r"`((?:[a-z]+/test_[a-z_]+\.py)?(?:::test_[a-z0-9_]+)?)`", section):
        path, _, test = name.partition("::")
        file = path or file
        if name:
            found.append((file, test))
    return found


@pytest.mark.parametrize("name", CITED)
def test_every_formula_that_is_cited_has_its_section(name: str) -> None:
    """With its source, and the tests that hold it."""
    assert "Source: " in FORMULAS[name]
    assert named_tests(FORMULAS[name])


@pytest.mark.parametrize(("file", "test"), sorted({pair for text in SECTIONS for pair in named_tests(text)}))
def test_every_test_that_is_named_exists(file: str, test: str) -> None:
    """A formula whose test was renamed away would be held by nothing."""
    assert f"def {test}" in (ROOT / "tests" / file).read_text(encoding="utf-8")


def test_nothing_cites_a_document_that_is_not_here() -> None:
    """Pages are named by their path from the root, and every such path exists."""
    pages = {
        (path, name)
        for path in OURS
        for name in re.findall(r"\b(?:[a-z_]+/)+[\w-]+\.md\b|\bDESIGN\b", path.read_text(encoding="utf-8"))
    }

    assert len(pages) > 10
    missing = [(str(path.relative_to(ROOT)), name) for path, name in pages if not is_here(path, name)]
    assert missing == []


def is_here(path: Path, name: str) -> bool:
    """Whether the name is a page seen from the root or from the page that cites it."""
    return any((folder / name).is_file() for folder in (ROOT, path.parent, path.parent.parent))
