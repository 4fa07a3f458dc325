"""The two files through which the agent and a slice's processes speak: `ctl` and `use`.

This module is the one description. ``python -m nbgpu_agent.layout`` prints the C header made from it
(``nodeagent/limiter/nbgpu_layout.h``); a test fails when the committed header differs.

* ``ctl``: written by the agent, mapped read-only by the slice. Limits, weights, gates, heartbeat.
* ``use``: written by the slice's processes, read by the agent with ``pread`` and distrust.

The gate. A process reads `ctl.device[d].gate` before it submits work to device `d`: ``GATE_NONE``: no turns here; submit, ring nothing.
``GATE_OPEN``: submit. ``GATE_CLOSED``: say `want`, wait. ``GATE_SUSPENDED``: wait like closed; the slice's memory is being taken away or
given back. `turn_end_ns` is 0 only at an open gate that nobody else wants; behind a closed gate it is a moment that has passed.

Little-endian, 64-byte lines; what different writers touch shares no line. Offsets are only ever appended:
`VERSION` rises when a field is added, and readers refuse a file with another `MAGIC`.

Memory that several processes hold (IPC, shareable handles)
-----------------------------------------------------------
Who makes memory pays for it in `used`, and where it hands the memory out it says so: ``covered`` with the memory's `key`. Who opens it says
``held`` with the same key. A slice's sum counts `held` unless a live slot of the slice covers that key, or an earlier one holds it: once,
as long as one process of the slice keeps the memory alive, whether its maker lives, has freed it, died, or was never of this slice.
A reader adds up all `used` first and looks at `held` afterwards; a writer takes `covered` away before it lowers `used`.

A kernel whose memory is on the host
------------------------------------
``Ctl.away[slot]`` says it of the process that owns a slot, by its owner's word, so that it never means the next one. The word itself: its
memory is on the host and counts nothing; the word's complement (`~owner`): it is on its way there or back and counts. Either way the
process waits before its next allocation or launch, and says in ``slot.wants_back`` how many threads do: not in `want`, which would ask for
turns. The word is set to "on the host" only after the memory was given back, and to its complement before the sum is looked at that says
whether it may come back. Whoever knows nothing of `away` counts the slot: never too much is given.

What `Use.want`, `near` and `idle` mean
---------------------------------------
A slice may be many processes; the three words of a device sum up its live slots. They are a function of the slots, written by whichever
process of the slice changed its own slot, which writes, looks at all slots again and corrects: the last word is always right.
The scheduler only reads, and decides by the slots themselves; any change of `bell` tells it that something happened in between.

* ``slot.want``: threads of this process that wait at the gate now. ``want[d] = 1``: some slot's is above 0.
* ``slot.busy_since``: not 0 while launches of this process are outstanding. ``slot.near = 1``: the gate is closed (or `turn_end_ns` has
  passed) and what is outstanding takes less than 0.5 ms. ``near[d] = 1``: every slot is near or has nothing outstanding.
* ``idle[d] = 1``: no slot has anything outstanding and none waits. A process says so 0.1 ms after its queue ran empty, so that a loop of
  launch and synchronize is one busy stretch. A thread that passes the gate marks its slot busy before it stops wanting: between
  the grant and the first launch a slice that wanted is never idle.
* The bell is raised by one with each word that turns to 1, and woken (``FUTEX_WAKE``, shared) too: for ``want`` always, for ``near`` and
  ``idle`` only while ``turn_end_ns`` is not 0: a slice alone on its device (`GATE_OPEN`, `turn_end_ns` 0) causes no wake-ups.
* The file starts as zeros: ``idle[d]`` is 0 until the first work on a device is done. Who wants nothing and has no busy slot has nothing
  outstanding, whatever the words say. A process that died leaves its slot's words behind until it is reaped (`owner` back to 0).
* Waiting threads wait on ``CtlDevice.gate`` (futex, at most 20 ms a time) and on ``CtlKernel.gate[d]`` where their kernel has an entry with
  `compute_milli` not 0 (or whose gate is `GATE_SUSPENDED`); all others on ``CtlDevice.rest_gate`` while `kernels_limited` is not 0.
  At a gate of kernels that is not `GATE_NONE` a process rings for ``near`` and ``idle`` too, whatever ``turn_end_ns`` is. The scheduler
  wakes the gate's address after it changed the word. When ``heartbeat_ns`` is older than 0.5 s gates are not obeyed: strict slices and
  limited kernels keep to their shares by themselves, all others run free.
"""

from __future__ import annotations

import ctypes as c
from typing import Any

VERSION = 3
CTL_MAGIC = 0x314C5443_5047424E  # "NBGPCTL1"
USE_MAGIC = 0x31455355_5047424E  # "NBGPUSE1"
DEVICES = 16
KERNELS = 64
SLOTS = 256
SHARES = 16
UUID_BYTES = 48
KERNEL_ID_BYTES = 40

