"""`make run`, once everything is set up: what it says, a server in a slice, and that Ctrl-C ends all of it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hub_process import ROOT, Browser, proxy_command, until
from ports import free_port

from nbgpu.client import AgentClient, PoolClient
from nbgpu.models import GrantState, Owner, Request
from nbgpu_agent.simulated import _directory  # pyright: ignore[reportPrivateUsage]

LIB = ROOT / "nodeagent" / "nbgpu_agent" / "_lib"
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not (LIB / "libnbgpu.so").exists(), reason="C libraries are not built (make setup)"),
    pytest.mark.skipif(proxy_command() is None, reason="configurable-http-proxy is not installed"),
]


class Running:
    """`tools/run.py` as `make run` starts it, in a folder of its own."""

    def __init__(self, place: Path, port: int):
        self.place, self.port = place, port
        binaries = [str(Path(sys.executable).parent), str(ROOT / "node_modules" / ".bin")]
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("NBGPU_")},
            "PATH": os.pathsep.join([*binaries, os.environ["PATH"]]),
            "NBGPU_RUNTIME_DIR": str(place / "run"),
        }
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tools" / "run.py"), "--port", str(port), "--folder", str(place / "work")],
            cwd=ROOT, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        self.said: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)

    @property
    def text(self) -> str:
        return "".join(self.said)

    def ready(self) -> float:
        """Wait until it says how to reach it; return after how many seconds."""
        until(lambda: "Stop:" in self.text or self.process.poll() is not None, 120, "it says where it is")
        assert "nbgpu is ready" in self.text, self.text
        return time.monotonic() - self.began

    def left(self) -> dict[int, str]:
        """Return the living processes that it started: the folder of the test is in the environment of all."""
        mark = f"{self.place}/".encode()
        found: dict[int, str] = {}
        for entry in os.listdir("/proc"):
            try:
                if entry.isdigit() and mark in Path(f"/proc/{entry}/environ").read_bytes():
                    found[int(entry)] = Path(f"/proc/{entry}/cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
        return found

    def end(self, number: int = signal.SIGINT) -> int:
        """End it by a signal; return its exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nbgpu-run-", dir="/tmp") as name:
        yield Path(name)


def start_server(running: Running, password: str, name: str = "ada", profile: str = "eighth") -> None:
    """Log in and take an eighth, as a browser without JavaScript would."""
    http = httpx.Client(base_url=f"http://127.0.0.1:{running.port}/hub/", follow_redirects=True, timeout=60)

    login = {"username": name, "password": password, "_xsrf": Browser.token(http.get("login").text)}
    page = http.post("login", data=login, headers={"Sec-Fetch-Mode": "navigate"})
    assert "How much of a GPU do you need?" in page.text
    chosen = http.post(f"spawn/{name}", params={"_xsrf": Browser.token(page.text)}, data={"profile": profile}, follow_redirects=False)
    assert chosen.status_code == 302, chosen.text


def test_it_says_how_to_log_in_and_ends_all_that_it_started(place: Path) -> None:
    port = free_port()
    first = Running(place, port)
    try:
        first.ready()
        assert f"http://127.0.0.1:{port}/" in first.text
        (password,) = re.findall(r"password: (\S+)", first.text)
        if "simulated" in first.text:
            assert "2 simulated GPUs, 80 GiB each: no NVIDIA driver on this machine" in first.text
        start_server(first, password)
        agent = AgentClient(place / "run" / "agent.sock", 10)
        until(lambda: any(one.state == "running" for one in agent.slices().slices), 60, "ada's server runs in its slice")
        simulated_machine = _directory(place / "run")
        assert simulated_machine.exists() == ("simulated" in first.text), "control"
        kinds = " ".join(first.left().values())
        for part in ("tools/run.py", "-m jupyterhub", "configurable-http-proxy", "nbgpu_agent", "nbgpu_pool", "singleuser"):
            assert part in kinds, f"control: {part} runs now"
        second = Running(place, free_port())
        assert second.process.wait(60) == 1
        until(lambda: f"nbgpu runs already, at http://127.0.0.1:{port}/." in second.text, 5, "that there is one")
        assert agent.slices().slices, "and the first goes on"
        assert httpx.get(f"http://127.0.0.1:{port}/hub/health").status_code == 200
        assert first.end() == 0
        until(lambda: "All stopped." in first.text, 5, f"it says that all has ended: {first.text[-500:]}")
        assert first.left() == {}
        assert list((place / "run" / "slices").iterdir()) == [], "no slice is left"
        assert not (place / "run" / "lib").exists(), "nor what its programs map"
        assert not simulated_machine.exists()

        again = Running(place, port)
        try:
            print(f"the second start took {again.ready():.1f} s")
            assert f"password: {password}" in again.text, "who has logged in once can do so again"
        finally:
            assert again.end(signal.SIGTERM) == 0
        assert again.left() == {}
    finally:
        if first.process.poll() is None:
            first.end()


