"""A slice's directory: `slice.json` (the agent's truth), `ctl`, `use`, `api.sock`. Everything is rebuilt from it after a restart.

The directory and all but `use` and `api.sock` belong to the agent, so that the slice's user cannot replace files in it. A slice
exists from the moment its `slice.json` does, and no longer than that.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import shutil
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from nbgpu.models import KernelAway, KernelId, KernelLimit, Model, Slice, Suspension
from nbgpu.words import counted

from . import layout

RECORD = "slice.json"
RECORD_VERSION = 1
LATER = ("kernel_of_milli", "lowered")
"""Fields of a record that came later, written only where they say something: an older agent takes no record with words unknown to it."""
PRIVATE = ".use"
"""Where a `use` file's own tmpfs is mounted while it is made."""
USE_TMPFS_BYTES = 256 * 1024
"""Room for all of it: who writes where there is none is ended by a signal (SIGBUS)."""
_MNT_DETACH = 2
_MS_NOSUID_NODEV_NOEXEC = 2 | 4 | 8
_MS_BIND = 4096


class Root(Model):
    """A process that was adopted into the slice, with its start time in clock ticks since boot."""

    pid: int
    start_time: int


class Suspended(Model):
    """A process that the watchdog has suspended."""

    pid: int
    start_time: int
    kind: str
    """What it was suspended for."""
    since: float
    """Unix time, seconds."""
    how: Literal["lock", "stop"] = "stop"
    """``lock``: its GPU calls wait; ``stop``: all of it stands still."""
    kernel_id: str = ""
    """The notebook kernel that it says it is of."""
    reason: str = ""
    """What it did, for people: "it used the GPU (3 GiB) without nbgpu's limiter"."""
    memory_bytes: int = 0
    """What it held then, or its slice did."""
    went_on: int = 0
    """So often it was found running though it had been stopped."""
    excused: bool = False
    """Somebody who may has let it go on: it is left alone until it ends."""

    def as_model(self) -> Suspension:
        """Return what is told of it."""
        return Suspension(
            pid=self.pid, kernel_id=self.kernel_id or None, kind=self.kind, how=self.how, since=self.since, reason=self.reason
        )


class Parked(Model):
    """A slice whose GPU memory is on the host, or on its way there or back (docs/idle.md)."""

    phase: Literal["parking", "parked", "restoring"]
    full: Slice
    """With the limits that it comes back to."""
    processes: tuple[Root, ...]
    device_bytes: tuple[int, ...]
    """What they held on each of the slice's devices; as much host memory is taken."""
    since: float
    """Unix time, seconds."""
    wanted_since: float | None = None
    """Since when it is wanted back, Unix time, seconds."""

    @property
    def memory_bytes(self) -> int:
        """What they held on all devices together."""
        return sum(self.device_bytes)


class AwayKernel(Model):
    """A kernel whose GPU memory its user has moved to the host, or that is on its way there or back."""

    phase: Literal["parking", "parked", "restoring"]
    processes: tuple[Root, ...]
    slots: tuple[tuple[int, int], ...]
    """Their slots, each with its owner's word."""
    device_bytes: tuple[int, ...]
    """What they held on each of the slice's devices; as much host memory is taken."""
    since: float
    """Unix time, seconds."""
    wanted_since: float | None = None
    """Since when it is used, Unix time, seconds."""
    told: bool = False
    """Its user was told that there is no room for it."""

    @property
    def memory_bytes(self) -> int:
        """What they held on all devices together."""
        return sum(self.device_bytes)

    def as_model(self, now: float) -> KernelAway:
        """Return what is told of it at Unix time `now`."""
        wanted = None if self.wanted_since is None else max(0.0, now - self.wanted_since)
        return KernelAway(phase=self.phase, memory_bytes=self.memory_bytes, since=self.since, wanted_seconds=wanted)


class ClaimOf(Model):
    """The ResourceClaim of Kubernetes that a slice stands for."""

    uid: str
    namespace: str
    name: str
    pods: tuple[str, ...] = ()
    """UIDs of the pods that it is reserved for: their processes belong to the slice."""


