"""What the front end costs a browser and its server: a real JupyterLab in a real Chromium, the slice's agent a stand-in.

``python bench/ui.py [--quick] [--json] [--kernels 60] [--updates 100] [--seconds 20]``

* ``render_60_ms``: the panel open, with 60 kernels whose values all change: from the model's signal to the page's new layout, median
  of the updates (``render_60_p95_ms``); beside it the same page's time for as many rows of plain text (``plain_rows_ms``), and the CPU
  time of an update in the page's main thread (``render_60_cpu_ms``: script, style and layout), which a busy machine does not change;
* ``requests_per_s``, ``requests_hidden``: questions to nbgpu's API in so many seconds, with panel and status bar in view, and with the
  page hidden; beside it what JupyterLab asks of its own (``lab_requests_per_s``);
* ``agent_requests_per_s_1_tab``, ``agent_requests_per_s_100_tabs``: how often the Jupyter server asks the slice's agent what is used while
  one page, or a hundred, ask the server once a second;
* ``bundle_gzip_kb``: all that JupyterLab loads of the extension, each file gzipped; ``monitor_gzip_kb``: the widget of a cell.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests" / "lab"):
    sys.path.insert(0, str(folder))

from agent_pixel import BUILT, START_SECONDS, chromium, jupyterlab, why_not  # noqa: E402
from fake_slice_agent import FakeAgent  # noqa: E402
from tornado.httpclient import AsyncHTTPClient  # noqa: E402

MONITOR = BUILT.parent / "monitor"
SECOND = 1000
SETTLE_SECONDS = 3
TABS = 100
RENDER = """async ([kernels, updates, plainly]) => {
    const model = globalThis[Symbol.for('nbgpu.slice.model')];
    await model.poll.stop();
    const [device] = model.usage.devices;
    const gib = 2 ** 30;
    const usage = turn => ({
        ...model.usage,
        time: model.usage.time + turn + 1,
        now: undefined,
        agent: {ok: true, since: 0},
        devices: [{...device, memory_used_bytes: (turn % 20) * gib, compute_used_milli: turn % 250}],
        kernels: Array.from({length: kernels}, (_, i) => ({
            kernel_id: `kernel-${i}`, name: `ノート <b>${i}</b>.ipynb`, path: `deep/${i}.ipynb`, type: 'notebook',
            state: (i + turn) % 3 ? 'idle' : 'busy', state_seconds: (i + turn) % 3 ? 60 * i + turn : null,
            kernel_name: 'Python 3 (ipykernel)', language: 'python', limit_source: i % 2 ? 'notebook' : null,
            limit: {memory_bytes: i % 2 ? 5 * gib : null, compute_milli: null}, refusals: i % 4, launches: 9, idle_seconds: 60 + turn,
            devices: [{uuid: device.uuid, memory_used_bytes: (i + turn + 1) * 1e8, memory_peak_bytes: 1e11, compute_used_milli: turn % 7}],
        })),
    });
    const pause = () => new Promise(done => requestAnimationFrame(() => setTimeout(done)));
    const panel = document.querySelector('#nbgpu-panel');
    const timed = async act => {
        await pause();
        const seen = new Promise(done => {
            const watch = new MutationObserver(() => {
                watch.disconnect();
                panel.getBoundingClientRect();
                panel.scrollHeight;
                done(performance.now());
            });
            watch.observe(panel, {subtree: true, childList: true, characterData: true, attributes: true});
        });
        const began = performance.now();
        act();
        return (await seen) - began;
    };
    model._take(usage(0));
    await pause();
    const rows = panel.querySelectorAll('tbody[data-kernel]').length;
    const times = [];
    const plain = document.createElement('div');
    panel.append(plain);
    for (let turn = 1; turn <= updates; turn++) {
        times.push(await timed(() => !plainly ? model._take(usage(turn)) : plain.replaceChildren(...usage(turn).kernels.map(one => {
            const row = document.createElement('div');
            row.textContent = JSON.stringify(one);
            return row;
        }))));
    }
    plain.remove();
    return {rows, times};
}"""
HIDE = """() => {
    Object.defineProperty(document, 'hidden', {configurable: true, get: () => true});
    Object.defineProperty(document, 'visibilityState', {configurable: true, get: () => 'hidden'});
    document.dispatchEvent(new Event('visibilitychange'));
}"""


@contextmanager
def stand_in() -> Iterator[FakeAgent]:
    """Serve a slice."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    with tempfile.TemporaryDirectory(prefix="nbgpu-bench-ui-", dir="/tmp") as place:
        agent = FakeAgent(f"{place}/api.sock")
        asyncio.run_coroutine_threadsafe(agent.start(), loop).result(5)
        yield agent
        asyncio.run_coroutine_threadsafe(_end(agent), loop).result(5)
    loop.call_soon_threadsafe(loop.stop)


