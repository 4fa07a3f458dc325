"""Pods with slices on a real kubelet: what they see, what they are refused, what they cannot change.

The GPUs are *simulated*; agent, limiter, kubelet, containerd and scheduler are the real ones.
"""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest
from cuda_programs import CUDA, FILL, HOLD, LOOK
from node_kit import PLAIN, Node, Place, until

pytestmark = [pytest.mark.kubernetes, pytest.mark.root]
GIB = 1024**3
MIB = 1024**2
QUARTER = 79872 * MIB // 4
"""Of (80 GiB - 2 GiB), in whole MiB."""


def look(place: Place, pod: str, **more: Any) -> dict[str, int]:
    return json.loads(place.python(pod, LOOK, **more).strip().splitlines()[-1])


def test_a_pod_sees_its_slice_and_is_refused_beyond_it(node: Node, place: Place) -> None:
    claim = place.claim(250)
    pod = place.pod(claim)
    place.wait_running(pod)
    assert look(place, pod)["total"] == QUARTER
    assert look(place, pod)["count"] == 1
    told = json.loads(place.python(pod, FILL).strip().splitlines()[-1])
    assert told == {"total": QUARTER, "first": 0, "beyond": 2}
    table = place.exec(pod, "nvidia-smi")
    assert f"{QUARTER // MIB}MiB" in table
    assert "Simulated" in table
    assert place.exec(pod, "nvidia-smi", "-L").count("GPU ") == 1
    # nothing of it depends on the environment of the program
    assert f"{QUARTER // MIB}MiB" in place.exec(pod, "env", "-i", "/usr/bin/nvidia-smi")
    until("the slice to run", lambda: node.slices()[place.slice_id(claim)]["state"] == "running", 5)  # seen once a second
    until("the event", lambda: any(one["kind"] == "refused" for one in node.events(place.slice_id(claim))), 5)
    place.delete(pod)
    until("the slice to end", lambda: not node.slices())
    assert not node.cdi_specs()
    assert list((node.runtime / "slices").iterdir()) == []


def test_slices_share_a_device_and_the_third_waits(node: Node, place: Place) -> None:
    pods = []
    for _ in range(2):
        claim = place.claim(400)
        pods.append(place.pod(claim))
    for pod in pods:
        place.wait_running(pod)
    late = place.pod(place.claim(400))
    for pod in pods:
        told = json.loads(place.python(pod, FILL).strip().splitlines()[-1])
        assert (told["first"], told["beyond"]) == (0, 2)
    assert place.phase(late) == "Pending"
    assert len(node.slices()) == 2
    place.delete(pods[0])
    place.wait_running(late)
    assert len(node.slices()) == 2


def test_a_neighbour_is_not_seen(place: Place) -> None:
    holder = place.pod(place.claim(500), ["python3", "-c", HOLD])
    other = place.pod(place.claim(250))
    place.wait_running(holder)
    place.wait_running(other)
    until("memory to be held", lambda: "holding" in place.api.text(f"{place._path('pods', holder)}/log"))
    told = look(place, other)
    assert told["total"] - told["free"] < GIB  # its own context, nothing of what the other holds
    table = place.exec(other, "nvidia-smi")
    assert "python" not in table
    holders = place.exec(holder, "nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv")
    assert len(holders.strip().splitlines()) == 2


