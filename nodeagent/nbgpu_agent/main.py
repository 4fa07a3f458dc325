"""Starts the agent: ``python -m nbgpu_agent``, or ``run(options)`` from the command line of nbgpu."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import math
import os
import resource
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence, Sized
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from nbgpu import alive, logs
from nbgpu.errors import InvalidValue, NbgpuError
from nbgpu.paths import AGENT_SOCKET, runtime_dir
from nbgpu.quantities import format_memory, parse_memory
from nbgpu.words import counted

from . import admin_api, slice_api
from .agent import Agent, Settings
from .backend import VARIABLE, WANTED, DriverLimits, Wanted, choose, missing
from .cgroups import Cgroups
from .http import App, Bounds, Door, listen_tcp
from .live import LiveSlice
from .metrics import Metrics, MetricsPage
from .monitor import Monitor, stop
from .native import Native
from .nvml import Nvml, driver_present
from .policy import ACTIONS, KINDS, Policy, parse_actions
from .probe import context_bytes
from .procs import sees_the_hosts_pids
from .runtime import RuntimeLock, StartError, built_libraries, install_libraries, prepare, remove_unused
from .simulated import find_machine
from .suspension import GpuLock, Suspender

log = logging.getLogger("nbgpu.agent")
ADMIN_BOUNDS = Bounds(connections=256, body_bytes=1024 * 1024, requests_per_second=None)
SIM_DEVICES_MOST = 16
"""As the simulated driver has it (simgpu/sim_state.h)."""
END_SECONDS = 1.0
"""How long requests that came before the agent's end may take to be answered."""
SLICE_BOUNDS = Bounds(connections=32, body_bytes=64 * 1024, requests_per_second=50)


