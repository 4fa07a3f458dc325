"""Processes that hand device memory to each other: by IPC handle, by descriptor, by a pool's pointer. They obey lines of JSON."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from limiter_kit import environment, limiter, run, sim_driver, spawn
from limiter_slice import SliceFiles

WAYS = ("ipc", "descriptor", "pool")
OBEY = """
import time
class Handle(c.Structure): _fields_ = [("bytes", c.c_ubyte * 64)]
cuda.cuIpcOpenMemHandle_v2.argtypes = [c.c_void_p, Handle, c.c_uint]
PROP = (c.c_int * 8)(1, 1, 1, 0)            # pinned, by descriptor, on device 0
ACCESS = (c.c_int * 3)(1, 0, 3)
def map_it(handle, size):
    at = c.c_uint64()
    ok(cuda.cuMemAddressReserve(c.byref(at), c.c_size_t(size), c.c_size_t(0), c.c_uint64(0), c.c_ulonglong(0)))
    result = cuda.cuMemMap(at, c.c_size_t(size), c.c_size_t(0), handle, c.c_ulonglong(0))
    if result == 0: ok(cuda.cuMemSetAccess(at, c.c_size_t(size), ACCESS, c.c_size_t(1)))
    return result, at.value
def write(pointer, text):
    ok(cuda.cuMemcpyHtoD_v2(c.c_uint64(pointer), text.encode(), c.c_size_t(len(text))))
def read(pointer, size):
    text = c.create_string_buffer(size); ok(cuda.cuMemcpyDtoH_v2(text, c.c_uint64(pointer), c.c_size_t(size))); return text.raw.decode()
class Mine:
    def make(self, way, mib, text="hello"):
        size, self.way, self.handle, name = mib * MIB, way, c.c_uint64(), Handle()
        if way == "ipc":
            result, self.pointer = alloc(size)
            if result: return [result]
            write(self.pointer, text); ok(cuda.cuIpcGetMemHandle(c.byref(name), c.c_uint64(self.pointer)))
            return [0, bytes(name.bytes).hex()]
        if way == "descriptor":
            result = cuda.cuMemCreate(c.byref(self.handle), c.c_size_t(size), PROP, c.c_ulonglong(0))
            if result: return [result]
            result, self.pointer = map_it(self.handle, size); self.size = size
            write(self.pointer, text); fd = c.c_int()
            ok(cuda.cuMemExportToShareableHandle(c.byref(fd), self.handle, 1, c.c_ulonglong(0)))
            return [0, [os.getpid(), fd.value, size]]
        self.pool, p, fd = c.c_void_p(), c.c_uint64(), c.c_int()
        props = (c.c_int * 24)(1, 1, 1, 0)
        ok(cuda.cuMemPoolCreate(c.byref(self.pool), props))
        result = cuda.cuMemAllocFromPoolAsync(c.byref(p), c.c_size_t(size), self.pool, None)
        if result: return [result]
        self.pointer = p.value; write(self.pointer, text); ok(cuda.cuMemPoolExportPointer(c.byref(name), p))
        ok(cuda.cuMemPoolExportToShareableHandle(c.byref(fd), self.pool, 1, c.c_ulonglong(0)))
        return [0, [os.getpid(), fd.value, bytes(name.bytes).hex()]]
    def open(self, way, name):
        self.way, p = way, c.c_uint64()
        if way == "ipc":
            return cuda.cuIpcOpenMemHandle_v2(c.byref(p), Handle((c.c_ubyte * 64)(*bytes.fromhex(name))), 1), self.keep(p.value)
        fd = os.open(f"/proc/{name[0]}/fd/{name[1]}", os.O_RDWR)
        if way == "descriptor":
            self.handle, self.size = c.c_uint64(), name[2]
            result = cuda.cuMemImportFromShareableHandle(c.byref(self.handle), c.c_void_p(fd), 1); os.close(fd)
            if result == 0:
                result, p.value = map_it(self.handle, self.size)
                if result: ok(cuda.cuMemRelease(self.handle))
            return result, self.keep(p.value)
        pool = c.c_void_p(); ok(cuda.cuMemPoolImportFromShareableHandle(c.byref(pool), c.c_void_p(fd), 1, c.c_ulonglong(0))); os.close(fd)
        return cuda.cuMemPoolImportPointer(c.byref(p), pool, c.byref(Handle((c.c_ubyte * 64)(*bytes.fromhex(name[2]))))), self.keep(p.value)
    def keep(self, pointer):
        self.pointer = pointer
    def read(self, size): return read(self.pointer, size)
    def write(self, text): return write(self.pointer, text)
    def close(self, opened):
        if self.way == "ipc":
            ok(cuda.cuIpcCloseMemHandle(c.c_uint64(self.pointer)) if opened else free(self.pointer))
        elif self.way == "descriptor":
            ok(cuda.cuMemUnmap(c.c_uint64(self.pointer), c.c_size_t(self.size))); ok(cuda.cuMemRelease(self.handle))
        else:
            ok(cuda.cuMemFreeAsync(c.c_uint64(self.pointer), None)); ok(cuda.cuCtxSynchronize())
            if not opened: ok(cuda.cuMemPoolTrimTo(self.pool, c.c_size_t(0)))
    def do(self, script):
        names = globals(); names["it"] = self; exec(script, names); return names["result"]
    def left(self): return info()[0] // MIB
    def alloc(self, mib): return alloc(mib * MIB)[0]
