"""A server that is asked back, in a real JupyterLab with a hub that is a stand-in: told, also after a reload, until it is over."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from test_lab_browser import BUILT, SHOTS, Lab, fill_slice, open_lab, running_lab
from test_lab_browser import page as page
from test_lab_happened_browser import TOAST, shot

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.skipif(not BUILT.is_dir(), reason="front end not built: make setup")]
WHY = "it uses what is guaranteed to group bio and was lent"


class Hub:
    """Says what is asked back; counts who asks."""

    def __init__(self) -> None:
        self.due: float | None = None
        self.count = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.count += self.path.startswith("/hub/api/nbgpu/asked?user=ada")
                body = json.dumps(outer.answer()).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self) -> dict[str, Any]:
        asked = None
        if self.due is not None:
            asked = {"kind": "guarantee", "seconds": self.due - time.monotonic(), "ends": True, "idle": True, "reason": WHY}
        return {"asked": asked, "again_seconds": 10}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    found = Hub()
    yield found
    found.server.shutdown()


@pytest.fixture(scope="module")
def lab(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTERHUB_API_URL", f"http://127.0.0.1:{hub.server.server_port}/hub/api")
        patch.setenv("JUPYTERHUB_API_TOKEN", "the-servers")
        patch.setenv("JUPYTERHUB_USER", "ada")
        with running_lab(tmp_path_factory.mktemp("lab")) as running:
            fill_slice(running)
            yield running


def test_it_is_told_after_a_reload_too_and_that_it_is_over(lab: Lab, hub: Hub, page: Any) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    open_lab(page, lab, "JupyterLab Light")
    page.evaluate("window.jupyterapp.commands.execute('application:toggle-right-area')")
    page.locator("#nbgpu-panel").wait_for(state="hidden")
    hub.due = time.monotonic() + 290
    toast = page.locator(TOAST).filter(has_text="Save your work: this server will be stopped in")
    toast.wait_for(timeout=45_000)
    assert WHY in toast.inner_text()
    page.locator("#jp-bottom-panel, .jp-StatusBar-Widget").get_by_text("stopped in").first.wait_for()
    shot(page, SHOTS / "asked-back-toast.png")
    page.reload()
    page.wait_for_selector("#jp-main-dock-panel", state="attached")
    toast.wait_for(timeout=45_000)
    assert toast.count() == 1
    page.evaluate("window.jupyterapp.commands.execute('nbgpu:show-panel')")
    page.locator("#nbgpu-panel").get_by_text("Files are kept; what is only in memory is lost.").wait_for()
    page.get_by_role("region", name="What happened").get_by_text("will be stopped in 5 minutes").wait_for()
    shot(page, SHOTS / "asked-back-panel.png")
    hub.due = None
    page.locator("#nbgpu-panel").get_by_text("This server is not asked back any more: it goes on.").first.wait_for(timeout=45_000)
    page.locator("#nbgpu-panel").get_by_text("Files are kept; what is only in memory is lost.").wait_for(state="detached")
    toast.wait_for(state="detached")


def test_pages_ask_nothing_of_the_hub(lab: Lab, hub: Hub, page: Any) -> None:
    """The server asks, as often as the hub wants: however many pages are open."""
    hub.due = None
    open_lab(page, lab, "JupyterLab Light")
    other = page.context.browser.new_context().new_page()
    other.goto(f"{lab.url}/lab?token={lab.token}")
    other.wait_for_selector(".nbgpu-Status")
    before, begun = hub.count, time.monotonic()
    page.wait_for_timeout(12_000)
    assert hub.count - before <= (time.monotonic() - begun) / 7.5 + 1
    other.close()