@dataclass(frozen=True)
class Options:
    """How to run an agent; None = the default that the help names."""

    runtime_dir: Path | None = None
    simulate: bool | None = None
    sim_devices: int | None = None
    reserve: str | None = None
    node: str | None = None
    devices: str = "all"
    takeover: bool = False
    log_level: str = "info"
    metrics_listen: str | None = None
    health_only: bool = False
    alive_file: Path | None = None
    memory_backend: Wanted = "auto"
    watchdog: str = "event"
    watchdog_grace: float = 0
    watchdog_resume: bool = True
    watchdog_escalate: bool = False
    watchdog_owner_resumes: bool = False
    idle_host_memory: str = "0"
    kubernetes: bool = False
    seal_key: Path | None = None
    cdi_dir: Path = Path("/var/run/cdi")
    kubelet_dir: Path = Path("/var/lib/kubelet")
    foreign_claims: bool = False


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Return the options of a command line."""
    parser = argparse.ArgumentParser(prog="nbgpu agent", description="The nbgpu node agent: keeps every process of a slice inside it.")
    parser.add_argument(
        "--runtime-dir", type=Path, help="directory of sockets and slices (default: $NBGPU_RUNTIME_DIR, /run/nbgpu for root)"
    )
    parser.add_argument(
        "--simulate", action=argparse.BooleanOptionalAction, help="simulated GPUs (default: when there is no NVIDIA driver)"
    )
    parser.add_argument("--sim-devices", type=int, help=f"number of simulated GPUs, 1 to {SIM_DEVICES_MOST} (default: 2)")
    parser.add_argument("--reserve", help="memory of each GPU kept back for driver and contexts (default: 2 GiB, at most 5 %%); 0 for none")
    parser.add_argument("--node", help="name of this node (default: the host's name)")
    parser.add_argument("--devices", default="all", help="GPUs that may be sliced: indexes or UUIDs with commas between (default: all)")
    parser.add_argument("--takeover", action="store_true", help="end another agent of this runtime directory and take its place")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    parser.add_argument("--metrics-listen", metavar="ADDRESS:PORT", help="serve /metrics and /healthz there by TCP too")
    parser.add_argument("--health-only", action="store_true", help="no /metrics at --metrics-listen: they name users")
    parser.add_argument("--alive-file", type=Path, metavar="FILE", help="renew this file's time every few seconds, for a liveness probe")
    parser.add_argument(
        "--memory-backend",
        choices=WANTED,
        default=os.environ.get(VARIABLE) or "auto",
        help="who holds slices to their memory: the limiter alone, or the driver too, by cgroup, which no program evades (r615 and later);"
        f" auto: the driver too where it can (default: ${VARIABLE}, else auto)",
    )
    watchdog = parser.add_argument_group("what is done with processes that get past the limiter (docs/security.md)")
    watchdog.add_argument(
        "--watchdog",
        metavar="KIND=ACTION,...",
        default="event",
        help=f"kinds: {', '.join(KINDS)}; actions: {', '.join(ACTIONS)}; one action alone is for all kinds (default: event)",
    )
    watchdog.add_argument(
        "--watchdog-grace", type=float, default=0, metavar="SECONDS", help="kill what has been suspended so long; 0: never (default)"
    )
    watchdog.add_argument(
        "--watchdog-resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let a suspended process go on once what it was suspended for is over",
    )
    watchdog.add_argument(
        "--watchdog-escalate", action="store_true", help="kill all processes of a slice after three actions on it within a minute"
    )
    watchdog.add_argument(
        "--watchdog-owner-resumes", action="store_true", help="a slice's owner may let what is suspended go on, as an administrator may"
    )
    idle = parser.add_argument_group("idle notebooks (docs/idle.md)")
    idle.add_argument(
        "--idle-host-memory",
        metavar="MEMORY",
        default="0",
        help="park idle slices when the pool asks for it, their GPU memory in at most so much of the host's; 0: never (default)",
    )
    kube = parser.add_argument_group("Kubernetes")
    kube.add_argument("--kubernetes", action="store_true", help="be the DRA driver gpu.nbgpu.io of the Node that --node names")
    kube.add_argument("--seal-key", type=Path, metavar="FILE", help="the key with which the pool seals its claims")
    kube.add_argument("--foreign-claims", action="store_true", help="prepare claims too that the pool did not make")
    kube.add_argument("--cdi-dir", type=Path, default=Options.cdi_dir, help="where the container runtime reads CDI specifications")
    kube.add_argument("--kubelet-dir", type=Path, default=Options.kubelet_dir, help="the kubelet's directory, with plugins_registry in it")
    return Options(**vars(parser.parse_args(arguments)))


def run(options: Options) -> int:
    """Run the agent until SIGTERM or SIGINT; return the exit status."""
    logs.set_up(options.log_level, "%(asctime)s %(levelname)s agent: %(message)s")
    # Neither its own calls nor what tenants send must fill the log.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    os.umask(0o022)
    try:
        asyncio.run(alive.beside(options.alive_file, _serve(options)))
    except NbgpuError as error:
        print(f"nbgpu agent: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the agent with the options of a command line."""
    return run(parse(arguments))


def _reserve_bytes(text: str | None) -> int | None:
    if text is None:
        return None
    if text.strip() == "0":
        return 0
    try:
        return parse_memory(text, "--reserve")
    except InvalidValue as error:
        raise InvalidValue("--reserve", text, f"{error.allowed}; or 0 for none") from None


def _idle_bytes(options: Options, simulate: bool) -> int:
    """Return how much host memory parked slices may take, by a command line."""
    text = options.idle_host_memory.strip()
    if text == "0":
        return 0
    if options.kubernetes:
        raise StartError("--idle-host-memory is not offered on Kubernetes yet: slices of claims are not parked.")
    if not simulate and not sees_the_hosts_pids():
        raise StartError("--idle-host-memory needs the host's pids (hostPID): the driver is told which processes to move by them.")
    return parse_memory(text, "--idle-host-memory")


