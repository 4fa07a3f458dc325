"""The whole line on a cluster, as an administrator installs it and as its users see it: chart, hub, servers and plain pods, all as pods.

One node's GPU is simulated; the kubelet, the scheduler, JupyterHub, JupyterLab and Chromium are real. The chapters share what runs and go
on from each other, in this order; each step leaves a screenshot in ``shots/``.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator

import browser_kit
import httpx
import pytest
import yaml
from chart_kit import ROOT, Api, Json, image, kill, namespace, until
from lab_pages import SECOND, ask_for_size, log_in, new_notebook, run_cell, size_granted, size_refused, start, stop
from playwright.sync_api import Browser, Page, expect
from prometheus_client.parser import text_string_to_metric_families
from stack_kit import DEVICE_BYTES, GIB, SHOTS, Stack, stack
from z2jh_kit import Hub, without_nbgpu

from nbgpu.claims import parse_quantity

pytestmark = [pytest.mark.kubernetes, pytest.mark.browser, pytest.mark.timeout(600)]

QUARTER_BYTES = DEVICE_BYTES // 4
OUT_OF_MEMORY = 2
EXAMPLE = ROOT / "deploy" / "examples" / "pod-with-a-claim.yaml"
# nothing but what every Python has: no library of CUDA is in the image
ASK = """
import ctypes, json, subprocess
cuda, nvml = ctypes.CDLL("libcuda.so.1"), ctypes.CDLL("libnvidia-ml.so.1")
context, device, free, total = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
assert cuda.cuInit(0) == 0 and cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0 and cuda.cuCtxSetCurrent(context) == 0
def gib(n):
    return cuda.cuMemAlloc_v2(ctypes.byref(ctypes.c_uint64()), ctypes.c_size_t(int(n * 2**30)))
def seen():
    memory, count = (ctypes.c_ulonglong * 3)(), ctypes.c_uint()
    assert cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
    assert nvml.nvmlInit_v2() == 0 and nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0
    assert nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)) == 0 and nvml.nvmlDeviceGetMemoryInfo(device, memory) == 0
    smi = subprocess.run(["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"], capture_output=True, text=True)
    return {"driver": total.value, "nvml": memory[0], "smi": int(smi.stdout) << 20, "used": memory[2], "count": count.value}
"""

OWN = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print(json.dumps({**seen(), "beyond": gib(40), "within": gib(10)}))
time.sleep(120)
"""
# device and inode of the limiter's file: its path is the same in every container
LIMITER = "print(*{':'.join(line.split()[3:5]) for line in open('/proc/self/maps') if line.endswith('libnbgpu.so\\n')})"


@pytest.fixture(scope="module")
def api() -> Api:
    return Api()


@pytest.fixture(scope="module")
def running(api: Api) -> Iterator[tuple[Stack, Hub]]:
    with stack(api, pool={"config": {"quotas": {"default": {"limit": 2}}}}) as made:
        yield made


@pytest.fixture(scope="module")
def pages() -> dict[str, Page]:
    """Who has which page open, between the chapters."""
    return {}


@pytest.fixture
def ada(chromium: Browser, hub: Hub, pages: dict[str, Page]) -> Page:
    """Ada's page from an earlier chapter; started with a quarter where a chapter is run by itself."""
    if "ada" not in pages:
        pages["ada"] = with_notebook(chromium, hub, "ada", "quarter")
        run_cell(pages["ada"], ASK)
        pages["ada"].locator(".nbgpu-Status").click()
        pages["ada"].wait_for_selector("#nbgpu-panel:visible")
    return pages["ada"]


@pytest.fixture
def grace(chromium: Browser, hub: Hub, pages: dict[str, Page]) -> Page:
    """Grace's page, with a half, the same way."""
    if "grace" not in pages:
        pages["grace"] = with_notebook(chromium, hub, "grace", "half")
    return pages["grace"]


def with_notebook(chromium: Browser, hub: Hub, user: str, slug: str) -> Page:
    """Return a user's page with an empty notebook on a server of this profile."""
    page = log_in(chromium, hub, user)
    start(page, slug)
    new_notebook(page)
    return page


def shot(page: Page, name: str) -> None:
    browser_kit.shot(page, SHOTS, name)


def kubectl(*arguments: str) -> str:
    """Run kubectl as people do; skip where there is none."""
    program = shutil.which("kubectl")
    if program is None:
        pytest.skip("no kubectl on this machine")
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=True).stdout


def limit_holds(page: Page) -> None:
    """Assert that a running notebook may still not pass its limit, and may use what is free below it."""
    said = run_cell(page, "print(json.dumps([gib(40), gib(0.5), seen()['driver']]))")
    refused, allowed, total = json.loads(said)
    assert (refused, allowed, total) == (OUT_OF_MEMORY, 0, QUARTER_BYTES), said


