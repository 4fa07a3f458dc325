"""libnbgpu_agent.so: the scheduler's thread against real files and futexes, and the reader of `use` against hostile files."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from limiter_slice import PlayedSlice, wait_until

from nbgpu_agent import layout, native

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def library() -> native.Native:
    subprocess.run([sys.executable, str(ROOT / "nodeagent" / "build.py"), "agentlib"], check=True, timeout=300, stdout=subprocess.DEVNULL)
    return native.Native()


@pytest.fixture
def make_slice(tmp_path: Path) -> Iterator[Callable[[], PlayedSlice]]:
    made: list[PlayedSlice] = []

    def make() -> PlayedSlice:
        made.append(PlayedSlice(tmp_path / str(len(made))))
        return made[-1]

    yield make
    for files in made:
        files.close()


@pytest.fixture
def scheduler(library: native.Native) -> Iterator[native.Scheduler]:
    with library.scheduler() as running:
        yield running


@pytest.fixture
def without_guests(library: native.Native) -> Iterator[native.Scheduler]:
    """A scheduler that lets nobody in beside the owner: turns, and nothing else."""
    with library.scheduler(native.SchedConfig(overlap_behind_ns=10**15)) as running:
        yield running


@pytest.fixture
def patient(library: native.Native) -> Iterator[native.Scheduler]:
    """The same, and it waits 0.4 s for work that does not end, so that a busy machine is not taken for a stuck GPU."""
    with library.scheduler(native.SchedConfig(overlap_behind_ns=10**15, period_ns=200_000_000)) as running:
        yield running


MakeSlice = Callable[[], PlayedSlice]


def add(scheduler: native.Scheduler, files: PlayedSlice, milli: int = 500, mode: int = layout.MODE_BURST, device: int = 0) -> int:
    return scheduler.add(files.ctl_fd, files.use_fd, device, 0, milli, mode)


# ---- the scheduler's thread


def test_gate_opens_for_who_wants_and_needs_no_wakeups_alone(scheduler: native.Scheduler, make_slice: MakeSlice) -> None:
    files = make_slice()
    entry = add(scheduler, files)
    files.take_slot()
    assert wait_until(lambda: files.gate() == layout.GATE_CLOSED and files.ctl.device[0].turn_end_ns != 0)
    files.say(want=1)
    assert wait_until(lambda: files.gate() == layout.GATE_OPEN)
    files.say(want=0, busy=True)
    assert files.ctl.device[0].turn_end_ns == 0, "alone: no end"
    before = scheduler.totals()
    time.sleep(0.5)
    after = scheduler.totals()
    assert not after.polling
    assert after.wakeups - before.wakeups <= 8, "heartbeats only"
    assert scheduler.stats(entry).turns == 1


def test_turns_alternate_and_a_closed_gate_drains_first(patient: native.Scheduler, make_slice: MakeSlice) -> None:
    one, two = make_slice(), make_slice()
    for files in (one, two):
        add(patient, files)
        files.take_slot()
    one.say(want=1)
    assert wait_until(lambda: one.gate() == layout.GATE_OPEN)
    one.say(want=0, busy=True)
    two.say(want=1)
    assert wait_until(lambda: one.gate() == layout.GATE_CLOSED)
    assert two.gate() == layout.GATE_CLOSED, "the first one's work still runs"
    assert one.ctl.device[0].turn_end_ns != 0, "behind a closed gate it must ring"
    one.say(want=1, near=1)
    assert not wait_until(lambda: two.gate() == layout.GATE_OPEN, 0.02), "nearly done is not done"
    one.say(busy=False, near=0)
    assert wait_until(lambda: two.gate() == layout.GATE_OPEN)
    two.say(want=0, busy=True)
    assert wait_until(lambda: two.gate() == layout.GATE_CLOSED)
    two.say(want=1, busy=False)
    assert wait_until(lambda: one.gate() == layout.GATE_OPEN)


def test_who_never_says_idle_delays_the_next_one_for_a_while_only(without_guests: native.Scheduler, make_slice: MakeSlice) -> None:
    one, two = make_slice(), make_slice()
    first = add(without_guests, one)
    add(without_guests, two)
    for files in (one, two):
        files.take_slot()
    one.say(want=1)
    assert wait_until(lambda: one.gate() == layout.GATE_OPEN)
    one.say(want=0, busy=True)
    started = time.monotonic()
    two.say(want=1)
    assert wait_until(lambda: two.gate() == layout.GATE_OPEN)
    assert 0.05 < time.monotonic() - started < 1.0
    assert without_guests.stats(first).overruns == 1


def owner_of_slot(files: PlayedSlice) -> subprocess.Popen[str]:
    """Start a process that holds the lock of the slice's first slot and is its owner."""
    code = f"""
import fcntl, os, time
fd = os.open({str(files.use_path)!r}, os.O_RDWR)
fcntl.lockf(fd, fcntl.LOCK_EX, 1, {layout.Use.slot.offset})
print("locked", flush=True)
time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "locked"
    row = files.use.slot[0]
    row.owner, row.ready, files.use.high_water = child.pid << 32 | 1, 1, 1
    return child


@pytest.mark.parametrize("dies", [True, False], ids=["dead", "control: alive"])
def test_a_process_that_died_wanting_gets_no_turns(scheduler: native.Scheduler, make_slice: MakeSlice, dies: bool) -> None:
    """Nobody has tidied up its slot yet. The control, who lives and wants, gets its turn at once."""
    one, two = make_slice(), make_slice()
    first = add(scheduler, one)
    add(scheduler, two)
    two.take_slot()
    child = owner_of_slot(one)
    try:
        two.say(want=1)
        assert wait_until(lambda: two.gate() == layout.GATE_OPEN)
        two.say(want=0, busy=True)
        if dies:
            child.kill()
            child.wait(10)
        one.say(want=1)
        if not dies:
            assert wait_until(lambda: two.gate() == layout.GATE_CLOSED), "its turn is over: somebody else wants the device"
            return
        deadline = time.monotonic() + 0.3
        while time.monotonic() < deadline:
            assert two.gate() == layout.GATE_OPEN
            assert two.ctl.device[0].turn_end_ns == 0, "alone on the device: no end"
            time.sleep(0.005)
        assert scheduler.stats(first).turns == 0
    finally:
        child.kill()
        child.wait(10)


def test_dead_process_does_not_hold_the_device(without_guests: native.Scheduler, make_slice: MakeSlice) -> None:
    """A process is killed with work outstanding: nobody rings for it, its lock is gone."""
    one, two = make_slice(), make_slice()
    add(without_guests, one)
    add(without_guests, two)
    two.take_slot()
    child = owner_of_slot(one)
    try:
        one.say(want=1)
        assert wait_until(lambda: one.gate() == layout.GATE_OPEN)
        one.say(want=0, busy=True)
        two.say(want=1)
        assert wait_until(lambda: one.gate() == layout.GATE_CLOSED)
        child.kill()
        child.wait(10)
        started = time.monotonic()
        assert wait_until(lambda: two.gate() == layout.GATE_OPEN)
        assert time.monotonic() - started < 0.05, "sooner than two periods"
    finally:
        child.kill()
        child.wait(10)


def test_a_process_that_dies_waiting_costs_the_device_nothing(without_guests: native.Scheduler, make_slice: MakeSlice) -> None:
    """Nobody rings for it: it is asked again when its turn comes."""
    one, two = make_slice(), make_slice()
    first = add(without_guests, one)
    add(without_guests, two)
    two.take_slot()
    child = owner_of_slot(one)
    try:
        two.say(want=1)
        assert wait_until(lambda: two.gate() == layout.GATE_OPEN)
        two.say(want=0, busy=True)
        one.say(want=1)
        assert wait_until(lambda: two.ctl.device[0].turn_end_ns != 0)
        child.kill()
        child.wait(10)
        assert wait_until(lambda: two.gate() == layout.GATE_CLOSED), "the turn that is over for the other's sake"
        two.say(want=1, busy=False)
        started = time.monotonic()
        assert wait_until(lambda: two.gate() == layout.GATE_OPEN)
        assert time.monotonic() - started < 0.05
        assert without_guests.stats(first).turns <= 1
    finally:
        child.kill()
        child.wait(10)


def test_who_is_known_to_wait_wakes_nobody_however_often_it_rings(without_guests: native.Scheduler, make_slice: MakeSlice) -> None:
    one, two = make_slice(), make_slice()
    for files in (one, two):
        add(without_guests, files)
        files.take_slot()
    one.say(want=1)
    assert wait_until(lambda: one.gate() == layout.GATE_OPEN)
    one.say(want=0, busy=True)

    def heard(files: PlayedSlice) -> int:
        time.sleep(0.02)
        before = without_guests.totals().bells
        for _ in range(20):
            files.ring()
            time.sleep(0.001)
        return without_guests.totals().bells - before

    assert heard(one) > 10, "control: who has the turn is heard"
    two.say(want=1)
    assert wait_until(lambda: one.ctl.device[0].turn_end_ns != 0)
    assert heard(two) == 0
    one.say(busy=False)
    assert wait_until(lambda: two.gate() == layout.GATE_OPEN), "and it gets its turn"


def test_a_ring_of_a_slice_on_two_devices_is_heard_for_both(scheduler: native.Scheduler, make_slice: MakeSlice) -> None:
    """It rings for the second device just when the first is looked at for another reason."""
    files = make_slice()
    entries = [scheduler.add(files.ctl_fd, files.use_fd, device, device, 500, layout.MODE_BURST) for device in (0, 1)]
    files.take_slot(1, device=1)
    assert wait_until(lambda: files.gate(1) == layout.GATE_CLOSED)
    time.sleep(0.05)
    files.use.slot[1].want = 1
    files.use.bell += 1
    scheduler.kernels(entries[0])
    assert wait_until(lambda: files.gate(1) == layout.GATE_OPEN, 1)


def test_strict_slice_is_closed_when_its_share_is_spent(scheduler: native.Scheduler, make_slice: MakeSlice) -> None:
    files = make_slice()
    entry = add(scheduler, files, 300, layout.MODE_STRICT)
    files.take_slot()
    started = time.monotonic_ns()
    open_ns = 0
    while time.monotonic_ns() - started < 3_000_000_000:
        files.say(want=1, busy=False)
        if not wait_until(lambda: files.gate() == layout.GATE_OPEN, 2):
            break
        opened = time.monotonic_ns()
        files.say(want=0, busy=True)
        wait_until(lambda: files.gate() == layout.GATE_CLOSED, 2)
        open_ns += time.monotonic_ns() - opened
    share = open_ns / (time.monotonic_ns() - started)
    assert 0.15 < share < 0.36, "below: a slow machine; above: a share that is not kept"
    assert scheduler.stats(entry).turns >= 4


def test_truncated_use_file_hurts_nobody_else(scheduler: native.Scheduler, make_slice: MakeSlice) -> None:
    """`ftruncate(0)` would be SIGBUS for a reader of the mapping."""
    hostile, good = make_slice(), make_slice()
    entry = add(scheduler, hostile)
    add(scheduler, good)
    good.take_slot()
    hostile.take_slot()
    hostile.say(want=1)
    assert wait_until(lambda: hostile.gate() == layout.GATE_OPEN)
    os.ftruncate(hostile.use_fd, 0)
    good.say(want=1)
    assert wait_until(lambda: good.gate() == layout.GATE_OPEN)
    assert wait_until(lambda: scheduler.stats(entry).junk >= 1)
    before = scheduler.totals()
    time.sleep(0.4)
    assert scheduler.totals().wakeups - before.wakeups < 200, "no spinning on a bell that is not there"
    os.ftruncate(hostile.use_fd, layout.USE_SIZE)


def test_bell_that_never_stops_costs_little_and_disturbs_nobody(scheduler: native.Scheduler, make_slice: MakeSlice) -> None:
    hostile, good = make_slice(), make_slice()
    entry = add(scheduler, hostile)
    add(scheduler, good)
    good.take_slot()
    hostile.take_slot()
    before, started = scheduler.totals(), time.monotonic()
    opened = None
    while time.monotonic() < started + 1:
        hostile.ring()
        if opened is None and time.monotonic() > started + 0.5:
            opened = time.monotonic()
            good.say(want=1)
            while good.gate() != layout.GATE_OPEN:
                hostile.ring()
                assert time.monotonic() < opened + 1
            opened = time.monotonic() - opened
    after = scheduler.totals()
    assert opened is not None
    assert opened < 0.2
    assert (after.cpu_ns - before.cpu_ns) / 1e9 < 0.15
    assert scheduler.stats(entry).junk > 0


def test_a_bell_costs_little_also_where_all_slots_are_full(scheduler: native.Scheduler, make_slice: MakeSlice) -> None:
    """Each ring would have all slots read, and asked who holds them, for each of the slice's devices."""
    hostile, devices = make_slice(), 8
    for device in range(devices):
        scheduler.add(hostile.ctl_fd, hostile.use_fd, device, device, 500, layout.MODE_BURST)
    for number in range(layout.SLOTS):
        hostile.take_slot(number, number % devices)
        hostile.use.slot[number].want = hostile.use.slot[number].busy_since = 1
    before, started = scheduler.totals(), time.monotonic()
    while time.monotonic() < started + 1:
        hostile.ring()
    after = scheduler.totals()
    print(f"{(after.cpu_ns - before.cpu_ns) / 1e7:.0f} % of a core, {after.looks - before.looks} looks")
    assert (after.cpu_ns - before.cpu_ns) / 1e9 < 0.5


