"""Memory limits of cgroups that the simulated driver holds from r615 on: set through NVML, unmodified nvidia-ml-py."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen

import pytest
from sim_machine import CONTEXT_BYTES, Machine, finish, line, wait_for

MIB = 1 << 20
MAX = 2**64 - 1
NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, INVALID_ARGUMENT = 3, 4, 6, 2

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root sets limits")

ASK = """
import json, os, sys
import pynvml as n
{become}
n.nvmlInit()
device = n.nvmlDeviceGetHandleByIndex({device})
try:
    if {limits!r}:
        n.nvmlDeviceSetMemoryLimits_v1(device, n.c_nvmlSetMemoryLimits_v1_t({path!r}.encode() or None, *{limits!r}))
    got = n.c_nvmlGetMemoryLimits_v1_t({path!r}.encode() or None)
    n.nvmlDeviceGetMemoryLimits_v1(device, got)
    print(json.dumps([got.softLimit, got.hardLimit, got.currentUsed]))
except n.NVMLError as error:
    print(json.dumps(error.value))
"""


class Tree:
    """A machine with driver r615, and directories that stand for its cgroups."""

    def __init__(self, root: Path, **settings: object) -> None:
        self.root = root
        self.machine = Machine(**{"memory_mib": 4096, "driver_version": 13040, "cgroup_root": root, "teardown_ms": 0, **settings})

    def path(self, cgroup: str) -> str:
        """Its directory, which is made."""
        (self.root / cgroup).mkdir(parents=True, exist_ok=True)
        return str(self.root / cgroup)

    def ask(self, path: str, limits: tuple[int, int] | tuple[()] = (), *, device: int = 0, become: str = "", **env: str) -> list[int] | int:
        """Set limits (soft, hard) where some are given; what is set then and used, or NVML's error."""
        text = ASK.format(path=path, limits=limits, device=device, become=become)
        found: list[int] | int = json.loads(finish(self.machine.start_plain(text, **env)))
        return found

    def limit(self, cgroup: str, hard: int, *, soft: int | None = None, device: int = 0) -> None:
        soft = hard if soft is None else soft
        done = self.ask(self.path(cgroup), (soft, hard), device=device)
        assert isinstance(done, list)
        assert done[:2] == [soft, hard]

    def used(self, cgroup: str) -> int:
        done = self.ask(self.path(cgroup))
        assert isinstance(done, list)
        return done[2]

    def most(self, cgroup: str, script: str = "") -> int:
        """Bytes that a process in it can allocate, in pieces of 10 MiB."""
        return int(self.machine.run(MOST + script, NBGPU_SIM_CGROUP="/" + cgroup)) if cgroup else int(self.machine.run(MOST + script))

    def holder(self, cgroup: str, mib: int) -> Popen[str]:
        process = self.machine.start(HOLD.format(mib=mib), NBGPU_SIM_CGROUP="/" + cgroup)
        assert line(process) == "held"
        return process


MOST = """
held = []
try:
    while True: held.append(cuda.alloc(10 << 20))
except CudaError as e:
    assert e.code == OUT_OF_MEMORY
print(len(held) * (10 << 20))
"""
HOLD = "p = cuda.alloc({mib} << 20); print('held', flush=True); sys.stdin.readline()"


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    made = Tree(tmp_path / "cgroup")
    yield made
    made.machine.close()


def test_no_process_of_a_cgroup_allocates_beyond_its_hard_limit(tree: Tree) -> None:
    tree.path("a")
    everything = 4096 * MIB - CONTEXT_BYTES
    assert tree.most("a") == everything // (10 * MIB) * 10 * MIB  # the control: no limit yet
    tree.limit("a", 1000 * MIB)
    assert tree.most("a") == 700 * MIB
    assert tree.most("b") > 3000 * MIB
    assert tree.most("") > 3000 * MIB


