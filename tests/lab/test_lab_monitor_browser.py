"""``nbgpu.SliceMonitor()`` in cells of a real JupyterLab, and notebooks of strangers: nothing that is saved in them runs.

The pages have our extension alone, as after ``pip install 'nbgpu[lab]'``: this JupyterLab is told where to look for extensions, since the
Python of the tests has the widgets' too. The control is the same notebook in a JupyterLab with those: there the saved script runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anywidget
import pytest
from fake_slice_agent import GIB
from test_lab_browser import BUILT, HIDDEN, SHOTS, Lab, asked_in, fill_slice, open_lab, run_monitor, running_lab, wait_for
from test_lab_browser import lab as lab  # fixtures
from test_lab_browser import page as page

from nbgpu_lab.cell import MIME

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.skipif(not BUILT.is_dir(), reason="front end not built: make setup")]

WIDGETS = ("@jupyter-widgets", "anywidget")
WIDGET = ["from nbgpu_lab.widget import SliceMonitor\n", "SliceMonitor()"]
STRANGE = "strange.ipynb"
WITHOUT_EXTENSION = "delete globalThis[Symbol.for('nbgpu.slice.model')]"
EXTENSIONS = "JSON.parse(document.getElementById('jupyter-config-data').textContent).federated_extensions.map(one => one.name)"
SCRIPT = "globalThis.stranger = 'was here';"
MARKUP = f'<img src="x" onerror="{SCRIPT}"><script>{SCRIPT}</script>'
JUNK: list[Any] = [
    {"kernel_id": MARKUP, "html": MARKUP, "_esm": SCRIPT, "_css": "* { display: none }"},
    {"kernel_id": {"toString": SCRIPT}, "devices": [{"memory_used_bytes": 1e308, "model": MARKUP}]},
    {"kernel_id": "k" * 100_000},
    {"kernel_id": 10**300},
    {"kernel_id": None, "__proto__": {"kernel_id": MARKUP}},
    {},
    [MARKUP],
    MARKUP,
    -1,
    None,
]
"""What a file can claim to be a monitor."""


@pytest.fixture(scope="module")
def with_widgets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """What `nbgpu[widget]` makes of it."""
    with running_lab(tmp_path_factory.mktemp("widgets"), WIDGET, WIDGETS) as running:
        yield running


def write_strange(folder: Path) -> None:
    """Write a notebook that nobody here has run: outputs as a monitor's, and a saved widget with a script."""
    base = {"model_module": "@jupyter-widgets/base", "model_module_version": "2.0.0", "model_name": "LayoutModel", "state": {}}
    version = anywidget.AnyWidget.class_traits()["_model_module_version"].default_value
    names = {"_model_module": "anywidget", "_model_name": "AnyModel", "_view_module": "anywidget", "_view_name": "AnyView"}
    state = {**names, "_model_module_version": version, "_view_module_version": version, "_anywidget_id": "stranger.Widget"}
    state |= {"layout": "IPY_MODEL_layout", "_esm": f"{SCRIPT}\nexport default {{ render() {{ {SCRIPT} }} }};"}
    widget = {"model_module": "anywidget", "model_module_version": version, "model_name": "AnyModel", "state": state}
    saved = {"version_major": 2, "version_minor": 0, "state": {"layout": base, "widget": widget}}
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "widget", "version_major": 2, "version_minor": 0}, "text/plain": "w"}
    bundles: list[dict[str, Any]] = [{MIME: data, "text/plain": "m"} for data in JUNK] + [view]
    outputs = [{"output_type": "display_data", "metadata": {}, "data": bundle} for bundle in bundles]
    cell = {"cell_type": "code", "execution_count": None, "id": "first", "metadata": {}, "outputs": outputs, "source": []}
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "widgets": {"application/vnd.jupyter.widget-state+json": saved},
    }
    (folder / STRANGE).write_text(json.dumps({"cells": [cell], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))


def open_strange(page: Any, lab: Lab) -> Any:
    """Open it, with a kernel, and return its monitors."""
    write_strange(lab.notebooks)
    page.goto(f"{lab.url}/lab/tree/{STRANGE}?token={lab.token}&reset")
    page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()
    return page.locator(".jp-Notebook .nbgpu-monitor")


def test_the_monitor_is_live_without_its_kernel(lab: Lab, page: Any) -> None:
    axe_kit = pytest.importorskip("axe_kit")
    SHOTS.mkdir(parents=True, exist_ok=True)
    fill_slice(lab)
    open_lab(page, lab, "JupyterLab Light")
    assert page.evaluate(EXTENSIONS) == ["nbgpu-lab"], "widgets would show that they are not needed"
    monitor = run_monitor(page)
    monitor.get_by_text("first.ipynb (this notebook): 8 GiB").wait_for()
    assert monitor.get_attribute("aria-label") == "GPU slice"
    assert monitor.evaluate("monitor => getComputedStyle(monitor).display") == "flex", "drawn without its style"

    # while the kernel has no time for it
    state = page.locator("#jp-main-statusbar")
    for key in ("b", "Enter"):
        page.keyboard.press(key)
    page.keyboard.insert_text("import time; time.sleep(600)")
    page.keyboard.press("Control+Enter")
    state.get_by_text("| Busy").wait_for()
    lab.agent.kernel(lab.kernels[0], 9 * GIB)
    monitor.get_by_text("first.ipynb (this notebook): 9 GiB").wait_for()
    assert state.get_by_text("| Busy").count() == 1
    lab.call(f"api/kernels/{lab.kernels[0]}/interrupt", {}, method="POST")
    state.get_by_text("| Idle").wait_for()

    # in both themes
    for theme, name in (("JupyterLab Light", "light"), ("JupyterLab Dark", "dark")):
        page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", theme)
        page.wait_for_timeout(300)
        assert axe_kit.violations(page, ".nbgpu-monitor") == [], theme
        page.screenshot(path=SHOTS / f"lab-monitor-{name}.png")

    # as it is saved: nothing of it is a script, and there is text for those who cannot draw it
    page.keyboard.press("Control+s")
    wait_for(lambda: MIME in (lab.notebooks / "first.ipynb").read_text())
    saved = json.loads((lab.notebooks / "first.ipynb").read_text())
    (output,) = saved["cells"][0]["outputs"]
    assert output["data"][MIME] == {"kernel_id": lab.kernels[0]}
    assert "of 20 GiB used" in "".join(output["data"]["text/plain"])
    assert "widgets" not in saved["metadata"]


def test_a_strangers_notebook_runs_nothing(lab: Lab, page: Any) -> None:
    fill_slice(lab)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    monitors = open_strange(page, lab)
    assert page.evaluate(EXTENSIONS) == ["nbgpu-lab"]
    assert page.evaluate("window.jupyterapp.shell.currentWidget.content.activeCell.model.trusted") is False
    wait_for(lambda: monitors.count() == len(JUNK))
    for monitor in monitors.all():
        monitor.scroll_into_view_if_needed()  # else it is not drawn
        monitor.get_by_text("first.ipynb: 8 GiB").wait_for()
    assert page.locator(".nbgpu-monitor").get_by_text("this notebook").count() == 0
    assert page.locator(".nbgpu-monitor img, .nbgpu-monitor script").count() == 0
    page.wait_for_timeout(5000)  # in the control it has run by now: once the kernel is idle
    assert page.evaluate("globalThis.stranger") is None
    assert errors == []
    page.screenshot(path=SHOTS / "lab-strange.png")


def test_with_widgets_it_does(with_widgets: Lab, page: Any) -> None:
    """Control: the notebook is one that acts where widgets are installed."""
    open_strange(page, with_widgets)
    assert {"@jupyter-widgets/jupyterlab-manager", "anywidget"} < set(page.evaluate(EXTENSIONS))
    wait_for(lambda: page.evaluate("globalThis.stranger") == "was here", 30)


def test_the_widget_alone_asks_for_itself(with_widgets: Lab, page: Any) -> None:
    """On a page where no extension shares a model the widget has its own; here the extension's asks beside it."""
    lab = with_widgets
    lab.agent.used_bytes = 7 * GIB
    open_lab(page, lab, "JupyterLab Light")
    page.evaluate(WITHOUT_EXTENSION)
    monitor = run_monitor(page)
    monitor.get_by_text("7 of 20 GiB").wait_for()
    assert 8 <= len(asked_in(page, 6)) <= 13
    page.evaluate(HIDDEN, True)
    page.wait_for_timeout(1500)
    assert asked_in(page, 4) == []
