"""Every check of style and types, one line each; all run, whatever fails (`make lint`, `make format`)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAB = ROOT / "labextension"
GENERATED = "nbgpu_layout.h"
SHOWN_LINES = 40


def c_files() -> list[Path]:
    """Return the C sources and headers that people write."""
    return [path for path in sorted((ROOT / "nodeagent").rglob("*.[ch]")) if "_lib" not in path.parts and path.name != GENERATED]


def npm(script: str) -> list[list[str]]:
    """Return the command of one of the front end's npm scripts, where it has it."""
    package = LAB / "package.json"
    return [["npm", "run", "--silent", script]] if package.is_file() and f'"{script}"' in package.read_text() else []


def checks(write: bool) -> dict[str, tuple[list[list[str]], Path]]:
    """Return the commands of each check and where they run."""
    python = [sys.executable, "-m"]
    sources = [str(path) for path in c_files()]
    plan = {
        "ruff": ([[*python, "ruff", "check", *(["--fix"] if write else []), "."]], ROOT),
        "ruff format": ([[*python, "ruff", "format", *([] if write else ["--check"]), "."]], ROOT),
        "front end": (npm("format" if write else "lint"), LAB),
    }
    if sources:
        plan["clang-format"] = ([["clang-format", *(["-i"] if write else ["--dry-run", "-Werror"]), *sources]], ROOT)
    if not write:
        plan["pyright"] = ([[*python, "pyright"]], ROOT)
        if (ROOT / "nodeagent" / "build.py").is_file():
            with_warnings = [sys.executable, str(ROOT / "nodeagent" / "build.py"), "--out", str(ROOT / ".nbgpu" / "lint")]
            plan["C warnings"] = ([with_warnings], ROOT)
    return {name: entry for name, entry in plan.items() if entry[0]}


def main() -> int:
    """Run the checks; return 1 when one failed."""
    env = dict(os.environ, PYTHONPATH=str(ROOT / "nodeagent"), PYRIGHT_PYTHON_IGNORE_WARNINGS="1")
    failed: list[str] = []
    for name, (commands, where) in checks("--write" in sys.argv[1:]).items():
        started = time.monotonic()
        for command in commands:
            done = subprocess.run(command, cwd=where, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                failed.append(name)
                lines = done.stdout.rstrip().splitlines()
                print("\n".join(lines[:SHOWN_LINES]))
                if len(lines) > SHOWN_LINES:
                    print(f"... and {len(lines) - SHOWN_LINES} lines more")
        print(f"{'FAILED' if name in failed else 'ok':>6}  {name} ({time.monotonic() - started:.1f} s)", flush=True)
    if failed:
        print(f"Failed: {', '.join(failed)}. `make format` mends what a formatter can.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
