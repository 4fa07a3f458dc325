"""Pool and agent, both real processes: ada's idle notebook makes room for grace, and comes back as it was, whoever is killed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest
from agent_harness import AgentProcess, missing_libraries, until
from idle_kit import Notebook, held_bytes, idle_agent, smi_used_mib
from idle_program import lunch_mib
from pool_process import PoolProcess

from nbgpu.models import GrantState, Owner, Request

pytestmark = [pytest.mark.timeout(240), pytest.mark.skipif(missing_libraries() is not None, reason=str(missing_libraries()))]
GIB_IN_MIB = 1024
IDLE_SECONDS = 0.01
"""Who does nothing is idle: as many turns as there can be. How long it must be is judged in test_pool_idle.py and test_idle_agent.py."""
CYCLES = int(os.environ.get("NBGPU_TEST_CYCLES", "1000"))


class Place:
    """A pool and an agent with a GPU or several, and users with a notebook each."""

    def __init__(self, runtime: Path, devices: int = 1):
        self.agent = idle_agent(AgentProcess(runtime, devices=devices))
        config = runtime / "pool.yaml"
        config.write_text(f"idle: {{after_seconds: {IDLE_SECONDS}}}\nreservation_ttl_seconds: 30\n")
        self.asked: list[str] = []
        self.notebooks: list[Notebook] = []
        self.pool = PoolProcess(runtime, "--config", str(config))
        self.pool.start()

    def ask(self, user: str, milli: int) -> str:
        """Ask for a slice; return the request's id."""
        asked = Request(request_id=uuid4().hex, owner=Owner(hub="h", user=user), compute_milli=milli)
        self.asked.append(self.pool.client.acquire(asked).request.request_id)
        return self.asked[-1]

    def start(self, key: str, mib: int) -> Notebook:
        """Start a notebook in a granted slice."""
        notebook = Notebook(self.pool.client.prepare(key, None), mib=mib, agent=self.agent)
        self.notebooks.append(notebook)
        self.pool.client.bind(key, notebook.pid)
        return notebook

    def granted(self, key: str, seconds: float = 30) -> None:
        """Wait until a request is granted."""
        until(lambda: self.pool.client.grant(key).state == GrantState.reserved, seconds, "it is granted", every=0.05)

    def end(self, notebook: Notebook, key: str) -> None:
        """End a notebook's server and wait until its slice has ended."""
        notebook.close()
        until(lambda: self.pool.client.grant(key).state == GrantState.gone, 10, "the slice has ended", every=0.05)

    def close(self) -> None:
        if self.pool.process is not None and self.pool.process.poll() is None:
            self.pool.kill(15)
        self.agent.close()


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """One place for all: who is killed in it is started again."""
    with tempfile.TemporaryDirectory(prefix="nbgpu-test-", dir="/tmp") as name:
        found = Place(Path(name))
        yield found
        found.close()


@pytest.fixture(autouse=True)
def empty(place: Place) -> Iterator[None]:
    """Each test leaves the place without slices and requests."""
    yield
    for notebook in place.notebooks:
        notebook.close()
    place.notebooks.clear()
    for key in place.asked:
        place.pool.client.cancel(key)
    place.asked.clear()
    until(lambda: not place.agent.slices(), 10, "all slices have ended")


def test_ada_goes_to_lunch_and_finds_everything_as_it_was(place: Place) -> None:
    ada_key = place.ask("ada", 1000)
    ada = place.start(ada_key, lunch_mib())
    grace_key = place.ask("grace", 1000)
    ada.tell(busy=True)
    assert place.pool.client.grant(grace_key).state == GrantState.queued
    ada.tell()  # lunch
    place.granted(grace_key)
    assert place.pool.client.grant(ada_key).note is not None
    assert held_bytes(place.agent, ada_key) == 0
    grace = place.start(grace_key, 16 * GIB_IN_MIB)
    assert smi_used_mib(place.pool.client.prepare(grace_key, None)) < 17 * GIB_IN_MIB, "ada's memory is not there any more"
    ada.tell(busy=True)  # she presses Shift-Enter
    ada.begin("sum")
    late_key = place.ask("linus", 500)
    until(lambda: place.agent.slices()[ada_key]["idle"]["wanted_seconds"] is not None, 10, "the slice is wanted")
    assert ada.state() == "parked"
    place.end(grace, grace_key)
    assert ada.end(30) == ada.sum
    assert place.pool.client.grant(late_key).state == GrantState.queued, "who comes back is before new requests"
    kinds = [event["kind"] for event in place.agent.events() if event["slice_id"] == ada_key]
    assert [kind for kind in kinds if kind in ("parked", "wanting", "restored", "lost")] == ["parked", "wanting", "restored"]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["parked", *(pytest.param(one, marks=pytest.mark.soak) for one in ("waiting", "wanted", "restoring"))])
