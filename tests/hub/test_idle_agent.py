"""The agent parks idle slices and brings them back (docs/idle.md): nothing is lost, nothing is given twice, and refusals have reasons."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_harness import AgentProcess, missing_libraries, own_agent, until, usage
from idle_kit import Notebook, held_bytes, idle_agent, open_notebook, parked, refusal, restore, smi_used_mib

from nbgpu.errors import NbgpuError
from nbgpu.quantities import MIB
from nbgpu_agent import layout

pytestmark = [pytest.mark.timeout(240), pytest.mark.skipif(missing_libraries() is not None, reason=str(missing_libraries()))]
CYCLES = int(os.environ.get("NBGPU_TEST_CYCLES", "1000"))


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


def test_memory_goes_to_the_host_and_comes_back_as_it_was(agent: AgentProcess) -> None:
    notebook, wanted = open_notebook(agent)
    launch = agent.put(wanted)
    before = usage(launch).devices[0].memory_used_bytes // MIB
    until(lambda: smi_used_mib(launch) == before, 10, "the agent's own look at the GPU is over")
    parked(agent, notebook, wanted.slice_id)
    assert smi_used_mib(launch) == 0
    assert held_bytes(agent, wanted.slice_id) == 0
    device = usage(launch).devices[0]
    assert (device.memory_used_bytes, device.memory_limit_bytes) == (0, wanted.devices[0].memory_bytes)
    restore(agent, wanted.slice_id)
    until(lambda: notebook.state() == "held", 20, "the slice is back")
    assert notebook.do("sum") == notebook.sum
    assert smi_used_mib(launch) == before
    assert held_bytes(agent, wanted.slice_id) == wanted.devices[0].memory_bytes
    mine = [event["kind"] for event in agent.events() if event["slice_id"] == wanted.slice_id]
    assert [kind for kind in mine if kind in ("parked", "restored", "lost")] == ["parked", "restored"]
    notebook.close()


def test_who_has_waited_longer_comes_first(agent: AgentProcess) -> None:
    ada, of_ada = open_notebook(agent)
    grace, of_grace = open_notebook(agent, user="grace")
    assert usage(agent.put(of_ada)).lent is None, "the control: it holds its GPU"
    found: list[tuple[str, int | None]] = []
    for notebook, wanted in ((ada, of_ada), (grace, of_grace)):
        parked(agent, notebook, wanted.slice_id)
        lent = usage(agent.put(wanted)).lent
        assert lent is not None
        assert (lent.wanted_seconds, lent.position) == (None, None)
        assert lent.memory_bytes > 64 * MIB
    for notebook, wanted in ((grace, of_grace), (ada, of_ada)):
        notebook.client.call("POST", "/v1/idle/want")
        lent = usage(agent.put(wanted)).lent
        assert lent is not None
        found.append((lent.phase, lent.position))
        assert lent.wanted_seconds is not None
    assert found == [("parked", 1), ("parked", 2)]
    for notebook, wanted in ((grace, of_grace), (ada, of_ada)):
        restore(agent, wanted.slice_id)
        assert notebook.do("sum") == notebook.sum
        notebook.close()


def test_somebody_else_runs_in_the_room_and_the_way_back_waits_for_it(agent: AgentProcess) -> None:
    ada, of_ada = open_notebook(agent, 1000)
    with pytest.raises(NbgpuError, match="left"):  # the control: while it is held there is no room
        agent.put(agent.slice(1000, user="grace"))
    parked(agent, ada, of_ada.slice_id)
    grace, of_grace = open_notebook(agent, 1000, user="grace")
    with pytest.raises(NbgpuError, match="left"):
        restore(agent, of_ada.slice_id)
    assert ada.state() == "parked"
    grace.close()
    until(lambda: of_grace.slice_id not in agent.slices(), 10, "grace's slice has ended")
    restore(agent, of_ada.slice_id)
    assert ada.do("sum") == ada.sum  # a call that came too early waits in the driver
    ada.close()


@pytest.mark.parametrize("what", [("launch",), ("more", 1)], ids=["launch", "allocation"])
def test_a_parked_program_that_wants_its_gpu_waits_and_asks_for_it(agent: AgentProcess, what: tuple[object, ...]) -> None:
    notebook, wanted = open_notebook(agent)
    parked(agent, notebook, wanted.slice_id)
    assert agent.slices()[wanted.slice_id]["idle"]["wanted_seconds"] is None
    notebook.begin(*what)
    until(lambda: agent.slices()[wanted.slice_id]["idle"]["wanted_seconds"] is not None, 10, "it asks for its slice")
    assert held_bytes(agent, wanted.slice_id) == 0
    restore(agent, wanted.slice_id)
    assert notebook.end() in ("launched", "0")
    assert notebook.do("sum") == notebook.sum
    notebook.close()


def test_an_interrupt_reaches_who_waits_in_a_call_once_its_gpu_is_back(agent: AgentProcess) -> None:
    """What docs/idle.md says of kernels in other languages."""
    notebook, wanted = open_notebook(agent)
    parked(agent, notebook, wanted.slice_id)
    notebook.begin("launch")
    until(lambda: agent.slices()[wanted.slice_id]["idle"]["wanted_seconds"] is not None, 10, "it asks for its slice")
    notebook.process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert notebook.process.poll() is None, "it still waits"
    restore(agent, wanted.slice_id)
    assert notebook.process.wait(10) == -signal.SIGINT
    notebook.close()


def test_a_new_kernel_of_a_parked_slice_waits_instead_of_taking_what_is_not_there(agent: AgentProcess) -> None:
    notebook, wanted = open_notebook(agent)
    launch = agent.put(wanted)
    parked(agent, notebook, wanted.slice_id)
    made: list[Notebook] = []
    starter = threading.Thread(target=lambda: made.append(Notebook(launch, "kernel-b", 16)))
    starter.start()
    until(lambda: agent.slices()[wanted.slice_id]["idle"]["wanted_seconds"] is not None, 10, "the new kernel asks for the slice")
    assert not made
    assert smi_used_mib(launch) == 0
    restore(agent, wanted.slice_id)
    starter.join(20)
    assert made[0].do("sum") == made[0].sum
    assert notebook.do("sum") == notebook.sum
    for one in (*made, notebook):
        one.close()


def test_who_follows_the_slices_hears_of_each_that_has_become_idle(agent: AgentProcess) -> None:
    """Within seconds, also of one that becomes idle right after another: the pool looks by itself every ten seconds only."""
    both = [open_notebook(agent, user=user) for user in ("ada", "grace")]
    for notebook, _ in both:
        notebook.tell(busy=True)
    generation = agent.client.call("GET", "/v1/slices")["generation"]
    heard: list[str] = []
    began = time.monotonic()
    for notebook, wanted in both:
        notebook.tell()
        while wanted.slice_id not in heard:
            told = agent.client.call("GET", f"/v1/slices?after={generation}&wait_seconds=9", wait_seconds=9)
            generation = told["generation"]
            heard = [one["slice"]["slice_id"] for one in told["slices"] if one["idle"]["idle_seconds"] is not None]
    assert time.monotonic() - began < 8
    for notebook, _ in both:
        notebook.close()


def test_refusals_say_why(agent: AgentProcess) -> None:
    notebook, wanted = open_notebook(agent)
    slice_id = wanted.slice_id
    assert "has not told" in str(refusal(agent, slice_id))
    notebook.tell(busy=True)
    assert "busy" in str(refusal(agent, slice_id))
    notebook.tell()
    notebook.client.call("PUT", "/v1/idle/kernels/kernel-a", {"protected": True})
    assert "protected" in str(refusal(agent, slice_id))
    notebook.client.call("PUT", "/v1/idle/kernels/kernel-a", {"protected": False})
    assert "not been idle" in str(refusal(agent, slice_id, 60))
    other = Notebook(agent.put(wanted), "", 1)
    assert "no notebook kernel" in str(refusal(agent, slice_id))
    other.close()
    until(lambda: "no notebook" not in str(refusal(agent, slice_id, 60)), 10, "the other program is gone")
    parked(agent, notebook, slice_id)  # the control: none of them holds any more
    assert "parked already" in str(refusal(agent, slice_id))
    with pytest.raises(NbgpuError, match="because it is idle"):
        agent.client.call("PATCH", f"/v1/slices/{slice_id}", {"compute_milli": 100})
    notebook.close()


def test_a_notebook_that_works_in_the_background_is_not_idle(agent: AgentProcess) -> None:
    notebook, wanted = open_notebook(agent)
    notebook.do("work")
    notebook.tell()
    for _ in range(30):
        assert "not been idle" in str(refusal(agent, wanted.slice_id, 0.2))
        time.sleep(0.05)
    notebook.close()


@pytest.mark.parametrize("kind", ["managed", "share"])
def test_memory_that_no_checkpoint_takes_is_refused_and_the_program_goes_on(agent: AgentProcess, kind: str) -> None:
    notebook, wanted = open_notebook(agent)
    notebook.do(kind)
    notebook.tell()
    assert refusal(agent, wanted.slice_id) is None
    until(lambda: "shares with other" in str(agent.slices()[wanted.slice_id]["idle"]["reason"]), 20, "why it was not parked")
    assert "shares with other" in str(refusal(agent, wanted.slice_id)), "it is left alone for a while"
    assert notebook.do("launch") == "launched"
    assert notebook.do("sum") == notebook.sum
    assert held_bytes(agent, wanted.slice_id) == wanted.devices[0].memory_bytes
    notebook.close()


def test_host_memory_is_bounded_over_all_slices(runtime: Path) -> None:
    agent = AgentProcess(runtime).start("--idle-host-memory", "1 GiB")
    try:
        # each holds 64 MiB and a context of a few hundred: the second is one too many
        first, one = open_notebook(agent, 250)
        second, two = open_notebook(agent, 250, user="grace", mib=600)
        parked(agent, first, one.slice_id)
        second.tell()
        assert "host memory is left" in str(refusal(agent, two.slice_id))
        first.close()
        until(lambda: one.slice_id not in agent.slices(), 10, "the first slice has ended")
        parked(agent, second, two.slice_id)
        second.close()
    finally:
        agent.close()


def test_host_memory_is_bounded_whatever_the_notebook_tells_of_itself(runtime: Path) -> None:
    agent = AgentProcess(runtime).start("--idle-host-memory", "512 MiB")
    notebook, wanted = open_notebook(agent, mib=600)
    launch = agent.put(wanted)
    with open(Path(launch.slice_dir) / "use", "r+b", buffering=0) as use:
        use.seek(layout.Use.slot.offset + layout.UseSlot.used.offset)
        use.write((MIB).to_bytes(8, "little"))
    assert usage(launch).devices[0].memory_used_bytes < 512 * MIB, "it says that it holds little"
    notebook.tell()
    assert "host memory is left" in str(refusal(agent, wanted.slice_id))
    notebook.close()
    agent.close()


def test_a_slice_with_a_process_past_the_limiter_is_not_parked(agent: AgentProcess) -> None:
    notebook, wanted = open_notebook(agent)
    stranger = Notebook(agent.put(wanted), "kernel-b", 16, agent, limited=False)
    agent.adopt(wanted.slice_id, stranger.pid)
    notebook.tell()
    assert refusal(agent, wanted.slice_id) is None
    until(lambda: "could not be moved" in str(agent.slices()[wanted.slice_id]["idle"]["reason"]), 20, "why it was not parked")
    assert held_bytes(agent, wanted.slice_id) == wanted.devices[0].memory_bytes
    for one in (notebook, stranger):
        assert one.do("sum") == one.sum
        one.close()


def test_nothing_is_parked_unless_an_administrator_says_so() -> None:
    with own_agent() as agent:
        notebook, wanted = open_notebook(agent)
        with pytest.raises(NbgpuError, match="not parked on this node"):
            notebook.tell()
        assert "not parked here" in str(refusal(agent, wanted.slice_id))
        assert agent.slices()[wanted.slice_id]["idle"] is None
        notebook.close()


def test_a_kernel_that_is_killed_while_parked_takes_nothing_with_it(agent: AgentProcess) -> None:
    notebook, wanted = open_notebook(agent)
    other = Notebook(agent.put(wanted), "kernel-b", 16, agent)
    agent.adopt(wanted.slice_id, other.pid)
    notebook.client.call("PUT", "/v1/idle", {"kernels": {"kernel-a": False, "kernel-b": False}})
    assert refusal(agent, wanted.slice_id) is None
    until(lambda: notebook.state() == "parked", 20, "the slice is parked")
    notebook.kill()
    time.sleep(0.3)
    restore(agent, wanted.slice_id)
    assert other.do("sum") == other.sum
    until(lambda: other.state() == "held", 20, "the slice is back")
    other.close()
    notebook.close()
    until(lambda: wanted.slice_id not in agent.slices(), 10, "the slice has ended")


@pytest.mark.slow
@pytest.mark.parametrize("when", ["parking", pytest.param("parked", marks=pytest.mark.soak), "restoring"])
def test_a_kernel_that_dies_on_the_way_takes_nothing_with_it(runtime: Path, when: str) -> None:
    agent = AgentProcess(runtime)
    agent.env["NBGPU_SIM_TIME_SCALE"] = "100"  # 1 GiB takes 4 s
    idle_agent(agent)
    notebook, wanted = open_notebook(agent, mib=256)
    other = Notebook(agent.put(wanted), "kernel-b", 16, agent)
    agent.adopt(wanted.slice_id, other.pid)
    notebook.client.call("PUT", "/v1/idle", {"kernels": {"kernel-a": False, "kernel-b": False}})
    assert refusal(agent, wanted.slice_id) is None
    if when == "parking":
        time.sleep(1)
        assert notebook.state() == "parking"
        notebook.kill()
    until(lambda: notebook.state() in ("parked", "held"), 30, "it is parked, or not")
    if when == "parked":
        notebook.kill()
    if notebook.state() == "parked":
        restore(agent, wanted.slice_id)
    if when == "restoring":
        time.sleep(1)
        assert notebook.state() == "restoring"
        notebook.kill()
    assert other.do("sum") == other.sum
    until(lambda: other.state() == "held", 30, "the slice is back")
    assert held_bytes(agent, wanted.slice_id) == wanted.devices[0].memory_bytes
    assert other.do("launch") == "launched"
    other.close()
    notebook.close()
    until(lambda: wanted.slice_id not in agent.slices(), 10, "the slice has ended")
    agent.close()


def test_nothing_is_restored_before_the_gpu_has_the_room(runtime: Path) -> None:
    """A driver that never restores a process whose restore once found no room, and keeps the memory of the dead for two seconds."""
    agent = AgentProcess(runtime, devices=1)
    agent.env |= {"NBGPU_SIM_RESTORE_OOM_FATAL": "1", "NBGPU_SIM_TEARDOWN_MS": "2000", "NBGPU_SIM_MEMORY_MIB": "4096"}
    idle_agent(agent)
    ada, of_ada = open_notebook(agent, 1000, mib=2500)
    parked(agent, ada, of_ada.slice_id)
    grace, of_grace = open_notebook(agent, 1000, user="grace", mib=2500)
    grace.close()
    until(lambda: of_grace.slice_id not in agent.slices(), 10, "grace's slice has ended")
    restore(agent, of_ada.slice_id)
    assert ada.do("sum") == ada.sum
    assert "waits for room on GPU" in agent.log.read_text(), "the memory of grace's notebook was there for a while"
    ada.close()
    agent.close()


def test_a_process_that_the_driver_cannot_restore_is_told_of(runtime: Path) -> None:
    agent = AgentProcess(runtime)
    agent.env["NBGPU_SIM_CHECKPOINT_FAULT"] = "restore"
    idle_agent(agent)
    notebook, wanted = open_notebook(agent)
    parked(agent, notebook, wanted.slice_id)
    restore(agent, wanted.slice_id)
    until(lambda: agent.events(kind="lost"), 20, "its user is told")
    assert "Restart its kernel" in agent.events(kind="lost")[0]["message"]
    until(lambda: notebook.state() == "held", 20, "the slice goes on")
    notebook.close()
    agent.close()


SHORT = ("idle.checkpointed", "idle.parked-saved", "idle.restoring-saved")
STEPS = ("idle.parking-saved", "idle.locked", "idle.checkpointed", "idle.parked-saved", "idle.restoring-saved", "idle.restored")


@pytest.mark.slow
@pytest.mark.parametrize("step", [one if one in SHORT else pytest.param(one, marks=pytest.mark.soak) for one in STEPS])
def test_an_agent_that_dies_anywhere_loses_nothing(runtime: Path, step: str) -> None:
    agent = AgentProcess(runtime)
    agent.env["NBGPU_MARK"] = f"{step}:1"
    idle_agent(agent)
    notebook, wanted = open_notebook(agent)
    assert agent.process is not None
    notebook.tell()
    try:
        refusal(agent, wanted.slice_id)
        until(lambda: agent.process is None or agent.process.poll() is not None or notebook.state() == "parked", 20, "it is parked")
        if agent.process.poll() is None:
            restore(agent, wanted.slice_id)
    except NbgpuError:
        pass
    assert agent.process.wait(20) == -9, "it died where it should"
    del agent.env["NBGPU_MARK"]
    idle_agent(agent)
    until(lambda: notebook.state() in ("held", "parked"), 20, "the next agent has brought it to an end")
    state, held = notebook.state(), held_bytes(agent, wanted.slice_id)
    print(f"{step}: found {state}")
    assert (state == "parked") == (step == "idle.parked-saved")
    assert held == (0 if state == "parked" else wanted.devices[0].memory_bytes)
    if state == "parked":
        restore(agent, wanted.slice_id)
    assert notebook.do("sum") == notebook.sum
    assert notebook.do("launch") == "launched"
    until(lambda: notebook.state() == "held", 20, "the slice is back")
    notebook.tell()
    agent.close()
    notebook.close()


def state_after_asking(agent: AgentProcess, notebook: Notebook, slice_id: str) -> str:
    """Return where a slice is; while it is held have it parked: what was launched a moment ago may still be counted, then it is not."""
    state = notebook.state()
    if state == "held":
        refusal(agent, slice_id)
    return state


def cycle(agent: AgentProcess, notebook: Notebook, slice_id: str) -> None:
    """There and back, with work before and after."""
    assert notebook.do("launch") == "launched"
    notebook.tell()
    until(lambda: state_after_asking(agent, notebook, slice_id) == "parked", 20, "it is parked", every=0.02)
    restore(agent, slice_id)
    assert notebook.do("sum") == notebook.sum
    until(lambda: notebook.state() == "held", 20, "it is back")


def cycles(agent: AgentProcess, count: int) -> None:
    """So many times there and back, beside a neighbour that works."""
    notebook, wanted = open_notebook(agent)
    neighbour, _ = open_notebook(agent, user="grace")
    assert neighbour.do("work") == "works"
    for _ in range(count):
        cycle(agent, notebook, wanted.slice_id)
    assert neighbour.do("sum") == neighbour.sum
    assert not agent.events(kind="lost")
    notebook.close()
    neighbour.close()


def test_there_and_back_many_times(agent: AgentProcess) -> None:
    cycles(agent, 10)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_there_and_back_a_thousand_times(agent: AgentProcess) -> None:
    cycles(agent, CYCLES)
