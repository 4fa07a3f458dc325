"""Run every benchmark of bench/, quick unless told otherwise, and print the tables (`make bench ARGS="limiter spawn"`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent.parent / "bench"


def main(words: list[str]) -> int:
    """Run the named benchmarks (all when none is named); ``--full`` takes the long form. Return 1 when one failed."""
    full = "--full" in words
    names = [word for word in words if not word.startswith("-")]
    known = {path.stem: path for path in sorted(BENCH.glob("*.py")) if not path.stem.startswith("_") and "--quick" in path.read_text()}
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"No benchmark {', '.join(unknown)}; there are: {', '.join(known) or 'none'}.", file=sys.stderr)
        return 2
    failed: list[str] = []
    for name in names or known:
        print(f"\n== {name} ==", flush=True)
        if subprocess.run([sys.executable, str(known[name]), *([] if full else ["--quick"])]).returncode:
            failed.append(name)
    if failed:
        print(f"\nFailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
