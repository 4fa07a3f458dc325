"""What a server says of its kernels: any language, busy or idle."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import pytest
from fake_slice_agent import FakeAgent
from lab_helpers import until

from nbgpu_lab.kernels import UNKNOWN, kernels_of


def app(state: str, idle: timedelta | None, spec: object) -> Any:
    """A server with one kernel, of the notebook `train.ipynb`."""
    manager = SimpleNamespace(kernel_spec=spec)
    if idle is not None:
        manager.last_activity = datetime.now(timezone.utc) - idle

    async def sessions() -> list[dict[str, Any]]:
        return [{"kernel": {"id": "abc"}, "name": "", "path": "deep/train.ipynb", "type": "notebook"}]

    kernels = [{"id": "abc", "name": "ir", "execution_state": state}]
    kernel_manager = SimpleNamespace(list_kernels=lambda: kernels, get_kernel={"abc": manager}.__getitem__)
    return SimpleNamespace(kernel_manager=kernel_manager, session_manager=SimpleNamespace(list_sessions=sessions))


R = SimpleNamespace(display_name="R 4.4", language="R")


async def test_a_kernel_of_another_language() -> None:
    kernel = (await kernels_of(app("idle", timedelta(minutes=5), R)))["abc"]
    assert 300 <= kernel.pop("state_seconds") < 310
    named = {"name": "train.ipynb", "path": "deep/train.ipynb", "type": "notebook", "state": "idle"}
    assert kernel == named | {"kernel_name": "R 4.4", "language": "R"}
    assert kernel.keys() | {"state_seconds"} == UNKNOWN.keys()


@pytest.mark.parametrize(
    ("state", "idle", "expected"),
    [
        ("busy", timedelta(minutes=5), None),
        ("idle", -timedelta(hours=1), 0),
        ("idle", None, None),
        ("dead", timedelta(0), None),
        ("starting", -timedelta(hours=1), 0),
    ],
    ids=["busy", "the clock was set back", "unknown", "dead", "starting"],
)
async def test_a_kernel_that_does_nothing_has_an_age_and_never_a_negative_one(state: str, idle: Any, expected: Any) -> None:
    kernel = (await kernels_of(app(state, idle, R)))["abc"]
    assert (kernel["state"], kernel["state_seconds"]) == (state, expected)


async def test_a_kernel_whose_spec_is_gone_goes_by_its_name() -> None:
    kernel = (await kernels_of(app("idle", None, None)))["abc"]
    assert (kernel["kernel_name"], kernel["language"]) == ("ir", None)


@pytest.mark.slow
async def test_what_a_page_asks_of_a_kernel_that_it_shows_is_no_use_of_it(agent: FakeAgent, jp_fetch: Any, jp_serverapp: Any) -> None:
    """JupyterLab and Notebook 7 ask for the history whenever they open a notebook, which Jupyter's own count of activity begins anew."""
    body = '{"name": "", "type": "notebook", "path": "a.ipynb", "kernel": {"name": "python3"}}'
    kernel_id = json.loads((await jp_fetch("api/sessions", method="POST", body=body)).body)["kernel"]["id"]
    manager = jp_serverapp.kernel_manager.get_kernel(kernel_id)
    await kernels_of(jp_serverapp)  # as the server does from the kernel's start on
    client = manager.client()
    client.start_channels()

    async def idle_since() -> float:
        found = (await kernels_of(jp_serverapp))[kernel_id]
        return manager.last_activity.timestamp() if found["state"] != "idle" else now() - found["state_seconds"]

    def now() -> float:
        return datetime.now(timezone.utc).timestamp()

    async def moved(code: str) -> tuple[float, float]:
        """Return by how many seconds what we say, and what Jupyter says, has moved."""
        before, jupyters = await idle_since(), manager.last_activity.timestamp()
        await asyncio.sleep(1.5)  # what is told apart
        if code:
            await client.execute_interactive(code, timeout=30)
        else:
            await client.history(raw=True, hist_access_type="tail", n=9, reply=True, timeout=30)
        await until(lambda: manager.last_activity.timestamp() > jupyters + 1 and manager.execution_state == "idle", 10)
        await asyncio.sleep(0.2)  # the server hears of it on two connections
        return await idle_since() - before, manager.last_activity.timestamp() - jupyters

    try:
        await client.wait_for_ready(timeout=60)
        await client.execute_interactive("1", timeout=30)
        await until(lambda: manager.execution_state == "idle", 10)
        ours, jupyters = await moved("")
        assert jupyters > 1, "the control: else it need not be told apart"
        assert ours < 0.5
        ours, _ = await moved("2")
        assert ours > 1
        await manager.restart_kernel(now=True)
        await client.wait_for_ready(timeout=60)
        ours, _ = await moved("3")
        assert ours > 1, "after a restart too"
    finally:
        client.stop_channels()
        await jp_fetch("api/kernels", kernel_id, method="DELETE")
    assert kernel_id not in await kernels_of(jp_serverapp)
