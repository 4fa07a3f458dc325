"""Pool, agent, hub or all of them SIGKILLed at random moments of spawns and stops, while other servers run: the whole line.

``NBGPU_SEED`` repeats a run. The histogram says what was killed in which phase.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from hub_process import ROOT, Hub, until
from storm_kit import PHASES, Books, Killer, Storm

LIB = ROOT / "nodeagent" / "nbgpu_agent" / "_lib"
BUILT = all(path.exists() for path in (LIB / "libnbgpu.so", LIB / "libnbgpu_agent.so", LIB / "sim" / "libcuda.so.1"))
pytestmark = [pytest.mark.skipif(not BUILT, reason="C libraries are not built (make setup)")]

USERS = [f"user{number}" for number in range(8)]
SIZES = {"eighth": 125, "quarter": 250, "half": 500}
VICTIMS = ["pool"] * 3 + ["agent"] * 3 + ["hub"] * 3 + ["all"]
KILLED = 0.8
"""Share of the steps in which something is killed."""
CALM_SECONDS = 30
MORE = """
c.Spawner.cmd = [c.Spawner.cmd[0], {server!r}]
c.JupyterHub.tornado_settings = {{"slow_spawn_timeout": 10}}
setup(c, runtime={run!r})
# who loses a reservation need not wait for two minutes here
c.JupyterHub.services[-1]["command"] += ["--config", {config!r}]
{extra}
"""


def make_storm(make_hub: Callable[..., Hub], place: Path, extra: str = "") -> Storm:
    run = place / "run"
    config = place / "pool.json"
    config.write_text('{"reservation_ttl_seconds": 10}')
    text = MORE.format(config=str(config), server=str(Path(__file__).with_name("storm_server.py")), run=str(run), extra=extra)
    hub = make_hub(text, environment={"NBGPU_SIM_STATE": str(place / "sim"), "NBGPU_SIM_DEVICES": "2", "NBGPU_SIM_MEMORY_MIB": "16384"})
    storm = Storm(hub, run)
    until(lambda: storm.pool.healthy() and storm.agent.healthy(), 30, "the parts answer\n" + hub.log.read_text()[-3000:])
    hub.add(*USERS)
    storm.settled(CALM_SECONDS)
    return storm


class Run:
    """Spawns and stops, one after the other, with kills in between."""

    def __init__(self, storm: Storm, seed: int):
        self.storm, self.rng = storm, random.Random(seed)
        self.running: dict[str, int] = {}
        self.books = Books()
        self.beats: dict[str, int] = {}
        self.landed: Counter[str] = Counter()
        self.outcome: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        # each phase as often as each other, in an order of its own
        self.plan: dict[str, list[str]] = {"spawn": [], "stop": []}

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Note where the time goes."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[what] += time.monotonic() - began

    def step(self) -> None:
        """Start or stop one server, most times with a kill in it; then compare everything."""
        idle = [user for user in USERS if user not in self.running]
        room = 1000 - min(self.books.given.values(), default=0)
        fitting = [size for size, milli in SIZES.items() if milli <= room]
        stop = not fitting or not idle or (len(self.running) > 3 and self.rng.random() < 0.5)
        user = self.rng.choice(sorted(self.running) if stop else idle)
        operation = "stop" if stop else "spawn"
        if not self.plan[operation]:
            self.plan[operation] = self.rng.sample(PHASES[operation], len(PHASES[operation]))
        killer: Killer | None = None
        if self.rng.random() < KILLED:
            delay = self.rng.choice([0.0, self.rng.random() * 0.01, self.rng.random() * 0.1])
            killer = Killer(self.storm, operation, self.plan[operation].pop(), self.rng.choice(VICTIMS), delay)
            killer.start()
        size = self.rng.choice(fitting) if fitting else ""
        with contextlib.suppress(httpx.HTTPError), self.timed(operation):
            api = self.storm.hub
            answer = api.api("DELETE", f"users/{user}/server") if stop else api.spawn(user, {"profile": size})
            self.outcome[f"{operation} {answer.status_code}"] += 1
            assert killer is not None or answer.status_code in (201, 202, 204), answer.text
        if killer is not None:
            killer.over.set()
            with self.timed("the kill"):
                killer.join(60)
            self.landed[f"{killer.victim} killed while {operation}: {killer.landed}"] += 1
            if killer.victim in ("hub", "all"):
                with self.timed("hub starts again"):
                    self.storm.hub.start()
        self.compare(user, operation, size, killer.victim if killer else "")

    def compare(self, user: str, operation: str, size: str, killed: str) -> None:
        """Check that all books agree, that nobody else noticed, and that every limit holds."""
        before = self.books
        with self.timed(f"settle after {killed or 'nothing'}"):
            self.books = self.storm.settled(CALM_SECONDS)
        others = {name: server for name, server in before.hub.items() if name != user}
        assert {name: server for name, server in self.books.hub.items() if name != user} == others, "the same servers, the same grants"
        if user in self.books.hub:
            if operation == "stop" and user in before.hub:
                assert killed, "nothing was killed and the stop did not stop it"
                assert self.books.hub[user] == before.hub[user], "a stop that was lost changes nothing"
            self.running[user] = SIZES[size] if operation == "spawn" else self.running[user]
        else:
            assert killed or operation == "stop", f"{user} has no server though nothing was killed"
            self.running.pop(user, None)
            self.beats.pop(user, None)
        with self.timed("probes"):
            for name in self.running:
                self.holds(name)

    def holds(self, name: str) -> None:
        """Check that a user's server has what it was given, is refused more, and computes."""
        told = self.storm.probe(name)
        assert told["surprises"] == [], f"{name}: {told}"
        assert told["held"] <= told["total"] < told["held"] + 1024**3, f"{name} holds its slice: {told}"
        last = self.beats.get(name, -1)
        until(lambda: self.storm.probe(name)["beats"] > last, 10, f"{name} goes on")
        self.beats[name] = told["beats"]

    def end(self) -> None:
        """Stop everything: nothing may stay."""
        for user in sorted(self.running):
            self.storm.hub.stop(user)
        books = self.storm.settled(CALM_SECONDS)
        assert (books.living, books.pool, books.directories) == ({}, {}, set())
        assert set(books.given.values()) == {0}


