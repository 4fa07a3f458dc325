"""Fixtures of the tests on a cluster: an agent on its real node for the modules that say so, a way to the API server for the others, which
have a `place` of their own.
"""

from __future__ import annotations

from collections.abc import Iterator

import browser_kit
import pytest
from gateway_kit import Gateway
from node_kit import Node, node_with_place
from node_kit import Place as NodePlace
from place_kit import Place
from playwright.sync_api import Browser
from pool_kit import Pool
from stack_kit import SHOTS, Stack
from z2jh_kit import Hub


@pytest.fixture
def gateway(place: Place) -> Iterator[Gateway]:
    """A way to the API server that can be cut."""
    gateway = Gateway(place)
    yield gateway
    Pool.stop_all()  # before its way to the lease is closed
    gateway.close()


@pytest.fixture(scope="module")
def agent_and_place(request: pytest.FixtureRequest) -> Iterator[tuple[Node, NodePlace]]:
    """An agent with the module's `AGENT_ARGUMENTS`, and a namespace."""
    with node_with_place(getattr(request.module, "AGENT_ARGUMENTS", ())) as found:
        yield found


@pytest.fixture
def node(agent_and_place: tuple[Node, NodePlace]) -> Node:
    return agent_and_place[0]


@pytest.fixture(name="place")
def node_place(agent_and_place: tuple[Node, NodePlace]) -> Iterator[NodePlace]:
    yield agent_and_place[1]
    agent_and_place[1].empty()


# -- a hub on the cluster, for the modules that have one `running`: a chart and a hub of their own


@pytest.fixture(scope="module")
def nbgpu(running: tuple[Stack, Hub]) -> Stack:
    return running[0]


@pytest.fixture(scope="module")
def hub(running: tuple[Stack, Hub]) -> Hub:
    return running[1]


@pytest.fixture(scope="module")
def chromium(running: tuple[Stack, Hub]) -> Iterator[Browser]:
    del running  # closed before the hub goes, so that the last pictures are of what a test left
    with browser_kit.chromium(SHOTS) as browser:
        yield browser
