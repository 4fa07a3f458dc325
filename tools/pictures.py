"""Make the pictures of the docs anew, in both themes: `make pictures` (some: ``ARGS=lab`` or ``ARGS=hub``; another folder: ``--out``).

JupyterLab's are of a real JupyterLab whose slice has an agent of the tests (its numbers are made up), the hub's and ``lab`` of what `make
run` starts, on a simulated GPU. Each file stays below 150 kB. Look at what it made: it checks nothing but that everything came into view.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "lab"), str(ROOT / "tests" / "browser"), str(ROOT / "tools")]

import pictures_hub  # noqa: E402
import pictures_lab  # noqa: E402
from browser_kit import chromium  # noqa: E402

MOST_BYTES = 150_000
PARTS = {"lab": pictures_lab.make, "hub": pictures_hub.make}


def main() -> int:
    """Make the pictures of the named parts, of all when none is named; return 1 where one is too large."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which pictures; all when none is named")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="folder")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ.pop("NBGPU_SOCKET", None)
    large: list[str] = []
    with tempfile.TemporaryDirectory(prefix="nbgpu-pictures-") as shots, chromium(Path(shots)) as browser:
        for part in options.parts or PARTS:
            for path in PARTS[part](browser, options.out):
                size = path.stat().st_size
                print(f"{path.name}: {size / 1000:.0f} kB", flush=True)
                large += [path.name] if size > MOST_BYTES else []
    if large:
        print(f"Larger than {MOST_BYTES // 1000} kB: {', '.join(large)}", file=sys.stderr)
    return 1 if large else 0


if __name__ == "__main__":
    sys.exit(main())
