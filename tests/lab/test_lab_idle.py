"""Two people with a Jupyter server each and one GPU: ada goes to lunch, grace starts on her memory, ada's cell waits and loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_lab_slice import LIBRARIES, ROOT, Kernel, Server, environment, terminal, wait_for

from nbgpu.client import AgentClient
from nbgpu_agent import layout
from nbgpu_lab.kernel_wait import AWAY_AT, FLAG_AT, GIVEN_UP, LIMIT_AT, MOVED_WAITS, SLOTS, WAITS, waiting_words

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not (LIBRARIES / "sim" / "libcuda.so.1").exists(), reason="C libraries not built: make setup"),
]
PATHS = [str(ROOT / "tests/hub"), str(ROOT / "tests/limiter")]
HOLD = f"import sys; sys.path[:0] = {PATHS!r}; import idle_program; k = idle_program.Kernel()"
WORK = """
import threading, time
def work():
    while True:
        k.launch()
        time.sleep(0.05)
threading.Thread(target=work, daemon=True).start()
"""


class Place:
    """A pool and an agent that park slices after a second, and the servers of their users."""

    def __init__(self) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="nbgpu-idle-"))  # short: it holds Unix sockets
        self.parts: list[subprocess.Popen[bytes]] = []
        self.log = (self.base / "log").open("w")
        self.runtime = self.base / "nbgpu"
        self.runtime.mkdir()
        self.env = {"NBGPU_RUNTIME_DIR": str(self.runtime), "NBGPU_SIM_STATE": f"/dev/shm/{self.base.name}"}
        config = self.base / "pool.yaml"
        config.write_text("idle: {after_seconds: 1}\n")
        path = os.pathsep.join(str(ROOT / part) for part in ("", "spawner", "nodeagent", "labextension"))
        self.whole_env = env = {**os.environ, **self.env, "PYTHONPATH": path}
        self.start(env, "nbgpu_agent", "--simulate", "--sim-devices", "1", "--idle-host-memory", "64 GiB")
        wait_for("the agent", (self.runtime / "agent.sock").exists, 30)
        self.start(env, "nbgpu_pool", "--config", str(config))
        wait_for("the pool", (self.runtime / "pool.sock").exists, 30)
        self.agent = AgentClient(self.runtime / "agent.sock")

    def start(self, env: dict[str, str], *arguments: str) -> subprocess.Popen[bytes]:
        self.parts.append(subprocess.Popen([sys.executable, "-m", *arguments], env=env, stdout=self.log, stderr=self.log))
        return self.parts[-1]

    def server(self, user: str, module: str = "jupyter_server", *more: str) -> tuple[Server, subprocess.Popen[bytes]]:
        """Start somebody's Jupyter server with the whole GPU; it waits until it gets it."""
        base = self.base / user
        (base / "notebooks").mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            found = Server(base, probe.getsockname()[1])
        options = [f"--port={found.port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=secret", "--allow-root", "--no-browser"]
        jupyter = [sys.executable, "-m", module, *options, f"--ServerApp.root_dir={base / 'notebooks'}", *more]
        env = {**environment(base), **self.env, "JUPYTER_PATH": str(base), "HOME": str(base)}
        return found, self.start(env, "nbgpu", "run", "--gpu", "1", "--", *jupyter)

    def states(self) -> list[str]:
        """Return where each slice is."""
        return [one.idle.state if one.idle is not None else "" for one in self.agent.slices().slices]

    def close(self) -> None:
        for part in reversed(self.parts):
            part.terminate()
            part.wait(30)
        self.log.close()
        print((self.base / "log").read_text()[-6000:])
        Path(self.env["NBGPU_SIM_STATE"]).unlink(missing_ok=True)
        shutil.rmtree(self.base, ignore_errors=True)


@pytest.fixture
def place() -> Iterator[Place]:
    found = Place()
    yield found
    found.close()


def begin(kernel: Kernel, code: str) -> str:
    """Run a cell without waiting for it; return its message's id."""
    return kernel.client.execute(code)


def told(kernel: Kernel, message_id: str, word: str, seconds: float = 60) -> str:
    """Return what a cell has printed once `word` is among it."""
    printed, deadline = "", time.monotonic() + seconds
    while word not in printed:
        assert time.monotonic() < deadline, printed
        message: dict[str, Any] = kernel.client.get_iopub_msg(timeout=seconds)
        if message["parent_header"].get("msg_id") == message_id:
            content = message["content"]
            printed += content.get("text", "") + content.get("data", {}).get("text/plain", "")
    return printed


def kinds_of(server: Server) -> list[str]:
    """Return what a server was told of its idle slice."""
    kinds = [notice["kind"] for notice in server.call("nbgpu/api/events?after=0")]
    return [kind for kind in kinds if kind in ("parked", "wanting", "restored", "lost")]


def test_who_waited_before_is_told() -> None:
    assert waiting_words(None) == waiting_words(1) == WAITS
    assert waiting_words(2).endswith("1 other server waited for the same GPU before.")
    assert waiting_words(3).endswith("2 other servers waited for the same GPU before.")


def test_where_the_limit_is() -> None:
    assert layout.Ctl.device.offset + layout.CtlDevice.mem_limit.offset == LIMIT_AT
    assert (layout.Ctl.kernels_away.offset, layout.Ctl.away.offset, layout.SLOTS) == (FLAG_AT, AWAY_AT, SLOTS)


