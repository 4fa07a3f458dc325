"""What happened, in a real JupyterLab: told once, beside the form that it is about, in the notebook's log, and listed. Leaves pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_slice_agent import GIB
from test_lab_browser import BUILT, LONG, SHOTS, Lab, fill_slice, open_lab
from test_lab_browser import lab as lab  # fixtures
from test_lab_browser import page as page

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.skipif(not BUILT.is_dir(), reason="front end not built: make setup")]
TOAST = ".Toastify__toast"
HOSTILE = "<img src=x onerror='document.title=1'>ノート דף.ipynb"
REFUSED = "The limit of this kernel (5 GiB) refused an allocation of 2 GiB: 4 GiB are in use. Free memory, or raise the limit."


@pytest.fixture(autouse=True)
def clean(lab: Lab) -> Iterator[None]:
    SHOTS.mkdir(parents=True, exist_ok=True)
    fill_slice(lab)
    yield
    lab.agent.kernels.clear()


def tell(lab: Lab, kind: str, message: str, data: dict[str, int] | None = None, **event: Any) -> None:
    def now() -> None:
        lab.agent.tell(kind, message, **event)
        lab.agent.events[-1]["data"] = data or {}

    lab.loop.call_soon_threadsafe(now)


def overlaps(page: Any, first: str, second: str) -> bool:
    """Return whether two things cover each other, as far as what scrolls in the panel is in view."""
    a, b, view = (page.locator(selector).first.bounding_box() for selector in (first, second, ".nbgpu-Panel-content"))
    b["height"] = min(b["y"] + b["height"], view["y"] + view["height"]) - b["y"]
    assert b["height"] > 0, "it is in view"
    apart_x = a["x"] + a["width"] <= b["x"] or b["x"] + b["width"] <= a["x"]
    return not (apart_x or a["y"] + a["height"] <= b["y"] or b["y"] + b["height"] <= a["y"])


def shot(page: Any, path: Path) -> None:
    for theme in ("Dark", "Light"):
        page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", f"JupyterLab {theme}")
        page.wait_for_selector(f'body[data-jp-theme-name="JupyterLab {theme}"]', state="attached")
        page.wait_for_timeout(300)
        page.screenshot(path=path.with_name(f"{path.stem}-{theme.lower()}.png"))


def test_a_limit_below_what_is_held_is_told_once_beside_its_form(lab: Lab, page: Any) -> None:
    open_lab(page, lab, "JupyterLab Light")
    kernel = lab.kernels[1]
    page.locator(f'[data-kernel="{kernel}"]').get_by_role("button", name="Limit of").click()
    tell(lab, "limit-changed", f"Notebook kernel {kernel[:8]}… may use 3 GiB.", kernel_id=kernel, level="info")
    over = f"Notebook kernel {kernel[:8]}… holds 4 GiB, its limit is now 3 GiB. Until it frees some, it is refused more."
    tell(lab, "over-limit", over, kernel_id=kernel)
    latest = page.locator(".nbgpu-Latest")
    latest.get_by_text(f"{LONG} holds 4 GiB").wait_for()
    page.wait_for_timeout(800)
    assert page.locator(TOAST).count() == 0
    assert not overlaps(page, ".nbgpu-Latest", ".nbgpu-LimitForm")
    shot(page, SHOTS / "happened-form.png")
    listed = page.get_by_role("region", name="What happened")
    assert listed.get_by_text(f"{LONG} holds 4 GiB").count() == 0, "not twice at a time"
    latest.get_by_role("button", name="Close").click()
    listed.get_by_text(f"{LONG} holds 4 GiB").wait_for()
    assert latest.inner_text() == ""
    assert listed.get_by_text("may use 3 GiB").count() == 0


def test_with_the_panel_closed_one_notification_follows_its_thing(lab: Lab, page: Any) -> None:
    """Control of the test above: where no form is in the way there is a notification."""
    open_lab(page, lab, "JupyterLab Light")
    page.evaluate("window.jupyterapp.commands.execute('application:toggle-right-area')")
    page.locator("#nbgpu-panel").wait_for(state="hidden")
    for count in (1, 41):
        tell(lab, "refused", REFUSED, {"count": count}, kernel_id=lab.kernels[0])
    toast = page.locator(TOAST).filter(has_text="refused an allocation")
    toast.get_by_text("(42 times)").wait_for()
    assert toast.count() == 1
    assert page.locator(".nbgpu-Latest").inner_text() == ""
    shot(page, SHOTS / "happened-toast.png")
    toast.get_by_role("button", name="Show panel").click()
    page.locator("#nbgpu-panel").wait_for(state="visible")
    page.get_by_role("region", name="What happened").get_by_text("42 times").first.wait_for()


def test_names_are_text_everywhere(lab: Lab, page: Any) -> None:
    """In the list, the news, the log: no tag of a notebook's name becomes one, and right-to-left names stay where they are."""
    (session,) = (one for one in lab.call("api/sessions") if one["kernel"]["id"] == lab.kernels[0])
    open_lab(page, lab, "JupyterLab Light")
    lab.call(f"api/sessions/{session['id']}", {"path": HOSTILE, "name": HOSTILE}, method="PATCH")
    try:
        tell(lab, "refused", f"Notebook kernel {lab.kernels[0][:8]}… was refused 1 GiB.", kernel_id=lab.kernels[0])
        page.locator(".nbgpu-Latest").get_by_text(f"\u2068{HOSTILE}\u2069 was refused 1 GiB.").wait_for()
        page.locator(f'[data-kernel="{lab.kernels[0]}"]').get_by_text(HOSTILE).first.wait_for()
        assert page.locator("#nbgpu-panel img").count() == 0
        assert page.title() != "1"
        shot(page, SHOTS / "happened-names.png")
        page.locator(".nbgpu-Latest").get_by_role("button", name="Close").click()
        page.get_by_role("region", name="What happened").get_by_text(f"\u2068{HOSTILE}\u2069 was refused 1 GiB.").wait_for()
        assert page.locator("#nbgpu-panel img").count() == 0
    finally:
        lab.call(f"api/sessions/{session['id']}", {"path": "first.ipynb", "name": "first.ipynb"}, method="PATCH")


