"""Start JupyterHub with everything it needs, say how to reach it, and end all of it on Ctrl-C (`make run`)."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO

from nbgpu.cli_run import HUB as RUN
from nbgpu.client import AgentClient, PoolClient
from nbgpu.errors import NbgpuError
from nbgpu.models import GrantState, Node
from nbgpu.paths import AGENT_SOCKET, POOL_SOCKET, runtime_dir
from nbgpu.procs import lives, stat_fields
from nbgpu.quantities import GIB
from nbgpu.words import counted

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".nbgpu"
START_SECONDS = 60
STOP_SECONDS = 15
SERVERS_SECONDS = 5
PR_SET_CHILD_SUBREAPER = 36


class Stop(Exception):
    """It cannot start, or has ended; the message says why."""


def port_is_free(port: int) -> bool:
    """Return whether a server may listen on `port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def free_port(wanted: int) -> int:
    """Return `wanted`, or another port when it is taken: for ports that nobody has to know."""
    if port_is_free(wanted):
        return wanted
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def be_alone(folder: Path, url: str) -> list[IO[str]]:
    """Return the open locks of a hub's folder and of the runtime directory; raise `Stop` where another run has one of them.

    It would take over that run's agent and pool, and its users would lose their servers' proxy.
    """
    runtime = runtime_dir()
    locks: list[IO[str]] = []
    for path in (folder / "run.lock", runtime.with_name(f"{runtime.name}.run.lock")):
        try:
            lock = path.open("a+")
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            there = lock.read().strip()
            remedy = "End that one (Ctrl-C there), or give this one places of its own: NBGPU_RUNTIME_DIR=/tmp/nbgpu-2 in another checkout."
            raise Stop(f"nbgpu runs already, at {there or 'another address'}. {remedy}") from None
        lock.truncate(0)
        lock.write(url)
        lock.flush()
        locks.append(lock)
    return locks


def be_nobodys_heir() -> None:
    """Raise `Stop` where another installation's agent serves the runtime directory: the hub's own would end it and take its slices over."""
    runtime = runtime_dir()
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(runtime / AGENT_SOCKET))
        except OSError:
            return
        pid = int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)
    program = program_of(pid)
    if program != sys.executable:
        raise Stop(
            f"An nbgpu agent that is not this checkout's ({program or 'in a container'}, pid {pid}) serves {runtime}, and this would take "
            "its GPUs over. Give this one a place of its own: make run NBGPU_RUNTIME_DIR=/tmp/nbgpu-2"
        )


def program_of(pid: int) -> str:
    """Return the interpreter that a process was started by; nothing where that can't be seen."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
    except OSError:
        return ""


def descendants() -> list[int]:
    """Return all living processes below this one. As a subreaper it inherits orphans, so none of them can escape the count."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and lives(fields := stat_fields(entry)):
            parents[int(entry)] = int(fields[1])
    found: list[int] = []
    for pid in parents:
        above = pid
        while above in parents and above != os.getpid():
            above = parents[above]
        if above == os.getpid() and pid != os.getpid():
            found.append(pid)
    return found


def reap() -> None:
    """Collect orphans that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def wait_until(done: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition; return whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def end_servers(hub: subprocess.Popen[bytes]) -> None:
    """End what runs in slices while the agent still lives, so that it sees them end and leaves nothing of theirs behind.

    Programs that others run beside it (`nbgpu run`) are not waited for. The queue goes first: what they give back would be granted, and
    the hub would start a server that nobody ends.
    """
    agent = AgentClient(runtime_dir() / AGENT_SOCKET, 2)
    empty_queue()
    for pid in descendants():
        if in_slice(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def ended() -> bool:
        reap_others(hub)
        empty_queue()  # who came meanwhile
        try:
            return all(one.slice.owner.hub == RUN for one in agent.slices().slices)
        except NbgpuError:
            return True

    wait_until(ended, SERVERS_SECONDS)


def empty_queue() -> None:
    """Give up all that servers wait for at the pool; a pool that does not answer grants nothing either."""
    pool = PoolClient(runtime_dir() / POOL_SOCKET, 2)
    with contextlib.suppress(NbgpuError):
        for grant in pool.grants():
            if grant.state is GrantState.queued and grant.request.owner.hub != RUN:
                pool.cancel(grant.request.request_id)


def in_slice(pid: int) -> bool:
    """Return whether a process was started inside a slice."""
    try:
        return b"\0NBGPU_SOCKET=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def end(hub: subprocess.Popen[bytes]) -> None:
    """End the hub and whatever it started: asked first, then told."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    print("\nStopping: servers, kernels, pool, agent and hub ...", flush=True)
    end_servers(hub)
    if hub.poll() is None:
        hub.terminate()
        try:
            hub.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            hub.kill()

    def gone() -> bool:
        reap()
        return not descendants()

    for number, seconds in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        if gone():
            break
        for pid in descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        wait_until(gone, seconds)
    left = descendants()
    print(f"Still running: {left}" if left else "All stopped.", flush=True)


def gpus(node: Node) -> str:
    """Return the GPUs found, in one line: ``2 simulated GPUs, 80 GiB each: no NVIDIA driver on this machine``."""
    count = len(node.devices)
    sizes = sorted({device.memory_bytes for device in node.devices})
    size = " or ".join(f"{size / GIB:.0f} GiB" for size in sizes) + (" each" if count > 1 else "")
    if node.simulated:
        return f"{counted(count, 'simulated GPU')}, {size}: no NVIDIA driver on this machine"
    models = ", ".join(sorted({device.model for device in node.devices}))
    return f"{counted(count, 'GPU')} ({models}), {size}; driver {node.driver_version}"


def say(url: str, log: Path) -> None:
    """Print where it is, how to log in, which GPUs it has."""
    runtime = runtime_dir()
    named = f"NBGPU_RUNTIME_DIR={runtime} " if os.environ.get("NBGPU_RUNTIME_DIR") else ""
    node = AgentClient(runtime / AGENT_SOCKET).node()
    password = runtime / "login-password"
    word = password.read_text().strip() if password.is_file() else ""
    print(
        f"\n  nbgpu is ready:  {url}\n"
        f"  Log in:          any name, such as ada or grace; password: {word or '(see ' + str(log) + ')'}\n"
        f"  GPUs:            {gpus(node)}\n"
        f"  In a terminal:   {named}.venv/bin/nbgpu status\n"
        f"  Log:             {os.path.relpath(log)}\n"
        f"  Stop:            Ctrl-C\n",
        flush=True,
    )


def answers(url: str, hub: subprocess.Popen[bytes], log: Path) -> bool:
    """Return whether hub, agent and pool answer; raise `Stop` when one of them has ended."""
    if hub.poll() is not None:
        raise Stop(f"JupyterHub ended with {hub.returncode} before it answered.\n{errors_of(log)}")
    said = complaint(log)
    if said:
        raise Stop(said)
    try:
        with urllib.request.urlopen(f"{url}hub/health", timeout=2):
            pass
        AgentClient(runtime_dir() / AGENT_SOCKET).node()
        PoolClient(runtime_dir() / POOL_SOCKET).devices()
    except (urllib.error.URLError, http.client.HTTPException, OSError, NbgpuError):
        return False
    return True


def errors_of(log: Path) -> str:
    """Return the last lines of the hub's log that look like an error."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    wrong = [line for line in lines if any(word in line for word in ("[E ", "[C ", "Error", "error:"))]
    return "\n".join("    " + line for line in (wrong or lines)[-8:])


def complaint(log: Path) -> str | None:
    """Return what the agent or the pool said when it could not start."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return next((line for line in lines if line.startswith(("nbgpu agent: ", "nbgpu pool: "))), None)


def start(port: int, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start the hub; return its process and address once it answers."""
    data = log.parent / "hub"
    data.mkdir(parents=True, exist_ok=True)
    url = f"http://127.0.0.1:{port}/"
    command = [
        sys.executable, "-m", "jupyterhub", "-f", str(ROOT / "jupyterhub_config.py"),
        f"--JupyterHub.bind_url={url}", f"--JupyterHub.hub_port={free_port(8081)}",
        f"--ConfigurableHTTPProxy.api_url=http://127.0.0.1:{free_port(8001)}",
    ]  # fmt: skip
    with log.open("wb") as out:
        hub = subprocess.Popen(command, cwd=data, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    try:
        if not wait_until(lambda: answers(url, hub, log), START_SECONDS):
            raise Stop(f"JupyterHub did not answer within {START_SECONDS} s.\n{errors_of(log)}")
    except BaseException:
        end(hub)
        raise
    return hub, url


def watch(hub: subprocess.Popen[bytes], log: Path) -> None:
    """Show what the hub logs as errors until it ends."""
    with log.open(errors="replace") as lines:
        lines.seek(0, os.SEEK_END)
        while hub.poll() is None:
            reap_others(hub)
            for line in lines:
                if "[E " in line or "[C " in line:
                    print(f"  {line.rstrip()}", flush=True)
            time.sleep(0.5)
    raise Stop(f"JupyterHub ended with {hub.returncode}.")


def reap_others(hub: subprocess.Popen[bytes]) -> None:
    """Collect ended orphans, but leave the hub's exit status to its `Popen`."""
    for pid in children():
        if pid != hub.pid and stat_fields(pid)[:1] == [b"Z"]:
            os.waitpid(pid, os.WNOHANG)


def children() -> list[int]:
    """Return this process's own children, ended ones included."""
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except OSError:
        return []


def main() -> int:
    """Run until Ctrl-C; return the exit status."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--port", type=int, default=8000, help="where JupyterHub listens on 127.0.0.1 (default: 8000)")
    options.add_argument("--folder", type=Path, default=WORK, help="where the hub keeps its database, its log and the users' files")
    given = options.parse_args()
    port, folder = given.port, given.folder.resolve()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # SIGINT too: it is ignored where a script started us with "&"
        signal.signal(number, signal.default_int_handler)
    folder.mkdir(exist_ok=True)
    log = folder / "hub.log"
    hub = None
    locks: list[IO[str]] = []
    try:
        if not port_is_free(port):
            raise Stop(f"Port {port} is taken by another program. End that one, or take another port: make run PORT={port + 100}")
        locks = be_alone(folder, f"http://127.0.0.1:{port}/")
        be_nobodys_heir()
        print("Starting JupyterHub ...", flush=True)
        hub, url = start(port, log)
        say(url, log)
        watch(hub, log)
    except KeyboardInterrupt:
        return 0
    except (Stop, NbgpuError) as error:
        print(f"{error}", f"The whole log: {log}" if locks and log.is_file() else "", sep="\n", file=sys.stderr)
        return 1
    finally:
        if hub is not None:
            end(hub)
        for lock in locks:
            lock.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
