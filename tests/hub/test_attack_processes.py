"""A tenant with a shell plays with pids, threads, locks and the environment: memory stays counted, evasions are told."""

# ruff: noqa: F811 (fixtures by import)
from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from agent_harness import AgentProcess, until, usage
from attack_fixtures import LEADER_GONE, Tenancy, agent, last, missing, tenancy, tenants  # noqa: F401
from attacker import cpu_seconds, seconds_of

from nbgpu.quantities import GIB

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(missing() is not None, reason=str(missing()))]
Make = Callable[..., Tenancy]
TOLD_SECONDS = 2.0


def told(agent: AgentProcess, last: int, kind: str, slice_id: str, since: float, within: float = TOLD_SECONDS) -> dict:
    """Wait for an event about a slice and hold it to its deadline."""
    events = until(lambda: [e for e in agent.events(last, kind=kind) if e["slice_id"] == slice_id], 6, f"an event {kind!r}", every=0.02)
    took = events[0]["time"] - since
    print(f"{kind} told after {took:.2f} s")
    assert took < within
    return events[0]


def test_unset_preload_is_told_within_two_seconds(agent: AgentProcess, tenancy: Make, last: int) -> None:
    mallory = tenancy()
    one = mallory.enter(limited=False)
    assert one.run("result = cuda() or alloc(3 * GIB)") == 0
    told(agent, last, "unlimited", mallory.id, time.time())


def test_control_who_keeps_the_preload_is_not_told(agent: AgentProcess, tenancy: Make, last: int) -> None:
    mallory = tenancy()
    one = mallory.enter()
    assert one.run("result = cuda() or alloc(3 * GIB)") == 0
    time.sleep(2.5)
    assert agent.events(last) == []


def test_own_ctl_with_another_limit_is_told(agent: AgentProcess, tenancy: Make, last: int, tmp_path: Path) -> None:
    mallory = tenancy()
    own = mallory.enter(limited=False)
    directory = own.run(
        """
        import shutil, tempfile
        result = tempfile.mkdtemp(dir="/tmp")
        for name in ("ctl", "use"):
            shutil.copyfile(DIRECTORY + "/" + name, result + "/" + name)
        """
    )
    try:
        from nbgpu_agent import layout

        with open(f"{directory}/ctl", "r+b") as file:
            file.seek(layout.Ctl.device.offset + layout.CtlDevice.mem_limit.offset)
            file.write((80 * GIB).to_bytes(8, "little"))
        one = mallory.enter(env={"NBGPU_SLICE_DIR": directory})
        assert one.run("result = cuda() or alloc(30 * GIB)") == 0, "three times its slice"
        since = time.time()
        event = told(agent, last, "unlimited", mallory.id, since)
        assert event["data"]["pid"] == one.pid
        told(agent, last, "over-limit", mallory.id, since)
    finally:
        import shutil

        shutil.rmtree(directory)


def test_a_forged_slot_does_not_hide_who_is_not_limited(agent: AgentProcess, tenancy: Make, last: int) -> None:
    mallory = tenancy()
    one = mallory.enter(limited=False)
    one.run("forge(use(), 0, os.getppid() or 1, 1); forge(use(), 1, 1, started(1))")
    time.sleep(1.2)
    assert one.run("result = cuda() or alloc(3 * GIB)") == 0
    told(agent, last, "unlimited", mallory.id, time.time())