def test_a_pod_without_a_claim_sees_no_gpu(place: Place) -> None:
    env = {"env": [{"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}]}
    without = place.pod(None, container=env)
    control = place.pod(place.claim(250), container=env)
    place.wait_running(without)
    place.wait_running(control)
    told = place.python(without, LOOK, check=False)
    assert "libcuda.so.1" in told
    assert "cannot open shared object" in told
    assert "127" in place.exec(without, "sh", "-c", "nvidia-smi; echo $?")
    assert "No such file" in place.exec(without, "ls", "/run/nbgpu", check=False)
    assert look(place, control)["total"] == QUARTER
    assert place.exec(control, "sh", "-c", "echo $NVIDIA_VISIBLE_DEVICES").strip() == "void"  # the image's word counts for nothing


def test_containers_that_name_the_claim_share_it(node: Node, place: Place) -> None:
    claim = place.claim(250)
    image = {"image": PLAIN, "imagePullPolicy": "Never"}
    has = {"resources": {"claims": [{"name": "gpu"}]}}
    sleep = {"command": ["sleep", "inf"]}
    init = {"name": "init", **image, **has, "command": ["python3", "-c", LOOK]}
    sidecar = {"name": "side", **image, **has, **sleep, "restartPolicy": "Always"}
    pod = place.pod(
        claim,
        containers=[{"name": "second", **image, **has, **sleep}, {"name": "none", **image, **sleep}],
        spec={"initContainers": [sidecar, init]},
    )
    place.wait_running(pod)
    log = place.api.text(f"{place._path('pods', pod)}/log?container=init")
    assert json.loads(log.strip().splitlines()[-1])["total"] == QUARTER
    for name in ("main", "second", "side"):
        assert look(place, pod, container=name)["total"] == QUARTER
    assert "cannot open shared object" in place.python(pod, LOOK, container="none", check=False)
    # one sum for all: what one container holds the others do not get
    half = f"{CUDA}context(0)\nprint(take({QUARTER // 2 + GIB}), flush=True)\ntime.sleep(60)"
    place.exec(pod, "sh", "-c", f"python3 -c '{half}' > /tmp/out 2>&1 &", container="main")
    until("the first half", lambda: place.exec(pod, "cat", "/tmp/out").strip() == "0", 10)
    again = f"{CUDA}context(0)\nprint(take({QUARTER // 2 + GIB}))"
    assert place.python(pod, again, container="second").strip() == "2"
    assert list(node.slices()) == [place.slice_id(claim)]


def test_a_container_killed_for_memory_keeps_its_slice(node: Node, place: Place) -> None:
    claim = place.claim(250)
    eat = "import os, time\nif os.path.exists('/keep/second'): time.sleep(9999)\nopen('/keep/second', 'w').close()\nb = []\n" + (
        "while True: b.append(bytearray(8 << 20)); b[-1][::4096] = b'x' * len(b[-1][::4096])"
    )
    limits = {"resources": {"claims": [{"name": "gpu"}], "limits": {"memory": "96Mi"}}}
    mount = {"volumeMounts": [{"name": "keep", "mountPath": "/keep"}]}
    pod = place.pod(claim, ["python3", "-c", eat], container={**limits, **mount}, spec={"volumes": [{"name": "keep", "emptyDir": {}}]})

    def restarted() -> bool:
        [state] = (place.get_pod(pod) or {})["status"].get("containerStatuses") or [{}]
        return state.get("restartCount", 0) == 1 and bool(state.get("ready"))

    until("the container to be killed and started again", restarted, 60)
    [state] = (place.get_pod(pod) or {})["status"]["containerStatuses"]
    assert state["lastState"]["terminated"]["reason"] == "OOMKilled"
    assert look(place, pod)["total"] == QUARTER
    until("the slice to run", lambda: node.slices()[place.slice_id(claim)]["state"] == "running", 5)
    assert node.log().count(f"prepared slice={place.slice_id(claim)}") == 1  # the same slice all the time


RESTRICTED = {
    "securityContext": {
        "runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"},
    },
}  # fmt: skip
TAMPER = """
import os, socket
def says(what):
    try:
        what()
        return "DONE"
    except OSError as error:
        return error.strerror
for name in ("ctl", "slice.json", "api.sock"):
    path = f"/run/nbgpu/slice/{name}"
    print(name, says(lambda: open(path, "r+b")), says(lambda: os.unlink(path)), says(lambda: os.chmod(path, 0o666)))
for path in ("/run/nbgpu/slice/x", "/run/nbgpu/x2"):
    print(path, says(lambda: open(path, "x")))
for path in ("/etc/ld.so.preload", "/run/nbgpu/lib/libnbgpu.so", "/usr/bin/nvidia-smi", "/usr/lib/x86_64-linux-gnu/libcuda.so.1"):
    print(path, "open", says(lambda: open(path, "r+b")), "remove", says(lambda: os.unlink(path)))
print("use", says(lambda: open("/run/nbgpu/slice/use", "r+b")))
"""


@pytest.mark.parametrize("user", ["restricted", "root"])
def test_a_user_in_the_pod_cannot_raise_the_slice(node: Node, place: Place, user: str) -> None:
    claim = place.claim(250)
    pod = place.pod(claim, container=RESTRICTED if user == "restricted" else {})
    place.wait_running(pod)
    lines = place.python(pod, TAMPER).strip().splitlines()
    for line in lines:
        if line.startswith(("use", "/run/nbgpu/x2")):
            continue
        assert "DONE" not in line, line
    assert lines[-1] == "use DONE"  # the control: what a slice must be able to write, it can
    # its environment names another slice, and a larger one
    fake = 'mkdir -p /tmp/own; cp /run/nbgpu/slice/* /tmp/own/ 2>/dev/null; NBGPU_SLICE_DIR=/tmp/own LD_PRELOAD= python3 -c "$PROGRAM"'
    if user == "root":  # somewhere to write
        told = place.exec(pod, "env", f"PROGRAM={LOOK}", "sh", "-c", fake)
        assert json.loads(told.strip().splitlines()[-1])["total"] == QUARTER
    assert look(place, pod)["total"] == QUARTER
    # any user of the pod speaks to the agent
    ask = (
        "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/nbgpu/slice/api.sock'); "
        "s.sendall(b'GET /v1/usage HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n'); print(s.makefile().read())"
    )
    assert f'"memory_limit_bytes":{QUARTER}' in place.python(pod, ask)


def test_who_hides_the_limiter_in_a_user_namespace_is_detected(node: Node, place: Place) -> None:
    claim = place.claim(250)
    pod = place.pod(claim, container={"securityContext": {"runAsUser": 1000}})
    place.wait_running(pod)
    program = f"{CUDA}context(0)\nprint(json.dumps([info()[1], take({QUARTER * 2})]), flush=True)\ntime.sleep(20)"
    evade = 'touch /tmp/empty; mount --bind /tmp/empty /etc/ld.so.preload && python3 -c "$PROGRAM" > /tmp/out 2>&1'
    began = time.monotonic()
    place.exec(pod, "env", f"PROGRAM={program}", "sh", "-c", f"unshare -rm sh -c '{evade}' > /tmp/err 2>&1 &")
    out = until("the evader", lambda: place.exec(pod, "sh", "-c", "cat /tmp/out /tmp/err", check=False).strip(), 15)
    # not prevented: without the limiter it sees the whole GPU (and so this is the control of every test here)
    assert json.loads(out.splitlines()[0]) == [80 * GIB, 0], out
    found = until(
        "the watchdog", lambda: [one for one in node.events(place.slice_id(claim)) if one["kind"] in ("unlimited", "over-limit")], 10
    )
    print(f"detected as {found[0]['kind']} {time.monotonic() - began:.1f} s after it was started")
    assert "limiter" in found[0]["message"]


def test_restricted_pods_are_admitted_with_a_claim(node: Node) -> None:
    place = Place(node, {"pod-security.kubernetes.io/enforce": "restricted"}).start()
    try:
        pod = place.pod(place.claim(250), container=RESTRICTED)
        place.wait_running(pod)
        assert look(place, pod)["total"] == QUARTER
        assert f"{QUARTER // MIB}MiB" in place.exec(pod, "nvidia-smi")
    finally:
        place.close()


def test_a_slice_on_two_devices(place: Place) -> None:
    pod = place.pod(place.claim(250, device=[0, 1]))
    place.wait_running(pod)
    assert look(place, pod)["count"] == 2
    assert place.exec(pod, "nvidia-smi", "-L").count("GPU ") == 2
    mounts = place.exec(pod, "sh", "-c", "grep -c 'nbgpu/slice ' /proc/mounts")
    assert mounts.strip() == "1"  # two devices, one set of files


def test_a_forced_delete_frees_the_slice_once_nothing_runs(node: Node, place: Place) -> None:
    claim = place.claim(1000)
    pod = place.pod(claim, ["python3", "-c", HOLD])
    place.wait_running(pod)
    place.delete(pod, force=True)
    place.delete_claim(claim)
    # the container may outlive its pod's object by a moment: until then nobody else gets the room
    again = place.claim(1000, user="grace")
    late = place.pod(again)
    place.wait_running(late)
    assert list(node.slices()) == [place.slice_id(again)]
    assert look(place, late)["total"] == 4 * QUARTER


def test_claims_of_others_are_refused_with_plain_words(node: Node, place: Place) -> None:
    own = place.foreign_claim()
    forged = place.claim(250, key=b"another-key-than-the-installation's")
    for name in (own, forged):
        pod = place.pod(name)
        told = until("the refusal", lambda pod=pod: [one for one in place.events(pod) if "nbgpu" in one and "not made by" in one], 30)
        assert "agent.foreignClaims" in told[0]
        assert until("an event at the claim", lambda name=name: place.events(name))
        assert place.phase(pod) == "Pending"
        place.delete(pod)
    assert not node.slices()


def test_metrics_and_usage_tell_of_the_slice(node: Node, place: Place) -> None:
    claim = place.claim(250, user="grace")
    pod = place.pod(claim, ["python3", "-c", HOLD])
    place.wait_running(pod)
    sid = place.slice_id(claim)
    until("memory to be held", lambda: node.slices()[sid]["memory_used_bytes"] > GIB)
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(node.runtime / "agent.sock")), base_url="http://agent") as client:
        text = client.get("/metrics").text
    mine = [line for line in text.splitlines() if sid in line]
    assert any('user="grace"' in line and "nbgpu_slice_memory_limit_bytes" in line for line in mine)
