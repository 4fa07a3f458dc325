"""How calls reach the limiter, and that programs which have nothing to do with CUDA notice nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
from limiter_kit import environment, limiter, null_driver, program, run
from limiter_slice import MIB, SliceFiles

from nbgpu_agent import layout

Make = Callable[..., SliceFiles]


def within(files: SliceFiles, **more: str) -> dict[str, str]:
    return environment(files, null_driver(), preload=limiter(), **more)


def test_every_way_to_a_function_is_ours(make_slice: Make) -> None:
    files = make_slice(mem_limit=4 * MIB)
    done = subprocess.run([program("resolvers")], env=within(files), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    control = subprocess.run([program("resolvers")], env=environment(files, null_driver()), capture_output=True, text=True, timeout=60)
    assert control.returncode != 0, "without the limiter nothing is ours"


def test_linked_against_the_driver(make_slice: Make) -> None:
    files = make_slice(mem_limit=4 * MIB)
    linked = program("linked", f"-L{null_driver()}", "-Wl,--no-as-needed", "-l:libcuda.so.1")
    for preload, expected in ((limiter(), "0 2"), (None, "0 0")):
        done = subprocess.run([linked], env=environment(files, null_driver(), preload=preload), capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == expected
    (slot,) = [slot for slot in files.use.slot if slot.allocs]
    assert files.launches(slot) == 1


def test_flags_and_versions_stay_the_callers(make_slice: Make) -> None:
    script = """
get = cuda.cuGetProcAddress_v2
def ask(name, version, flags):
    pointer, status = c.c_void_p(), c.c_int(9)
    return [get(name, c.byref(pointer), version, c.c_uint64(flags), c.byref(status)), pointer.value, status.value]
plain, stream = ask(b"cuLaunchKernel", 12000, 0), ask(b"cuLaunchKernel", 12000, 2)
addresses = [c.cast(getattr(cuda, n), c.c_void_p).value for n in ("cuLaunchKernel", "cuLaunchKernel_ptsz")]
say([plain == [0, addresses[0], 0], stream == [0, addresses[1], 0], ask(b"cuMemAlloc", 1, 0)[0], ask(b"cuNothing", 12000, 0)])
"""
    assert run(script, within(make_slice(mem_limit=MIB))) == [True, True, 500, [500, None, 1]]


def test_without_the_driver_no_symbol_appears(make_slice: Make) -> None:
    names = ("cuInit", "nvmlInit_v2", "nvmlDeviceGetCount_v2")
    script = f"import ctypes\nprint([hasattr(ctypes.CDLL(None), n) for n in {names}])"
    done = subprocess.run([sys.executable, "-c", script], env=within(make_slice(mem_limit=MIB)), capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[False, False, False]", done.stderr


PROGRAMS = {
    "bash": ["bash", "-c", "echo a; ls / | head -2; exec 7>/dev/null; echo $((1+1)); (exit 3); echo $?; umask; ulimit -n"],
    "git": ["git", "--version"],
    "node": ["node", "-e", "const c=require('child_process');console.log(c.execSync('echo hi').toString(), process.exitCode)"],
    "python": [sys.executable, "-c", "import os, signal, json; print(os.listdir('/proc/self/fd'), signal.getsignal(2), os.umask(0))"],
    "descriptors": ["bash", "-c", "ls -l /proc/self/fd | grep -c nbgpu; cat /proc/self/status | grep -E 'Sig(Pnd|Blk|Ign|Cgt)|Threads'"],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_without_cuda_notice_nothing(make_slice: Make, name: str) -> None:
    files = make_slice(mem_limit=MIB)

    def outcome(env: dict[str, str]) -> tuple[int, str, str]:
        try:
            done = subprocess.run(PROGRAMS[name], env=env, capture_output=True, text=True, timeout=60)
        except FileNotFoundError:
            pytest.skip(f"no {name} on this machine")
        return done.returncode, done.stdout, done.stderr

    assert outcome(within(files)) == outcome(environment(files, null_driver()))
    assert files.use.high_water == 0


def test_environment_and_first_descriptor_are_untouched(make_slice: Make) -> None:
    script = """
before = dict(os.environ); start(); fd = os.open("/dev/null", 0)
say([fd, os.environ == before, "CUDA_VISIBLE_DEVICES" in os.popen("env").read()])
"""
    files = make_slice(mem_limit=MIB * 4)
    assert run(script, within(files)) == run(script, environment(files, null_driver()))


def test_exec_starts_anew(make_slice: Make) -> None:
    files = make_slice(mem_limit=10 * MIB)
    script = """
start(); alloc(8 * MIB)
if len(sys.argv) > 1: say(info())
else:
    code = open("/proc/self/cmdline").read().split("\\0")[2]
    os.execv(sys.executable, [sys.executable, "-c", code, "again"])
"""
    assert run(script, within(files)) == [2 * MIB, 10 * MIB]


def test_a_descriptor_lost_and_a_slot_kept(make_slice: Make) -> None:
    files = make_slice(mem_limit=10 * MIB)
    assert run("start(); os.closerange(3, 2000); say(alloc(4 * MIB)[0])", within(files)) == 0
    assert layout.SLOTS == 256