def test_suspend_resume_remove(scheduler: native.Scheduler, make_slice: MakeSlice) -> None:
    files = make_slice()
    entry = add(scheduler, files)
    files.take_slot()
    files.say(want=1)
    assert wait_until(lambda: files.gate() == layout.GATE_OPEN)
    scheduler.suspend(entry, True)
    assert wait_until(lambda: files.gate() == layout.GATE_SUSPENDED)
    scheduler.suspend(entry, False)
    assert wait_until(lambda: files.gate() == layout.GATE_OPEN)
    scheduler.remove(entry)
    assert files.gate() == layout.GATE_NONE
    with pytest.raises(OSError, match="scheduler stats"):
        scheduler.stats(entry)


def test_bad_arguments_are_refused(scheduler: native.Scheduler, make_slice: MakeSlice) -> None:
    files = make_slice()
    for milli, mode, device in ((0, 0, 0), (1001, 0, 0), (500, 7, 0), (500, 0, 16)):
        with pytest.raises(OSError, match="scheduler add"):
            add(scheduler, files, milli, mode, device)
    with pytest.raises(OSError, match="scheduler add"):
        scheduler.add(files.use_fd, files.use_fd, 0, 0, 500, 0)


def test_eight_by_eight_idle_costs_next_to_nothing(scheduler: native.Scheduler, make_slice: MakeSlice) -> None:
    for i in range(64):
        files = make_slice()
        scheduler.add(files.ctl_fd, files.use_fd, 0, i % 8, 125, layout.MODE_STRICT)
    before, started = scheduler.totals(), time.monotonic()
    time.sleep(1.0)
    after, passed = scheduler.totals(), time.monotonic() - started
    assert after.entries == 64
    assert (after.cpu_ns - before.cpu_ns) / 1e9 / passed < 0.01