def test_a_server_with_a_quarter(chromium: Browser, nbgpu: Stack, hub: Hub, pages: dict[str, Page]) -> None:
    """Start page, JupyterLab, every way of asking, the limit; the pod is a plain, restricted one."""
    ada = pages["ada"] = log_in(chromium, hub, "ada")
    quarter = ada.locator(".nbgpu-row[data-slug=quarter]")
    expect(quarter).to_contain_text("Free now")
    expect(quarter).to_contain_text("19.5 GiB, at least a quarter of the GPU's time")
    shot(ada, "1-start-page")
    start(ada, "quarter")
    new_notebook(ada)
    seen = json.loads(run_cell(ada, ASK + "print(json.dumps(seen()))"))
    assert (seen["driver"], seen["nvml"], seen["smi"], seen["count"]) == (QUARTER_BYTES,) * 3 + (1,), seen

    expect(ada.locator(".nbgpu-Status")).to_contain_text("of 19.5 GiB")
    ada.locator(".nbgpu-Status").click()
    ada.wait_for_selector("#nbgpu-panel:visible")
    assert run_cell(ada, "print(gib(10), gib(10))").split() == ["0", str(OUT_OF_MEMORY)]
    notice = ada.locator(".nbgpu-Latest").filter(has_text="Untitled.ipynb was refused 10 GiB: this server's slice of 19.5 GiB")
    expect(notice).to_be_visible(timeout=5 * SECOND)
    expect(ada.locator("#nbgpu-panel tbody").filter(has_text="Untitled.ipynb")).to_contain_text("1 refusal")
    ada.wait_for_timeout(1200)  # a notice slides in; let the picture be still
    shot(ada, "2-lab-refused")
    assert "19.5 GiB" in run_cell(ada, "%load_ext nbgpu_lab\n%gpu")

    nbgpu.check(claims=1)
    [claim] = nbgpu.claims()
    pod = hub.server("ada")
    assert claim["metadata"]["annotations"]["nbgpu.io/owner"] == json.dumps(
        {"hub": nbgpu.hub_name, "server": "", "user": "ada"}, sort_keys=True
    )
    assert [one["name"] for one in claim["status"]["reservedFor"]] == [pod["metadata"]["name"]]
    [container] = pod["spec"]["containers"]
    assert "hostPath" not in json.dumps(pod["spec"])
    assert "initContainers" not in pod["spec"]
    assert {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"} in container["env"]
    told = kubectl("get", "resourceclaims", "-A", "-l", "nbgpu.io/slice", "-L", "nbgpu.io/hub")
    assert re.search(rf"{hub.namespace} +nbgpu-[0-9a-f]{{32}} +allocated,reserved +\S+ +{nbgpu.hub_name}", told), told
    print(told)


def test_a_second_user_and_the_queue(chromium: Browser, nbgpu: Stack, hub: Hub, pages: dict[str, Page]) -> None:
    """Grace beside Ada on the same GPU sees nothing of her; Lin waits for a whole one, sees where she stands, and leaves."""
    grace = pages["grace"] = log_in(chromium, hub, "grace")
    start(grace, "half")
    lin = log_in(chromium, hub, "lin")
    whole = lin.locator(".nbgpu-row[data-slug=whole]")
    expect(whole).not_to_contain_text("Free now", timeout=6 * SECOND)
    start(lin, "whole")
    progress = lin.locator("#progress-message")
    expect(progress).to_contain_text(re.compile("1st|next", re.IGNORECASE))
    expect(progress).to_contain_text("GPU")
    shot(lin, "3-in-the-queue")
    lin.locator("form.nbgpu-leave button:visible").first.click()
    lin.wait_for_selector("#nbgpu")
    shot(lin, "4-left-the-queue")

    new_notebook(grace)
    seen = json.loads(run_cell(grace, ASK + "gib(1)\nprint(json.dumps(seen()))"))
    assert (seen["driver"], seen["used"]) == (2 * QUARTER_BYTES, GIB + 300 * 2**20)
    nbgpu.check(claims=2)
    limit_holds(pages["ada"])
    lin.context.close()


@pytest.mark.usefixtures("grace")
def test_another_size_from_the_panel(nbgpu: Stack, ada: Page) -> None:
    """Ada's quarter, beside Grace's half, is not made three quarters; it is made half while her notebook runs, and a quarter again."""
    ask_for_size(ada, "3/4")
    size_refused(ada, "GPU 0 has 19.5 GiB of memory free, and 39 GiB more are asked for.")
    shot(ada, "4-resize-refused")
    limit_holds(ada)
    for share, memory, quarters in (("1/2", "39 GiB", 2), ("1/4", "19.5 GiB", 1)):
        ask_for_size(ada, share)
        size_granted(ada, share, memory)
        shot(ada, f"4-resized-to-{quarters}-quarters")
        seen = json.loads(run_cell(ada, "print(json.dumps(seen()))"))
        assert (seen["driver"], seen["nvml"], seen["smi"]) == (quarters * QUARTER_BYTES,) * 3, seen
        until("the limits in force at the claim", lambda n=quarters: reported(nbgpu.claims()) == {n * QUARTER_BYTES}, 20, nbgpu.log)
        # what kube-scheduler counts of a claim stays; the node publishes as much less as the slice has grown
        until("the room that is left", lambda n=quarters: published(nbgpu) == DEVICE_BYTES - (n - 1) * QUARTER_BYTES, 20, nbgpu.log)
    limit_holds(ada)
    nbgpu.check(claims=2)


@pytest.mark.usefixtures("ada")
def test_stopping_frees_the_claim(nbgpu: Stack, hub: Hub, grace: Page, pages: dict[str, Page]) -> None:
    """Grace's half is free when her pod is gone."""
    del pages["grace"]
    stop(grace, hub)
    nbgpu.check(claims=1)
    grace.goto(hub.url + "/hub/spawn")
    expect(grace.locator(".nbgpu-row[data-slug=half]")).to_contain_text("Free now", timeout=10 * SECOND)
    grace.context.close()


@pytest.mark.parametrize("part", ["pool", "agent", "hub"])
def test_a_part_is_killed_while_a_notebook_runs(nbgpu: Stack, hub: Hub, ada: Page, part: str) -> None:
    """SIGKILL: the notebook goes on inside its limit, and what comes back knows everything."""
    server = hub.server("ada")["metadata"]["uid"]
    pod = {"pool": nbgpu.leader, "agent": lambda: nbgpu.pods("agent")[0], "hub": hub.pod}[part]()
    kill(pod)
    limit_holds(ada)
    until(f"the {part} to be back", lambda: nbgpu.restarted(pod), 90, nbgpu.log)
    hub.rolled_out()
    nbgpu.settled()
    limit_holds(ada)
    assert hub.server("ada")["metadata"]["uid"] == server
    nbgpu.check(claims=1)
    if part == "agent":  # the panel found it again
        expect(ada.locator("#nbgpu-panel")).not_to_contain_text("does not answer")
        shot(ada, "5-after-the-agent-was-killed")


def test_an_upgrade_under_a_running_notebook(chromium: Browser, nbgpu: Stack, hub: Hub, ada: Page) -> None:
    """`helm upgrade`: another agent takes over, with other files where the cluster has its image; old and new servers stay apart."""
    before = nbgpu.pods("agent")[0]["metadata"]["name"]
    other = nbgpu.has_image(f"{image('agent')}-next")

    def change(values: Json) -> None:
        values["agent"].update(foreignClaims=True, metrics={"enabled": True})
        if other:
            values["images"]["agent"]["tag"] += "-next"

    nbgpu.upgrade(change)
    assert nbgpu.pods("agent")[0]["metadata"]["name"] != before
    limit_holds(ada)
    nbgpu.check(claims=1)

    grace = with_notebook(chromium, hub, "grace", "half")
    seen = json.loads(run_cell(grace, ASK + "refused = gib(40)\nprint(json.dumps({**seen(), 'refused': refused, 'held': gib(30)}))"))
    assert (seen["driver"], seen["refused"], seen["held"]) == (2 * QUARTER_BYTES, OUT_OF_MEMORY, 0)
    files = [run_cell(page, LIMITER).split() for page in (ada, grace)]
    assert [len(one) for one in files] == [1, 1]
    assert (files[0] != files[1]) == other, files
    limit_holds(ada)
    nbgpu.check(claims=2)
    stop(grace, hub)
    nbgpu.check(claims=1)
    grace.context.close()


def test_a_job_with_a_claim_of_its_own(api: Api, nbgpu: Stack, ada: Page) -> None:
    """The shipped example, no hub in sight: same limits, same view, same metrics."""
    nbgpu.upgrade(lambda values: values["agent"].update(foreignClaims=True, metrics={"enabled": True}))
    with namespace(api, f"mine-{nbgpu.run}", {**nbgpu.marks, "pod-security.kubernetes.io/enforce": "restricted"}) as mine:
        template, job = yaml.safe_load_all(EXAMPLE.read_text())
        container = job["spec"]["template"]["spec"]["containers"][0]
        container.update(image=image("user"), imagePullPolicy="IfNotPresent", command=["python", "-uc", ASK + OWN])
        path = f"/apis/resource.k8s.io/v1/namespaces/{mine}/resourceclaimtemplates"
        until("the new rule to hold", lambda: api.call("POST", path, template)[0] == 201, 20)
        api.done("POST", f"/apis/batch/v1/namespaces/{mine}/jobs", job)
        [pod] = until("the job's pod", lambda: api.pods(mine, {"job-name": "train"}))
        seen = json.loads(until("its words", lambda: words(api, mine, pod["metadata"]["name"]), 60, nbgpu.log))
        assert (seen["driver"], seen["nvml"], seen["smi"], seen["count"]) == (20 * GIB,) * 3 + (1,)
        assert (seen["beyond"], seen["within"]) == (OUT_OF_MEMORY, 0)
        nbgpu.check(claims=2)
        [claim] = [one["metadata"]["name"] for one in nbgpu.claims() if one["metadata"]["namespace"] == mine]
        owner = {"hub": "kubernetes", "user": mine, "server": claim}
        assert until("its use in the metrics", lambda: used(nbgpu, owner) == 10 * GIB + 300 * 2**20, 10)
        limit_holds(ada)
        shown = nbgpu.run_in(nbgpu.pods("agent")[0], "python", "-m", "nbgpu", "status")
        assert claim[:12] in shown, shown
    nbgpu.check(claims=1)


def test_uninstalling_leaves_a_plain_hub_and_the_running_server(chromium: Browser, nbgpu: Stack, hub: Hub, ada: Page) -> None:
    """The steps of docs/kubernetes.md, and what it says of doing the second too early."""
    server = hub.server("ada")["metadata"]["uid"]
    hub.upgrade(without_nbgpu(hub.values))
    limit_holds(ada)
    mary = log_in(chromium, hub, "mary", lands_on="#spawn_form, #start")
    assert mary.locator("#nbgpu").count() == 0
    shot(mary, "6-a-plain-hub")
    mary.click("#spawn_form input[type=submit], #spawn_form button[type=submit]")
    mary.wait_for_url(re.compile(r".*/user/mary/.*"), timeout=120 * SECOND)
    without = hub.server("mary")
    assert "resourceClaims" not in without["spec"]
    # control: what a notebook with a slice could do above is nothing that every pod can
    assert "no GPU" in nbgpu.run_in(without, "sh", "-c", f"python -c '{ASK}' 2>/dev/null || echo no GPU")
    mary.context.close()

    nbgpu.uninstall()
    try:
        limit_holds(ada)
        assert hub.server("ada")["metadata"]["uid"] == server
        shot(ada, "7-after-the-uninstall")
        ada.goto(hub.url + "/hub/home", wait_until="networkidle")  # before its scripts are there the button does nothing
        ada.click("#stop")
        until("the server to be asked to end", lambda: not hub.servers("ada"), 30)
        time.sleep(3)
        assert nbgpu.claims(), "without an agent the kubelet keeps pod and claim"
    finally:
        nbgpu.helm("install")
    until("the claim to go once an agent is there", lambda: not nbgpu.claims(), 90, nbgpu.log)


def words(api: Api, where: str, pod: str) -> str:
    """Return what a pod's program has printed as JSON."""
    status = api.done("GET", f"/api/v1/namespaces/{where}/pods/{pod}")["status"]
    assert status["phase"] in ("Pending", "Running"), (status, api.log(where, pod))
    return next((line for line in api.log(where, pod).splitlines() if line.startswith('{"driver"')), "")


def reported(claims: list[Json]) -> set[int]:
    """Return the bytes that the agent says are in force, of claims whose limits were changed."""
    return {one["data"]["memory_bytes"] for claim in claims for one in claim.get("status", {}).get("devices", [])}


def published(nbgpu: Stack) -> int:
    """Return the bytes that may be allocated of the node's GPU."""
    [capacity] = [one["capacity"]["memory"]["value"] for found in nbgpu.resource_slices() for one in found["spec"]["devices"]]
    return parse_quantity(capacity)


def used(nbgpu: Stack, owner: dict[str, str]) -> float:
    """Return the bytes that a slice's owner uses, by what the agent tells Prometheus."""
    address = nbgpu.pods("agent")[0]["status"]["podIP"]
    text = httpx.get(f"http://{address}:8201/metrics", timeout=10, trust_env=False).text
    samples = [
        one for family in text_string_to_metric_families(text) for one in family.samples if one.name == "nbgpu_slice_memory_used_bytes"
    ]
    return sum(one.value for one in samples if owner.items() <= one.labels.items())
