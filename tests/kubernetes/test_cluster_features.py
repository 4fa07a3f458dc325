"""Each feature of the start page and of the notebook once, through KubeGPUSpawner on a cluster: JupyterLab and Notebook 7 in real Chromium.

One node's GPU is simulated. What the views do is tested on one machine (the tables of features in docs/start-page.md and docs/notebook.md);
here that each is there and works where the server is a pod and its slice a claim. Each chapter also runs by itself, and leaves
screenshots in ``shots/``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import browser_kit
import pytest
from chart_kit import Api, Json
from lab_pages import (
    ALLOCATE,
    CELLS,
    SECOND,
    another_notebook,
    kernel_menu,
    kernel_row,
    log_in,
    menu,
    no_news,
    open_panel,
    run_cell,
    set_limit,
    start,
    without_notices,
)
from playwright.sync_api import Browser, Locator, Page, expect
from stack_kit import DEVICE_BYTES, GIB, SHOTS, Stack, stack
from z2jh_kit import Hub

pytestmark = [pytest.mark.kubernetes, pytest.mark.browser, pytest.mark.timeout(300)]

STAFF = {
    "display_name": "Half a GPU for the staff",
    "slug": "staff",
    "allowed_groups": ["staff"],
    "kubespawner_override": {"gpu_fraction": 0.5, "gpu_mode": "strict"},
}
QUOTAS = {"default": {"limit": "1/2"}}
HOLD = "open('hold.py', 'w').write('''" + ALLOCATE + "print(gib(2))\ninput()\n''')"
OWN_LIMIT = "import json\nprint(json.load(open({name!r}))['metadata'].get('nbgpu'))"
TORCH = """
import sys, types
held = [driver.cuMemAlloc(2 * 2**30)[1]]
def empty_cache():
    while held: driver.cuMemFree(held.pop())
sys.modules['torch'] = types.SimpleNamespace(cuda=types.SimpleNamespace(is_initialized=lambda: True, empty_cache=empty_cache))
print('ready')
"""
NUMBERS = """
import json, nbgpu
now = nbgpu.slice()
own = now.devices[0].kernel
print(json.dumps([now.memory_limit_bytes, now.devices[0].compute_limit_milli, own.memory_used_bytes, own.memory_limit_bytes]))
"""
MANY = """
import os, threading, time
from nbgpu.client import SliceClient
from nbgpu.models import KernelLimit
def change():
    own = SliceClient(os.environ["NBGPU_SOCKET"])
    for n in range(105):
        own.set_kernel_limit(os.environ["NBGPU_KERNEL_ID"], KernelLimit(memory_bytes=(1024 + n) << 20))
        time.sleep(0 if n < 25 else 0.2)  # of many that come faster the agent leaves some out
threading.Thread(target=change).start()
"""
HEAR = """async () => {
    window.heard = [];
    const stream = new WebSocket(location.origin.replace(/^http/, 'ws') + '/user/ada/api/events/subscribe');
    stream.onmessage = message => heard.push(JSON.parse(message.data));
    await new Promise(opened => stream.onopen = opened);
}"""
END_SESSIONS = """async () => {
    const headers = {'X-XSRFToken': document.cookie.match(/\\b_xsrf=([^;]*)/)[1]};
    for (const what of ['sessions', 'terminals']) {
        for (const {id, name} of await (await fetch('/user/ada/api/' + what)).json()) {
            await fetch(`/user/ada/api/${what}/${id ?? name}`, {method: 'DELETE', headers});
        }
    }
}"""


def for_the_staff(told: Json) -> None:
    """Give the hub a group, and the group a profile."""
    told["hub"]["config"]["JupyterHub"]["load_groups"] = {"staff": {"users": ["grace"]}}
    told["singleuser"]["profileList"].insert(1, STAFF)  # in the picture


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Stack, Hub]]:
    with stack(Api(), for_the_staff, pool={"config": {"quotas": QUOTAS}}) as made:
        yield made


@pytest.fixture(scope="module")
def server(chromium: Browser, hub: Hub) -> Page:
    """Ada's page, on a server with a quarter; the panel is open."""
    ada = log_in(chromium, hub, "ada")
    start(ada, "quarter")
    ada.locator(".jp-LauncherCard").first.wait_for(timeout=120 * SECOND)
    no_news(ada)
    open_panel(ada)
    return ada