HEBREW = "אימון-מודל-שפה-גדול-על-עיתונים-ישנים-מהארכיון-הלאומי.ipynb"
ENDS_AT_THE_RIGHT = """one => {
    const text = document.createTreeWalker(one, NodeFilter.SHOW_TEXT).nextNode();
    const left = at => {
        const range = document.createRange();
        range.setStart(text, at);
        range.setEnd(text, at + 1);
        return range.getBoundingClientRect().left;
    };
    return left(text.data.length - 1) > left(text.data.length - 2);
}"""
"""Whether the full stop is behind the last word."""
BEGINS_IN_VIEW = """one => {
    const range = document.createRange();
    range.setStart(one.querySelector('bdi').firstChild, 0);
    range.setEnd(one.querySelector('bdi').firstChild, 1);
    return range.getBoundingClientRect().right <= one.getBoundingClientRect().right + 1;
}"""
"""Whether a list that is too narrow for a name shows its first letter."""


def test_a_name_from_right_to_left_turns_no_sentence(lab: Lab, page: Any) -> None:
    (session,) = (one for one in lab.call("api/sessions") if one["kernel"]["id"] == lab.kernels[0])
    open_lab(page, lab, "JupyterLab Light")
    lab.call(f"api/sessions/{session['id']}", {"path": HEBREW, "name": HEBREW}, method="PATCH")
    page.locator(f'[data-kernel="{lab.kernels[0]}"]').get_by_text(HEBREW).wait_for()
    try:
        refused = f"Notebook kernel {lab.kernels[0][:8]}… was refused 1 GiB. Free some."
        tell(lab, "refused", refused, kernel_id=lab.kernels[0])
        said = page.locator(".nbgpu-Latest").get_by_text("was refused 1 GiB. Free some.")
        said.wait_for()
        assert said.evaluate(ENDS_AT_THE_RIGHT)
        page.evaluate("window.jupyterapp.shell.activateById('jp-running-sessions')")
        listed = page.locator(".jp-RunningSessions-itemLabel").filter(has_text=f"8 GiB · {HEBREW}")
        listed.wait_for()
        assert listed.evaluate(BEGINS_IN_VIEW)
        shot(page, SHOTS / "happened-right-to-left.png")
        page.evaluate("id => void window.jupyterapp.commands.execute('nbgpu:restart-kernel', {kernelId: id})", lab.kernels[0])
        title = page.locator(".jp-Dialog-header")
        title.get_by_text(f"Restart the kernel of \u2068{HEBREW}\u2069?").wait_for()
        page.locator(".jp-Dialog").get_by_role("button", name="Cancel").click()
    finally:
        lab.call(f"api/sessions/{session['id']}", {"path": "first.ipynb", "name": "first.ipynb"}, method="PATCH")


