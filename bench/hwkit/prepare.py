"""For a machine with no compiler and no network: what the kit needs there, made here, in one folder of the checkout."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys

from . import LIB, PREBUILT, PYTHON, ROOT
from .kit import Skip
from .on_cost import program
from .places import missing_packages

THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def _packages(python: str) -> str:
    return str(PREBUILT / f"packages-{python}")


def requirements() -> list[str]:
    """Return what ``nbgpu[agent,pool]`` needs, as pyproject.toml has it."""
    text = (ROOT / "pyproject.toml").read_text()
    lists = [re.search(rf"^{name} = \[(.*)\]", text, re.MULTILINE) for name in ("dependencies", "agent", "pool")]
    return sorted({name for found in lists if found is not None for name in re.findall(r'"([^"]+)"', found[1])})


def prepare(python: str) -> int:
    """Compile the libraries and the C program, fetch the packages for `python`; return the exit status."""
    done = subprocess.run([PYTHON, str(ROOT / "nodeagent" / "build.py")])
    if done.returncode:
        return done.returncode
    try:
        print(f"{program(PREBUILT)}: built")
    except Skip as error:
        print(f"Left out: {error}")
    folder = _packages(python)
    shutil.rmtree(folder, ignore_errors=True)
    platforms = [f"manylinux{version}_{platform.machine()}" for version in ("_2_28", "_2_17", "2014")]
    command = [
        PYTHON,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-compile",
        "--target",
        folder,
        "--only-binary=:all:",
        "--implementation",
        "cp",
    ]
    command += ["--python-version", python, *[f"--platform={name}" for name in platforms], *requirements()]
    done = subprocess.run(command)
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        print("Without these packages the kit runs the limiter and the scheduler, but no agent.")
    print(f"Copy {LIB.relative_to(ROOT)} and {PREBUILT.relative_to(ROOT)} with the working tree, then run: python3 bench/hardware.py")
    return 0


def use_packages() -> None:
    """Take the packages that were brought along, where the machine lacks some."""
    folder = _packages(THIS_PYTHON)
    if missing_packages() and os.path.isdir(folder):
        sys.path.insert(0, folder)
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
