"""The agent, the kubelet or the claim's pod ended at the worst moments: slices are neither lost nor doubled, limits hold meanwhile.

``NBGPU_CLUSTER_COMMAND``: a program that takes ``restart kubelet``; without it the tests that need it skip.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cuda_programs import FILL, HOLD, LOOK
from node_kit import PLAIN, ROOT, Node, Place, until

pytestmark = [pytest.mark.kubernetes, pytest.mark.root]
MIB = 1024**2
QUARTER = 79872 * MIB // 4


def state(place: Place, pod: str) -> dict[str, int]:
    return json.loads(place.exec(pod, "cat", "/tmp/state"))


PREPARE = ("prepare-begin", "prepare-noted", "prepare-sliced", "prepare-done")
UNPREPARE = ("unprepare-begin", "unprepare-hidden", "unprepare-ended", "unprepare-done")


def test_killed_anywhere_in_prepare_and_unprepare(node: Node, place: Place) -> None:
    """At each marked point once; what is left is asked for again, and the claim has one slice, then none."""
    hits: dict[str, int] = {}

    def next_agent(point: str) -> None:
        node.launch(env={"NBGPU_MARK": f"{point}:1"} if point else {})
        node.wait_ready(or_killed=True)  # the kubelet may be quicker

    def killed_at(point: str) -> None:
        assert node.process is not None
        assert node.process.wait(60) == -9
        hits[point] = hits.get(point, 0) + 1

    claim = place.claim(250)
    node.stop()
    next_agent(PREPARE[0])
    pod = place.pod(claim)
    for point, following in zip(PREPARE, (*PREPARE[1:], UNPREPARE[0]), strict=True):
        killed_at(point)
        next_agent(following)
        if node.process.poll() is not None:
            continue
        there = len(node.slices()), len(node.cdi_specs())
        # halves are gone or whole once an agent is there again
        assert there == ((1, 1) if point in ("prepare-sliced", "prepare-done") else (0, 0)), point
        place.nudge(pod)
    place.wait_running(pod)
    assert json.loads(place.python(pod, LOOK).strip().splitlines()[-1])["total"] == QUARTER
    assert list(node.slices()) == [place.slice_id(claim)]
    place.delete(pod, wait=False)
    for point, following in zip(UNPREPARE, (*UNPREPARE[1:], ""), strict=True):
        killed_at(point)
        next_agent(following)
        place.nudge(pod)
    until("the end of the pod", lambda: place.get_pod(pod) is None, 100)
    until("the end of the slice", lambda: not node.slices() and not node.cdi_specs())
    print(f"killed at: {hits}")
    assert sorted(hits) == sorted(PREPARE + UNPREPARE)
    assert json.loads((node.runtime / "claims.json").read_text())["claims"] == {}


def test_limits_hold_while_the_agent_is_away(node: Node, place: Place) -> None:
    holder = place.pod(place.claim(250), ["python3", "-c", HOLD])
    other = place.pod(place.claim(250))
    place.wait_running(holder)
    place.wait_running(other)
    node.kill()
    before = state(place, holder)
    told = json.loads(place.python(other, FILL).strip().splitlines()[-1])
    assert (told["first"], told["beyond"]) == (0, 2)
    after = until("the holder to go on", lambda: (now := state(place, holder))["tries"] > before["tries"] and now)
    assert after["tries"] == after["refused"]
    assert after["total"] == QUARTER
    node.launch()
    node.wait_ready()
    assert len(node.slices()) == 2
    assert {one["state"] for one in node.slices().values()} == {"running"}
    assert state(place, holder)["refused"] > after["refused"]
    usage = place.python(other, API)
    assert f'"memory_limit_bytes":{QUARTER}' in usage  # the same pod reaches the new agent


API = (
    "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/nbgpu/slice/api.sock'); "
    "s.sendall(b'GET /v1/usage HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n'); print(s.makefile().read())"
)


def test_a_pod_that_ends_while_the_agent_is_away_is_let_go(node: Node, place: Place) -> None:
    claim = place.claim(1000)
    pod = place.pod(claim)
    place.wait_running(pod)
    node.kill()
    place.delete(pod, wait=False)
    time.sleep(2)
    node.launch()
    node.wait_ready()
    until("the pod to be gone", lambda: place.get_pod(pod) is None, 100)
    until("the slice to end", lambda: not node.slices() and not node.cdi_specs(), 30)


def test_what_is_lost_of_a_claim_is_written_again(node: Node, place: Place) -> None:
    claim = place.claim(250)
    pod = place.pod(claim, ["python3", "-c", "import time; time.sleep(9999)"])
    place.wait_running(pod)
    node.kill()
    for spec in node.cdi_dir.glob("gpu.nbgpu.io-*.json"):
        spec.unlink()
    (node.cdi_dir / "gpu.nbgpu.io-00000000-0000-0000-0000-000000000000.json").write_text("{}")
    (node.runtime / "claims.json").write_text("{ not json")
    node.launch()
    node.wait_ready()
    assert "cannot be read" in node.log()
    # the record of the slice is enough to let go of it
    assert list(node.slices()) == [place.slice_id(claim)]
    assert "00000000-0000-0000-0000-000000000000" not in node.cdi_specs()
    place.delete(pod)
    until("the slice to end", lambda: not node.slices())


def test_cdi_specifications_lost_with_a_reboot_are_there_for_the_containers(node: Node, place: Place) -> None:
    pod = place.pod(place.claim(250))
    place.wait_running(pod)
    node.kill()
    before = {spec.name: spec.read_text() for spec in node.cdi_dir.glob("gpu.nbgpu.io-*.json")}
    for name in before:
        (node.cdi_dir / name).unlink()
    node.launch()
    node.wait_ready()
    assert {spec.name: spec.read_text() for spec in node.cdi_dir.glob("gpu.nbgpu.io-*.json")} == before
    place.exec(pod, "sh", "-c", "kill -9 -1", check=False)  # the container starts again, with the specification


def test_the_kubelet_is_killed_between_prepare_and_start(node: Node, place: Place) -> None:
    command = os.environ.get("NBGPU_CLUSTER_COMMAND")
    if not command:
        pytest.skip("NBGPU_CLUSTER_COMMAND is not set: nothing here can restart the kubelet")
    claim = place.claim(250)
    # the claim is prepared with the pod's sandbox; its container starts only when the first one has ended
    wait = {"name": "wait", "image": PLAIN, "imagePullPolicy": "Never", "command": ["sleep", "12"]}
    pod = place.pod(claim, spec={"initContainers": [wait]})
    until("the slice", lambda: place.slice_id(claim) in node.slices(), 30)
    subprocess.run([*command.split(), "restart", "kubelet"], check=True, timeout=120, stdout=subprocess.DEVNULL)
    assert place.phase(pod) == "Pending"
    place.wait_running(pod, 120)
    assert json.loads(place.python(pod, LOOK).strip().splitlines()[-1])["total"] == QUARTER
    assert list(node.slices()) == [place.slice_id(claim)]
    # a kubelet that starts deletes all ResourceSlices of its node: they come back
    until("the ResourceSlice", node.resource_slice)
    place.delete(pod)
    until("the slice to end", lambda: not node.slices() and not node.cdi_specs(), 30)


def test_an_agent_of_another_version_takes_over_under_running_pods(node: Node, place: Place, tmp_path: Path) -> None:
    """As a DaemonSet does with a surge: the new one starts, the old one ends once the new one is there."""
    old_pod = place.pod(place.claim(250), ["python3", "-c", HOLD])
    place.wait_running(old_pod)
    library = place.exec(old_pod, "sh", "-c", "grep -h libnbgpu.so /proc/[0-9]*/maps | head -1")
    newer = tmp_path / "newer"
    shutil.copytree(ROOT / "nodeagent" / "nbgpu_agent", newer / "nbgpu_agent")
    shutil.copytree(ROOT / "nbgpu", newer / "nbgpu")
    with open(newer / "nbgpu_agent" / "_lib" / "libnbgpu.so", "ab") as file:
        file.write(b"a newer one")
    old = node.process
    assert old is not None
    env = {"PYTHONPATH": str(newer)}
    # not by `launch`, which puts this checkout's packages first
    program = f"import sys; sys.path[:0] = [{str(newer)!r}]; from nbgpu_agent.main import main; sys.exit(main())"
    registered = node.log().count("registered with the kubelet")
    node.launch(env=env, program=[sys.executable, "-c", program])
    until("the new agent to be registered", lambda: node.log().count("registered with the kubelet") > registered, 60)
    # both are there: the kubelet calls the new one, which passes it on
    between = place.pod(place.claim(250))
    place.wait_running(between)
    assert old.poll() is None
    late = place.pod(place.claim(250))
    old.terminate()
    assert old.wait(20) == 0
    place.wait_running(late)
    node.wait_registered()
    assert len(node.slices()) == 3
    for pod in (old_pod, between, late):
        assert json.loads(place.python(pod, LOOK).strip().splitlines()[-1])["total"] == QUARTER
    assert len(list((node.runtime / "lib").iterdir())) == 2
    assert place.exec(old_pod, "sh", "-c", "grep -h libnbgpu.so /proc/[0-9]*/maps | head -1") == library
    seen = state(place, old_pod)
    assert seen["tries"] == seen["refused"]
    fresh = place.pod(place.claim(250))
    place.wait_running(fresh)
    sizes = [place.exec(pod, "stat", "-c", "%s", "/run/nbgpu/lib/libnbgpu.so").strip() for pod in (old_pod, fresh)]
    assert int(sizes[1]) == int(sizes[0]) + len("a newer one")
    node.restart()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--reserve=lots"], "--reserve"),
        (["--devices=0-1"], "--devices names '0-1'"),
        (["--memory-backend=driver"], "memory"),
    ],
)
def test_an_agent_that_cannot_serve_does_not_take_the_place_of_one_that_does(node: Node, options: list[str], words: str) -> None:
    """A DaemonSet ends the old agent once the new one is ready: a slip of the administrator's must not take the node."""
    old = node.process
    assert old is not None
    node.wait_registered()
    registered, said = node.log().count("registered with the kubelet"), len(node.log())
    new = node.launch(*options)
    assert new.wait(60) == 1
    news = node.log()[said:]
    assert words in news.strip().splitlines()[-1], news
    assert "Traceback" not in news
    assert node.log().count("registered with the kubelet") == registered, "the kubelet was told of it"
    assert old.poll() is None
    assert node.admin_up()
    node.process = old


