"""Processes of this machine, from /proc: is it still the one that it was, who descends from whom, in which cgroup."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from nbgpu.procs import lives, stat_fields

MOUNTS_BYTES = 64 * 1024
"""So much of a process's list of mounts is read: a tenant may make it as long as it likes."""
ENVIRONMENT_BYTES = 64 * 1024
_PF_EXITING = 4
_ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC


@dataclass(frozen=True)
class Process:
    """A process that cannot be mistaken for a later one with its pid."""

    pid: int
    start_time: int
    """Clock ticks since boot: field 22 of ``/proc/<pid>/stat``."""

    def alive(self) -> bool:
        """Return whether it still runs (a zombie does not)."""
        return start_time(self.pid) == self.start_time


def start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None when it is gone or a zombie."""
    fields = stat_fields(pid)
    return int(fields[19]) if lives(fields) else None


def exiting(pid: int) -> bool:
    """Return whether a process is on its way out or gone: what it holds goes with it, and it writes no word any more."""
    fields = stat_fields(pid)
    if not lives(fields):
        return True
    # That is the first thread's word: it may have ended long ago, and the others go on.
    return _leaves(fields) and all(_leaves(others) for others in _other_threads(pid))


def _leaves(fields: list[bytes]) -> bool:
    return bool(int(fields[6]) & _PF_EXITING)


def _other_threads(pid: int) -> Iterator[list[bytes]]:
    """Yield the fields of `stat_fields` for each thread but the first."""
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/task") as there:
        for thread in there:
            if thread.name != str(pid) and (fields := stat_fields(f"{pid}/task/{thread.name}")):
                yield fields


def stopped(pid: int) -> bool:
    """Return whether a process is stopped by a signal."""
    fields = stat_fields(pid)
    if fields[:1] == [b"Z"]:  # its first thread has ended
        fields = next(_other_threads(pid), fields)
    return fields[:1] in ([b"T"], [b"t"])


def told_to_end(pid: int) -> bool:
    """Return whether a signal to end waits for a process that is stopped."""
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/status", "rb") as file:
        waiting = (int(line.split()[1], 16) for line in file if line.startswith((b"SigPnd:", b"ShdPnd:")))
        return any(word >> (number - 1) & 1 for word in waiting for number in _ENDS)
    return False


def send(process: Process, number: int) -> bool:
    """Send a signal to exactly this process; False when it has ended, or may not be signalled from here."""
    fd = open_pidfd(process)
    if fd is None:
        return False
    try:
        signal.pidfd_send_signal(fd, number)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def find(pid: int) -> Process | None:
    """Return the process that has `pid` now; None when there is none."""
    started = start_time(pid)
    return None if started is None else Process(pid, started)


def parent(pid: int) -> int | None:
    """Return the pid of a process's parent; None when the process is gone."""
    fields = stat_fields(pid)
    return int(fields[1]) if fields else None


def descendants(roots: Iterable[int]) -> set[int]:
    """Return `roots` and all that descend from them now, zombies left out. One pass over /proc."""
    children: dict[int, list[int]] = defaultdict(list)
    live: set[int] = set()
    for name in os.listdir("/proc"):
        if name.isdigit() and lives(fields := stat_fields(name)):
            live.add(int(name))
            children[int(fields[1])].append(int(name))
    found: set[int] = set()
    todo = list(roots)
    while todo:
        pid = todo.pop()
        if pid not in found:
            found.add(pid)
            todo.extend(children[pid])
    return found & live


@dataclass(frozen=True)
class Mount:
    """A line of ``/proc/<pid>/mountinfo``, as much of it as is read here."""

    device: str
    """``major:minor`` of the file system."""
    root: str
    """What of the file system is mounted."""


def _threads(pid: int | str) -> Iterator[str]:
    """Yield where /proc tells of a process: itself, then a few of its threads. A first thread that has ended has no namespaces any more."""
    yield f"/proc/{pid}"
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/task") as there:
        for thread in itertools.islice(there, 4):
            yield thread.path


def mount_namespace(pid: int) -> str | None:
    """Return the name of a process's mount namespace; None when it is gone or a zombie."""
    for there in _threads(pid):
        with contextlib.suppress(OSError):
            return os.readlink(f"{there}/ns/mnt")
    return None


def _mount_lines(pid: int | str) -> list[list[bytes]]:
    text = b""
    for there in _threads(pid):
        with contextlib.suppress(OSError), open(f"{there}/mountinfo", "rb", buffering=0) as file:
            while len(text) < MOUNTS_BYTES and (more := file.read(MOUNTS_BYTES)):
                text += more
            break
    return [words for line in text.split(b"\n") if len(words := line.split(b" ", 5)) == 6]


def mounts(pid: int, point: str) -> list[Mount]:
    """Return what a process has mounted at `point`, as far as the first mounts of its namespace tell: others it has made itself."""
    wanted = point.encode()
    return [Mount(line[2].decode(), os.fsdecode(line[3])) for line in _mount_lines(pid) if line[4] == wanted]


def device_of_mount(fd: int) -> str:
    """Return ``major:minor`` of the mount that an open file is on, as lists of mounts tell it: on some file systems `stat` says another."""
    with open(f"/proc/self/fdinfo/{fd}") as file:
        mount = next(line.split()[1] for line in file if line.startswith("mnt_id:")).encode()
    return next((line[2].decode() for line in _mount_lines("self") if line[0] == mount), "")


def inner_pid(pid: int) -> int:
    """Return a process's pid as it sees itself, in its own pid namespace."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            for line in file:
                if line.startswith(b"NSpid:"):
                    return int(line.split()[-1])
    except OSError:
        pass
    return pid


def environment(pid: int, name: str) -> str:
    """Return a variable of the environment that a process was started with; "" where there is none, or it cannot be read."""
    wanted = name.encode() + b"="
    with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb", buffering=0) as file:
        for word in file.read(ENVIRONMENT_BYTES).split(b"\0"):
            if word.startswith(wanted):
                return word[len(wanted) :].decode(errors="replace")
    return ""


def sees_the_hosts_pids() -> bool:
    """Return whether pids here are those of the whole machine, as a driver tells them: it does not know pid namespaces."""
    return os.stat("/proc/self/ns/pid").st_ino == _INITIAL_PID_NAMESPACE


@lru_cache(maxsize=1)
def boot_id() -> str:
    """Return what tells this boot of the machine from others: pids and start times mean nothing across boots."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def open_pidfd(process: Process) -> int | None:
    """Return a descriptor that becomes readable when `process` ends; None when it has ended, or where there is no such thing."""
    try:
        fd = os.pidfd_open(process.pid)
    except (OSError, AttributeError):
        return None
    if process.alive():
        return fd
    os.close(fd)
    return None
