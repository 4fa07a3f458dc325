"""The simulated libnvidia-ml.so.1 under the unmodified nvidia-ml-py, and the simulated nvidia-smi."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SIM = ROOT / "nodeagent" / "nbgpu_agent" / "_lib" / "sim"
MIB = 1024**2

# A process with a context, memory and GPU kernels of 5 ms without a pause on device 0; says when it is ready.
CLIENT = """
import ctypes as c, sys
cuda = c.CDLL("libcuda.so.1")
def ok(code): assert code == 0, code
ok(cuda.cuInit(0))
context, address = c.c_void_p(), c.c_uint64()
ok(cuda.cuDevicePrimaryCtxRetain(c.byref(context), 0))
ok(cuda.cuCtxSetCurrent(context))
ok(cuda.cuMemAlloc_v2(c.byref(address), c.c_size_t(1 << 30)))
ptx = b".version 8.0\\n.target sm_90\\n.address_size 64\\n.visible .entry work_5ms()\\n{\\n ret;\\n}\\n\\0"
module, function = c.c_void_p(), c.c_void_p()
ok(cuda.cuModuleLoadData(c.byref(module), ptx))
ok(cuda.cuModuleGetFunction(c.byref(function), module, b"work_5ms"))
print("ready", flush=True)
while True:
    for _ in range(20): ok(cuda.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, None, None, None))
    ok(cuda.cuCtxSynchronize())
"""


@pytest.fixture(scope="session")
def libraries() -> Path:
    targets = ["libcuda", "libnvml", "nvidia-smi"]
    subprocess.run([sys.executable, str(ROOT / "nodeagent" / "build.py"), *targets], check=True, timeout=300, stdout=subprocess.DEVNULL)
    return SIM


@pytest.fixture
def env(libraries: Path, tmp_path: Path) -> dict[str, str]:
    """Environment of a program that meets two simulated GPUs of 16 GiB."""
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("NBGPU_") and k != "LD_PRELOAD"},
        "LD_LIBRARY_PATH": str(libraries),
        "NBGPU_SIM_STATE": str(tmp_path / "machine"),
        "NBGPU_SIM_MEMORY_MIB": "16384",
        "NBGPU_SIM_TEARDOWN_MS": "20",
    }


def ask(env: dict[str, str], code: str) -> Any:
    """Run code that has `n` (pynvml, initialised) and prints nothing but what it puts into `out`."""
    program = f"import json\nimport pynvml as n\nn.nvmlInit()\nout = {{}}\n{code}\nprint(json.dumps(out))"
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def smi(env: dict[str, str], *arguments: str, status: int = 0) -> str:
    """Run nvidia-smi and return what it prints."""
    done = subprocess.run([str(SIM / "nvidia-smi"), *arguments], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


@pytest.fixture
def client(env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process that holds 1 GiB of device 0 and keeps it busy."""
    process = subprocess.Popen([sys.executable, "-c", CLIENT], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=20)


def test_system_and_identity(env: dict[str, str]) -> None:
    out = ask(
        env,
        """
out["versions"] = [n.nvmlSystemGetDriverVersion(), n.nvmlSystemGetNVMLVersion(), n.nvmlSystemGetCudaDriverVersion()]
out["count"] = n.nvmlDeviceGetCount()
h = n.nvmlDeviceGetHandleByIndex(1)
out["name"], out["uuid"] = n.nvmlDeviceGetName(h), n.nvmlDeviceGetUUID(h)
pci = n.nvmlDeviceGetPciInfo(h)
out["bus"], out["legacy"] = pci.busId, pci.busIdLegacy
same = [n.nvmlDeviceGetHandleByUUID(out["uuid"]), n.nvmlDeviceGetHandleByPciBusId(pci.busId),
        n.nvmlDeviceGetHandleByPciBusId(pci.busIdLegacy),
        n.nvmlDeviceGetHandleBySerial(n.nvmlDeviceGetSerial(h)), n.nvmlDeviceGetHandleByUUIDV(out["uuid"].encode(), n.NVML_UUID_TYPE_ASCII)]
out["same"] = [n.nvmlDeviceGetIndex(x) for x in same]
out["minor"] = n.nvmlDeviceGetMinorNumber(h)
out["capability"] = n.nvmlDeviceGetCudaComputeCapability(h)
""",
    )
    assert out["count"] == 2
    assert out["versions"][0].split(".")[0].isdigit()
    assert out["versions"][2] >= 11040
    assert "Simulated" in out["name"]
    assert out["uuid"].startswith("GPU-")
    assert (out["bus"], out["legacy"]) == ("00000000:02:00.0", "0000:02:00.0")
    assert out["same"] == [1] * 5
    assert (out["minor"], out["capability"]) == (1, [9, 0])


