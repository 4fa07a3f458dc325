"""A user moves the GPU memory of a kernel to the host and has it back (docs/idle.md): nothing is lost, nothing is given twice."""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_harness import AgentProcess, missing_libraries, own_agent, until, usage
from idle_kit import Notebook, idle_agent, open_notebook, refusal, smi_used_mib
from idle_program import lunch_mib
from test_idle_tricks import RESTORE, unlimited

from nbgpu.errors import NbgpuError
from nbgpu.models import KernelAway, Launch
from nbgpu.quantities import MIB
from nbgpu_agent import layout

pytestmark = [pytest.mark.timeout(240), pytest.mark.skipif(missing_libraries() is not None, reason=str(missing_libraries()))]


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    with tempfile.TemporaryDirectory(prefix="nbgpu-test-", dir="/tmp") as name:
        found = AgentProcess(Path(name))
        try:
            yield idle_agent(found)
        finally:
            found.close()


@pytest.fixture(autouse=True)
def empty(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test leaves the shared agent without slices."""
    yield
    if "agent" in request.fixturenames:
        shared: AgentProcess = request.getfixturevalue("agent")
        until(lambda: not shared.slices(), 10, "all slices have ended")


class Pair:
    """A slice with two notebooks; the first holds most of its memory."""

    def __init__(self, agent: AgentProcess, mib: int = 2048, milli: int = 0):
        self.agent = agent
        whole = agent.node().devices[0].usable_bytes // MIB
        milli = milli or (mib * 5 // 4 + 1200) * 1000 // whole  # room for both contexts, not for both notebooks' memory
        self.ada, self.slice = open_notebook(agent, milli, mib=mib)
        self.launch: Launch = agent.put(self.slice)
        self.other = Notebook(self.launch, "kernel-b", 1, agent)
        agent.adopt(self.slice.slice_id, self.other.pid)
        self.mib = mib

    def away(self, kernel_id: str = "kernel-a") -> KernelAway | None:
        return next((one.away for one in usage(self.launch).kernels if one.kernel_id == kernel_id), None)

    def ask(self, what: str, kernel_id: str = "kernel-a") -> Any:
        return self.ada.client.call("POST", f"/v1/kernels/{kernel_id}/{what}")

    def try_(self, what: str, kernel_id: str = "kernel-a") -> Any:
        """Ask; refused for the moment: return what is said."""
        try:
            return self.ask(what, kernel_id)
        except NbgpuError as error:
            if any(words in error.message for words in ("computes", "try again", "as much there")):
                return error.message
            raise

    def refused(self, what: str, kernel_id: str = "kernel-a") -> NbgpuError:
        with pytest.raises(NbgpuError) as found:
            self.ask(what, kernel_id)
        return found.value

    def phase(self) -> str:
        found = self.away()
        return "here" if found is None else found.phase

    def is_(self, phase: str, seconds: float = 30) -> None:
        until(lambda: self.phase() == phase, seconds, f"the kernel is {phase}", every=0.05)

    def suspend(self) -> None:
        """Suspend the first kernel, and wait until it is; what was launched a moment ago may still be counted, then it is not."""

        def there() -> bool:
            found = self.try_("suspend")
            return isinstance(found, dict) and found["phase"] == "parked"

        until(there, 30, "the kernel is suspended", every=0.1)

    def events(self, kind: str) -> list[str]:
        return [event["message"] for event in self.agent.events(kind=kind) if event["slice_id"] == self.slice.slice_id]

    def close(self) -> None:
        self.ada.close()
        self.other.close()


def test_memory_is_free_for_the_other_notebook_and_comes_back_as_it_was(agent: AgentProcess) -> None:
    pair = Pair(agent, lunch_mib())
    assert usage(pair.launch).may_suspend
    before = usage(pair.launch).devices[0].memory_used_bytes
    assert pair.other.do("more", pair.mib) == "2", "the control: the slice has no room for both"
    pair.suspend()
    found = pair.away()
    assert found is not None
    assert found.memory_bytes > pair.mib * MIB
    assert usage(pair.launch).devices[0].memory_used_bytes < 1200 * MIB
    until(lambda: smi_used_mib(pair.launch) < 1200, 10, "the GPU's memory is free")
    assert pair.ask("suspend")["phase"] == "parked", "again is answered the same"
    assert pair.other.do("more", pair.mib) == "0"
    refused = pair.refused("resume")
    assert (refused.status, refused.code) == (409, "conflict")
    assert re.search(r"needs [\d.]+ GiB, and [\d.]+ [GM]iB of this server are free: free some or suspend another", refused.message)
    assert pair.phase() == "parked"
    assert pair.other.do("more", pair.mib) == "2", "the limit still is one"
    pair.other.do("less")
    assert pair.ask("resume")["phase"] == "restoring"
    pair.is_("here")
    assert pair.ada.do("sum") == pair.ada.sum
    until(lambda: abs(usage(pair.launch).devices[0].memory_used_bytes - before) < 64 * MIB, 10, "all counts again")
    assert pair.other.do("more", pair.mib) == "2"
    assert len(pair.events("suspended-by-user")) == len(pair.events("restored-memory")) == 1
    assert "back, as it was, after" in pair.events("restored-memory")[0]
    assert not pair.events("over-limit") + pair.events("unlimited") + pair.events("kernel-ended")
    pair.close()


@pytest.mark.parametrize("what", [("launch",), ("more", 1)], ids=["launch", "allocation"])
def test_one_that_is_used_comes_back_by_itself_as_soon_as_there_is_room(agent: AgentProcess, what: tuple[object, ...]) -> None:
    pair = Pair(agent)
    pair.suspend()
    assert pair.other.do("more", pair.mib) == "0"
    pair.ada.begin(*what)
    until(lambda: pair.events("wanting-memory"), 10, "its user is told")
    found = pair.away()
    assert found is not None
    assert (found.phase, found.wanted_seconds is not None) == ("parked", True)
    assert "free some or suspend another" in pair.events("wanting-memory")[0]
    time.sleep(1)
    assert pair.phase() == "parked"
    assert len(pair.events("wanting-memory")) == 1, "once"
    device = usage(pair.launch).devices[0]
    assert device.compute_used_milli == 0
    pair.other.do("less")
    assert pair.ada.end(30) in ("launched", "0")
    pair.is_("here")
    assert pair.ada.do("sum") == pair.ada.sum
    pair.close()


def test_a_cell_that_runs_in_it_brings_it_back(agent: AgentProcess) -> None:
    pair = Pair(agent)
    pair.suspend()
    pair.ada.tell()
    time.sleep(0.5)
    assert pair.phase() == "parked", "the control: an idle kernel stays where it is"
    pair.ada.tell(busy=True)
    pair.is_("here")
    assert "computes at this moment" in pair.refused("suspend").message, "and it is not suspended while it runs"
    pair.close()


def test_one_that_keeps_launching_is_not_suspended_and_goes_on(agent: AgentProcess) -> None:
    pair = Pair(agent)
    pair.ada.do("work")
    for _ in range(10):
        pair.try_("suspend")
        time.sleep(0.3)
    pair.is_("here")
    assert not pair.events("suspended-by-user")
    assert pair.ada.do("sum") == pair.ada.sum
    pair.close()


def test_the_other_notebook_computes_while_one_waits(agent: AgentProcess) -> None:
    pair = Pair(agent)
    pair.suspend()
    assert pair.other.do("more", pair.mib) == "0"
    pair.ada.begin("launch")
    until(lambda: pair.events("wanting-memory"), 10, "it waits")
    assert pair.other.do("work") == "works"
    until(lambda: usage(pair.launch).devices[0].compute_used_milli > 300, 15, "the other has the GPU")
    pair.close()


def test_refusals_say_why(agent: AgentProcess) -> None:
    pair = Pair(agent)
    stranger, of_stranger = open_notebook(agent, 100, user="grace")
    missing = pair.refused("suspend", "kernel-of-nobody")
    assert (missing.status, "holds no GPU memory" in missing.message) == (404, True)
    assert pair.refused("resume").status == 404
    for junk in ("..%2f..", "a" * 60, "%00", "kernel%20a"):
        assert pair.refused("suspend", junk).status in (400, 404)
    other = Notebook(agent.put(of_stranger), "kernel-c", 16, agent)  # only in another slice
    assert pair.refused("suspend", "kernel-c").status == 404
    assert stranger.client.call("GET", "/v1/usage")["kernels"][0]["away"] is None
    pair.suspend()
    pair.ada.client.call("PUT", "/v1/idle", {"kernels": {"kernel-a": False, "kernel-b": False}})
    assert "in host memory by its user" in str(refusal(agent, pair.slice.slice_id)), "its slice is not parked meanwhile"
    other.close()
    stranger.close()
    pair.close()


@pytest.mark.parametrize("kind", ["managed", "share"])
def test_memory_that_no_checkpoint_takes_stays_and_its_user_is_told(agent: AgentProcess, kind: str) -> None:
    pair = Pair(agent)
    pair.ada.do(kind)
    time.sleep(0.5)
    until(lambda: pair.ask("suspend"), 10, "it is asked for")
    until(lambda: pair.events("not-suspended"), 20, "why it is not")
    assert "shares with other" in pair.events("not-suspended")[0]
    assert pair.phase() == "here"
    assert pair.ada.do("launch") == "launched"
    assert pair.ada.do("sum") == pair.ada.sum
    pair.close()


def test_all_devices_of_a_slice_are_given_back_and_looked_at(agent: AgentProcess) -> None:
    """A kernel on two GPUs comes back only where both have the room."""
    one, two = agent.slice(100), agent.slice(100, device=1)
    wanted = one.model_copy(update={"devices": [*one.devices, *two.devices]})
    launch = agent.put(wanted)
    ada, other = Notebook(launch, "kernel-a", 3000, agent), Notebook(launch, "kernel-b", 1, agent)
    for notebook in (ada, other):
        agent.adopt(wanted.slice_id, notebook.pid)

    def used() -> list[int]:
        return [device.memory_used_bytes // MIB for device in usage(launch).devices]

    def ask(what: str) -> Any:
        return ada.client.call("POST", f"/v1/kernels/kernel-a/{what}")

    def away() -> KernelAway | None:
        return next(kernel.away for kernel in usage(launch).kernels if kernel.kernel_id == "kernel-a")

    assert ada.do("second", 5000) == "0"
    assert other.do("second", 5000) == "2", "the control"
    assert min(used()) > 3000
    time.sleep(1)
    ask("suspend")
    until(lambda: (found := away()) is not None and found.phase == "parked", 20, "it is suspended")
    assert max(used()) < 1200
    assert other.do("second", 5000) == "0"
    with pytest.raises(NbgpuError, match="free some or suspend"):
        ask("resume")
    other.do("less")
    ask("resume")
    until(lambda: away() is None, 20, "it is back")
    assert min(used()) > 3000
    assert ada.do("sum") == ada.sum
    assert other.do("second", 5000) == "2"
    for notebook in (ada, other):
        notebook.close()


def test_a_kernel_that_is_killed_while_it_waits_leaves_nothing_behind(agent: AgentProcess) -> None:
    pair = Pair(agent)
    pair.suspend()
    assert pair.other.do("more", pair.mib) == "0"
    pair.ada.begin("launch")
    until(lambda: pair.events("wanting-memory"), 10, "it waits")
    pair.ada.kill()
    pair.is_("here", 5)
    assert pair.other.do("launch") == "launched"
    pair.close()


def test_the_hosts_memory_is_bounded_over_slices_and_kernels(runtime: Path) -> None:
    agent = AgentProcess(runtime).start("--idle-host-memory", "3 GiB")
    pair = Pair(agent, 2048)
    pair.suspend()
    other, wanted = open_notebook(agent, 200, user="grace", mib=1024)
    with pytest.raises(NbgpuError, match=r"of host memory is left.*--idle-host-memory"):
        other.client.call("POST", "/v1/kernels/kernel-a/suspend")
    other.tell()
    assert "of host memory is left" in str(refusal(agent, wanted.slice_id)), "and a whole slice neither"
    other.close()
    pair.close()
    agent.close()


def test_a_server_has_no_more_in_host_memory_than_its_slice_has(agent: AgentProcess) -> None:
    pair = Pair(agent)
    pair.suspend()
    assert pair.other.do("more", pair.mib) == "0"
    until(lambda: "as much there as its slice has" in str(pair.try_("suspend", "kernel-b")), 10, "it is refused")
    pair.close()


def test_who_restores_itself_is_found_beyond_its_slice(runtime: Path) -> None:
    agent = idle_agent(AgentProcess(runtime), "--watchdog", "kill")
    pair = Pair(agent)
    time.sleep(2.5)
    pair.suspend()
    assert pair.other.do("more", pair.mib) == "0"
    time.sleep(2.5)
    subprocess.run([sys.executable, "-S", "-c", RESTORE, str(pair.ada.pid)], env=unlimited(pair.launch), check=True, timeout=20)
    assert pair.ada.process.wait(8) == -9
    assert pair.other.do("launch") == "launched", "not the one who has the room by right"
    pair.close()
    agent.close()


def recorded(pair: Pair) -> dict[str, Any]:
    return json.loads((Path(pair.launch.slice_dir) / "slice.json").read_text())["kernels_away"]["kernel-a"]


@pytest.mark.parametrize("word", ["used", "owner"])
def test_what_a_slot_says_meanwhile_makes_no_room(agent: AgentProcess, word: str) -> None:
    """Anybody in the server may write its slots: what comes back is what the driver saw go."""
    pair = Pair(agent)
    pair.suspend()
    assert pair.other.do("more", pair.mib) == "0"
    entry = recorded(pair)
    slot, owner = entry["slots"][0]
    at = layout.Use.slot.offset + slot * ctypes.sizeof(layout.UseSlot) + getattr(layout.UseSlot, word).offset
    before = (pair.mib * MIB).to_bytes(8, "little") if word == "used" else owner.to_bytes(8, "little")
    with (Path(pair.launch.slice_dir) / "use").open("r+b", buffering=0) as use:
        assert before[4:] == os.pread(use.fileno(), 8, at)[4:]
        os.pwrite(use.fileno(), bytes(8), at)
        assert "free some or suspend another" in pair.refused("resume").message
        time.sleep(1)
        assert recorded(pair) == entry
        os.pwrite(use.fileno(), before, at)
    pair.other.do("less")
    pair.ask("resume")
    pair.is_("here")
    pair.close()


def test_a_kernel_that_is_there_is_not_suspended_again_under_another_name(agent: AgentProcess) -> None:
    """To leave the second one as it was would bring the memory of the first back, whoever has its room by then."""
    pair = Pair(agent)
    pair.suspend()
    assert pair.other.do("more", pair.mib) == "0"
    slot, _ = recorded(pair)["slots"][0]
    at = layout.Use.slot.offset + slot * ctypes.sizeof(layout.UseSlot) + layout.UseSlot.kernel_id.offset
    with (Path(pair.launch.slice_dir) / "use").open("r+b", buffering=0) as use:
        os.pwrite(use.fileno(), b"kernel-x\0", at)
        assert "a process of it is in host memory already" in pair.refused("suspend", "kernel-x").message
        os.pwrite(use.fileno(), b"kernel-a\0", at)
    time.sleep(1)
    assert smi_used_mib(pair.launch) < pair.slice.devices[0].memory_bytes // MIB
    assert pair.phase() == "parked"
    pair.other.do("less")
    pair.ask("resume")
    pair.is_("here")
    pair.close()


def test_nothing_is_suspended_unless_an_administrator_says_so() -> None:
    with own_agent() as agent:
        notebook, wanted = open_notebook(agent)
        assert not usage(agent.put(wanted)).may_suspend
        with pytest.raises(NbgpuError, match="--idle-host-memory") as found:
            notebook.client.call("POST", "/v1/kernels/kernel-a/suspend")
        assert (found.value.status, found.value.code) == (404, "not-offered")
        notebook.close()


def test_a_limit_that_was_lowered_meanwhile_is_kept(agent: AgentProcess) -> None:
    pair = Pair(agent)
    pair.suspend()
    pair.ada.client.call("PUT", "/v1/kernels/kernel-a", {"memory_bytes": 512 * MIB, "compute_milli": None})
    assert "its own limit is 512 MiB" in pair.refused("resume").message
    pair.ada.client.call("PUT", "/v1/kernels/kernel-a", {"memory_bytes": None, "compute_milli": None})
    agent.client.call("PATCH", f"/v1/slices/{pair.slice.slice_id}", {"memory_bytes": 1024 * MIB})
    assert "of this server are free" in pair.refused("resume").message
    agent.client.call("PATCH", f"/v1/slices/{pair.slice.slice_id}", {"memory_bytes": pair.slice.devices[0].memory_bytes})
    pair.ask("resume")
    pair.is_("here")
    assert pair.ada.do("sum") == pair.ada.sum
    pair.close()


def test_a_kernel_that_is_restarted_while_it_is_away_leaves_nothing_behind(agent: AgentProcess) -> None:
    pair = Pair(agent)
    pair.suspend()
    pair.ada.process.send_signal(signal.SIGKILL)
    pair.ada.process.wait()
    again = Notebook(pair.launch, "kernel-a", pair.mib, agent)
    agent.adopt(pair.slice.slice_id, again.pid)
    pair.is_("here", 5)
    assert pair.other.do("more", pair.mib) == "2", "the new one is counted"
    assert again.do("launch") == "launched"
    again.close()
    pair.close()


def test_the_watchdog_blames_nobody_who_is_away_or_comes_back(runtime: Path) -> None:
    agent = idle_agent(AgentProcess(runtime), "--watchdog", "kill")
    pair = Pair(agent)
    time.sleep(2.5)
    for _ in range(2):
        pair.suspend()
        time.sleep(3)
        assert pair.other.do("more", pair.mib) == "0"
        time.sleep(3)
        pair.other.do("less")
        pair.ask("resume")
        pair.is_("here")
    time.sleep(3)
    assert pair.ada.do("sum") == pair.ada.sum
    assert {event["kind"] for event in agent.events()} <= {"suspended-by-user", "restored-memory", "refused"}
    pair.close()
    agent.close()


def there_and_back(pair: Pair, between: Callable[[], None] = lambda: None) -> None:
    """Once there and back, while the other notebook takes the room whenever it is given it."""
    pair.suspend()
    assert pair.other.do("more", pair.mib) == "0"
    pair.ada.begin("sum")  # copies wait in the driver: nothing says that it is used
    pair.other.do("less")
    between()

    def back() -> bool:
        return pair.phase() == "here" or (pair.phase() == "parked" and pair.try_("resume") is None)

    until(back, 30, "it is back", every=0.05)
    assert pair.ada.end() == pair.ada.sum
    assert pair.other.do("more", pair.mib) == "2", "never both"
    until(lambda: usage(pair.launch).devices[0].memory_used_bytes > pair.mib * MIB, 5, "it counts")


def test_there_and_back_again(agent: AgentProcess) -> None:
    pair = Pair(agent, 1024)
    for _ in range(5):
        there_and_back(pair)
    assert not [event for event in agent.events() if event["kind"] in ("lost", "over-limit")]
    pair.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_there_and_back_again_while_the_agent_is_killed(runtime: Path) -> None:
    seed = int(os.environ.get("NBGPU_TEST_SEED", "7"))
    chance, found = random.Random(seed), Counter[str]()
    agent = AgentProcess(runtime)
    agent.env["NBGPU_SIM_TIME_SCALE"] = "10"  # 1 GiB takes 0.4 s
    pair = Pair(idle_agent(agent), 1024)

    def kill() -> None:
        pair.try_("resume")
        time.sleep(chance.random() * 0.8)
        agent.kill()
        record = json.loads((Path(pair.launch.slice_dir) / "slice.json").read_text())
        found[record["kernels_away"].get("kernel-a", {"phase": "here"})["phase"]] += 1
        idle_agent(agent)

    for _ in range(int(os.environ.get("NBGPU_TEST_CYCLES", "12"))):
        there_and_back(pair, kill)
    print(f"seed {seed}: killed while it was {dict(found)}")
    assert found["restoring"]
    pair.close()
    agent.close()


STEPS = ("parking-saved", "locked", "checkpointed", "parked-saved", "counted", "restoring-saved", "restored")
SHORT = ("checkpointed", "parked-saved", "counted", "restoring-saved")


@pytest.mark.parametrize("step", [one if one in SHORT else pytest.param(one, marks=pytest.mark.slow) for one in STEPS])
def test_an_agent_that_dies_anywhere_loses_nothing_and_gives_nothing_twice(runtime: Path, step: str) -> None:
    agent = AgentProcess(runtime)
    agent.env["NBGPU_MARK"] = f"{'idle' if step == 'locked' else 'kernel'}.{step}:1"
    idle_agent(agent)
    pair = Pair(agent)
    assert agent.process is not None
    try:
        pair.suspend()
        pair.ask("resume")
    except NbgpuError:
        pass
    assert agent.process.wait(20) == -9, "it died where it should"
    # a sibling takes what it is given while no agent is there
    got = pair.other.do("more", pair.mib)
    del agent.env["NBGPU_MARK"]
    idle_agent(agent)
    until(lambda: pair.phase() in ("here", "parked"), 20, "the next agent has brought it to an end")
    phase = pair.phase()
    print(f"{step}: found {phase}, the other was given memory: {got == '0'}")
    assert (phase == "parked") == (step in ("parked-saved", "counted"))
    if got == "2" and phase == "parked":
        assert pair.other.do("more", pair.mib) == "0"
        got = "0"
    if phase == "parked":
        assert pair.refused("resume").status == 409
    else:
        assert got == "2", "it was never there for two"
    pair.other.do("less")
    if phase == "parked":
        pair.ask("resume")
        pair.is_("here")
    assert pair.ada.do("sum") == pair.ada.sum
    assert pair.ada.do("launch") == "launched"
    assert pair.other.do("more", pair.mib) == "2", "all counts again"
    pair.close()
    agent.close()


def test_the_next_agent_finds_it_there(agent: AgentProcess) -> None:
    """The record of a slice with a suspended kernel is read again by the next agent."""
    pair = Pair(agent)
    pair.suspend()
    agent.stop()
    idle_agent(agent)
    assert pair.phase() == "parked"
    pair.ask("resume")
    pair.is_("here")
    assert pair.ada.do("sum") == pair.ada.sum
    pair.close()
