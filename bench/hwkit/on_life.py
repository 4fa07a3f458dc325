"""Sections about lives that end: SIGKILL, checkpoints, kill storms, programs that evade the limiter, and how late NVML tells."""

from __future__ import annotations

import json
import random
import struct
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from . import BENCH, GIB, MIB, PYTHON
from .analysis import median, percentile
from .hub import Group, Worker, WorkerFailed, alive
from .kit import Kit, Skip
from .places import Nbgpu, Place, Spec
from .tasks import SIGN, STATES

NEVER = -1.0


# ---- a SIGKILL


def _locked(path: Path) -> bool:
    """Whether somebody else holds a record lock on a file's first byte."""
    import fcntl

    with open(path, "r+b") as file:
        answer = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack("hhqqi", fcntl.F_WRLCK, 0, 0, 1, 0))
    return bool(struct.unpack("hhqqi", answer[: struct.calcsize("hhqqi")])[0] != fcntl.F_UNLCK)


def _watch_death(kit: Kit, worker: Worker, lock: Path, before: int, slack: int) -> dict[str, float]:
    """Kill a worker; return ms until its lock was free, it was gone, NVML did not name it, its memory was free. -1: not within 10 s."""
    at: dict[str, float] = {}
    begun = time.monotonic()

    def poll(questions: dict[str, Any]) -> None:
        while questions and time.monotonic() - begun < 10:
            for name, answer in list(questions.items()):
                if answer():
                    at[name] = (time.monotonic() - begun) * 1e3
                    del questions[name]

    sys.setswitchinterval(1e-4)
    own = threading.Thread(target=poll, args=({"lock_free_ms": lambda: not _locked(lock), "gone_ms": lambda: not alive(worker.pid)},))
    driver = {
        "not_in_nvml_ms": lambda: worker.pid not in kit.nvml.processes(),
        "memory_free_ms": lambda: kit.nvml.memory()[0] <= before + slack,
    }
    other = threading.Thread(target=poll, args=(driver,))
    begun = time.monotonic()
    worker.kill()
    own.start()
    other.start()
    own.join()
    other.join()
    sys.setswitchinterval(5e-3)
    return {name: round(at.get(name, NEVER), 2) for name in ("lock_free_ms", "gone_ms", "not_in_nvml_ms", "memory_free_ms")}


