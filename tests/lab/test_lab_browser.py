"""JupyterLab in a real Chromium: status bar, panel, limits, notices and the monitor in a cell; the slice's agent is a fake.

Leaves screenshots in ``tests/browser/shots``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_slice_agent import GIB, FakeAgent
from pseudo_language import write_pack

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "labextension" / "nbgpu_lab" / "labextension"
SHOTS = ROOT / "tests" / "browser" / "shots"
LONG = "second-notebook-with-a-long-name.ipynb"
REFUSAL = "The limit of this kernel (5 GiB) refused an allocation of 2 GiB: 4 GiB are in use. Free memory, or raise the limit."
MONITOR = ["import nbgpu\n", "nbgpu.SliceMonitor()"]

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.skipif(not BUILT.is_dir(), reason="front end not built: make setup")]


@dataclass
class Lab:
    """A running JupyterLab with two notebooks, each with a kernel."""

    url: str
    token: str
    agent: FakeAgent
    loop: asyncio.AbstractEventLoop
    kernels: list[str]
    notebooks: Path

    def call(self, path: str, body: object = None, method: str | None = None) -> Any:
        headers = {"Authorization": f"token {self.token}"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", headers=headers, data=data, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or b"null")

    def away(self, is_away: bool) -> None:
        """Let the agent go, or come back."""
        asyncio.run_coroutine_threadsafe(self.agent.stop() if is_away else self.agent.start(), self.loop).result(5)

    def tell(self, **event: Any) -> None:
        self.loop.call_soon_threadsafe(lambda: self.agent.tell("refused", REFUSAL, **event))


def environment(base: Path, sock: str) -> dict[str, str]:
    """A server that knows this checkout's extension, whether or not it is installed."""
    (base / "labextensions").mkdir(parents=True)
    (base / "labextensions" / "nbgpu-lab").symlink_to(BUILT)
    config = base / "config"
    shutil.copytree(ROOT / "labextension" / "jupyter-config", config / "jupyter_server_config.d")
    (config / "jupyter_server_config.json").write_text((config / "jupyter_server_config.d" / "nbgpu_lab.json").read_text())
    write_pack(base / "languages")  # nobody reads it who does not choose it
    python_path = os.pathsep.join(map(str, [ROOT, ROOT / "labextension", base / "languages", os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "PYTHONPATH": python_path, "NBGPU_SOCKET": sock, "JUPYTER_PATH": str(base)}
    return {**env, "JUPYTER_CONFIG_DIR": str(config), "JUPYTER_DATA_DIR": str(base / "data"), "HOME": str(base)}


def write_notebook(path: Path, source: list[str]) -> None:
    cell = {"cell_type": "code", "execution_count": None, "id": "first", "metadata": {}, "outputs": [], "source": source}
    kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    path.write_text(json.dumps({"cells": [cell], "metadata": {"kernelspec": kernelspec}, "nbformat": 4, "nbformat_minor": 5}))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with running_lab(tmp_path_factory.mktemp("lab")) as running:
        yield running


@contextlib.contextmanager
def running_lab(base: Path, cell: list[str] = MONITOR, others: tuple[str, ...] = ()) -> Iterator[Lab]:
    """Yield a JupyterLab whose pages have our extension alone, as after `pip install nbgpu[lab]`, and `others` of this environment."""
    sock = str(base / "api.sock")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    agent = FakeAgent(sock)
    asyncio.run_coroutine_threadsafe(agent.start(), loop).result(5)
    notebooks = base / "notebooks"
    notebooks.mkdir()
    write_notebook(notebooks / "first.ipynb", cell)
    write_notebook(notebooks / LONG, ["1"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (base / "server.log").open("w")
    options = ["--allow-root", "--no-browser", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=secret"]
    options += [f"--ServerApp.root_dir={notebooks}", "--LabApp.news_url=", "--LabApp.expose_app_in_browser=True"]
    options += ["--JupyterNotebookApp.expose_app_in_browser=True", f"--LabServerApp.labextensions_path={base / 'labextensions'}"]
    command = [sys.executable, "-m", "jupyterlab", *options]
    env = environment(base, sock)
    for name in others:
        (base / "labextensions" / name).symlink_to(Path(sys.prefix) / "share" / "jupyter" / "labextensions" / name)
    server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    running = Lab(f"http://127.0.0.1:{port}", "secret", agent, loop, [], notebooks)
    try:
        wait_for_server(running, server, base / "server.log")
        for name in ("first.ipynb", LONG):
            session = {"name": "", "type": "notebook", "path": name, "kernel": {"name": "python3"}}
            running.kernels.append(running.call("api/sessions", session)["kernel"]["id"])
        yield running
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:  # one that was shut down from its page may wait for a thread of anyio's
            server.kill()
            server.wait(10)
        asyncio.run_coroutine_threadsafe(end(agent), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        loop.close()


async def end(agent: FakeAgent) -> None:
    """Stop the agent and whatever still waits in it."""
    await agent.stop()
    waiting = asyncio.all_tasks() - {asyncio.current_task()}
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


def wait_for_server(running: Lab, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            running.call("api/status")
            return
        except (urllib.error.URLError, OSError):
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)


@pytest.fixture
def page(lab: Lab) -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    named = os.environ.get("NBGPU_CHROMIUM")
    program = named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))))
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1280, "height": 900})
        opened.set_default_timeout(60_000)
        yield opened
        browser.close()