MODE_STRICT, MODE_BURST = 0, 1
GATE_CLOSED, GATE_OPEN, GATE_SUSPENDED, GATE_NONE = 0, 1, 2, 3
REFUSED_NONE, REFUSED_SLICE, REFUSED_KERNEL, REFUSED_DRIVER = 0, 1, 2, 3

CONSTANTS: dict[str, tuple[str, ...]] = {
    "": ("VERSION", "CTL_MAGIC", "USE_MAGIC", "DEVICES", "KERNELS", "SLOTS", "SHARES", "UUID_BYTES", "KERNEL_ID_BYTES"),
    "mode of a slice": ("MODE_STRICT", "MODE_BURST"),
    "gate words": ("GATE_CLOSED", "GATE_OPEN", "GATE_SUSPENDED", "GATE_NONE"),
    "whose limit refused": ("REFUSED_NONE", "REFUSED_SLICE", "REFUSED_KERNEL", "REFUSED_DRIVER"),
}


class CtlDevice(c.LittleEndianStructure):
    """Limits of the slice on one of its devices; `uuid` empty = entry not in use. 192 bytes, gate on a line of its own."""

    _fields_ = [
        ("uuid", c.c_char * UUID_BYTES),  # as NVML writes it: "GPU-…"
        ("mem_limit", c.c_uint64),  # bytes
        ("compute_milli", c.c_uint32),  # share, 1000 = the whole device
        ("mode", c.c_uint32),
        ("context_bytes", c.c_uint64),  # what the probe measured a bare context to cost
        ("overhead_cap", c.c_uint64),  # most that overhead[] may say for one slot
        ("turn_end_ns", c.c_uint64),  # CLOCK_MONOTONIC at which the open turn is meant to end; 0 = no end, nobody waits
        ("compute_used_milli", c.c_uint32),  # of the whole device, over the last second: what NVML's utilisation in the slice is made of
        ("reserved0", c.c_uint8 * 36),
        ("gate", c.c_uint32),  # futex: GATE_*
        ("gate_generation", c.c_uint32),  # rises each time the gate word changes
        ("rest_gate", c.c_uint32),  # futex: GATE_* of the kernels without a limit of compute, while another has one (Ctl.kernels_limited)
        ("reserved1", c.c_uint8 * 52),
    ]


class CtlKernel(c.LittleEndianStructure):
    """Limits of one kernel on each of the slice's devices; `id` empty = entry not in use. 128 bytes."""

    _fields_ = [
        ("id", c.c_char * KERNEL_ID_BYTES),
        ("mem_limit", c.c_uint64),  # bytes; 0 = the slice's own
        ("compute_milli", c.c_uint32),  # of the whole device; 0 = the slice's own
        ("reserved0", c.c_uint32),
        ("reserved1", c.c_uint8 * 8),
        ("gate", c.c_uint32 * DEVICES),  # futex: GATE_* per device
    ]


class Ctl(c.LittleEndianStructure):
    """The whole `ctl` file."""

    _fields_ = [
        ("magic", c.c_uint64),
        ("version", c.c_uint32),
        ("size", c.c_uint32),  # of the file
        ("generation", c.c_uint64),  # rises after each change of limits
        ("heartbeat_ns", c.c_uint64),  # CLOCK_MONOTONIC of the scheduler's last sign of life
        ("reserved1", c.c_uint32),
        ("kernels_limited", c.c_uint32),  # how many kernels have a limit of compute; not 0: the others obey rest_gate
        ("kernels_away", c.c_uint32),  # not 0: some word of away[] is set
        ("reserved0", c.c_uint8 * 20),
        ("device", CtlDevice * DEVICES),
        ("kernel", CtlKernel * KERNELS),
        ("overhead", c.c_uint64 * SLOTS),  # bytes NVML sees of a slot's process beyond what is tracked, granted
        ("away", c.c_uint64 * SLOTS),  # owner: its memory is on the host; ~owner: on its way there or back
    ]


