"""The configuration is read again while people hold and wait; one that is wrong changes nothing and says where it is wrong."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from test_pool_queue import Pool

from nbgpu.errors import Refused
from nbgpu.models import GrantState
from nbgpu_pool.config import Config, ConfigError, load
from nbgpu_pool.main import reload
from nbgpu_pool.quotas import Limits, Quotas
from nbgpu_pool.state import Settings


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        (
            "queue:\n  total: 10\nquotas:\n  groups:\n    a: {limit: 1}\n    b:\n      limit: 2\n      guarantee: many\n",
            8,
            "quotas.groups.b.guarantee",
        ),
        ("quotas:\n  groups:\n    a:\n      limit: 1\n      weigth: 2\n", 5, "quotas.groups.a.weigth"),
        ("idle: {}\ntokens:\n  - {role: read, env: X}\n  - {role: reed, env: X}\n", 4, "tokens.1.role"),
        ("- 1\n", 1, "the file"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, text: str, line: int, says: str) -> None:
    (tmp_path / "pool.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "pool.yaml")
    assert f"line {line}, {says}: " in caught.value.message


def test_a_key_that_is_there_twice_is_named_with_both_lines(tmp_path: Path) -> None:
    text = "quotas:\n  default: {limit: 1}\nqueue: {total: 1}\nquotas:\n  users: {ada: {limit: 1}, ada: {limit: 2}}\ntwice: &t {a: *t}\n"
    (tmp_path / "pool.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "pool.yaml")
    assert "line 4, quotas: it is there already, at line 1; write it once" in caught.value.message
    assert "line 5, quotas.users.ada: it is there already, at line 5; write it once" in caught.value.message


def test_all_mistakes_are_named_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "queue: {total: -1}\nidle:\n  least_memory: little\nquotas:\n  default: {limit: lots}\n  default: {limit: 1}\nnothing: 1\n"
    (tmp_path / "pool.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "pool.yaml")
    named = [
        caught.value.message.find(words) for words in ("line 1, queue.total", "line 3, idle.least", "line 6, quotas.d", "line 7, nothing")
    ]
    assert -1 not in named
    assert named == sorted(named)
    (tmp_path / "pool.yaml").write_text("".join(f"n{number}: 1\n" for number in range(30)))
    with pytest.raises(ConfigError, match=r"n19: .*; and 10 more"):
        load(tmp_path / "pool.yaml")


def test_the_old_configuration_stays_in_force_where_the_new_one_is_wrong(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, taken = tmp_path / "pool.yaml", list[Config]()
    file.write_text("quotas:\n  default: {limit: lots}\n")
    with caplog.at_level(logging.INFO, logger="nbgpu.pool"):
        reload(file, Config(), taken.append)
        assert not taken
        assert "stays in force" in caplog.text
        assert "line 2" in caplog.text
        file.write_text("quotas:\n  default: {limit: 2}\ntokens: [{role: read, env: X}]\n")
        reload(file, Config(), taken.append)
    assert [one.settings().quotas.default.limit_milli for one in taken] == [2000]
    assert "a restart is needed for: tokens" in caplog.text


def test_new_quotas_take_nothing_from_who_holds_and_count_for_who_waits() -> None:
    pool = Pool(quotas=Quotas(groups={"g": Limits(limit_milli=500)}))
    held = pool.started(500, user="a", groups=["g"])
    waiting = pool.ask(500, user="b", groups=["g"])
    assert waiting.state == GrantState.queued
    pool.core.configure(Settings(quotas=Quotas(groups={"g": Limits(limit_milli=1000)})), pool.now)
    assert pool.state(waiting.request.request_id) == GrantState.reserved
    pool.core.configure(Settings(quotas=Quotas(default=Limits(limit_milli=250))), pool.now)
    assert pool.state(held) == GrantState.bound
    with pytest.raises(Refused):
        pool.ask(500, user="c")


def test_who_waits_for_more_than_a_new_quota_is_told() -> None:
    """They would wait for ever for what is held to be given back, and hold nothing."""
    pool = Pool()
    held = pool.started(1000, user="a")
    over, within = (pool.ask(milli, user="b").request.request_id for milli in (1000, 500))
    other = pool.ask(1000, user="c").request.request_id
    pool.core.configure(Settings(quotas=Quotas(users={"b": Limits(limit_milli=500)})), pool.now)
    grant = pool.core.grant(pool.core.known(over), pool.now)
    assert (grant.state, grant.reason) == (GrantState.gone, "Your quota is half a GPU: you asked for 1 GPU.")
    assert [pool.state(one) for one in (held, within, other)] == [GrantState.bound, GrantState.queued, GrantState.queued]


def test_the_rule_of_placement_can_be_changed_both_ways() -> None:
    pool = Pool(devices=2)
    pool.started(500)
    for by_value in (True, False, True):
        policy = Config.model_validate({"placement": {"rule": "value" if by_value else "best-fit"}}).settings()
        pool.core.configure(policy, pool.now)
        assert (pool.core.books.valued is not None) == by_value
        assert pool.ask(125).state == GrantState.reserved
