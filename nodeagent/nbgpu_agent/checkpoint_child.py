"""Makes the driver's checkpoint calls for the agent, in a process of its own: a call that hangs or crashes costs no agent.

``checkpoint_child.py LIBCUDA park|wake PARENT PID...``, run with ``python -I -S``. `park` locks all processes, says ``locked``, and once
it reads ``go`` checkpoints them. `wake` brings each to run again, whatever state it finds it in. The last line is JSON: an answer for
each process by its pid. It dies with the agent; whatever it left is found by `wake`.
"""

from __future__ import annotations

import ctypes as c
import json
import os
import signal
import sys

LOCK_MS = 5000
RUNNING, LOCKED, CHECKPOINTED, FAILED = range(4)
MISSING, NO_CUDA, PR_SET_PDEATHSIG = -1, 3, 1


class Driver:
    """The calls, each with a process's id; a result of `MISSING` stands for a driver that has them not."""

    def __init__(self, path: str):
        self._lib = c.CDLL(path)
        self._lib.cuInit(0)

    def call(self, name: str, pid: int, first_word: int = 0) -> int:
        """Return the result of ``cuCheckpointProcess<name>``."""
        function = getattr(self._lib, f"cuCheckpointProcess{name}", None)
        return MISSING if function is None else int(function(pid, (c.c_uint64 * 16)(first_word)))

    def state(self, pid: int) -> tuple[int, int]:
        """Return (result, state)."""
        function = getattr(self._lib, "cuCheckpointProcessGetState", None)
        state = c.c_int(-1)
        return (MISSING if function is None else int(function(pid, c.byref(state)))), state.value


def park(driver: Driver, pids: list[int]) -> dict[int, str]:
    """Lock all, then checkpoint all; stop at the first that cannot be."""
    for pid in pids:
        result = driver.call("Lock", pid, LOCK_MS)
        if result:
            return {pid: f"lock {result}"}
    print("locked", flush=True)
    if sys.stdin.readline().strip() != "go":
        for pid in pids:  # whoever they are: one that ended before it was locked has left its pid to another
            driver.call("Unlock", pid)
        return {pids[0]: "stopped 0"}
    for pid in pids:
        result = driver.call("Checkpoint", pid)
        if result:
            return {pid: f"checkpoint {result}"}
    return dict.fromkeys(pids, "checkpointed")


def wake(driver: Driver, pid: int) -> str:
    """Bring one process to run."""
    for _ in range(4):
        result, state = driver.state(pid)
        if result in (MISSING, NO_CUDA):
            return "gone"
        if result:
            return f"state {result}"
        if state == RUNNING:
            return "running"
        if state == FAILED:
            return "lost"
        step = "Restore" if state == CHECKPOINTED else "Unlock"
        result = driver.call(step, pid)
        if result and driver.state(pid) == (0, state):
            return f"{step.lower()} {result}"
    return "state 0"


def main() -> None:
    """Do what the command line says."""
    path, what, parent, *pids = sys.argv[1:]
    c.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        return
    driver, processes = Driver(path), [int(pid) for pid in pids]
    found = park(driver, processes) if what == "park" else {pid: wake(driver, pid) for pid in processes}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