start(); it = Mine(); say("up")
for line in sys.stdin:
    name, *arguments = json.loads(line)
    answer = getattr(it, name)(*arguments); say(answer[0] if name == "open" else answer)
"""


class Process:
    """One of them; attributes are its methods."""

    def __init__(self, env: dict[str, str]) -> None:
        self.process: subprocess.Popen[str] = spawn(OBEY, env)
        assert self.answer() == "up"

    def answer(self) -> Any:
        """Return its next answer."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            assert self.process.stderr
            raise AssertionError(f"ended early: {self.process.stderr.read()}")
        return json.loads(line)

    def tell(self, name: str, *arguments: Any) -> None:
        """Have it do something; do not wait."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has ended: whoever wants its answer is told why
            self.process.stdin.write(json.dumps([name, *arguments]) + "\n")
            self.process.stdin.flush()

    def ask(self, name: str, *arguments: Any) -> Any:
        """Have it do something; return what it says."""
        self.tell(name, *arguments)
        return self.answer()

    def kill(self) -> None:
        """End it by SIGKILL."""
        self.process.kill()
        self.process.communicate(timeout=30)


class SharedMachine:
    """A simulated machine with one device, slices on it, processes in them."""

    def __init__(self, state: Path, make: Callable[..., SliceFiles]) -> None:
        self.more = {"NBGPU_SIM_STATE": str(state), "NBGPU_SIM_DEVICES": "1", "NBGPU_SIM_MEMORY_MIB": "1024", "NBGPU_SIM_CONTEXT_MIB": "0"}
        self.more["NBGPU_SIM_TEARDOWN_MS"] = "20"
        self._make = make
        self._started: list[Process] = []
        script = "ok(cuda.cuInit(0)); b = (c.c_ubyte * 16)(); ok(cuda.cuDeviceGetUuid_v2(b, 0)); say(bytes(b).hex())"
        h = run(script, environment(None, sim_driver(), **self.more))
        self.uuid = f"GPU-{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"

    def slice(self, mem_limit: int, **options: Any) -> SliceFiles:
        """A slice of the device."""
        return self._make(mem_limit=mem_limit, uuids=(self.uuid,), **options)

    def start(self, files: SliceFiles | None, *definitions: str, **more: str) -> Process:
        """A process in a slice; None: without the limiter."""
        preload = limiter(*definitions) if files else None
        self._started.append(Process(environment(files, sim_driver(), preload=preload, **self.more, **more)))
        return self._started[-1]

    def physical(self) -> int:
        """MiB of the device that are really in use."""
        script = (
            "start(); f, t = c.c_size_t(), c.c_size_t(); ok(cuda.cuMemGetInfo_v2(c.byref(f), c.byref(t))); say((t.value - f.value) // MIB)"
        )
        return int(run(script, environment(None, sim_driver(), **self.more)))

    def close(self) -> None:
        """End everything."""
        for one in self._started:
            one.kill()


@contextmanager
def shared_machine(make: Callable[..., SliceFiles], state: Path) -> Iterator[SharedMachine]:
    """One for a test."""
    made = SharedMachine(state, make)
    try:
        yield made
    finally:
        made.close()
        for left in state.parent.glob(state.name + "*"):
            left.unlink()
