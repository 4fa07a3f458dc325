"""A tenant spoils its `use` file in every way: the agent, its restart, its scheduler and the neighbours go on."""

# ruff: noqa: F811 (fixtures by import)
from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from agent_harness import AgentProcess, until, usage
from attack_fixtures import Tenancy, agent, last, metrics, missing, tenancy, tenants  # noqa: F401
from attacker import cpu_seconds, seconds_of

from nbgpu.quantities import GIB

pytestmark = [pytest.mark.timeout(180), pytest.mark.skipif(missing() is not None, reason=str(missing()))]
Make = Callable[..., Tenancy]


@pytest.fixture
def grace(tenancy: Make, tenants: tuple[str, str]) -> Tenancy:
    """The neighbour, with something on the GPU."""
    made = tenancy(tenants[1])
    assert made.enter().run("result = cuda() or alloc(GIB)") == 0
    return made


SPOILED = {
    "truncated": "os.ftruncate(use(), 0)",
    "a few bytes": "os.ftruncate(use(), 10)",
    "grown and filled": """
        fd = use()
        os.ftruncate(fd, 2**40)
        try:
            at = F["size"]
            while True:
                at += os.pwrite(fd, bytes([255]) * 4096, at)
        except OSError as error:
            result = error.errno
        libc = ctypes.CDLL(None, use_errno=True)
        libc.fallocate(fd, 3, ctypes.c_long(0), ctypes.c_long(F["size"]))  # punch out the head: no room to write it again
    """,
    "junk": "os.pwrite(use(), os.urandom(F['size']), 0)",
    "all slots": "fd = use()\nfor i in range(256): forge(fd, i, os.getpid(), started(os.getpid()), used=2**64 - 1, busy_ns=2**64 - 1)",
}


@pytest.mark.parametrize("name", list(SPOILED))
def test_the_agent_starts_again_beside_a_spoiled_file(agent: AgentProcess, tenancy: Make, grace: Tenancy, name: str) -> None:
    mallory = tenancy()
    one = mallory.enter()
    one.run(SPOILED[name])
    agent.kill()
    agent.start()
    assert set(agent.slices()) == {mallory.id, grace.id}
    assert usage(grace.launch).devices[0].memory_used_bytes > GIB
    assert grace.attackers[0].run("result = alloc(GIB)") == 0
    usage(mallory.launch)
    assert "nbgpu_slice_memory_used_bytes" in metrics(agent)
    one.close()
    until(lambda: mallory.id not in agent.slices(), 2, "the end of the slice")


def test_a_lease_does_not_hold_up_the_agents_start(agent: AgentProcess, tenancy: Make, grace: Tenancy) -> None:
    """Who owns a file may lease it, and whoever opens it then waits 45 seconds."""
    mallory = tenancy()
    one = mallory.enter()
    agent.kill()
    leased = one.run(
        """
        fd = use()
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            result = True
        except OSError:
            result = False
        """
    )
    took = seconds_of(agent.start)
    print(f"leased: {leased}, the agent started in {took:.1f} s")
    assert took < 20
    assert usage(grace.launch).devices[0].memory_used_bytes > GIB


