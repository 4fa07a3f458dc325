"""What the agent keeps in files: records, `ctl`, libraries, the lock. And the doors of its sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nbgpu.models import KernelLimit, Owner, Slice, SliceDevice
from nbgpu.quantities import GIB
from nbgpu_agent import layout, procs, slicedir
from nbgpu_agent.events import EventLog
from nbgpu_agent.http import Bounds, Door
from nbgpu_agent.runtime import RuntimeLock, StartError, install_libraries, prepare
from nbgpu_agent.slicedir import CtlFile, Record

SLICE = Slice(
    slice_id="slice-00",
    owner=Owner(hub="h", user="ada"),
    node="n",
    mode="strict",
    devices=[SliceDevice(uuid="GPU-0", index=0, model="H100", memory_bytes=GIB, compute_milli=250)],
)
RECORD = Record(slice=SLICE, uid=None, state="prepared", created=1.5, boot_id="boot")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    slicedir.create(tmp_path / "slice-00")
    return tmp_path / "slice-00"


def test_a_record_is_read_as_it_was_written(directory: Path) -> None:
    assert slicedir.read_record(directory) is None
    slicedir.write_record(directory, RECORD)
    assert slicedir.read_record(directory) == RECORD
    assert [path.name for path in directory.iterdir()] == ["slice.json"]
    (directory / "slice.json").write_text('{"version": 1}')
    with pytest.raises(ValueError, match=r"slice\.json"):
        slicedir.read_record(directory)


@pytest.mark.parametrize("more", [{}, {"lowered": SLICE}, {"kernel_of_milli": {"k": 250}}])
def test_an_older_agent_reads_a_record_that_says_nothing_new(directory: Path, more: dict[str, Any]) -> None:
    """It refuses words that it does not know, and would leave the slice alone after a roll back."""
    record = RECORD.model_copy(update=more)
    slicedir.write_record(directory, record)
    later = {"lowered", "kernel_of_milli"}
    assert json.loads((directory / "slice.json").read_text()).keys() == Record.model_fields.keys() - later | more.keys()
    assert slicedir.read_record(directory) == record


def test_ctl_is_written_over_restarts_and_never_replaced(directory: Path) -> None:
    ctl = CtlFile(directory)
    ctl.set_slice(SLICE, {"GPU-0": 300}, {"GPU-0": 500})
    ctl.set_kernels({"a": KernelLimit(memory_bytes=5), "b": KernelLimit(compute_milli=7)})
    generation = ctl.words.generation
    ctl.words.device[0].gate = layout.GATE_OPEN
    ctl.close()
    before = (directory / "ctl").stat().st_ino
    again = CtlFile(directory)
    assert (directory / "ctl").stat().st_ino == before
    words = again.words
    assert (words.magic, words.version, words.size) == (layout.CTL_MAGIC, layout.VERSION, layout.CTL_SIZE)
    device = words.device[0]
    assert (device.uuid, device.mem_limit, device.compute_milli, device.mode) == (b"GPU-0", GIB, 250, layout.MODE_STRICT)
    assert (device.context_bytes, device.overhead_cap, device.gate) == (300, 500, layout.GATE_OPEN)
    assert words.device[1].uuid == b""
    assert words.device[1].gate == layout.GATE_NONE
    assert (words.kernels_limited, words.device[0].rest_gate) == (1, layout.GATE_NONE)
    # A kernel keeps its entry; one that goes leaves its place to the next.
    again.set_kernels({"b": KernelLimit(memory_bytes=9), "c": KernelLimit(memory_bytes=8)})
    entries = [(entry.id, entry.mem_limit, entry.compute_milli) for entry in words.kernel if entry.id]
    assert entries == [(b"c", 8, 0), (b"b", 9, 0)]
    assert words.generation > generation
    assert words.kernels_limited == 0
    again.close()


def test_the_ctl_of_an_older_agent_is_brought_up_to_date_in_its_place(directory: Path) -> None:
    """Where version 2 has the gate of kernels without a limit, version 1 had zeros, which would be a closed gate."""
    ctl = CtlFile(directory)
    ctl.set_slice(SLICE, {}, {})
    ctl.words.version, ctl.words.device[0].gate, ctl.words.device[0].rest_gate = 1, layout.GATE_OPEN, 0
    ctl.close()
    again = CtlFile(directory)
    words = again.words
    assert (words.version, words.device[0].gate, words.device[0].rest_gate) == (layout.VERSION, layout.GATE_OPEN, layout.GATE_NONE)
    again.close()


def test_the_shorter_ctl_of_version_2_keeps_what_it_says(directory: Path) -> None:
    """It ends where version 3 has `away`: gates in force stay, and nothing is away."""
    ctl = CtlFile(directory)
    ctl.set_slice(SLICE, {}, {})
    words = ctl.words
    words.version, words.device[0].gate, words.device[0].rest_gate = 2, layout.GATE_SUSPENDED, layout.GATE_OPEN
    ctl.close()
    os.truncate(directory / "ctl", layout.Ctl.away.offset)
    again = CtlFile(directory)
    words = again.words
    assert (words.version, words.size, (directory / "ctl").stat().st_size) == (layout.VERSION, layout.CTL_SIZE, layout.CTL_SIZE)
    assert (words.device[0].gate, words.device[0].rest_gate, words.kernels_away) == (layout.GATE_SUSPENDED, layout.GATE_OPEN, 0)
    assert not any(words.away)
    again.close()


def test_away_names_owners_and_tells_who_looks_at_nothing(directory: Path) -> None:
    ctl = CtlFile(directory)
    generation = ctl.words.generation
    ctl.set_away({3: 7 << 32 | 1})
    assert (ctl.words.away[3], sum(ctl.words.away), ctl.words.kernels_away) == (7 << 32 | 1, 7 << 32 | 1, 1)
    assert ctl.words.generation > generation
    ctl.set_away({})
    assert (sum(ctl.words.away), ctl.words.kernels_away) == (0, 0)
    ctl.close()


def test_a_slices_files_are_sized_and_closed_to_others(directory: Path) -> None:
    os.close(slicedir.create_use(directory, None))
    try:
        status = (directory / "use").stat()
        assert (status.st_size, status.st_mode & 0o777) == (layout.USE_SIZE, 0o600)
        assert sorted(path.name for path in directory.iterdir()) == ["use"]
    finally:
        slicedir.remove(directory)
    assert not directory.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_slices_file_has_room_for_all_that_is_written_in_it(tmp_path: Path) -> None:
    """On its own tmpfs, with all slots taken and all that they share: a process that writes where there is no room is ended by SIGBUS."""
    fd = slicedir.create_use(tmp_path, 65534)
    try:
        if not os.path.ismount(tmp_path / "use"):
            pytest.skip("no file system can be mounted here")
        assert os.pwrite(fd, bytes([255]) * layout.USE_SIZE, 0) == layout.USE_SIZE
    finally:
        os.close(fd)
        slicedir.remove(tmp_path)


def test_libraries_are_copied_once_and_never_rewritten(tmp_path: Path) -> None:
    source = tmp_path / "built"
    (source / "sim").mkdir(parents=True)
    with pytest.raises(StartError, match="make setup"):
        install_libraries(source, tmp_path)
    (source / "libnbgpu.so").write_bytes(b"one")
    (source / "sim" / "nvidia-smi").write_bytes(b"two")
    (source / "sim" / "nvidia-smi").chmod(0o755)
    first = install_libraries(source, tmp_path)
    inode = (first / "libnbgpu.so").stat().st_ino
    assert os.access(first / "sim" / "nvidia-smi", os.X_OK)
    assert install_libraries(source, tmp_path) == first
    assert (first / "libnbgpu.so").stat().st_ino == inode
    (source / "libnbgpu.so").write_bytes(b"newer")
    second = install_libraries(source, tmp_path)
    assert second != first
    assert (first / "libnbgpu.so").read_bytes() == b"one"


def test_one_agent_at_a_time(runtime: Path) -> None:
    prepare(runtime)
    lock = RuntimeLock(runtime)
    lock.acquire(takeover=False)
    other = RuntimeLock(runtime)
    with pytest.raises(StartError, match=rf"\(pid {os.getpid()}\).*--takeover"):
        other.acquire(takeover=False)
    lock.release()
    other.acquire(takeover=False)
    other.release()


def test_a_runtime_directory_whose_sockets_would_have_too_long_names(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="too long a path"):
        prepare(tmp_path / ("x" * 60))


def test_a_process_is_not_mistaken_for_a_later_one_with_its_pid() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = procs.find(child.pid)
    assert process is not None
    assert process.alive()
    assert child.pid in procs.descendants([os.getpid()])
    assert not procs.Process(child.pid, process.start_time - 1).alive()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not process.alive(), "a zombie is gone"
    child.wait()
    assert procs.find(child.pid) is None


def test_a_process_whose_first_thread_has_ended_is_where_its_others_are() -> None:
    program = """
