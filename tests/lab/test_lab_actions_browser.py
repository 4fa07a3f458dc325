"""In a real JupyterLab: freeing one kernel's memory, the Running panel's section, the settings. Leaves pictures in both themes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_slice_agent import GIB
from lab_pages import kernel_menu
from test_lab_browser import BUILT, LONG, SHOTS, Lab, asked_in, fill_slice, open_lab, put_settings, wait_for
from test_lab_browser import lab as lab  # fixtures
from test_lab_browser import page as page
from test_lab_happened_browser import shot

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.skipif(not BUILT.is_dir(), reason="front end not built: make setup")]
TORCH = """
import pathlib, sys, types
def empty_cache(): pathlib.Path('EMPTIED').touch()
sys.modules['torch'] = types.SimpleNamespace(cuda=types.SimpleNamespace(is_initialized=lambda: True, empty_cache=empty_cache))
answer = 42
print('ready')
"""


@pytest.fixture(autouse=True)
def clean(lab: Lab) -> Iterator[None]:
    SHOTS.mkdir(parents=True, exist_ok=True)
    lab.agent.limits.clear()
    fill_slice(lab)
    yield
    lab.agent.kernels.clear()


def run_cell(page: Any, code: str, prints: str) -> None:
    """Run `code` in the first cell, and wait for what it prints."""
    cell = page.locator(".jp-Notebook .jp-CodeCell").first
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(code)
    page.keyboard.press("Control+Enter")
    cell.locator(".jp-OutputArea").get_by_text(prints, exact=True).wait_for()


def test_one_kernels_caches_are_freed_by_keyboard(lab: Lab, page: Any, tmp_path: Path) -> None:
    open_lab(page, lab, "JupyterLab Light")
    page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()
    emptied = tmp_path / "emptied"
    run_cell(page, TORCH.replace("EMPTIED", str(emptied)), "ready")
    page.locator(f'[data-kernel="{lab.kernels[0]}"]').get_by_text("idle").wait_for()  # the panel learns of it once a second
    kernel_menu(page, "first.ipynb")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    dialog = page.locator(".jp-Dialog")
    dialog.get_by_text("torch.cuda.empty_cache()").wait_for()
    shot(page, SHOTS / "actions-consent.png")
    assert not emptied.exists(), "nothing before the consent"
    dialog.get_by_role("button", name="Free caches").focus()
    page.keyboard.press("Enter")
    wait_for(emptied.exists)
    lab.agent.kernels[lab.kernels[0]]["used"] = 7 * GIB
    latest = page.locator(".nbgpu-Latest")
    latest.get_by_text("Freed 1 GiB. 7 GiB are still in use.").wait_for()
    shot(page, SHOTS / "actions-freed.png")
    run_cell(page, "print(answer, 'said' in globals(), 'gc' in globals())", "42 False False")


def test_a_kernels_memory_is_moved_to_the_host_and_back(lab: Lab, page: Any) -> None:
    kernel_id = lab.kernels[0]
    open_lab(page, lab, "JupyterLab Light")
    off = kernel_menu(page, "first.ipynb").locator(".lm-Menu-item.lm-mod-disabled").filter(has_text="Move to Host Memory")
    off.get_by_text("(not offered on this server)").wait_for()  # control: it is not offered
    shot(page, SHOTS / "actions-move-not-offered.png")
    page.keyboard.press("Escape")
    lab.agent.may_suspend = True
    page.wait_for_timeout(2200)
    menu = kernel_menu(page, "first.ipynb")
    menu.get_by_text("Move to Host Memory…").wait_for()
    shot(page, SHOTS / "actions-move-menu.png")
    menu.get_by_text("Move to Host Memory…").click()
    dialog = page.locator(".jp-Dialog")
    dialog.get_by_text("Its 8 GiB are then free").wait_for()
    assert not lab.agent.away, "nothing before the consent"
    shot(page, SHOTS / "actions-move-consent.png")
    dialog.get_by_role("button", name="Move").click()
    row = page.locator(f'[data-kernel="{kernel_id}"]')
    row.get_by_text("Its 8 GiB are in host memory.").wait_for()
    lab.agent.used_bytes = 4 * GIB + GIB // 2
    page.wait_for_timeout(2200)
    shot(page, SHOTS / "actions-moved.png")
    lab.agent.away[kernel_id]["wanted_seconds"] = 3.0
    row.get_by_text("waits until 8 GiB are free for it").wait_for()
    kernel_menu(page, "first.ipynb").get_by_text("Bring Back to the GPU").click()
    wait_for(lambda: not lab.agent.away)
    row.get_by_text("8 GiB", exact=True).wait_for()
    lab.agent.may_suspend = False


def test_a_kernel_of_somebody_else_is_none(lab: Lab, page: Any) -> None:
    """A hostile notebook may ask for what it likes: only this server's kernels have a menu, and each thing is asked of the user first."""
    lab.agent.kernel("another-servers", GIB)
    open_lab(page, lab, "JupyterLab Light")
    for kernel_id in ("another-servers", "../api/contents", None):
        enabled = "id => window.jupyterapp.commands.isEnabled('nbgpu:free-caches', {kernelId: id})"
        assert page.evaluate(enabled, kernel_id) is False
    page.evaluate("void window.jupyterapp.commands.execute('nbgpu:restart-kernel', {kernelId: 'another-servers'})")
    page.locator(".jp-Dialog").get_by_role("button", name="Restart").click()
    page.locator(".nbgpu-Latest").get_by_text("Not restarted: it is no kernel of this server.").wait_for()
    page.evaluate("void window.jupyterapp.commands.execute('nbgpu:restart-kernel', {kernelId: 'nobodys'})")
    page.wait_for_timeout(300)
    assert page.locator(".jp-Dialog").count() == 0


