"""GPU memory of processes to the host and back: what slices that are parked and kernels that their users put aside need of the driver.

A child makes the calls (`checkpoint_child`). What is asked of it can be asked again: an agent that is killed leaves nothing half done that
the next one's `bring_back` would not bring to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

from nbgpu.models import SliceDevice
from nbgpu.quantities import format_memory

from .helpers import Helpers
from .idle import host_refusal, parse_meminfo
from .marks import mark
from .procs import Process
from .slicedir import Root

log = logging.getLogger("nbgpu.agent")
Go = Callable[[], Awaitable[bool]]
CHILD = Path(__file__).with_name("checkpoint_child.py")
CHILD_SECONDS = 60.0
BYTES_PER_SECOND = 1e8
"""Slower than this nothing is copied: who takes longer hangs."""
AGAIN_SECONDS = 0.5
PATIENCE_SECONDS = 10.0
"""So long what is to be put away waits for a helper process: it may begin nothing on the GPU meanwhile."""
USED = "it is used again"
TOO_MANY = "too many others are on their way to or from the host at this moment"
WORDS = {
    "-1": "this driver has no checkpoint calls; 570 and later have",
    "2": "the GPU had no room",
    "3": "a process of it has ended, or uses no CUDA any more",
    "600": "its work on the GPU did not end in time",
    "800": "the agent may not do that to its processes",
    "801": "it holds managed memory, or memory that it shares with other processes",
}


class Moved(Protocol):
    """Processes whose GPU memory is moved, and what they held on each of their slice's devices."""

    @property
    def processes(self) -> tuple[Root, ...]: ...
    @property
    def device_bytes(self) -> tuple[int, ...]: ...


