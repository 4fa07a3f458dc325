"""The fixtures of these tests; what they stand on is in `browser_hub`."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
from browser_hub import Hub, chromium, hub

__all__ = ["chromium", "hub"]
LOG_LINES = 80


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Show with a failure what the hub, its pool and its agent said last."""
    report = yield
    running = getattr(item, "funcargs", {}).get("hub")
    if report.failed and isinstance(running, Hub):
        lines = running.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        report.sections.append(("the hub's log", "\n".join(line[:400] for line in lines)))
    return report
