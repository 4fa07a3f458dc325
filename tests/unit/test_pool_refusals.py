"""Each refusal names the rule and the number; and refusing is cheap, however often one user asks. Pure."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from test_pool_queue import Pool

from nbgpu.errors import NbgpuError
from nbgpu.models import GrantState, Resize
from nbgpu.quantities import GIB
from nbgpu_pool.quotas import Limits, Quotas

GROUP = Quotas(groups={"g": Limits(limit_milli=500, limit_bytes=50 * GIB)})


def refused(pool: Pool, milli: int, **more: object) -> str:
    with pytest.raises(NbgpuError) as caught:
        pool.ask(milli, **more)  # type: ignore[arg-type]
    return caught.value.message


def waits(pool: Pool, milli: int, **more: object) -> str:
    grant = pool.ask(milli, **more)  # type: ignore[arg-type]
    assert grant.state == GrantState.queued
    return grant.reason or ""


def of_user() -> str:
    pool = Pool(quotas=Quotas(default=Limits(limit_milli=500)))
    pool.started(250, server="one")
    return refused(pool, 500)


def of_user_memory() -> str:
    return refused(Pool(quotas=Quotas(users={"u": Limits(limit_bytes=20 * GIB)})), 500)


def of_member() -> str:
    return refused(Pool(quotas=Quotas(groups={"g": Limits(per_user_milli=250)})), 500, groups=["g"])


def of_group_never() -> str:
    return refused(Pool(quotas=GROUP), 750, groups=["g"])


def of_group_memory_never() -> str:
    return refused(Pool(quotas=Quotas(groups={"g": Limits(limit_bytes=50 * GIB)})), 250, memory_bytes=60 * GIB, groups=["g"])


def of_user_by_memory() -> str:
    pool = Pool(quotas=Quotas(default=Limits(limit_milli=500)))
    pool.started(1, server="one", memory_bytes=20 * GIB)
    return refused(pool, 1, memory_bytes=40 * GIB)


def of_group_by_memory() -> str:
    return refused(Pool(devices=2, quotas=GROUP), 1, memory_bytes=80 * GIB, count=2, groups=["g"])


def of_group_now() -> str:
    pool = Pool(quotas=GROUP)
    pool.started(375, user="a", groups=["g"])
    return waits(pool, 250, groups=["g"])


def of_group_now_by_memory() -> str:
    pool = Pool(quotas=Quotas(groups={"g": Limits(limit_milli=500)}))
    pool.started(1, user="a", groups=["g"], memory_bytes=40 * GIB)
    return waits(pool, 250, groups=["g"])


def of_guarantee_by_memory() -> str:
    return waits(Pool(quotas=Quotas(groups={"g": Limits(guarantee_milli=500)})), 1, memory_bytes=60 * GIB)


def of_growth_by_memory() -> str:
    return resized(Pool(quotas=Quotas(default=Limits(limit_milli=500))), 250, Resize(memory_bytes=60 * GIB))


def of_growth_guarantee_by_memory() -> str:
    return resized(Pool(quotas=Quotas(groups={"g": Limits(guarantee_milli=500)})), 250, Resize(memory_bytes=60 * GIB))


def of_guarantee() -> str:
    return waits(Pool(quotas=Quotas(groups={"g": Limits(guarantee_milli=500)})), 750)


def of_queue() -> str:
    pool = Pool(queue_total=2)
    pool.started(1000)
    for user in "ab":
        pool.ask(500, user=user)
    return refused(pool, 500)


def of_queue_of_user() -> str:
    pool = Pool(queue_per_user=2)
    pool.started(1000, user="x")
    for _ in range(2):
        pool.ask(500)
    return refused(pool, 500)


def of_memory() -> str:
    return refused(Pool(), 500, memory_bytes=200 * GIB)


def of_devices() -> str:
    return refused(Pool(devices=4, node_size=2), 1000, count=3)


def of_model() -> str:
    return refused(Pool(), 500, model="Huge")


def of_smallest() -> str:
    return refused(Pool(smallest_bytes=8 * GIB), 10)


def resized(pool: Pool, milli: int, asked: Resize, **more: object) -> str:
    entry = pool.core.known(pool.started(milli, **more))
    with pytest.raises(NbgpuError) as caught:
        pool.core.begin_resize(entry, asked, pool.now)
    return caught.value.message


def of_growth_room() -> str:
    pool = Pool()
    pool.started(750, user="x")
    return resized(pool, 250, Resize(compute_milli=500))


def of_growth_memory() -> str:
    pool = Pool()
    pool.started(500, user="x", memory_bytes=60 * GIB)
    return resized(pool, 125, Resize(memory_bytes=30 * GIB))


def of_growth_quota() -> str:
    return resized(Pool(quotas=Quotas(default=Limits(limit_milli=500))), 250, Resize(compute_milli=750))


def of_growth_guarantee() -> str:
    return resized(Pool(quotas=Quotas(groups={"g": Limits(guarantee_milli=500)})), 250, Resize(compute_milli=750))


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (of_user, "Your quota is half a GPU: you hold a quarter of a GPU on 'one' and asked for half a GPU."),
        (of_user_memory, "Your quota is 20 GiB of GPU memory: you asked for 40 GiB."),
        (of_member, "Your quota is a quarter of a GPU (as of each in group g): you asked for half a GPU."),
        (of_group_never, "The quota of your group g is half a GPU in all: you asked for three quarters of a GPU."),
        (of_group_memory_never, "The quota of your group g is 50 GiB of GPU memory in all: you asked for 60 GiB."),
        (
            of_group_now,
            "waits for the quota of your group g (half a GPU in all, 37.5 % of a GPU held; 50 GiB in all, 30 GiB held): what is held now",
        ),
        (
            of_user_by_memory,
            "Your quota is half a GPU: you hold 20 GiB of GPU memory, which counts as a quarter of a GPU on 'one' and asked for 40 GiB "
            "of GPU memory, which counts as half a GPU.",
        ),
        (
            of_group_by_memory,
            "The quota of your group g is half a GPU in all: you asked for 160 GiB of GPU memory, which counts as 2 GPUs.",
        ),
        (of_group_now_by_memory, "waits for the quota of your group g (half a GPU in all, half a GPU held, counting memory)"),
        (
            of_guarantee_by_memory,
            "1 GPU is free in all, of which half a GPU is kept for guarantees of others and those who have waited long; 60 GiB of GPU "
            "memory, which counts as three quarters of a GPU",
        ),
        (of_growth_by_memory, "Your quota is half a GPU: you asked for 60 GiB of GPU memory, which counts as three quarters of a GPU."),
        (
            of_growth_guarantee_by_memory,
            "is kept for users and groups with a guarantee; 60 GiB of GPU memory, which counts as three quarters of a GPU.",
        ),
        (of_guarantee, "1 GPU is free in all, of which half a GPU is kept for guarantees of others and those who have waited long"),
        (of_queue, "The queue is full: 2 requests in it, of 2 at most; try again later."),
        (of_queue_of_user, "You have 2 requests in the queue already, and one user may have 2 there."),
        (of_memory, "No GPU here has that much: the largest has 80 GiB."),
        (of_devices, "No node here has 3 GPUs of a model with that much each: the most is 2 GPUs, the largest has 80 GiB."),
        (of_model, "No GPU of model Huge is here; there are: Big."),
        (of_smallest, "compute_milli is 10; it must be"),
        (of_growth_room, "GPU 0 has no GPU of its time free, and a quarter of a GPU more is asked for."),
        (of_growth_memory, "GPU 0 has 10 GiB of memory free, and 20 GiB more are asked for."),
        (of_growth_quota, "Your quota is half a GPU: you asked for three quarters of a GPU."),
        (of_growth_guarantee, "Three quarters of a GPU is free in all, of which half a GPU is kept for users and groups with a guarantee."),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_the_rule_and_the_number(refusal: Callable[[], str], words: str) -> None:
    assert words in refusal()


def crowd(waiting: int) -> Pool:
    """A pool that is full, in whose queue so many others wait, and one who has as many requests there as may be."""
    pool = Pool(queue_per_user=5, queue_total=100_000)
    pool.started(1000, user="x")
    for number in range(waiting):
        pool.ask(1000, user=f"other{number}")
    for _ in range(5):
        pool.ask(1000, user="greedy")
    return pool


def calls_of_a_refusal(pool: Pool) -> int:
    """Return how many functions one more request of theirs has run."""
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    refused(pool, 1000, user="greedy")  # what is remembered once
    sys.setprofile(note)
    try:
        refused(pool, 1000, user="greedy")
    finally:
        sys.setprofile(None)
    return count


def kept_of(pool: Pool) -> list[int]:
    """Return how much the pool remembers."""
    books = pool.core.books
    mine = books.of_user(books.waiting()[-1].request.owner)
    return [len(one) for one in (books.entries, pool.core.ended, pool.core.cancelled_early, books.waiting(), mine)]


def test_a_refusal_costs_the_same_however_many_wait() -> None:
    """So does a million of them: linear in nothing but their own number."""
    few, many = calls_of_a_refusal(crowd(10)), calls_of_a_refusal(crowd(1000))
    assert few == many


def test_who_asks_without_end_harms_nobody() -> None:
    pool = crowd(20)
    core = pool.core
    line = [one.slice_id for one in core.books.waiting()]
    sizes = kept_of(pool)
    generation, overtaken = core.generation, [one.overtaken for one in core.books.waiting()]
    core.drain()
    for _ in range(20_000):
        refused(pool, 1000, user="greedy")
    assert core.generation == generation, "nobody is woken by it"
    assert [one.slice_id for one in core.books.waiting()] == line, "no place is lost"
    assert [one.overtaken for one in core.books.waiting()] == overtaken
    assert kept_of(pool) == sizes, "nothing of it is kept"
    assert core.drain().granted == []
    assert pool.ask(1000, user="late").position == 26, "there is still room for others"


def test_without_the_bound_the_queue_would_be_theirs() -> None:
    """The control."""
    pool = Pool(queue_per_user=10_000, queue_total=50)
    pool.started(1000, user="x")
    for _ in range(50):
        pool.ask(1000, user="greedy")
    assert "queue is full" in refused(pool, 1000, user="late")
