"""Names made to be taken for something else: markup, a terminal's commands, another line of a log, another label of a metric."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from agent_harness import AgentProcess, Tenant, missing_libraries, own_agent, slice_client, tenants, usage
from pool_process import PoolProcess
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.errors import MarkupError

from nbgpu.errors import NbgpuError
from nbgpu.logs import one_line
from nbgpu.models import Launch, Owner, Request
from nbgpu.quantities import GIB
from nbgpu_agent import layout

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(missing_libraries() is not None, reason=str(missing_libraries()))]
NAMES = [
    "[/]", "[bold red]x[/bold red]", ":bomb:",
    "\x1b[2J\x1b]0;owned\x07", "\x9b2J", "a\nb\r\n2026-01-01 00:00:00,000 nbgpu.pool INFO forged",
    '<img src=x onerror=alert(1)>', '"} 1\nevil{x="', "back\\slash\\n", "\u202eright to left", "nul\0", "x" * 255,
]  # fmt: skip
LOG_LINE = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ")


class Place:
    """An agent, a pool, and a slice for each name, of a user and of a server."""

    def __init__(self, agent: AgentProcess, pool: PoolProcess):
        self.agent, self.pool = agent, pool
        self.launches: dict[str, Launch] = {}
        for name in NAMES:
            request = Request(request_id=uuid4().hex, owner=Owner(hub=name, user=name, server=name), groups=[name], compute_milli=50)
            pool.client.acquire(request)
            self.launches[name] = pool.client.prepare(request.request_id, None)
        waiting = Request(request_id=uuid4().hex, owner=Owner(hub="h", user="[/]\x1b[2J", server=""), device_count=2, compute_milli=1000)
        assert pool.client.acquire(waiting).state == "queued"

    def metrics(self) -> str:
        """Return the agent's page for Prometheus."""
        with httpx.Client(transport=httpx.HTTPTransport(verify=False, uds=str(self.agent.runtime / "agent.sock"))) as client:
            return client.get("http://agent/metrics").text

    def nbgpu(self, *words: str, own: Launch | None = None) -> subprocess.CompletedProcess[bytes]:
        """Run the command line, its output into a pipe."""
        return subprocess.run([sys.executable, "-m", "nbgpu", *words], env=self.env(own), capture_output=True, timeout=60)

    def env(self, own: Launch | None) -> dict[str, str]:
        names = ("NBGPU_SOCKET", "LD_PRELOAD", "NBGPU_SLICE_DIR", "NO_COLOR")
        env = {name: value for name, value in self.agent.env.items() if name not in names}
        env |= {"NBGPU_RUNTIME_DIR": str(self.agent.runtime), "TERM": "xterm-256color", "COLUMNS": "300", "PYTHONIOENCODING": "utf-8"}
        return env | ({"NBGPU_SOCKET": own.socket} if own else {})


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with own_agent() as agent:
        pool = PoolProcess(agent.runtime)
        pool.start()
        try:
            yield Place(agent, pool)
        finally:
            pool.kill(signal.SIGTERM)


def test_status_prints_names_as_they_are(place: Place) -> None:
    done = place.nbgpu("status")
    assert done.returncode == 0, done.stderr.decode()
    text = done.stdout.decode()
    assert all(char.isprintable() or char == "\n" for char in text), ascii(text)
    for name in NAMES[:6]:
        assert one_line(name) in text, name
    with pytest.raises(MarkupError):  # control: what becomes of such a name where it is taken for markup
        Console(file=io.StringIO()).print("[/]")
    found = json.loads(place.nbgpu("status", "--json").stdout)
    assert {one["slice"]["owner"]["user"] for one in found["slices"]} == set(NAMES), "for programs they are whole"


def test_a_terminal_gets_no_command_of_theirs(place: Place) -> None:
    """Into a terminal the tables have colours; nothing else begins with an escape."""
    master, slave = pty.openpty()
    with subprocess.Popen([sys.executable, "-m", "nbgpu", "status"], env=place.env(None), stdout=slave, stderr=slave) as process:
        os.close(slave)
        seen = b""
        while True:
            try:
                part = os.read(master, 65536)
            except OSError:  # the other end is closed
                break
            seen += part
            if not part:
                break
        assert process.wait(30) == 0, seen
    os.close(master)
    colours = re.compile(rb"\x1b\[[0-9;]*m")
    assert colours.search(seen), "control: it did take the pipe for a terminal"
    rest = colours.sub(b"", seen).decode()
    assert all(char.isprintable() or char in "\r\n" for char in rest), ascii(rest)


