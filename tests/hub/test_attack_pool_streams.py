"""One token keeps event streams open by the hundred: what is left for the other hubs."""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from agent_harness import missing_libraries, own_agent
from pool_process import PoolProcess, until
from ports import free_port
from test_attack_pool import CONFIG, TOKENS

from nbgpu_pool.connections import of_one, with_descriptors

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(missing_libraries() is not None, reason=str(missing_libraries()))]
DESCRIPTORS = 300


@pytest.fixture(scope="module")
def log(pool: tuple[int, Path]) -> Path:
    return pool[1]


@pytest.fixture(scope="module")
def port(pool: tuple[int, Path]) -> int:
    return pool[0]


@pytest.fixture(scope="module")
def pool() -> Iterator[tuple[int, Path]]:
    with own_agent() as agent:
        found = free_port()
        (agent.runtime / "pool.yaml").write_text(CONFIG)
        env = {f"TOKEN_{name.upper().replace(' ', '_')}": secret for name, secret in TOKENS.items()}
        process = PoolProcess(agent.runtime, "--config", str(agent.runtime / "pool.yaml"), "--listen", f"127.0.0.1:{found}", env=env)
        process.command = ["prlimit", f"--nofile={DESCRIPTORS}", *process.command]
        process.start()
        yield found, agent.runtime / "pool.log"
        process.kill(signal.SIGTERM)


def stream(port: int, token: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=5)
    connection.sendall(f"GET /v1/availability/events HTTP/1.1\r\nHost: pool\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
    return connection


def answered(port: int) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        headers = {"Authorization": f"Bearer {TOKENS['other hub']}"}
        return httpx.get(f"http://127.0.0.1:{port}/v1/devices", headers=headers, timeout=3).status_code == 200
    return False


@pytest.mark.parametrize("role", ["read", "hub"])
def test_streams_of_one_token_leave_connections_to_the_others(port: int, log: Path, role: str) -> None:
    assert answered(port), "the control"
    held = [stream(port, TOKENS[role]) for _ in range(DESCRIPTORS)]
    try:
        time.sleep(1)
        assert answered(port), f"a token of role {role} has all connections of the pool: no other hub starts a server"
    finally:
        for one in held:
            one.close()
    assert log.read_text().count("out of system resource") == 0, "connections beyond the bound took all descriptors, and the log"


def test_who_has_as_many_as_it_may_is_told_so_and_has_them_again(port: int) -> None:
    """The control: the same streams of another hub, and of this one once they are closed."""
    headers = {"Authorization": f"Bearer {TOKENS['hub']}"}
    url = f"http://127.0.0.1:{port}/v1/availability/events"
    most = of_one("hub", with_descriptors(DESCRIPTORS))
    held = [stream(port, TOKENS["hub"]) for _ in range(most)]
    try:
        for one in held:
            assert b" 200 " in one.recv(4096)
        refused = httpx.get(url, headers=headers, timeout=3)
        assert (refused.status_code, refused.json()["error"]["code"], refused.headers["retry-after"]) == (429, "too-many-streams", "5")
        assert f"One hub may have {most} event streams" in refused.json()["error"]["message"]
        assert httpx.get(f"http://127.0.0.1:{port}/v1/devices", headers=headers, timeout=3).status_code == 200
        with httpx.stream("GET", url, headers={"Authorization": f"Bearer {TOKENS['other hub']}"}, timeout=3) as others:
            assert others.status_code == 200
    finally:
        for one in held:
            one.close()

    def again() -> bool:
        with httpx.stream("GET", url, headers=headers, timeout=3) as mine:
            return mine.status_code == 200

    until(again)
