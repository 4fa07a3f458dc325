"""What a page shows of faults, in a real JupyterLab: what cannot be drawn, and very many notices. Leaves pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_lab_browser import BUILT, SHOTS, Lab, fill_slice, open_lab, running_lab, wait_for
from test_lab_browser import lab as lab  # fixtures
from test_lab_browser import page as page

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.skipif(not BUILT.is_dir(), reason="front end not built: make setup")]
TOAST = ".Toastify__toast"
UNDRAWN = "The GPU slice could not be shown"


@pytest.fixture(autouse=True)
def clean(lab: Lab) -> Iterator[None]:
    SHOTS.mkdir(parents=True, exist_ok=True)
    fill_slice(lab)
    yield
    lab.agent.kernels.clear()
    vars(lab.agent).pop("usage", None)


def test_what_cannot_be_drawn_says_so_and_can_be_tried_again(lab: Lab, page: Any) -> None:
    open_lab(page, lab, "JupyterLab Light")
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    good = lab.agent.usage

    def junk() -> dict[str, Any]:
        usage = good()
        return {**usage, "devices": [None], "kernels": [{**one, "devices": None} for one in usage["kernels"]]}

    lab.agent.usage = junk  # type: ignore[method-assign]
    panel = page.get_by_role("region", name="GPU slice")
    panel.get_by_role("alert").filter(has_text=UNDRAWN).wait_for()
    status = page.locator("#jp-main-statusbar").get_by_text("GPU: could not be shown. Try again")
    status.wait_for()
    page.screenshot(path=SHOTS / "lab-undrawn.png")
    wait_for(lambda: any("nbgpu: the GPU slice could not be drawn" in text for text in errors))

    # the rest of the Running panel is there
    page.evaluate("window.jupyterapp.shell.activateById('jp-running-sessions')")
    page.locator("#jp-running-sessions").get_by_text("Kernels", exact=True).first.wait_for()

    # a try while it is no better says the same
    again = panel.get_by_role("button", name="Try again")
    again.click()
    panel.get_by_text(UNDRAWN).wait_for()

    lab.agent.usage = good  # type: ignore[method-assign]
    page.wait_for_timeout(2500)
    again.click()
    panel.get_by_text("Other processes").wait_for()
    status.click()
    page.locator(".nbgpu-Status-text").get_by_text("12.5 of 20 GiB").wait_for()


def test_ninety_refusals_are_a_few_notifications_and_all_in_the_list(lab: Lab, page: Any) -> None:
    open_lab(page, lab, "JupyterLab Light")
    panel = page.get_by_role("region", name="What happened")
    page.evaluate("window.jupyterapp.commands.execute('application:toggle-right-area')")
    page.locator("#nbgpu-panel").wait_for(state="hidden")

    def refuse() -> None:
        for number in range(90):
            lab.agent.tell("refused", f"Notebook kernel made-up-{number} was refused {number} GiB.", kernel_id=f"made-up-{number}")

    lab.loop.call_soon_threadsafe(refuse)
    page.locator(TOAST).filter(has_text="87 more like this. ").wait_for()
    page.wait_for_timeout(1500)
    assert page.locator(TOAST).count() == 4
    page.screenshot(path=SHOTS / "lab-ninety-refusals.png")
    page.locator(TOAST).filter(has_text="87 more").get_by_role("button", name="Show panel").click()
    panel.get_by_role("button", name="Show all 90").click()
    assert panel.locator("li").count() == 90


def test_a_server_that_was_shut_down_from_its_page_is_said_to_be_stopped(page: Any, tmp_path: Path) -> None:
    """Not that it does not answer, as of one that is away without a word (`test_lab_panel_browser`)."""
    with running_lab(tmp_path) as own:
        fill_slice(own)
        open_lab(page, own, "JupyterLab Light")
        page.evaluate("void window.jupyterapp.commands.execute('filemenu:shutdown')")
        page.locator(".jp-Dialog button.jp-mod-accept").click()
        page.locator("#nbgpu-panel").get_by_text("This server was stopped. What is shown is from").wait_for()
