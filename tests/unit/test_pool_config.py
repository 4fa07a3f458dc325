"""The pool's configuration file, its tokens, and the lock on its directory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nbgpu.errors import NbgpuError
from nbgpu.quantities import GIB
from nbgpu_pool.auth import Guard
from nbgpu_pool.config import Config, ConfigError, load
from nbgpu_pool.idle import IdlePolicy
from nbgpu_pool.kube_main import check
from nbgpu_pool.lock import InstanceLock, Taken

WHOLE = """
reservation_ttl_seconds: 60
quotas:
  default: {limit: 1}
  users: {ada: {limit: 2.5, memory: 120 GiB, guarantee: 1/2}}
  groups: {students: {limit: 4, guarantee: 50%, per_user: 1/3}}
queue: {total: 10, per_user: 2, overtake_count: 5, overtake_seconds: 30}
"""


def write(directory: Path, text: str) -> Path:
    path = directory / "pool.yaml"
    path.write_text(text)
    return path


def test_whole_file(tmp_path: Path) -> None:
    settings = load(write(tmp_path, WHOLE)).settings()
    quotas = settings.quotas
    assert (quotas.default.limit_milli, quotas.users["ada"].limit_milli, quotas.users["ada"].guarantee_milli) == (1000, 2500, 500)
    assert quotas.users["ada"].limit_bytes == 120 * GIB
    assert (quotas.groups["students"].guarantee_milli, quotas.groups["students"].per_user_milli) == (500, 333)
    assert quotas.of_user("bob", ["students"]).limit_milli == 333
    assert quotas.of_user("bob", []).limit_milli == 1000
    assert quotas.of_user("ada", ["students"]).limit_milli == 2500
    assert (settings.queue_total, settings.fairness.overtake_count) == (10, 5)


def test_no_file_and_an_empty_mapping_are_the_defaults_a_file_that_says_nothing_is_a_mistake(tmp_path: Path) -> None:
    assert load(None) == load(write(tmp_path, "{}\n")) == Config()
    for text in ("", "\n", "# quotas:\n", "---\n"):
        with pytest.raises(ConfigError, match="says nothing"):
            load(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("quotas: {defualt: {limit: 1}}", "quotas.defualt: there is no such key here"),
        ("quotas: [ada]", "quotas: it must be keys and values, such as {key: value}"),
        ("quotas: {users: [ada]}", "quotas.users: it must be keys and values"),
        ("tokens: {role: read}", "tokens: it must be a list, such as [a, b]"),
        ("tokens: [{env: X}]", "tokens.0.role: it is missing"),
        ("give_back: {least: 3}", "give_back.least: it must be a share of one GPU, above 0 and at most 1, such as 1/8"),
        ("give_back: {least: 0}", "it must be a share of one GPU"),
        ("give_back: {least: null}", "it must be a share of one GPU"),
        ("queue: {total: -1}", "queue.total: it must be greater than or equal to 0"),
        ("quotas: {default: {limit: -1}}", "quotas.default.limit: it must be a number of GPUs"),
        ("quotas: {default: {limit: .nan}}", "it must be a number of GPUs"),
        ("quotas: {default: {limit: 1/0}}", "it must be a number of GPUs"),
        ("quotas: {default: {limit: true}}", "it must be a number of GPUs"),
        ("quotas: {default: {memory: 10 apples}}", "quotas.default.memory: it must be an amount above 0"),
        ("reservation_ttl_seconds: 0", "reservation_ttl_seconds"),
        ("tokens: [{role: hub, env: X}]", "role hub needs `hub`"),
        ("tokens: [{role: read}]", "either `file` or `env`"),
        ("[1, 2", "is no YAML"),
        ("- 1", "the file"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text))
    assert says in caught.value.message
    assert "\n" not in caught.value.message


def test_tokens_come_from_files_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t").write_text("a-secret-of-a-hub-0\n")
    monkeypatch.setenv("POOL_READ", "a-secret-of-a-reader")
    config = load(write(tmp_path, f"tokens: [{{role: hub, hub: one, file: {tmp_path}/t}}, {{role: read, env: POOL_READ}}]"))
    guard = Guard([token.load() for token in config.tokens])
    assert guard.principal("Bearer a-secret-of-a-hub-0").hub == "one"
    assert guard.principal("token a-secret-of-a-reader").role == "read"
    for wrong in (None, "", "Bearer", "Bearer x", "Basic a-secret-of-a-hub-0", "Bearer a-secret-of-a-hub-\xff"):
        with pytest.raises(NbgpuError) as caught:
            guard.principal(wrong)
        assert caught.value.status == 401
    monkeypatch.setenv("POOL_READ", "short")
    with pytest.raises(ConfigError) as short:
        config.tokens[1].load()
    assert "short" not in short.value.message.replace("shorter", "")


HOLD = """
import sys, signal
from pathlib import Path
from nbgpu_pool.lock import InstanceLock
InstanceLock(Path(sys.argv[1])).acquire(takeover=False)
if len(sys.argv) > 2: signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("stubborn", [False, True])
def test_one_pool_per_directory_and_takeover(tmp_path: Path, stubborn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbgpu_pool.lock.STOP_SECONDS", 0.3)
    path = tmp_path / "pool.lock"
    command = [sys.executable, "-c", HOLD, str(path), *(["stubborn"] if stubborn else [])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        second = InstanceLock(path)
        with pytest.raises(Taken, match=rf"\(pid {holder.pid}\).*--takeover"):
            second.acquire(takeover=False)
        assert second.acquire(takeover=True) == holder.pid
        assert holder.wait(5) in (-15, -9)
    second.close()
    third = InstanceLock(path)
    assert third.acquire(takeover=False) is None, "control: a free lock is simply taken"
    third.close()


def test_nodes_that_have_to_be_started(tmp_path: Path) -> None:
    group = {"name": "a100", "model": "A100", "devices": 8, "memory": "80 GiB", "nodes": 2, "labels": {"pool": "a100"}}
    file = tmp_path / "pool.yaml"
    file.write_text(json.dumps({"coming": [group]}))
    config = load(file)
    found = config.coming[0].group()
    assert (found.memory_bytes, found.reserve_bytes, found.labels) == (80 * 1024**3, 0, frozenset({("pool", "a100")}))
    assert config.settings().start_seconds == {"a100": 300.0}
    for wrong, words in (
        ([group, group], "name of its own"),
        ([{**group, "name": "a:b"}], "coming.0.name"),
        ([{**group, "nodes": 0}], "nodes"),
    ):
        file.write_text(json.dumps({"coming": wrong}))
        with pytest.raises(ConfigError, match=words):
            load(file)


def test_idle_slices_are_parked_only_where_the_file_says_so_and_not_on_kubernetes(tmp_path: Path) -> None:
    path = tmp_path / "pool.yaml"
    assert load(None).settings().idle.after_seconds is None
    path.write_text("idle: {after_seconds: 1800, least_memory: 4 GiB, protect_users: [ada], protect_groups: [staff]}\n")
    assert load(path).settings().idle == IdlePolicy(1800, 4 * GIB, frozenset({"ada"}), frozenset({"staff"}))
    token = "tokens: [{role: hub, hub: h, namespaces: [lab], env: TOKEN}]\n"
    path.write_text(f"idle: {{after_seconds: 1800}}\n{token}")
    with pytest.raises(ConfigError, match="not offered on Kubernetes"):
        check(load(path))
    path.write_text(token)
    check(load(path))
