"""In Notebook 7, in a real Chromium: freeing memory, another size, who is asked back, who does not answer, names, settings, the log.

What each view does is tested in JupyterLab; here that it is there, works and can be read, in both themes. Leaves pictures.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pseudo_language
import pytest
import test_lab_panel_browser
from axe_kit import violations
from fake_slice_agent import GIB
from lab_pages import kernel_menu
from playwright.sync_api import TimeoutError as PlaywrightTimeout
from test_lab_actions_browser import TORCH
from test_lab_browser import BUILT, HIDDEN, LONG, REFUSAL, SHOTS, Lab, asked_in, fill_slice, put_settings, running_lab, wait_for
from test_lab_browser import page as page
from test_lab_happened_browser import HOSTILE, TOAST, shot, tell
from test_lab_panel_browser import SECOND, THEMES, theme
from test_notebook7_browser import run_cell

pytest.importorskip("notebook")
pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.skipif(not BUILT.is_dir(), reason="front end not built: make setup")]
WHY = "it uses what is guaranteed to group bio and was lent"


class Hub(test_lab_panel_browser.Hub):
    """Grants up to half a GPU, and asks back where `due` says until when."""

    due: float | None = None

    def do_GET(self) -> None:
        if not self.path.startswith("/hub/api/nbgpu/asked"):
            super().do_GET()
            return
        asked = None
        if Hub.due is not None:
            asked = {"kind": "guarantee", "seconds": Hub.due - time.monotonic(), "ends": True, "idle": True, "reason": WHY}
        self._say(200, {"asked": asked, "again_seconds": 1})


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTERHUB_API_URL", f"http://127.0.0.1:{server.server_port}/hub/api")
        patch.setenv("JUPYTERHUB_API_TOKEN", "the-servers")
        patch.setenv("JUPYTERHUB_USER", "ada")
        with running_lab(tmp_path_factory.mktemp("lab")) as running:
            yield running
    server.shutdown()


@pytest.fixture(autouse=True)
def wrong(lab: Lab, page: Any) -> Iterator[None]:
    """The slice as it is at first; the browser's console says nothing against our extension."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.set_default_timeout(30 * SECOND)
    fill_slice(lab)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" and "nbgpu" in message.text else None)
    yield
    put_settings(lab)
    lab.agent.limits.clear()
    assert said == []


def open_notebook(page: Any, lab: Lab) -> Any:
    """Open the first notebook with the panel beside it; return the panel."""
    page.goto(f"{lab.url}/notebooks/first.ipynb?token={lab.token}")
    page.locator(".jp-Notebook .jp-Cell .cm-content").first.wait_for()
    page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').first.wait_for(state="attached")
    page.wait_for_function("window.jupyterapp?.commands.hasCommand('nbgpu:show-panel')")
    page.evaluate("window.jupyterapp.commands.execute('nbgpu:show-panel')")
    panel = page.get_by_role("region", name="GPU slice")
    panel.locator(".nbgpu-Kernels").wait_for()
    return panel


