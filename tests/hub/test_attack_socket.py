"""A tenant at its slice's socket, beyond what `test_agent_hostile` has: slow, half-closed, endless; and its neighbour."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agent_harness import AgentProcess, missing_libraries, own_agent, slice_client, until, usage

from nbgpu.errors import NbgpuError
from nbgpu.http import HEAD_SECONDS
from nbgpu.models import Launch
from nbgpu_agent import layout
from nbgpu_agent.events import KEPT
from nbgpu_agent.main import SLICE_BOUNDS

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(missing_libraries() is not None, reason=str(missing_libraries()))]
CONNECTIONS = SLICE_BOUNDS.connections
HEAD = b"GET %s HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    with own_agent() as process:
        yield process
        assert "Traceback" not in process.log.read_text()


@pytest.fixture
def launch(agent: AgentProcess) -> Iterator[Launch]:
    yield agent.put(agent.slice(125))
    for slice_id in agent.slices():
        agent.delete(slice_id)
    until(lambda: not agent.slices(), 5, "the end of all slices")


@pytest.fixture
def other(agent: AgentProcess, launch: Launch) -> Launch:
    return agent.put(agent.slice(125, user="grace"))


def connect(path: str, count: int = 1) -> list[socket.socket]:
    """Connect so often, no faster than the door opens."""
    made = []
    for _ in range(count):
        made.append(socket.socket(socket.AF_UNIX))
        made[-1].settimeout(5)
        made[-1].connect(path)
        time.sleep(0.012)
    return made


def answers(launch: Launch) -> bool:
    """Return whether a slice's API serves now."""
    with contextlib.suppress(NbgpuError):
        return bool(usage(launch))
    return False


