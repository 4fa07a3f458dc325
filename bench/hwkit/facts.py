"""What nbgpu's design takes for granted of drivers and hardware, and where: each is measured, or said not to have been.

Sources name the design's pages (limiter, architecture, security) with their chapter; [?] marks what the design itself calls unconfirmed,
[S] what only a simulation has said.
"""

from __future__ import annotations

FACTS: dict[str, tuple[str, str, str]] = {
    # name: (section that measures it, where it is claimed, what is claimed)
    "nvml-pids": ("machine", "limiter 7", "NVML names processes by the pids that the agent sees"),
    "memory-limits-r615": (
        "machine",
        "limiter 5, security",
        "drivers from 615 on limit memory per cgroup, older ones say Not Supported: by that the agent chooses (nothing is set here)",
    ),
    "proc-address": (
        "resolution",
        "limiter 3 [?]",
        "the real cuGetProcAddress returns the exported address of every function that the limiter stands in for",
    ),
    "resolution-escapes": ("resolution", "limiter 3", "no request for a function that the limiter stands in for passes by it"),
    "context-cost": ("contexts", "limiter 5", "a bare context costs about the same in each process: it is measured once"),
    "overhead-cap": ("contexts", "limiter 5, security 4", "what NVML sees of a process beyond context and allocations stays below the cap"),
    "driver-slice": ("driver-time", "limiter 6 [S]", "the driver's time slice between processes is about 2 ms"),
    "driver-switch": ("driver-time", "limiter 6 [S]", "a switch between processes costs about 0.1 ms"),
    "events-lie": ("driver-time", "limiter 6", "beside another process, events tell wall time: the other's slices are in it"),
    "queue-depth": ("driver-time", "limiter 6", "the driver's queue is 1,024 launches deep"),
    "slice-view": ("view", "limiter 3", "a program in a slice sees one GPU of the slice's size"),
    "refusals": ("view", "limiter 1, 3", "every kind of allocation beyond the limit is refused with CUDA_ERROR_OUT_OF_MEMORY"),
    "filled-slice": ("view", "architecture, invariant 2", "a full slice holds no more than its limit, by NVML"),
    "usage-agrees": ("view", "architecture, usage", "the memory that the agent says a slice uses is what NVML says"),
    "no-overshoot": ("races", "limiter 5", "processes of a slice that allocate at once never hold more than its limit, by NVML"),
    "shares": ("shares", "limiter 6 [S]", "slices get their shares within 3 points in 1-s windows"),
    "turns-lose-less": ("shares", "limiter 6 [S]", "turns lose no more of the GPU than the driver's own time slices do"),
    "lock-after-kill": ("death", "limiter 4", "a record lock is free within 1 ms of SIGKILL"),
    "teardown-lag": ("death", "limiter 5, 9", "the memory of the dead is free at most 500 ms after its process is gone"),
    "kill-in-kernel": ("death", "limiter 6", "a killed process's GPU kernel does not go on holding the device"),
    "checkpoint-lock": (
        "checkpoint",
        "limiter 7 [?]",
        "cuCheckpointProcessLock by a process without a context stops one that uses the GPU; unlocked it goes on",
    ),
    "checkpoint-frees": ("checkpoint", "limiter 8", "a checkpoint gives a process's GPU memory back, and a restore brings it back"),
    "checkpoint-nvml": ("parking", "limiter 8", "NVML shows 0 for a checkpointed process"),
    "checkpoint-same": ("parking", "idle", "what a restore brings back is what was there"),
    "checkpoint-speed": ("parking", "idle", "a checkpoint and a restore move 0.1 GB/s at least: the agent takes slower ones for a hang"),
    "checkpoint-caller-killed": (
        "parking",
        "idle",
        "who asks for a checkpoint or a restore may be killed in it: the next one brings the process back as it was",
    ),
    "checkpoint-killed": ("parking", "idle", "a process that is killed while checkpointed holds no GPU memory afterwards"),
    "framework-pytorch": ("frameworks", "limiter 3", "PyTorch works in a slice and gets its own out-of-memory error at the limit"),
    "framework-cupy": ("frameworks", "limiter 3", "CuPy works in a slice and gets its own out-of-memory error at the limit"),
    "framework-jax": ("frameworks", "limiter 3", "JAX works in a slice and gets its own out-of-memory error at the limit"),
    "framework-numba": ("frameworks", "limiter 3", "Numba works in a slice and gets its own out-of-memory error at the limit"),
    "kills-block-nobody": ("storm", "architecture, invariant 3", "a SIGKILL blocks nobody and loses nobody's accounting"),
    "launch-cost": ("cost", "README, figures", "a launch in a slice costs 30 ns more at most"),
    "evasion-detected": ("evasion", "security", "a program that evades the limiter is detected within 2 s"),
    "nvml-memory-delay": ("nvml", "limiter 7", "NVML shows an allocation at once"),
    "nvml-utilisation": ("nvml", "limiter 6", "NVML's utilisation samples are 1/6 to 1 s old"),
}