def test_memory_that_is_not_needed(lab: Lab, page: Any, tmp_path: Path) -> None:
    panel = open_notebook(page, lab)
    row = panel.locator(f'[data-kernel="{lab.kernels[0]}"]')
    dialog, latest, emptied = page.locator(".jp-Dialog"), panel.locator(".nbgpu-Latest"), tmp_path / "emptied"

    # caches, by keyboard and with consent
    run_cell(page, TORCH.replace("EMPTIED", str(emptied))).get_by_text("ready").wait_for()
    row.get_by_text("idle").wait_for()
    kernel_menu(page, "first.ipynb")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    dialog.get_by_text("torch.cuda.empty_cache()").wait_for()
    shot(page, SHOTS / "notebook-7-consent.png")
    assert not emptied.exists(), "nothing before the consent"
    dialog.get_by_role("button", name="Free caches").focus()
    page.keyboard.press("Enter")
    wait_for(emptied.exists)
    lab.agent.kernels[lab.kernels[0]]["used"] = 7 * GIB
    latest.get_by_text("Freed 1 GiB. 7 GiB are still in use.").wait_for()

    # to the host and back
    lab.agent.may_suspend = True
    wait_for(lambda: page.evaluate("id => window.jupyterapp.commands.isEnabled('nbgpu:move-kernel', {kernelId: id})", lab.kernels[0]))
    kernel_menu(page, "first.ipynb").get_by_text("Move to Host Memory…").click()
    dialog.get_by_role("button", name="Move").click()
    lab.agent.used_bytes = 4 * GIB + GIB // 2
    row.get_by_text("Its 7 GiB are in host memory.").wait_for()
    panel.get_by_text("more are held than").wait_for(state="detached")
    shot(page, SHOTS / "notebook-7-moved.png")
    kernel_menu(page, "first.ipynb").get_by_text("Bring Back to the GPU").click()
    wait_for(lambda: not lab.agent.away)
    lab.agent.may_suspend, lab.agent.used_bytes = False, 11 * GIB + GIB // 2
    row.get_by_text("7 GiB").first.wait_for()

    # all of it
    kernel_menu(page, "first.ipynb").get_by_text("Restart Kernel…").click()
    dialog.get_by_text("The 7 GiB of GPU memory that it holds are freed.").wait_for()
    dialog.get_by_role("button", name="Restart").click()
    dialog.wait_for(state="detached")

    def has_forgotten() -> bool:
        """Run a cell, which is lost where its kernel is not back yet."""
        with contextlib.suppress(PlaywrightTimeout):
            run_cell(page, "print('answer' in globals())").get_by_text("False").wait_for(timeout=3 * SECOND)
            return True
        return False

    wait_for(has_forgotten, 60)
    lab.agent.kernels.pop(lab.kernels[0])
    ended = f"Notebook kernel {lab.kernels[0][:8]}… ended: the 7 GiB of GPU memory that it held are free again."
    tell(lab, "kernel-ended", ended, {"freed_bytes": 7 * GIB}, kernel_id=lab.kernels[0], level="info")
    panel.get_by_role("region", name="What happened").get_by_text("first.ipynb ended: the 7 GiB of GPU memory").wait_for()
    wait_for(lambda: row.get_by_text("7 GiB").count() == 0)


def test_another_size_and_who_is_asked_back(lab: Lab, page: Any) -> None:
    panel = open_notebook(page, lab)
    form = panel.get_by_role("form", name="Size of this slice")
    panel.get_by_role("button", name="Change the size of this slice").click()
    form.get_by_text("Free on GPU 0 now: 1/4 of its time, 19 GiB of its memory.").wait_for()
    form.get_by_label("Share of a GPU").fill("1")
    page.keyboard.press("Enter")
    form.get_by_role("alert").filter(has_text="Your quota is half a GPU").wait_for()
    shot(page, SHOTS / "notebook-7-resize.png")
    form.get_by_label("Share of a GPU").fill("1/2")
    page.keyboard.press("Enter")
    panel.get_by_role("status").filter(has_text="Granted: 1/2 GPU with 39 GiB of memory.").wait_for()

    Hub.due = time.monotonic() + 290
    try:
        panel.locator(".nbgpu-Latest").get_by_text("Save your work: this server will be stopped in").wait_for(timeout=45 * SECOND)
        panel.get_by_text("Files are kept; what is only in memory is lost.").wait_for()
        page.locator("#nbgpu-panel .nbgpu-Panel-lent").get_by_text(WHY).wait_for()
        shot(page, SHOTS / "notebook-7-asked-back.png")
    finally:
        Hub.due = None
    panel.get_by_text("This server is not asked back any more: it goes on.").first.wait_for(timeout=45 * SECOND)


