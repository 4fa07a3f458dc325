"""What ada sees in JupyterLab of her idle notebook's GPU: lent to others, waited for, given up, back. Leaves pictures of each."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
from test_lab_browser import BUILT, SHOTS
from test_lab_browser import page as page  # a fixture
from test_lab_idle import HOLD, Place
from test_lab_idle import place as place  # a fixture
from test_lab_slice import LIBRARIES, Server, wait_for

from nbgpu_lab.kernel_wait import GIVEN_UP, WAITS

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.skipif(not BUILT.is_dir() or not (LIBRARIES / "sim" / "libcuda.so.1").exists(), reason="not built: make setup"),
]
SECOND = 1000
OUR_WORDS = ("parked", "slot", "context", "checkpoint", "wanting")
"""Words of this repository that mean nothing to a reader of notebooks."""
CELLS = [f"{HOLD}; print('sum', k.hold(256)[:8])", "print('sum', k.sum()[:8])", "%gpu keep"]


@pytest.fixture
def lab(place: Place) -> Server:
    """ada's JupyterLab with all of the only GPU."""
    options = ["--LabApp.news_url=", "--LabApp.expose_app_in_browser=True"]
    (place.base / "ada" / "labextensions").mkdir(parents=True)
    (place.base / "ada" / "labextensions" / "nbgpu-lab").symlink_to(BUILT)
    (place.base / "ada" / "notebooks").mkdir()
    blank = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
    cells = [{**blank, "id": f"cell-{number}", "source": source} for number, source in enumerate(CELLS)]
    kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = {"cells": cells, "metadata": {"kernelspec": kernelspec}, "nbformat": 4, "nbformat_minor": 5}
    (place.base / "ada" / "notebooks" / "ada.ipynb").write_text(json.dumps(notebook))
    found, _ = place.server("ada", "jupyterlab", *options)
    wait_for("ada's JupyterLab", found.answers, 60)
    return found


def theme(page: Any, name: str) -> None:
    page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", f"JupyterLab {name}")
    page.wait_for_selector(f'body[data-jp-theme-name="JupyterLab {name}"]', state="attached")


def pictures(page: Any, name: str) -> None:
    """Leave one in each theme, and see that what is said is in the user's words and not cut off."""
    for number, each in enumerate(("Dark", "Light")):
        theme(page, each)
        page.wait_for_timeout(100 if number else 900)  # notifications slide in
        page.screenshot(path=SHOTS / f"idle-{name}-{each.lower()}.png")
    said = " ".join(page.locator("#nbgpu-panel, .nbgpu-Status, .Toastify__toast").all_inner_texts()).lower()
    assert not [word for word in OUR_WORDS if word in said], said
    for part in page.locator(".nbgpu-Panel-lent p, .nbgpu-Status-text").all():
        assert part.evaluate("one => one.scrollWidth <= one.clientWidth + 1 || getComputedStyle(one).display === 'inline'")


def run(page: Any, number: int) -> Any:
    """Run a cell; return where its output is."""
    cell = page.locator(".jp-Notebook .jp-CodeCell").nth(number)
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+Enter")
    return cell.locator(".jp-OutputArea")


def test_what_ada_sees_of_her_idle_notebook(lab: Server, place: Place, page: Any) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.set_default_timeout(30 * SECOND)
    page.goto(f"http://127.0.0.1:{lab.port}/lab/tree/ada.ipynb?token=secret&reset")
    page.get_by_role("button", name="Show the GPU panel").click()
    page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()
    page.get_by_role("button", name="No", exact=True).click()  # Jupyter's news
    held = run(page, 0).get_by_text("sum")
    held.wait_for()
    before = held.inner_text().strip()
    panel, status = page.get_by_role("region", name="GPU slice"), page.locator(".nbgpu-Status-text")
    told = panel.locator(".nbgpu-Panel-lent")
    assert told.inner_text() == "", "the control: nothing is said while she has her GPU"

    grace = place.start(place.whole_env, "nbgpu", "run", "--gpu", "1", "--", "sleep", "600")
    told.get_by_text("Run a cell to get the GPU and the memory back").wait_for()
    assert "others may use this GPU" in told.inner_text()
    assert status.inner_text() == "1 simulated GPU: lent to others while idle"
    pictures(page, "lent")

    output = run(page, 1)
    output.get_by_text(WAITS).wait_for()
    told.get_by_text("It is the next to get it.").wait_for()
    status.get_by_text("waiting to get it back").wait_for()
    page.get_by_role("alert").filter(has_text="This server waits for its GPU").wait_for()
    pictures(page, "waits")

    page.evaluate("window.jupyterapp.commands.execute('notebook:interrupt-kernel')")
    output.get_by_text(GIVEN_UP).wait_for()
    assert "Traceback" not in output.inner_text()
    pictures(page, "given-up")

    output = run(page, 1)
    output.get_by_text(WAITS).wait_for()
    grace.send_signal(signal.SIGTERM)
    output.get_by_text(before).wait_for()
    output.get_by_text("It is back after").wait_for()
    panel.get_by_text("This server has its GPU back").first.wait_for()
    page.get_by_role("alert").filter(has_text="This server has its GPU back").wait_for()
    page.get_by_role("alert").filter(has_text="This server waits for its GPU").wait_for(state="detached")
    wait_for("nothing more is said", lambda: told.inner_text() == "", 10)
    assert "lent" not in status.inner_text()
    run(page, 2).get_by_text("This notebook keeps its GPU while it is idle.").wait_for()
    pictures(page, "back")