class UseSlot(c.LittleEndianStructure):
    """One process on one device. Only `owner` is ever written by two processes, and only by compare-and-swap. 256 bytes."""

    _fields_ = [
        # identity: written once, before `ready`
        ("owner", c.c_uint64),  # 0 = free; else pid << 32 | a nonce (never 0)
        ("start_time", c.c_uint64),  # field 22 of /proc/<pid>/stat, clock ticks
        ("device", c.c_uint32),  # index into Ctl.device
        ("ready", c.c_uint32),
        ("kernel_id", c.c_char * KERNEL_ID_BYTES),  # empty: no kernel
        # memory: bytes
        ("used", c.c_uint64),
        ("context", c.c_uint64),
        ("peak", c.c_uint64),
        ("allocs", c.c_uint64),
        ("frees", c.c_uint64),
        ("refusals", c.c_uint64),
        ("refused_bytes", c.c_uint64),  # size of the last request refused
        ("refused_by", c.c_uint32),  # REFUSED_*
        ("shares", c.c_uint32),  # entries of Use.share that this slot uses, counted from its first
        # compute
        ("want", c.c_uint32),  # threads that wait at the gate
        ("near", c.c_uint32),  # 1: what was submitted is nearly done
        ("busy_since", c.c_uint64),  # CLOCK_MONOTONIC ns; 0 = idle
        ("busy_ns", c.c_uint64),  # GPU time of finished busy intervals
        ("launches", c.c_uint64),  # by threads without a word of their own; all launches: launches + sum(launches_by_thread)
        (
            "last_launch_ns",
            c.c_uint64,
        ),  # CLOCK_MONOTONIC, within 10 ms; ungated (GATE_NONE) at each thread's 64th launch and each synchronize
        ("stall_ns", c.c_uint64),  # waited at the gate, all threads together
        ("copied_bytes", c.c_uint64),  # host <-> device
        ("wants_back", c.c_uint32),  # threads that wait for memory that is on the host
        ("reserved1", c.c_uint32),
        ("launches_by_thread", c.c_uint64 * 8),  # each written by one thread at a time, without atomic operations
    ]


class UseShare(c.LittleEndianStructure):
    """Memory that a process shares with another: handed out, or opened from another. 32 bytes."""

    _fields_ = [
        ("key", c.c_uint64),  # names the memory; 0: nothing is known of it
        ("held", c.c_uint64),  # bytes opened from another; count when nobody else of the slice pays for this key
        ("covered", c.c_uint64),  # bytes handed out, which the slot's `used` contains
        ("reserved0", c.c_uint64),
    ]


class Use(c.LittleEndianStructure):
    """The whole `use` file. A process holds a POSIX record lock on the first byte of each slot that it owns."""

    _fields_ = [
        ("magic", c.c_uint64),
        ("version", c.c_uint32),
        ("size", c.c_uint32),
        ("high_water", c.c_uint32),  # slots at and above this one were never taken
        ("events", c.c_uint32),  # rises with each refusal
        ("reserved0", c.c_uint8 * 40),
        ("bell", c.c_uint32),  # futex: rung on want, near and idle
        ("reserved1", c.c_uint8 * 60),
        ("want", c.c_uint32 * DEVICES),  # per device of the slice: somebody waits at the gate
        ("near", c.c_uint32 * DEVICES),  # per device: all that was submitted is nearly done
        ("idle", c.c_uint32 * DEVICES),  # per device: nothing is outstanding
        ("slot", UseSlot * SLOTS),
        ("share", UseShare * (SLOTS * SHARES)),  # SHARES for each slot
    ]


STRUCTURES: tuple[type[c.LittleEndianStructure], ...] = (CtlDevice, CtlKernel, Ctl, UseSlot, UseShare, Use)
CTL_SIZE = c.sizeof(Ctl)
USE_SIZE = c.sizeof(Use)
_C_TYPES: dict[Any, str] = {c.c_uint8: "uint8_t", c.c_uint32: "uint32_t", c.c_uint64: "uint64_t", c.c_char: "char"}


def _field(name: str, kind: Any) -> str:
    if issubclass(kind, c.Array):
        return f"{_name(kind._type_)} {name}[{kind._length_}];"
    return f"{_name(kind)} {name};"


def _name(kind: Any) -> str:
    return _C_TYPES.get(kind) or f"Nbgpu{kind.__name__}"


def c_header() -> str:
    """Return the C header: the same constants and structures, with the offsets asserted."""
    out = [
        "/* Made by `python -m nbgpu_agent.layout` from nodeagent/nbgpu_agent/layout.py: change that file, not this one. */",
        "#ifndef NBGPU_LAYOUT_H",
        "#define NBGPU_LAYOUT_H",
        "#include <stddef.h>",
        "#include <stdint.h>",
        "",
    ]
    for comment, names in CONSTANTS.items():
        if comment:
            out.append(f"/* {comment} */")
        for name in names:
            value = globals()[name]
            out.append(f"#define NBGPU_{name} " + (f"0x{value:016x}ull" if name.endswith("MAGIC") else f"{value}u"))
    for structure in STRUCTURES:
        name = _name(structure)
        fields: list[Any] = list(structure._fields_)
        out += ["", "typedef struct {"]
        out += [f"    {_field(field, kind)}" for field, kind in fields]
        out += [f"}} {name};", f'_Static_assert(sizeof({name}) == {c.sizeof(structure)}, "size of {name}");']
        out += [
            f'_Static_assert(offsetof({name}, {field}) == {getattr(structure, field).offset}, "{name}.{field}");' for field, _ in fields
        ]
    out += ["", "#endif", ""]
    return "\n".join(out)


if __name__ == "__main__":
    print(c_header(), end="")
