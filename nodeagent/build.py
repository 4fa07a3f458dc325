"""Compile nbgpu's C libraries into ``nodeagent/nbgpu_agent/_lib/``.

``python nodeagent/build.py [--release [MACHINE]] [--force] [TARGET...]``

A target whose sources do not exist is skipped; one whose sources, flags and compiler are unchanged (a hash beside the
library says so) is not compiled again. The compiler is ``$CC``, else ``gcc`` or ``cc``, else ``python -m ziglang cc``.
``--release`` always takes ziglang and builds against glibc 2.17, because the libraries are loaded into users' old images.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUT = HERE / "nbgpu_agent" / "_lib"
CFLAGS = "-std=gnu11 -O2 -g -Wall -Wextra -Werror -fvisibility=hidden -fPIC -fno-strict-aliasing -pthread".split()
CFLAGS += ["-Wno-unknown-attributes"]  # gcc's noclone, which clang has no need of
OLDEST_GLIBC = "2.17"


@dataclass(frozen=True)
class Target:
    """One file to build: where it goes, the globs of its sources, how it is linked."""

    output: str
    sources: tuple[str, ...]
    link: tuple[str, ...] = ("-shared", "-Wl,-Bsymbolic")
    soname: str = ""
    libraries: tuple[str, ...] = ("-ldl", "-lrt")
    cflags: tuple[str, ...] = field(default=())

    def files(self) -> list[Path]:
        """Sources that exist, in a fixed order."""
        return sorted({path for pattern in self.sources for path in HERE.glob(pattern)})

    def headers(self) -> list[Path]:
        """Whatever a source may include: a change there compiles the target again."""
        folders = {path.parent for path in self.files()} | {HERE / "include", HERE / "limiter"}
        return sorted(p for folder in folders for kind in ("*.h", "*.inc", "*.map") for p in folder.glob(kind))

    def version_script(self) -> Path | None:
        """``<stem>.map`` beside the first source, where there is one."""
        script = self.files()[0].parent / (Path(self.output).name.split(".")[0] + ".map")
        return script if script.exists() else None


TARGETS = {
    "limiter": Target("libnbgpu.so", ("limiter/*.c", "limiter/*.S"), soname="libnbgpu.so"),
    "agentlib": Target("libnbgpu_agent.so", ("agentlib/*.c",), soname="libnbgpu_agent.so"),
    "libcuda": Target("sim/libcuda.so.1", ("simgpu/sim_*.c", "simgpu/drv_*.c"), soname="libcuda.so.1", cflags=("-DNBGPU_FAULTS",)),
    "libnvml": Target(
        "sim/libnvidia-ml.so.1", ("simgpu/sim_*.c", "simgpu/nvml_*.c"), soname="libnvidia-ml.so.1", cflags=("-DNBGPU_FAULTS",)
    ),
    "nvidia-smi": Target("sim/nvidia-smi", ("simgpu/smi_*.c",), link=()),
}
REQUIRED = {"libcuda": "simgpu/drv_*.c", "libnvml": "simgpu/nvml_*.c"}  # shared sources alone make no library


def find_compiler(release_machine: str | None) -> list[str] | None:
    """Command line of the C compiler, or None where there is none."""
    if release_machine is not None:
        if importlib.util.find_spec("ziglang") is None:
            return None
        return [sys.executable, "-m", "ziglang", "cc", "-target", f"{release_machine}-linux-gnu.{OLDEST_GLIBC}"]
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    for name in ("gcc", "cc"):
        if shutil.which(name):
            return [name]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc"]
    return None


def command_for(target: Target, compiler: list[str], output: Path) -> list[str]:
    """The one command that compiles and links a target."""
    link = [*target.link]
    if target.soname:
        link.append(f"-Wl,-soname,{target.soname}")
    script = target.version_script()
    if script is not None:
        link.append(f"-Wl,--version-script={script}")
    sources = [str(path) for path in target.files()]
    return [*compiler, *CFLAGS, *target.cflags, f"-I{HERE / 'include'}", *link, "-o", str(output), *sources, *target.libraries]


def fingerprint(target: Target, command: list[str]) -> str:
    """Hash of everything that the output depends on, the compiler's own version left out."""
    digest = hashlib.sha256("\0".join(command).encode())
    for path in (*target.files(), *target.headers()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def build_target(name: str, target: Target, compiler: list[str], out: Path, *, force: bool = False) -> str:
    """Compile one target if needed; say what was done: ``built``, ``fresh`` or ``no sources``."""
    required = REQUIRED.get(name)
    if not target.files() or (required and not list(HERE.glob(required))):
        return "no sources"
    output = out / target.output
    stamp = output.with_name(f".{output.name}.stamp")
    want = fingerprint(target, command_for(target, compiler, Path(target.output)))
    if not force and output.exists() and stamp.exists() and stamp.read_text() == want:
        return "fresh"
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    done = subprocess.run(command_for(target, compiler, partial), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        partial.unlink(missing_ok=True)
        raise SystemExit(f"nbgpu: compiling {target.output} failed\n{done.stderr.strip()}")
    partial.chmod(0o755)
    os.replace(partial, output)  # running programs keep the file they have mapped
    stamp.write_text(want)
    return "built"


def build(names: list[str], *, out: Path = OUT, release_machine: str | None = None, force: bool = False) -> dict[str, str]:
    """Build the named targets (all when empty).

    Returns
    -------
    dict
        What was done, by target name.
    """
    compiler = find_compiler(release_machine)
    if compiler is None:
        what = "ziglang" if release_machine else "a C compiler"
        raise SystemExit(f"nbgpu: needs {what} to build its libraries: install gcc, or run `pip install ziglang`")
    return {name: build_target(name, TARGETS[name], compiler, out, force=force) for name in names or list(TARGETS)}


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Compile nbgpu's C libraries.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"one or more of: {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--release", nargs="?", const=platform.machine(), metavar="MACHINE", help="for old glibc: x86_64 or aarch64")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the results")
    parser.add_argument("--force", action="store_true", help="compile even what is fresh")
    options = parser.parse_args(argv)
    unknown = [name for name in options.targets if name not in TARGETS]
    if unknown:
        parser.error(f"unknown target {unknown[0]}; known: {', '.join(TARGETS)}")
    for name, result in build(options.targets, out=options.out, release_machine=options.release, force=options.force).items():
        print(f"{TARGETS[name].output}: {result}")


if __name__ == "__main__":
    main()