class Checkpoints:
    """Moves GPU memory of processes to the host and back.

    Parameters
    ----------
    cuda : str
        Path or name of the driver's library.
    host_bytes : int
        Host memory that all that is moved may take together; 0 = nothing is ever moved.
    moved_bytes : callable
        Returns what it takes now.
    moving_bytes : callable
        Returns how much of that is on its way: the host may not have given it yet.
    """

    def __init__(self, cuda: str, host_bytes: int, moved_bytes: Callable[[], int], moving_bytes: Callable[[], int] = lambda: 0):
        self._cuda = cuda
        self.host_bytes = host_bytes
        self._moved_bytes = moved_bytes
        self._moving_bytes = moving_bytes
        self._helpers = Helpers()
        self.room: Callable[[str, Collection[int]], Awaitable[tuple[int, int] | None]] = _unknown
        """Returns (free bytes of a device, bytes that some processes hold there), as the driver tells."""

    def host_refusal(self, needed_bytes: int) -> str | None:
        """Return why the host's memory is too small for so many bytes more; None when it is not."""
        available, total = parse_meminfo(Path("/proc/meminfo").read_text())
        return host_refusal(needed_bytes, self._moved_bytes(), self.host_bytes, max(0, available - self._moving_bytes()), total)

    async def held(self, parts: Sequence[SliceDevice], pids: Collection[int], told: Sequence[int] = ()) -> tuple[int, ...]:
        """Return what processes hold on each of a slice's devices, bytes, as the driver says.

        Parameters
        ----------
        told : sequence of int
            What counts where it says nothing, as far as the slice's limits go.
        """
        found: list[int] = []
        for index, part in enumerate(parts):
            room = await self.room(part.uuid, pids)
            seen = room[1] if room is not None else 0
            found.append(seen or (min(told[index], part.memory_bytes) if told else 0))
        return tuple(found)

    async def put_away(self, user: str, moved: Moved, parts: Sequence[SliceDevice], go: Go) -> str | None:
        """Lock and checkpoint processes of a slice; return why that could not be.

        Parameters
        ----------
        user : str
            Whose it is (`LiveSlice.user`): nobody has all the helper processes.
        go : callable
            Asked when all of them are locked; False: they are used again.
        """

        async def sure() -> bool:
            held = await self.held(parts, [root.pid for root in moved.processes])
            if any(more > booked for more, booked in zip(held, moved.device_bytes, strict=True)):
                return False  # it took more behind the limiter's back: the host's memory was asked for less
            return await go()

        if not await self._helpers.take(user, PATIENCE_SECONDS):
            return TOO_MANY
        try:
            answer = await self._child("park", moved, sure)
        finally:
            self._helpers.give(user)
        failed = next((words for words in answer.values() if words != "checkpointed"), "" if answer else "died 0")
        return _words(failed) if failed else None

    async def bring_back(self, user: str, whose: str, parts: Sequence[SliceDevice], left: Callable[[], Moved | None]) -> list[int] | None:
        """Have all processes run again, however often it takes.

        Parameters
        ----------
        user : str
            Whose it is (`LiveSlice.user`).
        whose : str
            For the log.
        left : callable
            Returns what is to come back; None once it is not wanted any more: its slice has ended.

        Returns
        -------
        list of int or None
            The processes whose memory the driver could not restore; None when nothing was left to bring back.
        """
        told = ""
        while (moved := left()) is not None:
            if not await self._has_room(whose, parts, moved):
                await asyncio.sleep(AGAIN_SECONDS)
                continue
            await self._helpers.take(user)
            try:
                answer = await self._child("wake", moved, None) if left() is not None else {}
            finally:
                self._helpers.give(user)
            if left() is None:
                return None
            waits = [words for words in answer.values() if words not in ("running", "gone", "lost")]
            if not waits and (answer or not alive(moved)):
                return [int(pid) for pid, words in answer.items() if words == "lost"]
            words = _words(waits[0] if waits else "died 0")
            if words != told:
                told = words
                log.warning("%s is not restored yet: %s", whose, words)
            await asyncio.sleep(AGAIN_SECONDS)
        return None

    async def _has_room(self, whose: str, parts: Sequence[SliceDevice], moved: Moved) -> bool:
        """Return whether the device itself has the room that the books have: a process that has just died may not be gone from it.

        Some drivers never restore a process whose restore once found none.
        """
        pids = {root.pid for root in alive(moved)}
        for part, needed in zip(parts, moved.device_bytes, strict=True):
            found = await self.room(part.uuid, pids)
            if found is not None and found[0] + found[1] < needed:
                log.info("%s waits for room on GPU %d: %s free", whose, part.index, format_memory(found[0]))
                return False
        return True

    async def _child(self, what: str, moved: Moved, go: Go | None) -> dict[str, str]:
        """Have a child make the calls; return what it says of each process by its pid, nothing when it died or hung."""
        roots = alive(moved)
        if not roots:
            return {}
        pids = [str(root.pid) for root in roots]

        async def sure() -> bool:
            # Pids of processes that have ended meanwhile may be others' by now: those were locked instead.
            return all(Process(root.pid, root.start_time).alive() for root in roots) and go is not None and await go()

        arguments = [sys.executable, "-I", "-S", str(CHILD), self._cuda, what, str(os.getpid()), *pids]
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        pipe = asyncio.subprocess.PIPE
        child = await asyncio.create_subprocess_exec(*arguments, stdin=pipe, stdout=pipe, env=environment)
        try:
            return await asyncio.wait_for(_speak(child, sure), CHILD_SECONDS + sum(moved.device_bytes) / BYTES_PER_SECOND)
        except (asyncio.TimeoutError, OSError, ValueError):
            return {}
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()


def alive(moved: Moved) -> list[Root]:
    """Return those of the processes that have not ended."""
    return [root for root in moved.processes if Process(root.pid, root.start_time).alive()]


async def _unknown(_uuid: str, _pids: Collection[int]) -> tuple[int, int] | None:
    return None


async def _speak(child: asyncio.subprocess.Process, go: Go) -> dict[str, str]:
    assert child.stdin is not None
    assert child.stdout is not None
    line = await child.stdout.readline()
    if line.strip() == b"locked":
        mark("idle.locked")
        child.stdin.write(b"go\n" if await go() else b"stop\n")
        line = await child.stdout.readline()
    found = json.loads(line or b"{}")
    return {str(pid): str(words) for pid, words in found.items()} if isinstance(found, dict) else {}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def _words(failed: str) -> str:
    step, _, code = failed.partition(" ")
    if step == "stopped":
        return USED
    if step == "died":
        return "who asked the driver for it has ended before its time"
    return WORDS.get(code, f"the driver's {step} failed ({code})")