def test_who_does_not_answer_names_and_suspended_kernels(lab: Lab, page: Any) -> None:
    (session,) = (one for one in lab.call("api/sessions") if one["kernel"]["id"] == lab.kernels[0])
    panel = open_notebook(page, lab)
    lab.agent.suspend(4711, lab.kernels[1])
    lab.call(f"api/sessions/{session['id']}", {"path": HOSTILE, "name": HOSTILE}, method="PATCH")
    lab.agent.kernel(lab.kernels[1], 6 * GIB)
    try:
        tell(lab, "refused", f"Notebook kernel {lab.kernels[0][:8]}… was refused 1 GiB.", kernel_id=lab.kernels[0])
        panel.locator(".nbgpu-Latest").get_by_text(f"\u2068{HOSTILE}\u2069 was refused 1 GiB.").wait_for()
        panel.locator(f'[data-kernel="{lab.kernels[0]}"]').get_by_text(HOSTILE).first.wait_for()
        other = panel.locator(f'[data-kernel="{lab.kernels[1]}"]')
        other.get_by_text("Suspended: its calls to the GPU wait").wait_for()
        other.get_by_text("Over its limit (6 of 5 GiB)").wait_for()
        assert panel.locator("img").count() == 0
        assert page.title() != "1"
        shot(page, SHOTS / "notebook-7-names.png")
        other.get_by_role("button", name="Let it go on").click()
        wait_for(lambda: not lab.agent.suspended)
        lab.away(True)
        panel.get_by_text("The node agent has not answered since").wait_for(timeout=5 * SECOND)
        page.locator(".nbgpu-Panel-content[data-stale]").wait_for()
        panel.get_by_text("12.5 of 20 GiB").wait_for()
        shot(page, SHOTS / "notebook-7-away.png")
    finally:
        lab.away(False)
        lab.agent.suspended = []
        lab.call(f"api/sessions/{session['id']}", {"path": "first.ipynb", "name": "first.ipynb"}, method="PATCH")
    page.locator(".nbgpu-Panel-content[data-stale]").wait_for(state="detached", timeout=35 * SECOND)


def test_a_page_that_is_loaded_again(lab: Lab, page: Any) -> None:
    """The panel is open again, its words are the reader's, axe finds nothing, the log has what happened; it asks once a second."""
    panel = open_notebook(page, lab)
    assert 2 <= len(asked_in(page, 4)) <= 5
    page.evaluate(HIDDEN, True)
    page.wait_for_timeout(1500)
    assert asked_in(page, 3) == []
    lab.call(pseudo_language.SETTINGS, {"raw": json.dumps({"locale": pseudo_language.LOCALE})}, method="PUT")
    said = [notice["message"] for notice in lab.call("nbgpu/api/events")]  # the agent's
    known = (*said, "first.ipynb", LONG, "Simulated H100 80GB", "Python 3 (ipykernel)")
    try:
        page.reload()
        page.locator("#nbgpu-panel .nbgpu-Kernels").wait_for()
        texts = page.evaluate(pseudo_language.TEXTS, "#nbgpu-panel")
        assert len(texts) > 40
        assert pseudo_language.plain(texts, *known) == []
    finally:
        lab.call(pseudo_language.SETTINGS, {"raw": "{}"}, method="PUT")
    page.reload()
    panel.locator(".nbgpu-Kernels").wait_for()
    panel.locator(f'[data-kernel="{lab.kernels[1]}"] .nbgpu-Kernels-limit').click()
    for each in THEMES:
        theme(page, each)
        page.wait_for_timeout(300)
        assert violations(page, "#nbgpu-panel") == [], each
    page.evaluate("void window.jupyterapp.commands.execute('logconsole:open')")
    console = page.locator(".jp-LogConsolePanel")
    console.wait_for(state="attached")
    tell(lab, "refused", "The slice refused <b>this</b>.", kernel_id=lab.kernels[0])
    console.get_by_text("GPU: The slice refused <b>this</b>.").wait_for(state="attached")
    assert console.locator("b").count() == 0


def test_settings_in_notebook_7(lab: Lab, page: Any) -> None:
    """In its tree; without the panel in the side bar and without notifications its View menu and command have it still."""
    page.goto(f"{lab.url}/tree?token={lab.token}")
    page.wait_for_function("window.jupyterapp?.commands.hasCommand('nbgpu:show-panel')")
    page.evaluate("void window.jupyterapp.commands.execute('settingeditor:open', {query: 'GPU slice'})")
    editor = page.locator(".jp-SettingsForm")
    editor.get_by_label("Say what happens at once").uncheck()
    wait_for(lambda: lab.call("lab/api/settings/nbgpu-lab:model")["settings"].get("notify") is False)
    shot(page, SHOTS / "notebook-7-settings.png")
    lab.tell(kernel_id=lab.kernels[1])
    page.evaluate("window.jupyterapp.commands.execute('nbgpu:show-panel')")
    page.get_by_role("region", name="What happened").get_by_text(REFUSAL).first.wait_for()
    assert page.locator(TOAST).count() == 0
