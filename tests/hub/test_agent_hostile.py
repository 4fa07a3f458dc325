"""What a tenant may try against the agent: its `use` file, its socket, its neighbours' files. And junk for both APIs."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agent_harness import AgentProcess, Tenant, missing_libraries, own_agent, slice_client, tenants, until, usage

from nbgpu.errors import NbgpuError, Unavailable
from nbgpu.models import Launch
from nbgpu.quantities import GIB
from nbgpu_agent import layout, slicedir

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(missing_libraries() is not None, reason=str(missing_libraries()))]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: another user's files, a tmpfs of their own")
NOBODY = 65534
SYSTEM_PYTHON = "/usr/bin/python3"  # one that every user may run
SLOT = layout.Use.slot.offset


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    with own_agent() as process:
        yield process


@pytest.fixture
def launch(agent: AgentProcess) -> Iterator[Launch]:
    yield agent.put(agent.slice(125))
    for slice_id in agent.slices():
        agent.delete(slice_id)
    until(lambda: not agent.slices(), 5, "the end of all slices")


@pytest.fixture
def tenant(launch: Launch) -> Iterator[Callable[..., Tenant]]:
    with tenants() as make:
        yield make


def _attacks(dice: random.Random) -> dict[str, list[tuple[object, ...]]]:
    """Return commands of the tenant program that spoil its file, by name."""
    slot = ctypes.sizeof(layout.UseSlot)
    everywhere = [("raw", dice.randrange(layout.USE_SIZE - 64), dice.randbytes(64).hex()) for _ in range(50)]
    return {
        "truncate to nothing": [("truncate", 0)],
        "truncate inside the head": [("truncate", 100)],
        "truncate inside a slot": [("truncate", SLOT + slot // 2)],
        "grow": [("truncate", 2**40)],
        "no magic": [("raw", 0, "00" * 8)],
        "all slots, all ones": [
            ("raw", layout.Use.high_water.offset, "ffffffff"),
            *[("raw", SLOT + i * slot, "ff" * slot) for i in range(40)],
        ],
        "huge memory": [("used", 2**64 - 1)],
        "kernel id without an end": [("raw", SLOT + layout.UseSlot.kernel_id.offset, "41" * layout.KERNEL_ID_BYTES)],
        "a device that is none": [("raw", SLOT + layout.UseSlot.device.offset, "09000000")],
        "noise": everywhere,
    }


@pytest.mark.parametrize("name", list(_attacks(random.Random(0))))
def test_a_spoiled_use_file_costs_nobody_else(agent: AgentProcess, launch: Launch, tenant: Callable[..., Tenant], name: str) -> None:
    other = agent.put(agent.slice(125, user="grace"))
    neighbour = tenant(other, "kernel-b")
    neighbour.do("used", 3 * GIB)
    last = (agent.events() or [{"id": -1}])[-1]["id"]
    one = tenant(launch, "kernel-a")
    agent.adopt(Path(launch.slice_dir).name, one.pid)
    one.do("used", 1 * GIB)
    assert usage(launch).devices[0].memory_used_bytes == 1 * GIB
    for command in _attacks(random.Random(name))[name]:
        one.do(*command)
    own = usage(launch)
    assert 0 <= own.devices[0].memory_used_bytes < 2**60
    assert usage(other).devices[0].memory_used_bytes == 3 * GIB
    if name != "noise":
        told = until(lambda: agent.events(last, kind="hostile"), 6, "the event", every=0.1)
        assert told[0]["slice_id"] == Path(launch.slice_dir).name
        if name == "no magic":
            time.sleep(2.2)
        assert len(agent.events(last, kind="hostile")) == 1, "told once a minute"
    # The slice itself still ends when its process does.
    one.kill()
    until(lambda: Path(launch.slice_dir).name not in agent.slices(), 2, "the end of the slice")


@as_root
def test_a_slice_of_another_user_cannot_fill_the_machine(agent: AgentProcess) -> None:
    own = agent.put(agent.slice(125, user="mallory"), uid=NOBODY)
    fd = os.open(Path(own.slice_dir) / "use", os.O_RDWR)
    written = 0
    try:
        for at in range(0, 2**20, 4096):
            written += os.pwrite(fd, b"x" * 4096, at)
    except OSError as error:
        full = error.errno == errno.ENOSPC
    else:
        full = False
    finally:
        os.close(fd)
    agent.delete(Path(own.slice_dir).name)
    assert full
    assert written <= slicedir.USE_TMPFS_BYTES


@as_root
def test_a_tenant_can_neither_write_its_limits_nor_replace_its_files(agent: AgentProcess, launch: Launch) -> None:
    own = agent.put(agent.slice(125, user="mallory"), uid=NOBODY)
    directory = own.slice_dir
    script = f"""
import os
def refused(what):
    try: what()
    except PermissionError: return True
    except FileNotFoundError: return True
    return False
