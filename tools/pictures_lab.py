"""The pictures of JupyterLab and Notebook 7: every view of the slice (`tools/pictures.py`)."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fake_slice_agent import GIB, UUID, FakeAgent
from playwright.sync_api import Browser, Locator, Page
from test_lab_browser import Lab, running_lab, wait_for
from test_lab_panel_browser import Hub

SIZE = {"width": 1280, "height": 900}
STATUS_BAR = 26
"""Its height, pixels."""
SECOND = 1000
THEMES = {"dark": "JupyterLab Dark", "light": "JupyterLab Light"}
NOTEBOOKS = {
    "train.ipynb": ["# Train", "for epoch in range(3):\n    print(f'epoch {epoch}: loss {0.9 / (epoch + 1):.3f}')"],
    "explore.ipynb": ["# What the slice holds", "%gpu", "import nbgpu\nnbgpu.SliceMonitor()"],
    "données 2026.ipynb": ["# Data", "1"],
}
OWN_LIMIT = "was refused 2 GiB: its own limit of 5 GiB has 1 GiB left. Free memory in it, or raise its limit."
THE_SLICE = "was refused 9 GiB: this server's slice of 20 GiB has 7 GiB left. Free memory, or restart a kernel that holds some."


def make(browser: Browser, out: Path) -> Iterator[Path]:
    """Yield each picture once it is there."""
    with tempfile.TemporaryDirectory(prefix="nbgpu-lab-") as base, asked_hub(), running_lab(Path(base)) as lab:
        kernels = begin(lab)
        page = browser.new_page(viewport=SIZE)
        page.set_default_timeout(120 * SECOND)
        views = Views(lab, page, out, kernels)
        for view in (
            views.panel, views.limit, views.resize, views.menu, views.moved, views.happened, views.toast, views.cell, views.running,
            views.settings, views.away, views.notebook7,
        ):  # fmt: skip
            yield from view()
        page.close()


@contextlib.contextmanager
def asked_hub() -> Iterator[None]:
    """A hub of the tests, which the server is told of: it says what is free, and the quota."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    words = {"API_URL": f"http://127.0.0.1:{server.server_port}/hub/api", "API_TOKEN": "the-servers", "USER": "ada", "SERVER_NAME": ""}
    os.environ.update({f"JUPYTERHUB_{name}": value for name, value in words.items()})
    try:
        yield
    finally:
        for name in words:
            del os.environ[f"JUPYTERHUB_{name}"]
        server.shutdown()


def write(path: Path, sources: list[str]) -> None:
    """Write a notebook: a heading, then code."""
    blank = {"metadata": {}, "source": ""}
    code = {**blank, "cell_type": "code", "execution_count": None, "outputs": []}
    cells = [
        {**(blank | {"cell_type": "markdown"} if not n else code), "id": f"cell-{n}", "source": text} for n, text in enumerate(sources)
    ]
    metadata = {"kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}}
    path.write_text(json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))