def fill_slice(lab: Lab) -> None:
    """Two notebooks and a terminal hold memory; the second notebook is capped at 5 GiB."""
    agent = lab.agent
    agent.kernel(lab.kernels[0], 8 * GIB, milli=130)
    agent.kernel(lab.kernels[1], 4 * GIB, milli=50, refusals=3)
    agent.kernel(None, GIB // 2)
    agent.limits[lab.kernels[1]] = {"memory_bytes": 5 * GIB, "compute_milli": None}
    agent.used_bytes, agent.used_milli = 12 * GIB + GIB // 2, 180


def wait_for(condition: Callable[[], object], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within the deadline"
        time.sleep(0.02)


def put_settings(lab: Lab, **settings: object) -> None:
    lab.call("lab/api/settings/nbgpu-lab:model", {"raw": json.dumps(settings)}, method="PUT")


def open_lab(page: Any, lab: Lab, theme: str) -> None:
    page.goto(f"{lab.url}/lab/tree/first.ipynb?token={lab.token}&reset")
    page.wait_for_selector(".nbgpu-Status")
    page.evaluate("window.jupyterapp.restored.then(() => null)")  # else the layout that comes may close the panel again
    page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", theme)
    page.get_by_role("button", name="Show the GPU panel").click()
    page.wait_for_selector(".nbgpu-Kernels")
    refuse_news = page.get_by_role("button", name="No", exact=True)
    if refuse_news.count():
        refuse_news.click()


@pytest.mark.parametrize(("theme", "shot"), [("JupyterLab Light", "light"), ("JupyterLab Dark", "dark")])
def test_the_slice_in_jupyterlab(lab: Lab, page: Any, theme: str, shot: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    fill_slice(lab)
    open_lab(page, lab, theme)
    status = page.locator(".nbgpu-Status-text")
    assert status.inner_text() == "1/4 simulated GPU: 12.5 of 20 GiB, 72 % busy"
    panel = page.get_by_role("region", name="GPU slice")
    assert "Simulated: this machine has no NVIDIA driver." in panel.inner_text()

    # the monitor in a cell, which the kernel does not feed
    page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()
    page.locator(".jp-Notebook .jp-Cell .cm-content").first.click()
    page.keyboard.press("Shift+Enter")
    monitor = page.locator(".nbgpu-monitor")
    monitor.get_by_text("first.ipynb").wait_for()

    # a refusal is told at once, with its notebook
    told = time.monotonic()
    lab.tell(kernel_id=lab.kernels[1])
    page.get_by_role("alert").filter(has_text="refused an allocation").wait_for()
    assert time.monotonic() - told < 3, "not with the next poll of what is used, which comes later"
    panel.get_by_text(REFUSAL).first.wait_for()
    page.wait_for_timeout(1200)  # toasts slide in; let the picture be still
    page.screenshot(path=SHOTS / f"lab-{shot}.png")

    # a limit above the slice is refused in the server's words; a good one is set, and can be removed
    row = page.locator(f'[data-kernel="{lab.kernels[1]}"]')
    row.locator(".nbgpu-Kernels-limit").click()
    row.get_by_label("Memory").fill("100 GiB")
    page.keyboard.press("Enter")
    row.get_by_role("alert").get_by_text("it must be at most 20 GiB, this server's slice, or a fraction of it").wait_for()
    row.get_by_label("Memory").fill("1/2")
    page.keyboard.press("Enter")
    row.get_by_text("10 GiB").wait_for()
    assert row.get_by_text("4 GiB", exact=True).count() == 1
    assert lab.agent.limits[lab.kernels[1]] == {"memory_bytes": 10 * GIB, "compute_milli": None}

    # a limit of time beside it: what was not touched stays to the byte; both are shown, and what they hint at is not cut off
    lab.agent.limits[lab.kernels[1]]["memory_bytes"] = exact = 9 * GIB + 777 * 1024**2
    row.get_by_text("9.7 GiB").wait_for()
    row.locator(".nbgpu-Kernels-limit").click()
    for field in ("Memory limit", "Compute limit"):
        row.get_by_label(field).fill("")
        assert row.get_by_label(field).evaluate(PLACEHOLDER_FITS), field
    page.screenshot(path=SHOTS / f"lab-{shot}-limit.png")
    page.keyboard.press("Escape")
    row.locator(".nbgpu-Kernels-limit").click()
    row.get_by_label("Compute limit").fill("1/2")
    page.keyboard.press("Enter")
    row.get_by_text("9.7 GiB, 50 %").wait_for()
    assert lab.agent.limits[lab.kernels[1]] == {"memory_bytes": exact, "compute_milli": 125}

    # below what it holds: words, not colour alone
    assert row.get_by_text("Over its limit").count() == 0
    row.locator(".nbgpu-Kernels-limit").click()
    row.get_by_label("Memory limit").fill("3 GiB")
    page.keyboard.press("Enter")
    row.get_by_text("Over its limit (4 of 3 GiB)").wait_for()
    page.screenshot(path=SHOTS / f"lab-{shot}-over.png")

    # near the limit: words, not colour alone; seen within two seconds
    lab.agent.used_bytes = 19 * GIB
    page.get_by_text("GPU memory almost full").first.wait_for(timeout=2000)
    assert "almost full" in status.inner_text()

    # the agent goes away: the last values stay, and it is said
    lab.away(True)
    page.get_by_text("The node agent has not answered").wait_for(timeout=5000)
    monitor.get_by_text("No news from the node agent").wait_for(timeout=5000)
    page.screenshot(path=SHOTS / f"lab-{shot}-away.png")
    assert "19 of 20 GiB" in status.inner_text()
    lab.away(False)
    page.get_by_text("The node agent has not answered").wait_for(state="detached", timeout=35_000)


def test_a_suspended_kernel_is_shown_as_suspended_and_let_go_on(lab: Lab, page: Any) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    fill_slice(lab)
    lab.agent.suspend(4711, lab.kernels[1])
    lab.agent.suspend(4712, None)
    try:
        open_lab(page, lab, "JupyterLab Light")
        row, rest, first = (page.locator(f'[data-kernel="{name}"]') for name in (lab.kernels[1], "other", lab.kernels[0]))
        row.get_by_text("suspended", exact=True).wait_for()
        row.get_by_text("Suspended: its calls to the GPU wait, because it used the GPU (3 GiB)").wait_for()
        rest.get_by_text("Process 4712 since").wait_for()
        assert first.get_by_text("suspended").count() == 0
        assert page.locator(".nbgpu-Status-text").inner_text().endswith("2 suspended")
        page.screenshot(path=SHOTS / "lab-suspended.png")

        # where the policy does not let its user: no button, and what to do
        lab.agent.may_resume = False
        row.get_by_text("Restart it, or ask your administrator.").wait_for()
        assert page.get_by_role("button", name="Let it go on").count() == 0
        lab.agent.may_resume = True

        row.get_by_role("button", name="Let it go on").click()
        row.get_by_text("suspended", exact=True).wait_for(state="detached")
        assert [one["pid"] for one in lab.agent.suspended] == [4712]
    finally:
        lab.agent.suspended, lab.agent.may_resume = [], True


PLACEHOLDER_FITS = """input => {
    const canvas = document.createElement('canvas').getContext('2d');
    const style = getComputedStyle(input);
    canvas.font = style.font;
    const room = input.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    return canvas.measureText(input.placeholder).width <= room;
}"""
HIDDEN = """hidden => {
    Object.defineProperty(document, 'hidden', {configurable: true, get: () => hidden});
    Object.defineProperty(document, 'visibilityState', {configurable: true, get: () => hidden ? 'hidden' : 'visible'});
    document.dispatchEvent(new Event('visibilitychange'));
}"""


def asked_in(page: Any, seconds: float) -> list[str]:
    """Return what the page asks the server for in so many seconds."""
    asked: list[str] = []

    def note(request: Any) -> None:
        if "/nbgpu/api/" in request.url:
            asked.append(request.url)

    page.on("request", note)
    page.wait_for_timeout(seconds * 1000)
    page.remove_listener("request", note)
    return asked


def run_monitor(page: Any) -> Any:
    """Run the cell that shows the monitor, once its kernel is there."""
    page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()
    page.locator(".jp-Notebook .jp-Cell .cm-content").first.click()
    page.keyboard.press("Control+Enter")
    monitor = page.locator(".nbgpu-monitor")
    monitor.get_by_text("first.ipynb").wait_for()
    return monitor


def test_one_request_a_second(lab: Lab, page: Any) -> None:
    """Status bar, panel and a monitor in a cell ask together, once a second; a hidden page does not ask."""
    open_lab(page, lab, "JupyterLab Light")
    run_monitor(page)
    asked = asked_in(page, 6)
    assert 4 <= len(asked) <= 6, asked
    page.evaluate(HIDDEN, True)
    page.wait_for_timeout(1500)
    assert asked_in(page, 4) == []
    page.evaluate(HIDDEN, False)
    assert 2 <= len(asked_in(page, 4)) <= 5