def test_all_kinds_of_memory_count_but_managed(tree: Tree) -> None:
    tree.limit("a", 1000 * MIB)
    tree.machine.run(
        """
        s, p, handle, prop = cuda.make("cuStreamCreate", 0), c.c_uint64(), c.c_uint64(), (c.c_int * 8)(1, 0, 1, 0)
        size = c.c_size_t(720 << 20)  # with the context more than the limit
        assert cuda.lib.cuMemAlloc_v2(c.byref(p), size) == OUT_OF_MEMORY
        assert cuda.lib.cuMemAllocAsync(c.byref(p), size, s) == OUT_OF_MEMORY
        assert cuda.lib.cuMemCreate(c.byref(handle), size, prop, c.c_ulonglong(0)) == OUT_OF_MEMORY
        assert cuda.lib.cuMemAllocPitch_v2(c.byref(p), c.byref(c.c_size_t()), c.c_size_t(720 << 10), c.c_size_t(1024), 4) == OUT_OF_MEMORY
        cuda.call("cuMemAllocManaged", c.byref(p), c.c_size_t(2000 << 20), 1)
        cuda.alloc(700 << 20)
        context = c.c_void_p()
        assert cuda.lib.cuCtxCreate_v2(c.byref(context), 0, 0) == OUT_OF_MEMORY
        """,
        NBGPU_SIM_CGROUP="/a",
    )


def test_processes_of_a_cgroup_share_its_limit_and_those_below_count(tree: Tree) -> None:
    tree.limit("pod", 2000 * MIB)
    for cgroup in ("pod", "pod/one", "pod/two/deep"):
        tree.path(cgroup)
    first, second = tree.holder("pod/one", 500), tree.holder("pod/two/deep", 300)
    assert tree.used("pod") == 800 * MIB + 2 * CONTEXT_BYTES
    assert tree.most("pod") == (2000 - 800 - 900) * MIB
    first.kill()
    first.wait(10)
    wait_for(lambda: tree.used("pod") == 300 * MIB + CONTEXT_BYTES, 5, "the killed one's memory")
    assert tree.most("pod/new") == (2000 - 300 - 600) * MIB
    finish(second)


def test_the_nearest_limit_is_the_one_that_holds(tree: Tree) -> None:
    tree.limit("pod", 1000 * MIB)
    tree.limit("pod/roomy", 2000 * MIB)
    assert tree.most("pod/roomy") == 1700 * MIB
    assert tree.most("pod/plain") == 700 * MIB
    assert tree.ask(tree.path("pod/plain")) == [1000 * MIB, 1000 * MIB, 0]  # read from above


def test_a_limit_is_of_one_device(tree: Tree) -> None:
    tree.limit("a", 1000 * MIB, device=1)
    assert tree.most("a") > 3000 * MIB
    done = tree.machine.run("cuda2 = Cuda(1)" + MOST.replace("cuda.", "cuda2."), NBGPU_SIM_CGROUP="/a")
    assert int(done) == 700 * MIB


def test_limits_change_while_processes_run_and_are_cleared(tree: Tree) -> None:
    tree.limit("a", 2000 * MIB)
    process = tree.machine.start(
        """
        p, q = cuda.alloc(1000 << 20), c.c_uint64()
        for size in sys.stdin: print(cuda.lib.cuMemAlloc_v2(c.byref(q), c.c_size_t(int(size) << 20)), flush=True)
        """,
        NBGPU_SIM_CGROUP="/a",
    )

    def alloc(mib: int) -> int:
        assert process.stdin
        process.stdin.write(f"{mib}\n")
        process.stdin.flush()
        return int(line(process))

    assert alloc(800) == 2
    tree.limit("a", 500 * MIB)  # below what it holds: nothing is taken away
    assert tree.used("a") == 1300 * MIB
    assert alloc(2) == 2
    assert tree.ask(tree.path("a"), (0, MAX)) == [0, MAX, 1300 * MIB]
    assert alloc(800) == 0


