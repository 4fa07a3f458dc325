"""Pure parts of the agent on Kubernetes: whose process is it, what a container gets, who else hands out a GPU, what is noted."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

pytest.importorskip("grpc")

from nbgpu.claims import resource_slice
from nbgpu.errors import NbgpuError
from nbgpu.models import Device
from nbgpu_agent.cgroups import pod_of
from nbgpu_agent.kube import cdi, gpus, others
from nbgpu_agent.kube.checkpoint import Checkpoint, Entry, Prepared
from nbgpu_agent.kube.plugin import Plugin
from nbgpu_agent.kube.publisher import Publisher, _covers
from nbgpu_agent.simulated import Machine

UID = "12345678-1234-abcd-9876-0123456789ab"
UNDER = UID.replace("-", "_")
OTHER = "aaaaaaaa-1234-abcd-9876-0123456789ab"
GIB = 1024**3


def device(index: int = 0, **more: Any) -> Device:
    return Device(
        uuid=f"GPU-0000000{index}-1111-2222-3333-444444444444", index=index, model="NVIDIA H100", node="n", memory_bytes=80 * GIB, **more
    )


# -- whose process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        f"/kubepods/besteffort/pod{UID}/0123abcd",
        f"/kubepods/burstable/pod{UID}",
        f"/kubelet/kubepods/pod{UID}/c",
        f"/kubepods.slice/kubepods-pod{UNDER}.slice/cri-containerd-0123.scope",
        f"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{UNDER}.slice/x",
        f"/kubepods.slice/kubepods-besteffort-pod{UNDER}.slice/crio-01.scope/pod{OTHER}",
    ],
)
def test_the_pod_of_a_cgroup(path: str) -> None:
    found = pod_of(path)
    assert found is not None
    assert found[0] == UID
    assert path.startswith(found[1])


@pytest.mark.parametrize("path", ["/", "/system.slice/kubelet.service", "/kubepods", "/user.slice/pod", "/kubepods/podx", f"/x/{UID}", ""])
def test_no_pod(path: str) -> None:
    assert pod_of(path) is None


# -- what a container gets -----------------------------------------------------------------------------------------------


def test_specification_of_a_simulated_slice() -> None:
    machine = Machine(Path("/run/nbgpu/sim-n/state"), Path("/run/nbgpu/lib/v1/sim"))
    parts = [cdi.Part(f"{UID}-0", device(0), {}), cdi.Part(f"{UID}-1", device(1), {})]
    spec = cdi.specification(UID, Path("/run/nbgpu/slices/s"), Path("/run/nbgpu/lib/v1"), machine, parts)
    assert spec["kind"] == "gpu.nbgpu.io/slice"
    assert [one["name"] for one in spec["devices"]] == [f"{UID}-0", f"{UID}-1"]
    assert all(one["containerEdits"] for one in spec["devices"])  # runtimes refuse empty ones
    mounts = {one["containerPath"]: (one["hostPath"], one["options"]) for one in spec["containerEdits"]["mounts"]}
    assert len(mounts) == len(spec["containerEdits"]["mounts"])
    writable = {path for path, (_, options) in mounts.items() if "ro" not in options}
    assert writable == {"/run/nbgpu/slice/use", "/run/nbgpu/sim/state"}
    assert mounts["/etc/ld.so.preload"][0] == "/run/nbgpu/lib/v1/ld.so.preload"
    assert mounts["/usr/lib64/libcuda.so.1"][0] == "/run/nbgpu/lib/v1/sim/libcuda.so.1"
    assert all({"nosuid", "nodev"} <= set(options) for _, options in mounts.values())
    # the directory before what lies in it
    order = [one["containerPath"] for one in spec["containerEdits"]["mounts"]]
    assert order.index("/run/nbgpu/slice") < order.index("/run/nbgpu/slice/use")
    assert "NVIDIA_VISIBLE_DEVICES=void" in spec["containerEdits"]["env"]
    real = cdi.specification(UID, Path("/run/nbgpu/slices/s"), Path("/run/nbgpu/lib/v1"), None, parts)
    assert not any("cuda" in json.dumps(one) or "sim" in json.dumps(one) for one in real["containerEdits"]["mounts"])


def test_files_of_specifications(tmp_path: Path) -> None:
    cdi.write(tmp_path / "cdi", UID, {"a": 1})
    before = (tmp_path / "cdi" / cdi.file_name(UID)).stat()
    cdi.write(tmp_path / "cdi", UID, {"a": 1})
    assert (tmp_path / "cdi" / cdi.file_name(UID)).stat().st_ino == before.st_ino  # the same is not written again
    (tmp_path / "cdi" / "nvidia.yaml").touch()
    assert cdi.claims_in(tmp_path / "cdi") == {UID}
    assert [path.name for path in (tmp_path / "cdi").iterdir() if "new" in path.name] == []
    cdi.remove(tmp_path / "cdi", UID)
    cdi.remove(tmp_path / "cdi", UID)
    assert cdi.claims_in(tmp_path / "cdi") == set()


NVIDIA = {
    # as `nvidia-ctk cdi generate` writes it, shortened
    "cdiVersion": "0.5.0",
    "kind": "nvidia.com/gpu",
    "devices": [
        {"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/nvidia0"}]}},
        {"name": device(0).uuid, "containerEdits": {"deviceNodes": [{"path": "/dev/nvidia0"}]}},
        {"name": "1", "containerEdits": {"deviceNodes": [{"path": "/dev/nvidia1"}]}},
        {"name": "all", "containerEdits": {"deviceNodes": [{"path": "/dev/nvidia0"}, {"path": "/dev/nvidia1"}]}},
    ],
    "containerEdits": {"mounts": [{"hostPath": "/usr/lib/libcuda.so.565.1", "containerPath": "/usr/lib/libcuda.so.565.1"}]},
}


def test_nvidias_own_specification_is_used_where_there_is_one(tmp_path: Path) -> None:
    empty = tmp_path / "etc"
    empty.mkdir()
    (tmp_path / "nvidia.yaml").write_text(yaml.safe_dump(NVIDIA))
    (tmp_path / "broken.yaml").write_text("kind: nvidia.com/gpu\ndevices: {")
    (tmp_path / "gpu.nbgpu.io-x.json").write_text(json.dumps(NVIDIA))
    (tmp_path / "net.json").write_text(json.dumps({"kind": "example.org/net", "devices": [{"name": device(2).uuid}]}))
    found = gpus.Gpus(False, (empty, tmp_path))
    assert found.container_gets(device(0)) == ((f"nvidia.com/gpu={device(0).uuid}",), {})
    assert found.container_gets(device(1)) == (("nvidia.com/gpu=1",), {})  # by index, as older ones name them
    assert gpus.vendor_device(device(2), [tmp_path]) is None
    assert gpus.Gpus(True, (tmp_path,)).container_gets(device(0)) == ((), {})


def host(root: Path, driver: str = "") -> Path:
    """Make a node's files as a driver of the distribution leaves them."""
    lib = root / driver / "usr/lib/x86_64-linux-gnu"
    lib.mkdir(parents=True)
    for name in ("libcuda.so.565.57.01", "libnvidia-ml.so.565.57.01", "libnvidia-nvvm.so.565.57.01", "libnvidia-gpucomp.so.565.57.01"):
        (lib / name).touch()
    (lib / "libcuda.so.1").symlink_to("libcuda.so.565.57.01")
    (root / driver / "usr/bin").mkdir(parents=True)
    (root / driver / "usr/bin/nvidia-smi").touch()
    (root / "dev").mkdir(exist_ok=True)
    for name in ("nvidiactl", "nvidia-uvm"):
        (root / "dev" / name).touch()
    for number, one in enumerate((device(1), device(0))):  # the driver counts otherwise than NVML
        information = root / f"proc/driver/nvidia/gpus/0000:0{number}:00.0/information"
        information.parent.mkdir(parents=True)
        information.write_text(f"Model: \t\t NVIDIA H100\nGPU UUID: \t {one.uuid}\nDevice Minor: \t {number}\n")
    return root


