"""A notebook kernel for tests: holds GPU memory with known contents, and does on the GPU what stdin says. Answers each line with one.

Commands: ``hold MIB`` (allocates, fills, answers the checksum), ``sum``, ``launch``, ``work`` (launches without end),
``more MIB`` (allocates, answers the CUresult), ``less`` (frees what ``more`` allocated),
``second MIB`` (as ``more``, on the slice's second device),
``managed``, ``share`` (hands the memory out), ``drop`` (frees what is managed).
"""

from __future__ import annotations

import ctypes as c
import hashlib
import sys
import threading

MIB = 1024**2
PIECE = 4096
MOST_PIECES = 256


def lunch_mib() -> int:
    """Return what ada holds when she goes to lunch: 20 GiB where this machine's memory could take them in, else 4."""
    with open("/proc/meminfo") as file:
        available_kib = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    return (20 if available_kib > 24 * MIB else 4) * 1024


def pattern(number: int) -> bytes:
    """Return what is written into each MiB: another thing for each."""
    return hashlib.sha256(str(number).encode()).digest() * (PIECE // 32)


class Kernel:
    """What the program holds."""

    def __init__(self) -> None:
        from sim_client import Cuda  # not where only `lunch_mib` is wanted

        self.cuda = Cuda()
        self.function = self.cuda.make("cuModuleGetFunction", self.cuda.module, b"sim_busy_1000us")
        self.memory, self.mib = c.c_uint64(), 0
        self.managed = c.c_uint64()
        self.extra: list[c.c_uint64] = []

    def hold(self, mib: int) -> str:
        self.memory, self.mib = self.cuda.alloc(mib * MIB), mib
        for number in self.places():
            self.cuda.write(c.c_uint64(self.memory.value + number * MIB), pattern(number))
        return self.sum()

    def places(self) -> range:
        """Return where something is written, in MiB: the simulated driver keeps the contents of 64 KiB around each, up to a bound."""
        return range(0, self.mib, max(1, self.mib // MOST_PIECES))

    def sum(self) -> str:
        found = hashlib.sha256()
        for number in self.places():
            found.update(self.cuda.read(c.c_uint64(self.memory.value + number * MIB), PIECE))
        return found.hexdigest()

    def launch(self) -> str:
        self.cuda.launch(self.function)
        self.cuda.call("cuCtxSynchronize")
        return "launched"

    def work(self) -> str:
        """Launch again and again from now on, in another thread."""

        def run() -> None:
            self.cuda.call("cuCtxSetCurrent", self.cuda.context)
            while True:
                self.launch()

        threading.Thread(target=run, daemon=True).start()
        return "works"

    def more(self, mib: int) -> str:
        memory = c.c_uint64()
        result = self.cuda.lib.cuMemAlloc_v2(c.byref(memory), c.c_size_t(mib * MIB))
        self.extra += [memory] if result == 0 else []
        return str(result)

    def second(self, mib: int) -> str:
        from sim_client import Cuda

        Cuda(1)  # its context is the current one from here on
        try:
            return self.more(mib)
        finally:
            self.cuda.call("cuCtxSetCurrent", self.cuda.context)

    def less(self) -> str:
        while self.extra:
            self.cuda.free(self.extra.pop())
        return "less"

    def share(self) -> str:
        self.cuda.call("cuIpcGetMemHandle", (c.c_ubyte * 64)(), self.memory)
        return "shared"

    def manage(self) -> str:
        self.cuda.call("cuMemAllocManaged", c.byref(self.managed), c.c_size_t(MIB), 1)
        return "managed"

    def drop(self) -> str:
        self.cuda.free(self.managed)
        return "dropped"


def main() -> None:
    """Obey stdin until it closes."""
    kernel = Kernel()
    print("ready", flush=True)
    for line in sys.stdin:
        word, *rest = line.split()
        print(getattr(kernel, {"managed": "manage"}.get(word, word))(*map(int, rest)), flush=True)


if __name__ == "__main__":
    main()