def test_errors_are_one_line(place: Place) -> None:
    done = place.nbgpu("limit", "--slice", "\x1b[2J\nforged")
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert b"\x1b" not in done.stderr
    several = place.nbgpu("resume", "--all")  # names all slices with their owners
    assert several.returncode == 1
    assert several.stderr.count(b"\n") == 1
    assert b"\x1b" not in several.stderr
    listed = place.nbgpu("limit")  # so does this
    assert listed.returncode == 0
    assert listed.stdout
    assert all(char.isprintable() or char == "\n" for char in listed.stdout.decode())


def test_metrics_have_no_series_of_theirs(place: Place) -> None:
    text = place.metrics()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert not [name for name in families if not name.startswith("nbgpu_")]
    users = [sample.labels["user"] for sample in families["nbgpu_slice_processes"].samples]
    # The parser, as Prometheus, reads what was escaped back.
    assert sorted(users) == sorted(NAMES)
    assert "evil" not in {sample.name for family in families.values() for sample in family.samples}


def test_each_event_is_one_line_of_the_logs(place: Place) -> None:
    for path in (place.agent.log, place.agent.runtime / "pool.log"):
        # decoded as they are: \x85 and others are ends of lines to some readers
        text = path.read_bytes().decode()
        lines = text.split("\n")[:-1]
        assert len(lines) > len(NAMES)
        assert [line for line in lines if not LOG_LINE.match(line)] == []
        assert all(char.isprintable() or char == "\n" for char in text)
        assert not [line for line in lines if line.startswith("2026-01-01")]


@pytest.fixture
def make() -> Iterator[Callable[..., Tenant]]:
    with tenants() as found:
        yield found


IDS = ["\x1b[2J", "a\nb", "<b>[/]</b>", 'x"} evil{', "x" * (layout.KERNEL_ID_BYTES - 1) + "y"]


@pytest.mark.parametrize("kernel_id", IDS, ids=[ascii(one)[:16] for one in IDS])
def test_kernel_ids_in_shared_memory(place: Place, make: Callable[..., Tenant], kernel_id: str) -> None:
    """A tenant writes any bytes as its kernel's id: what is no id is shown as none, and said once; its memory counts all the same."""
    launch = place.agent.put(place.agent.slice(50, device=1, user="mallory"))
    one = make(launch)
    one.do("used", GIB)
    one.do("raw", layout.Use.slot.offset + layout.UseSlot.kernel_id.offset, kernel_id.encode().hex())
    seen = usage(launch)
    assert [kernel.kernel_id for kernel in seen.kernels] == [None]
    assert seen.devices[0].memory_used_bytes == GIB
    status = place.nbgpu("limit", own=launch)
    assert status.returncode == 0
    assert b"(other)" in status.stdout
    assert b"\x1b" not in status.stdout
    families = text_string_to_metric_families(place.metrics())
    assert kernel_id not in {label for family in families for sample in family.samples for label in sample.labels.values()}
    control = "kernel-1"
    one.do("raw", layout.Use.slot.offset + layout.UseSlot.kernel_id.offset, control.encode().hex() + "00" * (layout.KERNEL_ID_BYTES - 8))
    assert [kernel.kernel_id for kernel in usage(launch).kernels] == [control], "control: what is one is shown"
    one.kill()
    place.agent.delete(Path(launch.slice_dir).name)


def test_kernel_ids_by_the_socket(place: Place) -> None:
    launch = next(iter(place.launches.values()))
    own = slice_client(launch)
    for path in ("%1b%5b2J", "a%0ab", "%3Cb%3E", "..%2f..%2fetc", "x" * 40, "x" * 10_000, "%00", "%ff", "[/]", "%5B/%5D"):
        with pytest.raises(NbgpuError) as refused:
            own.call("PUT", f"/v1/kernels/{path}", {"memory_bytes": GIB})
        assert refused.value.status in (400, 404), path
        assert len(refused.value.message) < 300, "it is not repeated whole"
        assert refused.value.message.isprintable()
    assert own.call("GET", "/v1/kernels") == {}
    assert own.call("PUT", "/v1/kernels/kernel-1", {"memory_bytes": GIB})["memory_bytes"] == GIB, "control"
