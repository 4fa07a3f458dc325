"""Generated requests against the agent's admin API: no answer from 500 on, and none that its OpenAPI document does not know."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_harness import AgentProcess, missing_libraries

from nbgpu_agent import admin_api

httpx = pytest.importorskip("httpx")
schemathesis = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, settings  # noqa: E402

pytestmark = [pytest.mark.timeout(300), pytest.mark.skipif(missing_libraries() is not None, reason=str(missing_libraries()))]
schema = schemathesis.openapi.from_dict(admin_api.make_app(None, None).openapi())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with tempfile.TemporaryDirectory(prefix="nbgpu-test-", dir="/tmp") as name:
        agent = AgentProcess(Path(name))
        try:
            agent.start()
            agent.put(agent.slice(250, slice_id="0" * 8))
            with httpx.Client(transport=httpx.HTTPTransport(uds=f"{name}/agent.sock"), base_url="http://agent", timeout=60) as found:
                yield found
        finally:
            agent.close()


def test_the_document_is_served(client: httpx.Client) -> None:
    assert client.get("/openapi.json").json() == schema.raw_schema


@schema.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_breaks_the_agent(case: schemathesis.Case, client: httpx.Client) -> None:
    if case.query and "wait_seconds" in case.query:
        case.query = {**case.query, "wait_seconds": 0 if case.query["wait_seconds"] else case.query["wait_seconds"]}
    arguments = case.as_transport_kwargs(base_url="http://agent")
    body = {
        name: arguments[name]
        for name in ("json", "data", "content", "params", "headers", "cookies", "files")
        if arguments.get(name) is not None
    }
    answer = client.request(arguments["method"], arguments["url"], **body)
    assert answer.status_code < 500, (answer.status_code, answer.text)
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) >= {"code", "message"}