def death(kit: Kit) -> dict[str, Any]:
    """When a killed process's lock, its pid, its place in NVML's list and its memory are free; and how long its GPU kernel runs on."""
    found: dict[str, Any] = kit.results.setdefault("death", {})
    lock = kit.folder / "lock"
    lock.write_bytes(bytes(64))
    _, one = kit.calibrate()
    free = kit.total - kit.nvml.memory()[0]
    big = int(min(free // 4, kit.pick(32 * GIB, 2 * GIB)))
    cases = [
        ("no GPU", 0, 0.0),
        ("idle, 64 MiB", 64 * MIB, 0.0),
        (f"idle, {big // GIB} GiB", big, 0.0),
        ("in a GPU kernel of 2 s", 64 * MIB, 2.0),
    ]
    stock = kit.place("driver alone")
    with stock.groups([Spec(1000)]) as others:
        [other] = kit.ready(others)  # while it lives the driver keeps the device as it is
        for name, size, busy in cases:
            rows: list[dict[str, float]] = []
            for _ in range(int(kit.pick(3, 1))):
                before = kit.nvml.memory()[0]
                with stock.groups([Spec(1000)]) as groups:
                    [worker] = kit.ready(groups) if size else groups[0].workers
                    if size:
                        worker.ask("alloc", size=size)
                    worker.ask("lock", path=str(lock))
                    if busy:
                        worker.send("timed", start=0, rounds=int(kit.pick(busy, 0.5) * 1e9 / one), blocks=1, count=1)
                        now = time.monotonic_ns()
                        other.send("short", start=now, end=now + 1_500_000_000, rounds=1, pause_ms=1)
                        time.sleep(0.3)
                    row = _watch_death(kit, worker, lock, before, 32 * MIB)
                    if busy:
                        row["other_waited_ms"] = max(other.receive(30)["ms"], default=NEVER)
                    rows.append(row)
            found[name] = {key: {"median": median([row[key] for row in rows]), "worst": max(row[key] for row in rows)} for key in rows[0]}
            kit.say(f"  {name}: {found[name]}")
    locks = {name: row["lock_free_ms"]["worst"] for name, row in found.items()}
    kit.fact(
        "lock-after-kill",
        "holds" if NEVER not in locks.values() and max(locks.values()) <= max(0.0, locks["no GPU"]) + 1.5 else "differs",
        "; ".join(
            f"{name}: median {row['lock_free_ms']['median']} ms, worst {row['lock_free_ms']['worst']} ms" for name, row in found.items()
        ),
    )
    late = {name: row["memory_free_ms"]["worst"] - max(row["gone_ms"]["worst"], 0) for name, row in found.items()}
    slow = max(late.values())
    kit.fact(
        "teardown-lag",
        "differs" if slow > 500 or any(row["memory_free_ms"]["worst"] == NEVER for row in found.values()) else "holds",
        "; ".join(
            f"{name}: gone after {row['gone_ms']['median']} ms, memory free after {row['memory_free_ms']['median']} ms"
            for name, row in found.items()
        ),
    )
    busy_row = found[cases[-1][0]]
    kit.fact(
        "kill-in-kernel",
        "holds" if 0 <= busy_row["memory_free_ms"]["worst"] < 1000 else "differs",
        f"killed 0.3 s into a long GPU kernel: {busy_row['memory_free_ms']['worst']} ms until all was free; "
        f"another process's smallest GPU kernels took up to {busy_row['other_waited_ms']['worst']:.0f} ms",
    )
    return found


# ---- checkpoints


def checkpoint_step(kit: Kit, step: str, pid: int) -> dict[str, Any]:
    """Have one of the driver's checkpoint calls made for a process; return its code and how long it took."""
    command = [PYTHON, "-S", str(BENCH / "hwkit" / "checkpoint_probe.py"), step, str(pid)]
    done = kit.place("driver alone").run(Spec(1000), command, 15)
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if lines else {"code": -1, "said": done.stderr.strip()[-200:]}


class Signs:
    """The file in which a storming worker leaves its signs of life."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(SIGN.size))

    def read(self) -> tuple[int, str, int, int]:
        """Return (operations done, what it is at, when it last did something, its longest operation in ns)."""
        done, state, last, longest = SIGN.unpack(self.path.read_bytes()[: SIGN.size])
        return done, STATES[min(state, len(STATES) - 1)], last, longest


def checkpoint(kit: Kit) -> dict[str, Any]:
    """Whether the driver's checkpoint calls stop a process that computes, free its memory and let it go on; without and in a slice."""
    found: dict[str, Any] = kit.results.setdefault("checkpoint", {})
    size = kit.memory(8 * GIB, 1 * GIB)
    for place in reversed(kit.places()):
        with place.groups([Spec(250)]) as groups:
            [worker] = kit.ready(groups)
            signs = Signs(kit.folder / "signs-checkpoint")
            worker.ask("alloc", size=size)
            seconds = max(2.0, kit.left() - 2)
            worker.send("storm", sign=str(signs.path), seed=1, seconds=seconds, most=64 * MIB, rounds=1000)
            time.sleep(0.5)
            row: dict[str, Any] = {"lock": checkpoint_step(kit, "lock", worker.pid)}
            found[place.name] = row
            if "missing" in row["lock"]:
                raise Skip(f"this driver has no {row['lock']['missing']}: it came with 570")
            if row["lock"]["code"]:
                continue
            before = signs.read()[0]
            time.sleep(0.7)
            row["done_while_locked"] = signs.read()[0] - before
            held = kit.nvml.processes().get(worker.pid, 0)
            row["checkpoint"] = checkpoint_step(kit, "checkpoint", worker.pid)
            row["held_before_and_after"] = [held, kit.nvml.processes().get(worker.pid, 0)]
            if row["checkpoint"]["code"] == 0:
                row["restore"] = checkpoint_step(kit, "restore", worker.pid)
            row["unlock"] = checkpoint_step(kit, "unlock", worker.pid)
            time.sleep(0.5)
            row["done_after"] = signs.read()[0] - before - row["done_while_locked"]
    first = found.get("driver alone", {})
    worked = {name: row for name, row in found.items() if row["lock"].get("code") == 0}
    codes = {name: row["lock"].get("code") for name, row in found.items()}
    stopped = all(row["done_while_locked"] <= 1 and row["done_after"] > 0 for row in worked.values())
    kit.fact(
        "checkpoint-lock",
        "unknown" if kit.simulated else "holds" if worked and stopped and len(worked) == len(found) else "differs",
        "; ".join(f"{name}: {row['done_while_locked']} operations while locked, {row['done_after']} after" for name, row in worked.items())
        or f"codes {codes}",
    )
    if first.get("checkpoint", {}).get("code") == 0 and first["held_before_and_after"][0]:
        held, left = first["held_before_and_after"]
        speed = held / GIB / max(1e-9, first["checkpoint"]["seconds"])
        kit.fact(
            "checkpoint-frees",
            "holds" if left < held // 10 else "differs",
            f"{held / GIB:.1f} GiB before, {left / GIB:.2f} after, {speed:.1f} GiB/s; restore {first.get('restore', {})}",
        )
    return found


# ---- kill storm


def storm(kit: Kit) -> dict[str, Any]:
    """Processes of a slice are killed at random moments while others of it and of another slice go on."""
    found: dict[str, Any] = kit.results.setdefault("storm", {})
    places = kit.places()
    each = max(1.5, min(kit.pick(9.0, 1.5), kit.left() / len(places) - kit.pick(3.0, 2.0)))
    for place in places:
        try:
            found[place.name] = _storm(kit, place, each)
        except WorkerFailed as error:
            found[place.name] = {"failed": str(error)}
            kit.compare("kill storm", place.name, {"failed": str(error)})
            continue
        keys = ("kills", "bystander_longest_ms", "neighbour_longest_ms", "refill_percent")
        kit.compare("kill storm", place.name, {key: found[place.name][key] for key in keys})
    row = found.get("nbgpu", {})
    if "kills" in row:
        worst = max(row["bystander_longest_ms"], row["neighbour_longest_ms"])
        good = row["bystander_done"] > 0 and row["neighbour_done"] > 0 and worst < 2000 and row["refill_percent"] >= 80
        kit.fact(
            "kills-block-nobody",
            "holds" if good else "differs",
            f"{row['kills']} kills ({row['killed_while']}); longest operation of who lived on {worst:.0f} ms; "
            f"afterwards {row['refill_percent']} % of the slice could be filled",
        )
    return found


def _storm(kit: Kit, place: Place, seconds: float) -> dict[str, Any]:
    dice, limit = random.Random(7), kit.memory(8 * GIB, 4 * GIB)
    rounds = max(2, int(200e3 / kit.calibrate()[0]))
    victims_at_once = int(kit.pick(6, 2))
    with place.groups([Spec(400, memory=limit, processes=1 + victims_at_once), Spec(300, memory=limit)]) as [slice_, other]:
        workers = kit.ready([slice_, other])
        signs: dict[int, Signs] = {}

        def let_go(worker: Worker) -> None:
            signs[worker.pid] = Signs(kit.folder / f"signs-{worker.pid}")
            worker.send("storm", sign=str(signs[worker.pid].path), seed=worker.pid, seconds=seconds + 30, most=limit // 16, rounds=rounds)

        for worker in workers:
            let_go(worker)
        bystander, neighbour = slice_.workers[0], other.workers[0]
        alive_now, states, kills = list(slice_.workers[1:]), {}, 0
        end, number = time.monotonic() + seconds, 100
        while time.monotonic() < end:
            time.sleep(dice.uniform(0.05, 0.4))
            victim = alive_now.pop(dice.randrange(len(alive_now)))
            state = signs[victim.pid].read()[1]
            victim.kill()
            kills += 1
            states[state] = states.get(state, 0) + 1
            number += 1
            fresh = kit.hub.more(slice_, number)
            fresh.send("init")  # nobody waits for it: some die while they make their context
            fresh.send("load")
            let_go(fresh)
            alive_now.append(fresh)
        lived = {name: signs[worker.pid].read() for name, worker in (("bystander", bystander), ("neighbour", neighbour))}
        stalled = {name: max(sign[3], time.monotonic_ns() - sign[2]) / 1e6 for name, sign in lived.items()}
        for worker in [bystander, *alive_now]:
            worker.kill()
        refill = _refill(kit, slice_, limit)
    return {
        "seconds": round(seconds, 1),
        "kills": kills,
        "killed_while": states,
        "bystander_done": lived["bystander"][0],
        "neighbour_done": lived["neighbour"][0],
        "bystander_longest_ms": round(stalled["bystander"], 1),
        "neighbour_longest_ms": round(stalled["neighbour"], 1),
        "refill_percent": refill,
    }


def _refill(kit: Kit, group: Group, limit: int) -> float:
    """Return how much of the slice one fresh process can allocate once all others of it are dead, percent."""
    fresh = kit.hub.more(group, 999)
    fresh.ask("init", 60)
    block = limit // 64
    got = 0
    for _ in range(20):
        got += fresh.ask("alloc", 30, size=block, count=64 - got)["done"]
        if got >= 56:
            break
        time.sleep(0.1)
    return round(got / 64 * 100, 1)


# ---- who evades


def evasion(kit: Kit) -> dict[str, Any]:
    """How long until the agent says that a program in a slice that shed the limiter holds memory there."""
    place = kit.place("nbgpu")
    if not isinstance(place, Nbgpu):
        raise Skip("there is no agent here to notice it")
    last = max((event.id for event in place.agent.events()), default=0)
    with place.groups([Spec(200, memory=2 * GIB)], "--shed") as [group]:
        # The leader shed the limiter before it started the worker.
        [worker] = group.workers
        worker.ask("init", 60)
        begun = time.monotonic()
        got = worker.ask("alloc", size=3 * GIB)["code"]
        seen: list[dict[str, Any]] = []
        while time.monotonic() - begun < 8 and not seen:
            for event in place.agent.events(last, 1):
                last = max(last, event.id)
                if event.kind not in ("refused",):
                    seen.append({"kind": event.kind, "message": event.message, "seconds": round(time.monotonic() - begun, 2)})
    found = {"allocated_beyond_its_slice": got == 0, "events": seen}
    kit.fact(
        "evasion-detected",
        "holds" if seen and seen[0]["seconds"] <= 2.5 else "differs",
        f"{seen[0]['seconds']} s: {seen[0]['message']}" if seen else "no event within 8 s",
    )
    return found


# ---- how late NVML is


def nvml_delays(kit: Kit) -> dict[str, Any]:
    """How long until NVML shows an allocation, how old its utilisation samples are, how near they are to the truth."""
    found: dict[str, Any] = {}
    nvml = kit.nvml
    rounds, device = max(1, int(1e6 / kit.calibrate()[0])), nvml.memory()[0]
    with kit.place("driver alone").groups([Spec(1000)]) as groups:
        [worker] = kit.ready(groups)
        delays, asks = [], []
        for _ in range(5):
            before = kit.held([worker.pid], device)
            at = worker.ask("alloc", size=256 * MIB)["at"]
            while kit.held([worker.pid], device) <= before and time.monotonic_ns() - at < 3e9:
                pass
            delays.append((time.monotonic_ns() - at) / 1e6)
            begun = time.monotonic()
            nvml.processes()
            asks.append((time.monotonic() - begun) * 1e3)
            worker.ask("free")
        found["allocation_seen_ms"], found["asking_ms"] = {"median": median(delays), "worst": max(delays)}, median(asks)
        seconds = kit.pick(4.0, 1.5)
        start = time.monotonic_ns() + 100_000_000
        since = int(time.time() * 1e6)
        worker.send("busy", start=start, end=start + int(seconds * 1e9), rounds=rounds, blocks=kit.blocks, batch=4)
        seen: dict[int, tuple[float, int]] = {}
        stop = time.monotonic() + seconds
        while time.monotonic() < stop:
            now = time.time() * 1e6
            for sample in nvml.samples(since):
                if sample.pid == worker.pid and sample.us not in seen:
                    seen[sample.us] = ((now - sample.us) / 1e3, sample.percent)
            time.sleep(0.02)
        worker.receive(60)
    times = sorted(seen)
    spacing = [(b - a) / 1e3 for a, b in pairwise(times)]
    ages = [age for age, _ in seen.values()]
    percents = [percent for _, percent in list(seen.values())[2:]]
    found["utilisation"] = {
        "samples": len(seen),
        "spacing_ms": median(spacing),
        "age_when_first_seen_ms": {"median": median(ages), "p90": percentile(ages, 0.9)},
        "percent_while_all_busy": {"median": median(percents), "least": min(percents, default=None)},
    }
    found["new_processes"] = _samples_of_new_processes(kit)
    late, age = max(delays), median(ages)
    kit.fact(
        "nvml-memory-delay",
        "holds" if late < 50 else "differs",
        f"median {median(delays):.1f} ms, worst {late:.1f} ms; one question takes {median(asks):.2f} ms",
    )
    kit.fact(
        "nvml-utilisation",
        "unknown" if age is None else "holds" if age <= 1500 else "differs",
        "no samples of this process"
        if age is None
        else f"a new sample each {median(spacing) or 0:.0f} ms, {age:.0f} ms old when first seen; "
        f"says {median(percents)} % of a process that is always busy",
    )
    return found


def _samples_of_new_processes(kit: Kit) -> dict[str, Any]:
    """Every answer that NVML gives while two processes come and compute, asked as the agent does, once a second, since the last stamp."""
    nvml, rounds, looks = kit.nvml, max(1, int(1e6 / kit.calibrate()[0])), []
    since, begun = int(time.time() * 1e6), time.monotonic()
    steps: list[tuple[float, str]] = []

    def look(seconds: float) -> None:
        nonlocal since
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(max(0.0, min(1.0, until - time.monotonic())))
            samples = nvml.samples(since)
            now = int(time.time() * 1e6)
            looks.append(
                {
                    "at": round(time.monotonic() - begun, 3),
                    "since_ms_ago": (now - since) // 1000,
                    "samples": [(sample.pid, (now - sample.us) // 1000, sample.percent) for sample in samples],
                }
            )
            since = max([since, *(sample.us for sample in samples)])

    def step(name: str) -> None:
        steps.append((round(time.monotonic() - begun, 3), name))

    pause = kit.pick(1.3, 0.3)
    with kit.place("driver alone").groups([Spec(1000), Spec(1000)]) as groups:
        look(2 * pause)
        step("contexts")
        workers = kit.ready(groups)
        step("ready")
        look(pause)
        for who in (workers[:1], workers):
            start = time.monotonic_ns() + 50_000_000
            step(f"{len(who)} busy for {2 * pause} s")
            for worker in who:
                worker.send("busy", start=start, end=start + int(2 * pause * 1e9), rounds=rounds, blocks=kit.blocks, batch=4)
            look(2 * pause)
            for worker in who:
                worker.receive(60)
            look(pause)
    return {"pids": [worker.pid for worker in workers], "steps": steps, "pid_age_ms_percent": looks}
