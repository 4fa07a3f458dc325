"""What the agent tells by TCP: whether it is well to everybody, who uses what only where that is wanted."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nbgpu_agent.metrics import MetricsPage


class Text:
    """Stands for the agent's metrics."""

    def text(self) -> str:
        return 'nbgpu_slice_processes{user="ada"} 1\n'


def asked(page: MetricsPage, path: str) -> tuple[int, str]:
    """Return status and body of a GET."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(page._answer({"method": "GET", "path": path}, None, send))
    return sent[0]["status"], sent[1]["body"].decode()


@pytest.mark.parametrize("health_only", [False, True])
def test_users_are_named_only_where_that_is_wanted(health_only: bool) -> None:
    page = MetricsPage(None, health_only)
    assert asked(page, "/healthz")[0] == 503
    page.metrics = Text()  # type: ignore[assignment]
    assert asked(page, "/healthz") == (200, '{"status": "ok"}')
    status, body = asked(page, "/metrics")
    assert ("ada" in body, status) == ((False, 404) if health_only else (True, 200))


def test_who_asks_for_metrics_that_are_off_is_told_how_to_have_them() -> None:
    off = asked(MetricsPage(None, health_only=True), "/metrics")[1]
    assert "agent.metrics.enabled" in off
    assert "Try /metrics" not in off
    assert "Try /metrics." in asked(MetricsPage(None), "/metric")[1]
    assert "Try /healthz." in asked(MetricsPage(None, health_only=True), "/metric")[1]