d = {directory!r}
assert refused(lambda: open(d + '/ctl', 'r+b'))
assert refused(lambda: open(d + '/slice.json', 'r+b'))
assert refused(lambda: os.rename(d + '/ctl', d + '/x'))
assert refused(lambda: os.unlink(d + '/use'))
assert refused(lambda: os.unlink(d + '/api.sock'))
assert refused(lambda: os.listdir({str(agent.runtime / "slices")!r}))
assert refused(lambda: open({launch.slice_dir!r} + '/use', 'rb'))
import socket
for other in ({launch.socket!r}, {str(agent.runtime / "agent.sock")!r}):
    assert refused(lambda: socket.socket(socket.AF_UNIX).connect(other)), other
open(d + '/use', 'r+b').close()
open(d + '/ctl', 'rb').close()
s = socket.socket(socket.AF_UNIX); s.connect({own.socket!r})
print('all refused')
"""
    done = subprocess.run([SYSTEM_PYTHON, "-c", script], user=NOBODY, capture_output=True, text=True, timeout=30, cwd="/", check=False)
    assert done.stdout == "all refused\n", done.stderr
    agent.delete(Path(directory).name)


# ---- the slice's socket


def _flood(path: str, stop: threading.Event, sent: list[int]) -> None:
    request = b"GET /v1/usage HTTP/1.1\r\nHost: a\r\n\r\n"
    while not stop.is_set():
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1)
            try:
                connection.connect(path)
                for _ in range(20):
                    connection.sendall(request)
                    sent[0] += 1
                    connection.recv(4096)
            except OSError:
                time.sleep(0.001)


def test_a_flood_on_one_slices_socket_slows_nobody_else(agent: AgentProcess, launch: Launch) -> None:
    other = agent.put(agent.slice(125, user="grace"))

    def times(count: int) -> list[float]:
        found = []
        for _ in range(count):
            began = time.monotonic()
            usage(other)
            found.append(time.monotonic() - began)
            time.sleep(0.05)
        return sorted(found)

    stop, sent = threading.Event(), [0]
    floods = [threading.Thread(target=_flood, args=(launch.socket, stop, sent)) for _ in range(4)]
    for flood in floods:
        flood.start()
    try:
        time.sleep(0.5)
        before = _cpu_seconds(agent)
        seen = times(40)
        spent = _cpu_seconds(agent) - before
    finally:
        stop.set()
        for flood in floods:
            flood.join()
    print(f"during the flood: median {seen[20] * 1000:.1f} ms, worst {seen[-1] * 1000:.1f} ms, agent's CPU {spent:.2f} s, sent {sent[0]}")
    assert seen[20] < 0.05
    assert spent < 0.5, "the flood is answered with silence, not with work"


def _cpu_seconds(agent: AgentProcess) -> float:
    assert agent.process is not None
    fields = Path(f"/proc/{agent.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_the_sockets_bounds(launch: Launch) -> None:
    own = slice_client(launch)
    with pytest.raises(NbgpuError) as large:
        own.call("PUT", "/v1/kernels/kernel-a", {"memory_bytes": "x" * 70_000})
    assert large.value.status == 413
    busy = 0
    for _ in range(80):
        try:
            own.call("GET", "/v1/slice")
        except Unavailable:  # closed without a word
            busy += 1
        except NbgpuError as error:
            busy += error.status == 429
    assert 0 < busy < 60
    time.sleep(1.2)
    own.call("GET", "/v1/slice")
    # 32 connections that say nothing
    time.sleep(1)
    idle = []
    for _ in range(33):
        idle.append(socket.socket(socket.AF_UNIX))
        idle[-1].connect(launch.socket)
        time.sleep(0.01)
    idle[-1].settimeout(2)
    assert idle[-1].recv(1) == b"", "the 33rd is closed"
    for one in idle:
        one.close()
    time.sleep(0.5)
    own.call("GET", "/v1/slice")


@pytest.mark.parametrize(
    "request_line",
    [b"\x00\xff\r\n\r\n", b"GET " + b"/x" * 20_000 + b" HTTP/1.1\r\n\r\n", b"PUT /v1/kernels/%00 HTTP/1.1\r\nhost: a\r\n\r\n"],
)
def test_junk_on_the_socket_is_refused(launch: Launch, request_line: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(launch.socket)
        connection.sendall(request_line)
        assert connection.recv(4096).startswith(b"HTTP/1.1 4")
    assert usage(launch)


def test_bad_values_are_named(launch: Launch) -> None:
    own = slice_client(launch)
    for path, field in [
        ("/v1/history?seconds=nan", "seconds"),
        ("/v1/history?seconds=3601", "seconds"),
        ("/v1/events?after=x", "after"),
        ("/v1/events?wait_seconds=31", "wait_seconds"),
    ]:
        with pytest.raises(NbgpuError) as refused:
            own.call("GET", path)
        assert (refused.value.status, refused.value.field) == (400, field)
    for path, status in [("/v1/nothing", 404), ("/v1/kernels/a", 405)]:
        with pytest.raises(NbgpuError) as refused:
            own.call("GET", path)
        assert refused.value.status == status