def test_the_notebooks_log_has_it(lab: Lab, page: Any) -> None:
    open_lab(page, lab, "JupyterLab Light")
    page.locator(".jp-Notebook .jp-Cell .cm-content").first.click()
    page.evaluate("window.jupyterapp.commands.execute('logconsole:open')")
    console = page.locator(".jp-LogConsolePanel")
    console.wait_for()
    tell(lab, "refused", "The slice refused <b>this</b>.")
    console.get_by_text("GPU: The slice refused <b>this</b>.").first.wait_for()  # the other notebook's log has it too
    assert console.locator("b").count() == 0
    shot(page, SHOTS / "happened-log.png")


def test_all_that_happened_is_there(lab: Lab, page: Any) -> None:
    open_lab(page, lab, "JupyterLab Light")
    region = page.get_by_role("region", name="What happened")
    for number in range(8):
        tell(lab, "killed", f"Process {number} was ended.", level="error", kernel_id=f"k{number}")
    latest = page.locator(".nbgpu-Latest")
    latest.get_by_text("Process 7 was ended.").wait_for()
    latest.get_by_role("button", name="Close").click()
    region.get_by_text("Process 7 was ended.").wait_for()
    assert region.get_by_role("listitem").count() == 5
    more = region.get_by_role("button", name="Show all")
    more.focus()
    page.keyboard.press("Enter")
    region.get_by_text("Process 0 was ended.").wait_for()
    texts = region.get_by_role("listitem").all_inner_texts()
    assert "Error" in texts[0]
    assert "Process 7" in texts[0]
    page.keyboard.press("Enter")
    assert region.get_by_role("listitem").count() == 5


def test_the_panel_is_full_however_much_happened(lab: Lab, page: Any) -> None:
    """Its content scrolls, and nothing else: what is there for screen readers alone makes the panel no longer."""
    open_lab(page, lab, "JupyterLab Light")
    for number in range(40):
        tell(lab, "kernel-ended", f"Notebook kernel {number} ended.", level="info", kernel_id=f"k{number}")
    region = page.get_by_role("region", name="What happened")
    region.get_by_role("button", name="Show all").click()
    region.get_by_text("Notebook kernel 39 ended.").wait_for()
    longer = "one => one.scrollHeight - one.clientHeight"
    assert page.locator("#nbgpu-panel").evaluate(longer) == 0
    assert page.locator(".nbgpu-Panel-content").evaluate(longer) > 1000, "control: more than fits"


def test_a_kernel_that_ends_gives_its_memory_back_before_the_readers_eyes(lab: Lab, page: Any) -> None:
    open_lab(page, lab, "JupyterLab Light")
    page.locator(f'[data-kernel="{lab.kernels[0]}"]').get_by_text("8 GiB").first.wait_for()
    lab.agent.kernels.pop(lab.kernels[0])
    lab.agent.used_bytes -= 8 * GIB
    ended = f"Notebook kernel {lab.kernels[0][:8]}… ended: the 8 GiB of GPU memory that it held are free again."
    tell(lab, "kernel-ended", ended, {"freed_bytes": 8 * GIB}, kernel_id=lab.kernels[0], level="info")
    said = page.get_by_role("region", name="What happened").get_by_text("first.ipynb ended: the 8 GiB of GPU memory that it held are free")
    said.wait_for()
    assert page.locator(f'[data-kernel="{lab.kernels[0]}"]').get_by_text("8 GiB").count() == 0
    assert page.locator(TOAST).count() == 0, "it hinders nobody"
