"""The pool as a process: SIGKILL and restart with clients at work, takeover, TCP with tokens, hostile input."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from pool_fake_agent import AgentTruth, FakeAgent, device
from pool_process import PoolProcess, until
from ports import free_port
from schemathesis import GenerationMode

from nbgpu.client import PoolClient
from nbgpu.errors import NbgpuError, Unavailable
from nbgpu.models import Grant, GrantState, Owner, Request

pytestmark = pytest.mark.timeout(180)


class AgentThread:
    """A fake agent that answers in a thread of its own."""

    def __init__(self, directory: Path, devices: int):
        self.truth = AgentTruth([device(index) for index in range(devices)])
        self._agent = FakeAgent(directory / "agent.sock", self.truth)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.do(self._agent.start())

    def do(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def call(self, function: Callable, *arguments):
        async def inside():
            return function(*arguments)

        return self.do(inside())

    def stop(self) -> None:
        self.do(self._agent.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)


@pytest.fixture
def agent(runtime: Path) -> Iterator[AgentThread]:
    found = AgentThread(runtime, 2)
    yield found
    found.stop()


@pytest.fixture
def pool(runtime: Path, agent: AgentThread) -> Iterator[PoolProcess]:
    (runtime / "pool.yaml").write_text("reservation_ttl_seconds: 2\nqueue_ttl_seconds: 4\nqueue: {per_user: 100}\n")
    found = PoolProcess(runtime, "--config", str(runtime / "pool.yaml"))
    found.start()
    yield found
    if found.process and found.process.poll() is None:
        found.kill(signal.SIGTERM)


class Tenant(threading.Thread):
    """Starts and stops servers for ever, and goes on through everything that the pool does to it."""

    def __init__(self, number: int, pool: PoolProcess, agent: AgentThread, stop: threading.Event, seed: int):
        super().__init__(daemon=True)
        self.pool, self.agent, self.stop, self.rng = PoolClient(pool.directory / "pool.sock", 5), agent, stop, random.Random(seed)
        self.owner = Owner(hub="h", user=f"user-{number}", server="")
        self.doing = "nothing"
        self.rounds = 0
        self.surprises: list[str] = []

    def run(self) -> None:
        while not self.stop.is_set():
            try:
                self.server()
                self.rounds += 1
            except Unavailable:
                time.sleep(0.05)
            except NbgpuError as error:
                if error.status not in (404, 409, 503):
                    self.surprises.append(f"{self.doing}: {error.status} {error.message}")
            except Exception as error:
                self.surprises.append(f"{self.doing}: {error!r}")

    def server(self) -> None:
        request = Request(request_id=uuid4().hex, owner=self.owner, compute_milli=self.rng.choice([125, 250, 333, 500]))
        try:
            grant = self.step("request", self.pool.acquire, request)
            while grant.state == GrantState.queued and not self.stop.is_set():
                time.sleep(0.02)
                grant = self.step("wait", self.pool.grant, request.request_id)
            if grant.state != GrantState.reserved:
                return
            self.step("prepare", self.pool.prepare, request.request_id, None)
            grant = self.step("bind", self.pool.bind, request.request_id, 4321)
            assert grant.state == GrantState.bound, grant
            time.sleep(self.rng.random() * 0.1)
            if self.rng.random() < 0.5:
                self.agent.call(self.agent.truth.end, request.request_id)
        finally:
            with contextlib.suppress(NbgpuError):
                self.step("release", self.pool.cancel, request.request_id)
            self.agent.call(self.agent.truth.end, request.request_id)
            self.doing = "nothing"

    def step(self, what: str, call: Callable[..., Grant], *arguments):
        self.doing = what
        return call(*arguments)


def overbooked(truth: AgentTruth) -> bool:
    for one in truth.devices:
        parts = [part for seen in list(truth.slices.values()) for part in seen.slice.devices if part.uuid == one.uuid]
        if sum(part.compute_milli for part in parts) > 1000 or sum(part.memory_bytes for part in parts) > one.usable_bytes:
            return True
    return False


def test_kills_lose_nothing_and_give_nothing_twice(pool: PoolProcess, agent: AgentThread) -> None:
    seed = random.SystemRandom().randrange(2**32) if "NBGPU_SEED" not in os.environ else int(os.environ["NBGPU_SEED"])
    kills = int(os.environ.get("NBGPU_KILLS", "12"))
    rng = random.Random(seed)
    print(f"seed {seed}")
    agent.truth.delay_seconds = 0.01
    stop = threading.Event()
    tenants = [Tenant(number, pool, agent, stop, seed + number) for number in range(8)]
    for tenant in tenants:
        tenant.start()
    landed: Counter[str] = Counter()
    for _ in range(kills):
        before = sum(tenant.rounds for tenant in tenants)
        until(lambda before=before: sum(tenant.rounds for tenant in tenants) > before + 3, 30)
        time.sleep(rng.random() * 0.15)
        landed.update(tenant.doing for tenant in tenants)
        pool.kill()
        assert not agent.call(overbooked, agent.truth)
        pool.start()
    stop.set()
    for tenant in tenants:
        tenant.join(30)
    print("clients were in:", dict(landed), "rounds:", sum(tenant.rounds for tenant in tenants))
    assert [one for tenant in tenants for one in tenant.surprises] == []
    assert sum(landed[what] for what in ("request", "wait", "prepare", "bind", "release")) >= kills, "the kills landed in idle code"

    def settled() -> bool:
        slices = set(agent.call(lambda: list(agent.truth.slices)))
        books = {key for one in pool.client.devices() for key in one.slices}
        return not slices and not books and not pool.client.grants()

    until(settled, 20)
    assert all(one.compute_granted_milli == 0 and one.memory_granted_bytes == 0 for one in pool.client.devices())


def test_running_slices_survive_and_are_found_again(pool: PoolProcess, agent: AgentThread) -> None:
    request = Request(request_id=uuid4().hex, owner=Owner(hub="h", user="ada"), compute_milli=500)
    pool.client.acquire(request)
    pool.client.prepare(request.request_id, None)
    pool.client.bind(request.request_id, 4321)
    before = pool.client.grant(request.request_id).slice
    pool.kill()
    pool.start()
    found = pool.client.grant(request.request_id)
    assert (found.state, found.slice) == (GrantState.bound, before)
    assert pool.client.acquire(request).state == GrantState.bound
    time.sleep(2.5)
    assert pool.client.grant(request.request_id).state == GrantState.bound, "longer than a reservation lives"


def test_second_pool_is_refused_and_takeover_hands_over(pool: PoolProcess, runtime: Path) -> None:
    second = subprocess.run(pool.command, env=pool.env, capture_output=True, text=True, timeout=30)
    assert second.returncode == 1
    assert second.stderr.count("\n") == 1
    assert f"pid {pool.process.pid}" in second.stderr
    heir = PoolProcess(runtime, "--takeover")
    heir.start(ready=False)
    assert pool.process.wait(10) == 0
    until(heir.ready)
    assert (runtime / "pool.sock").stat().st_mode & 0o777 == 0o600
    assert heir.kill(signal.SIGTERM) == 0
    assert not (runtime / "pool.sock").exists()


SECRET = "a-secret-for-the-tests"


@pytest.fixture
def address(runtime: Path, agent: AgentThread) -> Iterator[str]:
    port = free_port()
    (runtime / "pool.yaml").write_text("tokens: [{role: hub, hub: hub, env: POOL_TOKEN}]\n")
    found = PoolProcess(runtime, "--config", str(runtime / "pool.yaml"), "--listen", f"127.0.0.1:{port}", env={"POOL_TOKEN": SECRET})
    found.start()
    yield f"http://127.0.0.1:{port}"
    assert found.process.poll() is None, "it must still live"
    found.kill(signal.SIGTERM)
    assert SECRET not in (runtime / "pool.log").read_text()


def test_tcp_needs_tokens(runtime: Path, agent: AgentThread) -> None:
    none = subprocess.run(
        [*PoolProcess(runtime).command, "--listen", "127.0.0.1:0"], env=PoolProcess(runtime).env, capture_output=True, text=True, timeout=30
    )
    assert none.returncode == 1
    assert "--listen needs tokens" in none.stderr


def test_no_input_makes_it_fail(address: str) -> None:
    """Made-up input of every route, right and wrong by the schema, much of it about requests that exist."""
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json").exclude(path_regex="/events$")
    headers = {"Authorization": f"Bearer {SECRET}"}
    examples = int(os.environ.get("NBGPU_SCHEMA_EXAMPLES", "8"))
    quiet = settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    statuses: Counter[int] = Counter()
    known: list[str] = []

    def ask(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("owner"), dict) and "hub" in case.body["owner"]:
            case.body["owner"]["hub"] = "hub"
            if "request_id" in case.body and mode is GenerationMode.POSITIVE:
                # Nearly all that is made up is more than the devices have.
                case.body.update(model=None, memory_bytes=None, memory_milli=None, device_count=1, compute_milli=10)
        if known and "request_id" in case.path_parameters and sum(statuses.values()) % 3:
            case.path_parameters["request_id"] = known[sum(statuses.values()) % len(known)]
        response = case.call(headers=headers)
        statuses[response.status_code] += 1
        # 503 with a code of ours is an answer, anything else above 499 is a failure.
        assert response.status_code < 500 or response.json()["error"]["code"] in ("refused-by-node", "queue-full"), response.text
        if response.status_code >= 400:
            assert set(response.json()) == {"error"}, response.text
        elif case.path.startswith("/v1/requests") and case.method == "POST":
            known.extend([response.json()["request"]["request_id"]] if "request" in response.json() else [])

    for mode in (GenerationMode.POSITIVE, GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        for result in schema.get_all_operations():
            with contextlib.suppress(Unsatisfiable):  # a route with no input has no wrong one
                quiet(given(case=result.ok().as_strategy(generation_mode=mode))(ask))()
    print(dict(statuses), "requests made:", len(set(known)))
    assert statuses[200]
    assert statuses[400]
    assert statuses[409]
    assert known


def test_the_configuration_is_read_again_at_sighup(tmp_path: Path) -> None:
    file = tmp_path / "pool.yaml"
    file.write_text("quotas: {default: {limit: 1/4}}\n")
    agent = AgentThread(tmp_path, 1)
    pool = PoolProcess(tmp_path, "--config", str(file))
    pool.start()

    def ask() -> str:
        request = {"request_id": uuid4().hex, "owner": {"hub": "h", "user": "ada"}, "compute_milli": 500}
        try:
            return pool.client.call("POST", "/v1/requests", request)["state"]
        except NbgpuError as error:
            return error.message

    def told(words: str) -> bool:
        return words in (tmp_path / "pool.log").read_text()

    try:
        assert "Your quota is a quarter of a GPU" in ask()
        file.write_text("quotas:\n  default: {limit: many}\n")
        assert pool.process is not None
        pool.process.send_signal(signal.SIGHUP)
        until(lambda: told("the old configuration stays in force"))
        assert told("line 2, quotas.default.limit: it must be a number of GPUs")
        assert "Your quota is a quarter of a GPU" in ask()
        file.write_text("quotas: {default: {limit: 1/2}}\n")
        pool.process.send_signal(signal.SIGHUP)
        until(lambda: told("the configuration was read again"))
        assert ask() == "reserved"
    finally:
        pool.kill()
        agent.stop()
