"""``%gpu`` without ``%load_ext``: in real kernels, started as a server in a slice starts them; nothing of the user's is changed."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_slice_agent import GIB, FakeAgent
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import KernelProvisionerFactory

import nbgpu
from nbgpu.errors import NbgpuError
from nbgpu_lab.kernel_args import magic_argument
from nbgpu_lab.provisioner import SliceProvisioner

PYTHON = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
ASK = "%gpu\nprint('the last line is another one')"


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A Python of another environment, which has no nbgpu."""
    (tmp_path / "env/bin").mkdir(parents=True)
    (tmp_path / "env/lib/python3.12/site-packages").mkdir(parents=True)
    return tmp_path / "env/bin/python"


def test_only_python_kernels_that_have_nbgpu_are_asked_for_it(python: Path) -> None:
    argument = ["--IPKernelApp.extra_extensions=nbgpu_lab"]
    assert magic_argument(PYTHON) == argument
    assert magic_argument(["python3", "-m", "ipykernel_launcher"]) == argument
    other = [str(python), "-m", "ipykernel_launcher", "-f", "x"]
    assert magic_argument(other) == []
    (python.parent.parent / "lib/python3.12/site-packages/nbgpu-0.1.0.dist-info").mkdir()
    assert magic_argument(other) == argument


@pytest.mark.parametrize(
    "argv", [["R", "--slave", "-e", "IRkernel::main()"], ["xpython", "-f", "x"], ["conda", "run", "python", "-m", "ipykernel_launcher"], []]
)
def test_other_kernels_are_started_as_ever(argv: list[str]) -> None:
    assert magic_argument(argv) == []


Start = Callable[..., Awaitable[Any]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, jp_asyncio_loop: asyncio.AbstractEventLoop) -> Iterator[Start]:
    """Starts a kernel through our provisioner; returns what runs a cell in it and returns its outputs."""

    def create(self: Any, kernel_id: str, kernel_spec: Any, parent: Any) -> SliceProvisioner:
        return SliceProvisioner(kernel_id=kernel_id, kernel_spec=kernel_spec, parent=parent)

    monkeypatch.setattr(KernelProvisionerFactory, "create_provisioner_instance", create)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    started: list[tuple[AsyncKernelManager, Any]] = []

    async def begin(argv: list[str] = PYTHON) -> Callable[[str], Awaitable[list[dict[str, Any]]]]:
        spec = KernelSpec(argv=argv, display_name="Python", language="python")
        monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", lambda self, name: spec)
        manager = AsyncKernelManager(kernel_name="python")
        await manager.start_kernel()
        client = manager.client()
        client.start_channels()
        started.append((manager, client))
        await client.wait_for_ready(timeout=60)

        async def run(code: str) -> list[dict[str, Any]]:
            outputs: list[dict[str, Any]] = []
            await client.execute_interactive(code, timeout=60, output_hook=outputs.append)
            return [message["content"] for message in outputs if message["msg_type"] in ("stream", "display_data", "error")]

        return run

    yield begin
    for manager, client in started:
        client.stop_channels()
        jp_asyncio_loop.run_until_complete(manager.shutdown_kernel(now=True))


@pytest.mark.slow
async def test_gpu_needs_no_load_ext(agent: FakeAgent, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the user has extensions configured, which stay; as text and as a table, and not on the last line alone."""
    profile = tmp_path / "ipython/profile_default"
    profile.mkdir(parents=True)
    (profile / "ipython_kernel_config.py").write_text('c.IPKernelApp.extensions = ["mine"]\nc.IPKernelApp.exec_lines = ["x = 5"]\n')
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    (tmp_path / "mine.py").write_text("def load_ipython_extension(shell): shell.push({'mine': 7})\n")
    run = await start([*PYTHON, "--IPKernelApp.extra_extensions=autoreload"])
    shown, printed = await run(ASK)
    assert "3 of 20 GiB used" in shown["data"]["text/plain"]
    assert "<table>" in shown["data"]["text/html"]
    assert "another one" in printed["text"]
    assert (await run("%autoreload 0\nprint(x, mine)"))[0]["text"] == "5 7\n"
    assert (await run("print([name for name in dir() if 'nbgpu' in name])"))[0]["text"] == "[]\n"


@pytest.mark.slow
async def test_a_server_without_a_gpu_says_so_and_how_to_get_one(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """In plain words, without a stack: by the magic, by the monitor's text, and by the error that a program meets."""
    monkeypatch.delenv("NBGPU_SOCKET", raising=False)
    monkeypatch.setenv("JUPYTERHUB_USER", "ada")
    words = "This server has no GPU slice. Stop it (File > Hub Control Panel, Stop My Server), and choose a fraction of a GPU"
    run = await start()
    shown, printed = await run(ASK)
    assert shown["data"]["text/plain"].startswith(words)
    assert "another one" in printed["text"]
    (error,) = await run("import nbgpu; nbgpu.slice()")
    assert [line.startswith(words) for line in error["traceback"]] == [True]
    (monitor,) = await run("display(nbgpu.SliceMonitor())")
    assert words in monitor["data"]["text/plain"]


@pytest.mark.slow
async def test_without_nbgpu_in_its_environment_a_kernel_is_as_ever(agent: FakeAgent, start: Start, python: Path, capfd: Any) -> None:
    """Control: `%gpu` is not there, and nothing is said of it."""
    script = python.with_name("python-elsewhere")
    script.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    run = await start([str(script), *PYTHON[1:]])
    (error, *_) = await run("%gpu")
    assert "magic function `%gpu` not found" in str(error)
    assert "nbgpu" not in capfd.readouterr().err


async def test_the_slice_as_numbers(agent: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    agent.kernel("me", 2 * GIB, milli=40)
    agent.limits["me"] = {"memory_bytes": 5 * GIB, "compute_milli": 125}
    seen = await asyncio.to_thread(nbgpu.slice)
    assert (seen.memory_limit_bytes, seen.memory_used_bytes, seen.memory_free_bytes) == (20 * GIB, 3 * GIB, 17 * GIB)
    assert (seen.mode, seen.simulated, seen.devices[0].kernel) == ("burst", True, None)
    monkeypatch.setenv("NBGPU_KERNEL_ID", "me")
    (device,) = (await asyncio.to_thread(nbgpu.slice)).devices
    assert device.kernel is not None
    assert (device.kernel.memory_used_bytes, device.kernel.memory_limit_bytes) == (2 * GIB, 5 * GIB)
    assert (device.kernel.compute_used_milli, device.kernel.compute_limit_milli) == (40, 125)
    assert device.memory_free_bytes == 3 * GIB, "its own limit is nearer than the slice's"
    agent.used_bytes = 25 * GIB
    assert (await asyncio.to_thread(nbgpu.slice)).memory_free_bytes == 0


def test_no_slice_has_no_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NBGPU_SOCKET", raising=False)
    with pytest.raises(NbgpuError) as none:
        nbgpu.slice()
    assert none.value.code == "no-slice"
    monkeypatch.setenv("NBGPU_SOCKET", str(tmp_path / "none.sock"))
    with pytest.raises(NbgpuError) as away:
        nbgpu.slice()
    assert away.value.code == "away"
