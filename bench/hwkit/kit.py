"""What the sections share: time, places, the device, facts, and the report that is written after each of them."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from . import LIB, MIB
from .facts import FACTS
from .hub import Group, Hub, Worker
from .nvml import Nvml
from .places import Bare, Hami, Nbgpu, Place, Spec, Stock, clean, default_usable, missing_packages

Verdict = Literal["holds", "differs", "unknown", "skipped"]


class Skip(Exception):
    """A section cannot run here; the text says why."""


class TimeOver(BaseException):
    """A section used up its time; nothing that takes an error for an answer may catch it."""


@dataclass(frozen=True)
class Section:
    """A part of the kit: a name, what it is for, how many seconds it may take on hardware, what it does."""

    name: str
    title: str
    seconds: float
    run: Callable[[Kit], dict[str, Any]]


@dataclass
class Kit:
    """One run."""

    folder: Path
    device: int
    simulated: bool
    hami: Path | None
    out: Path
    budget: float
    env: dict[str, str] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: list[dict[str, Any]] = field(default_factory=list)
    comparison: list[dict[str, Any]] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    end: float = 0.0
    nbgpu_how: str = ""
    compared: tuple[str, ...] = ("nbgpu", "driver alone")

    def __post_init__(self) -> None:
        self.hub = Hub(self.folder)
        self._nvml: Nvml | None = None
        self._places: dict[str, Place] = {}
        self._why_not: dict[str, str] = {}
        self.env = clean(dict(os.environ))
        if self.simulated:
            state = str(self.folder / "machine")
            ours = {"NBGPU_SIM_STATE": state, "NBGPU_SIM_DEVICES": "1", "NBGPU_HW_NVML": str(LIB / "sim" / "libnvidia-ml.so.1")}
            library_path = os.pathsep.join([str(LIB / "sim"), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
            self.env |= {**ours, "LD_LIBRARY_PATH": library_path}
            os.environ.update(ours)
        else:
            self.env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"

    # ---- the device

    @property
    def nvml(self) -> Nvml:
        """NVML, opened at the first use."""
        if self._nvml is None:
            library = str(LIB / "sim" / "libnvidia-ml.so.1") if self.simulated else "libnvidia-ml.so.1"
            try:
                self._nvml = Nvml(self.device, library)
            except OSError as error:
                raise Skip(f"no NVIDIA driver on this machine ({error})") from None
        return self._nvml

    @property
    def blocks(self) -> int:
        """A grid that fills the device once."""
        return int(self.machine.get("processors") or 1)

    @property
    def total(self) -> int:
        """Bytes of the device."""
        return self.nvml.memory()[1]

    def held(self, pids: Sequence[int], before: int) -> int:
        """Return the bytes that some processes hold by NVML.

        Parameters
        ----------
        pids : sequence of int
            The processes.
        before : int
            What the whole device held before they came: where NVML knows processes by other pids than ours, all beyond it is theirs.
        """
        if self.machine.get("pids_agree"):
            by_pid = self.nvml.processes()
            return sum(by_pid.get(pid, 0) for pid in pids)
        return max(0, self.nvml.memory()[0] - before)

    def memory(self, hardware: int, simulated: int) -> int:
        """Return a size in bytes: one for hardware, one for the simulated driver, on small devices a quarter of what they have."""
        return min(hardware if not self.simulated else simulated, self.total // 4 // (2 * MIB) * (2 * MIB))

    def calibrate(self) -> tuple[float, float]:
        """Return ns per round of work on a full grid and on one block, measured at the first use."""
        if "ns_per_round" not in self.machine:
            with self.place("driver alone").groups([Spec(1000)]) as groups:
                [worker] = self.ready(groups)
                for name, blocks in (("ns_per_round", self.blocks), ("ns_per_round_one_block", 1)):
                    self.machine[name] = worker.ask("calibrate", 60, blocks=blocks)["ns_per_round"]
        return float(self.machine["ns_per_round"]), float(self.machine["ns_per_round_one_block"])

    # ---- time

    def pick(self, hardware: float, simulated: float) -> float:
        """Return a duration or a number: one for hardware, one for the simulated driver."""
        return simulated if self.simulated else hardware

    def left(self) -> float:
        """Return the seconds that the section in progress has left."""
        return self.end - time.monotonic()

    def say(self, text: str) -> None:
        """Print one line of progress, and keep it beside the report."""
        line = f"[{time.monotonic() - self.started:5.0f} s] {text}"
        print(line, flush=True)
        with open(self.out / "hardware.log", "a") as log:
            log.write(line + "\n")

    # ---- places

    def place(self, name: str) -> Place:
        """Return one of the places, started at the first use.

        Raises
        ------
        Skip
            It cannot be had here.
        """
        if name in self._why_not:
            raise Skip(self._why_not[name])
        if name not in self._places:
            try:
                self._places[name] = self._start(name)
            except Skip as error:
                self._why_not[name] = str(error)
                raise
        return self._places[name]

    def places(self) -> list[Place]:
        """Return those of `compared` that can be had here."""
        found: list[Place] = []
        for name in self.compared:
            try:
                found.append(self.place(name))
            except Skip:
                continue
        return found

    def _start(self, name: str) -> Place:
        stock = {**self.env} if self.simulated else {**self.env, "CUDA_VISIBLE_DEVICES": str(self.machine.get("uuid", self.device))}
        if name == "driver alone":
            return Stock(self.hub, stock)
        if name == "HAMi-core":
            if self.hami is None:
                raise Skip("HAMi-core: no library given (--hami-core PATH)")
            return Hami(self.hub, stock, self.hami, self.total)
        return self._start_nbgpu(stock)

    def _start_nbgpu(self, stock: dict[str, str]) -> Place:
        if not (LIB / "libnbgpu.so").is_file():
            raise Skip(f"nbgpu's libraries are not built ({LIB}): run `make setup`, or `python3 bench/hardware.py --prepare`")
        lacking = missing_packages()
        if not lacking:
            runtime = self.folder / "run"
            runtime.mkdir()
            try:
                place: Place = Nbgpu(self.hub, self.env, runtime, self.device, self.simulated)
                self.nbgpu_how = "nbgpu agent, nbgpu pool, every program by nbgpu run"
                return place
            except Exception as error:
                why = str(error)
            except TimeOver:
                why = "it did not start in time"
        else:
            why = f"not installed here: {', '.join(lacking)}"
        self.nbgpu_how = f"the limiter and the scheduler on slice files of the kit's own, without an agent ({why})"
        self.say(f"nbgpu without an agent: {why}")
        usable = default_usable(self.total)
        return Bare(self.hub, stock, self.folder, self.nvml.text("nvmlDeviceGetUUID"), usable, int(self.machine.get("context_bytes") or 0))

    # ---- workers

    def ready(self, groups: Sequence[Group], *, load: bool = True) -> list[Worker]:
        """Let all workers of some groups make their contexts at once; return them in order."""
        workers = [worker for group in groups for worker in group.workers]
        for worker in workers:
            worker.send("init")
        for worker in workers:
            worker.receive(60)
        if load:
            for worker in workers:
                worker.send("load")
            for worker in workers:
                worker.receive(60)
        return workers

    # ---- the report

    def fact(self, name: str, verdict: Verdict, measured: str, **detail: Any) -> None:
        """Write down whether something that the design takes for granted (`facts.FACTS`) is so."""
        _, source, claim = FACTS[name]
        self.facts.append({"name": name, "source": source, "claim": claim, "verdict": verdict, "measured": measured, "detail": detail})
        self.say(f"  fact {name}: {verdict}: {measured}")

    def compare(self, workload: str, place: str, figures: dict[str, Any]) -> None:
        """Write down one cell of the table that has nbgpu, the driver alone and HAMi-core side by side."""
        row = next((row for row in self.comparison if row["workload"] == workload), None)
        if row is None:
            row = {"workload": workload}
            self.comparison.append(row)
        row[place] = figures

    def kill(self) -> None:
        """End everything without a wait."""
        self.hub.kill_all()
        for place in self._places.values():
            place.kill()

    def close(self) -> None:
        """End everything that was started."""
        self.hub.close()
        for place in self._places.values():
            place.close()
        for log in self.folder.glob("agent.log"):
            shutil.copyfile(log, self.out / "agent.log")


class Alarm:
    """Ends a section that takes too long, wherever it is: raises `TimeOver` in the main thread."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        def ring(*_: object) -> None:
            raise TimeOver

        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, max(0.1, self._seconds))

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
