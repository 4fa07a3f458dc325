"""What the browser tests do on the pages of the hub and of JupyterLab."""

from __future__ import annotations

import re
from typing import Protocol

from playwright.sync_api import Browser, Locator, Page, expect

SECOND = 1000


class Site(Protocol):
    """A hub that people log in to, all with one password."""

    @property
    def url(self) -> str: ...
    @property
    def password(self) -> str: ...


expect.set_options(timeout=30 * SECOND)


def sign_in(chromium: Browser, hub: Site, user: str, path: str, scripts: bool = True) -> Page:
    """Return a page of `user` at a path of the hub, with JavaScript or without."""
    page = chromium.new_context(viewport={"width": 1400, "height": 900}, java_script_enabled=scripts).new_page()
    page.set_default_timeout(60 * SECOND)
    page.goto(hub.url + path)
    page.fill("#username_input", user)
    page.fill("#password_input", hub.password)
    page.click("#login_submit")
    return page


def log_in(chromium: Browser, hub: Site, user: str, scripts: bool = True, *, lands_on: str = "#nbgpu") -> Page:
    """Return a page of `user` at the start page, which shows what `lands_on` selects."""
    page = sign_in(chromium, hub, user, "/hub/spawn", scripts)
    page.wait_for_selector(lands_on)
    return page


def start(page: Page, slug: str) -> None:
    """Choose the profile `slug` and press Start."""
    page.check(f".nbgpu-row[data-slug={slug}] input[type=radio]")
    press_start(page)


def press_start(page: Page) -> None:
    """Press Start with what is filled in."""
    page.click("#spawn_form input[type=submit], #spawn_form button[type=submit]")


def in_lab(page: Page) -> None:
    """Wait for JupyterLab with the example."""
    page.wait_for_url(re.compile(r".*/user/.*/lab.*"), timeout=120 * SECOND)
    page.wait_for_selector(".jp-Notebook", timeout=120 * SECOND)
    expect(page.locator("#jp-main-statusbar")).to_contain_text("| Idle", timeout=120 * SECOND)


def new_notebook(page: Page) -> None:
    """Wait for JupyterLab with no notebook open, and make one with a Python kernel that is ready."""
    page.wait_for_url(re.compile(r".*/user/.*/lab.*"), timeout=120 * SECOND)
    page.locator(".jp-LauncherCard[data-category=Notebook]").first.click(timeout=120 * SECOND)
    no_news(page)
    page.wait_for_selector(".jp-Notebook")
    expect(page.locator("#jp-main-statusbar")).to_contain_text("| Idle", timeout=120 * SECOND)


def another_notebook(page: Page) -> str:
    """Make one more notebook in JupyterLab, with a Python kernel that is ready; return its name."""
    menu(page, "File", "New", "Notebook")
    page.locator(".jp-Dialog button.jp-mod-accept").click()
    label = page.locator(".lm-DockPanel-tabBar .lm-TabBar-tab.jp-mod-current .lm-TabBar-tabLabel")
    expect(label).to_have_text(re.compile(r"^Untitled\d*\.ipynb$"))
    expect(page.locator("#jp-main-statusbar")).to_contain_text("| Idle", timeout=60 * SECOND)
    return label.inner_text()


NEWS = "Would you like to get notified about official Jupyter news?"


def no_news(page: Page) -> None:
    """Say no to JupyterLab, which asks every new user whose settings do not say it."""
    page.locator(".Toastify__toast").filter(has_text=NEWS).get_by_role("button", name="No", exact=True).click()


def stop(page: Page, hub: Site) -> None:
    """Stop the server from the hub's home page, as its user does."""
    page.goto(hub.url + "/hub/home", wait_until="networkidle")  # before its scripts are there the button does nothing
    page.click("#stop")
    page.wait_for_selector("#stop", state="hidden", timeout=60 * SECOND)


