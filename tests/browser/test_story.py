"""The whole line as its users see it: start page, queue, JupyterLab, limits. Each step leaves a screenshot in ``shots/``."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from browser_hub import BUILT, Hub, shot
from browser_kit import wait_for
from lab_pages import (
    ALLOCATE,
    CELLS,
    NEWS,
    SECOND,
    another_notebook,
    ask_for_size,
    in_lab,
    kernel_row,
    log_in,
    menu,
    open_panel,
    press_start,
    run_cell,
    set_limit,
    sign_in,
    size_granted,
    size_refused,
    start,
    stop,
    without_notices,
)
from playwright.sync_api import Browser, expect

from nbgpu.quantities import GIB

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

ENTRY = """JSON.parse(document.getElementById('jupyter-config-data').textContent)
    .federated_extensions.find(one => one.name === 'nbgpu-lab').load.split('/').at(-1)"""


def books(hub: Hub) -> dict[str, list[dict[str, Any]]]:
    """Return what ``nbgpu status --json`` says."""
    answer = hub.nbgpu("status", "--json")
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


def holders(hub: Hub) -> set[str]:
    """Return the users who hold a slice."""
    return {known["slice"]["owner"]["user"] for known in books(hub)["slices"]}


def sizes(hub: Hub) -> dict[str, int]:
    """Return the bytes of each user's slice, which is on one device."""
    found = (known["slice"] for known in books(hub)["slices"])
    return {one["owner"]["user"]: one["devices"][0]["memory_bytes"] for one in found}


def waiting(hub: Hub) -> set[str]:
    """Return the users in the queue."""
    return {grant["request"]["owner"]["user"] for grant in books(hub)["queue"]}


@pytest.fixture(autouse=True)
def everybody_leaves(chromium: Browser, hub: Hub) -> Iterator[None]:
    """Stop what a test that failed left running: the next one begins on an empty device."""
    yield
    for user in holders(hub):
        page = sign_in(chromium, hub, user, "/hub/home")
        page.wait_for_url("**/hub/home")
        if page.locator("#stop").is_visible():
            stop(page, hub)
    wait_for("all slices are given back", lambda: not holders(hub))