def test_thousands_of_locks_slow_neither_agent_nor_scheduler(agent: AgentProcess, tenancy: Make, grace: Tenancy, last: int) -> None:
    """Asking who holds a lock takes as long as there are locks on the file; a tenant may take as many as it likes on its own."""
    mallory = tenancy()
    one = mallory.enter()
    one.run(
        """
        fd = use()
        for slot in range(256):
            lock(fd, slot)
            forge(fd, slot, os.getpid(), started(os.getpid()), want=1, busy_since=1)
        for i in range(10_000, 0, -1):  # downwards: each is put in front
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 2 * i)
        def ring():
            bell = 0
            while True:
                bell += 1
                os.pwrite(fd, struct.pack("<I", bell & 0xffffffff), F["bell"])
                time.sleep(0.001)
        threading.Thread(target=ring, daemon=True).start()
        """
    )
    assert agent.process is not None
    time.sleep(1)
    spent = cpu_seconds(agent.process.pid)
    began = time.monotonic()
    times = []
    for _ in range(50):
        times.append(seconds_of(lambda: usage(grace.launch)))
        time.sleep(0.05)
    share = (cpu_seconds(agent.process.pid) - spent) / (time.monotonic() - began)
    times.sort()
    beats = grace.attackers[0].run(
        """
        import mmap
        fd = os.open(DIRECTORY + "/ctl", os.O_RDONLY)
        ages = []
        for _ in range(50):
            beat = struct.unpack("<Q", os.pread(fd, 8, 24))[0]
            ages.append((time.monotonic_ns() - beat) / 1e9)
            time.sleep(0.02)
        result = max(ages)
        """
    )
    print(f"median {times[25] * 1e3:.1f} ms, worst {times[-1] * 1e3:.1f} ms, agent {share:.0%} of a core, oldest heartbeat {beats:.2f} s")
    assert times[-1] < 0.5
    assert share < 0.5
    assert beats < 0.5, "gates would not be obeyed any more"


def test_new_kernel_ids_without_end_fill_neither_memory_nor_the_event_log(
    agent: AgentProcess, tenancy: Make, grace: Tenancy, last: int
) -> None:
    assert grace.attackers[0].run("result = alloc(60 * GIB)") == 2
    until(lambda: [e for e in agent.events(last, kind="refused") if e["slice_id"] == grace.id], 3, "the neighbour's event")
    mallory = tenancy()
    one = mallory.enter()
    one.run(
        """
        def spin():
            fd, n = use(), 0
            while True:
                n += 1
                for slot in range(256):
                    forge(fd, slot, os.getpid(), started(os.getpid()), kernel_id=b"k%d" % (256 * n + slot), refusals=n, refused_bytes=5)
                os.pwrite(fd, struct.pack("<I", n), F["events"])
                time.sleep(0.05)
        threading.Thread(target=spin, daemon=True).start()
        """
    )
    time.sleep(6)
    events = agent.events(last)
    own = [event for event in events if event["slice_id"] == mallory.id]
    print(f"{len(own)} events of the tenant in 6 s")
    assert [e for e in events if e["slice_id"] == grace.id and e["kind"] == "refused"], "its event is still there"
    assert len(own) < 100
    one.run("def forge(*_, **__): time.sleep(60)")
    other = mallory.enter(limited=False)
    since = time.time()
    assert other.run("result = cuda() or alloc(GIB)") == 0
    found = until(lambda: [e for e in agent.events(last, kind="unlimited") if e["slice_id"] == mallory.id], 4, "the event", every=0.02)
    assert found[0]["time"] - since < 2.0, "a flood of one kind hides no other"


def test_expensive_files_do_not_make_expensive_answers(agent: AgentProcess, tenancy: Make, grace: Tenancy) -> None:
    mallory = tenancy()
    one = mallory.enter()
    one.run(
        """
        fd = use()
        for slot in range(256):
            forge(fd, slot, os.getpid(), started(os.getpid()), used=1, kernel_id=b"kernel-%d" % slot)
        def ask():
            while True:
                try:
                    s = socket.socket(socket.AF_UNIX); s.connect(DIRECTORY + "/api.sock")
                    for _ in range(45):
                        s.sendall(b"GET /v1/usage HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n"); s.recv(1 << 20); time.sleep(0.02)
                except OSError:
                    time.sleep(0.1)
        threading.Thread(target=ask, daemon=True).start()
        """
    )
    assert agent.process is not None
    time.sleep(0.5)
    spent, began, times = cpu_seconds(agent.process.pid), time.monotonic(), []
    for _ in range(60):
        times.append(seconds_of(lambda: usage(grace.launch)))
        time.sleep(0.03)
    share = (cpu_seconds(agent.process.pid) - spent) / (time.monotonic() - began)
    times.sort()
    print(f"median {times[30] * 1e3:.1f} ms, worst {times[-1] * 1e3:.1f} ms, agent {share:.0%} of a core")
    assert share < 0.4
    assert times[-1] < 0.3


