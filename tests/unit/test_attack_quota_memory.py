"""A quota in GPUs, and who asks for a thousandth of the time with all of the memory (docs/quotas.md). Pure."""

from __future__ import annotations

import pytest
from test_pool_held import Pool

from nbgpu.errors import NbgpuError, Refused
from nbgpu.models import GrantState
from nbgpu.quantities import GIB
from nbgpu_pool.queue import Fairness
from nbgpu_pool.quotas import Limits, Quotas

QUARTER = Quotas(default=Limits(limit_milli=250))


def test_a_limit_keeps_one_person_from_taking_all() -> None:
    """So says the table of what to tune. The control: more time than the limit is refused."""
    pool = Pool(devices=4, quotas=QUARTER)
    with pytest.raises(Refused, match="Your quota"):
        pool.ask(1000, "m")
    for _ in range(4):
        with pytest.raises(Refused):
            pool.ask(1, "m", memory_bytes=80 * GIB)
    assert pool.ask(250, "other").state == GrantState.reserved, "one user holds the memory of four GPUs with a quota of a quarter"


def test_per_user_of_a_group_likewise() -> None:
    pool = Pool(devices=2, quotas=Quotas(groups={"students": Limits(per_user_milli=250)}))
    with pytest.raises(Refused):
        pool.ask(1, "m", memory_bytes=80 * GIB, device_count=2, groups=["students"])
    assert pool.ask(250, "other", groups=["students"]).state == GrantState.reserved


def test_a_running_server_grows_its_memory_past_a_quota_in_gpus() -> None:
    pool = Pool(quotas=QUARTER)
    key = pool.running(250, "m")
    with pytest.raises(Refused):
        pool.resize(key, memory_bytes=80 * GIB)


def test_growing_past_who_waits_is_passing_them() -> None:
    """What is given by a start counts as passing (`Pass.passed`); what is given by a resize should."""
    pool = Pool(fairness=Fairness(overtake_count=3, fair=True))
    small, leaves = pool.running(10, "m"), [pool.running(240, f"u{number}") for number in range(4)]
    waits = pool.ask(500, "w").request.request_id
    milli = 10
    for key in leaves:
        del pool.seen[key]
        pool.core.mark += 1
        pool.sync()
        milli += 240
        if milli < 900:
            pool.resize(small, compute_milli=milli, memory_milli=milli)
            pool.in_force(small)
        pool.core.touch(pool.core.known(waits), pool.now)
    assert pool.core.known(waits).overtaken > 0, f"m has grown to {milli - 240} thousandths past one who waits, and passed nobody"


def grown(pool: Pool, key: str, milli: int) -> None:
    pool.resize(key, compute_milli=milli)
    pool.in_force(key)


def test_nothing_grows_on_what_is_kept_for_who_was_passed_too_often() -> None:
    pool = Pool(fairness=Fairness(overtake_count=3, fair=True))
    small = [pool.running(100, f"m{number}") for number in range(4)]
    pool.running(400, "v")
    waits = pool.ask(500, "w").request.request_id
    for key in small[:3]:
        grown(pool, key, 110)
    assert pool.core.known(waits).overtaken == 3
    with pytest.raises(NbgpuError, match="kept for someone who has waited long"):
        pool.resize(small[3], compute_milli=110)
    pool.resize(small[0], compute_milli=50)  # the control: nobody is kept from giving back


def test_growing_again_and_again_has_nobody_protected() -> None:
    """Two of a kind: one grows and shrinks, so that the other, who waits, has a device kept."""
    pool = Pool(fairness=Fairness(overtake_count=3))
    pumps = pool.running(500, "m")
    waits = pool.ask(1000, "w").request.request_id
    for _ in range(10):
        grown(pool, pumps, 600)
        grown(pool, pumps, 500)
    assert pool.core.known(waits).overtaken == 1
    late = pool.ask(1000, "w2").request.request_id
    grown(pool, pumps, 600)
    assert (pool.core.known(waits).overtaken, pool.core.known(late).overtaken) == (1, 1), "who has come since is passed"


def test_growing_past_who_could_not_use_it_passes_nobody() -> None:
    pool = Pool(quotas=Quotas(groups={"g": Limits(limit_milli=250)}))
    grows = pool.running(500, "m")
    pool.running(250, "held", groups=["g"])
    own, held = pool.ask(900, "m").request.request_id, pool.ask(250, "held", groups=["g"]).request.request_id
    other = pool.ask(900, "w").request.request_id
    grown(pool, grows, 600)
    assert [pool.core.known(key).overtaken for key in (own, held, other)] == [0, 0, 1]
