"""The embedded default as one hub process on a port of its own, and a real Chromium."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import browser_kit
import pytest
from browser_kit import answers, wait_for
from playwright.sync_api import Browser, Page
from ports import free_port

ROOT = Path(__file__).resolve().parents[2]
SHOTS = Path(__file__).parent / "shots"
PARTS = [ROOT, ROOT / "spawner", ROOT / "nodeagent", ROOT / "labextension"]
BUILT = ROOT / "labextension" / "nbgpu_lab" / "labextension"
THIS_CHECKOUT = """
load_subconfig({config!r})
c.Spawner.environment.update({{"JUPYTER_PATH": {shared!r}}})
"""


@dataclass
class Hub:
    """A running JupyterHub with its pool and agent."""

    url: str
    runtime: Path
    password: str
    log: Path
    env: dict[str, str]

    def nbgpu(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Run the command line against this installation."""
        command = [sys.executable, "-m", "nbgpu", *args]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, check=False)


def shot(page: Page, name: str) -> None:
    """Leave a screenshot."""
    browser_kit.shot(page, SHOTS, name)


@contextlib.contextmanager
def running_hub(config: Path, base: Path, **environment: str) -> Iterator[Hub]:
    """Run ``jupyterhub -f config`` in the directory `base`, with one simulated device.

    The configuration finds its port in ``NBGPU_PORT``, its runtime directory in ``NBGPU_RUNTIME_DIR`` and there, in
    ``login-password``, everybody's password.
    """
    port, password = free_port(), secrets.token_hex(8)
    runtime = base / "run"
    runtime.mkdir()
    (runtime / "login-password").write_text(password)
    (runtime / "login-password").chmod(0o600)
    env = dict(os.environ)
    env.update(NBGPU_RUNTIME_DIR=str(runtime), NBGPU_PORT=str(port))
    env.update(NBGPU_SIM_STATE=f"/dev/shm/{base.name}", NBGPU_SIM_DEVICES="1", **environment)
    binaries = [str(Path(sys.executable).parent), str(ROOT / "node_modules" / ".bin")]
    env["PYTHONPATH"] = os.pathsep.join([*map(str, PARTS), env.get("PYTHONPATH", "")])
    env["PATH"] = os.pathsep.join([*binaries, env.get("PATH", "")])
    log = base / "hub.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "jupyterhub", "-f", str(config),
                f"--JupyterHub.hub_port={free_port()}", f"--ConfigurableHTTPProxy.api_url=http://127.0.0.1:{free_port()}",
            ],
            cwd=base, env=env, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"the hub answers (log: {log})", lambda: process.poll() is not None or answers(url + "/hub/login"), 60)
        assert process.poll() is None, log.read_text()[-4000:]
        yield Hub(url, runtime, password, log, env)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.copy(log, SHOTS / "hub.log") if SHOTS.exists() else None
        Path(env["NBGPU_SIM_STATE"]).unlink(missing_ok=True)


def of_this_checkout(config: Path, base: Path) -> Path:
    """Write, in `base`, the same configuration with servers that show this checkout's front end: another's may be the installed one."""
    shared = base / "jupyter"
    (shared / "labextensions").mkdir(parents=True)
    (shared / "labextensions" / "nbgpu-lab").symlink_to(BUILT)
    written = base / "config.py"
    written.write_text(THIS_CHECKOUT.format(config=str(config), shared=str(shared)))
    return written


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """Start the embedded default as ``make run`` does, in directories of its own."""
    base = Path(tempfile.mkdtemp(prefix="nbgpu-browser-"))
    with running_hub(of_this_checkout(ROOT / "jupyterhub_config.py", base), base) as running:
        yield running


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Yield the machine's Chromium."""
    with browser_kit.chromium(SHOTS) as browser:
        yield browser