@pytest.fixture
def ada(server: Page, hub: Hub) -> Page:
    """Ada's JupyterLab, as a chapter finds it: no kernel, nothing over the page, the panel open."""
    server.evaluate(END_SESSIONS)
    if "/lab" not in server.url or server.locator(".jp-Dialog, #nbgpu-panel:not(:visible)").count():
        server.goto(f"{hub.url}/user/ada/lab?reset")
        open_panel(server)
    expect(server.locator("#nbgpu-panel")).to_contain_text("No kernel runs on this server.")
    return server


@pytest.fixture
def notebook(ada: Page) -> str:
    """A notebook of the chapter's own, in front, whose kernel can allocate."""
    name = another_notebook(ada)
    run_cell(ada, ALLOCATE)
    return name


def shot(page: Page, name: str) -> None:
    browser_kit.shot(page, SHOTS, f"features-{name}")


def row(page: Page, slug: str) -> Locator:
    """Return a profile of the start page."""
    return page.locator(f".nbgpu-row[data-slug={slug}]")


def latest(page: Page, words: str) -> Locator:
    """Return what the open panel says of what just happened."""
    return page.locator(".nbgpu-Latest").filter(has_text=words)


def test_the_start_page(chromium: Browser, hub: Hub) -> None:
    """Profiles by group, what is free, why another is not to be had, a wrong value at its field."""
    grace, lin = log_in(chromium, hub, "grace"), log_in(chromium, hub, "lin")
    expect(row(grace, "staff")).to_contain_text("Free now")
    expect(row(lin, "staff")).to_have_count(0)
    expect(row(lin, "half")).to_contain_text("Free now")
    expect(row(lin, "half")).to_contain_text("39 GiB, at least half of the GPU's time")
    expect(row(lin, "whole")).to_contain_text("quota")
    expect(row(lin, "whole").locator("input[type=radio]")).to_be_disabled()
    expect(row(lin, "cpu")).to_be_visible()
    expect(lin.locator("#nbgpu-simulated")).to_contain_text("Simulated GPUs.")
    shot(lin, "1-start-page")
    shot(grace, "1-start-page-of-the-staff")
    custom = row(lin, "custom")
    custom.get_by_label("Share of a GPU").fill("7/2")
    lin.keyboard.press("Enter")
    expect(custom.locator(".invalid-feedback")).to_contain_text("Share of a GPU is '7/2'")
    shot(lin, "1-refused-value")
    for page in (grace, lin):
        page.context.close()


def test_the_queue(chromium: Browser, nbgpu: Stack, hub: Hub, ada: Page) -> None:
    """Beside Ada's quarter and Grace's half Lin waits: place, estimate, leaving, the last choice, a smaller share; without scripts too."""
    del ada
    grace, lin = log_in(chromium, hub, "grace"), log_in(chromium, hub, "lin")
    start(grace, "staff")
    grace.wait_for_url(re.compile("/hub/spawn-pending/"))
    grace.context.close()
    expect(row(lin, "half")).to_contain_text("In use: perhaps free within")
    shot(lin, "2-in-use")
    start(lin, "half")
    queue = lin.locator("#nbgpu-queue")
    expect(queue).to_contain_text("Waiting for half of a GPU")
    expect(queue).to_contain_text("1st in line, perhaps within")
    expect(queue).to_contain_text("A guess: too few servers have ended here")
    smaller = queue.get_by_role("button", name="Take a quarter of a GPU now")
    expect(smaller).to_be_visible()
    shot(lin, "2-in-the-queue")

    radia = log_in(chromium, hub, "radia", scripts=False)
    expect(row(radia, "quarter")).to_contain_text("Free now")
    expect(radia.locator("#nbgpu-asof")).to_contain_text("Reload the page to see what is free now.")
    shot(radia, "2-start-page-without-javascript")
    start(radia, "half")
    line = radia.locator("#nbgpu-queue")
    expect(line).to_contain_text("2nd in line")  # it loads itself again until it knows
    shot(radia, "2-in-the-queue-without-javascript")
    line.get_by_role("button", name="Leave the queue").click()
    expect(row(radia, "half").locator("input[type=radio]")).to_be_checked()
    radia.context.close()

    queue.get_by_role("button", name="Leave the queue").click()
    expect(row(lin, "half").locator("input[type=radio]")).to_be_checked()  # at the start page again, with the last choice
    shot(lin, "2-left-the-queue")
    nbgpu.check(claims=2)
    start(lin, "half")
    smaller.click()
    lin.wait_for_url(re.compile("/user/lin/"), wait_until="commit")
    lin.context.close()
    nbgpu.check(claims=3)
    assert nbgpu.held() == (DEVICE_BYTES, 1000), "a half and two quarters"
    for user in ("grace", "lin"):  # they end while the next chapters run
        pod = hub.server(user)["metadata"]
        hub.api.done("DELETE", f"/api/v1/namespaces/{pod['namespace']}/pods/{pod['name']}")


