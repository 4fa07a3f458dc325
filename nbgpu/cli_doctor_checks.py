"""The checks of ``nbgpu doctor`` that look at this machine from outside of any slice."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from . import __version__
from .cli_common import agent, backend_words, in_a_pod, limiter_only, pool
from .cli_doctor import Check, Facts
from .errors import NbgpuError
from .models import GrantState
from .paths import AGENT_SOCKET, POOL_SOCKET, SYSTEM_RUNTIME, runtime_path
from .quantities import MIB, WHOLE_MILLI, format_memory
from .words import counted

LAB_NAME = "nbgpu-lab"
SERVER_CONFIG = "etc/jupyter/jupyter_server_config.d/nbgpu_lab.json"
SHM_WANTED_BYTES = 64 * MIB
GET_LIBRARIES = "take the platform wheel (py3-none-any has no C libraries); from a checkout: make setup."
START = "Start it: `nbgpu serve`, or the hub whose service it is."
PROXY = "configurable-http-proxy"
OLDEST_HUB = (5, 4)
UNITS = Path("/etc/systemd/system")
_HOLDING = {GrantState.bound, GrantState.releasing}


def python(facts: Facts) -> list[Check]:
    """Which nbgpu, which Python, which machine."""
    here = f"nbgpu {__version__}, Python {platform.python_version()}, {platform.machine()}, in {sys.prefix}"
    if platform.machine() not in ("x86_64", "AMD64"):
        return [Check("installation", "warning", here, "Limits are built for x86-64 only so far: on this machine nothing is limited.")]
    return [Check("installation", "ok", here)]


def libraries_dir() -> Path | None:
    """Return the folder of the compiled libraries; None without the agent's package."""
    try:
        found = importlib.util.find_spec("nbgpu_agent")
    except ImportError:
        return None
    return Path(found.origin).parent / "_lib" if found and found.origin else None


def driver(facts: Facts) -> list[Check]:
    """NVIDIA's driver, or the simulated one in its place."""
    version = Path("/proc/driver/nvidia/version")
    if version.is_file():
        return [Check("driver", "ok", version.read_text().splitlines()[0])]
    facts.simulated = True
    folder = libraries_dir()
    names = ("libcuda.so.1", "libnvidia-ml.so.1", "nvidia-smi")
    missing = [name for name in names if folder is None or not (folder / "sim" / name).is_file()]
    if missing:
        what = f"no NVIDIA driver on this machine, and the simulated one lacks {', '.join(missing)}"
        return [Check("driver", "error", what, f"Install NVIDIA's driver, or: {GET_LIBRARIES}")]
    return [Check("driver", "ok", "no NVIDIA driver on this machine: simulated GPUs")]


def libraries(facts: Facts) -> list[Check]:
    """The limiter is there, can be preloaded, and disturbs no program."""
    folder = libraries_dir()
    if folder is None:
        return [Check("limiter", "note", "the agent's package is not installed here", "")]
    library = folder / "libnbgpu.so"
    if not library.is_file():
        return [Check("limiter", "error", f"{library} is missing", GET_LIBRARIES)]
    env = {"LD_PRELOAD": str(library), "PATH": os.environ.get("PATH", os.defpath)}
    done = subprocess.run(["/bin/sh", "-c", "echo loaded"], env=env, capture_output=True, text=True, timeout=20)
    if done.returncode or done.stdout != "loaded\n" or done.stderr:
        said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[0]
        remedy = "Built for another libc or machine? Reinstall nbgpu; from a checkout: python nodeagent/build.py --force"
        return [Check("limiter", "error", f"{library} cannot be preloaded: {said}", remedy)]
    return [Check("limiter", "ok", f"{library} can be preloaded")]


def runtime(facts: Facts) -> list[Check]:
    """The runtime directory and its sockets are this user's and closed to others."""
    folder = runtime_path()
    if not folder.is_dir():
        return [Check("runtime directory", "note", f"{folder} does not exist: nothing has run yet")]
    info = folder.stat()
    if info.st_uid != os.geteuid():
        remedy = "Run this as that user or root, or set NBGPU_RUNTIME_DIR to a folder of your own."
        return [Check("runtime directory", "error", f"{folder} belongs to user {info.st_uid}, not to you", remedy)]
    found = [Check("runtime directory", "ok", str(folder))]
    if info.st_mode & 0o022:
        found = [Check("runtime directory", "error", f"others may write to {folder}", f"chmod 0755 {folder}")]
    for name in (AGENT_SOCKET, POOL_SOCKET):
        path = folder / name
        if path.exists() and (path.stat().st_mode & 0o077 or not stat.S_ISSOCK(path.stat().st_mode)):
            found.append(Check("socket", "error", f"others may open {path}, or it is no socket", "Stop nbgpu, remove it, start again."))
    return found