def test_who_waits_is_not_granted_while_it_stops(place: Path) -> None:
    running = Running(place, free_port())
    try:
        running.ready()
        (password,) = re.findall(r"password: (\S+)", running.text)
        pool = PoolClient(place / "run" / "pool.sock", 10)
        start_server(running, password, "ada", "whole")
        agent = AgentClient(place / "run" / "agent.sock", 10)
        until(lambda: any(one.state == "running" for one in agent.slices().slices), 60, "ada's server runs in its slice")
        for number in range(len(pool.devices()) - 1):
            other = Owner(hub="test", user=f"other-{number}")
            pool.acquire(Request(request_id=f"other-{number}-gpu", owner=other, device_count=1, compute_milli=1000, memory_milli=1000))
        start_server(running, password, "grace", "whole")
        until(lambda: [one.state for one in pool.grants()].count(GrantState.queued) == 1, 20, "grace waits")
        assert running.end() == 0
        until(lambda: "All stopped." in running.text, 5, f"it says that all has ended: {running.text[-500:]}")
        log = (place / "work" / "hub.log").read_text(errors="replace")
        granted = re.findall(r"granted (\S+) \S*ada", log)
        assert len(granted) == 1, "control: that is how the log says it"
        assert not re.findall(r"granted (\S+) \S*grace", log), "nobody is granted while it stops"
        assert "after Future was cancelled" not in log + running.text
        assert list((place / "run" / "slices").iterdir()) == [], "no slice is left"
        assert not (place / "run" / "lib").exists(), "nor what its programs map"
        assert not _directory(place / "run").exists()
        assert running.left() == {}
    finally:
        if running.process.poll() is None:
            running.end()


def test_a_taken_port_is_one_clear_line(place: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        running = Running(place, port)
        assert running.process.wait(60) == 1
        until(lambda: "make run PORT=" in running.text, 5, "what to do")
        assert f"Port {port} is taken by another program." in running.text
        assert "Traceback" not in running.text
        assert running.left() == {}


def test_another_installations_agent_is_not_taken_over(place: Path) -> None:
    """A hub ends the agent that serves its directory; this one may be a real installation's, or the chart's."""
    runtime = place / "run"
    runtime.mkdir(parents=True)
    listen = f"import socket, time; s = socket.socket(socket.AF_UNIX); s.bind({str(runtime / 'agent.sock')!r}); s.listen(); time.sleep(100)"
    other = subprocess.Popen(["/usr/bin/env", "python3", "-c", listen])
    try:
        until((runtime / "agent.sock").exists, 10, "somebody serves there")
        running = Running(place, free_port())
        assert running.process.wait(60) == 1
        until(lambda: "NBGPU_RUNTIME_DIR=" in running.text, 5, "what to do")
        assert f"pid {other.pid}) serves {runtime}" in running.text
        assert "Traceback" not in running.text
        assert other.poll() is None
        assert running.left() == {}
    finally:
        other.kill()
        other.wait()