class Record(Model):
    """Contents of `slice.json`."""

    version: int = RECORD_VERSION
    slice: Slice
    uid: int | None
    state: Literal["prepared", "running", "releasing"]
    created: float
    """Unix time, seconds."""
    boot_id: str
    roots: tuple[Root, ...] = ()
    cgroup: str | None = None
    claim: ClaimOf | None = None
    """With one the files are for whatever user the pod's processes run as, and the slice ends when the kubelet says so."""
    kernel_limits: dict[KernelId, KernelLimit] = Field(default_factory=dict[KernelId, KernelLimit])
    kernel_of_milli: dict[KernelId, int] = Field(default_factory=dict[KernelId, int])
    """The slice's compute share when each of them was set: its compute is that part of it."""
    suspended: tuple[Suspended, ...] = ()
    limited: str | None = None
    """The cgroup of which the driver may have a memory limit for this slice; written before the limit is set."""
    parked: Parked | None = None
    lowered: Slice | None = None
    """With the limits in force, where they were lowered below the memory that it holds: `slice` counts that until it is free."""
    protected: tuple[KernelId, ...] = ()
    """Kernels that are never parked."""
    kernels_away: dict[KernelId, AwayKernel] = Field(default_factory=dict[KernelId, AwayKernel])
    """Those that their user has suspended."""
    use_since: int = 0
    """When the agent started that found a running slice's `use` file gone, ticks since boot: older processes write on into that one."""


def write_record(directory: Path, record: Record) -> None:
    """Write `slice.json`: whole or not at all, whoever is killed.

    Not forced to the disk, which takes longer than all the rest: after a loss of power no process of the slice lives, and an older
    record, none, or an empty one will do.
    """
    fresh = directory / f".{RECORD}"
    with open(fresh, "w") as file:
        file.write(record.model_dump_json(exclude={name for name in LATER if not getattr(record, name)}))
    fresh.chmod(0o644)
    fresh.rename(directory / RECORD)


def read_record(directory: Path) -> Record | None:
    """Return what `slice.json` says; None when there is none, or one that a loss of power emptied. ValueError when it makes no sense."""
    try:
        text = (directory / RECORD).read_text()
    except FileNotFoundError:
        return None
    if not text.strip("\0"):
        return None
    try:
        return Record.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"{directory / RECORD}: {counted(error.error_count(), 'error')}, the first: {error.errors()[0]['msg']}") from None


def create(directory: Path) -> None:
    """Make a slice's empty directory; what a killed agent left half made goes first."""
    if directory.exists():
        remove(directory)
    directory.mkdir(mode=0o755)
    directory.chmod(0o755)


def remove(directory: Path) -> None:
    """End a slice's directory: its record first, so that no crash leaves half a slice."""
    with contextlib.suppress(FileNotFoundError):
        (directory / RECORD).unlink()
    for name in ("use", PRIVATE):  # the second: of an agent that was killed while it made the first
        _unmount(directory / name)
    shutil.rmtree(directory, ignore_errors=True)


