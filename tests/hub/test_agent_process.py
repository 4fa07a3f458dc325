"""The agent as a process: slices from PUT to their end, restarts, adoption, limits, events."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_harness import AgentProcess, Tenant, missing_libraries, own_agent, sleeper, slice_client, tenants, until, usage

from nbgpu.errors import NbgpuError
from nbgpu.quantities import GIB, MIB
from nbgpu_agent import layout

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(missing_libraries() is not None, reason=str(missing_libraries()))]


@pytest.fixture(scope="module")
def shared() -> Iterator[AgentProcess]:
    with own_agent() as process:
        yield process


@pytest.fixture
def agent(shared: AgentProcess) -> Iterator[AgentProcess]:
    """The agent with no slice on it, before and after."""
    yield shared
    for slice_id in shared.slices():
        shared.delete(slice_id)
    until(lambda: not shared.slices(), 10, "the end of all slices")


@pytest.fixture
def tenant() -> Iterator[Callable[..., Tenant]]:
    with tenants() as make:
        yield make


# ---- a slice's life


def test_a_prepared_slice_waits_for_its_first_process_and_ends_by_delete_only(agent: AgentProcess) -> None:
    wanted = agent.slice(250)
    launch = agent.put(wanted)
    assert wanted.devices[0].memory_bytes == 19 * GIB + 512 * MIB
    assert agent.put(wanted) == launch
    time.sleep(1.2)  # a tick of the monitor must not end it
    assert agent.slices()[wanted.slice_id]["state"] == "prepared"
    assert agent.delete(wanted.slice_id)
    assert agent.slices() == {}
    assert not Path(launch.slice_dir).exists()
    assert agent.delete(wanted.slice_id), "idempotent"


def test_a_slice_ends_within_half_a_second_of_its_last_process(agent: AgentProcess) -> None:
    wanted = agent.slice(250)
    launch = agent.put(wanted)
    with sleeper() as process:
        assert agent.adopt(wanted.slice_id, process.pid)["state"] == "running"
        assert not agent.delete(wanted.slice_id)
        assert agent.slices()[wanted.slice_id]["state"] == "releasing"
        generation = agent.client.call("GET", "/v1/slices")["generation"]
        process.kill()
        process.wait()
        dead = time.monotonic()
        answer = agent.client.call("GET", f"/v1/slices?after={generation}&wait_seconds=5", wait_seconds=5)
        assert answer["slices"] == []
        assert time.monotonic() - dead < 0.5
    assert not Path(launch.slice_dir).exists()


def test_a_child_that_outlives_the_server_keeps_the_slice(agent: AgentProcess) -> None:
    wanted = agent.slice(250)
    agent.put(wanted)
    # The server starts a kernel in a session of its own, on our word, and dies.
    script = (
        "import subprocess, sys; sys.stdin.readline(); print(subprocess.Popen(['sleep', '60'], start_new_session=True).pid, flush=True)"
    )
    server = subprocess.Popen([sys.executable, "-c", script + "; sys.stdin.readline()"], stdin=-1, stdout=-1, text=True)
    assert server.stdin is not None
    assert server.stdout is not None
    agent.adopt(wanted.slice_id, server.pid)
    print(file=server.stdin, flush=True)
    kernel = int(server.stdout.readline())
    if not Path("/sys/fs/cgroup").exists() or os.geteuid() != 0:
        time.sleep(2.5)  # without a cgroup the agent looks for descendants every two seconds
    server.kill()
    server.wait()
    server.stdin.close()
    server.stdout.close()
    time.sleep(0.7)
    assert agent.slices()[wanted.slice_id]["process_count"] == 1
    os.kill(kernel, 9)
    until(lambda: not agent.slices(), 0.5, "the end of the slice")


def test_a_process_that_holds_a_slot_makes_a_prepared_slice_run(agent: AgentProcess, tenant: Callable[..., Tenant]) -> None:
    wanted = agent.slice(250)
    launch = agent.put(wanted)
    one = tenant(launch)
    until(lambda: agent.slices()[wanted.slice_id]["state"] == "running", 3, "running")
    one.kill()
    until(lambda: not agent.slices(), 0.5, "the end of the slice")


def test_dead_and_unknown_processes_are_not_adopted(agent: AgentProcess) -> None:
    wanted = agent.slice(250)
    agent.put(wanted)
    gone = subprocess.Popen(["true"])
    gone.wait()
    with pytest.raises(NbgpuError, match="has ended already") as refused:
        agent.adopt(wanted.slice_id, gone.pid)
    assert refused.value.status == 409
    with pytest.raises(NbgpuError, match="no slice") as unknown:
        agent.adopt("0123456789abcdef", os.getpid())
    assert unknown.value.status == 404


# ---- books


def test_nothing_is_given_twice(agent: AgentProcess) -> None:
    wanted = [agent.slice(250) for _ in range(4)]
    for one in wanted:
        agent.put(one)
    with pytest.raises(NbgpuError, match="has 0 B left") as full:
        agent.put(agent.slice(125))
    assert full.value.status == 409
    with pytest.raises(NbgpuError, match="is another one") as other:
        agent.put(agent.slice(125, device=1, slice_id=wanted[0].slice_id))
    assert other.value.status == 409
    with pytest.raises(NbgpuError, match=r"has 19\.5 GiB left"):
        agent.client.call("PATCH", f"/v1/slices/{wanted[0].slice_id}", {"memory_bytes": 20 * GIB})
    # Given back is free again, and only that.
    agent.client.call("PATCH", f"/v1/slices/{wanted[0].slice_id}", {"memory_bytes": 9 * GIB, "compute_milli": 125})
    agent.put(agent.slice(125))
    with pytest.raises(NbgpuError, match="left"):
        agent.put(agent.slice(125))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"node": "elsewhere"}, "slice.node"),
        ({"simulated": False}, "slice.simulated"),
        ({"devices": []}, "slice.devices"),
        ({"mode": "turbo"}, "slice.mode"),
        ({"junk": 1}, "slice.junk"),
    ],
)
def test_bad_slices_are_refused_by_field(agent: AgentProcess, change: dict[str, object], field: str) -> None:
    wanted = agent.slice(250)
    body = {"slice": wanted.model_dump(mode="json") | change, "uid": None}
    with pytest.raises(NbgpuError) as refused:
        agent.client.call("PUT", f"/v1/slices/{wanted.slice_id}", body)
    assert (refused.value.status, refused.value.field) == (400, field)
    assert agent.slices() == {}


# ---- usage


def test_what_a_process_writes_is_what_the_slice_shows(agent: AgentProcess, tenant: Callable[..., Tenant]) -> None:
    launch = agent.put(agent.slice(250))
    one, two = tenant(launch, "kernel-a"), tenant(launch)
    one.do("used", 5 * GIB)
    one.do("context", 300 * MIB)
    two.do("used", 1 * GIB)
    seen = usage(launch)
    assert seen.devices[0].memory_used_bytes == 6 * GIB + 300 * MIB
    assert {kernel.kernel_id: kernel.devices[0].memory_used_bytes for kernel in seen.kernels} == {
        "kernel-a": 5 * GIB + 300 * MIB,
        None: 1 * GIB,
    }
    assert [kernel.pids for kernel in seen.kernels] == [[one.pid], [two.pid]]
    history = slice_client(launch)
    until(lambda: history.call("GET", "/v1/history?seconds=5")["time"], 3, "history", every=0.1)
    point = next(iter(history.call("GET", "/v1/history?seconds=5")["devices"].values()))
    assert point["memory_used_bytes"][-1] == 6 * GIB + 300 * MIB


def test_the_memory_of_a_dead_process_is_free_within_a_second(agent: AgentProcess, tenant: Callable[..., Tenant]) -> None:
    launch = agent.put(agent.slice(250))
    one, two = tenant(launch, "kernel-a"), tenant(launch, "kernel-b")
    one.do("used", 5 * GIB)
    two.do("used", 1 * GIB)
    assert usage(launch).devices[0].memory_used_bytes == 6 * GIB
    one.kill()
    until(lambda: usage(launch).devices[0].memory_used_bytes == 1 * GIB, 1, "the dead process's memory to be free", every=0.05)
    # In the file itself, where the limiter of its neighbours looks.
    assert (Path(launch.slice_dir) / "use").read_bytes().count((5 * GIB).to_bytes(8, "little")) == 0


def test_a_process_that_lost_its_lock_and_lives_is_not_reaped(agent: AgentProcess, tenant: Callable[..., Tenant]) -> None:
    launch = agent.put(agent.slice(250))
    one = tenant(launch, "kernel-a")
    one.do("used", 5 * GIB)
    assert usage(launch).devices[0].memory_used_bytes == 5 * GIB
    one.do("unlock")
    time.sleep(2.2)
    assert usage(launch).devices[0].memory_used_bytes == 5 * GIB
    one.kill()
    until(lambda: not agent.slices(), 1.5, "the end")


def test_busy_time_becomes_compute(agent: AgentProcess, tenant: Callable[..., Tenant]) -> None:
    launch = agent.put(agent.slice(500))
    one = tenant(launch, "kernel-a")
    pace: list[float] = []

    def told() -> bool:
        """Whether what is shown is what was told in the last second, however often this loop got to run."""
        time.sleep(0.05)
        one.do("busy", 12_500_000)
        pace.append(time.monotonic())
        lately = [at for at in pace if at > pace[-1] - 1]
        milli = 12.5 * len(lately)
        return pace[-1] - pace[0] > 2 and 0.75 * milli <= usage(launch).devices[0].compute_used_milli <= 1.25 * milli

    until(told, 30, "the busy time of the last second")
    last = usage(launch)
    assert last.devices[0].utilization_percent == last.devices[0].compute_used_milli * 100 // 500
    assert last.kernels[0].launches > 20
    assert last.kernels[0].idle_seconds is not None
    assert last.kernels[0].idle_seconds < 1


# ---- kernels' limits and refusals


def test_a_kernel_is_limited_inside_its_slice(agent: AgentProcess) -> None:
    launch = agent.put(agent.slice(250))
    own = slice_client(launch)
    limit = {"memory_bytes": 5 * GIB, "compute_milli": 100}
    assert own.call("PUT", "/v1/kernels/kernel-a", limit) == limit
    assert own.call("GET", "/v1/kernels") == {"kernel-a": limit}
    assert own.call("GET", "/v1/usage")["kernels"][0]["limit"] == limit
    for body, field in [
        ({"memory_bytes": 20 * GIB}, "memory_bytes"),
        ({"memory_bytes": 0}, "memory_bytes"),
        ({"compute_milli": 251}, "compute_milli"),
        ({"compute_milli": 0}, "compute_milli"),
        ({"memory_bytes": "5 GiB"}, "memory_bytes"),
        ({"mem": 1}, "mem"),
    ]:
        with pytest.raises(NbgpuError) as refused:
            own.call("PUT", "/v1/kernels/kernel-a", body)
        assert (refused.value.status, refused.value.field) == (400, field)
    own.call("PUT", "/v1/kernels/kernel-a", {})
    assert own.call("GET", "/v1/kernels") == {}
    told = own.call("GET", "/v1/events")
    assert [event["kind"] for event in told] == ["limit-changed"] * 2
    assert told[0]["message"] == "Notebook kernel kernel-a is limited to 5 GiB and 10 % of the GPU's time."


def test_both_apis_refuse_a_kernels_compute_above_the_slice_alike(agent: AgentProcess) -> None:
    wanted = agent.slice(250)
    own = slice_client(agent.put(wanted))
    for client, path in ((own, "/v1/kernels/k"), (agent.client, f"/v1/slices/{wanted.slice_id}/kernels/k")):
        with pytest.raises(NbgpuError) as refused:
            client.call("PUT", path, {"compute_milli": 251})
        assert (refused.value.status, refused.value.field) == (400, "compute_milli")
        assert "from 1 to 250" in refused.value.message
        assert client.call("PUT", path, {"compute_milli": 250}) == {"memory_bytes": None, "compute_milli": 250}


def test_a_limit_below_what_is_held_is_said(agent: AgentProcess, tenant: Callable[..., Tenant]) -> None:
    wanted = agent.slice(250)
    launch = agent.put(wanted)
    tenant(launch, "kernel-a").do("used", 6 * GIB)
    own = slice_client(launch)
    until(lambda: usage(launch).kernels[0].devices[0].memory_used_bytes >= 6 * GIB, what="its use to be shown")
    own.call("PUT", "/v1/kernels/kernel-a", {"memory_bytes": 7 * GIB})
    assert not [one for one in own.call("GET", "/v1/events") if one["kind"] == "over-limit"], "above what it holds there is nothing to say"
    own.call("PUT", "/v1/kernels/kernel-a", {"memory_bytes": 5 * GIB})
    (event,) = [one for one in own.call("GET", "/v1/events") if one["kind"] == "over-limit"]
    assert event["kernel_id"] == "kernel-a"
    assert event["message"].endswith("its limit is now 5 GiB. Until it frees some, it is refused more.")
    agent.client.call("PATCH", f"/v1/slices/{wanted.slice_id}", {"memory_bytes": 4 * GIB})
    event = [one for one in own.call("GET", "/v1/events") if one["kind"] == "over-limit"][-1]
    assert event["kernel_id"] is None
    assert "This server holds 6" in event["message"]


def test_only_memory_that_is_not_used_is_taken_back(agent: AgentProcess, tenant: Callable[..., Tenant]) -> None:
    wanted = agent.slice(250)
    launch = agent.put(wanted)
    tenant(launch, "kernel-a").do("used", 6 * GIB)
    until(lambda: usage(launch).kernels[0].devices[0].memory_used_bytes >= 6 * GIB, what="its use to be shown")
    there = f"/v1/slices/{wanted.slice_id}"
    with pytest.raises(NbgpuError) as refused:
        agent.client.call("PATCH", there, {"memory_bytes": 5 * GIB, "compute_milli": 125, "only_unused": True})
    assert refused.value.status == 409
    assert "it cannot be left 5 GiB" in refused.value.message
    assert agent.slices()[wanted.slice_id]["slice"] == wanted.model_dump(mode="json"), "all or nothing"
    taken = agent.client.call("PATCH", there, {"memory_bytes": 9 * GIB, "compute_milli": 125, "only_unused": True})
    assert (taken["lowered"] or taken["slice"])["devices"][0]["memory_bytes"] == 9 * GIB

    def counted() -> int:
        return agent.slices()[wanted.slice_id]["slice"]["devices"][0]["memory_bytes"]

    until(lambda: counted() == 9 * GIB, 3, "the driver to say that no more is held")
    forced = agent.client.call("PATCH", there, {"memory_bytes": 5 * GIB})  # the control: a user may, and is told
    assert forced["lowered"]["devices"][0]["memory_bytes"] == 5 * GIB
    assert forced["slice"]["devices"][0]["memory_bytes"] >= 6 * GIB, "and nobody else is given what they hold"
    time_alone = agent.client.call("PATCH", there, {"memory_bytes": 5 * GIB, "compute_milli": 100, "only_unused": True})
    assert time_alone["lowered"]["devices"][0]["compute_milli"] == 100, "what it may not have anyway is no reason to keep its time"


def test_a_refusal_is_told_within_a_second_and_a_burst_once_a_second(agent: AgentProcess, tenant: Callable[..., Tenant]) -> None:
    launch = agent.put(agent.slice(250))
    one = tenant(launch, "3f2a0000-1111-2222")
    one.do("used", 19 * GIB)
    own = slice_client(launch)
    until(lambda: usage(launch).kernels, 2, "the kernel")
    before = time.monotonic()
    one.do("refuse", 2 * GIB, 1)
    first = own.call("GET", "/v1/events?after=-1&wait_seconds=5", wait_seconds=5)
    assert time.monotonic() - before < 1
    assert first[0]["message"] == (
        "Notebook kernel 3f2a0000… was refused 2 GiB: this server's slice of 19.5 GiB has 512 MiB left. Free some or get a larger slice."
    )
    assert (first[0]["kernel_id"], first[0]["data"]["count"]) == ("3f2a0000-1111-2222", 1)
    for _ in range(200):
        one.do("refuse", 2 * GIB, 1)

    def told() -> list[dict[str, Any]]:
        return own.call("GET", f"/v1/events?after={first[0]['id']}")

    until(lambda: sum(event["data"]["count"] for event in told()) == 200, 4, "all refusals told", every=0.1)
    assert len(told()) <= 3


def test_a_refusal_by_the_slice_names_the_kernels_own_limit_where_that_forbids_it_anyway(
    agent: AgentProcess, tenant: Callable[..., Tenant]
) -> None:
    launch = agent.put(agent.slice(250))
    own = slice_client(launch)
    one, two = tenant(launch, "kernel-a"), tenant(launch, "kernel-b")
    one.do("used", 4 * GIB)
    two.do("used", 10 * GIB)
    own.call("PUT", "/v1/kernels/kernel-a", {"memory_bytes": 5 * GIB})
    until(lambda: len(usage(launch).kernels) == 2, 2, "both kernels")

    def refused(process: Tenant, amount: int) -> tuple[str, str]:
        seen = own.call("GET", "/v1/events")[-1]["id"]
        process.do("refuse", amount, layout.REFUSED_SLICE)
        (event,) = own.call("GET", f"/v1/events?after={seen}&wait_seconds=5", wait_seconds=5)
        return event["data"]["limit"], event["message"]

    which, message = refused(one, 20 * GIB)
    assert which == "kernel"
    assert message.endswith("its own limit of 5 GiB has 1 GiB left. Free memory: the slice has no room either.")
    assert refused(two, 20 * GIB)[0] == "slice", "the control: a kernel without a limit"


# ---- restarts


def test_limits_and_slices_stay_over_restarts(agent: AgentProcess, tenant: Callable[..., Tenant]) -> None:
    wanted, other = agent.slice(250), agent.slice(500)
    launch = agent.put(wanted)
    agent.put(other)
    one = tenant(launch, "kernel-a")
    agent.adopt(wanted.slice_id, one.pid)
    one.do("used", 5 * GIB)
    slice_client(launch).call("PUT", "/v1/kernels/kernel-a", {"memory_bytes": 6 * GIB})
    before = agent.client.call("GET", "/v1/slices")
    ctl = (Path(launch.slice_dir) / "ctl").stat()
    agent.kill()
    one.do("used", 4 * GIB)
    agent.start()
    after = agent.client.call("GET", "/v1/slices")
    assert after["generation"] > before["generation"]
    states = {found["slice"]["slice_id"]: found["state"] for found in after["slices"]}
    assert states == {wanted.slice_id: "running", other.slice_id: "prepared"}
    assert usage(launch).devices[0].memory_used_bytes == 4 * GIB
    assert usage(launch).kernels[0].limit.memory_bytes == 6 * GIB
    assert (Path(launch.slice_dir) / "ctl").stat().st_ino == ctl.st_ino, "processes have it mapped: it is never replaced"
    assert agent.put(wanted) == launch
    # A process that ended while the agent was away
    agent.kill()
    one.kill()
    agent.start()
    until(lambda: set(agent.slices()) == {other.slice_id}, 2, "the end of the slice whose process is gone")


def test_an_agent_tells_only_refusals_since_it_started(agent: AgentProcess, tenant: Callable[..., Tenant]) -> None:
    """An earlier agent told the others, or nobody did: when they were and what the limits were then nobody knows any more."""
    wanted = agent.slice(250)
    launch = agent.put(wanted)
    one = tenant(launch, "kernel-a")
    agent.adopt(wanted.slice_id, one.pid)
    own = slice_client(launch)
    for _ in range(3):
        one.do("refuse", 20 * GIB, layout.REFUSED_SLICE)
    until(lambda: own.call("GET", "/v1/events?after=-1"), 3, "told once")
    agent.kill()
    agent.start()
    until(lambda: usage(launch).kernels, 5, "the kernel is known again")
    one.do("refuse", 20 * GIB, layout.REFUSED_SLICE)
    told = until(lambda: [event for event in own.call("GET", "/v1/events?after=-1") if event["kind"] == "refused"], 3, "the new one")
    assert [event["data"]["count"] for event in told] == [1]


def test_the_directory_of_a_kubernetes_agent_is_not_touched(agent: AgentProcess) -> None:
    """Slices of pods would count there for ever: nobody here hears that a pod has ended."""
    agent.stop()
    entry = {"namespace": "team", "name": "ada", "slice_id": "0" * 32, "sealed": True, "parts": [], "spec": {}}
    claims = agent.runtime / "claims.json"
    claims.write_text(json.dumps({"version": 1, "claims": {"some-uid": entry}}))
    done = subprocess.run(agent.command(), env=agent.env, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "Kubernetes agent: claims.json there names 1 claim of pods" in done.stderr
    assert "Traceback" not in done.stderr
    claims.write_text(json.dumps({"version": 1, "claims": {}}))
    agent.start()


def test_a_second_agent_says_who_is_there_and_takes_over_when_told(agent: AgentProcess) -> None:
    wanted = agent.slice(250)
    agent.put(wanted)
    first = agent.process
    assert first is not None
    second = subprocess.run(agent.command(), env=agent.env, capture_output=True, text=True, timeout=30, check=False)
    assert second.returncode == 1
    assert f"(pid {first.pid})" in second.stderr
    assert "--takeover" in second.stderr
    assert "Traceback" not in second.stderr
    agent.process = subprocess.Popen(agent.command("--takeover"), env=agent.env, stderr=subprocess.DEVNULL)
    assert first.wait(10) == 0
    until(agent._answers, 10, "the new agent's answer")
    assert set(agent.slices()) == {wanted.slice_id}


def test_sigkill_at_random_moments_loses_nothing(agent: AgentProcess) -> None:
    seed = int(os.environ.get("NBGPU_SEED", time.time_ns() % 100_000))
    dice = random.Random(seed)
    print("seed", seed)
    landed: dict[str, int] = {}
    for _ in range(int(os.environ.get("NBGPU_KILLS", "6"))):
        driver = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("agent_churn.py")), str(agent.runtime), str(dice.random())],
            env=agent.env,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert driver.stdout is not None
        assert driver.stdout.readline() == "ready\n"
        time.sleep(dice.random() * 0.4)
        agent.kill()
        said, _ = driver.communicate(timeout=60)
        agent.start()
        assert driver.returncode == 0, "what made slices met something else than an agent that is gone"
        out = json.loads(said)
        landed[out["during"]] = landed.get(out["during"], 0) + 1
        slices = agent.slices()
        assert set(out["sure"]) <= set(slices), "a slice that was answered is there"
        assert set(slices) <= set(out["sure"]) | set(out["unsure"]), "and no other but the one in between"
        books: dict[str, int] = {}
        for found in slices.values():
            for part in found["slice"]["devices"]:
                books[part["uuid"]] = books.get(part["uuid"], 0) + part["compute_milli"]
        assert all(total <= 1000 for total in books.values())
        names = {path.name for path in (agent.runtime / "slices").iterdir()}
        assert names == set(slices), "no half slice is left"
        for slice_id in slices:
            assert agent.delete(slice_id)
    print("kills landed in", landed)
    assert agent.slices() == {}