def test_what_cannot_be_freed_is_said_in_the_menu(lab: Lab, page: Any) -> None:
    open_lab(page, lab, "JupyterLab Light")
    page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()
    cell = page.locator(".jp-Notebook .jp-CodeCell").first
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text("import time; time.sleep(6)")
    page.keyboard.press("Control+Enter")
    page.locator("#jp-main-statusbar").get_by_text("| Busy").wait_for()
    page.wait_for_timeout(2200)  # the panel is told at its next look
    menu = kernel_menu(page, "first.ipynb")
    menu.get_by_text("Free Caches (the kernel is busy)").wait_for()
    shot(page, SHOTS / "actions-busy.png")
    page.keyboard.press("Escape")
    page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()


def test_one_kernel_is_restarted(lab: Lab, page: Any) -> None:
    open_lab(page, lab, "JupyterLab Light")
    page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()
    run_cell(page, "before = 1; print('set')", "set")
    menu = kernel_menu(page, "first.ipynb")
    menu.get_by_text("Restart Kernel…").click()
    dialog = page.locator(".jp-Dialog")
    dialog.get_by_text("The 8 GiB of GPU memory that it holds are freed.").wait_for()
    dialog.get_by_role("button", name="Cancel").click()
    run_cell(page, "print('before' in globals())", "True")
    kernel_menu(page, "first.ipynb").get_by_text("Restart Kernel…").click()
    page.locator(".jp-Dialog").get_by_role("button", name="Restart").click()
    page.locator(".jp-Dialog").wait_for(state="detached")
    page.wait_for_timeout(1500)
    run_cell(page, "print('before' in globals())", "False")


def test_the_running_panel_lists_who_holds_memory(lab: Lab, page: Any) -> None:
    open_lab(page, lab, "JupyterLab Light")
    page.evaluate("window.jupyterapp.shell.activateById('jp-running-sessions')")
    section = page.locator(".jp-RunningSessions-section").filter(has_text="8 GiB · first.ipynb")
    section.get_by_text(f"4 GiB · {LONG}").wait_for()
    assert section.get_by_text("Other").count() == 0
    shot(page, SHOTS / "running.png")
    lab.agent.kernels.pop(lab.kernels[0])
    section = page.locator(".jp-RunningSessions-section").filter(has_text=f"4 GiB · {LONG}")
    page.get_by_text("8 GiB · first.ipynb").wait_for(state="detached")
    section.get_by_text(f"4 GiB · {LONG}").click()
    page.locator(".lm-TabBar-tab.jp-mod-current").filter(has_text=LONG[:10]).first.wait_for()


def test_settings(lab: Lab, page: Any) -> None:
    try:
        put_settings(lab, showPanel=False, showStatus=False, pollSeconds=3)
        page.goto(f"{lab.url}/lab/tree/first.ipynb?token={lab.token}&reset")
        page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()
        page.wait_for_function("window.jupyterapp.commands.hasCommand('nbgpu:show-panel')")
        assert page.locator(".nbgpu-Status:visible").count() == 0
        assert page.locator("#nbgpu-panel").count() == 0
        assert 1 <= len(asked_in(page, 6)) <= 3
        page.evaluate("window.jupyterapp.commands.execute('nbgpu:show-panel')")
        page.locator("#nbgpu-panel").wait_for(state="visible")
        page.evaluate("window.jupyterapp.commands.execute('settingeditor:open', {query: 'GPU slice'})")
        editor = page.locator(".jp-SettingsForm")
        box = editor.get_by_label("Show in the status bar")
        box.wait_for()
        shot(page, SHOTS / "settings.png")
        box.check()
        page.locator(".nbgpu-Status").wait_for(state="visible")
    finally:
        put_settings(lab)