def test_a_notebook_with_a_quarter(chromium: Browser, hub: Hub) -> None:
    """Start page, JupyterLab, the limits of the slice and of one notebook, a kernel that is killed, and another size of the slice."""
    ada = log_in(chromium, hub, "ada")
    quarter = ada.locator(".nbgpu-row[data-slug=quarter]")
    expect(quarter).to_contain_text("Free now")
    expect(quarter).to_contain_text("19.5 GiB, at least a quarter of the GPU's time")
    shot(ada, "1-start-page")
    start(ada, "quarter")
    in_lab(ada)

    # nothing is to be saved where nothing was done
    ada.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()
    ada.wait_for_timeout(1000)
    expect(ada.locator(".lm-DockPanel-tabBar .jp-mod-dirty")).to_have_count(0)
    assert [path.name for path in BUILT.glob("static/remoteEntry.*.js")] == [ada.evaluate(ENTRY)], "the front end is this checkout's"

    # the status bar, the panel and every way of asking say the slice's number
    expect(ada.locator(".nbgpu-Status")).to_contain_text("of 19.5 GiB")
    open_panel(ada)
    menu(ada, "Run", "Run All Cells")
    notice = ada.locator(".nbgpu-Latest").filter(has_text="fractions.ipynb was refused 9.7 GiB: this server's slice of 19.5 GiB")
    expect(notice).to_be_visible(timeout=120 * SECOND)
    expect(kernel_row(ada, "fractions.ipynb")).to_contain_text("1 refusal")
    shot(ada, "2-lab-refused")
    expect(ada.locator(f"{CELLS} .jp-CodeCell .jp-InputPrompt").last).to_have_text(re.compile(r"\[\d+\]:"), timeout=60 * SECOND)
    expect(ada.get_by_text(NEWS)).to_have_count(0)  # the demo's settings say no
    menu(ada, "File", "Save Notebook")
    saved = hub.runtime.parent / "homes" / "ada" / "fractions.ipynb"
    wait_for("the notebook is saved with its outputs", lambda: "GiB free\\n" in saved.read_text().split("Give it back")[-1])
    for text in ("CUDA driver: 19.5 GiB", "NVML: 19.5 GiB", "19968MiB", "CUDA_ERROR_OUT_OF_MEMORY"):
        assert saved.read_text().count(text) == 1, text
    run_cell(ada, "nbgpu.SliceMonitor()")
    monitor = ada.locator(f"{CELLS} .jp-OutputArea-output").last
    expect(monitor).to_contain_text("19.5 GiB")
    expect(monitor).to_contain_text("fractions.ipynb")
    without_notices(ada)
    shot(ada, "3-monitor-in-a-cell")
    expect(kernel_row(ada, "fractions.ipynb")).to_contain_text("300 MiB")  # all freed: the context is left

    # a second notebook is capped at 5 GiB from the panel
    assert another_notebook(ada) == "Untitled.ipynb"
    assert "SUCCESS" in run_cell(ada, ALLOCATE + "print(gib(0.5))")
    second = kernel_row(ada, "Untitled.ipynb")
    set_limit(ada, "Untitled.ipynb", "5 GiB")
    expect(second.locator("button.nbgpu-Kernels-limit")).to_contain_text("5 GiB")
    assert "SUCCESS" in run_cell(ada, "print(gib(4))")
    assert "OUT_OF_MEMORY" in run_cell(ada, "print(gib(0.5))")
    own = ada.locator(".nbgpu-Latest").filter(has_text="Untitled.ipynb was refused")
    expect(own).to_contain_text("5 GiB", timeout=2 * SECOND)
    expect(second).to_contain_text("4.7 GiB")
    ada.wait_for_timeout(1200)  # a notice slides in; let the picture be still
    shot(ada, "4-second-notebook-at-its-limit")
    ada.locator(".lm-TabBar-tabLabel").filter(has_text="fractions.ipynb").click()
    assert "SUCCESS" in run_cell(ada, "print(driver.cuMemAlloc(10 * 1024**3)[0].name)")

    # the second kernel is killed while it allocates: what it held is free for the first within a second
    assert "OUT_OF_MEMORY" in run_cell(ada, "print(driver.cuMemAlloc(6 * 1024**3)[0].name)")
    without_notices(ada)
    ada.locator(".lm-TabBar-tabLabel").filter(has_text="Untitled.ipynb").click()
    run_cell(ada, "import os, threading\nthreading.Timer(1, os.kill, (os.getpid(), 9)).start()\nwhile True: gib(0.001)", waits=False)
    ada.locator(".jp-Dialog").filter(has_text="appears to have died").locator("button").last.click()
    expect(second).to_contain_text("\N{EN DASH}")
    without_notices(ada)
    ada.locator(".lm-TabBar-tabLabel").filter(has_text="fractions.ipynb").click()
    assert "SUCCESS" in run_cell(ada, "print(driver.cuMemAlloc(6 * 1024**3)[0].name)")
    shot(ada, "5-after-the-kill")
    assert holders(hub) == {"ada"}

    # the slice grows while its notebooks run, does not grow into a neighbour's part, and shrinks
    smi = "!nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits"
    ask_for_size(ada, "1/2")
    size_granted(ada, "1/2", "39 GiB")
    assert run_cell(ada, smi).split() == [str(39 * 1024)]
    assert "SUCCESS" in run_cell(ada, "more = driver.cuMemAlloc(6 * 1024**3)\nprint(more[0].name)")  # refused a moment ago
    dorothy = log_in(chromium, hub, "dorothy")
    start(dorothy, "half")
    wait_for("dorothy has the other half", lambda: sizes(hub) == {"ada": 39 * GIB, "dorothy": 39 * GIB}, 60)
    ada.locator("#nbgpu-panel").get_by_role("button", name="Change the size of this slice").click()
    expect(ada.locator(".nbgpu-Resize-room")).to_have_text("Free on GPU 0 now: 0 % of its time, 0 B of its memory.")
    ask_for_size(ada, "3/4")
    size_refused(ada, "GPU 0 has 0 B of memory free, and 19.5 GiB more are asked for.")
    without_notices(ada)
    shot(ada, "5-resize-refused")
    assert run_cell(ada, "driver.cuMemFree(more[1])\n" + smi).split() == [str(39 * 1024)]
    ask_for_size(ada, "1/4")
    size_granted(ada, "1/4", "19.5 GiB")
    shot(ada, "5-resized")
    assert run_cell(ada, smi).split() == [str(39 * 1024 // 2)]
    assert "OUT_OF_MEMORY" in run_cell(ada, "print(driver.cuMemAlloc(6 * 1024**3)[0].name)")
    assert sizes(hub) == {"ada": 39 * GIB // 2, "dorothy": 39 * GIB}
    stop(dorothy, hub)

    # a server that is stopped is said to be stopped on the page that is left open, and nothing false is told
    told = ada.locator("#nbgpu-panel .nbgpu-Happened li").count()
    stop(sign_in(chromium, hub, "ada", "/hub/home"), hub)
    expect(ada.locator(".nbgpu-Panel-away")).to_contain_text("This server was stopped.")
    assert ada.locator("#nbgpu-panel .nbgpu-Happened li").count() <= told
    without_notices(ada)
    shot(ada, "6-stopped")


def test_a_refused_value_can_be_mended(chromium: Browser, hub: Hub) -> None:
    """It comes back once, with the message at its field; a fresh page knows nothing of it."""
    mary = log_in(chromium, hub, "mary")
    expect(mary.locator(".nbgpu-row[data-slug=quarter] input[type=radio]")).to_be_checked()  # what this hub's configuration begins with
    custom = mary.locator(".nbgpu-row[data-slug=custom]")
    share = custom.get_by_label("Share of a GPU")
    share.fill("7/2")
    press_start(mary)
    expect(custom.locator(".invalid-feedback")).to_contain_text(
        "Share of a GPU is '7/2'; it must be a fraction of one GPU above 0 and up to 1"
    )
    expect(mary.get_by_text("Share of a GPU is '7/2'").locator("visible=true")).to_have_count(1)
    expect(share).to_have_value("7/2")
    expect(custom.locator("input[type=radio]")).to_be_checked()
    share.scroll_into_view_if_needed()
    shot(mary, "11-refused-value")
    mary.goto(hub.url + "/hub/spawn")
    expect(share).to_have_value("")
    expect(mary.locator(".invalid-feedback")).to_have_count(0)


def test_an_open_start_page_is_never_old(chromium: Browser, hub: Hub) -> None:
    """It asks again by itself; a hub that does not answer is said on the page, within 5 s, and no longer than that lasts."""
    joan = log_in(chromium, hub, "joan")
    asked = "**/api/nbgpu/availability*"
    began = joan.evaluate("performance.now()")
    joan.wait_for_timeout(9 * SECOND)
    answered = joan.evaluate(
        "performance.getEntriesByType('resource').filter(e => e.name.includes('/availability')).map(e => e.responseEnd)"
    )
    moments = [began, *(at for at in answered if at > began), joan.evaluate("performance.now()")]
    assert max(later - sooner for sooner, later in itertools.pairwise(moments)) < 5 * SECOND, moments
    joan.route(asked, lambda _: None)  # never answered
    problem = joan.locator("#nbgpu-problem")
    expect(problem).to_contain_text("The hub does not answer: what is shown here may have changed.", timeout=5 * SECOND)
    shot(joan, "12-hub-away")
    joan.unroute(asked)
    expect(problem).to_be_hidden(timeout=5 * SECOND)


def test_the_start_page_without_javascript(chromium: Browser, hub: Hub) -> None:
    """What each profile is, whether it is free, a refusal at its field, and a start: forms alone."""
    wait_for("agent and pool answer", lambda: hub.nbgpu("status", "--json").returncode == 0)
    radia = log_in(chromium, hub, "radia", scripts=False)
    expect(radia.locator(".nbgpu-row[data-slug=eighth]")).to_contain_text("Free now")
    expect(radia.locator("#nbgpu-asof")).to_contain_text("Reload the page to see what is free now.")
    custom = radia.locator(".nbgpu-row[data-slug=custom]")
    custom.locator("input[type=radio]").check()
    custom.get_by_label("GPU memory").fill("1000 GiB")
    press_start(radia)
    expect(custom.locator(".invalid-feedback")).to_contain_text("GPU memory is '1000 GiB'; it must be at most 78 GiB")
    shot(radia, "13-without-javascript")
    custom.get_by_label("GPU memory").fill("10 GiB")
    press_start(radia)
    wait_for("radia has a slice", lambda: "radia" in holders(hub))

    def there() -> bool:
        radia.goto(hub.url + "/user/radia/lab")
        return "/hub/" not in radia.url

    wait_for("her server answers", there, 120, every=1)
    stop(sign_in(chromium, hub, "radia", "/hub/home"), hub)
    wait_for("her slice is given back", lambda: "radia" not in holders(hub))


def test_the_queue(chromium: Browser, hub: Hub) -> None:
    """A full device: the next one waits, sees how long, can leave, and gets in when someone stops."""
    pages = {user: log_in(chromium, hub, user) for user in ("grace", "edsger", "barbara", "lin")}
    for user, slug in (("grace", "half"), ("edsger", "quarter"), ("barbara", "quarter")):
        start(pages[user], slug)
    for user in ("grace", "edsger", "barbara"):
        pages[user].wait_for_url(re.compile(r".*/user/.*"), timeout=120 * SECOND)
    lin = pages["lin"]
    eighth = lin.locator(".nbgpu-row[data-slug=eighth]")
    expect(eighth).not_to_contain_text("Free now", timeout=5 * SECOND)
    expect(eighth).to_contain_text(re.compile("In use: (perhaps|usually) free within"))
    shot(lin, "6-start-page-when-full")
    start(lin, "eighth")
    progress = lin.locator("#progress-message")
    expect(progress).to_contain_text(re.compile("an eighth of a GPU: 1st in line, (perhaps|usually) within "))
    shot(lin, "7-in-the-queue")
    expect(lin.locator("#stop-server-btn")).to_be_hidden()  # JupyterHub 6's "Stop Server" would do the same, or end another server
    lin.locator("form.nbgpu-leave button:visible").first.click()
    wait_for("lin has left the queue", lambda: not waiting(hub))
    shot(lin, "8-left-the-queue")

    lin.goto(hub.url + "/hub/spawn")
    start(lin, "eighth")
    expect(progress).to_contain_text(re.compile("1st|next", re.IGNORECASE))
    progress.evaluate("one => one.textContent = 'Got it.'")
    expect(lin.locator("#stop-server-btn")).to_be_visible()  # the control: only while one waits
    stop(pages["barbara"], hub)
    lin.wait_for_url(re.compile(r".*/user/lin/.*"), timeout=120 * SECOND)
    wait_for("lin has barbara's place", lambda: holders(hub) == {"grace", "edsger", "lin"})
    for user in ("grace", "edsger", "lin"):
        stop(pages[user], hub)
    wait_for("all slices are given back", lambda: not holders(hub))