def begin(lab: Lab) -> dict[str, str]:
    """Put notebooks with kernels into the server, and let them hold memory; return the kernels' ids."""
    for session in lab.call("api/sessions"):
        lab.call(f"api/sessions/{session['id']}", method="DELETE")
    for old in lab.notebooks.glob("*.ipynb"):
        old.unlink()
    kernels: dict[str, str] = {}
    for name, sources in NOTEBOOKS.items():
        write(lab.notebooks / name, sources)
        session = {"name": name, "type": "notebook", "path": name, "kernel": {"name": "python3"}}
        kernels[name] = lab.call("api/sessions", session)["kernel"]["id"]
    agent = lab.agent
    train, explore, data = kernels.values()
    agent.kernel(train, 8 * GIB, milli=160)
    agent.kernel(explore, 4 * GIB, milli=20, refusals=1)
    agent.kernel(data, 3 * GIB)
    agent.kernel(data, GIB // 2)  # its peak stays
    agent.kernel(None, GIB // 2)
    agent.used_bytes, agent.used_milli = 13 * GIB, 180
    agent._history = lambda seconds: history(agent, seconds)  # type: ignore[method-assign]
    lab.call("nbgpu/api/usage")
    wait_for(lambda: lab.call("nbgpu/api/usage").get("devices"))
    lab.call(f"nbgpu/api/kernels/{explore}", {"memory": "5 GiB", "compute": "1/2", "kept": True}, "PUT")
    lab.call(f"nbgpu/api/kernels/{data}", {"memory": "1/4"}, "PUT")
    return kernels


def history(agent: FakeAgent, seconds: int) -> dict[str, Any]:
    """Return a morning of work: memory in steps, compute in epochs; up to what is used now."""
    now = int(time.time())
    interval = 1 if seconds <= 600 else 10
    times = list(range(now - seconds, now, interval))
    steps = (0.3, 0.45, 0.4, 0.8, 0.75, 1.0)

    def memory(t: int) -> int:
        return int(agent.used_bytes * steps[min(5, (t - now + seconds) * 6 // seconds)])

    def compute(t: int) -> int:
        wave = 0.75 + 0.25 * math.sin(t / (seconds / 60))
        return int(agent.used_milli * wave * (1.0 if (t - now + seconds) % (seconds // 5) > seconds // 25 else 0.1))

    of_device = {"memory_used_bytes": list(map(memory, times)), "compute_used_milli": list(map(compute, times))}
    return {"interval_seconds": interval, "time": times, "devices": {UUID: of_device}}


class Views:
    """One method a view: it brings it into sight, and yields its pictures."""

    def __init__(self, lab: Lab, page: Page, out: Path, kernels: dict[str, str]):
        self.lab = lab
        self.page = page
        self.out = out
        self.kernels = kernels
        self.train, self.explore, self.data = kernels.values()

    def row(self, kernel_id: str) -> Locator:
        """Return a kernel's part of the panel."""
        return self.page.locator(f'#nbgpu-panel [data-kernel="{kernel_id}"]')

    def shots(self, name: str, *parts: str, around: int = 0) -> Iterator[Path]:
        """Yield a picture in each theme: of the whole page, or of what holds all `parts`, with so many pixels around."""
        clip = self.around(parts, around) if parts else None
        toast = ".Toastify__toast" in parts  # which its own animation closes
        if not toast:
            self.page.mouse.move(2, 500)
        for short, theme in THEMES.items():
            self.page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", theme)
            self.page.wait_for_selector(f'body[data-jp-theme-name="{theme}"]', state="attached")
            self.page.wait_for_timeout(700)  # colours fade
            path = self.out / f"{name}-{short}.png"
            self.page.screenshot(path=path, clip=clip, animations="allow" if toast else "disabled")  # type: ignore[arg-type]
            yield path

    def around(self, parts: tuple[str, ...], more: int) -> dict[str, float]:
        """Return the rectangle that holds some parts."""
        boxes = [box for part in parts if (box := self.page.locator(part).locator("visible=true").first.bounding_box())]
        left, top = (max(0, min(box[side] for box in boxes) - more) for side in ("x", "y"))
        right = min(SIZE["width"], max(box["x"] + box["width"] for box in boxes) + more)
        lowest = SIZE["height"] - (0 if "#jp-main-statusbar" in parts else STATUS_BAR)
        bottom = min(lowest, max(box["y"] + box["height"] for box in boxes) + more)
        return {"x": left, "y": top, "width": right - left, "height": bottom - top}

    def tell(self, kind: str, what: str, kernel_id: str, level: str = "warning", **data: int) -> None:
        """Let the agent tell what a kernel did, or what became of it."""

        def now() -> None:
            message = what if "{}" in what else f"{{}} {what}"
            self.lab.agent.tell(kind, message.format(f"Notebook kernel {kernel_id[:8]}…"), kernel_id=kernel_id, level=level)
            self.lab.agent.events[-1]["data"] = data

        self.lab.loop.call_soon_threadsafe(now)

    def open(self, notebook: str) -> None:
        """Open a notebook in JupyterLab, without the files beside it, with the panel."""
        page = self.page
        page.goto(f"{self.lab.url}/lab/tree/{notebook}?token={self.lab.token}&reset")
        page.locator(".nbgpu-Status").wait_for()
        page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()
        news = page.get_by_role("button", name="No", exact=True)
        with contextlib.suppress(Exception):
            news.click(timeout=3 * SECOND)
        page.locator(".nbgpu-Status").click()
        page.locator(".nbgpu-Kernels").wait_for()

    def run_all(self, last: str) -> None:
        """Run all cells, and wait for what the last shows."""
        self.page.evaluate("window.jupyterapp.commands.execute('runmenu:run-all')")
        self.page.locator(last).first.wait_for()

    def panel(self) -> Iterator[Path]:
        """Status bar and panel."""
        self.tell("limit-changed", "is limited to 5 GiB and 1/2 of the slice's time.", self.explore, "info")
        self.tell("refused", OWN_LIMIT, self.explore, count=3)
        wait_for(lambda: len(self.lab.call("nbgpu/api/events?after=0")) >= 2)
        for notebook in reversed(self.kernels):  # a kernel that nobody has spoken to is said to start
            self.open(notebook)
        self.run_all(".jp-OutputArea-output")
        self.page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()
        self.page.get_by_role("region", name="What happened").get_by_text("was refused 2 GiB").wait_for()
        yield from self.shots("panel")

    def limit(self) -> Iterator[Path]:
        """A kernel's limit."""
        row = self.row(self.explore)
        row.locator(".nbgpu-Kernels-limit").click()
        row.get_by_label("Compute limit").fill("1/4")
        row.scroll_into_view_if_needed()
        yield from self.shots("limit", "#nbgpu-panel section[aria-label=Kernels]", around=8)
        self.page.keyboard.press("Escape")

    def resize(self) -> Iterator[Path]:
        """Another size of the slice, with what the pool said."""
        page = self.page
        page.locator("#nbgpu-panel").get_by_role("button", name="Change the size of this slice").click()
        form = page.get_by_role("form", name="Size of this slice")
        form.get_by_text("Free on GPU 0 now").wait_for()
        form.get_by_label("Share of a GPU").fill("1")
        page.keyboard.press("Enter")
        form.get_by_role("alert").filter(has_text="Your quota is half a GPU").wait_for()
        yield from self.shots("resize", ".nbgpu-Header", ".nbgpu-Resize", around=12)
        page.locator("#nbgpu-panel").get_by_role("button", name="Change the size of this slice").click()

    def menu(self) -> Iterator[Path]:
        """What can be done with a kernel; what frees caches asks first."""
        page = self.page
        self.lab.agent.may_suspend = True
        page.wait_for_timeout(2500)
        page.get_by_role("button", name="Actions for train.ipynb").click()
        page.locator(".lm-Menu").get_by_text("Move to Host Memory…").wait_for()
        yield from self.shots("menu", ".lm-Menu", f'[data-kernel="{self.train}"]', f'[data-kernel="{self.data}"]', around=12)
        page.locator(".lm-Menu").get_by_text("Free Caches…").click()
        page.locator(".jp-Dialog").get_by_text("torch.cuda.empty_cache()").wait_for()
        yield from self.shots("free", ".jp-Dialog-content", around=24)
        page.locator(".jp-Dialog").get_by_role("button", name="Cancel").click()

    def moved(self) -> Iterator[Path]:
        """A kernel whose memory is in the host's."""
        page, agent = self.page, self.lab.agent
        page.get_by_role("button", name="Actions for train.ipynb").click()
        page.locator(".lm-Menu").get_by_text("Move to Host Memory…").click()
        page.locator(".jp-Dialog").get_by_role("button", name="Move").click()
        self.row(self.train).get_by_text("Its 8 GiB are in host memory.").wait_for()
        agent.used_bytes, agent.used_milli = 5 * GIB, 20
        agent.kernels[self.train]["milli"] = 0
        page.wait_for_timeout(2500)
        yield from self.shots("moved", "#nbgpu-panel section[aria-label=Kernels]", around=8)
        agent.away.clear()
        agent.may_suspend = False
        agent.kernels[self.train]["milli"] = 160
        agent.used_bytes, agent.used_milli = 13 * GIB, 180

    def happened(self) -> Iterator[Path]:
        """The list, and the newest below the panel's content."""
        page = self.page
        by_itself = "it used the GPU (3 GiB) without nbgpu's limiter"
        self.tell("killed", f"Process 4711 ({{}}) was ended: {by_itself}. Restart its kernel or program.", self.data, "error", pid=4711)
        slowed = "has used all of its own compute limit (1/8 of the GPU) for a minute. Raise the limit to make it faster."
        self.tell("throttled", slowed, self.explore, "info")
        self.tell("kernel-ended", "ended: the 3 GiB of GPU memory that it held are free again.", self.data, "info", freed_bytes=3 * GIB)
        self.lab.agent.limits[self.train] = {"memory_bytes": 6 * GIB, "compute_milli": None}
        self.tell("over-limit", "holds 8 GiB, its limit is now 6 GiB. Until it frees some, it is refused more.", self.train)
        page.locator(".nbgpu-Latest").get_by_text("holds 8 GiB").wait_for()
        page.get_by_role("region", name="What happened").evaluate("one => one.scrollIntoView({block: 'end'})")
        page.wait_for_timeout(1500)
        yield from self.shots("happened", "#nbgpu-panel")
        del self.lab.agent.limits[self.train]

    def toast(self) -> Iterator[Path]:
        """With the panel closed: a notification. And the notebook's log."""
        page = self.page
        page.evaluate("window.jupyterapp.commands.execute('application:toggle-right-area')")
        page.locator("#nbgpu-panel").wait_for(state="hidden")
        page.evaluate("window.jupyterapp.commands.execute('logconsole:open')")
        page.locator(".jp-LogConsolePanel").wait_for()
        self.tell("refused", THE_SLICE, self.train)
        page.locator(".jp-LogConsolePanel").get_by_text("was refused 9 GiB").wait_for()
        page.locator(".Toastify__toast").filter(has_text="was refused 9 GiB").hover()  # else it goes
        page.wait_for_timeout(1500)
        yield from self.shots("toast", ".jp-LogConsolePanel", "#jp-main-statusbar", ".Toastify__toast")

    def cell(self) -> Iterator[Path]:
        """`%gpu` and the monitor."""
        self.open("explore.ipynb")
        self.page.evaluate("window.jupyterapp.commands.execute('application:toggle-right-area')")
        self.run_all(".nbgpu-monitor li")
        self.page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()
        self.page.wait_for_timeout(2500)
        yield from self.shots("cell", ".jp-Notebook .jp-Cell >> nth=0", ".nbgpu-monitor", around=8)

    def running(self) -> Iterator[Path]:
        """The section of the Running panel."""
        page = self.page
        page.evaluate("window.jupyterapp.shell.activateById('jp-running-sessions')")
        page.locator(".jp-RunningSessions-section").get_by_text("8 GiB · train.ipynb").wait_for()
        yield from self.shots("running", "#jp-running-sessions")

    def settings(self) -> Iterator[Path]:
        """The settings."""
        page = self.page
        page.evaluate("window.jupyterapp.commands.execute('application:toggle-left-area')")
        page.evaluate("window.jupyterapp.commands.execute('settingeditor:open', {query: 'GPU slice'})")
        page.locator(".jp-SettingsForm").get_by_label("Show in the status bar").wait_for()
        page.locator(".jp-SettingsPanel").evaluate("one => one.scrollTo(0, 0)")
        yield from self.shots("settings", ".jp-SettingsForm", around=8)

    def away(self) -> Iterator[Path]:
        """The agent does not answer."""
        self.open("train.ipynb")
        self.lab.away(True)
        self.page.get_by_text("The node agent has not answered since").wait_for()
        yield from self.shots("away")
        self.lab.away(False)
        self.page.get_by_text("The node agent has not answered since").wait_for(state="detached")

    def notebook7(self) -> Iterator[Path]:
        """Notebook 7 with the monitor in a cell and the panel."""
        page = self.page
        page.goto(f"{self.lab.url}/notebooks/explore.ipynb?token={self.lab.token}")
        page.locator(".jp-Notebook .jp-Cell").first.wait_for()
        page.locator(".jp-Notebook-ExecutionIndicator, .jp-NotebookKernelStatus").first.wait_for(state="attached")
        page.evaluate("window.jupyterapp.commands.execute('nbgpu:show-panel')")
        page.locator("#nbgpu-panel .nbgpu-Kernels").wait_for()
        self.run_all(".nbgpu-monitor li")
        page.wait_for_timeout(2500)
        yield from self.shots("notebook7")
