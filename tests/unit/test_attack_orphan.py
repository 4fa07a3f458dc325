"""A process whose parents have ended, of a slice without a cgroup: the agent has learnt whose it is, and the watchdog is to act on it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from nbgpu_agent import monitor, procs
from nbgpu_agent.live import LiveSlice
from nbgpu_agent.monitor import Monitor

ORPHAN = "import os, time\nif os.fork():\n    os._exit(0)\nos.setsid()\nprint(os.getpid(), flush=True)\ntime.sleep(60)"


def test_an_orphan_that_is_known_is_of_its_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "Responses", lambda *_: None)
    starter = subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    try:
        process = procs.find(pid)
        assert process is not None
        record = SimpleNamespace(cgroup=None, claim=None, roots=())
        live: Any = SimpleNamespace(id="s", record=record, tenant=SimpleNamespace(holders=set), _known={pid: process}, _watches={})
        live.knows = lambda one: LiveSlice.knows(live, one)
        cgroups = SimpleNamespace(full_path=lambda _: None, pod_of=lambda _: None)
        agent: Any = SimpleNamespace(
            slices={"s": live}, cgroups=cgroups, checkpoints=SimpleNamespace(), settings=SimpleNamespace(policy=None)
        )
        nvml: Any = None
        found = Monitor(agent, nvml)._find_slice  # pyright: ignore[reportPrivateUsage]
        assert found(process) == "s"
        assert found(procs.Process(pid, process.start_time + 1)) is None, "the control: another one of that pid"
    finally:
        os.kill(pid, signal.SIGKILL)
        starter.wait()
        starter.stdout.close()
