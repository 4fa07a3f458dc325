"""Kernels start under their own id, with the limit that their notebook asks for; with a real kernel process each."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from fake_slice_agent import GIB, FakeAgent
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import KernelProvisionerFactory
from lab_helpers import until

from nbgpu_lab import limits, notices
from nbgpu_lab.provisioner import SliceProvisioner, read_metadata

pytestmark = pytest.mark.usefixtures("our_provisioner")


@pytest.fixture
def our_provisioner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our provisioner as the installed default, without an installation."""

    def create(self: Any, kernel_id: str, kernel_spec: Any, parent: Any) -> SliceProvisioner:
        return SliceProvisioner(kernel_id=kernel_id, kernel_spec=kernel_spec, parent=parent)

    monkeypatch.setattr(KernelProvisionerFactory, "create_provisioner_instance", create)


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncKernelManager:
    """A kernel of "another language": a shell that writes its environment down."""
    spec = KernelSpec(argv=["sh", "-c", f"env > {tmp_path}/env; exec sleep 600"], display_name="Shell", language="sh")
    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", lambda self, name: spec)
    return AsyncKernelManager(kernel_name="shell", shutdown_wait_time=0.2)


def notebook(tmp_path: Path, metadata: object, name: str = "train.ipynb") -> str:
    path = tmp_path / name
    path.write_text(json.dumps({"cells": [], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))
    return str(path)


async def start(manager: AsyncKernelManager, tmp_path: Path, session: str) -> dict[str, str]:
    await manager.start_kernel(env={"PATH": "/usr/bin:/bin", "JPY_SESSION_NAME": session})
    env = tmp_path / "env"
    await until(lambda: env.exists() and "JPY_SESSION_NAME" in env.read_text())
    return dict(line.split("=", 1) for line in env.read_text().splitlines() if "=" in line)


async def stop(manager: AsyncKernelManager) -> None:
    await manager.shutdown_kernel(now=True)


async def test_limit_is_set_before_the_process_and_removed_after(agent: FakeAgent, manager: Any, tmp_path: Path) -> None:
    session = notebook(tmp_path, {"nbgpu": {"memory": "5 GiB"}})
    env = await start(manager, tmp_path, session)
    kernel_id = env["NBGPU_KERNEL_ID"]
    assert kernel_id == manager.kernel_id
    assert agent.limits == {kernel_id: {"memory_bytes": 5 * GIB, "compute_milli": None}}
    assert notices.SERVER.after(0) == []
    await stop(manager)
    assert agent.limits == {}


async def test_a_restart_keeps_the_limit_of_the_panel(agent: FakeAgent, manager: Any, tmp_path: Path) -> None:
    session = notebook(tmp_path, {"nbgpu": {"memory": "5 GiB"}})
    await start(manager, tmp_path, session)
    from_the_panel = {"memory_bytes": 2 * GIB, "compute_milli": None}
    agent.limits[manager.kernel_id] = from_the_panel
    await manager.restart_kernel(now=True)
    assert agent.limits == {manager.kernel_id: from_the_panel}
    await stop(manager)


@pytest.mark.parametrize(
    "metadata",
    [
        {"nbgpu": "everything"},
        {"nbgpu": {"memory": "5 apples"}},
        {"nbgpu": {"memory": "900 GiB"}},
        {"nbgpu": {"compute": "5 GiB"}},
        {"nbgpu": [1]},
    ],
)
async def test_junk_in_the_metadata_is_a_notice(agent: FakeAgent, manager: Any, tmp_path: Path, metadata: object) -> None:
    env = await start(manager, tmp_path, notebook(tmp_path, metadata))
    assert env["NBGPU_KERNEL_ID"] == manager.kernel_id
    assert await manager.is_alive()
    (notice,) = notices.SERVER.after(0)
    assert notice["kernel_id"] == manager.kernel_id
    assert "train.ipynb" in notice["message"]
    assert "whole slice" in notice["message"]
    assert agent.limits == {}
    await stop(manager)


async def test_a_notebook_named_to_forge_lines(agent: FakeAgent, manager: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its name is said in the notice and in the log; there it begins no line and moves no cursor."""
    session = notebook(tmp_path, {"nbgpu": "junk"}, "a\n[E 2026-01-01 ServerApp] forged\x1b[2J<b>.ipynb")
    manager.log.propagate = True
    await manager.start_kernel(env={"PATH": "/usr/bin:/bin", "JPY_SESSION_NAME": session})
    (notice,) = notices.SERVER.after(0)
    assert r"a\n[E 2026-01-01 ServerApp] forged\x1b[2J<b>.ipynb" in notice["message"]
    assert notice["message"].isprintable()
    assert [record for record in caplog.records if "nbgpu" in record.getMessage() and not record.getMessage().isprintable()] == []
    await stop(manager)


@pytest.mark.parametrize("session", ["x" * 10_000 + ".ipynb", "nul\0.ipynb", "\x1b[2J.ipynb"])
def test_paths_that_are_none(session: str) -> None:
    assert read_metadata(session) is None


async def test_compute_in_the_metadata_is_a_part_of_the_slice(agent: FakeAgent, manager: Any, tmp_path: Path) -> None:
    await start(manager, tmp_path, notebook(tmp_path, {"nbgpu": {"memory": "5 GiB", "compute": "1/2"}}))
    assert notices.SERVER.after(0) == []
    assert agent.limits == {manager.kernel_id: {"memory_bytes": 5 * GIB, "compute_milli": 125}}
    await stop(manager)


async def test_agent_away_is_a_notice(socket_path: str, manager: Any, tmp_path: Path) -> None:
    await start(manager, tmp_path, notebook(tmp_path, {"nbgpu": {"memory": "5 GiB"}}))
    (notice,) = notices.SERVER.after(0)
    assert "does not answer" in notice["message"]
    await stop(manager)


@pytest.mark.slow
async def test_a_stuck_agent_delays_a_start_by_seconds_only(agent: FakeAgent, manager: Any, tmp_path: Path) -> None:
    agent.delay_seconds = 60
    await asyncio.wait_for(start(manager, tmp_path, notebook(tmp_path, {"nbgpu": {"memory": "5 GiB"}})), 8)
    await asyncio.wait_for(stop(manager), 8)


async def test_no_metadata_asks_nothing(agent: FakeAgent, manager: Any, tmp_path: Path) -> None:
    await start(manager, tmp_path, notebook(tmp_path, {"kernelspec": {"name": "python3"}}))
    assert agent.asked == []
    await stop(manager)


async def test_no_slice_no_talk(manager: Any, tmp_path: Path) -> None:
    env = await start(manager, tmp_path, notebook(tmp_path, {"nbgpu": {"memory": "5 GiB"}}))
    assert env["NBGPU_KERNEL_ID"] == manager.kernel_id
    assert notices.SERVER.after(0) == []
    await stop(manager)


@pytest.mark.parametrize(
    "content", [b"", b'"nbgpu"', b'["nbgpu"]', b'{"metadata": "nbgpu"}', b'{"metadata": null, "x": "nbgpu"}', b"\xff\xfe"]
)
def test_files_that_are_no_notebooks(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.ipynb"
    path.write_bytes(content)
    assert read_metadata(str(path)) is None
    assert read_metadata(str(tmp_path / "gone.ipynb")) is None
    assert read_metadata(str(tmp_path)) is None
    assert read_metadata("console-1-abc") is None


@pytest.mark.parametrize(
    ("changed", "expected"),
    [({"nbgpu": {"memory": "3 GiB"}}, {"memory_bytes": 3 * GIB, "compute_milli": None}), ({}, None), (None, 5 * GIB)],
    ids=["other", "removed", "renamed"],
)
async def test_a_restart_reads_the_notebook_again(agent: FakeAgent, manager: Any, tmp_path: Path, changed: Any, expected: Any) -> None:
    session = notebook(tmp_path, {"nbgpu": {"memory": "5 GiB"}})
    await start(manager, tmp_path, session)
    if changed is None:
        Path(session).rename(tmp_path / "other.ipynb")
        expected = {"memory_bytes": expected, "compute_milli": None}
    else:
        notebook(tmp_path, changed)
    await manager.restart_kernel(now=True)
    assert agent.limits == ({manager.kernel_id: expected} if expected else {})
    await stop(manager)


async def test_a_limit_that_the_panel_has_set_and_not_kept_outlives_a_restart(agent: FakeAgent, manager: Any, tmp_path: Path) -> None:
    await start(manager, tmp_path, notebook(tmp_path, {"nbgpu": {"memory": "5 GiB"}}))
    two = {"memory_bytes": 2 * GIB, "compute_milli": None}
    agent.limits[manager.kernel_id] = two
    limits.ORIGINS.remember(manager.kernel_id, two, "panel")
    await manager.restart_kernel(now=True)
    assert agent.limits == {manager.kernel_id: two}
    # control: kept in the notebook it is the notebook's, which says something else by now
    limits.ORIGINS.remember(manager.kernel_id, two, "notebook")
    await manager.restart_kernel(now=True)
    assert agent.limits == {manager.kernel_id: {"memory_bytes": 5 * GIB, "compute_milli": None}}
    await stop(manager)
    assert limits.ORIGINS.last(manager.kernel_id) == (limits.NO_LIMIT, None)


async def test_junk_at_a_restart_leaves_the_limit_and_says_so(agent: FakeAgent, manager: Any, tmp_path: Path) -> None:
    session = notebook(tmp_path, {"nbgpu": {"memory": "5 GiB"}})
    await start(manager, tmp_path, session)
    notebook(tmp_path, {"nbgpu": {"memory": "5 apples"}})
    await manager.restart_kernel(now=True)
    assert agent.limits == {manager.kernel_id: {"memory_bytes": 5 * GIB, "compute_milli": None}}
    (notice,) = notices.SERVER.after(0)
    assert notice["message"].endswith("Its kernel keeps the limit that it has.")
    await stop(manager)


async def test_what_is_told_of_a_kernel_that_starts_has_its_notebooks_name(agent: FakeAgent, jp_fetch: Any, jp_root_dir: Path) -> None:
    """The server's list has neither the kernel nor its session yet."""
    (jp_root_dir / "deep").mkdir()
    notebook(jp_root_dir / "deep", {"nbgpu": {"memory": "5 GiB"}})
    set_limit = agent._limit

    def tell(kernel_id: str, body: Any) -> Any:
        agent.tell("limit-changed", f"Notebook kernel {kernel_id[:8]}… may use 5 GiB.", kernel_id=kernel_id, level="info")
        return set_limit(kernel_id, body)

    agent._limit = tell  # type: ignore[method-assign]
    path = "deep/train.ipynb"
    body = json.dumps({"name": "train.ipynb", "type": "notebook", "path": path, "kernel": {"name": "python3"}})
    await jp_fetch("api/sessions", method="POST", body=body)
    await until(lambda: notices.SERVER.after(0))
    (notice,) = notices.SERVER.after(0)
    assert notice["message"] == "train.ipynb may use 5 GiB."
    assert (notice["name"], notice["path"]) == ("train.ipynb", path)


async def test_nobody_is_told_that_a_kernel_that_has_ended_has_no_limit(agent: FakeAgent, jp_fetch: Any, jp_root_dir: Path) -> None:
    """Also as the server stops, which ends its kernels. Control: of a kernel that lives it is told."""
    notebook(jp_root_dir, {"nbgpu": {"memory": "5 GiB"}})
    body = json.dumps({"name": "", "type": "notebook", "path": "train.ipynb", "kernel": {"name": "python3"}})
    session = json.loads((await jp_fetch("api/sessions", method="POST", body=body)).body)
    kernel_id, set_limit = session["kernel"]["id"], agent._limit

    def tell(kernel_id: str, body: Any) -> Any:
        agent.tell("limit-changed", f"of {'none' if body['memory_bytes'] is None else 'some'}", kernel_id=kernel_id, level="info")
        return set_limit(kernel_id, body)

    agent._limit = tell  # type: ignore[method-assign]
    await jp_fetch("nbgpu/api/kernels", kernel_id, method="PUT", body="{}")
    await jp_fetch("nbgpu/api/kernels", kernel_id, method="PUT", body='{"memory": "1/2"}')
    await jp_fetch("api/sessions", session["id"], method="DELETE")
    await until(lambda: agent.events[-1]["message"] == "of none")
    agent.tell("kernel-ended", "the last")
    await until(lambda: notices.SERVER.after(0) and notices.SERVER.after(0)[-1]["message"] == "the last")
    assert [one["message"] for one in notices.SERVER.after(0)] == ["of none", "of some", "the last"]