def agent_and_pool(facts: Facts) -> list[Check]:
    """Both answer, or neither was started."""
    found: list[Check] = []
    folder = runtime_path()
    try:
        facts.node = agent().node()
        facts.slices = agent().slices().slices
        kind = "simulated GPU" if facts.node.simulated else "GPU"
        found.append(Check("agent", "ok", f"serves {counted(len(facts.node.devices), kind)}; {backend_words(facts.node)}"))
        if alone := limiter_only(facts.node, facts.slices):
            remedy = (
                "They need a cgroup v2 of their own: run the agent as root with cgroups delegated to it, one claim a pod on Kubernetes."
            )
            found.append(Check("agent", "note", alone, remedy))
        for device in facts.node.devices:
            if not device.healthy:
                remedy = "Look at `nvidia-smi -q` and the kernel log (Xid); nothing new is placed on it."
                found.append(Check("device", "error", f"GPU {device.index} ({device.model}) is not healthy", remedy))
    except NbgpuError as error:
        held = held_slices() if error.code == "away" else []
        if held:
            are = "is" if len(held) == 1 else "are"
            what = f"{counted(len(held), 'slice')} {are} held in {folder} and no agent serves them: limits hold, nobody watches"
            found.append(Check("agent", "error", what, f"{START} It takes them over, or removes what has ended."))
        else:
            found.append(_silent("agent", (folder / AGENT_SOCKET).exists(), error))
    try:
        facts.grants = pool().grants()
        facts.pool_answers = True
        found.append(Check("pool", "ok", f"answers; {counted(sum(grant.state in _HOLDING for grant in facts.grants), 'slice')} held"))
    except NbgpuError as error:
        if error.code == "away" and in_a_pod():
            found.append(Check("pool", "note", "another pod; `nbgpu doctor --cluster` looks at it, where kubectl works"))
            return found
        found.append(_silent("pool", (folder / POOL_SOCKET).exists() or facts.node is not None, error))
    return found


def _silent(part: str, started: bool, error: NbgpuError) -> Check:
    """Agent or pool does not answer: a fault where somebody had started it or a unit of systemd should have, else as expected."""
    if started:
        return Check(part, "error", error.message, START)
    folder = runtime_path()
    unit = next((name for name in (f"nbgpu-{part}.service", "nbgpu-hub.service") if (UNITS / name).is_file()), None)
    if folder == SYSTEM_RUNTIME and unit:
        return Check(part, "error", f"not running, though {unit} is installed", f"systemctl status {unit}; journalctl -u {unit}")
    if folder != SYSTEM_RUNTIME and (SYSTEM_RUNTIME / AGENT_SOCKET).exists():
        return Check(part, "note", f"not running in {folder}; this machine's own, root's, is in {SYSTEM_RUNTIME}")
    return Check(part, "note", f"not running in {folder}, as expected: nothing has started it yet")


def books(facts: Facts) -> list[Check]:
    """What is in force fits the devices, and the pool's books name the same slices as the agent's."""
    if facts.node is None:
        return []
    found: list[Check] = []
    for device in facts.node.devices:
        parts = [part for known in facts.slices for part in known.slice.devices if part.uuid == device.uuid]
        memory, compute = sum(part.memory_bytes for part in parts), sum(part.compute_milli for part in parts)
        if memory > device.usable_bytes or compute > WHOLE_MILLI:
            what = f"GPU {device.index}: slices of {format_memory(memory)} and {compute / 10:g} % of its time exceed it"
            found.append(Check("books", "error", what, "Report this; stop one of its servers until then."))
    for known in facts.slices:
        if known.lowered is None:
            continue
        for part, limit in zip(known.slice.devices, known.lowered.devices, strict=True):
            if part.memory_bytes > limit.memory_bytes:
                held, left = format_memory(part.memory_bytes), format_memory(limit.memory_bytes)
                what = f"slice {known.slice.slice_id[:8]} holds {held} of GPU {part.index}, its limit was lowered to {left}"
                remedy = "It is given no more, and nobody else gets what it holds; restart its kernels to have it free."
                found.append(Check("limits", "note", what, remedy))
    if not facts.pool_answers:
        return found
    in_force = {known.slice.slice_id for known in facts.slices if known.state != "prepared"}
    held = {grant.request.request_id for grant in facts.grants if grant.state in _HOLDING}
    strange = sorted(in_force ^ held)
    if strange and strange == sorted(_still_different()):
        short = ", ".join(name[:8] for name in strange[:5])
        what = f"pool and agent disagree on {counted(len(strange), 'slice')}: {short}"
        found.append(Check("books", "error", what, "Restart the pool: it rebuilds its books from the agent."))
    if any(one.level == "error" for one in found):
        return found
    return [*found, Check("books", "ok", f"pool and agent agree on {counted(len(in_force), 'slice')}")]


def _still_different() -> set[str]:
    """Look again: a slice that began or ended between the two first looks is no disagreement."""
    import time

    time.sleep(1.5)
    in_force = {known.slice.slice_id for known in agent().slices().slices if known.state != "prepared"}
    return in_force ^ {grant.request.request_id for grant in pool().grants() if grant.state in _HOLDING}


