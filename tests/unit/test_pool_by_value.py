"""The service with the rule `value` (`ours` of the benchmark): selectable, off unless it is named, and never at odds with the books."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from test_pool_queue import Pool

from nbgpu.models import GrantState
from nbgpu_pool.config import ConfigError, load
from nbgpu_pool.placement import Policy, place
from nbgpu_pool.shapes import Want


def test_the_configuration_names_the_rule(tmp_path: Path) -> None:
    path = tmp_path / "pool.yaml"
    assert not load(None).settings().policy.by_value
    path.write_text("placement: {rule: value}")
    assert load(path).settings().policy.by_value
    path.write_text("placement: {rule: best}")
    with pytest.raises(ConfigError, match=r"placement\.rule"):
        load(path)


def test_numpy_is_loaded_only_with_the_rule_that_needs_it() -> None:
    for setting, words in (("False", "False"), ("True", "True")):
        code = (
            "import sys; from nbgpu_pool.core import Core; from nbgpu_pool.placement import Policy; from nbgpu_pool.state import Settings;"
            f"Core(Settings(policy=Policy(by_value={setting}))); print('numpy' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.stdout.split() == [words], done.stderr


def where(pool: Pool, milli: int) -> str:
    grant = pool.ask(milli)
    assert grant.slice is not None
    return grant.slice.devices[0].uuid


def test_a_remainder_that_is_asked_for_is_kept_whole() -> None:
    """Half the requests are for 0.4, half for 0.6: 0.3 goes where 0.35 is left, too little for both, not where it would spoil a 0.4."""
    found: dict[bool, str] = {}
    for by_value in (True, False):
        pool = Pool(devices=3, policy=Policy(by_value=by_value), queue_per_user=1000)
        first, second = pool.ask(600), pool.ask(530)
        assert first.slice is not None
        assert second.slice is not None
        for _ in range(40):  # what is usual here; all give it back
            for milli in (400, 600):
                one = pool.ask(milli)
                pool.core.cancel(one.request.request_id, None, pool.now)
        rooms = {uuid: room.free_milli for uuid, room in pool.core.books.rooms.items()}
        assert sorted(rooms.values()) == [400, 470, 1000]
        chosen = where(pool, 70)
        found[by_value] = str(rooms[chosen])
    assert found == {True: "470", False: "400"}, "best fit spoils the 400; 70 of 470 leaves 400, which is asked for"


@pytest.mark.parametrize("seed", range(3))
def test_its_arrays_follow_the_books_and_it_finds_a_place_whenever_there_is_one(seed: int) -> None:
    luck = random.Random(seed)
    pool = Pool(devices=6, node_size=3, policy=Policy(by_value=True), queue_per_user=1000)
    for number in range(60):
        if luck.random() < 0.6:
            milli, count = luck.choice([(125, 1), (333, 1), (500, 1), (1000, 1), (500, 2), (1000, 3)])
            want, books = Want(count, milli, None, None, None), pool.core.books
            possible = place(books.ordered_rooms(), want) is not None and not books.waiting()
            grant = pool.ask(milli, user=f"u{number}", count=count)
            assert not possible or grant.state == GrantState.reserved
            if grant.state == GrantState.reserved:
                pool.run(grant)
        elif pool.running:
            pool.end(luck.choice(sorted(pool.running)))
        if luck.random() < 0.1:
            pool.devices = [
                one.model_copy(update={"healthy": luck.random() < 0.8 if number % 3 else True}) for number, one in enumerate(pool.devices)
            ]
            pool.sync()
        valued = pool.core.books.valued
        assert valued is not None
        rooms = list(pool.core.books.rooms.values())
        free = [(room.free_milli if room.device.healthy else -1) for room in rooms]
        assert valued.fleet.free_milli.flatten().tolist() == free
    assert pool.core.books.valued is not None
    assert len(pool.core.books.valued.rule.demand.counts) >= 4, "what it has learnt outlives a change of devices"
