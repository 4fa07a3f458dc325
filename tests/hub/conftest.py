"""Hubs to test against: JupyterHub 6 from this environment, and 5.5 where ``NBGPU_HUB55_PYTHON`` names a Python that has it."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_pool import FakePool
from hub_process import Hub, proxy_command

PYTHONS = {"hub6": sys.executable, "hub5": os.environ.get("NBGPU_HUB55_PYTHON", "")}


@pytest.fixture(scope="module", params=["hub6", "hub5"])
def python(request: pytest.FixtureRequest) -> str:
    """A Python with each supported JupyterHub."""
    found = PYTHONS[request.param]
    if not found:
        pytest.skip("NBGPU_HUB55_PYTHON names no Python with JupyterHub 5.5")
    if proxy_command() is None:
        pytest.skip("configurable-http-proxy is not installed")
    return found


@pytest.fixture(scope="module")
def place(python: str) -> Iterator[Path]:
    """A directory with a short path, for sockets; one for each Python, as hubs do not share databases."""
    with tempfile.TemporaryDirectory(prefix="nbgpu-hub-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def pool(place: Path) -> Iterator[FakePool]:
    """A pool that does as it is told."""
    fake = FakePool(place / "pool.sock")
    yield fake
    fake.close()


@pytest.fixture
def calm_pool(pool: FakePool) -> FakePool:
    """The same, back to its good behaviour and empty books."""
    with pool.lock:
        pool.full, pool.refuse, pool.stall_seconds, pool.availability = False, None, 0.0, None
        pool.prepare_refused, pool.small_free = None, False
        pool.fail_next.clear()
        pool.grants.clear()
        pool.asks.clear()
        pool.calls.clear()
    return pool


@pytest.fixture(scope="module")
def make_hub(place: Path, python: str) -> Iterator[Callable[..., Hub]]:
    """Make hubs that are ended afterwards."""
    made: list[Hub] = []

    def make(more: str, **options: object) -> Hub:
        hub = Hub(place, more, python, **options)  # type: ignore[arg-type]
        made.append(hub)
        hub.start()
        return hub

    yield make
    for hub in made:
        hub.end()