import ctypes, os, threading, time
def wait():
    while open(f"/proc/{os.getpid()}/stat").read().rsplit(")")[1].split()[0] != "Z":
        time.sleep(0.01)
    print("ended", flush=True)
    input()
threading.Thread(target=wait).start()
ctypes.CDLL(None).pthread_exit(None)
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ended\n"
        assert procs.mount_namespace(child.pid) == procs.mount_namespace(os.getpid())
        assert procs.mounts(child.pid, "/proc") == procs.mounts(os.getpid(), "/proc")
    finally:
        child.kill()
        child.wait()
    assert procs.mount_namespace(child.pid) is None


def test_a_mount_is_known_by_the_kernels_list() -> None:
    """Its device and root are those that a look at the path would meet."""
    device = os.stat("/proc").st_dev
    wanted = procs.Mount(f"{os.major(device)}:{os.minor(device)}", "/")
    assert wanted in procs.mounts(os.getpid(), "/proc")
    assert procs.mounts(os.getpid(), "/proc/self") == []
    assert procs.mounts(2**22 + 1, "/proc") == []
    with open("/proc/self/stat") as file:
        assert procs.device_of_mount(file.fileno()) == wanted.device
    assert procs.mount_namespace(os.getpid()) == os.readlink("/proc/self/ns/mnt")