def test_ada_goes_to_lunch(place: Place) -> None:
    ada, _ = place.server("ada")
    wait_for("ada's server", ada.answers, 60)
    notebook = ada.open("ada.ipynb")
    notebook.run(HOLD)
    before = notebook.run("print(k.hold(idle_program.lunch_mib()))")

    grace, of_grace = place.server("grace")  # who waits for the GPU that ada does not use
    wait_for("grace's server", grace.answers, 90)
    assert sorted(place.states()) == ["held", "parked"]
    assert ada.usage()["devices"][0]["memory_used_bytes"] == 0
    hers = grace.open("grace.ipynb")
    hers.run(HOLD)
    hers.run("print(k.hold(16 * 1024))")
    hers.run(WORK)  # a notebook that trains in the background is not idle

    cell = begin(notebook, "ran = True; print(k.sum())")
    told(notebook, cell, WAITS)
    ada.call(f"api/kernels/{notebook.id}/interrupt", {}, "POST")
    assert notebook.client.get_shell_msg(timeout=20)["content"]["status"] == "error", GIVEN_UP
    assert sorted(place.states()) == ["held", "parked"]
    cell = begin(notebook, "print(k.sum())")
    told(notebook, cell, WAITS)
    of_grace.send_signal(signal.SIGTERM)
    assert before.strip() in told(notebook, cell, before.strip(), 90)
    wait_for("the notice that it is back", lambda: kinds_of(ada)[-1] == "restored", 10)
    assert kinds_of(ada) == ["parked", "wanting", "restored"]
    assert notebook.run("print('ran' in globals())").strip() == "False", "the cell that was interrupted did not run"


def test_one_notebook_makes_room_for_the_other(place: Place) -> None:
    ada, _ = place.server("ada")
    wait_for("ada's server", ada.answers, 60)
    one, two = ada.open("one.ipynb"), ada.open("two.ipynb")
    one.run(HOLD)
    two.run(HOLD)
    most = ada.usage()["devices"][0]["memory_limit_bytes"] // 2**20
    held = int(one.run("print(idle_program.lunch_mib())"))
    before = one.run(f"print(k.hold({held}))")
    assert two.run(f"print(k.more({most - held // 2}))").strip() == "2", "the control"

    def moved() -> bool:
        try:
            return ada.call(f"nbgpu/api/kernels/{one.id}/suspend", {}, "POST")["phase"] == "parked"
        except urllib.error.HTTPError:  # what ran a moment ago may still be counted
            return False

    wait_for("its memory is in the host's", moved, 30)
    assert two.run(f"print(k.more({most - held // 2}))").strip() == "0"
    cell = begin(one, "ran = True; print(k.sum())")
    told(one, cell, MOVED_WAITS)
    ada.call(f"api/kernels/{one.id}/interrupt", {}, "POST")
    assert one.client.get_shell_msg(timeout=20)["content"]["status"] == "error", GIVEN_UP
    time.sleep(1)  # ipykernel aborts what comes right behind an error
    cell = begin(one, "print(k.sum())")
    told(one, cell, MOVED_WAITS)

    def notices() -> list[str]:
        return [notice["message"] for notice in ada.call("nbgpu/api/events?after=0") if notice["kind"] == "wanting-memory"]

    wait_for("the notice that says what to do", notices, 15)
    assert notices()[0].startswith("one.ipynb waits for its memory: it needs")
    two.run("k.less()")
    assert before.strip() in told(one, cell, before.strip(), 60)
    assert one.run("print('ran' in globals())").strip() == "False", "the cell that was interrupted did not run"
    assert len(notices()) == 1


def test_the_command_line_moves_a_notebooks_memory_to_the_host_and_back(place: Place) -> None:
    """`nbgpu suspend NOTEBOOK`, as typed in a terminal of the server; the driver moves what the notebook's kernel holds."""
    ada, _ = place.server("ada")
    wait_for("ada's server", ada.answers, 60)
    one, shell = ada.open("one.ipynb"), ada.open("shell.ipynb")
    one.run(HOLD)
    before = one.run("print(k.hold(256))").strip()
    held = wait_for("what it holds", lambda: sum(part["memory_used_bytes"] for part in ada.kernel(one.id)["devices"]), 10)
    assert "No kernel is called 'nobody.ipynb'" in terminal(shell, "suspend", "nobody.ipynb"), "the control"
    assert "shell.ipynb holds no GPU memory here." in terminal(shell, "suspend", "shell")

    def moved() -> bool:
        said = terminal(shell, "suspend", "one")
        return said.startswith("one.ipynb: ") and "`nbgpu resume one.ipynb` brings it back" in said

    wait_for("what ran a moment ago is not counted any more", moved, 30)
    wait_for("its memory is in the host's", lambda: (away := ada.kernel(one.id)["away"]) and away["phase"] == "parked", 30)
    assert ada.kernel(one.id)["away"]["memory_bytes"] >= held
    assert ada.usage()["devices"][0]["memory_used_bytes"] < held
    listed = json.loads(terminal(shell, "suspend", "one.ipynb", "--json"))
    assert (listed["kernel_id"], listed["path"], listed["away"]["phase"]) == (one.id, "one.ipynb", "parked")
    assert "in host memory" in terminal(shell, "limit")
    assert terminal(shell, "resume", "one").startswith("one.ipynb: ")
    wait_for("its memory is back", lambda: ada.kernel(one.id)["away"] is None, 30)
    assert one.run("print(k.sum())").strip() == before, "nothing is lost"