def test_the_panel(ada: Page, notebook: str) -> None:
    """Status bar, history, kernels by notebook, what a terminal runs."""
    assert "SUCCESS" in run_cell(ada, f"{HOLD}\nprint(gib(4))")
    menu(ada, "File", "New", "Terminal")
    terminal = ada.locator(".jp-Terminal .xterm-helper-textarea")
    ada.locator(".jp-Terminal .xterm-screen").click()
    terminal.press_sequentially("python hold.py\n")
    panel = ada.locator("#nbgpu-panel")
    expect(kernel_row(ada, "Other processes")).to_contain_text("2.2 GiB")
    own = kernel_row(ada, notebook)
    expect(own).to_contain_text("4.2 GiB")
    expect(own).to_contain_text(re.compile(r"Python 3 \(ipykernel\) · idle"))
    expect(ada.locator(".nbgpu-Status")).to_contain_text(re.compile(r"1/4 simulated GPU: [\d.]+ of 19.5 GiB, \d+ % busy"))
    expect(panel).to_contain_text("Simulated: this machine has no NVIDIA driver.")
    for name in ("1 min", "1 h", "10 min"):
        panel.get_by_role("radio", name=name, exact=True).check()
        panel.get_by_role("img", name=f"Memory in the last {name}").wait_for()
    shot(ada, "3-panel")

    # what ends gives back, and a busy kernel is said to be
    terminal.press_sequentially("\n")
    expect(panel.locator("[data-kernel=other]")).to_have_count(0)
    ada.locator(".lm-DockPanel-tabBar .lm-TabBar-tabLabel").filter(has_text=notebook).click()
    run_cell(ada, "import time\ntime.sleep(2)", waits=False)
    expect(own).to_contain_text("· busy")


def test_a_limit_of_one_notebook(ada: Page, notebook: str) -> None:
    """From the panel, while it runs; kept in the notebook, for its next kernel; where a limit comes from."""
    own = kernel_row(ada, notebook)
    limit = own.locator("button.nbgpu-Kernels-limit")
    expect(limit).to_have_text("none")
    set_limit(ada, notebook, "100 GiB")
    expect(own.get_by_role("alert")).to_contain_text("it must be at most 19.5 GiB, this server's slice")
    shot(ada, "4-limit-above-the-slice")
    own.get_by_label("Memory limit").fill("3 GiB")
    own.get_by_role("button", name="Set limit").click()
    expect(limit).to_contain_text("3 GiB")
    expect(own).to_contain_text("from the notebook")
    assert run_cell(ada, "print(gib(2), gib(1))").split() == ["CUDA_SUCCESS", "CUDA_ERROR_OUT_OF_MEMORY"]
    expect(latest(ada, f"{notebook} was refused 1 GiB")).to_contain_text("3 GiB")
    expect(own).to_contain_text("1 refusal")
    shot(ada, "4-limit-that-holds")
    assert run_cell(ada, OWN_LIMIT.format(name=notebook)).strip() == "{'memory': '3 GiB'}"

    # the next kernel finds it in the notebook
    kernel_menu(ada, notebook).get_by_text("Restart Kernel…").click()
    dialog = ada.locator(".jp-Dialog")
    expect(dialog).to_contain_text("The 2.2 GiB of GPU memory that it holds are freed.")
    shot(ada, "4-restart")
    dialog.get_by_role("button", name="Restart").click()
    expect(own.locator("td").first).to_have_text(re.compile("^\N{EN DASH}"))
    assert run_cell(ada, ALLOCATE + "print(gib(2), gib(1))").split() == ["CUDA_SUCCESS", "CUDA_ERROR_OUT_OF_MEMORY"]
    expect(own).to_contain_text("from the notebook")

    # for now alone, and by a command
    set_limit(ada, notebook, "4 GiB", keep=False)
    expect(own).to_contain_text("set here")
    assert "SUCCESS" in run_cell(ada, "print(gib(1))")
    assert "5 GiB" in run_cell(ada, f"!nbgpu limit {notebook} --memory 5GiB")
    expect(own).to_contain_text("set by a command")
    expect(limit).to_contain_text("5 GiB")
    shot(ada, "4-limit-by-a-command")
    assert run_cell(ada, OWN_LIMIT.format(name=notebook)).strip() == "{'memory': '3 GiB'}"


