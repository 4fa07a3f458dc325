"""The pictures of the hub's pages, and of JupyterLab in a real slice: of what `make run` starts (`tools/pictures.py`)."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from browser_hub import Hub, of_this_checkout, running_hub
from lab_pages import ALLOCATE, CELLS, SECOND, in_lab, kernel_row, log_in, menu, press_start, run_cell, sign_in, start, without_notices
from playwright.sync_api import Browser, FloatRect, Page, expect

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 1000
LAB = {"width": 1400, "height": 900}
IN_LAB = re.compile(r".*/user/.*")


def make(browser: Browser, out: Path) -> Iterator[Path]:
    """Yield each picture once it is there."""
    expect.set_options(timeout=120 * SECOND)
    base = Path(tempfile.mkdtemp(prefix="nbgpu-pictures-hub-"))
    with running_hub(of_this_checkout(ROOT / "jupyterhub_config.py", base), base) as hub:
        ada = log_in(browser, hub, "ada")
        ada.set_viewport_size({"width": WIDTH, "height": 700})
        expect(ada.locator(".nbgpu-row[data-slug=quarter]")).to_contain_text("Free now")
        expect(ada.locator("#nbgpu-simulated")).to_be_visible()
        yield from shots(ada, out, "start", whole=True)
        yield from in_a_slice(ada, out)
        yield from when_full(browser, hub, out)


def shots(page: Page, out: Path, name: str, *, whole: bool = False, top: str = "") -> Iterator[Path]:
    """Yield a picture of a page of the hub in each theme: what is in view, or the whole page, from `top` on where it names something."""
    for theme in ("dark", "light"):
        page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
        expect(page.locator("html")).to_have_attribute("data-bs-theme", theme)
        page.wait_for_timeout(700)
        path = out / f"{name}-{theme}.png"
        page.screenshot(path=path, full_page=whole, clip=from_the_top_of(page, top) if top else None, animations="disabled")
        yield path


def from_the_top_of(page: Page, selector: str) -> FloatRect:
    """Return the part of a page from something on to its end."""
    page.evaluate("scrollTo(0, 0)")
    box = page.locator(selector).first.bounding_box()
    assert box
    end = page.evaluate("document.body.scrollHeight")
    return {"x": box["x"] - 12, "y": box["y"] - 12, "width": box["width"] + 24, "height": end - box["y"] + 12}


def in_a_slice(ada: Page, out: Path) -> Iterator[Path]:
    """JupyterLab with a quarter: one notebook has run, another is at its own limit."""
    ada.set_viewport_size(LAB)
    start(ada, "quarter")
    in_lab(ada)
    ada.locator(".nbgpu-Status").click()
    ada.wait_for_selector("#nbgpu-panel:visible")
    menu(ada, "Run", "Run All Cells")
    expect(ada.locator(".nbgpu-Latest")).to_contain_text("fractions.ipynb was refused 9.7 GiB")
    expect(ada.locator(f"{CELLS} .jp-CodeCell .jp-InputPrompt").last).to_have_text(re.compile(r"\[\d+\]:"))
    expect(kernel_row(ada, "fractions.ipynb")).to_contain_text("300 MiB")  # it has given back all but its context
    menu(ada, "File", "New", "Notebook")
    ada.locator(".jp-Dialog button.jp-mod-accept").click()
    expect(ada.locator("#jp-main-statusbar")).to_contain_text("| Idle")
    run_cell(ada, ALLOCATE + "print(gib(0.5))")
    second = kernel_row(ada, "Untitled.ipynb")
    second.locator("button.nbgpu-Kernels-limit").click()
    second.locator("input").first.fill("5 GiB")
    second.locator("button[type=submit]").click()
    expect(second.locator("button.nbgpu-Kernels-limit")).to_contain_text("5 GiB")
    run_cell(ada, "print(gib(4))")
    run_cell(ada, "print(gib(0.5))")
    expect(ada.locator(".nbgpu-Latest")).to_contain_text("Untitled.ipynb was refused")
    without_notices(ada)
    ada.wait_for_timeout(1500)
    yield path_of(ada, out, "lab-light")
    menu(ada, "Settings", "Theme", "JupyterLab Dark")
    ada.wait_for_selector('body[data-jp-theme-name="JupyterLab Dark"]', state="attached")
    yield path_of(ada, out, "lab-dark")


def path_of(page: Page, out: Path, name: str) -> Path:
    """Return where a picture of what is in view was written, once colours have faded."""
    page.mouse.move(2, 500)
    page.wait_for_timeout(1500)
    path = out / f"{name}.png"
    page.screenshot(path=path, animations="disabled")
    return path


def when_full(browser: Browser, hub: Hub, out: Path) -> Iterator[Path]:
    """The GPU is taken but for a tenth: the queue, and the start page with the choice of last time, large, small and enlarged."""
    grace, edsger = (log_in(browser, hub, user) for user in ("grace", "edsger"))
    start(grace, "half")
    custom = edsger.locator(".nbgpu-row[data-slug=custom]")
    custom.locator("input[type=radio]").check()
    custom.get_by_label("Share of a GPU").fill("0.15")
    press_start(edsger)
    for page in (grace, edsger):
        page.wait_for_url(IN_LAB, timeout=120 * SECOND)
    lin = log_in(browser, hub, "lin")
    lin.set_viewport_size({"width": WIDTH, "height": 560})
    expect(lin.locator("#nbgpu-offer")).to_be_visible()
    start(lin, "half")
    expect(lin.locator("#progress-message")).to_contain_text("1st in line")
    expect(lin.locator(".nbgpu-smaller:visible")).to_be_visible()
    yield from shots(lin, out, "queue")
    yield from small(browser, hub, out, "queue", ".nbgpu-smaller:visible")
    lin.get_by_role("button", name="Leave the queue").locator("visible=true").first.click()
    expect(lin.locator(".nbgpu-row[data-slug=half] input[type=radio]")).to_be_checked()
    expect(lin.locator("#nbgpu-offer")).to_be_visible()
    yield from shots(lin, out, "start-full", whole=True, top=".nbgpu-row")
    yield from small(browser, hub, out, "start", "#nbgpu-offer")


def small(browser: Browser, hub: Hub, out: Path, name: str, sign: str) -> Iterator[Path]:
    """Yield pictures of the page where lin is, on a phone and at 200 %."""
    for where, width, height, scale in (("phone", 360, 740, 1), ("200-percent", 640, 450, 1.5)):
        page = sign_in(browser, hub, "lin", "/hub/spawn")
        page.wait_for_url(re.compile("/hub/spawn"))
        page = page if scale == 1 else enlarged(browser, page, scale)
        page.set_viewport_size({"width": width, "height": height})
        page.locator(sign).first.wait_for()
        chosen = page.locator("#nbgpu input:checked")
        if chosen.count():
            chosen.evaluate("one => one.parentElement.scrollIntoView({block: 'center'})")
        yield from shots(page, out, f"{name}-{where}")
        page.context.close()


def enlarged(browser: Browser, page: Page, scale: float) -> Page:
    """Return the same page, of the same person, with more pixels."""
    state = page.context.storage_state()
    url = page.url
    page.context.close()
    again = browser.new_context(storage_state=state, device_scale_factor=scale).new_page()
    again.goto(url)
    return again