async def _end(agent: FakeAgent) -> None:
    """Stop the stand-in and what still waits in it."""
    await agent.stop()
    waiting = asyncio.all_tasks() - {asyncio.current_task()}
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


def gzip_kb(files: list[Path]) -> float:
    """Return what files weigh as a server sends them, kB of 1000 bytes."""
    return sum(len(gzip.compress(file.read_bytes())) for file in files) / 1000


def asked(page: Any, seconds: float) -> tuple[list[float], int]:
    """Return when the page asks nbgpu in so many seconds (CLOCK_MONOTONIC seconds), and how often it asks for anything else."""
    ours: list[float] = []
    others: list[str] = []

    def note(request: Any) -> None:
        if "/nbgpu/api/" in request.url:
            ours.append(time.monotonic())
        else:
            others.append(request.url)

    page.on("request", note)
    page.wait_for_timeout(seconds * SECOND)
    page.remove_listener("request", note)
    return ours, len(others)


async def agent_requests(agent: FakeAgent, address: str, tabs: int, seconds: float) -> float:
    """Return how often a second the server asks the agent what is used, while so many pages ask the server once a second, in turn."""
    client = AsyncHTTPClient(force_instance=True, max_clients=tabs)

    async def page(number: int) -> None:
        await asyncio.sleep(number / tabs)
        while True:
            await client.fetch(f"{address}/nbgpu/api/usage?after=0", headers={"Authorization": "token bench"})
            await asyncio.sleep(1)

    pages = asyncio.gather(*map(page, range(tabs)))
    await asyncio.sleep(1)
    before, began = agent.count("/v1/usage"), time.monotonic()
    await asyncio.wait([pages], timeout=seconds)
    rate = (agent.count("/v1/usage") - before) / (time.monotonic() - began)
    if pages.done():
        await pages  # it has failed
    pages.cancel()
    with suppress(asyncio.CancelledError):
        await pages
    return round(rate, 3)


def cpu_seconds(session: Any) -> float:
    """Return what the page's main thread has computed, in CPU time."""
    told = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
    return told["ScriptDuration"] + told["LayoutDuration"] + told["RecalcStyleDuration"]


def measure(kernels: int, updates: int, seconds: float) -> dict[str, Any]:
    """Measure in one JupyterLab."""
    with stand_in() as agent, jupyterlab(agent.socket_path) as address:
        server = address.split("/lab?")[0]
        of_one, of_many = (asyncio.run(agent_requests(agent, server, tabs, seconds)) for tabs in (1, TABS))
        found = {"agent_requests_per_s_1_tab": of_one, f"agent_requests_per_s_{TABS}_tabs": of_many}
        return found | measure_page(address, kernels, updates, seconds)


