"""One token keeps event streams open by the hundred: what is left for the other hubs."""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from agent_harness import missing_libraries, own_agent
from pool_process import PoolProcess
from ports import free_port
from test_attack_pool import CONFIG, TOKENS

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(missing_libraries() is not None, reason=str(missing_libraries()))]
DESCRIPTORS = 300


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with own_agent() as agent:
        found = free_port()
        (agent.runtime / "pool.yaml").write_text(CONFIG)
        env = {f"TOKEN_{name.upper().replace(' ', '_')}": secret for name, secret in TOKENS.items()}
        pool = PoolProcess(agent.runtime, "--config", str(agent.runtime / "pool.yaml"), "--listen", f"127.0.0.1:{found}", env=env)
        pool.command = ["prlimit", f"--nofile={DESCRIPTORS}", *pool.command]
        pool.start()
        yield found
        pool.kill(signal.SIGTERM)


def stream(port: int, token: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=5)
    connection.sendall(f"GET /v1/availability/events HTTP/1.1\r\nHost: pool\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
    return connection


def answered(port: int) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        headers = {"Authorization": f"Bearer {TOKENS['other hub']}"}
        return httpx.get(f"http://127.0.0.1:{port}/v1/devices", headers=headers, timeout=3).status_code == 200
    return False


@pytest.mark.xfail(strict=True, reason="connections are bounded for a socket, not for a token")
@pytest.mark.parametrize("role", ["read", "hub"])
def test_streams_of_one_token_leave_connections_to_the_others(port: int, role: str) -> None:
    assert answered(port), "the control"
    held = [stream(port, TOKENS[role]) for _ in range(DESCRIPTORS)]
    try:
        time.sleep(1)
        assert answered(port), f"a token of role {role} has all connections of the pool: no other hub starts a server"
    finally:
        for one in held:
            one.close()