def test_close_ends_the_heartbeat(library: native.Native, make_slice: MakeSlice) -> None:
    files = make_slice()
    scheduler = library.scheduler()
    add(scheduler, files)
    assert files.ctl.heartbeat_ns > 0
    scheduler.close()
    assert files.ctl.heartbeat_ns == 0
    scheduler.close()


# ---- the reader


def test_reader_returns_taken_slots(library: native.Native, make_slice: MakeSlice) -> None:
    files = make_slice()
    files.take_slot(0)
    files.take_slot(3, device=2)
    row = files.use.slot[3]
    row.kernel_id = b"0f1e-kernel"
    row.used, row.context, row.peak, row.launches = 1 << 30, 1 << 20, 2 << 30, 5
    row.launches_by_thread[0], row.launches_by_thread[7] = 10, 20
    rows = library.use_read(files.use_fd)
    assert [r.slot for r in rows] == [0, 3]
    assert (rows[1].device, rows[1].kernel_id, rows[1].used, rows[1].launches, rows[1].junk) == (2, "0f1e-kernel", 1 << 30, 35, 0)
    assert rows[1].pid == os.getpid()


def test_reader_counts_shared_memory_once(library: native.Native, make_slice: MakeSlice) -> None:
    files, mib = make_slice(), 1 << 20
    for slot in range(3):
        files.take_slot(slot)
    maker, one, two = (files.use.slot[slot] for slot in range(3))
    shares = [files.use.share[slot * layout.SHARES + 1] for slot in range(3)]  # the first entries are free again
    maker.used = 64 * mib
    for slot, share in zip((maker, one, two), shares, strict=True):
        slot.shares, share.key = 2, 7
    shares[0].covered = shares[1].held = shares[2].held = 64 * mib

    def used() -> list[int]:
        return [row.used // mib for row in library.use_read(files.use_fd)]

    assert used() == [64, 0, 0]
    shares[0].covered = maker.used = 0
    assert used() == [0, 64, 0], "freed by its maker: the first that holds it"
    one.shares = 0
    assert used() == [0, 0, 64]
    shares[2].key = 0
    shares[0].covered = 64 * mib
    assert used() == [0, 0, 64], "memory that nobody knows is its holder's"
    two.device = 1
    shares[2].key = 7
    assert used() == [0, 0, 64], "another device's"
    two.shares = 1 << 31
    shares[2].held = 1 << 60
    assert library.use_read(files.use_fd)[2].junk


def test_a_file_full_of_shared_memory_is_read_nearly_as_fast_as_one_without(library: native.Native, make_slice: MakeSlice) -> None:
    """The agent's one thread reads it, many times a second if its tenant likes."""
    files = make_slice()
    for slot in range(layout.SLOTS):
        files.take_slot(slot)

    def seconds() -> float:
        took: list[float] = []
        for _ in range(10):
            began = time.process_time()
            rows = library.use_read(files.use_fd)
            took.append(time.process_time() - began)
            assert len(rows) == layout.SLOTS
        return min(took)

    without = seconds()
    for number, share in enumerate(files.use.share):
        files.use.slot[number // layout.SHARES].shares = layout.SHARES
        share.key, share.held = number + 1, 1
    full = seconds()
    print(f"{without * 1e6:.0f} us, full {full * 1e6:.0f} us")
    assert sum(row.used for row in library.use_read(files.use_fd)) == layout.SLOTS * layout.SHARES
    assert full < 6 * without


def test_reader_flags_junk_and_returns_zeros_for_it(library: native.Native, make_slice: MakeSlice) -> None:
    files = make_slice()
    files.take_slot(0)
    row = files.use.slot[0]
    row.device, row.used, row.want = 999, 2**63, 2**31
    row.kernel_id = b"<script>"
    row.busy_ns = 2**64 - 1
    got = library.use_read(files.use_fd)[0]
    expected = native.JUNK_DEVICE | native.JUNK_KERNEL_ID | native.JUNK_MEMORY | native.JUNK_COMPUTE
    assert got.junk == expected
    assert (got.device, got.used, got.want, got.busy_ns, got.kernel_id) == (0, 0, 0, 0, "")


def test_reader_never_believes_high_water(library: native.Native, make_slice: MakeSlice) -> None:
    files = make_slice()
    files.use.high_water = 2**32 - 1
    assert library.use_head(files.use_fd).high_water == layout.SLOTS
    assert library.use_read(files.use_fd) == []


@pytest.mark.parametrize("size", [0, 7, 100, 4096])
def test_short_file_is_an_error_not_a_crash(library: native.Native, make_slice: MakeSlice, size: int) -> None:
    files = make_slice()
    files.use.high_water = 200
    os.ftruncate(files.use_fd, size)
    with pytest.raises(OSError, match="use file") as raised:
        library.use_read(files.use_fd)
    assert raised.value.errno == errno.EBADMSG
    os.ftruncate(files.use_fd, layout.USE_SIZE)


def test_foreign_file_is_refused(library: native.Native, make_slice: MakeSlice) -> None:
    files = make_slice()
    files.use.magic = 0
    with pytest.raises(OSError, match="use file"):
        library.use_head(files.use_fd)


def test_lock_says_who_lives(library: native.Native, make_slice: MakeSlice) -> None:
    files = make_slice()
    assert library.use_locked(files.use_fd, 5) == 0
    at = layout.Use.slot.offset + 5 * ctypes.sizeof(layout.UseSlot)
    code = f"""
import fcntl, os, time
fd = os.open({str(files.use_path)!r}, os.O_RDWR)
fcntl.lockf(fd, fcntl.LOCK_EX, 1, {at})
print("locked", flush=True)
time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline().strip() == "locked"
        assert library.use_locked(files.use_fd, 5) == child.pid
        assert library.use_locked(files.use_fd, 4) == 0
    finally:
        child.kill()
        child.wait(10)
    assert wait_until(lambda: library.use_locked(files.use_fd, 5) == 0, 1)


def test_events_word(library: native.Native, make_slice: MakeSlice) -> None:
    first, second = make_slice(), make_slice()
    first.use.events, second.use.events = 41, 7
    closed = os.open("/dev/null", os.O_RDONLY)
    assert list(library.use_events([first.use_fd, closed, second.use_fd])) == [41, 0, 7]
    os.close(closed)
    assert list(library.use_events([closed])) == [0]
    assert list(library.use_events([])) == []
