"""The same extension in Notebook 7, in a real Chromium, in both themes: panel, a limit that its notebook keeps, what happened, cells.

One page after another in one server: what the views do is tested in JupyterLab, here that each is there and works. Leaves pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from test_lab_browser import BUILT, LONG, REFUSAL, SHOTS, Lab, fill_slice, lab, page, put_settings, wait_for  # noqa: F401
from test_lab_happened_browser import TOAST, shot

pytest.importorskip("notebook")
pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.skipif(not BUILT.is_dir(), reason="front end not built: make setup")]


@pytest.fixture
def wrong(lab: Lab, page: Any) -> Iterator[list[str]]:  # noqa: F811
    """What the browser's console says against our extension."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    fill_slice(lab)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" and "nbgpu" in message.text else None)
    yield said
    put_settings(lab)


def run_cell(page: Any, code: str) -> Any:  # noqa: F811
    """Run `code` in the first cell; return where its output is."""
    cell = page.locator(".jp-Notebook .jp-CodeCell").first
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(code)
    page.keyboard.press("Control+Enter")
    return cell.locator(".jp-OutputArea")


def test_the_slice_in_notebook_7(lab: Lab, page: Any, wrong: list[str]) -> None:  # noqa: F811
    page.goto(f"{lab.url}/notebooks/first.ipynb?token={lab.token}")
    page.locator(".jp-Notebook .jp-Cell .cm-content").first.wait_for()

    # in a cell: as text and a table, and live
    output = run_cell(page, "%gpu")
    output.get_by_role("row", name="GPU 0").get_by_text("12.5 of 20 GiB").wait_for()
    shot(page, SHOTS / "notebook-7-gpu.png")
    output = run_cell(page, "import nbgpu\nnbgpu.SliceMonitor()")
    monitor = output.locator(".nbgpu-monitor")
    monitor.get_by_text("first.ipynb (this notebook): 8 GiB").wait_for()

    # with the panel closed a notification, which opens it
    lab.tell(kernel_id=lab.kernels[1])
    toast = page.locator(TOAST).filter(has_text="refused an allocation")
    toast.wait_for()
    shot(page, SHOTS / "notebook-7-toast.png")
    toast.get_by_role("button", name="Show panel").click()
    panel = page.get_by_role("region", name="GPU slice")
    row, other = (panel.locator(f'[data-kernel="{one}"]') for one in lab.kernels)
    row.get_by_text("8 GiB").wait_for()
    assert "Simulated: this machine has no NVIDIA driver." in panel.inner_text()
    other.get_by_text("5 GiB").first.wait_for()
    panel.get_by_role("region", name="What happened").get_by_text(REFUSAL).wait_for()

    # the history, which is kept
    panel.get_by_role("radio", name="1 h").check()
    panel.get_by_role("img", name="Memory in the last 1 h").wait_for()
    wait_for(lambda: lab.call("lab/api/settings/nbgpu-lab:model")["settings"].get("historySeconds") == 3600)

    # a limit, by keyboard; the notebook says so
    row.get_by_role("button", name="Limit of").focus()
    page.keyboard.press("Enter")
    row.get_by_label("Memory limit").fill("9 GiB")
    shot(page, SHOTS / "notebook-7-limit.png")
    row.get_by_label("Memory limit").press("Enter")
    row.get_by_text("from the notebook").wait_for()
    assert lab.call("api/contents/first.ipynb")["content"]["metadata"]["nbgpu"] == {"memory": "9 GiB"}
    monitor.get_by_text("of its own limit of 9 GiB").wait_for()

    # with the panel open what happens is said in it, beside the form
    lab.tell(kernel_id=lab.kernels[1])
    page.locator(".nbgpu-Latest").get_by_text(LONG).wait_for()
    shot(page, SHOTS / "notebook-7.png")
    assert wrong == []


def test_the_tree_of_notebook_7(lab: Lab, page: Any, wrong: list[str]) -> None:  # noqa: F811
    """Its Running tab lists who holds memory; from the View menu the panel opens there too."""
    page.goto(f"{lab.url}/tree?token={lab.token}")
    page.get_by_role("tab", name="Running").click()
    page.locator(".jp-RunningSessions-section").get_by_text("8 GiB · first.ipynb").wait_for()
    shot(page, SHOTS / "notebook-7-running.png")
    assert wrong == []