def test_memory_is_reported_as_the_cgroup_has_it(tree: Tree) -> None:
    tree.limit("a", 1000 * MIB)
    other = tree.holder("a", 100)
    script = """
        import pynvml as n
        cuda.alloc(50 << 20)
        n.nvmlInit(); h = n.nvmlDeviceGetHandleByIndex(0)
        old, new = n.nvmlDeviceGetMemoryInfo(h), n.nvmlDeviceGetMemoryInfo(h, version=n.nvmlMemory_v2)
        print(*(v >> 20 for v in (*cuda.memory(), old.free, old.total, new.free, new.total, new.used)))
        """
    used, physical = 150 + 600, (4096 - 750, 4096)
    assert tree.machine.run(script, NBGPU_SIM_CGROUP="/a").split() == [
        str(v) for v in (1000 - used, 1000, *physical, 1000 - used, 1000, used)
    ]
    finish(other)
    wait_for(lambda: tree.machine.used() == 0, 5, "both ends")
    outside = (4096 - 350, 4096)
    assert tree.machine.run(script).split() == [str(v) for v in (*outside, *outside, *outside, 350)]


def test_a_process_that_moves_counts_where_it_is_at_its_next_allocation(tree: Tree) -> None:
    tree.limit("a", 1000 * MIB)
    tree.limit("b", 3000 * MIB)
    moved = tree.machine.run("cuda.alloc(600 << 20)\nos.environ['NBGPU_SIM_CGROUP'] = '/b'" + MOST, NBGPU_SIM_CGROUP="/a")
    assert int(moved) == (3000 - 900) * MIB


def test_setting_needs_root_reading_does_not(tree: Tree) -> None:
    path = tree.path("a")
    for folder in (tree.root, *tree.root.parents):
        if folder.stat().st_uid == 0 and str(folder).startswith(str(tree.root.parents[1])):
            folder.chmod(0o755)
    become = "os.setgroups([]); os.setgid(65534); os.setuid(65534)"
    assert tree.ask(path, (0, MIB), become=become) == NO_PERMISSION
    tree.limit("a", 1000 * MIB)
    asked = tree.ask(path, become=become)
    assert asked in ([1000 * MIB, 1000 * MIB, 0], NOT_FOUND)  # not found: a folder above is closed to others


def test_what_is_no_cgroup_is_refused(tree: Tree) -> None:
    path, limits = tree.path("a"), (0, 100 * MIB)
    assert tree.ask(path + "/none", limits) == NOT_FOUND
    assert tree.ask(str(tree.root), limits) == NOT_FOUND  # the root has no limit
    assert tree.ask("/elsewhere/a", limits) == INVALID_ARGUMENT
    assert tree.ask(path + "/../a", limits) == INVALID_ARGUMENT
    assert tree.ask("", limits) == INVALID_ARGUMENT
    assert tree.ask(path, (200 * MIB, 100 * MIB)) == INVALID_ARGUMENT  # soft above hard


MANY = """
import os
import pynvml as n
n.nvmlInit(); device = n.nvmlDeviceGetHandleByIndex(0)
for i in range(300):
    one = f"{path}/{i}"; os.mkdir(one)
    if i: os.rmdir(f"{path}/{i - 1}")
    n.nvmlDeviceSetMemoryLimits_v1(device, n.c_nvmlSetMemoryLimits_v1_t(one.encode(), 0, 1 << 20))
"""


def test_a_removed_cgroup_has_no_limit_and_its_place_is_used_again(tree: Tree) -> None:
    tree.limit("a", 100 * MIB)
    shutil.rmtree(tree.path("a"))
    tree.path("filler")  # so that no inode number comes back
    assert tree.ask(tree.path("a")) == [0, MAX, 0]
    many = tree.path("many")
    finish(tree.machine.start_plain(f"path = {many!r}\n" + MANY))


def test_an_older_driver_has_no_limits(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "cgroup", driver_version=13030)
    try:
        assert tree.ask(tree.path("a"), (0, 100 * MIB)) == NOT_SUPPORTED
        assert tree.ask(tree.path("a")) == NOT_SUPPORTED
        assert tree.most("a") > 3000 * MIB
    finally:
        tree.machine.close()


