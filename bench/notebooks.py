"""Notebooks that come and go all day: how many are refused, or how long they wait, under the service's own placement and queue.

``python bench/notebooks.py [--quick] [--json] [--seeds 10] [--seed 42] [--queue-seeds 2] [--load 0.7 0.8] [--sensitivity]
[--shares 25 30 15 15 15] [--sigma 1.2] [--mean-hours 3] [--swing 0.6] [--devices 200] [--days 16] [--jobs N] [--out FILE]``

* 200 devices in nodes of 8. Requests for 1/8, 1/4, 1/3, 1/2 and 1 of a device (25, 30, 15, 15, 15 % of them) arrive as a Poisson process
  that swings by 60 % a day, with its peak at 15:00; sessions are lognormal with a mean of 3 h, sigma 1.2. 16 days, the first two are not
  counted. Load: mean of what is asked for over the devices. Virtual time.
* Without a queue who does not fit is refused (`refused_percent`, each request weighted with its GPU). With one move a session goes to
  another device where that lets a request in (`refused_percent_moves`, `moves_per_day`): every session counts as one that can be moved.
* With the queue nobody is refused and nobody gives up (`wait_mean_min`, over all requests; `overtaking_most`: how often one was passed).
* What some of those who have to wait are told when they come, in minutes, and how it was (`estimates`): by what they were told, how many,
  of how many percent it was so (`kept_percent`; "usually" means 75), and the medians of what they were told and waited.
* Beside the service's default rule: best fit without anything else, and one device as large as all, which cannot fragment. Their
  published figures (`*_published`) are those of the study that the workload is taken from: the control.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "spawner"), str(ROOT / "bench")]

from notebooks_replay import Found, Workload, no_fragments, with_queue, without_queue  # noqa: E402

from nbgpu_pool.placement import Policy  # noqa: E402
from nbgpu_pool.state import Settings  # noqa: E402

BEST_FIT = Policy(keep_thirds_apart=False, keep_last_idle=False)
PUBLISHED = {0.7: (1.40, 0.66, 0.05), 0.8: (7.16, 5.30, 0.15), 0.9: (12.76, 10.44, 0.15)}
"""By load: best fit, a pool that cannot fragment, most that best fit may be off."""
BARS = {
    0.7: {"refused_percent": 1.18, "refused_percent_moves": 0.83, "wait_mean_min": 0.50, "wait_mean_min_moves": 0.35},
    0.8: {"refused_percent": 6.84, "refused_percent_moves": 5.75},
}
SENSITIVITY: dict[str, dict[str, Any]] = {
    "as documented": {},
    "more small ones": {"shares": (40, 35, 10, 10, 5)},
    "more thirds": {"shares": (15, 15, 45, 15, 10)},
    "lighter tail": {"sigma": 0.6},
    "heavier tail": {"sigma": 1.8},
    "short sessions": {"mean_hours": 1.0},
    "long sessions": {"mean_hours": 8.0},
    "no daily swing": {"swing": 0.0},
    "40 devices": {"devices": 40},
}

Job = tuple[str, Workload, float, int]


def replay(job: Job) -> Found:
    """Replay once."""
    kind, workload, load, seed = job
    kinds: dict[str, Callable[[], Found]] = {
        "no fragments": lambda: no_fragments(workload, load, seed),
        "best fit": lambda: without_queue(workload, load, seed, BEST_FIT),
        "default": lambda: without_queue(workload, load, seed, Policy()),
        "moves": lambda: without_queue(workload, load, seed, Policy(), moves=True),
        "queue best fit": lambda: with_queue(workload, load, seed, Settings(policy=BEST_FIT)),
        "queue": lambda: with_queue(workload, load, seed, Settings()),
        "queue moves": lambda: with_queue(workload, load, seed, Settings(), moves=True),
    }
    return kinds[kind]()


PLAIN = ["no fragments", "best fit", "default", "moves"]
QUEUED = ["queue best fit", "queue", "queue moves"]


def by_size(replays: list[Found]) -> dict[str, float]:
    """Return the refused percent of each size."""
    sizes = sorted(replays[0].asked_milli)
    asked = {size: sum(one.asked_milli[size] for one in replays) for size in sizes}
    return {str(size): round(100 * sum(one.refused_milli[size] for one in replays) / asked[size], 3) for size in sizes}


ESTIMATES_MIN = (5, 15, 30, 60, 120, float("inf"))


def estimates(replays: list[Found]) -> dict[str, dict[str, Any]]:
    """Return what was told of waits beside how they were, by what was told."""
    pairs = [pair for one in replays for pair in one.estimates]
    known = [(told / 60, waited / 60) for told, waited in pairs if told is not None]
    out: dict[str, dict[str, Any]] = {"unknown": {"count": len(pairs) - len(known)}}
    for low, high in pairwise((-1.0, *ESTIMATES_MIN)):
        among = [pair for pair in known if low < pair[0] <= high]
        if among:
            out["more" if high == ESTIMATES_MIN[-1] else f"<= {high}"] = {
                "count": len(among),
                "kept_percent": round(100 * statistics.mean(waited <= told for told, waited in among), 1),
                "told_median_min": round(statistics.median(told for told, _ in among), 1),
                "waited_median_min": round(statistics.median(waited for _, waited in among), 1),
            }
    return out


def measured(found: dict[str, list[Found]], load: float, days: int) -> dict[str, Any]:
    """Return the figures of one load; `days` are counted."""
    out: dict[str, Any] = {}
    names = {"default": "refused_percent", "moves": "refused_percent_moves"}
    names |= {"best fit": "refused_percent_best_fit", "no fragments": "refused_percent_no_fragments"}
    for kind, name in names.items():
        each = [one.refused_percent for one in found[kind]]
        out[name] = round(statistics.mean(each), 3)
        out[f"{name}_by_seed"] = [round(one, 3) for one in each]
    each = out["refused_percent_best_fit_by_seed"]
    out["refused_percent_best_fit_standard_error"] = round(statistics.stdev(each) / len(each) ** 0.5, 3) if len(each) > 1 else None
    out["moves_per_day"] = round(statistics.mean(one.moves for one in found["moves"]) / days, 2)
    out["refused_by_size"] = {kind: by_size(found[kind]) for kind in names}
    for kind, name in {"queue": "", "queue moves": "_moves", "queue best fit": "_best_fit"}.items():
        if found.get(kind):
            out[f"wait_mean_min{name}"] = round(statistics.mean(one.wait_mean_min for one in found[kind]), 3)
            out[f"overtaking_most{name}"] = max(one.overtaking_most for one in found[kind])
    if found.get("queue"):
        out["estimates"] = estimates(found["queue"])
    if found.get("queue moves"):
        out["moves_per_day_queue"] = round(statistics.mean(one.moves for one in found["queue moves"]) / days, 2)
    if load in PUBLISHED:
        out["refused_percent_best_fit_published"], out["refused_percent_no_fragments_published"], _ = PUBLISHED[load]
    return out


def judge(load: float, found: dict[str, Any]) -> list[str]:
    """Return what missed its bar."""
    missed = [
        f"{name} {found[name]:g} > {bar:g} at {load:g}" for name, bar in BARS.get(load, {}).items() if name in found and found[name] > bar
    ]
    if load in PUBLISHED:
        published, _, most = PUBLISHED[load]
        off = found["refused_percent_best_fit"] - published
        if abs(off) > most:
            error = found["refused_percent_best_fit_standard_error"]
            missed.append(f"CONTROL at {load:g}: best fit {off:+.2f} off its published {published:g} (standard error of the seeds {error})")
    return missed


def run_all(jobs: list[Job], processes: int) -> dict[Job, Found]:
    """Replay all, the longest first."""
    ordered = sorted(jobs, key=lambda job: (-(job[0] in QUEUED), -job[2], -len(job[0])))
    if processes == 1:
        return {job: replay(job) for job in ordered}
    with ProcessPoolExecutor(processes) as pool:
        return dict(zip(ordered, pool.map(replay, ordered), strict=True))


def show(found: dict[str, Any]) -> None:
    """Print the tables."""
    print(f"{'load':<6}{'GPU-weighted refusals %':<26}{'':>10}   {'mean wait, min':<18}")
    for load, one in found["loads"].items():
        rows = [
            ("no fragments", "_no_fragments", ""),
            ("best fit", "_best_fit", "_best_fit"),
            ("default", "", ""),
            ("one move", "_moves", "_moves"),
        ]
        for name, refused, waits in rows:
            wait = one.get(f"wait_mean_min{waits}", "") if name != "no fragments" else ""
            published = one.get(f"refused_percent{refused}_published", "")
            print(f"{load:<6}{name:<16}{one[f'refused_percent{refused}']:>8.2f}  {f'({published})' if published else '':<10}{wait:>10}")
        for told, of in one.get("estimates", {}).items():
            if "kept_percent" in of:
                print(
                    f"      told {told + ' min':<10}{of['count']:>6} times: {of['kept_percent']:g} % kept, "
                    f"median told {of['told_median_min']:g}, waited {of['waited_median_min']:g} min"
                )
        print(f"      {one['moves_per_day']} moves a day; passed at most {one.get('overtaking_most', '-')} times")
    for name, loads in found.get("sensitivity", {}).items():
        print(
            f"  {name:<16} "
            + "; ".join(f"{load}: best fit {a:.2f}, default {b:.2f}, one move {c:.2f}" for load, (a, b, c) in loads.items())
        )
    for line in found["missed"]:
        print(f"  MISSED {line}")


def main(words: list[str]) -> int:
    """Measure; 1 when a bar is missed."""
    usual = Workload()
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="two seeds, one with the queue, 5 days")
    options.add_argument("--json", action="store_true", help="the last line is one JSON object")
    options.add_argument("--seeds", type=int, default=10)
    options.add_argument("--seed", type=int, default=42, help="the first")
    options.add_argument("--queue-seeds", type=int, default=2, help="how many of them also with the queue, which takes longer")
    options.add_argument("--load", type=float, nargs="+", default=[0.7, 0.8])
    options.add_argument("--sensitivity", action="store_true", help="also with other mixes, sessions and pools, three seeds, no queue")
    options.add_argument("--shares", type=int, nargs=len(usual.sizes_milli), default=list(usual.shares))
    options.add_argument("--sigma", type=float, default=usual.sigma)
    options.add_argument("--mean-hours", type=float, default=usual.mean_hours)
    options.add_argument("--swing", type=float, default=usual.swing)
    options.add_argument("--devices", type=int, default=usual.devices)
    options.add_argument("--days", type=int, default=usual.days, help="the first two are not counted")
    options.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    options.add_argument("--out", type=Path, help="where the JSON is also written")
    chosen = options.parse_args(words)
    begun = time.monotonic()
    days, count, queued = (5, 2, 1) if chosen.quick else (chosen.days, max(1, chosen.seeds), chosen.queue_seeds)
    workload = Workload(
        shares=tuple(chosen.shares),
        devices=chosen.devices,
        swing=chosen.swing,
        mean_hours=chosen.mean_hours,
        sigma=chosen.sigma,
        days=days,
    )
    seeds = [chosen.seed + number for number in range(count)]
    jobs: list[Job] = [(kind, workload, load, seed) for kind in PLAIN for load in chosen.load for seed in seeds]
    jobs += [(kind, workload, load, seed) for kind in QUEUED for load in chosen.load for seed in seeds[:queued]]
    others = {name: replace(workload, **changes) for name, changes in SENSITIVITY.items()} if chosen.sensitivity else {}
    jobs += [(kind, other, load, seed) for other in others.values() for kind in PLAIN[1:] for load in chosen.load for seed in seeds[:3]]
    done = run_all(list(dict.fromkeys(jobs)), chosen.jobs)

    def of(kind: str, which: Workload, load: float) -> list[Found]:
        return [done[kind, which, load, seed] for seed in seeds if (kind, which, load, seed) in done]

    found: dict[str, Any] = {
        "benchmark": "notebooks",
        "workload": asdict(workload),
        "seeds": seeds,
        "queue_seeds": seeds[:queued],
        "fairness": asdict(Settings().fairness),
        "loads": {
            f"{load:g}": measured({kind: of(kind, workload, load) for kind in PLAIN + QUEUED}, load, days - workload.warm_days)
            for load in chosen.load
        },
    }
    if others:
        found["sensitivity"] = {
            name: {
                f"{load:g}": [round(statistics.mean(one.refused_percent for one in of(kind, other, load)[:3]), 3) for kind in PLAIN[1:]]
                for load in chosen.load
            }
            for name, other in others.items()
        }
    documented = replace(usual, days=days) == workload and not chosen.quick
    found["missed"] = [line for load in chosen.load for line in judge(load, found["loads"][f"{load:g}"])] if documented else []
    found["machine"] = {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
    found["seconds"] = round(time.monotonic() - begun, 1)
    show(found)
    if chosen.out is not None:
        chosen.out.write_text(json.dumps(found, indent=1) + "\n")
    if chosen.json:
        print(json.dumps(found))
    return 1 if found["missed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
