"""How a process is suspended: by the driver's checkpoint lock, so that only its GPU calls wait, else by SIGSTOP, so that all of it stands.

The lock rests on NVIDIA's library in the process itself: one that speaks to the driver without it, or lets itself go on, is stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from . import procs
from .procs import Process

log = logging.getLogger("nbgpu.agent")
How = Literal["lock", "stop"]
LEAST_DRIVER = 570
LOCK_MS = 500
"""What a process has submitted must be done in so long, else it is stopped: then that goes on to its end too, and nothing new begins."""
ANSWER_SECONDS = 1.5
"""A driver that has not answered by then is not waited for."""
THREADS = 4
_LOCKED = 1
_ARGUMENT_BYTES = 64


class GpuLock:
    """The driver's checkpoint lock (``cuCheckpointProcess*``), through its library in this process; no context is made.

    Parameters
    ----------
    library : str
        Name or path of ``libcuda.so.1``.
    driver_version : str
        As NVML tells it.
    """

    def __init__(self, library: str, driver_version: str):
        self.lacks = ""
        """Why there is no lock; "" where there is one."""
        self._ready = False
        branch = driver_version.partition(".")[0]
        if not branch.isdecimal() or int(branch) < LEAST_DRIVER:
            self.lacks = f"this driver ({driver_version}) has no lock, r{LEAST_DRIVER} and later do"
            return
        try:
            self._cuda = ctypes.CDLL(library)
            for name in ("Lock", "Unlock", "GetState"):
                getattr(self._cuda, f"cuCheckpointProcess{name}")
        except (OSError, AttributeError) as error:
            self.lacks = f"the driver's library cannot do it ({error})"

    def lock(self, pid: int) -> bool:
        """Let no GPU call of a process begin, and wait until those that have begun are done; return whether that is so."""
        timeout = (ctypes.c_uint * (_ARGUMENT_BYTES // 4))(LOCK_MS)
        return self._call("Lock", pid, ctypes.byref(timeout)) or self.locked(pid)

    def unlock(self, pid: int) -> bool:
        """Let its calls go on."""
        return self._call("Unlock", pid, None)

    def locked(self, pid: int) -> bool:
        """Return whether a process is locked."""
        state = ctypes.c_int(-1)
        return self._call("GetState", pid, ctypes.byref(state)) and state.value == _LOCKED

    def _call(self, name: str, pid: int, argument: object) -> bool:
        if self.lacks:
            return False
        if not self._ready:  # as the hardware kit measures the lock
            self._ready = self._cuda.cuInit(0) == 0
        return getattr(self._cuda, f"cuCheckpointProcess{name}")(ctypes.c_int(pid), argument) == 0


class Suspender:
    """Suspends processes and lets them go on."""

    def __init__(self, lock: GpuLock):
        self._lock = lock
        # Own threads: the driver may take its time over each process.
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="gpu-lock")

    @property
    def words(self) -> str:
        """How processes are suspended here, for the log."""
        return f"SIGSTOP ({self._lock.lacks})" if self._lock.lacks else "the driver's lock, else SIGSTOP"

    async def suspend(self, process: Process) -> How | None:
        """Suspend exactly this process; return how, None where it has ended or may not be touched."""
        if await self._ask(self._lock.lock, process):
            if process.alive():
                return "lock"
            await self._ask(self._lock.unlock, process)  # it ended meanwhile: the pid may be another's
            return None
        return "stop" if self.stop(process) else None

    @staticmethod
    def stop(process: Process) -> bool:
        """Stop all of it; False where it has ended or may not be touched."""
        return procs.send(process, signal.SIGSTOP)

    async def resume(self, process: Process) -> bool:
        """Let a process go on, however it was suspended; False where it has ended or may not be touched."""
        if process.alive():
            await self._ask(self._lock.unlock, process)
        return procs.send(process, signal.SIGCONT)

    async def holds(self, process: Process) -> bool:
        """Return whether a process is locked."""
        return await self._ask(self._lock.locked, process)

    async def _ask(self, question: Callable[[int], bool], process: Process) -> bool:
        if self._lock.lacks:
            return False
        answer = asyncio.get_running_loop().run_in_executor(self._threads, question, process.pid)
        with contextlib.suppress(asyncio.TimeoutError):
            return await asyncio.wait_for(asyncio.shield(answer), ANSWER_SECONDS)
        log.warning("The driver does not answer about process %d", process.pid)
        return False

    def close(self) -> None:
        """Wait for nothing."""
        self._threads.shutdown(wait=False, cancel_futures=True)
