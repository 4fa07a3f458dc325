"""The tables of features in the docs name tests that exist, and the pictures are there in both themes, none of them large."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("notebook.md", "start-page.md")
MOST_BYTES = 150_000
TESTS = {path.name: path for path in (ROOT / "tests").rglob("*") if re.fullmatch(r"test_\w+\.py|\w+\.test\.ts", path.name)}
IMAGES = ROOT / "docs" / "images"


def rows(page: str) -> list[tuple[str, str]]:
    """Return the rows of a page's table of features: what, and the cell that names its tests."""
    text = (ROOT / "docs" / page).read_text()
    table = text.rpartition("| feature | test |")[2]
    found = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [(what.strip(), tests) for what, tests in found]


def missing(cell: str) -> list[str]:
    """Return what a cell names that is no test: files, and functions of the file before them."""
    wrong: list[str] = []
    file = None
    for name in re.findall(r"`([^`]+)`", cell):
        if name.startswith("bench/"):
            wrong += [] if (ROOT / name).is_file() else [name]
        elif "." in name:
            file = TESTS.get(name.rpartition("/")[2])
            wrong += [] if file and file.as_posix().endswith(name) else [name]
        elif file is None or f"def {name}(" not in file.read_text():
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("page", PAGES)
def test_every_feature_names_tests_that_exist(page: str) -> None:
    named = rows(page)
    assert len(named) > 10
    assert [(what, wrong) for what, cell in named if (wrong := missing(cell)) or "`" not in cell] == []


def test_a_test_that_is_gone_is_seen() -> None:
    """Control of the test above."""
    assert missing("`test_lab_browser.py` (`test_one_request_a_second`, `test_gone`), `test_gone.py`, `hub/test_lab_browser.py`") == [
        "test_gone",
        "test_gone.py",
        "hub/test_lab_browser.py",
    ]


def test_every_browser_test_of_the_notebook_shows_a_feature() -> None:
    cells = " ".join(cell for _, cell in rows("notebook.md"))
    assert [name for name in TESTS if name.endswith("_browser.py") and TESTS[name].parent.name == "lab" and name not in cells] == []


def test_every_chapter_on_kubernetes_shows_a_feature() -> None:
    cells = " ".join(cell for page in PAGES for _, cell in rows(page))
    chapters = re.findall(r"def (test_\w+)\(", TESTS["test_cluster_features.py"].read_text())
    assert len(chapters) > 5
    assert [name for name in chapters if f"`{name}`" not in cells] == []


def test_pictures_are_there_in_both_themes_and_small() -> None:
    text = "\n".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    named = set(re.findall(r"images/([\w-]+\.png)", text))
    there = {path.name for path in IMAGES.glob("*.png")}
    assert named == there
    assert {name.replace("-dark", "-light") for name in there} == {name.replace("-dark", "-light") for name in there if "-dark" in name}
    assert [path.name for path in IMAGES.glob("*.png") if path.stat().st_size > MOST_BYTES] == []
