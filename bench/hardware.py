"""What holds on a real NVIDIA GPU: one command, under ten minutes, a report to read (Markdown) and to work with (JSON).

``python3 bench/hardware.py [--out DIR] [--budget 540] [--device 0] [--only NAMES] [--hami-core PATH] [--simulated]``
``python3 bench/hardware.py --prepare [--python 3.12]``

It measures whether what the design takes for granted of the driver is so, how exactly slices get their shares, whether memory can be
overshot, what the limiter costs, and what happens when programs are killed; beside it the same work under the driver alone and, where
its library is named, HAMi-core. It needs Python and nbgpu's compiled libraries; with nbgpu's own packages it starts ``nbgpu agent`` and
``nbgpu pool`` and every program by ``nbgpu run``, as users do. It changes no setting of the machine. What cannot be measured here is
skipped by name, with the reason, and the report is written after every section: a run that is cut short still leaves its data.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from hwkit import ROOT

for folder in (ROOT, ROOT / "nodeagent", ROOT / "spawner"):
    sys.path.insert(0, str(folder))

from hwkit import prepare, report  # noqa: E402
from hwkit.kit import Alarm, Kit, Section, Skip, TimeOver  # noqa: E402
from hwkit.plan import SECTIONS  # noqa: E402

LAST_SECONDS = 15.0
"""How long after the budget what still runs may take before everything is ended."""
LEAST_SECONDS = 3.0


def run_section(kit: Kit, section: Section, seconds: float) -> dict[str, object]:
    """Run one section within its time; return its entry of the report."""
    begun = time.monotonic()
    kit.end = begun + seconds
    kit.say(f"{section.name}: {section.title} (at most {seconds:.0f} s)")
    entry: dict[str, object] = {"name": section.name, "title": section.title, "status": "done", "reason": "", "results": {}}
    try:
        with Alarm(seconds):
            entry["results"] = section.run(kit)
    except Skip as error:
        entry |= {"status": "skipped", "reason": str(error)}
    except TimeOver:
        entry |= {"status": "cut", "reason": f"not done within {seconds:.0f} s"}
    except Exception as error:
        entry |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    kit.hub.end_all()
    if not entry["results"]:
        entry["results"] = kit.results.pop(section.name, {})  # what it had when it ended
    entry["seconds"] = round(time.monotonic() - begun, 1)
    if entry["status"] != "done":
        kit.say(f"  {entry['status']}: {entry['reason']}")
    return entry


def stop_at(deadline: float, kit: Kit) -> None:
    """End everything at a moment, whatever it is waiting for; the report is there already."""

    def wait() -> None:
        time.sleep(max(0.0, deadline - time.monotonic()))
        kit.say("time is over: ending at once")
        kit.kill()
        os._exit(3)

    threading.Thread(target=wait, daemon=True).start()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / ".nbgpu" / "hardware-report", help="folder of hardware.json and hardware.md")
    parser.add_argument("--budget", type=float, help="seconds for all (default: 540; simulated 45)")
    parser.add_argument("--device", type=int, default=0, help="which GPU, as nvidia-smi counts (default 0)")
    parser.add_argument("--only", default="", help=f"sections with commas between: {', '.join(s.name for s in SECTIONS)}")
    parser.add_argument("--hami-core", type=Path, metavar="PATH", help="HAMi-core's libvgpu.so: the same work under it too")
    parser.add_argument("--simulated", action="store_true", help="on the simulated driver, short: this tests the kit, not a GPU")
    parser.add_argument("--prepare", action="store_true", help="only make what the kit needs on a machine without compiler and network")
    parser.add_argument(
        "--python", metavar="X.Y", default=prepare.THIS_PYTHON, help="with --prepare: that machine's Python (default: as here)"
    )
    options = parser.parse_args(arguments)
    unknown = set(filter(None, options.only.split(","))) - {section.name for section in SECTIONS}
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}; there are: {', '.join(s.name for s in SECTIONS)}")
    if options.hami_core and not options.hami_core.is_file():
        parser.error(f"{options.hami_core} is no file")
    options.budget = options.budget or (45.0 if options.simulated else 540.0)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the sections in order of worth; 0 unless the report could not be written."""
    options = parse(arguments)
    if options.prepare:
        return prepare.prepare(options.python)
    prepare.use_packages()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "hardware.log").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="nbgpu-hw-", dir="/tmp") as name:
        hami = options.hami_core.resolve() if options.hami_core else None
        kit = Kit(Path(name), options.device, options.simulated, hami, options.out, options.budget)
        stop_at(kit.started + options.budget + LAST_SECONDS, kit)
        wanted = [section for section in SECTIONS if not options.only or section.name in ("machine", *options.only.split(","))]
        entries: list[dict[str, object]] = []
        try:
            for section in wanted:
                left = kit.started + options.budget - time.monotonic()
                seconds = min(left, section.seconds)
                if left < LEAST_SECONDS:
                    entries.append(report.left_out(section, "the time was over"))
                elif no_gpu(entries):
                    entries.append(report.left_out(section, str(entries[0]["reason"])))
                else:
                    entries.append(run_section(kit, section, seconds))
                report.write(kit, entries, complete=section is wanted[-1])
        except KeyboardInterrupt:
            kit.say("ended from outside; the report has the sections before")
            return 130
        finally:
            kit.close()
    print(f"Report: {options.out / 'hardware.md'} (raw data: hardware.json beside it)")
    return 0


def no_gpu(entries: list[dict[str, object]]) -> bool:
    """Whether the first section found nothing to measure."""
    return bool(entries) and entries[0]["name"] == "machine" and entries[0]["status"] != "done"


if __name__ == "__main__":
    raise SystemExit(main())
