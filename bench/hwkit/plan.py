"""The sections, in order of worth: what comes first is measured even where the time is short."""

from __future__ import annotations

from typing import Any

from .kit import Kit, Section
from .on_cost import cost
from .on_driver import contexts, driver_time, machine, resolution, start
from .on_frameworks import frameworks, training
from .on_life import checkpoint, death, evasion, nvml_delays, storm
from .on_limits import gpu_shares, races, small_work, view
from .on_parking import parking


def hami_core(kit: Kit) -> dict[str, Any]:
    """The same workloads under HAMi-core, last so that nothing that hangs there costs another section its time."""
    kit.place("HAMi-core")
    found: dict[str, Any] = kit.results.setdefault("hami-core", {})
    before, kit.compared = kit.compared, ("HAMi-core",)
    try:
        for name, run in (("races", races), ("shares", gpu_shares), ("storm", storm), ("small-work", small_work), ("cost", cost)):
            kit.results.pop(name, None)
            try:
                found[name] = run(kit)
            except Exception as error:
                found[name] = {"failed": f"{type(error).__name__}: {error}"}
    finally:
        kit.compared = before
    return found


SECTIONS = (
    Section("machine", "the machine", 60, machine),
    Section("start", "starting nbgpu", 45, start),
    Section("resolution", "how functions are found", 20, resolution),
    Section("contexts", "what contexts and blocks take", 20, contexts),
    Section("driver-time", "how the driver shares time", 25, driver_time),
    Section("view", "what a slice sees and is refused", 20, view),
    Section("races", "races for memory", 45, races),
    Section("shares", "shares of GPU time", 150, gpu_shares),
    Section("death", "what a SIGKILL leaves, and for how long", 35, death),
    Section("checkpoint", "stopping a process with the driver's checkpoint calls", 25, checkpoint),
    Section("parking", "an idle program's GPU memory moved to the host and back", 45, parking),
    Section("frameworks", "PyTorch, CuPy, JAX, Numba", 110, frameworks),
    Section("training", "two PyTorch trainings at once", 85, training),
    Section("storm", "kill storm", 40, storm),
    Section("cost", "what a call costs", 45, cost),
    Section("small-work", "small work beside large", 30, small_work),
    Section("evasion", "a program that evades the limiter", 20, evasion),
    Section("nvml", "how late NVML is", 35, nvml_delays),
    Section("hami-core", "the same work under HAMi-core", 180, hami_core),
)
