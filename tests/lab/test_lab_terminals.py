"""Terminals of a server that the hub started: the same shell, but none that sets PATH anew."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from lab_helpers import until

pytestmark = pytest.mark.skipif(sys.stdout.isatty(), reason="jupyter_server starts no login shells where its own output is a terminal")
OWN = ["/bin/sh", "-l", "-i"]


@pytest.fixture(autouse=True)
def shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A shell, and a PATH with something of the server's own."""
    monkeypatch.setenv("SHELL", "/bin/bash")
    monkeypatch.setenv("PATH", f"{tmp_path}/of-the-server:{os.environ['PATH']}")
    return tmp_path


def settled(serverapp: Any) -> Any:
    """Return the terminals' manager once what waits for the loop has run."""
    return serverapp.web_app.settings["terminal_manager"]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBGPU_PLAIN_TERMINALS", "1")


async def path_in_a_terminal(serverapp: Any, place: Path) -> str:
    """Return what a new terminal's PATH is."""
    name = settled(serverapp).create()["name"]
    terminal = settled(serverapp).get_terminal(name)
    told = place / "path"
    terminal.ptyproc.write(f'printf %s "$PATH" > {told}.new && mv {told}.new {told}\n')
    await until(told.exists, 20)
    await settled(serverapp).terminate(name, force=True)
    return told.read_text()


async def test_the_servers_path_is_found(plain: None, jp_serverapp: Any, shell: Path) -> None:
    await asyncio.sleep(0)
    assert settled(jp_serverapp).shell_command == ["/bin/bash"]
    assert f"{shell}/of-the-server" in await path_in_a_terminal(jp_serverapp, shell)


async def test_control_a_login_shell_loses_it(jp_serverapp: Any, shell: Path) -> None:
    await asyncio.sleep(0)
    assert settled(jp_serverapp).shell_command == ["/bin/bash", "-l"]
    (Path(os.environ["HOME"]) / ".bash_profile").write_text("PATH=/usr/bin:/bin\n")
    assert await path_in_a_terminal(jp_serverapp, shell) == "/usr/bin:/bin"


class TestAdmins:
    """What the admin or the user has configured, in whichever file, wins."""

    @pytest.fixture
    def jp_server_config(self) -> dict[str, object]:
        return {"ServerApp": {"jpserver_extensions": {"nbgpu_lab": True}, "terminado_settings": {"shell_command": OWN}}}

    async def test_own_shell(self, plain: None, jp_serverapp: Any) -> None:
        await asyncio.sleep(0)
        assert settled(jp_serverapp).shell_command == OWN
