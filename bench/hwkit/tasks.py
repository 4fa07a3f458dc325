"""What a worker can be told to do (`bench/hardware_worker.py`): each method is a command; what it returns goes back as JSON."""

from __future__ import annotations

import ctypes as c
import fcntl
import hashlib
import mmap
import os
import random
import struct
import time
from collections import deque
from itertools import pairwise
from typing import Any

from .gpu import OUT_OF_MEMORY, CudaError, Gpu

MIB = 1024**2
PIECE, MOST_PIECES = 4096, 256
SIGN = struct.Struct("<QQQQ")
"""A worker's sign of life: operations done, what it is at, CLOCK_MONOTONIC of the last one, the longest one in ns."""
STATES = ("nothing", "allocating", "freeing", "launching", "waiting for the GPU", "asking for free memory")


def _sleep_until(when: int) -> None:
    while (left := when - time.monotonic_ns()) > 0:
        time.sleep(min(0.05, left / 1e9))


class Tasks:
    """One process on the GPU."""

    def __init__(self) -> None:
        self._made: Gpu | None = None
        self._held: list[tuple[int, int]] = []
        self._lock_fd = -1

    @property
    def _gpu(self) -> Gpu:
        if self._made is None:
            self._made = Gpu()
        return self._made

    # ---- beginning

    def init(self) -> dict[str, Any]:
        """Make the context."""
        gpu = self._gpu
        free, total = gpu.memory()
        count = c.c_int()
        gpu.call("cuDeviceGetCount", c.byref(count))
        return {
            "init_seconds": gpu.init_seconds,
            "context_seconds": gpu.context_seconds,
            "free": free,
            "total": total,
            "devices": count.value,
            "processors": gpu.processors,
        }

    def load(self) -> dict[str, Any]:
        """Load the GPU kernels."""
        begun = time.monotonic()
        return {"target": self._gpu.load(), "seconds": time.monotonic() - begun}

    def launch_one(self, blocks: int) -> None:
        """Run each GPU kernel that does nothing once."""
        self._gpu.launch("nothing", blocks=blocks)
        self._gpu.launch("work_arg_ns", 1, blocks=blocks)
        self._gpu.wait()

    def second_context(self) -> dict[str, Any]:
        """Make one more context in this process."""
        context = c.c_void_p()
        code = self._gpu.code("cuCtxCreate_v2", c.byref(context), 0, 0)
        self._gpu.call("cuCtxSetCurrent", self._gpu.context)
        return {"code": code}

    # ---- memory

    def alloc(self, size: int, count: int = 1) -> dict[str, Any]:
        """Allocate and hold; ends at the first refusal."""
        begun = time.monotonic_ns()
        code = 0
        done = 0
        for _ in range(count):
            code, pointer = self._gpu.alloc(size)
            if code:
                break
            self._held.append((pointer, size))
            done += 1
        return {"code": code, "done": done, "seconds": (time.monotonic_ns() - begun) / 1e9, "at": time.monotonic_ns()}

    def fill(self) -> dict[str, str]:
        """Write all that is held, and another text at each of many places; return the checksum of those."""
        for pointer, size in self._held:
            self._gpu.call("cuMemsetD8_v2", c.c_uint64(pointer), 165, c.c_size_t(size))
        for number, pointer in enumerate(self._pieces()):
            text = hashlib.sha256(str(number).encode()).digest() * (PIECE // 32)
            self._gpu.call("cuMemcpyHtoD_v2", c.c_uint64(pointer), text, c.c_size_t(PIECE))
        return self.checksum()

    def checksum(self) -> dict[str, str]:
        """Return the checksum of what `fill` has written."""
        found = hashlib.sha256()
        for pointer in self._pieces():
            found.update(self._gpu.read(pointer, PIECE))
        return {"sum": found.hexdigest()}

    def _pieces(self) -> list[int]:
        return [pointer + at for pointer, size in self._held for at in range(0, size, max(MIB, size // MOST_PIECES // MIB * MIB))]

    def free(self) -> None:
        """Give back all that is held."""
        for pointer, _ in self._held:
            self._gpu.free(pointer)
        self._held.clear()

    def info(self) -> dict[str, Any]:
        """Return what cuMemGetInfo and cuDeviceTotalMem say."""
        free, total = self._gpu.memory()
        size = c.c_size_t()
        self._gpu.call("cuDeviceTotalMem_v2", c.byref(size), 0)
        return {"free": free, "total": total, "device_total": size.value}

    def nvml_view(self) -> dict[str, Any]:
        """Return what NVML says to this process."""
        from .nvml import open_nvml

        nvml = open_nvml(0)
        used, total = nvml.memory()
        return {"used": used, "total": total, "pids": sorted(nvml.processes()), "count": nvml.count()}

    def refusals(self, size: int) -> dict[str, int]:
        """Ask for one block of `size` in every way there is; return the codes. What is given is given back at once."""
        gpu = self._gpu
        pointer, pitch, handle = c.c_uint64(), c.c_size_t(), c.c_uint64()
        found = {"cuMemAlloc": gpu.code("cuMemAlloc_v2", c.byref(pointer), c.c_size_t(size))}
        if found["cuMemAlloc"] == 0:
            gpu.free(pointer.value)
        found["cuMemAllocPitch"] = gpu.code(
            "cuMemAllocPitch_v2", c.byref(pointer), c.byref(pitch), c.c_size_t(2**20), c.c_size_t(max(1, size >> 20)), 4
        )
        if found["cuMemAllocPitch"] == 0:
            gpu.free(pointer.value)
        found["cuMemAllocAsync"] = gpu.code("cuMemAllocAsync", c.byref(pointer), c.c_size_t(size), None)
        if found["cuMemAllocAsync"] == 0:
            gpu.call("cuMemFreeAsync", pointer, None)
            gpu.wait()
            pool = c.c_void_p()
            gpu.call("cuDeviceGetMemPool", c.byref(pool), 0)
            gpu.call("cuMemPoolTrimTo", pool, c.c_size_t(0))
        properties = (c.c_uint32 * 8)(1, 0, 1, 0, 0, 0, 0, 0)  # pinned, not exportable, on device 0
        unit = c.c_size_t()
        gpu.call("cuMemGetAllocationGranularity", c.byref(unit), properties, 0)
        whole = -(-size // unit.value) * unit.value
        found["cuMemCreate"] = gpu.code("cuMemCreate", c.byref(handle), c.c_size_t(whole), properties, c.c_ulonglong(0))
        if found["cuMemCreate"] == 0:
            gpu.call("cuMemRelease", handle)
        descriptor = (c.c_uint64 * 5)(16384, max(1, size // (16384 * 16)), 0, 0x0000_0004_0000_0020, 0)  # 4 channels of 32-bit floats
        array = c.c_void_p()
        rows = max(1, size // (16384 * 16))
        if rows <= 65536:
            found["cuArray3DCreate"] = gpu.code("cuArray3DCreate_v2", c.byref(array), descriptor)
            if found["cuArray3DCreate"] == 0:
                gpu.call("cuArrayDestroy", array)
        return found

    def churn(self, until: int, least: int, most: int, hold: int, seed: int) -> dict[str, Any]:
        """Allocate and free blocks of random sizes until a moment, holding at most `hold` bytes; end holding nothing."""
        dice = random.Random(seed)
        gpu = self._gpu
        given = refused = other = 0
        slowest = 0
        while time.monotonic_ns() < until:
            held = sum(size for _, size in self._held)
            size = dice.randrange(least, most, 2 * MIB)
            begun = time.monotonic_ns()
            if held + size <= hold and dice.random() < 0.7:
                code, pointer = gpu.alloc(size)
                if code == 0:
                    given += 1
                    self._held.append((pointer, size))
                elif code == OUT_OF_MEMORY:
                    refused += 1
                else:
                    other += 1
            elif self._held:
                pointer, _ = self._held.pop(dice.randrange(len(self._held)))
                gpu.free(pointer)
            slowest = max(slowest, time.monotonic_ns() - begun)
        self.free()
        return {"given": given, "refused": refused, "other_errors": other, "slowest_ms": slowest / 1e6}

    # ---- GPU time

    def calibrate(self, blocks: int) -> dict[str, Any]:
        """Return ns per round of work on this grid."""
        return {"ns_per_round": self._gpu.calibrate(blocks)}

    def busy(self, start: int, end: int, rounds: int, blocks: int, batch: int) -> dict[str, Any]:
        """Compute between two moments as a training loop does: batches of GPU kernels, two batches in flight.

        Returns
        -------
        dict
            ``steps``: (CLOCK_MONOTONIC ns, GPU kernels done) at the end of each batch; ``slowest_launch_ms``.
        """
        gpu = self._gpu
        events = [gpu.event() for _ in range(3)]
        waiting: deque[tuple[c.c_void_p, int]] = deque()
        _sleep_until(start)
        launched, turn, slowest = 0, 0, 0
        steps: list[tuple[int, int]] = [(time.monotonic_ns(), 0)]
        while time.monotonic_ns() < end:
            for _ in range(batch):
                begun = time.monotonic_ns()
                gpu.launch("work_arg_ns", rounds, blocks=blocks)
                slowest = max(slowest, time.monotonic_ns() - begun)
            launched += batch
            gpu.call("cuEventRecord", events[turn], None)
            waiting.append((events[turn], launched))
            turn = (turn + 1) % 3
            if len(waiting) == 2:
                event, number = waiting.popleft()
                gpu.call("cuEventSynchronize", event)
                steps.append((time.monotonic_ns(), number))
        gpu.wait()
        steps.append((time.monotonic_ns(), launched))
        return {"steps": steps, "slowest_launch_ms": slowest / 1e6}

    def short(self, start: int, end: int, rounds: int, pause_ms: float, blocks: int = 1) -> dict[str, Any]:
        """One small GPU kernel and a wait, again and again: how long each took, as who types in a notebook feels it.

        Returns
        -------
        dict
            ``ms``: from the launch to the answer; ``launch_ms``: of it in the launch, where the gate is.
        """
        gpu = self._gpu
        _sleep_until(start)
        took: list[float] = []
        launched: list[float] = []
        while time.monotonic_ns() < end:
            begun = time.monotonic_ns()
            gpu.launch("work_arg_ns", rounds, blocks=blocks)
            launched.append((time.monotonic_ns() - begun) / 1e6)
            gpu.wait()
            took.append((time.monotonic_ns() - begun) / 1e6)
            time.sleep(pause_ms / 1e3)
        return {"ms": took, "launch_ms": launched}

    def timed(self, start: int, rounds: int, blocks: int, count: int) -> dict[str, Any]:
        """Return what events say that each of some GPU kernels took, ms."""
        gpu = self._gpu
        events = [gpu.event() for _ in range(count + 1)]
        _sleep_until(start)
        gpu.call("cuEventRecord", events[0], None)
        for event in events[1:]:
            gpu.launch("work_arg_ns", rounds, blocks=blocks)
            gpu.call("cuEventRecord", event, None)
        gpu.wait()
        return {"ms": [gpu.elapsed_ms(a, b) for a, b in pairwise(events)]}

    def gaps(self, start: int, ns: int, blocks: int, least_ns: int) -> dict[str, Any]:
        """Run the GPU kernel that notices when it does not run; the moments are of the GPU's own clock."""
        gpu, room = self._gpu, 8192
        code, pointer = gpu.alloc(16 * room + 64)
        if code:
            raise CudaError("cuMemAlloc", code)
        gpu.call("cuMemsetD8_v2", c.c_uint64(pointer), 0, c.c_size_t(16 * room + 64))
        gpu.wait()
        _sleep_until(start)
        gpu.launch("gaps_arg_ns", ns, pointer, room, least_ns, blocks=blocks)
        gpu.wait()
        words = struct.unpack(f"<{2 * room + 8}Q", gpu.read(pointer, 16 * room + 64))
        gpu.free(pointer)
        number = min(words[0], room)
        return {"first": words[1], "last": words[2 + 2 * number], "gaps": [words[2 + 2 * i : 4 + 2 * i] for i in range(number)]}

    def depth(self, rounds: int, most: int) -> dict[str, Any]:
        """Return after how many launches behind a long GPU kernel the next one waits; None: not within `most`."""
        gpu = self._gpu
        gpu.launch("work_arg_ns", rounds)
        blocked = None
        for number in range(1, most):
            begun = time.monotonic_ns()
            gpu.launch("nothing")
            if time.monotonic_ns() - begun > 20_000_000:
                blocked = number
                break
        gpu.wait()
        return {"blocked_at": blocked}

    def event_costs(self, count: int) -> dict[str, float]:
        """Return ns of recording and asking an event, Python's own cost of a call (measured with cuCtxGetDevice) taken off."""
        gpu = self._gpu
        event, device = gpu.event(), c.c_int()
        box = c.byref(device)

        def each(name: str, *arguments: Any) -> float:
            function, best = getattr(gpu.lib, name), 1e18
            for _ in range(5):
                begun = time.perf_counter_ns()
                for _ in range(count):
                    function(*arguments)
                best = min(best, (time.perf_counter_ns() - begun) / count)
                gpu.wait()
            return best

        base = each("cuCtxGetDevice", box)
        return {
            "record_ns": each("cuEventRecord", event, None) - base,
            "query_ns": each("cuEventQuery", event) - base,
            "call_by_python_ns": base,
        }

    # ---- living and dying

    def lock(self, path: str) -> None:
        """Hold a record lock on a descriptor as high as the limiter's."""
        fd = os.open(path, os.O_RDWR)
        self._lock_fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 700)
        os.close(fd)
        fcntl.lockf(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)

    def storm(self, sign: str, seed: int, seconds: float, most: int, rounds: int, fill: int = 0) -> dict[str, Any]:
        """Allocate, free, launch and wait at random, leaving signs of life in a file, until killed or the time is over."""
        gpu, dice = self._gpu, random.Random(seed)
        fd = os.open(sign, os.O_RDWR)
        words = mmap.mmap(fd, SIGN.size)
        os.close(fd)
        done = longest = 0
        pointers: list[int] = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            state = dice.choices(range(1, 6), (3, 2, 4, 2, 1))[0]
            begun = time.monotonic_ns()
            SIGN.pack_into(words, 0, done, state, begun, longest)
            if state == 1 and len(pointers) < 8:
                code, pointer = gpu.alloc(dice.randrange(2 * MIB, most, 4096))
                if code == 0:
                    pointers.append(pointer)
                elif code != OUT_OF_MEMORY:
                    raise CudaError("cuMemAlloc", code)
            elif state == 2 and pointers:
                gpu.free(pointers.pop(dice.randrange(len(pointers))))
            elif state == 3:
                for _ in range(dice.randrange(1, 20)):
                    gpu.launch("work_arg_ns", dice.randrange(1, rounds), blocks=4)
            elif state == 4:
                gpu.wait()
            elif state == 5:
                gpu.memory()
            longest = max(longest, time.monotonic_ns() - begun)
            done += 1
            SIGN.pack_into(words, 0, done, 0, time.monotonic_ns(), longest)
        gpu.wait()
        for pointer in pointers:
            gpu.free(pointer)
        return {"done": done, "longest_ms": longest / 1e6}