def test_a_process_whose_first_thread_ended_is_still_there(agent: AgentProcess, tenancy: Make, last: int) -> None:
    mallory = tenancy()
    one = mallory.enter(limited=False)
    pid = one.run(LEADER_GONE)
    since = time.time()
    try:
        until(lambda: Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z", 1, "the end of its first thread")
        assert told(agent, last, "unlimited", mallory.id, since)["data"]["pid"] == pid
        one.close()
        agent.delete(mallory.id)
        time.sleep(1.5)
        assert agent.slices()[mallory.id]["state"] == "releasing", "memory is held: the slice may not be given to another"
    finally:
        os.kill(pid, signal.SIGKILL)
    until(lambda: mallory.id not in agent.slices(), 0.7, "the end of the slice")


def test_control_a_real_zombie_does_not_keep_a_slice(agent: AgentProcess, tenancy: Make) -> None:
    mallory = tenancy()
    one = mallory.enter()
    child = one.run("result = os.fork()\nif result == 0: os._exit(0)")
    until(lambda: Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z", 2, "the zombie")
    # SIGKILL without reaping by us: the leader is a zombie of ours until `wait`
    os.kill(one.pid, signal.SIGKILL)
    until(lambda: mallory.id not in agent.slices(), 0.7, "the end of the slice")


def test_closing_all_descriptors_frees_nothing(agent: AgentProcess, tenancy: Make) -> None:
    mallory = tenancy()
    one = mallory.enter()
    assert one.run("result = cuda() or alloc(5 * GIB)") == 0
    assert usage(mallory.launch).devices[0].memory_used_bytes > 5 * GIB
    one.run("os.closerange(3, 4096)")
    time.sleep(1.5)
    other = mallory.enter()
    assert other.run("result = cuda()") == 0
    assert usage(mallory.launch).devices[0].memory_used_bytes > 5 * GIB
    assert other.run("result = alloc(6 * GIB)") == 2, "a quarter of 80 GiB less 5 is not 6: what lives is not reaped"
    assert usage(mallory.launch).devices[0].memory_used_bytes > 5 * GIB


def test_control_of_closed_descriptors_the_same_allocation_fits_once_it_is_gone(agent: AgentProcess, tenancy: Make) -> None:
    mallory = tenancy()
    one, other = mallory.enter(), mallory.enter()
    assert one.run("result = cuda() or alloc(5 * GIB)") == 0
    one.close()
    deadline = time.monotonic() + 5  # the driver takes its time to free what a process held
    while (code := other.run("result = cuda() or alloc(6 * GIB)")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert code == 0


def test_a_daemon_stays_in_the_slice_and_keeps_it(agent: AgentProcess, tenancy: Make, last: int) -> None:
    mallory = tenancy()
    one = mallory.enter(limited=False)
    time.sleep(0.3)  # the cgroup move
    daemon = one.run(
        """
        r, w = os.pipe()
        if os.fork() == 0:
            os.setsid()
            child = os.fork()
            if child: os._exit(0)
            os.write(w, str(os.getpid()).encode())
            os.close(w)
            code = cuda() or alloc(2 * GIB)
            time.sleep(60)
            os._exit(0)
        os.close(w)
        result = int(os.read(r, 32))
        os.wait()
        """
    )
    since = time.time()
    try:
        one.close()
        assert not agent.delete(mallory.id)
        assert told(agent, last, "unlimited", mallory.id, since, TOLD_SECONDS + 0.5)["data"]["pid"] == daemon
        found = agent.slices()[mallory.id]
        assert (found["state"], found["process_count"]) == ("releasing", 1)
    finally:
        os.kill(daemon, signal.SIGKILL)
    until(lambda: mallory.id not in agent.slices(), 0.7, "the end of the slice")


def test_a_lock_that_no_process_holds_keeps_no_slice(agent: AgentProcess, tenancy: Make, tenants: tuple[str, str]) -> None:
    """An open-file-description lock whose descriptor went to a friend in another slice outlives all processes here."""
    mallory, friend = tenancy(), tenancy(tenants[1])
    one, keeper = mallory.enter(), friend.enter()
    keeper.run("s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.bind('\\0nbgpu-attack-ofd')")
    one.run(
        """
        fd = use()
        fcntl.fcntl(fd, 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, F["slot"] + 5 * F["slot_bytes"], 1, 0))  # F_OFD_SETLK
        forge(fd, 5, os.getpid(), 7, used=GIB)
        friend = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        friend.connect("\\0nbgpu-attack-ofd")
        socket.send_fds(friend, [b"x"], [fd])
        """
    )
    keeper.run("got = socket.recv_fds(s, 1, 1)[1]")
    time.sleep(1.2)
    one.close()
    until(lambda: mallory.id not in agent.slices(), 1.5, "the end of the slice")


def test_a_foreign_slot_words_touch_nobody_else(agent: AgentProcess, tenancy: Make, tenants: tuple[str, str]) -> None:
    """Owner words that name init, the agent and another user's process: none is shown, adopted, ended or waited for."""
    mallory, grace = tenancy(), tenancy(tenants[1])
    victim = grace.enter()
    assert victim.run("result = cuda() or alloc(GIB)") == 0
    before = usage(grace.launch)
    assert agent.process is not None
    one = mallory.enter()
    one.run(
        f"""
        fd = use()
        for slot, pid in enumerate([1, {agent.process.pid}, {victim.pid}]):
            forge(fd, slot, pid, started(pid), used=GIB, kernel_id=b"stolen")
        """
    )
    time.sleep(1.5)
    own, after = usage(mallory.launch), usage(grace.launch)
    assert [kernel.pids for kernel in own.kernels if kernel.kernel_id == "stolen"] == [[]]
    assert after.devices == before.devices
    assert [k.pids for k in after.kernels] == [[victim.pid]]
    assert agent.slices()[mallory.id]["process_count"] == 1
    one.close()
    until(lambda: mallory.id not in agent.slices(), 1.0, "the end of the slice, whoever its slots name")
    assert victim.run("result = alloc(GIB)") == 0


def test_a_storm_of_forks_slows_nobody(agent: AgentProcess, tenancy: Make, tenants: tuple[str, str]) -> None:
    mallory, grace = tenancy(), tenancy(tenants[1])
    one = mallory.enter()
    time.sleep(0.3)
    one.run(
        """
        def churn():
            while True:
                child = os.fork()
                if child == 0:
                    os._exit(0)
                os.waitpid(child, 0)
                time.sleep(0.3)
        for _ in range(1000):
            if os.fork() == 0:
                signal.alarm(40)
                time.sleep(1)
                churn()
        """
    )
    assert agent.process is not None
    try:
        one.close()  # from here on every end of a process could be the slice's last
        time.sleep(1)
        began, spent = time.monotonic(), cpu_seconds(agent.process.pid)
        times = sorted(_paced(lambda: usage(grace.launch), 60))
        share = (cpu_seconds(agent.process.pid) - spent) / (time.monotonic() - began)
        print(f"during the storm: median {times[30] * 1e3:.0f} ms, p99 {times[-1] * 1e3:.0f} ms, the agent used {share:.0%} of a core")
        assert agent.slices()[mallory.id]["process_count"] > 100
        assert times[-1] < 1.0
        assert share < 0.5
    finally:
        _kill_members(mallory.id)
    until(lambda: mallory.id not in agent.slices(), 3, "the end of the slice")


def _paced(work: Callable[[], object], count: int) -> list[float]:
    found = []
    for _ in range(count):
        found.append(seconds_of(work))
        time.sleep(0.05)
    return found


def _kill_members(slice_id: str) -> None:
    paths = list(Path("/sys/fs/cgroup").glob(f"**/nbgpu-{slice_id}/cgroup.procs"))
    for _ in range(200):
        pids = [int(line) for path in paths if path.exists() for line in path.read_text().split()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not pids:
            return
        time.sleep(0.02)


def test_a_cgroup_with_another_slices_name_is_not_that_slice(
    agent: AgentProcess, tenancy: Make, tenants: tuple[str, str], last: int
) -> None:
    """Where an admin (or systemd) gave the tenant a cgroup of its own, it can name one below it after its victim."""
    mallory, grace = tenancy(), tenancy(tenants[1])
    victim = grace.enter()
    assert victim.run("result = cuda()") == 0
    time.sleep(0.3)
    places = list(Path("/sys/fs/cgroup").glob(f"**/nbgpu-{mallory.id}")) or list(Path("/sys/fs/cgroup").glob(f"**/nbgpu-{grace.id}"))
    if not places:
        pytest.skip("no cgroups can be made here")
    place = places[0].parent / "delegated-to-mallory" / f"nbgpu-{grace.id}"
    place.mkdir(parents=True)
    one = mallory.enter(limited=False, adopt=False)
    try:
        (place / "cgroup.procs").write_text(str(one.pid))
        assert one.run("result = cuda() or alloc(20 * GIB)") == 0
        time.sleep(2.5)
        assert [event for event in agent.events(last) if event["slice_id"] == grace.id] == []
        assert [event["data"]["pid"] for event in agent.events(last, kind="foreign")] == [one.pid]
    finally:
        one.close()
        time.sleep(0.2)
        place.rmdir()
        place.parent.rmdir()
