"""The report: hardware.json (everything) and hardware.md (to read), written anew after every section."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from .facts import FACTS
from .kit import Kit, Section

VERSION = 1
PLACES = ("nbgpu", "driver alone", "HAMi-core")
WORDS = {"holds": "holds", "differs": "**DIFFERS**", "unknown": "not known", "skipped": "skipped"}


def left_out(section: Section, reason: str) -> dict[str, Any]:
    """Return the entry of a section that was not run."""
    return {"name": section.name, "title": section.title, "status": "skipped", "reason": reason, "results": {}, "seconds": 0.0}


def build(kit: Kit, sections: list[dict[str, Any]], complete: bool) -> dict[str, Any]:
    """Return the whole report as plain data."""
    return {
        "report": "nbgpu hardware",
        "version": VERSION,
        "simulated": kit.simulated,
        "complete": complete,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": [word if word.startswith("-") else word.rpartition("/")[2] for word in sys.argv],  # folders may name a user
        "seconds": round(time.monotonic() - kit.started, 1),
        "budget_seconds": kit.budget,
        "nbgpu_by": kit.nbgpu_how,
        "machine": kit.machine,
        "sections": sections,
        "facts": all_facts(kit.facts, sections),
        "comparison": kit.comparison,
    }


def all_facts(measured: list[dict[str, Any]], sections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return every fact in order, with the reason where one was not measured."""
    known = {fact["name"]: fact for fact in measured}
    entries = {entry["name"]: entry for entry in sections}
    found: list[dict[str, Any]] = []
    for name, (section, source, claim) in FACTS.items():
        entry = entries.get(section)
        why = "not asked for" if entry is None else entry["reason"] or "the section did not get that far"
        skipped = {"name": name, "source": source, "claim": claim, "verdict": "skipped", "measured": why, "detail": {}}
        found.append(known.get(name, skipped))
    return found


def write(kit: Kit, sections: list[dict[str, Any]], complete: bool) -> None:
    """Write both files; whoever reads one meanwhile finds a whole one."""
    data = build(kit, sections, complete)
    for name, text in (("hardware.json", json.dumps(data, indent=1, default=str)), ("hardware.md", markdown(data))):
        _replace(kit.out / name, text + "\n")


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, path)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " / ".join(_cell(one) for one in value)
    return str(value).replace("|", "\\|").replace("\n", " ")


def _figures(figures: dict[str, Any] | None) -> str:
    if not figures:
        return ""
    return ", ".join(f"{name.replace('_', ' ')} {_cell(value)}" for name, value in figures.items() if value is not None)


def _ran_on(data: dict[str, Any]) -> tuple[str, str]:
    """Return what a run was on, for the title, and what that means."""
    if data["simulated"]:
        return "hardware (*simulated*)", "simulated: this run tests the kit, its figures say nothing of a GPU"
    first = next(iter(data["sections"]), None)
    if first is None or first["status"] != "done":
        return "a machine without a GPU to measure", "no GPU was measured: the first section says why"
    return "hardware", "real hardware"


def markdown(data: dict[str, Any]) -> str:
    """Return the report for people."""
    machine = data["machine"]
    whole = "" if data["complete"] else " **Not complete**: the run was cut or still goes on."
    kind, what = _ran_on(data)
    lines = [
        f"# nbgpu on {kind}",
        "",
        f"{data['written']}, {data['seconds']} s, {what}.{whole}",
        "",
        "| the machine | |",
        "|---|---|",
        *[f"| {name.replace('_', ' ')} | {_cell(value)} |" for name, value in machine.items() if name != "notes"],
        *([f"| nbgpu by | {_cell(data['nbgpu_by'])} |"] if data["nbgpu_by"] else []),
        "",
        *[f"* {note}" for note in machine.get("notes", [])],
        "",
        "## What the design takes for granted",
        "",
        "| fact | | measured | where it is claimed |",
        "|---|---|---|---|",
        *[f"| {_cell(f['claim'])} | {WORDS[f['verdict']]} | {_cell(f['measured'])} | {f['source']} |" for f in data["facts"]],
        "",
        "## Side by side",
        "",
        f"| workload | {' | '.join(PLACES)} |",
        f"|---|{'---|' * len(PLACES)}",
        *[f"| {_cell(row['workload'])} | {' | '.join(_figures(row.get(place)) for place in PLACES)} |" for row in data["comparison"]],
        "",
        "## Sections",
        "",
        "| section | | seconds | why not |",
        "|---|---|---|---|",
        *[
            f"| {entry['name']}: {entry['title']} | {entry['status']} | {entry['seconds']} | {_cell(entry['reason'])} |"
            for entry in data["sections"]
        ],
        "",
        "Raw data of every section: `hardware.json`.",
    ]
    return "\n".join(lines)