def host(facts: Facts) -> list[Check]:
    """cgroups and shared memory."""
    found: list[Check] = []
    version = cgroup_version()
    can = "root can make one per slice" if os.geteuid() == 0 else "without root, slices are told apart by process ancestry"
    found.append(Check("cgroup", "ok" if version else "note", f"{version or 'none mounted'}; {can}"))
    space = os.statvfs("/dev/shm") if Path("/dev/shm").is_dir() else None
    free = space.f_bavail * space.f_frsize if space else 0
    if free < SHM_WANTED_BYTES:
        remedy = "In a container give it more: docker run --shm-size=1g."
        found.append(Check("/dev/shm", "warning", f"{format_memory(free)} free", remedy))
    else:
        found.append(Check("/dev/shm", "ok", f"{format_memory(free)} free"))
    return found


def cgroup_version() -> str:
    """Return ``cgroup v2``, ``cgroup v1`` or nothing."""
    base = Path("/sys/fs/cgroup")
    if (base / "cgroup.controllers").exists():
        return "cgroup v2"
    return "cgroup v1" if any((base / name).is_dir() for name in ("freezer", "pids", "memory")) else ""


def hub_parts(facts: Facts) -> list[Check]:
    """JupyterHub with nbgpu's spawner and a proxy, where a hub is installed."""
    try:
        version = importlib.metadata.version("jupyterhub")
    except importlib.metadata.PackageNotFoundError:
        return [Check("hub", "note", "JupyterHub is not installed here; on a hub: pip install 'nbgpu[hub]'")]
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < OLDEST_HUB:
        return [Check("hub", "error", f"JupyterHub {version} is too old", "pip install 'jupyterhub>=5.4'")]
    if importlib.util.find_spec("nbgpu_spawner") is None:
        return [Check("hub", "error", f"JupyterHub {version}, but nbgpu's spawner cannot be imported", "pip install 'nbgpu[hub]'")]
    folders = [Path(sys.executable).parent, Path(sys.prefix).parent / "node_modules" / ".bin", "node_modules/.bin"]
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")])
    if shutil.which(PROXY, path=path) is None and not runs(PROXY):
        what = f"JupyterHub {version} with nbgpu's spawner; configurable-http-proxy is not on PATH"
        return [Check("hub", "warning", what, "npm install -g configurable-http-proxy (or configure another proxy)")]
    return [Check("hub", "ok", f"JupyterHub {version} with nbgpu's spawner")]


def runs(program: str) -> bool:
    """Return whether a process of this machine runs that program, itself or as its interpreter's script."""
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and any(Path(os.fsdecode(word)).name == program for word in _words_of(name)[:3]):
                return True
    return False


def _words_of(pid: str) -> list[bytes]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")


def jupyter_prefixes() -> Iterator[Path]:
    """Yield where Jupyter looks for installed extensions and configuration."""
    for name in (sys.prefix, "/usr/local", "/usr", str(Path.home() / ".local")):
        yield Path(name)


def lab_parts(facts: Facts) -> list[Check]:
    """Server extension, prebuilt front end and kernel provisioner, where Jupyter Server is installed."""
    if importlib.util.find_spec("jupyter_server") is None:
        return [Check("notebook side", "note", "Jupyter Server is not installed here; in the servers' image: pip install 'nbgpu[lab]'")]
    lacking: list[str] = []
    if not any((prefix / "share/jupyter/labextensions" / LAB_NAME / "package.json").is_file() for prefix in jupyter_prefixes()):
        lacking.append("the JupyterLab extension (labextensions/nbgpu-lab)")
    if not any((prefix / SERVER_CONFIG).is_file() for prefix in jupyter_prefixes()):
        lacking.append("the server extension's configuration (jupyter_server_config.d/nbgpu_lab.json)")
    names = [point.name for point in importlib.metadata.entry_points(group="jupyter_client.kernel_provisioners")]
    if "nbgpu-provisioner" not in names:
        lacking.append("the kernel provisioner")
    if lacking:
        remedy = "Install the wheel rather than single files: pip install --force-reinstall 'nbgpu[lab]'; from a checkout: make setup."
        return [Check("notebook side", "error", f"missing: {', '.join(lacking)}", remedy)]
    return [Check("notebook side", "ok", "server extension, JupyterLab extension and kernel provisioner are installed")]


def held_slices() -> list[str]:
    """Return the slices that an agent has left in the runtime directory, or serves there."""
    try:
        return sorted(path.parent.name for path in (runtime_path() / "slices").glob("[!.]*/slice.json"))
    except OSError:
        return []


def leftovers(facts: Facts) -> list[Check]:
    """Slices' directories that the agent does not know; those that no agent serves are told of above."""
    folder = runtime_path() / "slices"
    if facts.node is None:
        return []
    try:
        present = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    except OSError:
        return []
    strange = {name for name in present - {known.slice.slice_id for known in facts.slices} if (folder / name).is_dir()}
    if strange:
        what = f"directories in {folder} that the agent does not know: {', '.join(sorted(strange)[:5])}"
        return [Check("leftovers", "warning", what, "When no process of theirs lives they can be deleted.")]
    return [Check("leftovers", "ok", "none")]
