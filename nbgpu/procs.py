"""Whether processes of this machine live, from /proc."""

from __future__ import annotations


def stat_fields(pid: int | str) -> list[bytes]:
    """Return the fields of ``/proc/<pid>/stat`` from the third (state) on; empty when the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            return file.read(1024).rpartition(b")")[2].split()
    except OSError:
        return []


def lives(fields: list[bytes]) -> bool:
    """Return whether a process with these fields runs: it is there and no zombie.

    One whose first thread has ended shows as a zombie, and goes on with its others.
    """
    return bool(fields) and (fields[0] not in (b"Z", b"X") or int(fields[17]) > 1)


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended and that nobody has waited for does not."""
    return lives(stat_fields(pid))


def user_of(pid: int) -> int | None:
    """Return the real uid that a process runs as; None when it is gone."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            return next((int(line.split()[1]) for line in file if line.startswith(b"Uid:")), None)
    except (OSError, ValueError):
        return None
