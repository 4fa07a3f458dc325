"""A real Jupyter server in this process, with a fake slice agent or none."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("pytest_jupyter", reason="pip install 'pytest-jupyter[server]'")
pytest_plugins = ["pytest_jupyter.jupyter_server"]

sys.path.insert(0, str(Path(__file__).parent))

from fake_agent import FakeAgent  # noqa: E402


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch, jp_asyncio_loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """A test starts with no notices, and leaves no background task: in production the process ends with its server."""
    from nbgpu_lab import extension, notices, provisioner

    fresh = notices.Notices()
    for module in (notices, extension, provisioner):
        monkeypatch.setattr(module, "SERVER", fresh)
    yield
    tasks = asyncio.all_tasks(jp_asyncio_loop)
    for task in tasks:
        task.cancel()
    jp_asyncio_loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))


@pytest.fixture
def socket_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Where the slice's socket is; nobody listens yet."""
    path = str(tmp_path / "api.sock")
    monkeypatch.setenv("NBGPU_SOCKET", path)
    return path


@pytest.fixture
def agent(socket_path: str, jp_asyncio_loop: asyncio.AbstractEventLoop) -> Iterator[FakeAgent]:
    """A fake agent that listens at `socket_path`."""
    fake = FakeAgent(socket_path)
    jp_asyncio_loop.run_until_complete(fake.start())
    yield fake
    jp_asyncio_loop.run_until_complete(fake.stop())


@pytest.fixture
def jp_server_config() -> dict[str, object]:
    return {"ServerApp": {"jpserver_extensions": {"nbgpu_lab": True}}}


async def until(condition: Callable[[], object], seconds: float = 5) -> object:
    """Wait until `condition` holds, and return what it returned."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "not within the deadline"
        await asyncio.sleep(0.01)
    return result
