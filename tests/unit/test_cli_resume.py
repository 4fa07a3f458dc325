"""`nbgpu resume`: what is suspended, found by process, by kernel and by notebook, in one slice or in all."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from test_cli_limit import NAMES, A, B, kernel, usage
from test_cli_options import known

from nbgpu import cli_limit, cli_resume, cli_suspend
from nbgpu.cli_resume import meant
from nbgpu.client import SliceClient
from nbgpu.errors import NbgpuError
from nbgpu.kernel_names import KernelName
from nbgpu.models import KernelAway, Slice, Suspension, Usage
from nbgpu.quantities import GIB

DIGITS = "12345678-0000-4000-8000-000000000003"


def names_of(slice_id: str) -> dict[str, KernelName]:
    return NAMES


def held(pid: int, kernel_id: str | None) -> Suspension:
    return Suspension(pid=pid, kernel_id=kernel_id, kind="unlimited", how="stop", since=1.0, reason="it used the GPU")


def piece(slice_id: str, *suspended: Suspension) -> Usage:
    return usage().model_copy(update={"slice_id": slice_id, "suspended": list(suspended)})


FIRST = piece("aaaaaaaa1111", held(11, A), held(12, A), held(13, None))
SECOND = piece("bbbbbbbb2222", held(21, B), held(22, DIGITS))


@pytest.mark.parametrize(
    ("which", "slice_id", "pids"),
    [
        ("11", FIRST.slice_id, [11]),
        ("13", FIRST.slice_id, [13]),
        ("21", SECOND.slice_id, [21]),
        (A, FIRST.slice_id, [11, 12]),
        (A[:8], FIRST.slice_id, [11, 12]),
        ("train", FIRST.slice_id, [11, 12]),
        ("work/train.ipynb", FIRST.slice_id, [11, 12]),
        ("other.ipynb", SECOND.slice_id, [21]),
        (DIGITS[:8], SECOND.slice_id, [22]),
    ],
)
def test_what_is_suspended_is_found_in_all_slices(which: str, slice_id: str, pids: list[int]) -> None:
    found, those = meant([FIRST, SECOND], which, names_of)
    assert (found.slice_id, [one.pid for one in those]) == (slice_id, pids)


@pytest.mark.parametrize(
    ("which", "said"),
    [
        ("99", "No process 99 is suspended"),
        ("1234567", "No process 1234567 is suspended"),
        ("zzz", "Nothing of kernel zzz is suspended"),
        ("", "Nothing of kernel"),
        (A[:4], r"More than one suspended kernel.*work/train\.ipynb.*other\.ipynb"),
    ],
)
def test_what_is_not_suspended_or_not_unique_is_said(which: str, said: str) -> None:
    with pytest.raises(NbgpuError, match=said):
        meant([FIRST, SECOND], which, names_of)


def test_a_pid_of_two_slices_needs_one_named() -> None:
    twin = piece("cccccccc3333", held(11, B))
    with pytest.raises(NbgpuError, match=r"aaaaaaaa.*cccccccc.*--slice"):
        meant([FIRST, twin], "11", names_of)
    assert meant([twin], "11", names_of)[0] is twin


class StandIn:
    """The admin's API of an agent with two slices."""

    def __init__(self, *usages: Usage) -> None:
        self.usages = list(usages)
        self.resumed: list[tuple[str, int]] = []

    def all_usage(self) -> list[Usage]:
        return self.usages

    def usage(self, slice_id: str) -> Usage:
        return next(one for one in self.usages if one.slice_id == slice_id)

    def slices(self) -> SimpleNamespace:
        return SimpleNamespace(slices=[known(one.slice_id, one.slice_id[0]) for one in self.usages])

    def resume(self, slice_id: str, pid: int) -> None:
        self.resumed.append((slice_id, pid))


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn(FIRST, SECOND)
    monkeypatch.setattr(cli_limit, "agent", lambda: stand_in)
    monkeypatch.setattr(cli_resume, "read_names", names_of)
    monkeypatch.delenv("NBGPU_SOCKET", raising=False)
    return stand_in


