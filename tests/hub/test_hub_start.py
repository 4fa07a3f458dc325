"""A server's start in its slice's cgroup: it runs while pool and agent are told, and whoever dies meanwhile, it is known and inside."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_pool import FakePool
from hub_process import Hub, until

from nbgpu_agent.cgroups import Cgroups

HALF = {"profile": "half"}
MORE = """
c.GPUSliceMixin.pool_timeout = 5.0
setup(c, embedded=False, runtime={place!r})
import os, time
import nbgpu_spawner.local as local
enter = local.LocalGPUMixin._enter_slice
def slow(self):
    if os.path.exists({flag!r}):
        open({flag!r}, "w").write(str(self.pid))
        time.sleep(60)
    return enter(self)
local.LocalGPUMixin._enter_slice = slow
"""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hub(make_hub: Callable[..., Hub], pool: FakePool, place: Path) -> Hub:
    found = make_hub(MORE.format(place=str(place), flag=str(place / "slow")))
    found.add("ada")
    return found


@pytest.fixture(autouse=True)
def clean(hub: Hub, calm_pool: FakePool) -> Iterator[None]:
    yield
    stop(hub, calm_pool)


def stop(hub: Hub, pool: FakePool) -> None:
    """Stop ada's server."""
    pool.fail_next.clear()
    if hub.server("ada"):
        hub.stop("ada")


@pytest.fixture
def cgroup(hub: Hub, calm_pool: FakePool) -> Iterator[Path]:
    """A cgroup that the pool's answers name."""
    cgroups = Cgroups()
    path = cgroups.create(f"test-{uuid.uuid4().hex}", os.getpid())
    if path is None:
        pytest.skip("no cgroup can be made here")
    calm_pool.cgroup = str(path)
    yield path
    stop(hub, calm_pool)
    until(lambda: cgroups.remove(path), 5, "the cgroup is empty in the end")


def running(hub: Hub) -> list[int]:
    """Return the servers of ada that are held back no more."""
    return [pid for pid in hub.servers_of("ada") if b"light_server" in words(pid)[1]]


def words(pid: int) -> list[bytes]:
    """Return the command line of a process."""
    try:
        return [*Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"), b"", b""]
    except OSError:
        return [b"", b""]


def start_that_is_not_bound(hub: Hub, pool: FakePool) -> None:
    """Begin a start; the pool takes no bind."""
    pool.fail_next["bind"] = 1000
    hub.spawn_aside("ada", HALF)
    until(lambda: any(call.endswith("/bind") for call in pool.calls), 10, "the hub tells the pool")


def test_inside_its_cgroup_it_runs_while_the_pool_is_told(hub: Hub, calm_pool: FakePool, cgroup: Path) -> None:
    start_that_is_not_bound(hub, calm_pool)
    (pid,) = until(lambda: running(hub), 3, "the server runs")
    assert Cgroups.members(cgroup) == {pid}
    assert calm_pool.states() == {"ada": "reserved"}
    calm_pool.fail_next.clear()
    assert hub.ready("ada")["state"]["pid"] == pid
    assert calm_pool.states() == {"ada": "bound"}


@pytest.mark.parametrize("cgroup", [None, "/nowhere/nbgpu-slice"])
def test_control_where_the_hub_cannot_put_it_there_it_waits_for_the_agent(hub: Hub, calm_pool: FakePool, cgroup: str | None) -> None:
    calm_pool.cgroup = cgroup
    start_that_is_not_bound(hub, calm_pool)
    until(lambda: sum(call.endswith("/bind") for call in calm_pool.calls) > 2, 5, "the hub has told the pool again and again")
    assert hub.servers_of("ada")
    assert not running(hub)
    calm_pool.fail_next.clear()
    hub.ready("ada")
    assert running(hub)


def test_one_that_is_not_taken_in_is_stopped_and_the_user_told(hub: Hub, calm_pool: FakePool, cgroup: Path) -> None:
    calm_pool.bind_refused = "There is no process 7 to adopt: it has ended already."
    answer = hub.spawn("ada", HALF)
    assert answer.json()["message"] == calm_pool.bind_refused
    hub.gone("ada", 10)
    until(lambda: not hub.servers_of("ada"), 5, "the server has ended")
    assert calm_pool.held() == []


def test_the_hub_killed_while_the_pool_is_told_finds_it_again(hub: Hub, calm_pool: FakePool, cgroup: Path) -> None:
    start_that_is_not_bound(hub, calm_pool)
    (pid,) = until(lambda: running(hub), 3, "the server runs")
    hub.kill()
    assert Cgroups.members(cgroup) == {pid}, "it is where the agent looks"
    hub.start()
    assert hub.ready("ada")["state"]["pid"] == pid
    calm_pool.fail_next.clear()
    hub.stop("ada")
    assert hub.servers_of("ada") == []
    assert calm_pool.held() == []


def test_the_hub_killed_before_it_is_inside_takes_it_along(hub: Hub, calm_pool: FakePool, cgroup: Path, place: Path) -> None:
    flag = place / "slow"
    flag.touch()
    try:
        hub.spawn_aside("ada", HALF)
        pid = int(until(flag.read_text, 10, "the server's process lives"))
        assert hub.servers_of("ada") == [pid]
        assert not running(hub)
        hub.kill()
        until(lambda: not hub.servers_of("ada"), 5, "it has ended with its hub")
    finally:
        flag.unlink()
        hub.start()
    hub.gone("ada")
    until(lambda: calm_pool.held() == [], 5, "nothing is held")
