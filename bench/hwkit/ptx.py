"""The GPU kernels of the hardware kit, as PTX that the driver compiles: no CUDA toolkit is needed.

The names carry what the simulated driver goes by (`nodeagent/simgpu/README.md`): there a kernel whose name ends in ``_arg_ns`` takes
as many ns as its first parameter says, and nothing is executed.

* ``work_arg_ns(rounds)``: every thread does that many rounds of dependent arithmetic. It counts work, not time: a kernel that spun until
  a clock has passed would also "work" while another process has the GPU. How long a round takes is measured first (``calibrate``).
* ``gaps_arg_ns(ns, out, room, least)``: spins for that long by the GPU's own clock and writes when it was not running: each time two
  readings are more than `least` ns apart, both go to ``out[2 + 2 n]``; ``out[0]`` is how many there were, ``out[1]`` the first reading,
  the last one is behind them. Only the first thread writes; the others spin.
* ``nothing()``: ends at once.
"""

from __future__ import annotations

TARGETS = (("6.4", "sm_70"), ("7.0", "sm_75"), ("7.8", "sm_90"), ("8.7", "sm_100"))
"""(ISA version, target), oldest first: the first that the driver takes is used. PTX for an old target runs on every newer GPU."""

_BODY = """
.version {version}
.target {target}
.address_size 64

.global .align 8 .u64 sink;

.visible .entry work_arg_ns(.param .u64 rounds)
{{
    .reg .pred %p<3>;
    .reg .b32 %t;
    .reg .b64 %i, %n, %x, %a;
    ld.param.u64 %n, [rounds];
    mov.u32 %t, %tid.x;
    cvt.u64.u32 %x, %t;
    mov.u64 %i, 0;
    setp.ge.u64 %p1, %i, %n;
    @%p1 bra WORK_DONE;
WORK:
    mad.lo.u64 %x, %x, 6364136223846793005, 1442695040888963407;
    add.u64 %i, %i, 1;
    setp.lt.u64 %p1, %i, %n;
    @%p1 bra WORK;
WORK_DONE:
    setp.eq.u64 %p2, %x, 7;
    mov.u64 %a, sink;
    @%p2 st.global.u64 [%a], %x;
    ret;
}}

.visible .entry gaps_arg_ns(.param .u64 ns, .param .u64 out, .param .u64 room, .param .u64 least)
{{
    .reg .pred %p<6>;
    .reg .b32 %t, %b;
    .reg .b64 %ns, %out, %room, %least, %first, %last, %now, %d, %n, %at, %spent;
    ld.param.u64 %ns, [ns];
    ld.param.u64 %out, [out];
    ld.param.u64 %room, [room];
    ld.param.u64 %least, [least];
    cvta.to.global.u64 %out, %out;
    mov.u32 %t, %tid.x;
    mov.u32 %b, %ctaid.x;
    or.b32 %t, %t, %b;
    setp.ne.u32 %p1, %t, 0;
    mov.u64 %n, 0;
    add.u64 %at, %out, 16;
    mov.u64 %first, %globaltimer;
    mov.u64 %last, %first;
SPIN:
    mov.u64 %now, %globaltimer;
    sub.u64 %d, %now, %last;
    setp.le.u64 %p2, %d, %least;
    @%p2 bra NEXT;
    @%p1 bra NEXT;
    setp.ge.u64 %p3, %n, %room;
    @%p3 bra NEXT;
    st.global.u64 [%at], %last;
    st.global.u64 [%at+8], %now;
    add.u64 %at, %at, 16;
    add.u64 %n, %n, 1;
NEXT:
    mov.u64 %last, %now;
    sub.u64 %spent, %now, %first;
    setp.lt.u64 %p4, %spent, %ns;
    @%p4 bra SPIN;
    @%p1 bra SPUN;
    st.global.u64 [%out], %n;
    st.global.u64 [%out+8], %first;
    st.global.u64 [%at], %last;
SPUN:
    ret;
}}

.visible .entry nothing()
{{
    ret;
}}
"""


def text(version: str, target: str) -> bytes:
    """Return the module for one target, ended by a zero as the driver wants it."""
    return _BODY.format(version=version, target=target).lstrip().encode() + b"\0"