def test_refusals_of_many_kernels_and_ever_new_limits_hold_up_nobody(agent: AgentProcess, tenancy: Make, grace: Tenancy) -> None:
    """All slots full, each with as much shared memory as fits, refused again and again under 64 names."""
    tenancy().enter().run(
        """
        fd = use()
        shares = b"".join(struct.pack("<4Q", key, 1, 0, 0) for key in range(1, 4097))
        os.pwrite(fd, shares, F["slot"] + 256 * F["slot_bytes"])
        def refuse():
            n = 0
            while True:
                n += 1
                for slot in range(256):
                    forge(fd, slot, os.getpid(), 1, used=n, refusals=n, refused_bytes=5, shares=16, kernel_id=b"kernel-%d" % (slot % 64))
                os.pwrite(fd, struct.pack("<I", n), F["events"])
                time.sleep(0.02)
        def limit():
            n = 0
            while True:
                try:
                    s = socket.socket(socket.AF_UNIX); s.connect(DIRECTORY + "/api.sock")
                    while n := n + 1:
                        body = b'{"memory_bytes": %d}' % (2**28 + n % 1000 * 2**20)
                        s.sendall(b"PUT /v1/kernels/k%d HTTP/1.1\\r\\nHost: a\\r\\n" % (n % 60))
                        s.sendall(b"Content-Length: %d\\r\\n\\r\\n" % len(body) + body)
                        s.recv(1 << 20); time.sleep(0.021)
                except OSError:
                    time.sleep(0.1)
        for work in (refuse, limit):
            threading.Thread(target=work, daemon=True).start()
        """
    )
    time.sleep(1)
    times: list[float] = []
    for _ in range(80):
        times.append(seconds_of(lambda: usage(grace.launch)))
        time.sleep(0.03)
    times.sort()
    print(f"median {times[40] * 1e3:.1f} ms, 95 of 100 {times[76] * 1e3:.1f} ms, worst {times[-1] * 1e3:.1f} ms")
    assert times[76] < 0.2


def test_numbers_that_cannot_be_are_shown_nowhere(agent: AgentProcess, tenancy: Make, grace: Tenancy) -> None:
    mallory = tenancy()
    one = mallory.enter()
    one.run(
        """
        fd = use()
        words = ("used", "context", "peak", "allocs", "frees", "refusals", "busy_since", "busy_ns", "launches", "last_launch_ns")
        for slot, name in enumerate(words):
            forge(fd, slot, os.getpid(), started(os.getpid()), **{name: 2**64 - 1})
        forge(fd, 20, 0xffffffff, 2**64 - 1)
        forge(fd, 21, os.getpid(), 1, device=2**32 - 1)
        forge(fd, 22, os.getpid(), 1, kernel_id=bytes([255]) * 40)
        forge(fd, 23, os.getpid(), 1, kernel_id=b'x"} 1\\n# HELP evil')
        os.pwrite(fd, struct.pack("<I", 2**32 - 1), F["high_water"])
        """
    )
    time.sleep(1.5)
    for numbers in (usage(mallory.launch), usage(grace.launch)):
        assert 0 <= numbers.devices[0].memory_used_bytes < 2**40
        assert 0 <= numbers.devices[0].compute_used_milli <= 1000
    one.run("for slot in range(256): forge(fd, slot, os.getpid(), 1, used=2**50, context=2**50, refusals=2**62, launches=2**62)")
    time.sleep(1.2)
    usage(mallory.launch)
    assert "evil" not in metrics(agent)
    assert "evil" not in agent.log.read_text()
    # Counters that run backwards
    for value in (10**12, 5, 10**11, 0):
        one.run(f"forge(fd, 0, os.getpid(), 1, busy_ns={value}, refusals={value}, launches={value})")
        time.sleep(0.6)
        assert 0 <= usage(mallory.launch).devices[0].compute_used_milli <= 1000
    assert usage(grace.launch).devices[0].memory_used_bytes > GIB
