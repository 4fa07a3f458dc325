"""In a Python kernel: a cell waits before its first line while its GPU memory is on the host, and can be interrupted (docs/idle.md).

An IPython extension that the kernel provisioner names. It imports nothing of nbgpu's: kernels have environments of their own.
"""

from __future__ import annotations

import contextlib
import html
import json
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

LIMIT_AT = 112
"""Where `ctl` has the memory limit of the slice's first device: 0 while it is parked (`nbgpu_agent.layout`)."""
FLAG_AT, AWAY_AT, SLOTS = 40, 13376, 256
"""Where it has whether some kernel's memory is on the host, and the words that say whose: an owner's, or its complement on the way."""
LOOK_SECONDS = 0.25
ANSWER_SECONDS = 5.0
LENT = "This notebook's GPU was lent to others while it was idle."
WAITS = f"{LENT} The cell waits for it, before all new requests; interrupt it to give up."
MOVED = "This notebook's GPU memory is in host memory."
MOVED_WAITS = f"{MOVED} The cell waits until it is back, as soon as this server has room for it; interrupt it to give up."
GIVEN_UP = "Interrupted while waiting for the GPU: the cell did not run."


Bundle = dict[str, str]
"""What is shown, by kind of text."""
Update = Callable[[Bundle], object]


def ask(path: str, method: str, address: str) -> dict[str, Any]:
    """Return the agent's answer; empty where there is none."""
    with contextlib.suppress(OSError, ValueError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(ANSWER_SECONDS)
        connection.connect(address)
        connection.sendall(f"{method} {path} HTTP/1.0\r\nHost: slice\r\nContent-Length: 0\r\n\r\n".encode())
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        found = json.loads(answer.partition(b"\r\n\r\n")[2])
        return found if isinstance(found, dict) else {}
    return {}


def waiting_words(position: int | None) -> str:
    """Return what a cell says that waits in this place, from 1."""
    ahead = (position or 1) - 1
    if ahead < 1:
        return WAITS
    return f"{WAITS} {ahead} other server{'' if ahead == 1 else 's'} waited for the same GPU before."


def bundle(words: str) -> Bundle:
    """Return words as an output: a notice, no error and no text of the program's."""
    return {"text/plain": words, "text/html": f'<p role="status" style="margin: 0; padding: 0 8px">{html.escape(words)}</p>'}


class Wait:
    """Looks before each cell: an AST transformer of IPython, which may refuse to run a cell.

    Parameters
    ----------
    show : callable
        Shows a bundle as an output of the cell; returns what updates it.
    rejected : type
        What to raise where the cell shall not run (an `IPython.core.error.InputRejected`).
    """

    def __init__(self, directory: str, address: str, show: Callable[[Bundle], Update], rejected: type[Exception]):
        self._ctl = os.open(os.path.join(directory, "ctl"), os.O_RDONLY | os.O_CLOEXEC)
        self._address = address
        self._show = show
        self._rejected = rejected

    def parked(self) -> bool:
        """Return whether the slice holds nothing now."""
        return os.pread(self._ctl, 8, LIMIT_AT) == bytes(8)

    def moved(self) -> bool:
        """Return whether this process's memory is on the host by its user's wish, or on its way there or back."""
        if os.pread(self._ctl, 4, FLAG_AT) in (b"", bytes(4)):
            return False
        found = os.pread(self._ctl, 8 * SLOTS, AWAY_AT)
        words = struct.unpack(f"<{len(found) // 8}Q", found[: len(found) // 8 * 8])
        return any(os.getpid() in (word >> 32, (word ^ (2**64 - 1)) >> 32) for word in words if word)

    def visit(self, node: Any) -> Any:
        """Return the cell as it is, once the GPU is there."""
        if self.parked():
            self._hold(LENT, WAITS, self._wait)
        if self.moved():
            self._hold(MOVED, MOVED_WAITS, self._wait_for_memory)
        return node

    def _hold(self, what: str, waits: str, wait: Callable[[Update], None]) -> None:
        """Say what the cell waits for, and wait; the cell is not run when it is interrupted."""
        update = self._show(bundle(waits))
        began = time.monotonic()
        if not self._interruptible(wait, update):
            update(bundle(what))
            raise self._rejected(GIVEN_UP)
        update(bundle(f"{what} It is back after {max(1, round(time.monotonic() - began))}\u00a0s."))

    def _wait_for_memory(self, _: Update) -> None:
        """The Jupyter server tells the agent that a cell waits here."""
        while self.moved():
            time.sleep(LOOK_SECONDS)

    def _interruptible(self, wait: Callable[[Update], None], update: Update) -> bool:
        """Wait; return False when interrupted. IPython has another handler for SIGINT while it runs what awaits."""
        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, signal.default_int_handler) if main else None
        try:
            wait(update)
            return True
        except KeyboardInterrupt:
            return False
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)

    def _wait(self, update: Update) -> None:
        asked: dict[str, Any] = {}
        said = WAITS
        while self.parked() or asked.get("state") == "restoring":
            asked = ask("/v1/idle/want", "POST", self._address)
            words = waiting_words(asked.get("position"))
            if words != said:
                said = words
                update(bundle(words))
            time.sleep(LOOK_SECONDS)


def load_ipython_extension(ipython: Any) -> None:
    """Have cells wait; nothing where the kernel is in no slice."""
    from IPython.core.error import InputRejected
    from IPython.display import display

    class Interrupted(InputRejected):
        """The cell did not run. What IPython shows of it is one line, not where in this file it was raised."""

        def _render_traceback_(self) -> list[str]:
            return [str(self)]

    def show(first: Bundle) -> Update:
        handle: Any = display(first, raw=True, display_id=True)
        return lambda more: handle.update(more, raw=True)

    directory, address = os.environ.get("NBGPU_SLICE_DIR"), os.environ.get("NBGPU_SOCKET")
    if directory and address:
        with contextlib.suppress(OSError):
            ipython.ast_transformers.append(Wait(directory, address, show, Interrupted))