def is_closed(one: socket.socket) -> bool:
    """Return whether the agent closed a connection, whatever it said before."""
    one.setblocking(False)
    try:
        while one.recv(65536):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def rss_mb(agent: AgentProcess) -> float:
    assert agent.process is not None
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{agent.process.pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


def times(launch: Launch, count: int = 25) -> list[float]:
    """Return how long a slice's usage takes to come, shortest first, seconds."""
    found = []
    for _ in range(count):
        began = time.monotonic()
        usage(launch)
        found.append(time.monotonic() - began)
        time.sleep(0.02)
    return sorted(found)


def test_slow_heads_on_every_connection(launch: Launch, other: Launch) -> None:
    slow = connect(launch.socket, CONNECTIONS)
    began = time.monotonic()
    while time.monotonic() - began < HEAD_SECONDS - 1.5:  # a byte a second on each
        for one in slow:
            one.send(b"G")
        assert answers(other)
        assert not answers(launch), "control: all its connections are taken"
        time.sleep(1)
    until(lambda: all(map(is_closed, slow)), 4, "the end of those that never came to the point")
    until(lambda: answers(launch), 3, "the slice's own answer")


@pytest.mark.parametrize("begin", [b"", b"GET /v1/us", HEAD % b"/v1/usage"], ids=["nothing", "half a head", "a request"])
def test_half_closed(agent: AgentProcess, launch: Launch, other: Launch, begin: bytes) -> None:
    made = connect(launch.socket, CONNECTIONS - 2)
    for one in made:
        one.sendall(begin)
        one.shutdown(socket.SHUT_WR)
    until(lambda: all(map(is_closed, made)), 2, "the end of connections that will say nothing more")
    until(lambda: answers(launch), 3, "the slice's own answer")
    assert answers(other)


def test_many_requests_in_one_breath(agent: AgentProcess, launch: Launch, other: Launch) -> None:
    def said(path: str, target: bytes) -> bytes:
        (one,) = connect(path)
        found = b""
        with contextlib.suppress(OSError):
            one.sendall((HEAD % target) * 299 + (HEAD % target).replace(b"Host: a", b"Connection: close\r\nHost: a"))
            while part := one.recv(65536):
                found += part
        return found

    own = said(launch.socket, b"/v1/slice")
    assert own.count(b"HTTP/1.1 200") <= SLICE_BOUNDS.requests_per_second + 5  # type: ignore[operator]
    assert own.count(b"HTTP/1.1 429") == 1, "then it is closed"
    assert answers(other)
    assert said(str(agent.runtime / "agent.sock"), b"/healthz").count(b"HTTP/1.1 200") == 300, "control: where there is no rate"
    until(lambda: answers(launch), 3, "the slice's own answer")


def test_heads_that_are_too_long(agent: AgentProcess, launch: Launch, other: Launch) -> None:
    before = rss_mb(agent)
    for head in (
        b"GET /v1/usage HTTP/1.1\r\nX: " + b"x" * 8_000_000,
        b"GET /v1/usage HTTP/1.1\r\n" + b"X-Much: more\r\n" * 500_000,
        b"G" * 8_000_000,
    ):
        (one,) = connect(launch.socket)
        sent = 0
        with contextlib.suppress(OSError):
            while sent < len(head):
                sent += one.send(head[sent : sent + 65536])
        assert sent < len(head), "it was not read to its end"
    assert rss_mb(agent) < before + 16
    assert answers(other)


def test_waiting_on_every_connection(agent: AgentProcess, launch: Launch, other: Launch) -> None:
    """Also by those who leave and come again: what they asked for is still waited for, and counts."""
    before = rss_mb(agent)
    waiting = connect(launch.socket, CONNECTIONS)
    last = (agent.events() or [{"id": 0}])[-1]["id"]
    for one in waiting:
        one.sendall(HEAD % (b"/v1/events?wait_seconds=2&after=%d" % last))
    time.sleep(0.2)
    assert not answers(launch), "control: all its connections are taken"
    assert answers(other)
    for one in waiting:
        one.close()
    time.sleep(0.2)
    assert not answers(launch), "the requests of those who left are still there"
    assert answers(other)
    assert rss_mb(agent) < before + 16
    until(lambda: answers(launch), 5, "the slice's own answer")


def test_who_never_reads(agent: AgentProcess, launch: Launch, other: Launch) -> None:
    before = rss_mb(agent)
    deaf = connect(launch.socket, CONNECTIONS)
    for one in deaf:
        one.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            one.send((HEAD % b"/v1/history") * 500)
    assert times(other, 10)[-1] < 1
    assert rss_mb(agent) < before + 32
    for one in deaf:
        one.close()


def test_endless_kernel_ids(agent: AgentProcess, launch: Launch, other: Launch) -> None:
    """By its own socket a slice gets some 50 a second in; so the rest comes by the admin's, into the same books."""
    own = slice_client(launch)
    slice_id = Path(launch.slice_dir).name
    kept: list[int] = []
    taken, began = 0, time.monotonic()
    while time.monotonic() - began < 1:
        with contextlib.suppress(NbgpuError):
            own.call("PUT", f"/v1/kernels/own-{taken}", {"memory_bytes": 2**30})
            taken += 1
    assert taken <= SLICE_BOUNDS.requests_per_second * 2.5  # type: ignore[operator]
    before = rss_mb(agent)
    (admin,) = connect(str(agent.runtime / "agent.sock"))
    body = b'{"memory_bytes": 1073741824}'
    for batch in range(10):
        for number in range(20):
            head = b"PUT /v1/slices/%s/kernels/%d-%d HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            admin.sendall(head % (slice_id.encode(), batch, number, len(body)) + body)
            answer = b""
            while not answer.endswith(b"}"):
                answer += admin.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200")
        kept.append(Path(launch.slice_dir, "slice.json").stat().st_size)
    until(lambda: answers(launch), 3, "the slice's own answer")
    assert len(own.call("GET", "/v1/kernels")) == layout.KERNELS
    assert len(usage(launch).kernels) == layout.KERNELS
    assert kept[-1] < kept[0] + 1000, "its file does not grow"
    assert len([one for one in agent.events() if one["slice_id"] == slice_id]) <= KEPT
    assert rss_mb(agent) < before + 8
    assert answers(other)


def _ask_and_ask(path: str, stop: threading.Event) -> None:
    while not stop.is_set():
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as one:
            one.settimeout(0.5)
            one.connect(path)
            for _ in range(20):
                one.sendall(HEAD % b"/v1/usage")
                one.recv(4096)
        time.sleep(0.001)


def _in_one_breath(path: str, stop: threading.Event) -> None:
    while not stop.is_set():
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as one:
            one.settimeout(0.2)
            one.connect(path)
            one.sendall((HEAD % b"/v1/history") * 500)
        time.sleep(0.001)


def _junk(path: str, stop: threading.Event) -> None:
    while not stop.is_set():
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as one:
            one.settimeout(0.2)
            one.connect(path)
            one.sendall(b"\x00" * 10_000)
        time.sleep(0.001)


def _come_and_wait(path: str, stop: threading.Event) -> None:
    while not stop.is_set():
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as one:
            one.connect(path)
            one.sendall(HEAD % b"/v1/events?wait_seconds=30&after=9000000000000000")
        time.sleep(0.001)


@pytest.mark.parametrize("attack", [_ask_and_ask, _in_one_breath, _junk, _come_and_wait])
def test_a_neighbour_notices_nothing(launch: Launch, other: Launch, attack: Callable[[str, threading.Event], None]) -> None:
    calm = times(other)
    stop = threading.Event()
    floods = [threading.Thread(target=attack, args=(launch.socket, stop), daemon=True) for _ in range(3)]
    for flood in floods:
        flood.start()
    try:
        seen = times(other)
    finally:
        stop.set()
        for flood in floods:
            flood.join()
    print(f"{attack.__name__}: calm {calm[-2] * 1000:.1f} ms, in the flood {seen[-2] * 1000:.1f} ms (98th percentile)")
    assert seen[-2] < max(20 * calm[-2], 0.2)
    until(lambda: answers(launch) or attack is _come_and_wait, 5, "the slice's own answer")


def _gone(path: Path) -> None:
    path.unlink()


def _a_file(path: Path) -> None:
    path.unlink()
    path.write_text("not a socket")


def _a_directory(path: Path) -> None:
    path.unlink()
    (path / "with" / "more").mkdir(parents=True)


def _a_link(path: Path) -> None:
    target = path.parent.parent.parent / "precious"
    target.write_text("kept")
    path.unlink()
    path.symlink_to(target)


def _anothers_socket(path: Path) -> None:
    path.unlink()
    one = socket.socket(socket.AF_UNIX)
    one.bind(str(path))
    one.listen(1)


def test_the_socket_replaced(agent: AgentProcess, other: Launch) -> None:
    """Only who shares the agent's account can (`test_agent_hostile` has the others); it costs that slice alone, until a restart."""
    launches = [agent.put(agent.slice(50, device=1)) for _ in range(5)]
    for launch, replace in zip(launches, (_gone, _a_file, _a_directory, _a_link, _anothers_socket), strict=True):
        assert answers(launch)
        replace(Path(launch.socket))
    assert answers(other)
    assert len(agent.slices()) == len(launches) + 2
    agent.delete(Path(launches[0].slice_dir).name)
    agent.stop(signal.SIGKILL)
    agent.start()
    assert answers(other)
    assert all(map(answers, launches[1:])), "an agent that starts puts its own sockets there"
    assert (agent.runtime / "precious").read_text() == "kept"
