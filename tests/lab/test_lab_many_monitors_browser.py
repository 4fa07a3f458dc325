"""A notebook of 1,600 saved monitors in a real JupyterLab: what is not in view is not drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_slice_agent import GIB
from test_lab_browser import BUILT, Lab, fill_slice, wait_for
from test_lab_browser import lab as lab  # fixtures
from test_lab_browser import page as page

from nbgpu_lab.cell import MIME

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.skipif(not BUILT.is_dir(), reason="front end not built: make setup")]

MANY = "many.ipynb"
CELLS, OUTPUTS = 32, 50
"""JupyterLab shows fifty outputs of a cell."""
COUNT = """() => {
    globalThis.drawn = [];
    const note = changes => globalThis.drawn.push(...changes.map(change => change.target));
    document.querySelectorAll('.nbgpu-monitor').forEach(one => new MutationObserver(note).observe(one, {childList: true}));
}"""
ALL_WHERE_THEY_ARE = "document.querySelectorAll('.nbgpu-monitor').length"


def write_many(folder: Path, kernel_id: str) -> None:
    output = {"output_type": "display_data", "metadata": {}, "data": {MIME: {"kernel_id": kernel_id}, "text/plain": "m"}}
    cell = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [output] * OUTPUTS, "source": []}
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    cells = [{**cell, "id": f"cell-{number}"} for number in range(CELLS)]
    (folder / MANY).write_text(json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))


def test_of_many_monitors_those_in_view_are_drawn(lab: Lab, page: Any) -> None:
    fill_slice(lab)
    write_many(lab.notebooks, lab.kernels[0])
    page.goto(f"{lab.url}/lab/tree/{MANY}?token={lab.token}&reset")
    wait_for(lambda: page.evaluate(ALL_WHERE_THEY_ARE) == CELLS * OUTPUTS, 60)
    first, last = page.locator(".nbgpu-monitor").first, page.locator(".nbgpu-monitor").last
    first.get_by_text("first.ipynb (this notebook): 8 GiB").wait_for()
    page.wait_for_timeout(3000)

    page.evaluate(COUNT)
    page.wait_for_timeout(5000)
    drawn, monitors = page.evaluate("[globalThis.drawn.length, new Set(globalThis.drawn).size]")
    assert 1 <= monitors <= 20, f"{monitors} of {CELLS * OUTPUTS} were drawn"
    assert monitors <= drawn <= 7 * monitors, "once a sample"

    # what comes into view is of now, and what is in view goes on
    lab.agent.kernel(lab.kernels[0], 9 * GIB)
    scroll_to(last, "first.ipynb (this notebook): 9 GiB")
    lab.agent.kernel(lab.kernels[0], 7 * GIB)
    last.get_by_text("first.ipynb (this notebook): 7 GiB").wait_for()
    scroll_to(first, "first.ipynb (this notebook): 7 GiB")


def scroll_to(monitor: Any, words: str) -> None:
    """Bring a monitor into view and wait for its words; cells between get their true heights on the way and push it away again."""

    def there() -> bool:
        monitor.scroll_into_view_if_needed()
        return monitor.get_by_text(words).count() == 1

    wait_for(there, 30)