def test_constants_are_sane(env: dict[str, str]) -> None:
    out = ask(
        env,
        """
h = n.nvmlDeviceGetHandleByIndex(0)
out["mig"], out["ecc"] = n.nvmlDeviceGetMigMode(h), n.nvmlDeviceGetEccMode(h)
out["compute"], out["persistence"] = n.nvmlDeviceGetComputeMode(h), n.nvmlDeviceGetPersistenceMode(h)
out["temperature"] = n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU)
out["temperature_v"] = n.nvmlDeviceGetTemperatureV(h, n.NVML_TEMPERATURE_GPU)
out["power"] = [n.nvmlDeviceGetPowerUsage(h), n.nvmlDeviceGetEnforcedPowerLimit(h)]
out["clock"] = [n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM), n.nvmlDeviceGetMaxClockInfo(h, n.NVML_CLOCK_SM)]
out["brand"], out["arch"] = n.nvmlDeviceGetBrand(h), n.nvmlDeviceGetArchitecture(h)
out["errors"] = n.nvmlDeviceGetTotalEccErrors(h, n.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, n.NVML_AGGREGATE_ECC)
out["limits"] = n.nvmlDeviceGetPowerManagementLimitConstraints(h)
""",
    )
    assert out["mig"] == [0, 0]
    assert out["ecc"] == [1, 1]
    assert (out["compute"], out["persistence"], out["errors"]) == (0, 1, 0)
    assert 20 <= out["temperature"] <= 90
    assert out["temperature_v"] == out["temperature"]
    assert 0 < out["power"][0] < out["power"][1] == out["limits"][1]
    assert out["clock"][0] <= out["clock"][1]
    assert (out["brand"], out["arch"]) == (14, 9)


def test_memory_of_a_process_is_seen_everywhere(env: dict[str, str], client: subprocess.Popen[str]) -> None:
    out = ask(
        env,
        """
h = n.nvmlDeviceGetHandleByIndex(0)
m, m2 = n.nvmlDeviceGetMemoryInfo(h), n.nvmlDeviceGetMemoryInfo(h, n.nvmlMemory_v2)
out["v1"], out["v2"] = [m.total, m.free, m.used], [m2.total, m2.free, m2.used, m2.reserved]
show = lambda ps: [[p.pid, p.usedGpuMemory] for p in ps]
out["v2_list"] = show(n.nvmlDeviceGetComputeRunningProcesses_v2(h))
out["v3_list"] = show(n.nvmlDeviceGetComputeRunningProcesses_v3(h))
out["detail"] = show(n.nvmlDeviceGetRunningProcessDetailList(h, n.nvmlProcessDetailList_v1, n.NVML_PROCESS_MODE_COMPUTE))
out["graphics"] = show(n.nvmlDeviceGetGraphicsRunningProcesses_v3(h))
out["mps"] = show(n.nvmlDeviceGetMPSComputeRunningProcesses_v3(h))
out["other"] = show(n.nvmlDeviceGetComputeRunningProcesses(n.nvmlDeviceGetHandleByIndex(1)))
out["name"] = n.nvmlSystemGetProcessName(out["v3_list"][0][0])
""",
    )
    used = out["v1"][2]
    assert out["v1"] == [16384 * MIB, 16384 * MIB - used, used]
    assert out["v2"] == [*out["v1"], 0]
    assert used > 1024 * MIB, "the allocation and a context"
    for name in ("v2_list", "v3_list", "detail"):
        assert out[name] == [[client.pid, used]]
    assert (out["graphics"], out["mps"], out["other"]) == ([], [], [])
    assert "python" in out["name"]


def test_utilisation_is_sampled_and_says_whose(env: dict[str, str], client: subprocess.Popen[str]) -> None:
    out = ask(
        env,
        """
import time
h = n.nvmlDeviceGetHandleByIndex(0)
since = int(time.time() * 1e6)
deadline = time.monotonic() + 10
while time.monotonic() < deadline and n.nvmlDeviceGetUtilizationRates(h).gpu < 90: time.sleep(0.05)
time.sleep(0.5)
out["gpu"] = n.nvmlDeviceGetUtilizationRates(h).gpu
out["other"] = n.nvmlDeviceGetUtilizationRates(n.nvmlDeviceGetHandleByIndex(1)).gpu
out["processes"] = [[p.pid, p.smUtil, p.timeStamp > since] for p in n.nvmlDeviceGetProcessUtilization(h, since)]
out["info"] = [[p.pid, p.smUtil] for p in n.nvmlDeviceGetProcessesUtilizationInfo(h, since)]
kind, samples = n.nvmlDeviceGetSamples(h, n.NVML_GPU_UTILIZATION_SAMPLES, since)
out["samples"] = [kind, len(samples), samples[-1].sampleValue.uiVal, samples[0].timeStamp <= samples[-1].timeStamp]
""",
    )
    assert out["gpu"] >= 90
    assert out["other"] == 0
    assert out["processes"][0][0] == client.pid
    assert out["processes"][0][1] > 40
    assert out["processes"][0][2], "stamped on the clock of the caller"
    assert out["info"][0][0] == client.pid
    assert out["samples"][0] == 1
    assert 2 <= out["samples"][1] <= 20
    assert out["samples"][2] >= 90
    assert out["samples"][3], "oldest first"


