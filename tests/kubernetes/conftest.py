"""Fixtures of the tests of the pool on a cluster; each module has a `place` of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pool_kit import Gateway, Place, Pool


@pytest.fixture
def gateway(place: Place) -> Iterator[Gateway]:
    """A way to the API server that can be cut."""
    gateway = Gateway(place)
    yield gateway
    Pool.stop_all()  # before its way to the lease is closed
    gateway.close()
