"""Start the pool: `python -m nbgpu_pool`, or `nbgpu pool`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from nbgpu import alive, logs
from nbgpu.errors import NbgpuError
from nbgpu.http import PatientProtocol
from nbgpu.paths import AGENT_SOCKET, POOL_SOCKET, made, runtime_dir

from .api import create_app
from .auth import Guard
from .config import Config, ConfigError, load
from .connections import most_connections, raise_file_limit
from .gate import Gate
from .ledger import AgentLedger
from .lock import InstanceLock
from .service import Service

LOCK_FILE = "pool.lock"
BACKLOG = 512
"""Connections that wait in the kernel to be taken."""
ACCEPTED_AT_ONCE = 32
"""Those beyond the bound are closed before more are taken. In one go a burst would have all descriptors of the process, and asyncio then
writes an error to the log for each of the rest: seconds in which nobody is answered."""
log = logging.getLogger("nbgpu.pool")


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    config: Path | None = None
    runtime_dir: Path | None = None
    """Where the sockets are; None = `nbgpu.paths.runtime_dir()`."""
    listen: str | None = None
    """``ADDRESS:PORT`` to serve by TCP too; needs tokens in the configuration."""
    kubernetes: bool = False
    """Slices are ResourceClaims of the cluster, and replicas elect a leader; only by TCP."""
    seal_key: Path | None = None
    """On Kubernetes: file of the key that pool and agents share."""
    alive_file: Path | None = None
    """Renewed every few seconds, for a liveness probe."""
    takeover: bool = False
    """End another pool that serves the same directory and take its place."""
    log_level: str = "info"


def run(options: Options) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code. Errors are one line on stderr."""
    logs.set_up(options.log_level, "%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what strangers send must not fill the log
    raise_file_limit()
    if options.kubernetes:
        return _run_kubernetes(options)
    place = options.runtime_dir or runtime_dir()
    try:
        config = load(options.config)
        guard = Guard([token.load() for token in config.tokens])
        if options.listen and not config.tokens:
            raise ConfigError("--listen needs tokens: name at least one under `tokens` in the configuration.")
        address = _address(options.listen) if options.listen else None
        made(place)
        lock = InstanceLock(place / LOCK_FILE)
        ended = lock.acquire(takeover=options.takeover)
        if ended:
            log.info("took over from the pool with pid %d", ended)
        sockets = [_unix_socket(place / POOL_SOCKET)]
        if address:
            sockets.append(_tcp_socket(*address))
    except NbgpuError as error:
        print(f"nbgpu pool: {error.message}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"nbgpu pool: cannot serve in {place}: {error.strerror or error}", file=sys.stderr)
        return 1
    asyncio.run(alive.beside(options.alive_file, _serve(config, guard, place, sockets, options.config)))
    lock.close()
    return 0


def _run_kubernetes(options: Options) -> int:
    """Serve as one replica of a cluster's pool."""
    from . import kube_main  # needs nbgpu[kubernetes], which one machine does not

    try:
        config = load(options.config)
        kube_main.check(config)
        guard = Guard([token.load() for token in config.tokens])
        if options.listen is None or options.seal_key is None:
            raise ConfigError("--kubernetes needs --listen ADDRESS:PORT and --seal-key FILE.")
        replica = kube_main.Replica.connect(config, guard, options.seal_key)
        listening = _tcp_socket(*_address(options.listen))
    except NbgpuError as error:
        print(f"nbgpu pool: {error.message}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"nbgpu pool: cannot listen at {options.listen}: {error.strerror or error}", file=sys.stderr)
        return 1
    log.info("serving %s", listening.getsockname())
    serving = kube_main.serve(replica, _server(replica.gate), listening, lambda: reload(options.config, config, replica.configure))
    asyncio.run(alive.beside(options.alive_file, serving))
    return 0


async def _serve(config: Config, guard: Guard, place: Path, sockets: list[socket.socket], file: Path | None) -> None:
    service = Service(AgentLedger(place / AGENT_SOCKET), config.settings())
    servers = [_server(create_app(service, None if at.family == socket.AF_UNIX else guard)) for at in sockets]
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)

    def take(fresh: Config) -> None:
        service.configure(fresh.settings())

    loop.add_signal_handler(signal.SIGHUP, lambda: reload(file, config, take))
    service.start()
    running = [asyncio.create_task(server.serve(sockets=[at])) for server, at in zip(servers, sockets, strict=True)]
    inode = os.stat(place / POOL_SOCKET).st_ino
    for at in sockets:
        log.info("serving %s", at.getsockname())
    stop = asyncio.create_task(stopping.wait())
    await asyncio.wait([stop, *running], return_when=asyncio.FIRST_COMPLETED)
    log.info("stopping")
    with contextlib.suppress(FileNotFoundError):
        if os.stat(place / POOL_SOCKET).st_ino == inode:
            os.unlink(place / POOL_SOCKET)
    await service.stop()
    for server in servers:
        server.should_exit = True
    await asyncio.gather(*running, return_exceptions=True)
    stop.cancel()


def reload(file: Path | None, begun: Config, take: Callable[[Config], None]) -> None:
    """Read the configuration again (SIGHUP); where it is wrong the log says at which line and why, and the old one stays in force.

    Parameters
    ----------
    begun : Config
        What the pool was started with: what only a start takes over (tokens, nodes to come) is compared with it.
    take : callable
        Is given a configuration that is right.
    """
    try:
        fresh = load(file)
        take(fresh)
    except ConfigError as error:
        log.error("the old configuration stays in force: %s", error.message)
        return
    late = [name for name in ("tokens", "coming") if getattr(fresh, name) != getattr(begun, name)]
    log.info("the configuration was read again%s", f"; a restart is needed for: {', '.join(late)}" if late else "")


def _server(app: FastAPI | Gate) -> uvicorn.Server:
    config = uvicorn.Config(
        app, http=Protocol, lifespan="off", access_log=False, log_config=None, proxy_headers=False,
        timeout_graceful_shutdown=2, timeout_keep_alive=60, ws="none", backlog=ACCEPTED_AT_ONCE,
    )  # fmt: skip
    return _Server(config)


class Protocol(PatientProtocol):
    """The pool's server protocol."""

    def most_connections(self) -> int:
        """Return how many connections there may be at a time; fewer where the process may not have that many descriptors."""
        return most_connections()


class _Server(uvicorn.Server):
    """Leaves signals to `_serve`: several servers share the process."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve; for asyncio the number of connections taken at once and of those that may wait in the kernel is the same one."""
        await super().startup(sockets)
        for at in sockets or ():
            at.listen(BACKLOG)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def _unix_socket(path: Path) -> socket.socket:
    """Listen at `path`, mode 0600 from its first moment; replaces what a dead pool left."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        fresh.unlink()
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        found.bind(str(fresh))
    finally:
        os.umask(before)
    found.listen(BACKLOG)
    os.rename(fresh, path)
    return found


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    try:
        ipaddress.ip_address(host.strip("[]"))
        number = int(port)
        if not 0 <= number < 65536:
            raise ValueError
    except ValueError:
        raise ConfigError(f"--listen is {text!r}; it must be ADDRESS:PORT, such as 127.0.0.1:8070.") from None
    return host.strip("[]"), number


def _tcp_socket(host: str, port: int) -> socket.socket:
    # Only where the protocol is named does asyncio turn Nagle's algorithm off, which makes an answer wait 40 ms for its second half.
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind((host, port))
    found.listen(BACKLOG)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and `run`."""
    parser = argparse.ArgumentParser(prog="nbgpu pool", description="The pool allocator: who gets which part of which GPU.")
    parser.add_argument("--config", type=Path, help="YAML or JSON file: quotas, queue, tokens")
    parser.add_argument("--runtime-dir", type=Path, help="where the agent's and the pool's sockets are")
    parser.add_argument("--listen", metavar="ADDRESS:PORT", help="serve by TCP too (needs tokens)")
    parser.add_argument("--kubernetes", action="store_true", help="serve the cluster of KUBECONFIG or of this pod (needs --seal-key)")
    parser.add_argument("--seal-key", type=Path, metavar="FILE", help="key that pool and agents share (with --kubernetes)")
    parser.add_argument("--alive-file", type=Path, metavar="FILE", help="renew this file's time every few seconds, for a liveness probe")
    parser.add_argument("--takeover", action="store_true", help="end another pool that serves the same directory")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    return run(Options(**vars(parser.parse_args(arguments))))