def test_memory_that_is_not_needed(ada: Page, notebook: str) -> None:
    """Caches of a framework, with consent; a kernel that dies; and that a pod's memory is not moved to the host is said."""
    assert "ready" in run_cell(ada, TORCH)
    own = kernel_row(ada, notebook)
    expect(own).to_contain_text("2.2 GiB")
    expect(own).to_contain_text("· idle")
    opened = kernel_menu(ada, notebook)
    expect(opened.locator(".lm-Menu-item.lm-mod-disabled")).to_have_text(["Move to Host Memory (not offered on this server)"])
    shot(ada, "5-menu")
    opened.get_by_text("Free Caches…").click()
    dialog = ada.locator(".jp-Dialog")
    expect(dialog).to_contain_text("torch.cuda.empty_cache()")
    shot(ada, "5-consent")
    dialog.get_by_role("button", name="Free caches").click()
    expect(latest(ada, "Freed 2 GiB. 300 MiB are still in use.")).to_be_visible()
    shot(ada, "5-freed")
    assert "is a pod" in run_cell(ada, f"!nbgpu suspend {notebook}")

    run_cell(ada, "import os, threading\nprint(gib(2))\nthreading.Timer(1, os.kill, (os.getpid(), 9)).start()", waits=False)
    ada.locator(".jp-Dialog").filter(has_text="appears to have died").locator("button").last.click()
    told = ada.get_by_role("region", name="What happened")
    expect(told).to_contain_text(f"{notebook} ended: the 2.2 GiB of GPU memory that it held are free again.")
    assert "False" in run_cell(ada, "print('held' in globals())")  # a new kernel
    ada.locator(".nbgpu-Latest").get_by_role("button", name="Close").click()
    expect(own.locator("td").first).to_have_text("\N{EN DASH}")
    shot(ada, "5-a-kernel-died")


def test_what_happened(ada: Page, notebook: str) -> None:
    """A refusal as a notification, in the log, as a Jupyter event; the panel has the last hundred."""
    ada.evaluate(HEAR)
    ada.locator('.lm-TabBar-tab[data-id="nbgpu-panel"]').click()
    ada.locator("#nbgpu-panel").wait_for(state="hidden")
    menu(ada, "View", "Show Log Console")
    assert "OUT_OF_MEMORY" in run_cell(ada, "print(gib(40))")
    refused = f"{notebook} was refused 40 GiB"
    toast = ada.locator(".Toastify__toast").filter(has_text=refused)
    expect(toast).to_be_visible()
    expect(ada.locator(".jp-LogConsolePanel")).to_contain_text(f"GPU: {refused}")
    run_cell(ada, MANY)
    ada.wait_for_timeout(1200)  # it slides in; let the picture be still
    shot(ada, "6-notification-and-log")
    [event] = [one for one in ada.evaluate("heard") if one.get("kind") == "refused"]
    assert (event["schema_id"], event["name"], event["data"]["refused_bytes"]) == (
        "https://schema.nbgpu.io/slice/v1", notebook, 40 * GIB,
    )  # fmt: skip
    toast.get_by_role("button", name="Show panel").click()
    told = ada.get_by_role("region", name="What happened")
    told.get_by_role("button", name="Show all").click()
    expect(told).to_contain_text(refused)
    ada.locator(".jp-LogConsolePanel").locator("xpath=ancestor::*[@id='jp-down-stack']").locator(".lm-TabBar-tabCloseIcon").click()
    expect(told.get_by_role("listitem")).to_have_count(100)
    expect(told).not_to_contain_text(refused)  # more than a hundred followed it
    assert ada.locator("#nbgpu-panel").evaluate("one => one.scrollHeight - one.clientHeight") == 0  # its content alone scrolls
    shot(ada, "6-the-last-hundred")


