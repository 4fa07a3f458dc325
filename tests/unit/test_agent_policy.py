"""What the watchdog may act on: only what no process under the limiter can do, however unlucky the moment."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbgpu.errors import InvalidValue
from nbgpu.quantities import GIB, MIB
from nbgpu_agent import main, procs
from nbgpu_agent.main import parse
from nbgpu_agent.offenders import LIED_LOOKS, Books, Held, Offence, Sure, judge
from nbgpu_agent.policy import KINDS, Kind, Policy, parse_actions
from nbgpu_agent.procs import Process
from nbgpu_agent.responses import action_message, reason
from nbgpu_agent.runtime import StartError

CAP = 300 * MIB
LIMIT = 10 * GIB
ADA, EVE, BOB = (Process(pid, 100 + pid) for pid in (7, 8, 9))


def honest(process: Process, used: int, overhead: int = 0, peak: int | None = None, at_nvml: int | None = None) -> Held:
    """Return a process under the limiter; `at_nvml`: what it held when the driver was asked, a moment before."""
    return Held(process, (used if at_nvml is None else at_nvml) + overhead, 0, used, used if peak is None else peak)


def untold(process: Process, size: int) -> Held:
    return Held(process, size, 0, None)


def offences(held: list[Held], books: Books | None = None, strict: int | None = None) -> list[tuple[str, int]]:
    """Return (kind, pid) of what is found."""
    books = books or Books(LIMIT, LIMIT)
    books.look(LIMIT, sum(one.memory_bytes for one in held), 0.0)
    return [(one.kind, one.process.pid) for one in judge("slice-00", "GPU-0", held, books, CAP, strict)]


# ---- the policy


def test_actions_are_named_by_kind_or_for_all() -> None:
    assert parse_actions("unlimited=kill, over-limit=suspend") == {"unlimited": "kill", "over-limit": "suspend"}
    assert parse_actions("kill,over-share=event") == {**dict.fromkeys(KINDS, "kill"), "over-share": "event"}
    assert parse_actions("foreign=event") == {}
    assert not Policy(parse_actions("event")).acts
    assert not Policy().acts
    assert Policy(parse_actions(parse(["--watchdog", "overhead=suspend"]).watchdog)).acts


@pytest.mark.parametrize("text", ["foreign=kill", "unlimited=stop", "everything=kill", "unlimited", "=kill,x"])
def test_what_is_no_policy_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidValue, match="--watchdog"):
        parse_actions(text)


def test_where_pids_are_not_the_hosts_nobody_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    for sees in (True, False):
        monkeypatch.setattr(main, "sees_the_hosts_pids", lambda sees=sees: sees)
        assert not main.policy_of(parse([]), False).acts
        assert main.policy_of(parse(["--watchdog", "kill"]), True).acts, "the simulated driver tells them as they are here"
        if sees:
            assert main.policy_of(parse(["--watchdog", "kill"]), False).acts
        else:
            with pytest.raises(StartError, match="hostPID"):
                main.policy_of(parse(["--watchdog", "kill"]), False)


def test_a_grace_time_is_a_number_of_seconds() -> None:
    assert main.policy_of(parse(["--watchdog-grace", "30"]), True).grace_seconds == 30
    assert main.policy_of(parse([]), True).grace_seconds is None
    for text in ("-1", "nan", "inf"):
        with pytest.raises(InvalidValue, match="--watchdog-grace"):
            main.policy_of(parse([f"--watchdog-grace={text}"]), True)


# ---- who is to blame


def test_whoever_has_no_slot_is_to_blame_and_nobody_else() -> None:
    assert offences([honest(ADA, 5 * GIB, CAP), untold(EVE, 3 * GIB)]) == [("unlimited", 8)]
    assert offences([honest(ADA, 5 * GIB, CAP), untold(EVE, 0)]) == []


def test_memory_that_was_freed_while_the_driver_was_asked_is_no_offence() -> None:
    assert offences([honest(ADA, GIB, at_nvml=8 * GIB, peak=8 * GIB)]) == []
    assert offences([honest(ADA, GIB, at_nvml=8 * GIB, peak=GIB)]) == [("overhead", 7)], "control: it never told of that"


def test_a_peak_that_is_made_up_hides_no_more_than_the_slice() -> None:
    assert offences([Held(EVE, 30 * GIB, 0, GIB, 80 * GIB)]) == [("overhead", 8), ("over-limit", 8)]


def test_contexts_that_cost_more_than_they_did_are_no_offence() -> None:
    many = [honest(Process(pid, pid), 2 * GIB, CAP) for pid in range(20, 25)]
    assert offences(many) == [], "five times the cap above the limit"


def test_over_the_limit_the_one_that_lies_is_to_blame_not_the_one_that_grew() -> None:
    books = Books(LIMIT, LIMIT)
    liar = Held(EVE, 8 * GIB, 0, 100 * MIB, 9 * GIB)
    assert offences([liar, honest(ADA, GIB)], books) == []
    assert offences([liar, honest(ADA, 9 * GIB)], books) == [("over-limit", 8)]
    books = Books(LIMIT, LIMIT)
    assert offences([untold(EVE, 8 * GIB), honest(ADA, GIB)], books) == [("unlimited", 8)]
    assert offences([untold(EVE, 8 * GIB), honest(ADA, 9 * GIB)], books) == [("unlimited", 8), ("over-limit", 8)]


def test_over_the_limit_with_all_told_the_only_one_that_grew_is_to_blame() -> None:
    books = Books(LIMIT, LIMIT)
    assert offences([honest(ADA, 8 * GIB), honest(EVE, 100 * MIB)], books) == []
    assert offences([honest(ADA, 8 * GIB), honest(EVE, 6 * GIB)], books) == [("over-limit", 8)]
    assert offences([honest(ADA, 9 * GIB), honest(EVE, 6 * GIB)], books) == [], "both grew: nobody can say who went on"
    assert offences([honest(ADA, 8 * GIB), honest(EVE, 15 * GIB)], books) == [("overhead", 8), ("over-limit", 8)], "more than the slice"


def test_several_who_never_tell_do_not_hide_behind_each_other_for_good() -> None:
    books = Books(LIMIT, LIMIT)
    liars = [Held(one, 7 * GIB, 0, 0, LIMIT) for one in (EVE, BOB)]
    found = [offences([*liars, honest(ADA, 2 * GIB)], books) for _ in range(8)]
    assert found == [[]] * LIED_LOOKS + [[("over-limit", 8), ("over-limit", 9)]] * (8 - LIED_LOOKS)
    assert offences([liars[0], honest(ADA, 2 * GIB)], books) == [], "one alone is inside the limit: nobody has too much"
    for look in range(20):  # one that takes and gives back while the driver is asked
        churns = honest(ADA, 0 if look % 5 else 2 * GIB, at_nvml=2 * GIB, peak=2 * GIB)
        assert ("over-limit", 7) not in offences([*liars, churns], books)


def test_whose_slot_another_has_wiped_is_not_to_blame() -> None:
    books = Books(LIMIT, LIMIT)
    assert offences([honest(ADA, 5 * GIB)], books) == []
    assert offences([honest(ADA, 0, at_nvml=5 * GIB)], books) == [], "emptied"
    assert offences([untold(ADA, 5 * GIB)], books) == [], "taken away"
    assert offences([untold(ADA, 5 * GIB)]) == [("unlimited", 7)], "control: it never had one"


def test_a_lowered_limit_makes_no_offence_of_what_was_held_before() -> None:
    books = Books(LIMIT, LIMIT)
    books.look(LIMIT, 8 * GIB, 0.0)

    def at(now: float, used: int) -> list[Offence]:
        books.look(4 * GIB, used, now)
        return judge("slice-00", "GPU-0", [honest(ADA, used)], books, CAP, None)

    assert at(1.0, 9 * GIB) == [], "what was asked for before the change arrives after it"
    assert at(7.0, 9 * GIB) == []
    assert at(8.0, 3 * GIB) == []
    assert [one.kind for one in at(9.0, 9 * GIB)] == ["overhead", "over-limit"], "control: freed, and taken again past the limit"


def test_a_parked_slice_may_take_nothing_back_by_itself() -> None:
    books = Books(LIMIT, LIMIT)
    for limit in (LIMIT, 0):  # at once after it was parked
        books.look(limit, 5 * GIB, 1.0)
        found = judge("slice-00", "GPU-0", [honest(ADA, 5 * GIB)], books, CAP, None)
        assert [one.kind for one in found] == ([] if limit else ["overhead", "over-limit"])
    books.look(LIMIT, 5 * GIB, 2.0)
    assert judge("slice-00", "GPU-0", [honest(ADA, 5 * GIB)], books, CAP, None) == [], "restored"


def test_a_lowered_limit_excuses_nobody_who_was_above_it() -> None:
    books = Books(LIMIT, LIMIT)
    for now, limit in ((0.0, LIMIT), (1.0, 4 * GIB), (7.0, 4 * GIB)):
        books.look(limit, 30 * GIB, now)
        assert judge("slice-00", "GPU-0", [untold(EVE, 30 * GIB)], books, CAP, None)


def test_gpu_time_past_the_limiter_is_an_offence_and_a_long_kernel_is_none() -> None:
    assert offences([Held(ADA, GIB, 1000, GIB, GIB, 1000)], strict=250) == [], "it tells all of it, its turn ends later"
    assert offences([Held(EVE, GIB, 1000, GIB, GIB, 0)], strict=250) == [("over-share", 8)]
    assert offences([Held(EVE, GIB, 1000, GIB, GIB, 0)], strict=None) == []


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-6 * GIB, 6 * GIB)), max_size=60), st.randoms(use_true_random=False))
def test_whatever_processes_under_the_limiter_do_nobody_is_to_blame(steps: list[tuple[int, int]], dice: object) -> None:
    """They ask and free in any order; now and then the driver is asked, and what they tell is read some steps later."""
    books, used, peak = Books(LIMIT, LIMIT), [0, 0, 0], [0, 0, 0]
    seen: list[int] | None = None
    for number, (who, size) in enumerate(steps):
        if size < 0 or sum(used) + size <= LIMIT:
            used[who] = max(0, used[who] + size)
            peak[who] = max(peak[who], used[who])
        if seen is None:
            seen = list(used)
        elif dice.random() < 0.3:  # type: ignore[attr-defined]
            held = [Held(p, seen[i] + CAP // 2, 0, used[i], peak[i]) for i, p in enumerate((ADA, EVE, BOB))]
            books.look(LIMIT, sum(one.memory_bytes for one in held), float(number))
            assert judge("slice-00", "GPU-0", held, books, CAP, None) == []
            seen = None


# ---- how sure


def test_three_looks_over_half_a_second_are_sure() -> None:
    sure = Sure()
    case = judge("slice-00", "GPU-0", [untold(EVE, GIB)], Books(LIMIT, LIMIT), CAP, None)
    assert [len(sure.pass_sure(case, now, now == 0.0)) for now in (0.0, 0.1, 0.2, 0.5)] == [0, 0, 0, 1]
    assert sure.pass_sure([], 0.6, False) == []
    assert [len(sure.pass_sure(case, now, False)) for now in (1.0, 1.3, 1.6)] == [0, 0, 1], "away once, it begins again"
    other = [case[0].__class__("slice-00", "unlimited", "GPU-0", Process(8, 999), GIB, 0)]
    assert sure.pass_sure(other, 2.0, False) == [], "a later process with that pid is another one"


def test_gpu_time_needs_five_seconds() -> None:
    sure = Sure()
    case = [Offence("slice-00", "over-share", "GPU-0", EVE, GIB, 0, 900)]
    passed = [len(sure.pass_sure(case, second + 0.25 * look, look == 0)) for second in range(6) for look in range(3)]
    assert passed == [0] * 12 + [1, 0, 0, 1, 0, 0]
    assert not sure.waits()


# ---- what people read


@pytest.mark.parametrize("done", ["ended", "stopped", "suspended"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_message_says_what_happened_to_whom_and_what_to_do(kind: Kind, done: str) -> None:
    one = Offence("slice-00", kind, "GPU-0", Process(1234567, 1), 123 * GIB + GIB // 2, 9 * GIB + GIB // 4, 1000)
    message = action_message(one.process, "1a2b3c4d-0000", done, reason(one))
    shown = message.replace("Notebook kernel 1a2b3c4d…", "Untitled12.ipynb")  # as JupyterLab does, which cuts a notice after 140 characters
    assert len(shown.removesuffix("Restart it, or ask your administrator.") if done == "suspended" else shown) <= 140, shown
    assert message.startswith(f"Process 1234567 (Notebook kernel 1a2b3c4d…) was {done}: it ")
    assert "estart" in message
    assert action_message(one.process, "", done, reason(one)).startswith(f"Process 1234567 was {done}: it ")


# ---- processes


LEADER_GONE = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
print(flush=True)
ctypes.CDLL(None).syscall(60, 0)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the number of a system call is of x86_64")
def test_a_process_whose_first_thread_has_ended_is_not_on_its_way_out() -> None:
    with subprocess.Popen([sys.executable, "-c", LEADER_GONE], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        state = Path(f"/proc/{child.pid}/stat")
        wait_until(lambda: ") Z " in state.read_text())
        process = procs.find(child.pid)
        assert process is not None
        assert not procs.exiting(child.pid)
        assert not procs.stopped(child.pid)
        assert procs.send(process, signal.SIGSTOP)
        wait_until(lambda: procs.stopped(child.pid))
        assert procs.send(process, signal.SIGKILL)
        wait_until(lambda: procs.exiting(child.pid))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_signal_reaches_the_process_and_no_later_one_with_its_pid() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        process = procs.find(child.pid)
        assert process is not None
        assert not procs.exiting(child.pid)
        for _ in range(100):  # the kernel is at its exec for a moment yet
            if procs.environment(child.pid, "PATH"):
                break
            time.sleep(0.01)
        assert procs.environment(child.pid, "PATH") == os.environ["PATH"]
        assert procs.environment(child.pid, "PAT") == ""
        assert not procs.send(Process(child.pid, process.start_time + 1), signal.SIGKILL)
        assert child.poll() is None
        assert procs.send(process, signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        assert procs.stopped(child.pid)
        assert procs.send(process, signal.SIGKILL)
        assert child.wait(5) == -signal.SIGKILL
        assert procs.exiting(child.pid)
        assert not procs.send(process, signal.SIGKILL)