CELLS = ".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook"
ALLOCATE = """
from cuda.bindings import driver
driver.cuInit(0)
driver.cuCtxSetCurrent(driver.cuDevicePrimaryCtxRetain(0)[1])
def gib(n):
    return driver.cuMemAlloc(int(n * 2**30))[0].name
"""


def run_cell(page: Page, code: str, waits: bool = True) -> str:
    """Run `code` in the last cell of the open notebook, which a new one follows; return its output."""
    page.locator(f"{CELLS} .jp-Notebook-footer").click()
    cell = page.locator(f"{CELLS} .jp-CodeCell").last
    cell.locator(".cm-content").click()
    page.keyboard.insert_text(code)
    page.keyboard.press("Control+Enter")
    if not waits:
        return ""
    expect(cell.locator(".jp-InputPrompt")).to_have_text(re.compile(r"\[\d+\]:"), timeout=60 * SECOND)
    return cell.locator(".jp-OutputArea").inner_text()


def menu(page: Page, *path: str) -> None:
    """Choose an entry of JupyterLab's menus."""
    page.locator(".lm-MenuBar-item").filter(has_text=path[0]).click()
    for number, label in enumerate(path[1:], 1):
        entry = page.locator(".lm-Menu-itemLabel").filter(has_text=re.compile(f"^{label}$")).last
        entry.click() if number == len(path) - 1 else entry.hover()


def kernel_row(page: Page, notebook: str) -> Locator:
    """Return the panel's part for the kernel of `notebook`."""
    return page.locator("#nbgpu-panel tbody").filter(has_text=notebook)


def open_panel(page: Page) -> None:
    """Open the panel from the status bar."""
    page.locator(".nbgpu-Status").click()
    page.wait_for_selector("#nbgpu-panel:visible")


def kernel_menu(page: Page, name: str) -> Locator:
    """Open, by keyboard, the menu of what can be done with a notebook's kernel."""
    page.get_by_role("button", name=f"Actions for {name}").focus()
    page.keyboard.press("Enter")
    opened = page.locator(".lm-Menu")
    opened.wait_for()
    return opened


def set_limit(page: Page, name: str, memory: str, *, keep: bool = True) -> None:
    """Write a limit of memory into the form at a notebook's kernel; `keep` it in the notebook."""
    row = kernel_row(page, name)
    row.get_by_role("button", name="Limit of").click()
    row.get_by_label("Memory limit").fill(memory)
    row.get_by_role("checkbox", name="Save it in the notebook").set_checked(keep)
    row.get_by_role("button", name="Set limit").click()


def ask_for_size(page: Page, share: str) -> None:
    """Ask for another size of the slice in the panel, which is open; the answer is `size_granted`'s or `size_refused`'s to wait for."""
    form = page.get_by_role("form", name="Size of this slice")
    if not form.is_visible():
        page.locator("#nbgpu-panel").get_by_role("button", name="Change the size of this slice").click()
    page.wait_for_timeout(2200)  # who asks again within two seconds is told to wait
    form.get_by_label("Share of a GPU").fill(share)
    form.get_by_role("button", name="Ask for it").click()


def size_granted(page: Page, share: str, memory: str) -> None:
    """Wait until the panel says that the slice got this size, and the status bar shows it."""
    expect(page.locator("#nbgpu-panel .nbgpu-Resize").get_by_role("status")).to_contain_text(
        f"Granted: {share} GPU with {memory} of memory."
    )
    expect(page.locator(".nbgpu-Status")).to_contain_text(f"of {memory}", timeout=10 * SECOND)


def size_refused(page: Page, words: str) -> None:
    """Wait until the form, which stays open, says why the slice keeps its size."""
    expect(page.get_by_role("form", name="Size of this slice").get_by_role("alert")).to_have_text(words)


def without_notices(page: Page) -> None:
    """Wait until no notice covers the page: they close by themselves."""
    expect(page.locator(".Toastify__toast")).to_have_count(0)
