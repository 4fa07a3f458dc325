"""For bench/agent.py: from an allocation to the text of the status bar, in a real JupyterLab in a real Chromium."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "labextension" / "nbgpu_lab" / "labextension"
START_SECONDS = 120
SHOWN_SECONDS = 30
GIB = 1024**3
STATUS = ".nbgpu-Status-text"
SHOWN = f"""([before, step]) => {{
    const found = /([\\d.]+)( MiB)? of [\\d.]+ GiB/.exec(document.querySelector({STATUS!r})?.textContent ?? '');
    return found !== null && Math.abs(Number(found[1]) / (found[2] ? 1024 : 1) - before - step) < 0.3;
}}"""

Act = Callable[[str], tuple[int, int]]


def why_not() -> str | None:
    """Return why this machine cannot measure it; None when it can."""
    if not BUILT.is_dir():
        return "the front end is not built (make setup)"
    if chromium() is None:
        return "there is no Chromium (apt install chromium, or NBGPU_CHROMIUM)"
    try:
        import jupyterlab  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
        import playwright.sync_api  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
    except ImportError as error:
        return f"{error.name} is not installed (make setup)"
    return None


def chromium() -> str | None:
    """Return the path of a Chromium."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return os.environ.get("NBGPU_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@contextlib.contextmanager
def jupyterlab(socket_path: str) -> Iterator[str]:
    """Run JupyterLab with the extension of this checkout for the slice behind a socket; give its address."""
    base = Path(tempfile.mkdtemp(prefix="nbgpu-bench-lab-", dir="/tmp"))
    (base / "labextensions").mkdir()
    (base / "labextensions" / "nbgpu-lab").symlink_to(BUILT)
    config = base / "config"
    shutil.copytree(ROOT / "labextension" / "jupyter-config", config / "jupyter_server_config.d")
    shutil.copy(config / "jupyter_server_config.d" / "nbgpu_lab.json", config / "jupyter_server_config.json")
    env = dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'labextension'}", NBGPU_SOCKET=socket_path, HOME=str(base))
    env |= {"JUPYTER_PATH": str(base), "JUPYTER_CONFIG_DIR": str(config), "JUPYTER_DATA_DIR": str(base / "data")}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--allow-root", "--no-browser", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=bench"]
    options += [f"--ServerApp.root_dir={base}", "--LabApp.news_url="]
    with (base / "log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=env, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{address}/api", server, base / "log")
        yield f"{address}/lab?token=bench&reset"
    finally:
        server.terminate()
        server.wait(30)
        shutil.rmtree(base, ignore_errors=True)


def _wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"JupyterLab does not answer: {log.read_text()[-1000:]}") from None
            time.sleep(0.2)


def measure_pixel(socket_path: str, act: Act, limit_bytes: int, samples: int, dice: random.Random) -> list[float]:
    """Return seconds from an allocation's return to the frame whose status bar shows it.

    Parameters
    ----------
    act : callable
        Sends a command to a process of the slice: (CUresult, CLOCK_MONOTONIC ns at its return).
    """
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    found: list[float] = []
    with jupyterlab(socket_path) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(address, timeout=START_SECONDS * 1000)
        page.wait_for_selector(STATUS, timeout=START_SECONDS * 1000)
        while len(found) < samples:
            before = _shown_gib(page)
            step = dice.randrange(1, max(2, limit_bytes // GIB // 2))
            time.sleep(dice.random())  # anywhere between two polls
            found.append(_seen_after(page, act(f"alloc {step * GIB}"), before, step))
            _seen_after(page, act("free"), before, 0)
        browser.close()
    return found


def _seen_after(page: Any, done: tuple[int, int], before: float, step: int) -> float:
    result, at_ns = done
    if result:
        raise SystemExit(f"an allocation within the slice failed: {result}")
    page.wait_for_function(SHOWN, arg=[before, step], polling="raf", timeout=SHOWN_SECONDS * 1000)
    return (time.monotonic_ns() - at_ns) / 1e9


def _shown_gib(page: Any) -> float:
    text = page.inner_text(STATUS)
    shown = re.search(r"([\d.]+)( MiB)? of [\d.]+ GiB", text)
    if shown is None:
        raise SystemExit(f"the status bar shows {text!r}, not the memory of a slice")
    return float(shown[1]) / (1024 if shown[2] else 1)
