"""The last ten minutes of a slice at one point a second, in compact rings."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

LENGTH = 600


class History:
    """A ring of usage: memory in bytes and compute in milli-GPU of each device.

    Parameters
    ----------
    uuids : sequence of str
        The slice's devices, in order.
    """

    def __init__(self, uuids: Sequence[str]):
        self._uuids = list(uuids)
        self._time = array("d")
        self._memory = [array("Q") for _ in uuids]
        self._compute = [array("H") for _ in uuids]
        self._at = 0

    def add(self, time: float, memory_bytes: Sequence[int], compute_milli: Sequence[int]) -> None:
        """Append a point of Unix `time`; the oldest of 600 goes."""
        if len(self._time) < LENGTH:
            self._time.append(time)
            for i, value in enumerate(memory_bytes):
                self._memory[i].append(value)
                self._compute[i].append(compute_milli[i])
        else:
            at = self._at
            self._time[at] = time
            for i, value in enumerate(memory_bytes):
                self._memory[i][at] = value
                self._compute[i][at] = compute_milli[i]
        self._at = (self._at + 1) % LENGTH

    def as_json(self, seconds: int) -> dict[str, object]:
        """Return the last `seconds` points, oldest first, as docs/interfaces.md writes them."""
        count = len(self._time)
        first = self._at if count == LENGTH else 0
        order = [(first + i) % count for i in range(max(0, count - seconds), count)]
        devices = {
            uuid: {
                "memory_used_bytes": [self._memory[i][k] for k in order],
                "compute_used_milli": [self._compute[i][k] for k in order],
            }
            for i, uuid in enumerate(self._uuids)
        }
        return {"interval_seconds": 1, "time": [round(self._time[k], 3) for k in order], "devices": devices}