@pytest.mark.asyncio
async def test_events_wake_who_waits_and_ids_go_on_rising() -> None:
    log = EventLog()
    waiting = asyncio.create_task(log.wait(-1, 5, "slice-00"))
    await asyncio.sleep(0)
    log.add("foreign", "warning", "of no slice")
    first = log.add("refused", "warning", "of this", "slice-00")
    assert await waiting == [first]
    assert await log.wait(first.id, 0.01, "slice-00") == []
    assert len(log.after(-1)) == 2
    log.forget("slice-00")
    assert log.after(-1, "slice-00") == [first], "a slice that has ended is remembered for a while"
    assert log.after(first.id, "slice-00") == log.after(-1, "slice-01") == []
    assert EventLog()._next >= first.id - 1, "an agent that starts later counts from the clock"


# ---- doors


async def _statuses(path: Path, count: int) -> list[bytes]:
    found = []
    for _ in range(count):
        reader, writer = await asyncio.open_unix_connection(str(path))
        with contextlib.suppress(ConnectionError):
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            found.append((await reader.read())[9:12])
        writer.close()
    return found


async def _app(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.asyncio
@pytest.mark.parametrize("rate", [20, None])
async def test_a_door_serves_so_many_requests_a_second(runtime: Path, rate: float | None) -> None:
    path = runtime / "api.sock"
    door = Door(path, _app, {}, Bounds(connections=8, body_bytes=100, requests_per_second=rate))
    try:
        assert path.stat().st_mode & 0o777 == 0o600
        statuses = await asyncio.wait_for(_statuses(path, 35), 20)
    finally:
        door.close()
    assert not path.exists()
    if rate is None:  # the control: with no bound everything is served
        assert statuses == [b"200"] * 35
    else:
        assert statuses[:20] == [b"200"] * 20
        assert statuses.count(b"429") >= 5
