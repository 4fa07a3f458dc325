"""Stops another process with the driver's checkpoint calls and lets it go on: ``checkpoint_probe.py STEP PID``; prints JSON.

STEP: ``lock``, ``checkpoint``, ``restore``, ``unlock``, ``state``. A line ``begin`` comes first, right before the call.
"""

from __future__ import annotations

import ctypes as c
import json
import sys
import time

NAMES = {
    "lock": "cuCheckpointProcessLock",
    "checkpoint": "cuCheckpointProcessCheckpoint",
    "restore": "cuCheckpointProcessRestore",
    "unlock": "cuCheckpointProcessUnlock",
}


def main(step: str, pid: int) -> None:
    """Do one step."""
    lib = c.CDLL("libcuda.so.1")
    name = NAMES.get(step, "cuCheckpointProcessGetState")
    function = getattr(lib, name, None)
    if function is None:
        print(json.dumps({"missing": name}))
        return
    lib.cuInit(0)
    state = c.c_int(-1)
    print("begin", flush=True)
    begun = time.monotonic()
    if step == "state":
        code = function(pid, c.byref(state))
    else:
        arguments = (c.c_uint64 * 16)(5000 if step == "lock" else 0)  # the lock's time-out, ms; the rest is reserved
        code = function(pid, arguments)
    print(json.dumps({"code": code, "seconds": time.monotonic() - begun, "state": state.value}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