def run_storm(storm: Storm, spawns: int) -> Run:
    seed = int(os.environ.get("NBGPU_SEED", random.SystemRandom().randrange(2**32)))
    print(f"seed {seed}")
    run = Run(storm, seed)
    began = time.monotonic()
    try:
        while sum(count for what, count in run.outcome.items() if what.startswith("spawn")) < spawns:
            run.step()
    finally:
        print(f"{time.monotonic() - began:.0f} s; answers: {dict(run.outcome)}")
        print("; ".join(f"{what} {seconds:.0f} s" for what, seconds in run.seconds.most_common()))
        for what, count in sorted(run.landed.items()):
            print(f"{count:4d}  {what}")
    run.end()
    return run


@pytest.mark.timeout(600)
def test_a_storm_of_kills_leaks_nothing_and_gives_nothing_twice(make_hub: Callable[..., Hub], place: Path) -> None:
    run_storm(make_storm(make_hub, place), 10)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_the_whole_storm(make_hub: Callable[..., Hub], place: Path) -> None:
    run = run_storm(make_storm(make_hub, place), 200)
    inside = sum(count for what, count in run.landed.items() if not what.endswith("after"))
    assert inside > sum(run.landed.values()) / 2, "most kills land inside an operation"


def test_the_comparison_sees_what_it_must_see() -> None:
    """The control of the storm: each thing that may go wrong is a difference."""
    good = {"hub": {"ada": (7, "s")}, "pool": {"s": "bound"}, "agent": {"s": "running"}, "directories": {"s"}, "living": {7: "s"}}
    assert Books(**good).differences() == []
    for change in (
        {"hub": {}},
        {"pool": {}},
        {"pool": {"s": "releasing"}},
        {"pool": {"s": "bound", "t": "reserved"}},
        {"agent": {}},
        {"agent": {"s": "prepared"}},
        {"directories": {"s", "t"}},
        {"living": {}},
        {"living": {7: "s", 8: "s"}},
        {"over": ["GPU-0"]},
    ):
        assert Books(**{**good, **change}).differences(), change
