"""Section about GPU memory that is moved to the host and back: what idle notebooks stand on (docs/idle.md)."""

from __future__ import annotations

import subprocess
import time
from typing import Any

from . import BENCH, GIB, MIB, PYTHON
from .hub import Worker
from .kit import Kit, Skip
from .on_life import checkpoint_step
from .places import Spec

RUNNING, LOCKED, CHECKPOINTED = range(3)
LEAST_BYTES_PER_SECOND = 1e8
"""What is slower than this the agent takes for a call that hangs (`nbgpu_agent.parking.BYTES_PER_SECOND`)."""
STEPS = ("lock", "checkpoint", "restore", "unlock")
GONE_SECONDS = 5.0
NOT_PERMITTED = 800


def parking(kit: Kit) -> dict[str, Any]:
    """Whether a process gives all its memory back and gets it again as it was, how fast, and whoever is killed in between."""
    found: dict[str, Any] = kit.results.setdefault("parking", {})
    size = kit.memory(4 * GIB, 256 * MIB)
    for name in reversed(kit.compared):
        try:
            place = kit.place(name)
        except Skip:
            continue
        before = kit.nvml.memory()[0]
        with place.groups([Spec(500)]) as groups:
            [worker] = kit.ready(groups)
            code = worker.ask("alloc", size=size)["code"]
            if code:
                raise Skip(f"{size / GIB:.1f} GiB could not be allocated ({code})")
            text = worker.ask("fill", 60)["sum"]
            row = found[place.name] = _there_and_back(kit, worker, before)
            row["same"] = worker.ask("checksum", 60)["sum"] == text
            for step in ("checkpoint", "restore"):
                killed = row[f"caller_killed_in_{step}"] = _caller_killed(kit, worker, step, row[step]["seconds"])
                killed["same"] = killed["back"] and worker.ask("checksum", 60)["sum"] == text
            row["killed_while_away"] = _killed_while_away(kit, worker, before)
    _facts(kit, found)
    return found


def _go(kit: Kit, pid: int, *steps: str) -> dict[str, Any]:
    done: dict[str, Any] = {}
    for step in steps:
        done[step] = checkpoint_step(kit, step, pid)
        if "missing" in done[step]:
            raise Skip(f"this driver has no {done[step]['missing']}: it came with 570")
        if done[step]["code"] == NOT_PERMITTED:
            raise Skip(f"the driver does not permit it to this user ({step})")
        if done[step]["code"]:
            raise RuntimeError(f"the driver's {step} failed with {done[step]['code']}")
    return done


def _there_and_back(kit: Kit, worker: Worker, before: int) -> dict[str, Any]:
    """Return how long each step took, and what NVML said before, between and after."""
    row: dict[str, Any] = {"held": kit.held([worker.pid], before)}
    row |= _go(kit, worker.pid, "lock", "checkpoint")
    row["held_away"] = kit.held([worker.pid], before)
    row["listed_away"] = worker.pid in kit.nvml.processes()
    row |= _go(kit, worker.pid, "restore", "unlock")
    row["held_again"] = kit.held([worker.pid], before)
    for step in ("checkpoint", "restore"):
        row[f"{step}_seconds_per_gib"] = row[step]["seconds"] / max(MIB, row["held"]) * GIB
    return row


def _caller_killed(kit: Kit, worker: Worker, step: str, seconds: float) -> dict[str, Any]:
    """Kill who asks for a step in the middle of it; return in what state the process was left, and whether it runs again."""
    _go(kit, worker.pid, *STEPS[: STEPS.index(step)])
    command = [PYTHON, "-S", str(BENCH / "hwkit" / "checkpoint_probe.py"), step, str(worker.pid)]
    caller = subprocess.Popen(command, env=kit.place("driver alone").env, stdout=subprocess.PIPE)
    assert caller.stdout is not None
    caller.stdout.readline()
    time.sleep(seconds / 2)
    caller.kill()
    in_it = not caller.communicate(timeout=10)[0]  # it has not said how it went
    begun = time.monotonic()
    states = _wake(kit, worker.pid)
    return {"in_it": in_it, "states": states, "back": states[-1] == RUNNING, "seconds": time.monotonic() - begun}


def _wake(kit: Kit, pid: int) -> list[int]:
    """Bring a process to run as the agent does; return the states that it was found in."""
    states: list[int] = []
    for _ in range(6):
        states.append(int(checkpoint_step(kit, "state", pid)["state"]))
        if states[-1] not in (LOCKED, CHECKPOINTED):
            break
        checkpoint_step(kit, "restore" if states[-1] == CHECKPOINTED else "unlock", pid)
    return states


def _killed_while_away(kit: Kit, worker: Worker, before: int) -> dict[str, Any]:
    """Kill a process whose memory is on the host; return what the GPU holds of it then."""
    _go(kit, worker.pid, "lock", "checkpoint")
    worker.kill()
    begun = time.monotonic()
    while (held := kit.held([worker.pid], before)) and time.monotonic() - begun < GONE_SECONDS:
        time.sleep(0.05)
    return {"held": held, "listed": worker.pid in kit.nvml.processes()}


def _facts(kit: Kit, found: dict[str, Any]) -> None:
    rows = [row for row in found.values() if "killed_while_away" in row]
    if not rows:
        return

    def say(name: str, holds: bool, words: str) -> None:
        kit.fact(name, "holds" if holds else "differs", words)

    def each(key: str) -> list[Any]:
        return [row[key] for row in rows]

    say(
        "checkpoint-nvml",
        not any(each("held_away")),
        "; ".join(f"{row['held'] / MIB:.0f} MiB, then {row['held_away'] / MIB:.0f}, listed: {row['listed_away']}" for row in rows),
    )
    say("checkpoint-same", all(each("same")), f"checksums the same: {each('same')}; after it {each('held_again')} of {each('held')} bytes")
    slowest = max(each("checkpoint_seconds_per_gib") + each("restore_seconds_per_gib"))
    words = [f"checkpoint {row['checkpoint_seconds_per_gib']:.2f} s/GiB, restore {row['restore_seconds_per_gib']:.2f}" for row in rows]
    say("checkpoint-speed", slowest < GIB / LEAST_BYTES_PER_SECOND, "; ".join(words))
    killed = [row[f"caller_killed_in_{step}"] for row in rows for step in ("checkpoint", "restore")]
    verdict = "holds" if all(one["same"] for one in killed) else "differs"
    kit.fact(
        "checkpoint-caller-killed",
        verdict if any(one["in_it"] for one in killed) or verdict == "differs" else "unknown",
        f"{sum(one['in_it'] for one in killed)} of {len(killed)} kills in the call; left in states {[one['states'][0] for one in killed]}; "
        f"same afterwards: {[one['same'] for one in killed]}",
    )
    gone = each("killed_while_away")
    say("checkpoint-killed", not any(one["held"] for one in gone), f"{[one['held'] for one in gone]} bytes are held afterwards")
