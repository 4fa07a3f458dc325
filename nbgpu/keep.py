"""``python -m nbgpu.keep PROGRAM ...``: runs a service and starts it again at once when a signal has killed it.

JupyterHub looks after its managed services twice a minute only; so long no server could start, and nobody would hand out the
GPU's time. A program that ends by itself is not started again: its exit status is passed on, and the hub decides.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

TAKEOVER = "--takeover"
PAUSE_SECONDS = 0.5
PAUSE_MOST_SECONDS = 10.0
LONG_LIFE_SECONDS = 10.0
"""Who lived so long is started again without a pause."""


class Keeper:
    """One program, its signals passed on."""

    def __init__(self, command: Sequence[str]):
        self.command: list[str] = list(command)
        self.child: subprocess.Popen[bytes] | None = None
        self.told: int | None = None

    def tell(self, number: int, frame: FrameType | None = None) -> None:
        """Pass a signal on; from then on nothing is started again."""
        self.told = number
        if self.child is not None:
            self.child.send_signal(number)

    def run(self) -> int:
        """Run until the program ends by itself or was told to end; return its exit status."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self.tell)
        pause = 0.0
        while True:
            began = time.monotonic()
            self.child = subprocess.Popen(self.command)
            if self.told is not None:  # while it was being started
                self.child.send_signal(self.told)
            status = self.child.wait()
            self.child = None
            if self.told is not None or status >= 0:
                return status if status >= 0 else 128 - status
            pause = 0.0 if time.monotonic() - began > LONG_LIFE_SECONDS else min(PAUSE_MOST_SECONDS, max(PAUSE_SECONDS, 2 * pause))
            print(f"nbgpu: {' '.join(self.command[:3])} was killed by signal {-status}; starting it again", file=sys.stderr, flush=True)
            self._rest(pause)
            if self.told is not None:
                return 128 + self.told
            # whoever has taken the place meanwhile was meant to: a newer hub's
            self.command = [word for word in self.command if word != TAKEOVER]

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self.told is None and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))


if __name__ == "__main__":
    sys.exit(Keeper(sys.argv[1:]).run())
