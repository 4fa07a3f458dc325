"""A tenant with a shell in its server: an ordinary Unix user's process that runs what the test tells it to.

`Attacker` starts this file's `PROGRAM` (standard library only: the tenant cannot read the checkout) and sends it Python to run.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pwd
import subprocess
import textwrap
import time
from collections.abc import Iterator
from typing import Any

from nbgpu.models import Launch
from nbgpu_agent import layout

PYTHON = "/usr/bin/python3"  # one that every user may run
USERS = ("nbgpu-mallory", "nbgpu-grace")
OFFSETS = {name: getattr(layout.UseSlot, name).offset for name, *_ in layout.UseSlot._fields_}
FILE = {
    "slot": layout.Use.slot.offset,
    "slot_bytes": ctypes.sizeof(layout.UseSlot),
    "high_water": layout.Use.high_water.offset,
    "events": layout.Use.events.offset,
    "bell": layout.Use.bell.offset,
    "size": layout.USE_SIZE,
}

PROGRAM = r'''
import ctypes, fcntl, json, os, signal, socket, struct, subprocess, sys, threading, time
F, O, DIRECTORY = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
GIB = 1024**3
libcuda = None

def cuda():
    """Make a context on the first device."""
    global libcuda
    libcuda = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    for result in (libcuda.cuInit(0), libcuda.cuDeviceGet(ctypes.byref(device), 0),
                   libcuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), libcuda.cuCtxSetCurrent(context)):
        if result:
            return result
    return 0

def alloc(size):
    """Return the CUresult of an allocation."""
    return libcuda.cuMemAlloc_v2(ctypes.byref(ctypes.c_uint64()), ctypes.c_size_t(size))

def use():
    """Open the slice's use file."""
    return os.open(DIRECTORY + "/use", os.O_RDWR)

def started(pid):
    """Return a process's start time."""
    return int(open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[19])

def lock(fd, slot, kind=fcntl.F_WRLCK):
    """Take a slot's record lock."""
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, F["slot"] + slot * F["slot_bytes"])

def forge(fd, slot, pid, start, **words):
    """Write a slot as the limiter would, with these words."""
    data = bytearray(F["slot_bytes"])
    struct.pack_into("<QQ", data, 0, pid << 32 | 1, start)
    struct.pack_into("<I", data, O["ready"], 1)
    for name, value in words.items():
        if isinstance(value, bytes):
            data[O[name]:O[name] + len(value)] = value
        else:
            struct.pack_into("<I" if name in ("device", "want", "near", "refused_by") else "<Q", data, O[name], value)
    os.pwrite(fd, bytes(data), F["slot"] + slot * F["slot_bytes"])
    high = struct.unpack("<I", os.pread(fd, 4, F["high_water"]))[0]
    if high <= slot:
        os.pwrite(fd, struct.pack("<I", slot + 1), F["high_water"])

print("ready", flush=True)
for line in sys.stdin:
    names = globals()
    names["result"] = None
    try:
        exec(json.loads(line), names)
        print(json.dumps({"result": names["result"]}), flush=True)
    except BaseException as error:
        print(json.dumps({"error": repr(error)}), flush=True)
'''


class Attacker:
    """A process of a tenant."""

    def __init__(self, launch: Launch, user: str | None, env: dict[str, str] | None = None, limited: bool = True):
        base = {"HOME": "/", "PATH": "/usr/bin:/bin"} | launch.env | (env or {})
        if not limited:
            base = {name: value for name, value in base.items() if name != "LD_PRELOAD"}
        arguments = [PYTHON, "-c", PROGRAM, json.dumps(FILE), json.dumps(OFFSETS), launch.slice_dir]
        self.process = subprocess.Popen(
            arguments,
            env=base,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            user=None if user is None else pwd.getpwnam(user).pw_uid,
            start_new_session=True,
        )
        self.pid = self.process.pid
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def run(self, code: str) -> Any:
        """Run Python in it and return what the code left in `result`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(textwrap.dedent(code)) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the attacker has died"
        answer = json.loads(line)
        assert "error" not in answer, answer
        return answer["result"]

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait(10)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


@contextlib.contextmanager
def users() -> Iterator[tuple[str, str]]:
    """Two ordinary users of this machine, removed again if they were made here."""
    made = []
    for name in USERS:
        try:
            pwd.getpwnam(name)
        except KeyError:
            subprocess.run(["useradd", "--no-create-home", "--shell", "/bin/sh", name], check=True, capture_output=True, timeout=30)
            made.append(name)
    try:
        yield USERS
    finally:
        for name in made:
            subprocess.run(["userdel", name], check=False, capture_output=True, timeout=30)


def cpu_seconds(pid: int) -> float:
    """Return a process's CPU time."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def seconds_of(work: Any) -> float:
    """Return how long a call took."""
    began = time.monotonic()
    work()
    return time.monotonic() - began