def create_use(directory: Path, uid: int | None, anyone: bool = False) -> int:
    """Make the `use` file for its owner, or for anyone who gets to see it, and return an open descriptor.

    For others than the agent it lies on a tmpfs of its own: whatever they do to it, it cannot fill the machine's memory.
    """
    path = directory / "use"
    if path.exists():
        _unmount(path)
        path.unlink()
    source = path
    private = directory / PRIVATE
    if os.geteuid() == 0 and (anyone or uid not in (None, 0)):
        private.mkdir(mode=0o700, exist_ok=True)
        if _mount("tmpfs", private, "tmpfs", _MS_NOSUID_NODEV_NOEXEC, f"size={USE_TMPFS_BYTES},nr_inodes=4,mode=700"):
            source = private / "use"
    fd = os.open(source, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.ftruncate(fd, layout.USE_SIZE)
    # Magic last: a reader that sees it sees a whole head.
    os.pwrite(fd, struct.pack("<II", layout.VERSION, layout.USE_SIZE), 8)
    os.pwrite(fd, struct.pack("<Q", layout.USE_MAGIC), 0)
    _give(fd, uid, anyone)
    if source is not path:
        path.touch(mode=0o600)
        if not _mount(str(source), path, "", _MS_BIND, ""):
            os.close(fd)
            _unmount(private)
            private.rmdir()
            return _plain_use(directory, uid, anyone)
        _unmount(private)
    if private.exists():
        private.rmdir()
    return fd


def _give(fd: int, uid: int | None, anyone: bool) -> None:
    if uid is not None:
        os.fchown(fd, uid, -1)
    if anyone:
        os.fchmod(fd, 0o666)


def _plain_use(directory: Path, uid: int | None, anyone: bool) -> int:
    path = directory / "use"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.ftruncate(fd, layout.USE_SIZE)
    os.pwrite(fd, struct.pack("<QII", layout.USE_MAGIC, layout.VERSION, layout.USE_SIZE), 0)
    _give(fd, uid, anyone)
    return fd


def open_use(directory: Path) -> int | None:
    """Return a descriptor of the `use` file that is there; None when there is none that was ever a `use` file of this version."""
    try:
        # Not blocking: its owner may have taken a lease on it, which would make us wait for 45 seconds.
        fd = os.open(directory / "use", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            repair_use(fd)
            return fd
    except OSError:
        pass
    os.close(fd)
    return None


def repair_use(fd: int) -> None:
    """Give a `use` file its size and head again, whatever its user did to it; what it held there costs that user."""
    if os.fstat(fd).st_size != layout.USE_SIZE:
        os.ftruncate(fd, layout.USE_SIZE)
    head = struct.pack("<QII", layout.USE_MAGIC, layout.VERSION, layout.USE_SIZE)
    magic, version, _ = struct.unpack("<QII", os.pread(fd, len(head), 0))
    if magic != layout.USE_MAGIC or version < layout.VERSION:
        os.pwrite(fd, head, 0)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _mount(source: str, target: Path, kind: str, flags: int, data: str) -> bool:
    result: int = _libc().mount(source.encode(), str(target).encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())
    return result == 0


def _unmount(target: Path) -> None:
    for _ in range(8):  # mounts may lie upon each other
        if os.geteuid() != 0 or not os.path.ismount(target) or _libc().umount2(str(target).encode(), _MNT_DETACH) != 0:
            return


class CtlFile:
    """The `ctl` file, mapped for writing. The agent is its only writer beside the scheduler's gate words."""

    def __init__(self, directory: Path):
        path = directory / "ctl"
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        if os.fstat(self.fd).st_size < layout.CTL_SIZE:  # new, or an older agent's; never shorter: processes map it
            os.ftruncate(self.fd, layout.CTL_SIZE)
        os.fchmod(self.fd, 0o644)
        self._map = mmap.mmap(self.fd, layout.CTL_SIZE)
        self.words = layout.Ctl.from_buffer(self._map)
        fresh = self.words.magic != layout.CTL_MAGIC
        self.words.size = layout.CTL_SIZE
        if fresh:
            for device in self.words.device:
                device.gate = layout.GATE_NONE
            for kernel in self.words.kernel:
                for index in range(layout.DEVICES):
                    kernel.gate[index] = layout.GATE_NONE
        if fresh or self.words.version < layout.VERSION:  # an older agent's: its fields are where they were, new ones are zeros
            if fresh or self.words.version < 2:
                for device in self.words.device:
                    device.rest_gate = layout.GATE_NONE
            self.words.version = layout.VERSION

    def set_slice(self, part_of: Slice, context_bytes: dict[str, int], overhead_caps: dict[str, int], holds: bool = True) -> None:
        """Write the limits of a slice; `context_bytes` and `overhead_caps` in bytes by device uuid.

        Parameters
        ----------
        holds : bool
            False while it is parked: then there is no memory for it, and whoever wants some waits.
        """
        words = self.words
        for index, part in enumerate(part_of.devices):
            device = words.device[index]
            device.mem_limit = part.memory_bytes if holds else 0
            device.compute_milli = part.compute_milli
            device.mode = layout.MODE_STRICT if part_of.mode == "strict" else layout.MODE_BURST
            device.context_bytes = context_bytes.get(part.uuid, 0)
            device.overhead_cap = overhead_caps.get(part.uuid, 0)
            device.uuid = part.uuid.encode()
        words.generation += 1
        words.magic = layout.CTL_MAGIC

    def set_kernels(self, limits: dict[str, KernelLimit]) -> None:
        """Write the kernels' limits. A kernel keeps its entry while it has one."""
        words = self.words
        index_of = {entry.id.decode(): index for index, entry in enumerate(words.kernel) if entry.id}
        for kernel_id, index in index_of.items():
            if kernel_id not in limits:
                words.kernel[index].id = b""
        free = [index for index, entry in enumerate(words.kernel) if not entry.id]
        for kernel_id, limit in limits.items():
            index = index_of.get(kernel_id)
            entry = words.kernel[free.pop(0) if index is None else index]
            entry.mem_limit = limit.memory_bytes or 0
            entry.compute_milli = limit.compute_milli or 0
            if index is None:
                entry.id = kernel_id.encode()
        words.kernels_limited = sum(limit.compute_milli is not None for limit in limits.values())
        words.generation += 1

    def set_away(self, words: Mapping[int, int]) -> None:
        """Say of slots that the memory of their processes is on the host, or on its way (`layout.Ctl.away`); of all others that it is not.

        A process that launches without a look at anything is told by the generation: it looks at its next launch.
        """
        away = self.words.away
        if words:
            self.words.kernels_away = 1
        for slot, word in enumerate(away):
            if word != words.get(slot, 0):
                away[slot] = words.get(slot, 0)
        if not words:
            self.words.kernels_away = 0
        self.words.generation += 1

    def close(self) -> None:
        """Let go of the file; it is unmapped with the last reference into it."""
        del self.words, self._map
        os.close(self.fd)
