"""``nbgpu serve``: the agent and the pool together, in the foreground or, for ``nbgpu run``, on demand in the background."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from .client import AgentClient, PoolClient
from .errors import NbgpuError, Unavailable
from .models import GrantState
from .paths import AGENT_SOCKET, POOL_SOCKET, SYSTEM_RUNTIME, made, runtime_dir
from .procs import is_alive
from .words import counted

START_SECONDS = 60.0
STOP_SECONDS = 10.0
POLL_SECONDS = 0.5
RESTARTS_IN_A_ROW = 5
ON_DEMAND_IDLE_SECONDS = float(os.environ.get("NBGPU_IDLE_SECONDS", "60"))
LOG, LOCK = "serve.log", "serve.lock"
_HELD = {GrantState.queued, GrantState.reserved, GrantState.bound, GrantState.releasing}


def command_of(module: str, extra: str) -> list[str]:
    """Return how to start a part as a program; raise when it is not installed."""
    try:
        found = importlib.util.find_spec(f"{module}.__main__") is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise NbgpuError(f"The {extra} is not installed here. Run: pip install 'nbgpu[{extra}]'", code="not-installed")
    return [sys.executable, "-m", module]


def serve_both(idle_exit_seconds: float) -> int:
    """Run both until a signal, or until idle for `idle_exit_seconds` (0: never); return the exit status."""
    runtime = runtime_dir()
    own_directory(runtime)
    lock = lock_serving(runtime)
    for _ in range(5):  # who only asks whether somebody serves holds it for a moment
        if lock is None:
            time.sleep(0.1)
            lock = lock_serving(runtime)
    if lock is None or AgentClient(runtime / AGENT_SOCKET, 2).healthy():
        raise NbgpuError(f"An agent already serves {runtime}: `nbgpu status` shows it.", code="running")
    both = Both(runtime)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        both.start()
        node = AgentClient(runtime / AGENT_SOCKET).node()
        kind = "simulated GPU" if node.simulated else "GPU"
        print(f"nbgpu serves {counted(len(node.devices), kind)} in {runtime}; `nbgpu run --gpu 1/4 -- PROGRAM` uses them.", flush=True)
        both.watch(idle_exit_seconds)
    except KeyboardInterrupt:
        pass
    finally:
        both.stop()
    return 0


class Both:
    """The agent and the pool as child processes."""

    def __init__(self, runtime: Path):
        self.runtime = runtime
        self.commands = {"agent": command_of("nbgpu_agent", "agent"), "pool": command_of("nbgpu_pool", "pool")}
        self.agent = AgentClient(runtime / AGENT_SOCKET, 2)
        self.pool = PoolClient(runtime / POOL_SOCKET, 2)
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self.restarts = {"agent": 0, "pool": 0}

    def start(self) -> None:
        """Start the agent, then the pool; return when both answer."""
        for name in ("agent", "pool"):
            self._start(name)

    def _start(self, name: str) -> None:
        environment = {**os.environ, "NBGPU_RUNTIME_DIR": str(self.runtime)}
        # In a session of their own: Ctrl-C in the terminal reaches only us, and we end them in the right order.
        child = subprocess.Popen(self.commands[name], stdin=subprocess.DEVNULL, env=environment, start_new_session=True)
        self.children[name] = child
        deadline = time.monotonic() + START_SECONDS
        while not (self.agent if name == "agent" else self.pool).healthy():
            if child.poll() is not None:
                raise Unavailable(f"The {name} ended with {child.returncode} while starting; its own message is above.", code="start")
            if time.monotonic() > deadline:
                raise Unavailable(f"The {name} did not answer within {START_SECONDS:g} s.", code="start")
            time.sleep(0.05)

    def watch(self, idle_exit_seconds: float) -> None:
        """Restart what dies; return when nothing was held for `idle_exit_seconds`."""
        idle_since = time.monotonic()
        while True:
            time.sleep(POLL_SECONDS)
            if not self.runtime.exists():
                raise Unavailable(f"{self.runtime} was removed: nobody can reach this pool and agent any more; they end.", code="runtime")
            for name, child in list(self.children.items()):
                if child.poll() is not None:
                    self._restart(name, child.returncode)
            if self._held():
                idle_since = time.monotonic()
            elif idle_exit_seconds and time.monotonic() - idle_since > idle_exit_seconds:
                return

    def _restart(self, name: str, code: int) -> None:
        self.restarts[name] += 1
        if self.restarts[name] > RESTARTS_IN_A_ROW:
            raise Unavailable(f"The {name} ended {self.restarts[name]} times, the last time with {code}; giving up.", code="start")
        print(f"nbgpu: the {name} ended with {code}; starting it again. Running programs keep their limits.", file=sys.stderr, flush=True)
        self._start(name)

    def _held(self) -> bool:
        """Return whether a slice is held or waited for; also when that cannot be known."""
        try:
            return any(grant.state in _HELD for grant in self.pool.grants()) or bool(self.agent.slices().slices)
        except NbgpuError:
            return True

    def stop(self) -> None:
        """End the pool, then the agent."""
        for name in ("pool", "agent"):
            child = self.children.get(name)
            if child is None or child.poll() is not None:
                continue
            child.terminate()
            try:
                child.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def pool_on_demand() -> PoolClient:
    """Return a pool that answers: the one of this runtime directory, or one started for this user in the background.

    The one in the background ends when no slice was held for a minute.
    """
    runtime = runtime_dir()
    pool = PoolClient(runtime / POOL_SOCKET)
    if pool.healthy():
        return pool
    refuse_beside_system(runtime)
    own_directory(runtime)
    log = runtime / LOG
    begin = log.stat().st_size if log.exists() else 0
    served = start_in_background(runtime.absolute(), log)
    started = time.monotonic()
    while not pool.healthy():
        # It may have ended because another one came first: that one holds the lock.
        if time.monotonic() - started > 2 * START_SECONDS or (not is_alive(served) and not is_served(runtime)):
            said = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines() if log.exists() else []
            raise Unavailable(
                f"The pool could not be started. {without_prefix(said[-3:]) or 'It did not answer.'} (Log: {log})", code="start"
            )
        time.sleep(0.05)
    return pool


def without_prefix(lines: list[str]) -> str:
    """Return what another `nbgpu` has said, for a sentence of this one."""
    return " ".join(line.removeprefix("nbgpu: ") for line in lines)


def start_in_background(runtime: Path, log: Path) -> int:
    """Start `nbgpu serve` as nobody's child (else it would belong to the slice that its starter is about to enter); return its pid."""
    serve = [sys.executable, "-m", "nbgpu", "serve", "--idle-exit", str(ON_DEMAND_IDLE_SECONDS)]
    environment = {**os.environ, "NBGPU_RUNTIME_DIR": str(runtime)}
    log.touch()
    done = subprocess.run(
        ["/bin/sh", "-c", '"$@" >>"$0" 2>&1 & echo $!', str(log.absolute()), *serve], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        env=environment, cwd="/", start_new_session=True, check=True, text=True,
    )  # fmt: skip
    return int(done.stdout)


def own_directory(runtime: Path) -> None:
    """Make the runtime directory; raise when it is another user's."""
    made(runtime)
    if runtime.stat().st_uid != os.geteuid():
        raise NbgpuError(f"{runtime} belongs to another user: set NBGPU_RUNTIME_DIR to a folder of your own.", code="runtime")


def lock_serving(runtime: Path) -> int | None:
    """Take the lock of those who serve `runtime`; return its descriptor, None when another has it."""
    descriptor = os.open(runtime / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def is_served(runtime: Path) -> bool:
    """Return whether an `nbgpu serve` lives here, still starting ones included."""
    descriptor = lock_serving(runtime)
    if descriptor is None:
        return True
    os.close(descriptor)
    return False


def refuse_beside_system(runtime: Path) -> None:
    """Raise when root's nbgpu already hands out this machine's GPUs: a second pool would give them twice."""
    if os.geteuid() != 0 and runtime != SYSTEM_RUNTIME and (SYSTEM_RUNTIME / AGENT_SOCKET).exists():
        raise NbgpuError(
            "The GPUs of this machine are handed out by its own nbgpu (in /run/nbgpu), which takes requests from its hub and from root. "
            "Start a notebook server with a GPU, or ask the admin.",
            code="system",
        )
