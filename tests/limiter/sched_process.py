"""A process that gives slices turns and nothing else, to be killed: an agent's scheduler without the agent.

Arguments: the folders of the slices. It says `ready` once all have turns, and lives until it is killed.
"""

from __future__ import annotations

import ctypes as c
import os
import sys
import threading
from pathlib import Path

from nbgpu_agent import layout
from nbgpu_agent.native import Native


def main() -> None:
    """Give turns on one device until killed."""
    scheduler = Native().scheduler()
    for name in sys.argv[1:]:
        ctl_fd, use_fd = (os.open(Path(name) / file, os.O_RDWR) for file in ("ctl", "use"))
        device = layout.Ctl.from_buffer_copy(os.pread(ctl_fd, c.sizeof(layout.Ctl), 0)).device[0]
        scheduler.add(ctl_fd, use_fd, 0, 0, device.compute_milli, device.mode)
    print("ready", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