@pytest.mark.skipif(Path("/sys/fs/cgroup/cgroup.procs").exists(), reason="cgroup v2 is at /sys/fs/cgroup")
def test_without_cgroup_v2_there_are_no_limits() -> None:
    machine = Machine(driver_version=13040)
    try:
        text = ASK.format(path="/sys/fs/cgroup/a", limits=(0, 100 * MIB), device=0, become="")
        assert json.loads(finish(machine.start_plain(text))) == NOT_SUPPORTED
        machine.run("cuda.alloc(100 << 20)", NBGPU_SIM_CGROUP="/sys/fs/cgroup/a")  # which nobody believes there
    finally:
        machine.close()


MOUNT = "{ stat -fc %T /sys/fs/cgroup | grep -q cgroup2fs || mount -t cgroup2 none /sys/fs/cgroup; }"
ANEW = "umount -l /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup"
# A program in a cgroup, as a machine with cgroup v2 has it; and as in a container, which sees its own cgroup as the root.
IN_CGROUP = f'{MOUNT} && echo $$ >/sys/fs/cgroup/$0/cgroup.procs && exec "$@"'
IN_CONTAINER = f'{MOUNT} && echo $$ >/sys/fs/cgroup/$0/cgroup.procs && exec unshare -m -C sh -c \'{ANEW} && exec "$@"\' sh "$@"'