def measure_page(address: str, kernels: int, updates: int, seconds: float) -> dict[str, Any]:
    """Measure in one page."""
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(address, timeout=START_SECONDS * SECOND)
        page.get_by_role("button", name="Show the GPU panel").click(timeout=START_SECONDS * SECOND)
        page.wait_for_selector("#nbgpu-panel .nbgpu-Device")
        page.wait_for_timeout(SETTLE_SECONDS * SECOND)
        ours, labs = asked(page, seconds)
        page.evaluate(HIDE)
        page.wait_for_timeout(SETTLE_SECONDS * SECOND)
        hidden, _ = asked(page, seconds)
        page.reload()
        page.wait_for_selector(".nbgpu-Status", timeout=START_SECONDS * SECOND)
        if not page.locator("#nbgpu-panel").is_visible():
            page.get_by_role("button", name="Show the GPU panel").click()
        page.wait_for_selector("#nbgpu-panel .nbgpu-Device")
        page.wait_for_timeout(SETTLE_SECONDS * SECOND)
        cpu = page.context.new_cdp_session(page)
        cpu.send("Performance.enable", {"timeDomain": "threadTicks"})
        page.evaluate(RENDER, [kernels, updates, False])  # the first time compiles
        before = cpu_seconds(cpu)
        drawn = page.evaluate(RENDER, [kernels, updates, False])
        cpu_ms = SECOND * (cpu_seconds(cpu) - before) / (updates + 1)
        baseline = page.evaluate(RENDER, [kernels, updates, True])["times"]
        browser.close()
    if len(ours) < 2:
        raise SystemExit(f"the page has asked {len(ours)} times in {seconds:g} s: nothing was measured")
    if drawn["rows"] != kernels:
        raise SystemExit(f"the panel shows {drawn['rows']} kernels, not {kernels}: nothing was measured")
    render = sorted(drawn["times"])
    return {
        f"render_{kernels}_ms": round(statistics.median(render), 2),
        f"render_{kernels}_p95_ms": round(render[int(0.95 * len(render))], 2),
        f"render_{kernels}_cpu_ms": round(cpu_ms, 2),
        "plain_rows_ms": round(statistics.median(baseline), 2),
        "requests_per_s": round((len(ours) - 1) / (ours[-1] - ours[0]), 3),
        "lab_requests_per_s": round(labs / seconds, 3),
        "requests_hidden": len(hidden),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--kernels", type=int, default=60)
    parser.add_argument("--updates", type=int, help="of the panel (default: 100, quick 30)")
    parser.add_argument("--seconds", type=float, help="of counting requests, in view and hidden (default: 20, quick 8)")
    options = parser.parse_args()
    if why := why_not():
        raise SystemExit(f"The front end cannot be measured here: {why}.")
    updates = options.updates or (30 if options.quick else 100)
    seconds = options.seconds or (8 if options.quick else 20)
    results = measure(options.kernels, updates, seconds)
    loaded = [file for file in sorted((BUILT / "static").iterdir()) if file.suffix in (".js", ".css")]
    results |= {"bundle_gzip_kb": round(gzip_kb(loaded), 1)}
    results |= {"monitor_gzip_kb": round(gzip_kb([MONITOR / "monitor.js", MONITOR / "monitor.css"]), 1)}
    results |= {"kernels": options.kernels, "updates": updates, "seconds": seconds, "simulated": True}
    results |= {"machine": f"{platform.machine()}, {platform.system()}"}
    rows = [
        (f"panel with {options.kernels} kernels, one update", f"render_{options.kernels}_ms", "ms", "< 50"),
        ("the slowest in twenty", f"render_{options.kernels}_p95_ms", "ms", ""),
        ("CPU time of one update", f"render_{options.kernels}_cpu_ms", "ms", ""),
        ("as many rows of plain text", "plain_rows_ms", "ms", "baseline"),
        ("requests, page in view", "requests_per_s", "/s", "<= 1"),
        ("JupyterLab's own", "lab_requests_per_s", "/s", "baseline"),
        ("requests, page hidden", "requests_hidden", "", "0"),
        ("the server's to the agent, one page", "agent_requests_per_s_1_tab", "/s", "baseline"),
        (f"the server's to the agent, {TABS} pages", f"agent_requests_per_s_{TABS}_tabs", "/s", "the same"),
        ("extension, gzipped", "bundle_gzip_kb", "kB", "<= 150"),
        ("widget of a cell, gzipped", "monitor_gzip_kb", "kB", ""),
    ]
    print("the front end in JupyterLab, Chromium; the slice is simulated")
    for what, name, unit, goal in rows:
        print(f"  {what:42} {results[name]:>8} {unit:3} {goal}")
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
