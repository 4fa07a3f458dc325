"""``NBGPU_REQUIRE``: what it names fails where it would have been skipped, so that a CI without a browser is not green."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
CONFTEST = Path(__file__).parents[1] / "conftest.py"
MARKS = "[pytest]\nmarkers =\n    browser: b\n    kubernetes: k\n    gpu: g\n    root: r\n"
TEST = """import pytest

@pytest.mark.browser
def test_page():
    {body}

def test_other():
    pass
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with our conftest.py and an empty PATH to look for browsers in."""
    shutil.copy(CONFTEST, tmp_path)
    (tmp_path / "pytest.ini").write_text(MARKS)
    (tmp_path / "empty").mkdir()
    return tmp_path


def outcome(project: Path, body: str = "pass", **env: str) -> tuple[int, str]:
    """Run the project's tests; return pytest's exit status and what it printed."""
    (project / "test_it.py").write_text(TEST.format(body=body))
    names = ("NBGPU_REQUIRE", "NBGPU_CHROMIUM", "PYTEST_ADDOPTS")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "test_it.py"]
    done = subprocess.run(
        command,
        cwd=project,
        env={**clean, "PATH": str(project / "empty"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_missing_browser_skips_with_the_reason(project: Path) -> None:
    status, said = outcome(project)
    assert status == 0
    assert "1 passed, 1 skipped" in said
    assert "no Chromium on this machine" in said


def test_a_missing_browser_fails_where_it_is_required(project: Path) -> None:
    status, said = outcome(project, NBGPU_REQUIRE="browser")
    assert status != 0
    assert "NBGPU_REQUIRE=browser, but no Chromium" in said


def test_a_skip_inside_a_required_test_fails(project: Path) -> None:
    body, chromium = 'pytest.skip("the page is not built")', {"NBGPU_CHROMIUM": sys.executable}
    assert outcome(project, body, **chromium)[0] == 0, "the control: not required, it may skip"
    status, said = outcome(project, body, NBGPU_REQUIRE="browser", **chromium)
    assert status == 1
    assert "1 failed, 1 passed" in said
    assert "but skipped: the page is not built" in said


def test_a_mark_that_skips_a_required_test_fails(project: Path) -> None:
    body, chromium = "pass\n\npytestmark = pytest.mark.skipif(True, reason='not built')", {"NBGPU_CHROMIUM": sys.executable}
    status, said = outcome(project, body, NBGPU_REQUIRE="browser", **chromium)
    assert status == 1
    assert "but skipped: not built" in said


def test_a_browser_test_for_root_is_skipped_elsewhere(project: Path) -> None:
    body, chromium = "pass\n\npytestmark = pytest.mark.root", {"NBGPU_CHROMIUM": sys.executable}
    status, said = outcome(project, body, NBGPU_REQUIRE="browser", **chromium)  # the empty PATH has no useradd
    assert status == 0
    assert "2 skipped" in said
    assert "root: " in said
    status, said = outcome(project, body, NBGPU_REQUIRE="browser,root", **chromium)
    assert status != 0
    assert "NBGPU_REQUIRE=root, but" in said


def test_a_typing_error_in_it_is_refused(project: Path) -> None:
    status, said = outcome(project, NBGPU_REQUIRE="browsers")
    assert status != 0
    assert "it may name root, browser, kubernetes, gpu" in said