def test_in_a_cell(ada: Page, notebook: str) -> None:
    """`%gpu`, the monitor, and the slice as numbers."""
    set_limit(ada, notebook, "6 GiB", keep=False)
    expect(kernel_row(ada, notebook)).to_contain_text("set here")
    run_cell(ada, "gib(1)\n%gpu")
    table = ada.locator(f"{CELLS} .jp-OutputArea-output table").last
    expect(table).to_contain_text("of 19.5 GiB")
    expect(table).to_contain_text("of its own limit of 6 GiB")
    run_cell(ada, "import nbgpu\nnbgpu.SliceMonitor()")
    monitor = ada.locator(f"{CELLS} .nbgpu-monitor")
    expect(monitor).to_contain_text(f"{notebook} (this notebook): 1.2 GiB")
    assert json.loads(run_cell(ada, NUMBERS)) == [DEVICE_BYTES // 4, 250, GIB + 300 * 2**20, 6 * GIB]
    assert "SUCCESS" in run_cell(ada, "print(gib(1))")
    expect(monitor).to_contain_text(f"{notebook} (this notebook): 2.2 GiB")  # the page asks for it, not the cell
    without_notices(ada)
    shot(ada, "7-in-a-cell")


def test_running_and_settings(ada: Page, notebook: str) -> None:
    """Who holds memory, in the Running panel; what of the slice is shown, in the Settings Editor."""
    run_cell(ada, "gib(1)")
    ada.locator('.lm-TabBar-tab[data-id="jp-running-sessions"]').click()
    expect(ada.locator(".jp-RunningSessions-section").filter(has_text=f"1.2 GiB · {notebook}")).to_be_visible()
    shot(ada, "8-running")
    menu(ada, "Settings", "Settings Editor")
    ada.locator(".jp-PluginList-entry").filter(has_text="GPU slice").click()
    shown = ada.locator(".jp-SettingsForm").get_by_label("Show in the status bar")
    shown.uncheck()
    expect(ada.locator(".nbgpu-Status:visible")).to_have_count(0)
    shot(ada, "8-settings")
    shown.check()
    expect(ada.locator(".nbgpu-Status:visible")).to_have_count(1)


def test_notebook_7(hub: Hub, ada: Page, notebook: str) -> None:
    """The same in Notebook 7: its tree's Running tab; panel, history, a limit that the notebook keeps, notice, cells."""
    run_cell(ada, "gib(1)")
    ada.goto(f"{hub.url}/user/ada/tree")
    ada.get_by_role("tab", name="Running").click()
    expect(ada.locator(".jp-RunningSessions-section").filter(has_text=f"1.2 GiB · {notebook}")).to_be_visible()
    shot(ada, "9-notebook-7-running")

    ada.goto(f"{hub.url}/user/ada/notebooks/{notebook}")
    ada.locator(f"{CELLS} .jp-CodeCell").last.wait_for()
    run_cell(ada, "%gpu")
    expect(ada.locator(f"{CELLS} .jp-OutputArea-output table").last).to_contain_text("of 19.5 GiB")
    assert "OUT_OF_MEMORY" in run_cell(ada, "print(gib(40))")
    toast = ada.locator(".Toastify__toast").filter(has_text=f"{notebook} was refused 40 GiB")
    toast.get_by_role("button", name="Show panel").click()
    panel = ada.locator("#nbgpu-panel")
    expect(toast).to_have_count(0)
    expect(kernel_row(ada, notebook)).to_contain_text("1.2 GiB")
    expect(panel.get_by_role("region", name="What happened")).to_contain_text(f"{notebook} was refused 40 GiB")
    panel.get_by_role("radio", name="1 h", exact=True).check()
    panel.get_by_role("img", name="Memory in the last 1 h").wait_for()
    set_limit(ada, notebook, "2 GiB")
    expect(kernel_row(ada, notebook)).to_contain_text("from the notebook")
    assert "OUT_OF_MEMORY" in run_cell(ada, "print(gib(1))")
    expect(latest(ada, f"{notebook} was refused 1 GiB")).to_contain_text("2 GiB")
    run_cell(ada, "import nbgpu\nnbgpu.SliceMonitor()")
    expect(ada.locator(f"{CELLS} .nbgpu-monitor")).to_contain_text("of its own limit of 2 GiB")
    shot(ada, "9-notebook-7")

    kernel_menu(ada, notebook).get_by_text("Restart Kernel…").click()
    ada.locator(".jp-Dialog").get_by_role("button", name="Restart").click()
    assert run_cell(ada, ALLOCATE + "print(gib(1), gib(1))").split() == ["CUDA_SUCCESS", "CUDA_ERROR_OUT_OF_MEMORY"]
    expect(kernel_row(ada, notebook)).to_contain_text("from the notebook")