@pytest.mark.parametrize("who", ["both", *(pytest.param(one, marks=pytest.mark.soak) for one in ("pool", "agent"))])
def test_who_is_killed_on_the_way_there_or_back_loses_nothing(place: Place, when: str, who: str) -> None:
    def kill(moment: str) -> None:
        if moment != when:
            return
        if who in ("pool", "both"):
            place.pool.kill()
        if who in ("agent", "both"):
            place.agent.kill()
            idle_agent(place.agent)
        if who in ("pool", "both"):
            place.pool.start()

    ada_key = place.ask("ada", 1000)
    ada = place.start(ada_key, 64)
    grace_key = place.ask("grace", 1000)
    ada.tell()
    kill("waiting")
    ada.tell()
    grace_key = grace_key if who == "agent" or when != "waiting" else place.ask("grace", 1000)
    until(lambda: ada.state() == "parked", 40, "ada's slice is parked", every=0.1)
    kill("parked")
    grace_key = grace_key if who == "agent" or when != "parked" else place.ask("grace", 1000)
    place.granted(grace_key)
    grace = place.start(grace_key, 64)
    ada.tell(busy=True)
    kill("wanted")
    ada.begin("sum")
    place.end(grace, grace_key)
    kill("restoring")
    assert ada.end(40) == ada.sum
    until(lambda: ada.state() == "held", 20, "it is back", every=0.05)
    assert place.pool.client.grant(ada_key).state == GrantState.bound


def swap(back: Notebook, away: Notebook) -> None:
    """One comes back to its work while the other is idle."""
    away.tell()
    back.tell(busy=True)
    back.begin("sum")
    until(lambda: back.state() == "held", 60, "it is back", every=0.05)
    assert back.end(20) == back.sum


def enter(place: Place, user: str) -> Notebook:
    """Start a notebook with a whole GPU that is busy, once there is one."""
    key = place.ask(user, 1000)
    place.granted(key)
    notebook = place.start(key, 256)
    notebook.tell(busy=True)
    return notebook


def pairs_of(place: Place, count: int) -> list[list[Notebook]]:
    """Start pairs of users on as many GPUs: each holds all of one while the other is idle."""
    first = [enter(place, f"ada-{number}") for number in range(count)]
    found: list[list[Notebook]] = []
    for number, ada in enumerate(first):
        ada.tell()
        found.append([ada, enter(place, f"grace-{number}")])
    return found


def turns(place: Place, notebooks: list[Notebook], count: int) -> int:
    """Let two take so many turns; return how many they took."""
    for number in range(count):
        back, away = notebooks[number % 2], notebooks[1 - number % 2]
        assert (back.state(), away.state()) == ("parked", "held")
        swap(back, away)
        assert not place.agent.events(kind="lost")
    return count


def rounds(place: Place, count: int, pairs: int = 1) -> None:
    """So many turns in all, of pairs of users, each pair with one GPU: nothing is lost."""
    all_pairs = pairs_of(place, pairs)
    with ThreadPoolExecutor(pairs) as threads:
        taken = sum(threads.map(lambda two: turns(place, two, count // pairs), all_pairs))
    print(f"{taken} turns, {pairs} pairs of notebooks, nothing lost")


def test_two_who_take_turns(place: Place) -> None:
    rounds(place, 1)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_pairs_who_take_turns_a_thousand_times(runtime: Path) -> None:
    found = Place(runtime, devices=4)
    try:
        rounds(found, CYCLES, pairs=4)
    finally:
        for notebook in found.notebooks:
            notebook.close()
        found.close()
