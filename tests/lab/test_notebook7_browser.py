"""The same extension in Notebook 7, in a real Chromium: the panel, a limit that its notebook keeps, and what happened."""

from __future__ import annotations

from typing import Any

import pytest
from test_lab_browser import BUILT, LONG, SHOTS, Lab, fill_slice, lab, page  # noqa: F401

pytest.importorskip("notebook")
pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.skipif(not BUILT.is_dir(), reason="front end not built: make setup")]


def test_the_slice_in_notebook_7(lab: Lab, page: Any) -> None:  # noqa: F811
    SHOTS.mkdir(parents=True, exist_ok=True)
    fill_slice(lab)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" and "nbgpu" in message.text else None)
    page.goto(f"{lab.url}/notebooks/first.ipynb?token={lab.token}")
    page.locator(".jp-Notebook .jp-Cell .cm-content").first.wait_for()
    page.get_by_role("menuitem", name="View", exact=True).click()
    page.locator(".lm-Menu-item").filter(has_text="Right Sidebar").hover()
    page.locator(".lm-Menu-item").filter(has_text="GPU").first.click()
    panel = page.get_by_role("region", name="GPU slice")
    row = panel.locator(f'[data-kernel="{lab.kernels[0]}"]')
    row.get_by_text("8 GiB").wait_for()
    assert "Simulated: this machine has no NVIDIA driver." in panel.inner_text()
    row.get_by_role("button", name="Limit of").click()
    row.locator("input").first.fill("9 GiB")
    row.locator("button[type=submit]").click()
    row.get_by_role("button", name="Limit of first.ipynb: 9").wait_for()
    lab.tell(kernel_id=lab.kernels[1])
    page.locator(".nbgpu-Latest").get_by_text(LONG).wait_for()
    page.screenshot(path=SHOTS / "notebook-7.png")
    assert not wrong, wrong
