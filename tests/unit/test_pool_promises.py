"""Guarantees and reservations that the devices cannot keep are said in the pool's log, once the devices are known."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from test_pool_hints import Nothing
from test_pool_queue import Pool
from test_pool_windows import CLASS

from nbgpu_pool.promises import beyond
from nbgpu_pool.quotas import Limits, Quotas
from nbgpu_pool.service import Service
from nbgpu_pool.state import Settings

GUARANTEES = Quotas(users={"ada": Limits(guarantee_milli=500)}, groups={"bio": Limits(guarantee_milli=2500)})


def test_what_cannot_be_kept_is_said_with_both_numbers() -> None:
    settings = Settings(quotas=GUARANTEES, windows=(replace(CLASS, count=400), replace(CLASS, name="lab", model="Small")))
    two = Pool(devices=2).devices
    assert beyond(settings, []) == [], "nothing is known yet"
    assert beyond(settings, two) == [
        "The guarantees of the configuration are 3 GPUs together, and the pool has 2 GPUs.",
        "The reservation class biology keeps 400 places, which are 50 GPUs; the pool has 2 GPUs, so at most 16 places.",
        "The reservation lab keeps 8 places, which are 1 GPU; the pool has no GPU of model Small, so at most 0 places.",
    ]
    kept = Settings(quotas=GUARANTEES, windows=(replace(CLASS, count=16),))
    assert beyond(kept, Pool(devices=3).devices) == [], "control"


@pytest.mark.asyncio
async def test_it_is_said_once_and_again_after_a_configuration_that_is_read_again(caplog: pytest.LogCaptureFixture) -> None:
    service, pool = Service(Nothing(), Settings(quotas=GUARANTEES)), Pool(devices=2)  # type: ignore[arg-type]
    for _ in range(2):
        service.promised(list(pool.devices), [])
    said = [one.message for one in caplog.records if one.levelno == logging.WARNING]
    assert said == ["The guarantees of the configuration are 3 GPUs together, and the pool has 2 GPUs."]
    service.configure(Settings(quotas=GUARANTEES))
    assert caplog.text.count("3 GPUs together") == 2
