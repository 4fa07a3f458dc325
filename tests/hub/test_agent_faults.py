"""The agent's end, and what it finds when it starts: open questions, machines of other versions, mounts of slices that have ended."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from agent_harness import AgentProcess, missing_libraries, until
from lost_gpu import set_lost

from nbgpu.errors import NbgpuError
from nbgpu_agent import slicedir
from nbgpu_agent.simulated import MADE_WITH, _directory

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(missing_libraries() is not None, reason=str(missing_libraries()))]
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives slices to other users")
USER = 12345


@pytest.fixture
def agent() -> Iterator[AgentProcess]:
    with tempfile.TemporaryDirectory(prefix="nbgpu-test-", dir="/tmp") as name:
        process = AgentProcess(Path(name))
        try:
            yield process
        finally:
            process.close()


def mounts(below: Path) -> list[str]:
    return [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if line.split()[4].startswith(f"{below}/")]


@pytest.mark.parametrize("path", ["slices?after=9007199254740000&wait_seconds=20", "events?after=9007199254740000&wait_seconds=20"])
def test_open_questions_get_a_clean_answer_when_it_ends(agent: AgentProcess, path: str) -> None:
    agent.start()
    agent.put(wanted := agent.slice(250))
    http = httpx.Client(transport=httpx.HTTPTransport(uds=str(agent.runtime / "agent.sock")), base_url="http://agent", timeout=30)
    answers: list[httpx.Response | Exception] = []

    def ask() -> None:
        try:
            answers.append(http.get(f"/v1/{path}"))
        except httpx.HTTPError as error:
            answers.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    asking.join(0.7)
    assert asking.is_alive(), "it waits"
    assert agent.stop() == 0
    asking.join(5)
    (answer,) = answers
    assert isinstance(answer, httpx.Response), repr(answer)
    assert answer.status_code == 200, answer.text
    said = answer.json()
    assert said == [] or [one["slice"]["slice_id"] for one in said["slices"]] == [wanted.slice_id]
    assert "Traceback" not in agent.log.read_text()


def test_an_agent_that_ends_leaves_only_what_is_of_use(agent: AgentProcess) -> None:
    """Libraries and machine stay while a slice has them mapped, and go with the agent that has none."""
    del agent.env["NBGPU_SIM_STATE"]
    directory, libraries = _directory(agent.runtime), agent.runtime / "lib"
    try:
        agent.start()
        launch = agent.put(wanted := agent.slice(250))
        process = subprocess.Popen(["sleep", "60"], env={**os.environ, **launch.env})
        agent.adopt(wanted.slice_id, process.pid)
        agent.stop()
        assert directory.exists(), "control: a slice lives"
        assert any(libraries.iterdir())
        agent.start()
        process.kill()
        process.wait()
        until(lambda: not agent.slices(), 2, "the end of the slice")
        agent.stop()
        assert not directory.exists()
        assert {path.name for path in agent.runtime.iterdir()} == {"agent.lock", "agent.log", "probe.json", "slices"}
        agent.start()
        assert agent.put(agent.slice(250)), "the next one makes them again"
    finally:
        subprocess.run(["rm", "-rf", str(directory)], check=True)


def test_a_machine_of_another_version_is_never_met(agent: AgentProcess) -> None:
    del agent.env["NBGPU_SIM_STATE"]
    directory = _directory(agent.runtime)
    try:
        agent.start().kill()
        state, made = directory / "state", directory / MADE_WITH
        good, ours = state.read_bytes(), made.read_text()
        libraries = ours.partition("\n")[0].removeprefix("libraries=")
        assert (agent.runtime / "lib" / libraries / "sim" / "libcuda.so.1").exists()
        state.write_bytes(good[:-4096])  # as another version's would be: of another size
        made.write_text(ours.replace(libraries, "0123456789abcdef"))
        agent.start()
        assert state.stat().st_size == len(good)
        assert made.read_text() == ours
        agent.kill()
        # the control: were it taken for its own, it could not start, and says why
        state.write_bytes(good[:-4096])
        done = subprocess.run(agent.command(), env=agent.env, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 1
        assert f"The simulated machine in {state} cannot be used" in done.stderr
        assert "Traceback" not in done.stderr
    finally:
        subprocess.run(["rm", "-rf", str(directory)], check=True)


def test_running_slices_keep_their_machine_and_its_libraries(agent: AgentProcess) -> None:
    del agent.env["NBGPU_SIM_STATE"]
    directory = _directory(agent.runtime)
    try:
        agent.start()
        launch = agent.put(wanted := agent.slice(250))
        process = subprocess.Popen(["sleep", "60"], env={**os.environ, **launch.env})
        agent.adopt(wanted.slice_id, process.pid)
        before, devices = (directory / "state").stat().st_ino, agent.node().devices
        agent.stop()
        # an upgrade: what runs was made by libraries that are not those of today any more
        today = Path(launch.env["LD_PRELOAD"]).parent
        older = today.with_name("0123456789abcdef")
        subprocess.run(["cp", "-r", str(today), str(older)], check=True)
        made = directory / MADE_WITH
        made.write_text(made.read_text().replace(today.name, older.name))
        agent.start()
        assert (directory / "state").stat().st_ino == before
        assert agent.node().devices == devices, "the same devices"
        again = agent.put(wanted)
        assert again.env["LD_LIBRARY_PATH"].split(":")[0] == str(older / "sim")
        assert Path(again.env["LD_PRELOAD"]).parent == today
        process.kill()
        process.wait()
        until(lambda: not agent.slices(), 2, "the end of the slice")
        agent.stop()
        agent.start()
        assert (directory / "state").stat().st_ino != before, "nobody uses it any more"
    finally:
        subprocess.run(["rm", "-rf", str(directory)], check=True)


@ROOT_ONLY
def test_mounts_of_slices_that_ended_without_an_agent_go(agent: AgentProcess) -> None:
    agent.start()
    launch = agent.put(wanted := agent.slice(250), uid=USER)
    if not mounts(agent.runtime):
        pytest.skip("root may not mount here")
    process = subprocess.Popen(["sleep", "60"], env={**os.environ, **launch.env}, user=USER)
    agent.adopt(wanted.slice_id, process.pid)
    agent.stop()
    assert mounts(agent.runtime), "a running slice keeps its file"
    process.kill()
    process.wait()
    # what an agent leaves that was killed while it made a slice, at each of its steps
    for name, record in (("half-made", False), ("half-ended", True)):
        directory = agent.runtime / "slices" / name
        (directory / slicedir.PRIVATE).mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(directory / slicedir.PRIVATE)], check=True)
        if record:
            (directory / "use").touch()
            (directory / slicedir.PRIVATE / "use").touch()
            subprocess.run(["mount", "--bind", str(directory / slicedir.PRIVATE / "use"), str(directory / "use")], check=True)
    agent.start()
    until(lambda: not mounts(agent.runtime), 2, "the end of the mounts")
    assert list((agent.runtime / "slices").iterdir()) == []


def test_a_gpu_that_is_lost_takes_nobody_and_the_others_go_on(agent: AgentProcess) -> None:
    agent.start()
    first, second = agent.slice(250, 0), agent.slice(250, 1)
    agent.put(first)
    agent.put(second)
    set_lost(agent.env["NBGPU_SIM_STATE"], 1, True)
    until(lambda: [one.healthy for one in agent.node().devices] == [True, False], 5, "the agent sees it")
    with pytest.raises(NbgpuError, match=r"GPU 1 .* does not answer"):
        agent.put(agent.slice(250, 1))
    agent.put(agent.slice(250, 0))
    assert agent.slices().keys() >= {first.slice_id, second.slice_id}, "who holds a part of it keeps it"
    set_lost(agent.env["NBGPU_SIM_STATE"], 1, False)
    until(lambda: [one.healthy for one in agent.node().devices] == [True, True], 5, "it is back")
    agent.put(agent.slice(250, 1))


def test_an_agent_starts_beside_a_gpu_that_is_lost(agent: AgentProcess) -> None:
    agent.start()
    held = agent.slice(250, 1)
    agent.put(held)
    agent.kill()
    set_lost(agent.env["NBGPU_SIM_STATE"], 1, True)
    agent.start("--devices", "0,1")
    assert [one.index for one in agent.node().devices] == [0]
    assert "GPU 1 does not answer (GPU is lost)" in agent.log.read_text()
    assert held.slice_id in agent.slices()
    agent.put(agent.slice(250, 0))
    agent.delete(held.slice_id)
    until(lambda: held.slice_id not in agent.slices(), 5, "its slice can be given back")
    agent.stop()
    set_lost(agent.env["NBGPU_SIM_STATE"], 0, True)
    with pytest.raises(AssertionError, match="shows no GPU that answers"):
        agent.start()
    assert "Traceback" not in agent.log.read_text()
