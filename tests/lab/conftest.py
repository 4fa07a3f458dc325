"""A real Jupyter server in this process, with a fake slice agent or none."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# imported, not named in pytest_plugins: they are for this folder alone
from pytest_jupyter.jupyter_server import *  # noqa: F403

sys.path.insert(0, str(Path(__file__).parent))

from fake_slice_agent import FakeAgent


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch, jp_asyncio_loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """A test starts with no notices, and leaves no background task: in production the process ends with its server."""
    from nbgpu_lab import activity, extension, kernels, notices, provisioner

    fresh = notices.Notices()
    for module in (notices, extension, provisioner):
        monkeypatch.setattr(module, "SERVER", fresh)
    monkeypatch.setattr(kernels, "ACTIVITY", activity.Activity())
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