@pytest.mark.parametrize("driver", ["", "run/nvidia/driver"])
def test_the_drivers_files_where_there_is_none(tmp_path: Path, driver: str) -> None:
    edits = gpus.Gpus(False, (), host(tmp_path, driver)).container_gets(device(0))[1]
    assert [one["path"] for one in edits["deviceNodes"]] == ["/dev/nvidia1", "/dev/nvidiactl", "/dev/nvidia-uvm"]
    mounts = {one["containerPath"]: one["hostPath"] for one in edits["mounts"]}
    prefix = f"/{driver}" if driver else ""
    library = cdi.library_dirs()[0]
    assert mounts[f"{library}/libcuda.so.1"] == f"{prefix}/usr/lib/x86_64-linux-gnu/libcuda.so.565.57.01"
    assert mounts["/usr/lib64/libnvidia-ml.so.1"] == f"{prefix}/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.565.57.01"
    assert f"{library}/libnvidia-nvvm.so.4" in mounts
    assert mounts["/usr/bin/nvidia-smi"] == f"{prefix}/usr/bin/nvidia-smi"


@pytest.mark.parametrize("driver", ["", "run/nvidia/driver"])
def test_an_agent_takes_the_nodes_libraries_where_its_container_has_none(tmp_path: Path, driver: str) -> None:
    lib = host(tmp_path, driver) / driver / "usr/lib/x86_64-linux-gnu"
    found = gpus.agents_libraries(tmp_path, loads=lambda _: False)
    assert found == (lib / "libnvidia-ml.so.565.57.01", str(lib / "libcuda.so.565.57.01"))
    assert gpus.agents_libraries(tmp_path, loads=lambda _: True) == (None, "libcuda.so.1"), "NVIDIA's runtime gave it some"
    assert gpus.agents_libraries(tmp_path / "bare", loads=lambda _: False) == (None, "libcuda.so.1")