def test_the_resource_slice_is_kept_as_it_should_be(node: Node, place: Place) -> None:
    there = f"/apis/resource.k8s.io/v1/resourceslices/{node.name}-gpu.nbgpu.io"
    first = node.resource_slice()
    assert first is not None
    assert first["metadata"]["ownerReferences"][0]["kind"] == "Node"
    assert len(first["spec"]["devices"]) == 2
    node.api.done("DELETE", there)
    again = until(
        "it to be made again", lambda: (now := node.resource_slice()) and now["metadata"]["uid"] != first["metadata"]["uid"] and now
    )
    assert again["spec"]["pool"]["generation"] >= first["spec"]["pool"]["generation"]
    edited = json.loads(json.dumps(again))
    del edited["spec"]["devices"][1]
    node.api.done("PUT", there, edited)
    mended = until("it to be mended", lambda: (now := node.resource_slice()) and len(now["spec"]["devices"]) == 2 and now)
    assert mended["spec"]["pool"]["generation"] > again["spec"]["pool"]["generation"]
    assert len(json.dumps(mended)) > 100


def test_devices_of_others_are_not_published(node: Node, place: Place) -> None:
    device = node.devices()[1]
    theirs = {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceSlice",
        "metadata": {"name": f"{node.name}-other-driver"},
        "spec": {
            "driver": "gpu.example.org",
            "nodeName": node.name,
            "pool": {"name": node.name, "generation": 1, "resourceSliceCount": 1},
            "devices": [{"name": "gpu-1", "attributes": {"uuid": {"string": device.uuid}}}],
        },
    }
    node.api.done("POST", "/apis/resource.k8s.io/v1/resourceslices", theirs)
    try:
        until("the device to be withheld", lambda: len((node.resource_slice() or {"spec": {"devices": []}})["spec"]["devices"]) == 1)
        assert "driver gpu.example.org hands it out already" in node.log()
    finally:
        node.api.done("DELETE", f"/apis/resource.k8s.io/v1/resourceslices/{node.name}-other-driver")
    until("the device to be published again", lambda: len((node.resource_slice() or {"spec": {"devices": []}})["spec"]["devices"]) == 2)
