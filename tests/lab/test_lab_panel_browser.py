"""The panel in JupyterLab in a real Chromium: what it says of kernels, history, limits that a notebook keeps, another size of the slice,
who does not answer; by keyboard, in both themes. The agent and the hub are stand-ins. Leaves screenshots in ``tests/browser/shots``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pseudo_language
import pytest
from fake_slice_agent import GIB
from playwright.sync_api import expect
from test_lab_browser import BUILT, LONG, REFUSAL, SHOTS, Lab, asked_in, fill_slice, open_lab, put_settings, wait_for
from test_lab_browser import lab as lab  # a fixture
from test_lab_browser import page as page  # a fixture

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.skipif(not BUILT.is_dir(), reason="front end not built: make setup")]
SECOND = 1000
ODD = "<img src=x onerror=alert(1)> ノート דוגמה.ipynb"
THEMES = ("JupyterLab Light", "JupyterLab Dark")
SLOW = """
window.slow = {ms: 0, open: 0, most: 0};
const plain = window.fetch;
window.fetch = async (...asked) => {
    if (!String(asked[0].url ?? asked[0]).includes('/nbgpu/api/usage')) {
        return plain(...asked);
    }
    slow.most = Math.max(slow.most, ++slow.open);
    await new Promise(done => setTimeout(done, slow.ms));
    return plain(...asked).finally(() => slow.open--);
};
"""


class Hub(BaseHTTPRequestHandler):
    """Grants up to half a GPU, of which a quarter is free."""

    def do_GET(self) -> None:
        self._say(200, {"devices": [{"uuid": "GPU-1", "index": 0, "free_bytes": 19 * GIB, "free_milli": 250}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked.get("gpu_fraction") == "1/2":
            status, answer = (
                200,
                {"in_force": True, "devices": [{"index": 0, "memory_bytes": 39 * GIB, "compute_milli": 500}], "note": None},
            )
        else:
            message = "Your quota is half a GPU: with this slice you would hold a whole one."
            status, answer = 403, {"error": {"code": "quota", "message": message}}
        self._say(status, answer)

    def _say(self, status: int, answer: object) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[None]:
    """What the server's environment names before it starts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    words = {"API_URL": f"http://127.0.0.1:{server.server_port}/hub/api", "API_TOKEN": "the-servers", "USER": "ada", "SERVER_NAME": ""}
    names = {f"JUPYTERHUB_{name}": value for name, value in words.items()}
    os.environ.update(names)
    yield
    for name in names:
        del os.environ[name]
    server.shutdown()


