"""What holds for every test: where the C libraries and programs are, and what must not be skipped.

``NBGPU_REQUIRE=browser,kubernetes,gpu`` makes a missing thing fail the run where it would skip those tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def missing_browser() -> str | None:
    """Return why browser tests cannot run here; None when they can."""
    named = os.environ.get("NBGPU_CHROMIUM")
    if named:
        return None if os.access(named, os.X_OK) else f"NBGPU_CHROMIUM names {named}, which is no program"
    return None if any(shutil.which(name) for name in BROWSERS) else "no Chromium on this machine (Debian: apt-get install chromium)"


def missing_kubernetes() -> str | None:
    """Return why cluster tests cannot run here; None when they can."""
    return None if os.environ.get("KUBECONFIG") else "no cluster: KUBECONFIG is not set"


def missing_gpu() -> str | None:
    """Return why hardware tests cannot run here; None when they can."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "no NVIDIA driver on this machine"
    done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=60)
    return None if done.returncode == 0 and "GPU 0" in done.stdout else "nvidia-smi finds no GPU"


def missing_root() -> str | None:
    """Return why no servers of other users can be started here; None when they can."""
    if os.geteuid() != 0:
        return "only root starts servers of other users"
    return None if shutil.which("useradd") else "no useradd on this machine"


LACKING = pytest.StashKey[bool]()
"""Of a test: this machine lacks something that it needs and that is not required."""
NEEDS = {"root": missing_root, "browser": missing_browser, "kubernetes": missing_kubernetes, "gpu": missing_gpu}


def required() -> set[str]:
    """Return the needs that ``NBGPU_REQUIRE`` names."""
    return {word.strip() for word in os.environ.get("NBGPU_REQUIRE", "").split(",") if word.strip()}


def pytest_configure(config: pytest.Config) -> None:
    """Refuse words in NBGPU_REQUIRE that mean nothing: a typing error there would quietly skip tests."""
    unknown = required() - set(NEEDS)
    if unknown:
        raise pytest.UsageError(f"NBGPU_REQUIRE names {', '.join(sorted(unknown))}; it may name {', '.join(NEEDS)}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason; fail instead where it is required."""
    reasons = {name: why for name, missing in NEEDS.items() if any(item.get_closest_marker(name) for item in items) and (why := missing())}
    fatal = {name: why for name, why in reasons.items() if name in required()}
    if fatal:
        raise pytest.UsageError("; ".join(f"NBGPU_REQUIRE={name}, but {why}" for name, why in fatal.items()))
    for item in items:
        for name, why in reasons.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=f"{name}: {why}"))
                item.stash[LACKING] = True


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Turn a skip inside a test of a required kind into a failure: required means run."""
    if call.excinfo is not None and call.excinfo.errisinstance(pytest.skip.Exception) and not item.stash.get(LACKING, False):
        names = [name for name in required() if item.get_closest_marker(name)]
        if names:
            call.excinfo = pytest.ExceptionInfo.from_exc_info(_failure(f"NBGPU_REQUIRE={names[0]}, but skipped: {call.excinfo.value}"))


def _failure(message: str):  # type: ignore[no-untyped-def]
    try:
        raise AssertionError(message)
    except AssertionError as error:
        return type(error), error, error.__traceback__


@pytest.fixture
def runtime(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime directory of the test's own, short enough for socket paths."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="nbgpu-test-", dir="/tmp") as name:
        monkeypatch.setenv("NBGPU_RUNTIME_DIR", name)
        yield Path(name)