def policy_of(options: Options, simulate: bool) -> Policy:
    """Return what the watchdog does, by a command line."""
    grace = options.watchdog_grace
    if not 0 <= grace < math.inf:
        raise InvalidValue("--watchdog-grace", grace, "a number of seconds, 0 for never")
    policy = Policy(
        parse_actions(options.watchdog), grace or None, options.watchdog_resume, options.watchdog_escalate, options.watchdog_owner_resumes
    )
    if policy.acts and not simulate and not sees_the_hosts_pids():
        raise StartError(
            "--watchdog would end the wrong processes here: the driver tells the host's pids. Start the agent with them (hostPID)."
        )
    return policy


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536) if hard != resource.RLIM_INFINITY else 65536, hard))


async def _serve(options: Options) -> None:
    runtime = prepare(options.runtime_dir or runtime_dir())
    lock = RuntimeLock(runtime)
    _raise_file_limit()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    page = _metrics_page(options.metrics_listen, options.health_only)
    try:
        if options.kubernetes:
            from .kube.main import Kubernetes

            kubernetes = Kubernetes(options, runtime)
            page.ready = kubernetes.ready
            try:
                if await kubernetes.wait_for_lock(lock, ended, lambda: _rehearse(options)):
                    agent, nvml = await _make(options, runtime)
                    await _work(agent, nvml, ended, kubernetes.serving(agent, nvml), page)
            finally:
                await kubernetes.stop()
        else:
            _refuse_claims(runtime)
            await asyncio.to_thread(lock.acquire, options.takeover)
            agent, nvml = await _make(options, runtime)
            await _work(agent, nvml, ended, contextlib.nullcontext(), page)
            machine = agent.settings.machine
            remove_unused(runtime, machine.directory if machine is not None else None)
    finally:
        page.close()
    lock.release()


def _refuse_claims(runtime: Path) -> None:
    """Refuse a directory where an agent of Kubernetes keeps claims: their pods may run, and nobody here would ever give them back."""
    from .kube.checkpoint import FILE, claims_in

    claims: Sized = ()
    with contextlib.suppress(OSError, ValueError):  # its own agent keeps one that can't be read, and says so
        claims = claims_in(runtime)
    if claims:
        raise StartError(
            f"{runtime} is kept by this machine's Kubernetes agent: {FILE} there names {counted(len(claims), 'claim')} of pods. "
            f"Choose another directory with --runtime-dir or $NBGPU_RUNTIME_DIR; or remove this one (rm -r {runtime}) if the machine is in "
            "no cluster any more."
        )


def _metrics_page(address: str | None, health_only: bool) -> MetricsPage:
    try:
        return MetricsPage(None if address is None else listen_tcp(address), health_only)
    except OSError as error:
        raise StartError(f"Metrics cannot be served at {address}: {error.strerror or error}.") from None


