"""What a server says of its kernels: any language, busy or idle."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import pytest

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
