"""The wheels as a user gets them: built as `make wheel` does, installed in an empty environment, with no compiler and no Node in sight."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("sh", "sleep", "cat")
"""All that the machine still offers: no compiler, no Node."""
SEEN = "import pynvml as n; n.nvmlInit(); print(n.nvmlDeviceGetMemoryInfo(n.nvmlDeviceGetHandleByIndex(0)).total)"
QUARTER_BYTES = 78 * 1024**3 // 4
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not (ROOT / "labextension/nbgpu_lab/labextension").is_dir(), reason="the front end is not built (make setup)"),
]


@pytest.fixture(scope="module")
def wheels() -> Iterator[dict[str, Path]]:
    with tempfile.TemporaryDirectory(prefix="nbgpu-wheel-", dir="/tmp") as name:
        done = subprocess.run(
            [sys.executable, str(ROOT / "tools/wheel.py"), "--out", name], capture_output=True, text=True, timeout=500, check=False
        )
        if "Could not find a version" in done.stderr:
            pytest.skip("the package registry cannot be reached")
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        found = {"pure" if "none-any" in path.name else "release": path for path in Path(name).glob("*.whl")}
        assert set(found) == {"pure", "release"}, done.stdout
        yield found


class Installed:
    """An environment with a wheel in it, and nothing of the machine but a shell."""

    def __init__(self, place: Path, wheel: Path):
        self.place = place
        subprocess.run([sys.executable, "-m", "venv", str(place / "venv")], check=True, timeout=120)
        pip = [str(place / "venv/bin/pip"), "install", "--quiet", "--prefer-binary", "--only-binary", ":all:", f"{wheel}[pool,agent]"]
        subprocess.run(pip, check=True, timeout=400, stdout=subprocess.DEVNULL)
        (place / "bin").mkdir()
        for name in PROGRAMS:
            (place / "bin" / name).symlink_to(str(shutil.which(name)))
        self.env = {
            "HOME": str(place), "PATH": f"{place}/venv/bin:{place}/bin", "NBGPU_RUNTIME_DIR": str(place / "run"),
            "NBGPU_SIM_STATE": str(place / "sim"), "NBGPU_IDLE_SECONDS": "2",
        }  # fmt: skip

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment."""
        return subprocess.run(
            [str(self.place / "venv/bin" / words[0]), *words[1:]], env=self.env, cwd=self.place, capture_output=True, text=True, timeout=120
        )


def install(wheel: Path) -> Iterator[Installed]:
    with tempfile.TemporaryDirectory(prefix="nbgpu-inst-", dir="/tmp") as name:
        yield Installed(Path(name), wheel)


@pytest.fixture(scope="module")
def release(wheels: dict[str, Path]) -> Iterator[Installed]:
    yield from install(wheels["release"])


@pytest.fixture(scope="module")
def pure(wheels: dict[str, Path]) -> Iterator[Installed]:
    yield from install(wheels["pure"])


def test_a_program_runs_in_a_slice(release: Installed) -> None:
    for name in ("cc", "gcc", "clang", "node", "npm"):
        assert shutil.which(name, path=release.env["PATH"]) is None
    done = release.call("nbgpu", "run", "--gpu", "1/4", "--", "python", "-c", SEEN)
    assert (done.stdout.strip(), done.returncode) == (str(QUARTER_BYTES), 0), done.stderr


def test_doctor_finds_it_well(release: Installed) -> None:
    said = json.loads(release.call("nbgpu", "doctor", "--json").stdout)
    assert [check for check in said["checks"] if check["level"] == "error"] == []
    checks = {check["name"]: check["found"] for check in said["checks"]}
    assert checks["limits"] == "the limiter is loaded in a program of a slice"
    assert str(release.place) in checks["limiter"]


def test_the_libraries_need_no_new_glibc(wheels: dict[str, Path]) -> None:
    assert "manylinux_2_17" in wheels["release"].name
    with zipfile.ZipFile(wheels["release"]) as archive:
        for name in ("libnbgpu.so", "sim/libcuda.so.1", "sim/libnvidia-ml.so.1"):
            library = archive.read(f"nbgpu_agent/_lib/{name}")
            newer = [minor for minor in range(18, 60) if f"GLIBC_2.{minor}\0".encode() in library]
            assert newer == [], f"{name} asks for glibc 2.{newer[0]}"


def test_the_wheel_without_libraries_says_which_to_take(pure: Installed) -> None:
    done = pure.call("nbgpu", "doctor")
    assert done.returncode == 1
    assert "take the platform wheel" in done.stdout
    done = pure.call("nbgpu", "run", "--gpu", "1/4", "--", "python", "-c", SEEN)
    assert done.returncode == 1
    assert "platform wheel" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
