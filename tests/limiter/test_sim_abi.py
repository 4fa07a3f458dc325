"""The simulated driver's ABI: every entry point that programs ask for, and the programs themselves, unmodified."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from limiter_kit import BUILDS, needs_numba, sim_driver
from sim_machine import ROOT, Machine, finish

DATA = ROOT / "tests" / "data"


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine(time_scale=5)
    yield made
    made.close()


def requests(name: str) -> list[tuple[str, int, int]]:
    rows = [line.split() for line in (DATA / name).read_text().splitlines()]
    return [(row[0], int(row[1][1:]), int(row[2][1:])) for row in rows if len(row) == 3]


@pytest.mark.parametrize("name", ["cudart12_requests.txt", "cudart13_requests.txt"])
def test_all_that_cudart_asks_for_is_resolved(machine: Machine, name: str) -> None:
    asked = requests(name)
    assert len(asked) > 400
    script = f"""
        asked, missing = {asked!r}, []
        p, status = c.c_void_p(), c.c_int()
        for name, version, flags in asked:
            code = cuda.lib.cuGetProcAddress_v2(name.encode(), c.byref(p), version, c.c_uint64(flags), c.byref(status))
            if code or not p.value or status.value: missing.append((name, version, code))
            code = cuda.lib.cuGetProcAddress(name.encode(), c.byref(p), version, c.c_uint64(2))
            if code or not p.value: missing.append((name, version, "first signature"))
        assert not missing, missing
        """
    machine.run(script)


def test_all_listed_entry_points_are_exported() -> None:
    listed = {text for text in (DATA / "driver_entry_points.txt").read_text().split() if text.startswith("cu")}
    symbols = subprocess.run(["nm", "-D", "--defined-only", str(sim_driver() / "libcuda.so.1")], capture_output=True, text=True, check=True)
    exported = {row.split()[-1] for row in symbols.stdout.splitlines()}
    assert not listed - exported
    assert not {symbol for symbol in exported if not symbol.startswith("cu")}


def test_version_and_flags_choose_the_variant(machine: Machine) -> None:
    machine.run(
        """
        def resolve(name, version, flags=0):
            p, status = c.c_void_p(), c.c_int()
            code = cuda.lib.cuGetProcAddress_v2(name.encode(), c.byref(p), version, c.c_uint64(flags), c.byref(status))
            return p.value, code, status.value
        at = lambda symbol: c.cast(getattr(cuda.lib, symbol), c.c_void_p).value
        assert resolve("cuMemAdvise", 8000)[0] == at("cuMemAdvise") != at("cuMemAdvise_v2") == resolve("cuMemAdvise", 12020)[0]
        assert resolve("cuCtxCreate", 12000)[0] == at("cuCtxCreate_v3") and resolve("cuCtxCreate", 13000)[0] == at("cuCtxCreate_v4")
        assert resolve("cuLaunchKernel", 7000)[0] == at("cuLaunchKernel") == resolve("cuLaunchKernel", 7000, 1)[0]
        assert resolve("cuLaunchKernel", 7000, 2)[0] == at("cuLaunchKernel_ptsz") != at("cuLaunchKernel")
        assert resolve("cuMemcpyHtoD", 12000, 2)[0] == at("cuMemcpyHtoD_v2_ptds")
        assert resolve("cuGetProcAddress", 12000)[0] == at("cuGetProcAddress_v2")
        assert resolve("cuNoSuch", 13000) == (None, 500, 1)
        assert resolve("cuMemAllocAsync", 11010) == (None, 500, 2)
        """
    )


def test_an_older_driver_has_no_newer_functions(machine: Machine) -> None:
    machine.run(
        """
        p, status, version = c.c_void_p(), c.c_int(), c.c_int()
        cuda.call("cuDriverGetVersion", c.byref(version)); assert version.value == 12020
        assert cuda.lib.cuGetProcAddress_v2(b"cuGraphAddNode", c.byref(p), 13000, c.c_uint64(0), c.byref(status)) == 0
        assert cuda.lib.cuGetProcAddress_v2(b"cuCtxGetDevice", c.byref(p), 13000, c.c_uint64(0), c.byref(status)) == 0
        assert p.value == c.cast(cuda.lib.cuCtxGetDevice, c.c_void_p).value
        """,
        NBGPU_SIM_DRIVER_VERSION="12020",
    )


def test_visible_devices(machine: Machine) -> None:
    count = "n = c.c_int(); cuda.call('cuDeviceGetCount', c.byref(n)); print(n.value)"
    assert machine.run(count) == "2\n"
    assert machine.run(count, CUDA_VISIBLE_DEVICES="1") == "1\n"
    assert machine.run(count, CUDA_VISIBLE_DEVICES="1,0,7,0") == "2\n"
    none = "from sim_client import *\nimport ctypes as c\nassert c.CDLL('libcuda.so.1').cuInit(0) == 100"
    finish(machine.start_plain(none, CUDA_VISIBLE_DEVICES=""))


def test_a_forked_child_has_no_driver(machine: Machine) -> None:
    machine.run(
        """
        pid = os.fork()
        if pid == 0: os._exit(0 if cuda.lib.cuMemGetInfo_v2(None, None) and cuda.lib.cuCtxSynchronize() == 3 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        cuda.free(cuda.alloc(1 << 20))
        """
    )


def needs(*modules: str) -> None:
    for module in modules:
        pytest.importorskip(module)


BINDINGS = """
import numpy as np
from cuda.bindings import driver as d
def ok(result):
    assert result[0] == 0, result
    return result[1] if len(result) == 2 else result[1:]
ok(d.cuInit(0)); device = ok(d.cuDeviceGet(1))
context = ok(d.cuCtxCreate(None, 0, device))
assert ok(d.cuCtxGetDevice()) == 1 or int(ok(d.cuCtxGetDevice())) == 1
a = np.random.rand(1 << 16); b = np.zeros_like(a)
p = ok(d.cuMemAlloc(a.nbytes)); s = ok(d.cuStreamCreate(0))
ok(d.cuMemcpyHtoDAsync(p, a.ctypes.data, a.nbytes, s)); ok(d.cuMemcpyDtoHAsync(b.ctypes.data, p, b.nbytes, s)); ok(d.cuStreamSynchronize(s))
assert (a == b).all()
module = ok(d.cuModuleLoadData(b"anything\\0")); kernel = ok(d.cuModuleGetFunction(module, b"spin_5ms"))
start, end = ok(d.cuEventCreate(0)), ok(d.cuEventCreate(0))
ok(d.cuEventRecord(start, s)); ok(d.cuLaunchKernel(kernel, 1, 1, 1, 32, 1, 1, 0, s, 0, 0)); ok(d.cuEventRecord(end, s))
ok(d.cuEventSynchronize(end)); assert 5 <= ok(d.cuEventElapsedTime(start, end)) < 9
descriptor = d.CUDA_ARRAY3D_DESCRIPTOR(); descriptor.Width, descriptor.Height = 32, 4
descriptor.Format, descriptor.NumChannels = d.CUarray_format.CU_AD_FORMAT_FLOAT, 1
array = ok(d.cuArray3DCreate(descriptor))
image = np.arange(128, dtype=np.float32); back = np.zeros_like(image)
def copy(to_array):
    m = d.CUDA_MEMCPY2D(); m.WidthInBytes, m.Height = 128, 4
    host, arr = ("src", "dst") if to_array else ("dst", "src")
    setattr(m, host + "MemoryType", d.CUmemorytype.CU_MEMORYTYPE_HOST); setattr(m, arr + "MemoryType", d.CUmemorytype.CU_MEMORYTYPE_ARRAY)
    setattr(m, host + "Host", (image if to_array else back).ctypes.data); setattr(m, host + "Pitch", 128); setattr(m, arr + "Array", array)
    ok(d.cuMemcpy2D(m))
copy(True); copy(False); assert (image == back).all()
error, _ = d.cuMemAlloc(1 << 45); assert error == d.CUresult.CUDA_ERROR_OUT_OF_MEMORY
managed = ok(d.cuMemAllocManaged(4096, 1))
assert ok(d.cuPointerGetAttribute(d.CUpointer_attribute.CU_POINTER_ATTRIBUTE_IS_MANAGED, managed))
ok(d.cuGetErrorString(d.CUresult.CUDA_ERROR_OUT_OF_MEMORY)); ok(d.cuCtxDestroy(context))
"""

NUMBA = """
import numpy as np
from numba import cuda
context = cuda.current_context()
a = np.arange(1000, dtype=np.float64)
d = cuda.to_device(a); assert (d.copy_to_host() == a).all()
e = cuda.device_array_like(a); e.copy_to_device(d); assert (e.copy_to_host() == a).all()
stream = cuda.stream(); f = cuda.to_device(2 * a, stream=stream); stream.synchronize(); assert (f.copy_to_host() == 2 * a).all()
pinned = cuda.pinned_array(100); pinned[:] = 3; assert (cuda.to_device(pinned).copy_to_host() == 3).all()
managed = cuda.managed_array(10); managed[:] = 5; assert managed.sum() == 50
ptx = b".version 8.0\\n.target sm_90\\n.address_size 64\\n.visible .entry spin_5ms(.param .u64 a){ ret; }\\n\\0"
from cuda.bindings import driver
error, module = driver.cuModuleLoadData(ptx); assert error == 0
error, kernel = driver.cuModuleGetFunction(module, b"spin_5ms"); assert error == 0
assert driver.cuModuleGetFunction(module, b"other")[0] == driver.CUresult.CUDA_ERROR_NOT_FOUND
start, end = cuda.event(), cuda.event()
start.record(stream); assert driver.cuLaunchKernel(kernel, 1, 1, 1, 32, 1, 1, 0, int(stream.handle), 0, 0)[0] == 0; end.record(stream)
end.synchronize(); assert 5 <= cuda.event_elapsed_time(start, end) < 9
free, total = context.get_memory_info(); assert 0 < free < total
try: cuda.device_array(1 << 42, dtype=np.uint8)
except Exception as problem: assert "OUT_OF_MEMORY" in str(problem), problem
else: raise SystemExit("not refused")
"""


def test_cuda_bindings_unmodified(machine: Machine) -> None:
    needs("cuda.bindings", "numpy")
    finish(machine.start_plain(BINDINGS))


@pytest.mark.slow
def test_numba_driver_layer_unmodified(machine: Machine) -> None:
    needs_numba()
    finish(machine.start_plain(NUMBA))


def cuda_header() -> Path | None:
    for package in ("nvidia.cu13", "nvidia.cuda_runtime"):
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            continue
        for folder in spec.submodule_search_locations or [] if spec else []:
            if (Path(folder) / "include" / "cuda.h").exists():
                return Path(folder) / "include"
    return None


def test_types_are_those_of_a_real_cuda_h() -> None:
    """Sizes and offsets of every struct that both headers have."""
    include = cuda_header()
    if include is None:
        pytest.skip("no cuda.h here (pip install nvidia-cuda-runtime)")
    ours = (ROOT / "nodeagent" / "include" / "cuda_abi.h").read_text()
    structs = {m[2]: m[1] for m in re.finditer(r"typedef struct \{\n(.*?)\n\} (\w+);", ours, flags=re.S)}
    names = {"CUipcHandle": "CUipcMemHandle", "CUDA_KERNEL_NODE_PARAMS": "CUDA_KERNEL_NODE_PARAMS_v2"}
    skip = {"CUgraphNodeParams": {"free_dptr", "event"}, "CUDA_MEMSET_NODE_PARAMS": {"ctx"}}
    probes = []
    for name, body in structs.items():
        real = names.get(name, name)
        if name not in skip:
            probes.append((name, real, f"sizeof({real})"))
        flat = re.sub(r"/\*.*?\*/", "", body)
        while "{" in flat:  # fields of inner structs and unions are not ours to name
            flat = re.sub(r"\{[^{}]*\}", "", flat)
        for field in re.findall(r"(\w+)(?:\[\w+\])?;", flat):
            if field not in skip.get(name, set()) and field not in ("pad", "reserved"):
                probes.append((name, real, f"offsetof({real}, {field})"))
    folder = BUILDS / "abi"
    folder.mkdir(parents=True, exist_ok=True)

    def measure(header: str, own: bool) -> list[str]:
        lines = [f'printf("%zu\\n", (size_t){probe.replace(real, name) if own else probe});' for name, real, probe in probes]
        source = folder / f"{'own' if own else 'real'}.c"
        source.write_text(
            f"#include <stddef.h>\n#include <stdio.h>\n#include {header}\nint main(void) {{\n" + "\n".join(lines) + "\nreturn 0;}\n"
        )
        program = source.with_suffix("")
        where = ROOT / "nodeagent" / "include" if own else include
        subprocess.run(["cc", "-D__CUDA_API_VERSION_INTERNAL", f"-I{where}", "-o", str(program), str(source)], check=True, timeout=60)
        return subprocess.run([str(program)], capture_output=True, text=True, check=True, timeout=10).stdout.split()

    assert len(probes) > 100
    own, real = measure('"cuda_abi.h"', True), measure("<cuda.h>", False)
    wrong = [(probe, a, b) for probe, a, b in zip(probes, own, real, strict=True) if a != b]
    assert not wrong
