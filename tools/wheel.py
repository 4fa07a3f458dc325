"""Build both wheels into dist/: with C libraries for glibc 2.17 and newer, and without any (`make wheel`)."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
FRONT_END = "/share/jupyter/labextensions/"
LIBRARIES = ("nbgpu_agent/_lib/libnbgpu.so", "nbgpu_agent/_lib/sim/libcuda.so.1", "nbgpu_agent/_lib/sim/libnvidia-ml.so.1")


def build(kind: str, out: Path) -> Path:
    """Build one kind of wheel into `out`; return its file."""
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.whl")}
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(ROOT)],
        env={**os.environ, "NBGPU_WHEEL": kind},
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"The {kind} wheel could not be built; the reason is above.")
    return next(path for path in out.glob("*.whl") if before.get(path) != path.stat().st_mtime_ns)


def missing(wheel: Path, kind: str) -> list[str]:
    """Return what should be in the wheel and is not."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    wanted = [] if kind == "pure" else [name for name in LIBRARIES if name not in names]
    if kind == "pure" and any(name.endswith(".so") for name in names):
        wanted.append("nothing compiled (there is a .so)")
    for part in (FRONT_END, "/etc/jupyter/jupyter_server_config.d/"):
        if (ROOT / "labextension" / "package.json").is_file() and not any(part in name for name in names):
            wanted.append(part)
    return wanted


def main() -> int:
    """Build and check; return 1 when a wheel lacks something."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=DIST, help="folder for the wheels (default: dist/)")
    out: Path = options.parse_args().out
    out.mkdir(exist_ok=True)
    status = 0
    for kind in ("release", "pure"):
        wheel = build(kind, out)
        lacks = missing(wheel, kind)
        print(
            f"{out.name}/{wheel.name}  {wheel.stat().st_size / 1e6:.1f} MB" + (f"  LACKS {', '.join(lacks)}" if lacks else ""), flush=True
        )
        status |= bool(lacks)
    return status


if __name__ == "__main__":
    sys.exit(main())