def test_dead_process_leaves_nothing(env: dict[str, str], client: subprocess.Popen[str]) -> None:
    client.kill()
    client.wait(10)
    deadline = time.monotonic() + 5
    code = """
h = n.nvmlDeviceGetHandleByIndex(0)
out["used"], out["processes"] = n.nvmlDeviceGetMemoryInfo(h).used, len(n.nvmlDeviceGetComputeRunningProcesses(h))
"""
    while (out := ask(env, code)) != {"used": 0, "processes": 0}:
        assert time.monotonic() < deadline, out


def test_sizes_errors_and_missing_functions(env: dict[str, str], client: subprocess.Popen[str]) -> None:
    out = ask(
        env,
        """
import ctypes as c
h = n.nvmlDeviceGetHandleByIndex(0)
def code(call, *a):
    try: call(*a)
    except n.NVMLError as error: return error.value
    return 0
out["index"] = code(n.nvmlDeviceGetHandleByIndex, 7)
out["uuid"] = code(n.nvmlDeviceGetHandleByUUID, "GPU-nobody")
out["fan"] = code(n.nvmlDeviceGetFanSpeed, h)
out["events"] = code(n.nvmlEventSetCreate)
out["idle"] = code(n.nvmlDeviceGetProcessUtilization, h, 2**62)
out["version"] = code(n.nvmlDeviceGetMemoryInfo, h, 0x01000028)
lib = c.CDLL("libnvidia-ml.so.1")
name = c.create_string_buffer(4)
out["short"] = lib.nvmlDeviceGetName(h, name, 4)
count = c.c_uint(0)
out["first"] = [lib.nvmlDeviceGetComputeRunningProcesses_v3(h, c.byref(count), None), count.value]
lib.nvmlErrorString.restype = c.c_char_p
out["text"] = [lib.nvmlErrorString(3).decode(), lib.nvmlErrorString(12345).decode()]
out["missing"] = code(lambda: n._nvmlGetFunctionPointer("nvmlDeviceMakeCoffee"))
n.nvmlShutdown()
out["after"] = code(n.nvmlDeviceGetName, h)
out["twice"] = code(n.nvmlShutdown)
""",
    )
    assert out == {
        "index": 2,
        "uuid": 6,
        "fan": 3,
        "events": 3,
        "idle": 6,
        "version": 25,
        "short": 7,
        "first": [7, 1],
        "text": ["Not Supported", "Unknown Error"],
        "missing": 13,
        "after": 1,
        "twice": 1,
    }


def test_every_function_of_the_binding_exists(env: dict[str, str]) -> None:
    """What nvidia-ml-py asks for by name is there, answered or NOT_SUPPORTED."""
    out = ask(
        env,
        r"""
import inspect, re
names = sorted(set(re.findall(r'_nvmlGetFunctionPointer\("(nvml\w+)"\)', inspect.getsource(n))))
out["asked"] = len(names)
out["missing"] = []
for name in names:
    try: n._nvmlGetFunctionPointer(name)
    except n.NVMLError: out["missing"].append(name)
""",
    )
    assert out["asked"] > 300
    assert out["missing"] == []


def test_smi_table_and_list(env: dict[str, str], client: subprocess.Popen[str]) -> None:
    table = smi(env)
    assert "Simulated driver" in table
    assert "16384MiB" in table
    assert str(client.pid) in table
    widths = {len(line) for line in table.splitlines() if line.startswith(("|", "+"))}
    assert widths == {91}, "a straight frame"
    lines = smi(env, "-L").splitlines()
    assert [line.split(":")[0] for line in lines] == ["GPU 0", "GPU 1"]
    assert "(UUID: GPU-" in lines[0]
    assert "simulated" in smi(env, "-q").lower()
    assert "SIMULATED" in smi(env, "--help")


def test_smi_queries(env: dict[str, str], client: subprocess.Popen[str]) -> None:
    csv = smi(env, "--query-gpu=index,name,memory.total,memory.used,utilization.gpu,fan.speed", "--format=csv").splitlines()
    assert csv[0] == "index, name, memory.total [MiB], memory.used [MiB], utilization.gpu [%], fan.speed [%]"
    assert csv[2] == "1, Simulated H100 80GB, 16384 MiB, 0 MiB, 0 %, [N/A]"
    bare = smi(env, "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits", "-i", "1")
    assert bare == "16384, 16384\n"
    apps = smi(env, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits").splitlines()
    pid, used = apps[0].split(", ")
    assert int(pid) == client.pid
    assert int(used) > 1024
    uuid = smi(env, "--query-gpu=uuid", "--format=csv,noheader", "-i", "0").strip()
    assert smi(env, "-L", "-i", uuid).count("\n") == 1


def test_smi_refuses_plainly(env: dict[str, str]) -> None:
    assert "not a valid field" in smi(env, "--query-gpu=coffee", "--format=csv", status=2)
    assert "--format" in smi(env, "--query-gpu=name", status=2)
    assert "Invalid combination" in smi(env, "--coffee", status=2)
    assert "no GPU 9" in smi(env, "-i", "9", status=6)
