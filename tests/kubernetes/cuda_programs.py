"""Programs for containers that use the GPU through nothing but `libcuda.so.1`, by ctypes: any Python in any image runs them."""

from __future__ import annotations

CUDA = """
import ctypes, json, os, sys, time
cu = ctypes.CDLL("libcuda.so.1")
def ok(status):
    assert status == 0, status
ok(cu.cuInit(0))
def context(index):
    device, made = ctypes.c_int(), ctypes.c_void_p()
    ok(cu.cuDeviceGet(ctypes.byref(device), index))
    ok(cu.cuDevicePrimaryCtxRetain(ctypes.byref(made), device))
    ok(cu.cuCtxSetCurrent(made))
def count():
    number = ctypes.c_int()
    ok(cu.cuDeviceGetCount(ctypes.byref(number)))
    return number.value
def info():
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    ok(cu.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)))
    return free.value, total.value
def take(size):
    where = ctypes.c_uint64()
    return cu.cuMemAlloc_v2(ctypes.byref(where), ctypes.c_size_t(size))
"""

LOOK = (
    CUDA
    + """
context(0)
free, total = info()
print(json.dumps({"count": count(), "free": free, "total": total}))
"""
)
"""Prints what the program is told of its first GPU."""

FILL = (
    CUDA
    + """
context(0)
free, total = info()
first = take(free - (64 << 20))
beyond = take(256 << 20)
print(json.dumps({"total": total, "first": first, "beyond": beyond}), flush=True)
time.sleep(1)
"""
)
"""Takes nearly all, then too much: 0 and 2 (out of memory) with the limiter; 0 and 0 without. Stays until the agent has seen it."""

HOLD = (
    CUDA
    + """
context(0)
ok(take(int(os.environ.get("HOLD_MIB", "1024")) << 20))
print("holding", flush=True)
tries = refused = 0
while True:
    tries += 1
    refused += take(1 << 40) == 2
    with open("/tmp/state.new", "w") as file:
        json.dump({"tries": tries, "refused": refused, "total": info()[1]}, file)
    os.rename("/tmp/state.new", "/tmp/state")
    time.sleep(0.1)
"""
)
"""Holds memory and goes on asking for more than there can be; /tmp/state says how often it was refused, and its limit."""