@pytest.fixture(autouse=True)
def as_it_was(hub: None, lab: Lab) -> Iterator[None]:
    """In this order: the server finds the hub in its environment."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    fill_slice(lab)
    yield
    lab.agent.limits.clear()
    lab.agent.delay_seconds = 0


def theme(page: Any, name: str) -> None:
    page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", name)
    page.wait_for_selector(f'body[data-jp-theme-name="{name}"]', state="attached")


def pictures(page: Any, name: str) -> None:
    """Leave one in each theme."""
    for each in reversed(THEMES):
        theme(page, each)
        page.wait_for_timeout(300)  # colours fade
        page.screenshot(path=SHOTS / f"panel-{name}-{each.split()[1].lower()}.png")


def tab_to(page: Any, selector: str, most: int = 60) -> None:
    """Go on with the Tab key until something there has the focus."""
    for _ in range(most):
        if page.evaluate(f"document.activeElement?.closest({selector!r}) !== null"):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{most} tabs do not lead to {selector}")


def metadata(lab: Lab, notebook: str) -> Any:
    """Return what a notebook says of its limit, once its file, which the server writes in place, can be read."""
    read: list[Any] = []

    def found() -> bool:
        with contextlib.suppress(ValueError):
            read.append(json.loads((lab.notebooks / notebook).read_text())["metadata"].get("nbgpu"))
        return bool(read)

    wait_for(found)
    return read[0]


def test_kernels_and_history(lab: Lab, page: Any) -> None:
    session = {"name": "", "type": "notebook", "path": ODD, "kernel": {"name": "python3"}}
    odd = lab.call("api/sessions", session)["kernel"]["id"]
    open_lab(page, lab, THEMES[0])
    panel = page.locator("#nbgpu-panel")
    assert panel.locator(f'[data-kernel="{odd}"] .nbgpu-Kernels-name').inner_text() == ODD, "a name is text"
    assert panel.locator("img").count() == 0
    first, other = (panel.locator(f'[data-kernel="{one}"]') for one in (lab.kernels[0], "other"))
    first.get_by_text(re.compile(r"Python 3 \(ipykernel\) · (busy|idle for \d+ (s|min))")).wait_for()
    other.get_by_text("Terminals and programs").wait_for()
    assert other.get_by_role("button").count() == 0, "they have no limit of their own"

    # a busy kernel is said to be, and what it uses goes on being shown
    page.locator(".jp-Notebook .jp-Cell .cm-content").first.click()
    page.keyboard.press("Control+A")
    page.keyboard.insert_text("import time; time.sleep(600)")
    page.keyboard.press("Control+Enter")
    first.get_by_text("(ipykernel) · busy").wait_for()
    lab.agent.kernel(lab.kernels[0], 9 * GIB)
    first.get_by_text("9 GiB").first.wait_for(timeout=3 * SECOND)

    # the history by keyboard; the hour is asked for in place of a question
    page.locator(".nbgpu-Status").focus()
    page.keyboard.press("Enter")
    panel.get_by_role("radio", name="10 min").focus()
    page.keyboard.press("ArrowRight")
    panel.get_by_role("img", name="Memory in the last 1 h").wait_for()
    assert panel.get_by_role("radio", name="1 h").is_checked()
    page.wait_for_function("document.querySelector('.nbgpu-Sparkline-line')?.points.length > 300")
    assert len(asked_in(page, 4)) <= 5
    assert lab.agent.count("/v1/history?seconds=3600") >= 1
    pictures(page, "kernels")
    page.keyboard.press("ArrowRight")
    panel.get_by_text("1 min ago").wait_for()
    lab.call(f"api/kernels/{lab.kernels[0]}/interrupt", {})

    # what was chosen is the user's, and there after a reload
    try:
        wait_for(lambda: lab.call("lab/api/settings/nbgpu-lab:model")["settings"].get("historySeconds") == 60)
        open_lab(page, lab, THEMES[0])
        panel.get_by_text("1 min ago").wait_for()
        assert panel.get_by_role("radio", name="1 min").is_checked()
    finally:
        put_settings(lab)


def test_a_limit_is_kept_in_the_notebook(lab: Lab, page: Any) -> None:
    open_lab(page, lab, THEMES[0])
    opened, closed = (page.locator(f'#nbgpu-panel [data-kernel="{one}"]') for one in lab.kernels)
    closed.get_by_text("set by a command").wait_for()

    # by keyboard alone: of the notebook that is open on this page
    page.locator(".nbgpu-Status").focus()
    page.keyboard.press("Enter")
    tab_to(page, f'[data-kernel="{lab.kernels[0]}"] .nbgpu-Kernels-limit', 200)
    page.keyboard.press("Enter")
    page.keyboard.type("1/2")
    tab_to(page, ".nbgpu-LimitForm-keep")
    assert opened.get_by_role("checkbox", name="Save it in the notebook").is_checked()
    pictures(page, "limit")
    tab_to(page, '.nbgpu-LimitForm [type="submit"]')
    page.keyboard.press("Enter")
    opened.get_by_text("from the notebook").wait_for()
    assert lab.agent.limits[lab.kernels[0]] == {"memory_bytes": 10 * GIB, "compute_milli": None}
    assert metadata(lab, "first.ipynb") == {"memory": "1/2"}, "half of the next slice is half again"

    # only for now: the notebook says what it said
    opened.get_by_role("button", name=re.compile("^Limit of first.ipynb")).click()
    opened.get_by_label("Memory limit").fill("4 GiB")
    opened.get_by_role("checkbox").uncheck()
    page.keyboard.press("Enter")
    opened.get_by_text("set here").wait_for()
    assert metadata(lab, "first.ipynb") == {"memory": "1/2"}

    # of a notebook that is not open, and taken away again
    closed.get_by_role("button", name=re.compile("^Limit of second")).click()
    closed.get_by_label("Compute limit").fill("25 %")
    closed.get_by_role("checkbox").check()
    page.keyboard.press("Enter")
    closed.get_by_text("from the notebook").wait_for()
    assert metadata(lab, LONG) == {"memory_bytes": 5 * GIB, "compute": "25 %"}
    closed.get_by_role("button", name=re.compile("^Limit of second")).click()
    closed.get_by_role("button", name="Remove").click()
    closed.get_by_text("from the notebook").wait_for(state="detached")
    wait_for(lambda: metadata(lab, LONG) is None)  # it is saved once the limit is gone
    assert lab.kernels[1] not in lab.agent.limits


def test_a_notebook_that_cannot_be_written_is_said(lab: Lab, page: Any) -> None:
    open_lab(page, lab, THEMES[0])
    page.route(re.compile(f"api/contents/{LONG}"), lambda route: route.fulfill(status=403, json={"message": "Permission denied"}))
    row = page.locator(f'#nbgpu-panel [data-kernel="{lab.kernels[1]}"]')
    row.get_by_role("button", name=re.compile("^Limit of")).click()
    row.get_by_label("Memory limit").fill("4 GiB")
    row.get_by_role("checkbox").check()
    page.keyboard.press("Enter")
    row.get_by_role("alert").filter(has_text="could not be kept in the notebook: ").wait_for()
    assert lab.agent.limits[lab.kernels[1]]["memory_bytes"] == 4 * GIB
    page.keyboard.press("Escape")
    row.get_by_text("set here").wait_for()


def test_a_refused_limit_is_seen_whole(lab: Lab, page: Any) -> None:
    """The message makes the form longer: its button stays in view."""
    open_lab(page, lab, THEMES[0])
    page.set_viewport_size({"width": 1280, "height": 620})
    row = page.locator(f'#nbgpu-panel [data-kernel="{lab.kernels[1]}"]')
    row.get_by_role("button", name=re.compile("^Limit of")).click()
    row.get_by_label("Memory limit").fill("100 GiB")
    page.keyboard.press("Enter")
    message = row.get_by_role("alert").filter(has_text="it must be at most 20 GiB")
    for seen in (message, row.get_by_role("button", name="Set limit")):
        expect(seen).to_be_in_viewport(ratio=1)


def test_a_part_of_the_time_is_shown_as_it_was_written(lab: Lab, page: Any) -> None:
    """Ten percent of an eighth are 12.5 thousandths of the GPU: 12 are in force, which the form says."""
    lab.agent.compute_milli = 125
    try:
        open_lab(page, lab, THEMES[0])
        row = page.locator(f'#nbgpu-panel [data-kernel="{lab.kernels[1]}"]')
        limit = row.get_by_role("button", name=re.compile("^Limit of"))
        limit.click()
        row.get_by_label("Compute limit").fill("10 %")
        page.keyboard.press("Enter")
        limit.get_by_text("10 %").wait_for()
        assert lab.agent.limits[lab.kernels[1]]["compute_milli"] == 12
        limit.click()
        assert row.get_by_label("Compute limit").input_value() == "10 %"
        row.get_by_text("12 of this slice's 125 are in force").wait_for()
        pictures(page, "limit-rounded")
    finally:
        lab.agent.compute_milli = 250


def test_another_size_of_the_slice(lab: Lab, page: Any) -> None:
    open_lab(page, lab, THEMES[0])
    panel = page.locator("#nbgpu-panel")
    button = panel.get_by_role("button", name="Change the size of this slice")
    button.focus()
    page.keyboard.press("Enter")
    form = panel.get_by_role("form", name="Size of this slice")
    assert form.get_by_label("Share of a GPU").input_value() == "1/4"
    assert form.get_by_label("GPU memory").input_value() == "20 GiB"
    form.get_by_role("button", name="Ask for it").click()  # as it stands: nothing is asked for
    form.wait_for(state="detached")
    assert not panel.get_by_text("Granted:").count()
    button.click()
    form.get_by_text("Free on GPU 0 now: 1/4 of its time, 19 GiB of its memory.").wait_for()
    form.get_by_label("Share of a GPU").fill("1")
    page.keyboard.press("Enter")
    form.get_by_role("alert").filter(has_text="Your quota is half a GPU").wait_for()
    pictures(page, "resize")
    form.get_by_label("Share of a GPU").fill("1/2")
    page.keyboard.press("Enter")
    granted = panel.get_by_role("status").filter(has_text="Granted: 1/2 GPU with 39 GiB of memory.")
    granted.wait_for()
    assert form.count() == 0
    try:  # once somebody has given it another size the answer says nothing of what is shown above it
        lab.agent.compute_milli = 375
        granted.wait_for(state="detached")
    finally:
        lab.agent.compute_milli = 250


def test_who_does_not_answer_is_said_and_what_is_old_is_grey(lab: Lab, page: Any) -> None:
    page.add_init_script(SLOW)
    open_lab(page, lab, THEMES[0])
    panel, status = page.locator("#nbgpu-panel"), page.locator(".nbgpu-Status-text")
    assert page.locator(".nbgpu-Panel-content[data-stale]").count() == 0
    lab.away(True)
    try:
        panel.get_by_text("The node agent has not answered since").wait_for(timeout=5 * SECOND)
        page.locator(".nbgpu-Panel-content[data-stale]").wait_for()
        assert "12.5 of 20 GiB" in status.inner_text()
        assert "no news since" in status.inner_text()
        pictures(page, "away")
    finally:
        lab.away(False)
    page.locator(".nbgpu-Panel-content[data-stale]").wait_for(state="detached", timeout=35 * SECOND)

    page.route(re.compile("nbgpu/api/usage"), lambda route: route.abort())
    panel.get_by_text("The Jupyter server has not answered since").wait_for(timeout=5 * SECOND)
    assert "12.5 of 20 GiB" in status.inner_text()
    page.unroute(re.compile("nbgpu/api/usage"))
    page.locator(".nbgpu-Panel-content[data-stale]").wait_for(state="detached", timeout=35 * SECOND)

    # a slow server: one question at a time, also when one is asked for at once
    page.evaluate("slow.most = 0; slow.ms = 3000")
    page.wait_for_function("slow.open === 1")
    page.evaluate("() => { void globalThis[Symbol.for('nbgpu.slice.model')].poll.refresh(); }")
    page.wait_for_timeout(4 * SECOND)
    assert page.evaluate("slow.most") == 1
    page.evaluate("slow.ms = 0")


def test_every_word_is_in_the_readers_language(lab: Lab, page: Any) -> None:
    """With a language pack that has our catalogue: what is still English has gone past the translator, or is missing in the catalogue."""
    lab.agent.used_bytes = 19 * GIB + GIB // 2
    lab.agent.kernel(lab.kernels[1], 6 * GIB, refusals=1)
    lab.agent.suspend(4711, lab.kernels[1])
    lab.call(pseudo_language.SETTINGS, {"raw": json.dumps({"locale": pseudo_language.LOCALE})}, method="PUT")
    known = ("first.ipynb", LONG, ODD, "Simulated H100 80GB", "Python 3 (ipykernel)", lab.agent.suspended[0]["reason"], REFUSAL)
    try:
        page.goto(f"{lab.url}/lab/tree/first.ipynb?token={lab.token}&reset")
        page.locator(".jp-Notebook .jp-Cell .cm-content").first.click()
        page.keyboard.press("Control+Enter")
        page.locator(".nbgpu-monitor li").first.wait_for()
        lab.tell(kernel_id=lab.kernels[1])
        toast = page.locator(".Toastify__toast").filter(has_text="refused an allocation")  # the message is the agent's
        toast.get_by_role("button", name=pseudo_language.pseudo("Show panel")).wait_for()
        page.locator(".nbgpu-Status").click()
        row = page.locator(f'#nbgpu-panel [data-kernel="{lab.kernels[1]}"]')
        row.locator(".nbgpu-Kernels-limit").click()
        page.locator(".nbgpu-Resize button").first.click()
        row.locator(".nbgpu-KernelMenu").click()
        page.locator(".lm-Menu-item").first.wait_for()
        texts = page.evaluate(pseudo_language.TEXTS, "#nbgpu-panel, .nbgpu-StatusItem, .nbgpu-monitor, .lm-Menu")
        page.screenshot(path=SHOTS / "panel-pseudo-language.png")
        assert len(texts) > 60
        assert pseudo_language.plain(texts, *known) == []
        form = lab.call("lab/api/settings/nbgpu-lab:model")["schema"]
        of_settings = [one[name] for one in (form, *form["properties"].values()) for name in ("title", "description")]
        assert pseudo_language.plain(of_settings) == []
    finally:
        lab.call(pseudo_language.SETTINGS, {"raw": "{}"}, method="PUT")
        lab.agent.suspended = []


def test_nothing_for_axe_to_find(lab: Lab, page: Any) -> None:
    axe_kit = pytest.importorskip("axe_kit")
    lab.agent.used_bytes = 19 * GIB + GIB // 2
    lab.agent.kernel(lab.kernels[1], 6 * GIB)
    open_lab(page, lab, THEMES[0])
    page.locator(f'[data-kernel="{lab.kernels[1]}"] .nbgpu-Kernels-limit').click()
    page.get_by_role("button", name="Change the size of this slice").click()
    for each in THEMES:
        theme(page, each)
        page.wait_for_timeout(300)
        assert axe_kit.violations(page, "#nbgpu-panel") == [], each
        assert axe_kit.violations(page, ".nbgpu-StatusItem") == [], each


def test_the_panel_is_open_again_where_it_was_open(lab: Lab, page: Any) -> None:
    """JupyterLab restores what it knows; the panel is there only once the server has said that it has a slice."""
    fill_slice(lab)
    panel, tab = page.get_by_role("region", name="GPU slice"), page.locator('.jp-SideBar.jp-mod-right [data-id="nbgpu-panel"]')

    def kept(is_open: bool) -> Any:
        words = f'"nbgpu-lab:panel":{{"open":{str(is_open).lower()}}}'
        return page.expect_response(
            lambda answer: "/api/workspaces/" in answer.url and answer.request.method == "PUT" and words in (answer.request.post_data or "")
        )

    def again() -> None:
        page.goto(f"{lab.url}/lab/tree/first.ipynb?token={lab.token}")
        page.locator(".nbgpu-Status").wait_for()

    with kept(True):
        open_lab(page, lab, "JupyterLab Light")
    again()
    panel.wait_for()
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    with kept(False):
        tab.click()
    again()
    tab.wait_for()
    page.wait_for_timeout(2 * SECOND)  # it would have opened by then
    assert not panel.is_visible()