def test_an_admin_sees_all_slices_and_names_none(agent: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    cli_resume.list_suspended(None, as_json=False)
    said = capsys.readouterr().out
    assert "Slice aaaaaaaa (a)" in said
    assert "Slice bbbbbbbb (b)" in said
    assert [f"process {pid}" in said for pid in (11, 12, 13, 21, 22, 99)] == [True] * 5 + [False]
    cli_resume.list_suspended(None, as_json=True)
    assert [one["slice_id"] for one in json.loads(capsys.readouterr().out)["slices"]] == [FIRST.slice_id, SECOND.slice_id]
    cli_resume.list_suspended("bbbb", as_json=True)
    assert [one["pid"] for one in json.loads(capsys.readouterr().out)["suspended"]] == [21, 22]


def test_an_admin_sees_the_kernels_of_all_slices(agent: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    agent.usages = [usage(kernel(A, GIB)).model_copy(update={"slice_id": FIRST.slice_id}), SECOND]
    cli_limit.list_kernels(None, as_json=False)
    said = capsys.readouterr().out
    assert said.index("Slice aaaaaaaa (a)") < said.index(A[:8]) < said.index("No process of slice bbbbbbbb (b)")
    cli_limit.list_kernels(None, as_json=True)
    listed = {one["slice_id"]: one["kernels"] for one in json.loads(capsys.readouterr().out)["slices"]}
    assert [one["kernel_id"] for one in listed[FIRST.slice_id]] == [A]
    assert listed[SECOND.slice_id] == []
    cli_limit.list_kernels("aaaa", as_json=False)
    assert "Slice" not in capsys.readouterr().out
    agent.usages = []
    cli_limit.list_kernels(None, as_json=False)
    assert capsys.readouterr().out == "No slices.\n"


def test_only_what_is_named_goes_on(agent: StandIn) -> None:
    cli_resume.resume("other", None, as_json=False)
    assert agent.resumed == [(SECOND.slice_id, 21)]
    with pytest.raises(NbgpuError, match="are 2 slices"):
        cli_resume.resume_all(None, as_json=False)
    assert len(agent.resumed) == 1, "--all is of one slice"
    cli_resume.resume_all("aaaa", as_json=False)
    assert agent.resumed[1:] == [(FIRST.slice_id, pid) for pid in (11, 12, 13)]


def test_in_a_server_a_kernels_memory_is_moved_and_brought_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parked = KernelAway(phase="parked", memory_bytes=8 * GIB, since=1.0)
    seen = [usage(kernel(A, 8 * GIB)), usage(kernel(A, 0).model_copy(update={"away": parked}))]
    asked: list[tuple[str, str]] = []

    class Own(SliceClient):
        def usage(self) -> Usage:
            return seen[len(asked)]

        def slice(self) -> Slice:
            return known(FIRST.slice_id, "a").slice

        def move_kernel(self, kernel_id: str, where: str) -> KernelAway | None:
            asked.append((kernel_id, where))
            return parked.model_copy(update={"phase": "parking"}) if where == "suspend" else None

    for module in (cli_limit, cli_suspend):
        monkeypatch.setattr(module, "own_slice", lambda: Own("/nowhere"))
    for module in (cli_resume, cli_suspend):
        monkeypatch.setattr(module, "read_names", names_of)
    with pytest.raises(NbgpuError, match="Nothing of kernel train is suspended"):
        cli_resume.resume("train", None, as_json=False)
    cli_suspend.suspend("train", as_json=False)
    assert "work/train.ipynb: 8 GiB on its way to host memory. `nbgpu resume work/train.ipynb`" in capsys.readouterr().out
    cli_resume.list_suspended(None, as_json=False)
    assert "work/train.ipynb: 8 GiB in host memory" in capsys.readouterr().out
    seen.append(seen[1])
    cli_resume.resume("train", None, as_json=True)
    assert json.loads(capsys.readouterr().out)["away"] is None
    assert asked == [(A, "suspend"), (A, "resume")]


def test_a_number_is_the_process_that_is_suspended_before_it_is_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    parked = KernelAway(phase="parked", memory_bytes=8 * GIB, since=1.0)
    there = usage(kernel(DIGITS, 0).model_copy(update={"away": parked})).model_copy(update={"suspended": [held(12, None)]})
    went: list[object] = []

    class Own(SliceClient):
        def usage(self) -> Usage:
            return there

        def slice(self) -> Slice:
            return known(FIRST.slice_id, "a").slice

        def move_kernel(self, kernel_id: str, where: str) -> KernelAway | None:
            went.append(kernel_id)
            return None

        def resume(self, pid: int | None = None) -> None:
            went.append(pid)

    for module in (cli_limit, cli_suspend):
        monkeypatch.setattr(module, "own_slice", lambda: Own("/nowhere"))
    cli_resume.resume("12", None, as_json=False)
    assert went == [12], f"and not the memory of {DIGITS}"
    cli_resume.resume("1234", None, as_json=False)
    assert went == [12, DIGITS], "control: no process of that number is suspended"


def test_outside_of_a_server_no_kernels_memory_is_moved(agent: StandIn) -> None:
    with pytest.raises(NbgpuError, match="in a terminal of its own server"):
        cli_suspend.suspend("train", as_json=False)


def test_in_a_server_the_servers_own_api_is_asked(agent: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its user may not speak to the agent's."""

    class Own(SliceClient):
        def usage(self) -> Usage:
            return FIRST

        def slice(self) -> Slice:
            return known(FIRST.slice_id, "a").slice

        def resume(self, pid: int | None = None) -> None:
            asked.append(pid)

    asked: list[int | None] = []
    monkeypatch.setattr(cli_limit, "own_slice", lambda: Own("/nowhere"))
    cli_resume.resume("train", None, as_json=False)
    cli_resume.resume_all(None, as_json=False)
    assert asked == [11, 12, 11, 12, 13]
    assert agent.resumed == []