def with_cgroups(machine: Machine, shell: str, name: str, *command: str) -> str:
    """What a shell script prints that has cgroup v2 to itself at its place."""
    full = ["unshare", "-m", "sh", "-c", shell, name, *command]
    done = subprocess.run(full, env=machine.env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def real_cgroup() -> Iterator[str]:
    name = f"nbgpu-test-{os.getpid()}"
    try:
        subprocess.run(["unshare", "-m", "-C", "sh", "-c", f"{MOUNT} && mkdir /sys/fs/cgroup/{name}"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    yield name
    subprocess.run(["unshare", "-m", "sh", "-c", f"{MOUNT} && rmdir /sys/fs/cgroup/{name}"], check=True)


def test_a_real_cgroup_is_found_by_proc_in_a_container_too(real_cgroup: str) -> None:
    machine = Machine(memory_mib=4096, driver_version=13040, teardown_ms=0)
    most = [sys.executable, "-c", "import ctypes as c\nfrom sim_client import *\ncuda = Cuda()" + MOST]
    try:
        text = ASK.format(path=f"/sys/fs/cgroup/{real_cgroup}", limits=(0, 1000 * MIB), device=0, become="")
        done = with_cgroups(machine, f'{MOUNT} && exec "$@"', "sh", sys.executable, "-c", text)
        assert json.loads(done) == [0, 1000 * MIB, 0]
        assert int(with_cgroups(machine, IN_CGROUP, real_cgroup, *most)) == 700 * MIB
        assert int(with_cgroups(machine, IN_CONTAINER, real_cgroup, *most)) == 700 * MIB
        assert int(with_cgroups(machine, f'{MOUNT} && exec "$@"', "sh", *most)) > 3000 * MIB
    finally:
        machine.close()


CHECKPOINT = """
import ctypes as c
lib = c.CDLL("libcuda.so.1")
print(*[getattr(lib, "cuCheckpointProcess" + w)({pid}, None) for w in {what!r}])
"""


def test_restoring_a_checkpoint_is_held_to_the_limit_too(tree: Tree) -> None:
    tree.limit("a", 1000 * MIB)
    first = tree.holder("a", 500)

    def do(*what: str) -> str:
        return finish(tree.machine.start_plain(CHECKPOINT.format(pid=first.pid, what=what))).strip()

    assert do("Lock", "Checkpoint") == "0 0"
    second = tree.holder("a", 200)
    assert do("Restore") == "2"
    finish(second)
    wait_for(lambda: tree.used("a") == 0, 5, "the second one's end")
    assert do("Restore", "Unlock") == "0 0"
    finish(first)


POINTS = {"sim.limit_entry": 1, "sim.limit_set": 1, "sim.mem_take": 12, "sim.mem_give": 6, "sim.attach": 1}
LIMIT = 1600 * MIB  # two that stay want up to 840 MiB each, those that come and go 300 and more
STORM = """
import random
r, live = random.Random(int(os.environ["SEED"])), []
while True:
    try: live.append(cuda.alloc(r.choice([3, 10, 40, 90]) << 20))
    except CudaError as e: assert e.code == OUT_OF_MEMORY
    if live and (len(live) > 5 or r.random() < 0.3): cuda.free(live.pop(r.randrange(len(live))))
"""


WATCH = """
import pynvml as n, select, sys
n.nvmlInit(); h = n.nvmlDeviceGetHandleByIndex(0); most = looks = 0
print("up", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    got = n.c_nvmlGetMemoryLimits_v1_t({path!r}.encode()); n.nvmlDeviceGetMemoryLimits_v1(h, got)
    most = max(most, got.currentUsed); looks += 1
print(most, looks)
"""


def storm(tree: Tree, rounds: int, staying: int) -> tuple[int, Counter[str]]:
    """Processes of cgroup "a", and who sets limits of others, kill themselves; the most that "a" was seen to hold."""
    seed = int(os.environ.get("NBGPU_TEST_SEED", random.randrange(1 << 30)))
    print(f"NBGPU_TEST_SEED={seed}")
    dice, landed = random.Random(seed), Counter[str]()
    watcher = tree.machine.start_plain(WATCH.format(path=tree.path("a")))
    assert line(watcher) == "up"
    stay = [tree.machine.start(STORM, SEED=str(i), NBGPU_SIM_CGROUP="/a") for i in range(staying)]
    for start in range(0, rounds, len(POINTS)):
        children = []
        for i, point in enumerate(POINTS):
            fault = f"{point}:{dice.randint(1, POINTS[point])}"
            env = {"SEED": str(dice.randrange(1 << 30)), "NBGPU_FAULT": fault, "NBGPU_SIM_CGROUP": "/a"}
            setter = ASK.format(path=tree.path(f"new{start + i}"), limits=(LIMIT, LIMIT), device=0, become="")
            children.append((point, tree.machine.start_plain(setter, **env) if "limit" in point else tree.machine.start(STORM, **env)))
        for point, child in children:
            child.communicate(timeout=60)
            if child.returncode == -signal.SIGKILL:
                landed[point] += 1
            else:  # no room for its context
                assert child.returncode == 1
                assert point.startswith("sim.mem"), (point, child.returncode)
    for process in stay:
        assert process.poll() is None
        process.kill()
    most, looks = map(int, watcher.communicate("stop\n", timeout=60)[0].split())
    print(dict(landed), f"most {most // MIB} of {LIMIT // MIB} MiB in {looks} looks")
    assert looks > 50
    wait_for(lambda: tree.machine.used() == 0, 5, "books return to zero")
    return most, landed


@pytest.mark.slow
def test_kill_storm_never_holds_more_than_the_limit_and_leaves_nothing(tree: Tree) -> None:
    tree.limit("a", LIMIT)
    most, landed = storm(tree, int(os.environ.get("NBGPU_TEST_STORM", "40")), 2)
    assert set(landed) == set(POINTS)
    assert LIMIT * 3 // 4 < most <= LIMIT
    assert tree.most("a") == (LIMIT - CONTEXT_BYTES) // (10 * MIB) * 10 * MIB
    tree.limit("new", LIMIT)  # nobody holds the table


@pytest.mark.slow
def test_control_without_a_limit_the_storm_holds_more(tree: Tree) -> None:
    most, _ = storm(tree, 10, 4)
    assert most > LIMIT
