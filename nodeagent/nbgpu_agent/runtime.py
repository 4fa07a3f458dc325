"""The runtime directory: one agent at a time, and versioned copies of the libraries that processes map."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import signal
import time
from pathlib import Path

from nbgpu.errors import NbgpuError

from .procs import start_time

LOCK_FILE = "agent.lock"
SOCKET_PATH_MAX = 107
TAKEOVER_SECONDS = 5.0


class StartError(NbgpuError):
    """The agent cannot start; the message says why and what to do."""

    code = "start"


def prepare(path: Path) -> Path:
    """Make the runtime directory and return its absolute path."""
    path = path.absolute()
    # The longest path under it: slices/<32 characters>/api.sock
    if len(str(path)) + 51 > SOCKET_PATH_MAX:
        raise StartError(f"The runtime directory {path} has too long a path for the sockets in it: choose one of at most 56 characters.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "slices").mkdir(exist_ok=True)
    except OSError as error:
        raise StartError(f"The runtime directory {path} cannot be made: {error.strerror}. Choose another with --runtime-dir.") from None
    if path.stat().st_uid != os.geteuid():
        raise StartError(f"The runtime directory {path} belongs to another user: choose one of your own with --runtime-dir.")
    path.chmod(0o755)
    # Slice ids are not listed to others: who does not know one finds no file of it.
    (path / "slices").chmod(0o711)
    return path


class RuntimeLock:
    """The lock that makes an agent the only one of its runtime directory."""

    def __init__(self, path: Path):
        self.path = path / LOCK_FILE
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def take(self) -> bool:
        """Take the lock if nobody has it; return whether it is this agent's."""
        return self._try()

    def acquire(self, takeover: bool) -> None:
        """Take the lock; with `takeover` ask the one who has it to go, and end it when it does not."""
        if self._try():
            return
        pid, started = self._holder()
        if not takeover:
            raise StartError(
                f"Another nbgpu agent (pid {pid or 'unknown'}) serves {self.path.parent}. "
                "Stop it, or start this one with --takeover, or choose another --runtime-dir."
            )
        for number in (signal.SIGTERM, signal.SIGKILL):
            # The pid may be another's by now: its start time tells.
            if pid and start_time(pid) == started:
                os.kill(pid, number)
            deadline = time.monotonic() + TAKEOVER_SECONDS
            while time.monotonic() < deadline:
                if self._try():
                    return
                time.sleep(0.02)
        raise StartError(f"The nbgpu agent (pid {pid or 'unknown'}) that serves {self.path.parent} does not end: stop it first.")

    def _try(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()} {start_time(os.getpid())}\n".encode(), 0)
        return True

    def _holder(self) -> tuple[int, int]:
        words = os.pread(self._fd, 64, 0).split()
        if len(words) == 2 and all(word.isdigit() for word in words):
            return int(words[0]), int(words[1])
        return 0, 0

    def release(self) -> None:
        """Give the lock back."""
        os.close(self._fd)


def remove_unused(runtime: Path, machine: Path | None) -> None:
    """Where no slice is left, remove what processes of slices map; the next agent makes it again. The lock must be held.

    Parameters
    ----------
    machine : Path, optional
        Directory of the simulated machine.
    """
    slices = runtime / "slices"
    if slices.is_dir() and any(slices.iterdir()):
        return
    for directory in (runtime / "lib", machine):
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)


def built_libraries() -> Path:
    """Return where `nodeagent/build.py` puts the compiled libraries."""
    return Path(__file__).parent / "_lib"


def install_libraries(source: Path, runtime: Path) -> Path:
    """Copy the libraries to ``<runtime>/lib/<content hash>/`` unless they are there; return that directory.

    Running processes map these files, so a copy is never rewritten: other contents get another directory.
    """
    files = sorted(path for path in source.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not any(path.name == "libnbgpu.so" for path in files):
        raise StartError(
            f"No compiled libraries in {source}: take the platform wheel (py3-none-any has none); from a checkout: make setup."
        )
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(source)).encode() + b"\0" + path.read_bytes() + b"\0")
    target = runtime / "lib" / digest.hexdigest()[:16]
    if target.is_dir():
        return target
    fresh = runtime / "lib" / f".new-{os.getpid()}"
    shutil.rmtree(fresh, ignore_errors=True)
    for path in files:
        copy = fresh / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        copy.chmod(0o755 if os.access(path, os.X_OK) or path.suffix == ".so" else 0o644)
    for directory in (runtime / "lib", fresh, *(path for path in fresh.rglob("*") if path.is_dir())):
        directory.chmod(0o755)
    fresh.rename(target)
    return target
