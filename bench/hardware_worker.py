"""A program that does on the GPU what bench/hardware.py tells it: ``hardware_worker.py SOCKET GROUP PROCESSES [--shed]``.

The first process of a group is its leader: it starts the others (so they are in its slice) and, on request, more of them; it does nothing
on the GPU itself. Each connects to the socket, says who it is, then obeys one JSON line at a time. It ends when the socket closes.
``--shed``: become a process without LD_PRELOAD first, as a program does that evades the limiter.
Needs nothing but Python: ``python -S`` runs it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import traceback

from hwkit.tasks import Tasks


def start(path: str, group: str, number: int) -> subprocess.Popen[bytes]:
    """Start one more process of this group."""
    return subprocess.Popen([sys.executable, "-S", __file__, path, group, f"={number}"], stdin=subprocess.DEVNULL)


def lead(path: str, group: str, processes: int) -> None:
    """Be the leader: start the others, start more when told to, leave no zombies."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for number in range(1, processes + 1):
        start(path, group, number)
    serve(path, group, 0, {"spawn": lambda number: {"pid": start(path, group, number).pid}})


def serve(path: str, group: str, number: int, commands: dict[str, object]) -> None:
    """Obey."""
    door = socket.socket(socket.AF_UNIX)
    door.connect(path)
    stream = door.makefile("rw", encoding="utf-8")
    stream.write(json.dumps({"group": group, "number": number, "pid": os.getpid()}) + "\n")
    stream.flush()
    for line in stream:
        order = json.loads(line)
        try:
            answer = commands[order.pop("do")](**order)  # type: ignore[operator]
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            answer = {"error": f"{type(error).__name__}: {error} (line {last.lineno} of {os.path.basename(last.filename)})"}
        stream.write(json.dumps(answer if answer is not None else {}) + "\n")
        stream.flush()


def main(arguments: list[str]) -> None:
    """Command line."""
    if "--shed" in arguments:
        words = [word for word in arguments if word != "--shed"]
        env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        os.execve(sys.executable, [sys.executable, "-S", __file__, *words], env)
    path, group, which = arguments
    if which.startswith("="):
        tasks = Tasks()
        serve(path, group, int(which[1:]), {name: getattr(tasks, name) for name in dir(tasks) if not name.startswith("_")})
    else:
        lead(path, group, int(which))


if __name__ == "__main__":
    faulthandler.enable()  # a crash inside the driver or the limiter leaves where it was
    with contextlib.suppress(BrokenPipeError, ConnectionError, KeyboardInterrupt):
        main(sys.argv[1:])
