"""The last ten minutes of a slice at one point a second, and the last hour at one point in ten seconds, in compact rings."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

LENGTH = 600
"""Points of the last ten minutes, one a second."""
COARSE_SECONDS = 10
HOUR = 3600


class Ring:
    """The last `length` points: their times, and of each device memory in bytes and compute in milli-GPU."""

    def __init__(self, length: int, devices: int):
        self._length = length
        self._time = array("d")
        self._memory = [array("Q") for _ in range(devices)]
        self._compute = [array("H") for _ in range(devices)]
        self._at = 0

    def add(self, time: float, memory_bytes: Sequence[int], compute_milli: Sequence[int]) -> None:
        """Append a point; the oldest goes."""
        if len(self._time) < self._length:
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
        self._at = (self._at + 1) % self._length

    def last(self, points: int) -> tuple[list[float], list[list[int]], list[list[int]]]:
        """Return times, memory and compute of the last `points`, oldest first."""
        count = len(self._time)
        first = self._at if count == self._length else 0
        order = [(first + i) % count for i in range(max(0, count - points), count)]
        memory, compute = ([[of[k] for k in order] for of in kind] for kind in (self._memory, self._compute))
        return [round(self._time[k], 3) for k in order], memory, compute


class History:
    """The usage of a slice's devices over time.

    A point of the last hour has the most memory and the average compute of its ten seconds: a peak is not lost in it.

    Parameters
    ----------
    uuids : sequence of str
        The slice's devices, in order.
    """

    def __init__(self, uuids: Sequence[str]):
        self._uuids = list(uuids)
        self._fine = Ring(LENGTH, len(uuids))
        self._coarse = Ring(HOUR // COARSE_SECONDS, len(uuids))
        self._now: list[tuple[float, Sequence[int], Sequence[int]]] = []
        """The points of the ten seconds that are not over."""

    def add(self, time: float, memory_bytes: Sequence[int], compute_milli: Sequence[int]) -> None:
        """Append a point of Unix `time`."""
        self._fine.add(time, memory_bytes, compute_milli)
        # by count, too: of a clock that is set back the seconds come twice
        if self._now and (time // COARSE_SECONDS != self._now[0][0] // COARSE_SECONDS or len(self._now) >= COARSE_SECONDS):
            self._coarse.add(*_together(self._now))
            self._now = []
        self._now.append((time, memory_bytes, compute_milli))

    def as_json(self, seconds: int) -> dict[str, object]:
        """Return the last `seconds`, oldest first, as docs/interfaces.md writes them: beyond ten minutes one point in ten seconds."""
        if seconds <= LENGTH:
            interval, (times, memory, compute) = 1, self._fine.last(seconds)
        else:
            interval, (times, memory, compute) = COARSE_SECONDS, self._coarse.last(seconds // COARSE_SECONDS)
            if self._now:
                time, most, average = _together(self._now)
                times.append(round(time, 3))
                for i in range(len(self._uuids)):
                    memory[i].append(most[i])
                    compute[i].append(average[i])
        devices = {uuid: {"memory_used_bytes": memory[i], "compute_used_milli": compute[i]} for i, uuid in enumerate(self._uuids)}
        return {"interval_seconds": interval, "time": times, "devices": devices}


def _together(points: Sequence[tuple[float, Sequence[int], Sequence[int]]]) -> tuple[float, list[int], list[int]]:
    """Return several points as one: the last one's time, of each device the most memory and the average compute."""
    times, memory, compute = zip(*points, strict=True)
    return times[-1], [max(of) for of in zip(*memory, strict=True)], [sum(of) // len(of) for of in zip(*compute, strict=True)]