async def _rehearse(options: Options) -> None:
    """Raise StartError when no agent can be made as these options say: tried by another process, in a directory that is nobody's."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        problem = await asyncio.get_running_loop().run_in_executor(pool, _problem, options)
    if problem is not None:
        raise StartError(problem)


def _problem(options: Options) -> str | None:
    logs.set_up("error", "%(asctime)s %(levelname)s agent: %(message)s")
    with tempfile.TemporaryDirectory(prefix="nbgpu-") as directory:
        try:
            agent, _ = asyncio.run(_make(options, prepare(Path(directory))))
        except NbgpuError as error:
            return error.message
        agent.close()
    return None


def _driver(options: Options) -> tuple[Path | None, str]:
    """Return NVML's library (None: as the loader finds it) and libcuda's name."""
    if not options.kubernetes:
        return None, "libcuda.so.1"
    from .kube.gpus import agents_libraries

    return agents_libraries()


async def _make(options: Options, runtime: Path) -> tuple[Agent, Nvml]:
    """Return the agent of a runtime directory whose lock is held."""
    simulate = not driver_present() if options.simulate is None else options.simulate
    policy = policy_of(options, simulate)
    host_bytes = _idle_bytes(options, simulate)
    libraries = install_libraries(built_libraries(), runtime)
    if options.sim_devices is not None:
        if not 1 <= options.sim_devices <= SIM_DEVICES_MOST:
            raise InvalidValue("--sim-devices", options.sim_devices, f"a whole number from 1 to {SIM_DEVICES_MOST}")
        os.environ["NBGPU_SIM_DEVICES"] = str(options.sim_devices)
    machine = find_machine(runtime, libraries, options.node if options.kubernetes else None) if simulate else None
    if machine is not None:
        os.environ["NBGPU_SIM_STATE"] = str(machine.state)
    nvml_library, cuda = (machine.libraries / "libnvidia-ml.so.1", str(machine.libraries / "libcuda.so.1")) if machine else _driver(options)
    nvml = Nvml(nvml_library, simulate)
    if machine is not None and machine.state.exists() and machine.state.stat().st_uid == os.geteuid():
        machine.state.chmod(0o666)  # the simulated machine is everybody's, as a real one's device files are
    node = options.node or socket.gethostname()
    devices = nvml.devices(node, simulate, _reserve_bytes(options.reserve), options.devices)
    if not devices:
        raise StartError("The NVIDIA driver of this machine shows no GPU that answers. With --simulate nbgpu runs on simulated ones.")
    contexts = await context_bytes(nvml, devices, runtime, cuda)
    lacks = missing(nvml, devices, Cgroups())
    choice = choose(options.memory_backend, lacks)
    log.info("memory is held by: %s (%s)", choice.backend, choice.reason)
    settings = Settings(
        runtime, node, simulate, nvml.driver_version, libraries, machine, choice.backend, choice.reason, policy, cuda, host_bytes
    )
    suspender = Suspender(GpuLock(cuda, nvml.driver_version))
    if policy.suspends:
        log.info("the watchdog suspends by %s", suspender.words)
    agent = Agent(settings, devices, Native(libraries / "libnbgpu_agent.so"), contexts, suspender)
    if not lacks:
        agent.driver_limits = DriverLimits(nvml, agent.cgroups, choice.backend == "driver", agent.slices.values, agent.events)
    return agent, nvml


async def _work(
    agent: Agent, nvml: Nvml, ended: asyncio.Event, beside: contextlib.AbstractAsyncContextManager[None], page: MetricsPage
) -> None:
    """Serve until `ended`; `beside` is entered once the slices are loaded."""
    monitor = Monitor(agent, nvml)
    doors: dict[str, Door] = {}
    slice_app: App = slice_api.make_app(agent)  # pyright: ignore[reportAssignmentType]

    def added(live: LiveSlice) -> None:
        doors[live.id] = Door(
            live.directory / "api.sock", slice_app, {"slice": live}, SLICE_BOUNDS, live.record.uid, live.record.claim is not None
        )

    def removed(live: LiveSlice) -> None:
        doors.pop(live.id).close()

    agent.on_slice_added = added
    agent.on_slice_ended = removed
    agent.load()
    agent.parking.load()
    agent.away.load()
    page.metrics = Metrics(agent, monitor)
    admin_app: App = admin_api.make_app(agent, page.metrics)  # pyright: ignore[reportAssignmentType]
    admin = Door(agent.settings.runtime / AGENT_SOCKET, admin_app, {}, ADMIN_BOUNDS)
    watch = asyncio.create_task(monitor.run())
    first = next(iter(agent.devices.values()))
    kind = "simulated GPU" if agent.settings.simulated else "GPU"
    usable = format_memory(first.usable_bytes)
    gpus, slices = counted(len(agent.devices), kind), counted(len(agent.slices), "slice")
    log.info("ready: %s, %s for slices on the first, %s, %s", gpus, usable, slices, admin.path)
    # What was imported stays: the collector need not look through it again and again.
    gc.collect()
    gc.freeze()
    try:
        async with beside:
            await ended.wait()
    finally:
        log.info("ending; slices that keep their limits: %d", len(agent.slices))
        await stop(watch)
        await agent.parking.close()
        await agent.away.close()
        agent.end_waits()
        answering = set[asyncio.Task[Any]]().union(*(door.close() for door in (admin, *doors.values())))
        if answering:
            await asyncio.wait(answering, timeout=END_SECONDS)
        agent.close()