def test_nvml_is_loaded_by_such_a_path(tmp_path: Path) -> None:
    """The simulated driver's library in the place of a real one, under a name that no loader would look for."""
    built = Path(gpus.__file__).parents[1] / "_lib" / "sim" / "libnvidia-ml.so.1"
    library = tmp_path / "libnvidia-ml.so.565.57.01"
    shutil.copy(built, library)
    program = (
        "import sys; from pathlib import Path; from nbgpu_agent.nvml import Nvml; print(Nvml(Path(sys.argv[1]), False).driver_version)"
    )
    env = {**os.environ, "NBGPU_SIM_STATE": str(tmp_path / "state"), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", program, str(library)], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("580"), done.stderr
    library.write_text("no library")
    done = subprocess.run([sys.executable, "-c", program, str(library)], env=env, capture_output=True, text=True, check=False)
    assert "cannot be loaded" in done.stderr


def test_no_way_to_give_a_gpu_is_said(tmp_path: Path) -> None:
    with pytest.raises(gpus.NoDriverFiles, match="no device file"):
        gpus.driver_edits(device(0), tmp_path)
    host(tmp_path)
    for path in (tmp_path / "usr/lib/x86_64-linux-gnu").iterdir():
        path.unlink()
    with pytest.raises(gpus.NoDriverFiles, match="nvidia-ctk cdi generate"):
        gpus.driver_edits(device(0), tmp_path)


# -- who else hands out a GPU -----------------------------------------------------------------------------------------------


def slice_of(driver: str, *uuids: str, name: str = "uuid") -> dict[str, Any]:
    devices = [{"name": f"d{number}", "attributes": {name: {"string": uuid}}} for number, uuid in enumerate(uuids)]
    return {"metadata": {"name": driver}, "spec": {"driver": driver, "devices": devices}}


def test_devices_of_other_drivers() -> None:
    both = [device(0), device(1)]
    assert others.claimed_by_others(both, 2, [], {}) == {}
    assert others.claimed_by_others(both, 2, [slice_of("gpu.nbgpu.io", device(0).uuid)], {}) == {}
    for name in ("uuid", "gpu.nvidia.com/uuid", "parentUUID"):
        found = others.claimed_by_others(both, 2, [slice_of("gpu.nvidia.com", device(1).uuid.upper(), name=name)], {})
        assert found == {device(1).uuid: "driver gpu.nvidia.com hands it out already"}
    junk: list[Any] = [
        {},
        {"spec": None},
        {"spec": {"driver": "x", "devices": {}}},
        {"spec": {"driver": "x", "devices": [None, {"attributes": []}]}},
    ]
    assert others.claimed_by_others(both, 2, junk, {}) == {}


def test_a_device_plugin_on_the_node() -> None:
    both = [device(0), device(1)]
    assert set(others.claimed_by_others(both, 2, [], {"cpu": "8", "nvidia.com/gpu": "2"})) == {device(0).uuid, device(1).uuid}
    assert set(others.claimed_by_others(both, 4, [], {"nvidia.com/mig-1g.10gb": "7"})) == {device(0).uuid, device(1).uuid}
    assert others.claimed_by_others(both, 2, [], {"nvidia.com/gpu": "0"}) == {}
    # the admin has told them apart: two for slices, two for the plugin
    assert others.claimed_by_others(both, 4, [], {"nvidia.com/gpu": "2"}) == {}
    assert "keep the plugin off" in others.claimed_by_others(both, 2, [], {"nvidia.com/gpu": "2"})[device(0).uuid]


# -- what is noted ------------------------------------------------------------------------------------------------------------


def test_checkpoint(tmp_path: Path) -> None:
    part = Prepared(request="gpu-0", pool="n", device="gpu-x", share_id="s", cdi=("a=b",))
    entry = Entry(namespace="ns", name="c", slice_id="abcdefgh", sealed=True, parts=(part,), spec={"kind": "x"})
    first = Checkpoint(tmp_path)
    first.put(UID, entry)
    first.put(OTHER, entry)
    first.drop(OTHER)
    first.drop(OTHER)
    assert Checkpoint(tmp_path).claims == {UID: entry}
    assert (tmp_path / "claims.json").stat().st_mode & 0o777 == 0o600
    (tmp_path / "claims.json").write_text((tmp_path / "claims.json").read_text()[:20])
    assert Checkpoint(tmp_path).claims == {}
    assert (tmp_path / "claims.json.bad").exists()


def test_what_is_published_is_compared_as_values() -> None:
    there = {"capacity": {"memory": {"value": "1Gi"}, "compute": {"value": "1k"}}, "more": 1, "list": [{"a": 1, "b": 2}]}
    assert _covers(there, {"capacity": {"memory": {"value": str(GIB)}, "compute": {"value": "1000"}}, "list": [{"a": 1}]})
    assert not _covers(there, {"capacity": {"memory": {"value": str(GIB + 1)}}})
    assert not _covers(there, {"list": []})
    assert not _covers(there, {"list": [{"a": 2}]})
    assert not _covers(there, {"missing": None})


def test_a_taint_that_should_not_be_there_is_a_difference() -> None:
    """The API server adds fields of its own, but no taints: a GPU that is back would be tainted for ever."""
    healthy, sick = (resource_slice("n", [device(healthy=state)], {}, 1) for state in (True, False))
    assert Publisher._same(healthy, healthy)
    assert Publisher._same(sick, sick)
    assert not Publisher._same(sick, healthy)
    assert not Publisher._same(healthy, sick)
    healthy["spec"]["devices"][0]["somethingNew"] = {}
    assert Publisher._same(healthy, resource_slice("n", [device()], {}, 1))


# -- the kubelet's calls ------------------------------------------------------------------------------------------------


def test_a_pod_that_is_refused_without_end_does_not_fill_the_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("nbgpu.agent"), "disabled", False)  # a hub in this process turns others' loggers off
    plugin = Plugin(Path("/nowhere"), Path("/nowhere"), "x")  # a path that is short enough for sockets; it makes none here
    plugin._claims = object()  # type: ignore[assignment]
    clock = [0.0]
    monkeypatch.setattr("nbgpu_agent.kube.plugin.time", SimpleNamespace(monotonic=lambda: clock[0]))

    def refused(claim: str, why: str, times: int) -> list[str]:
        async def work(_: Any) -> None:
            raise NbgpuError(why)

        caplog.clear()
        asked = SimpleNamespace(namespace="lab", name=claim, uid=f"uid-{claim}")
        for _ in range(times):
            assert asyncio.run(plugin._try(asked, "prepared", work)) == (None, why)
            clock[0] += 1.2
        return [record.message for record in caplog.records if record.levelno >= logging.WARNING]

    assert refused("one", "no room", 100) == ["claim lab/one is not prepared: no room"]
    assert refused("two", "no room", 2) == ["claim lab/two is not prepared: no room"]
    assert refused("one", "no seal", 2) == ["claim lab/one is not prepared: no seal"]
    clock[0] += 600
    assert len(refused("one", "no seal", 2)) == 1
    assert len(plugin._said) == 1
