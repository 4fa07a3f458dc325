"""What an installation of nbgpu brings along: widgets run the scripts of strangers' notebooks (docs/security.md), so it is none of them."""

from __future__ import annotations

import importlib
import re
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
WIDGETS = {"anywidget", "ipywidgets", "jupyterlab-widgets", "widgetsnbextension"}
PROJECT: dict[str, Any] = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli").loads(
    (ROOT / "pyproject.toml").read_text()
)["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def brought(*asked: str) -> set[str]:
    """Return the names of all packages that pip installs for `asked`, by what this environment's packages say that they require."""
    names: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(one) for one in asked]
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        names.add(name)
        for extra in ("", *one.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                wanted = [Requirement(line) for line in requires(name) or []]
            except PackageNotFoundError:
                continue  # not of this environment: what it requires nobody here knows
            waiting += [each for each in wanted if each.marker is None or each.marker.evaluate({"extra": extra})]
    return names


def packages_of_images() -> list[str]:
    """Return what the Dockerfiles name beside nbgpu's own extras."""
    return [word for path in (ROOT / "deploy/images").glob("*.Dockerfile") for word in re.findall(r'"([a-z-]+>=[^"$]+)"', path.read_text())]


@pytest.mark.parametrize("extra", sorted(set(EXTRAS) - {"widget"}))
def test_no_extra_but_its_own_brings_widgets(extra: str) -> None:
    assert brought(*PROJECT["dependencies"], *EXTRAS[extra]) & WIDGETS == set()


def test_the_images_bring_none() -> None:
    packages = packages_of_images()
    assert len(packages) >= 5
    assert brought(*packages) & WIDGETS == set()
    named = re.compile(r"anywidget|ipywidgets|\[[a-z,]*widget")
    assert [path for path in (ROOT / "deploy").rglob("*") if path.is_file() and named.search(path.read_text())] == []


def test_the_extra_does() -> None:
    """Control: the search finds them, behind other packages too."""
    assert {"anywidget", "ipywidgets", "jupyterlab-widgets"} <= brought(*EXTRAS["widget"])
