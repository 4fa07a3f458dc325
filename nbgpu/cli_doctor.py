"""``nbgpu doctor``: run the checks of an installation and say what to do about each that fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Literal

from .cli_common import console, own_slice, print_json
from .errors import NbgpuError
from .logs import one_line
from .models import AgentSlice, Grant, Node
from .words import counted

Level = Literal["ok", "note", "warning", "error"]
IDLE = "a hub or `nbgpu run` starts them when they are needed, `nbgpu serve` now"
_COLORS = {"ok": "green", "note": "dim", "warning": "yellow", "error": "red"}


@dataclass(frozen=True)
class Check:
    """What one look found: `level` ``error`` means that something will not work, ``note`` that a part is not in use here."""

    name: str
    level: Level
    found: str
    remedy: str = ""


@dataclass
class Facts:
    """What earlier checks have learned, for later ones."""

    simulated: bool = False
    node: Node | None = None
    slices: list[AgentSlice] = field(default_factory=lambda: [])
    grants: list[Grant] = field(default_factory=lambda: [])
    pool_answers: bool = False


Look = Callable[[Facts], list[Check]]


def examine(*, as_json: bool, probe: bool, cluster: bool = False) -> int:
    """Run all checks that make sense here, or those of the cluster at hand; print them, return 1 when one is an error."""
    checks = run_checks([_cluster] if cluster else looks(probe=probe))
    worst = "error" if any(check.level == "error" for check in checks) else "ok"
    if as_json:
        print_json({"ok": worst == "ok", "not_running": not_running(checks), "checks": [asdict(check) for check in checks]})
    else:
        show(checks)
    return int(worst == "error")


def _cluster(facts: Facts) -> list[Check]:
    from . import cli_doctor_cluster, cluster_look

    try:
        cluster_look.need_cluster()
        return cli_doctor_cluster.checks(cluster_look.look())
    except NbgpuError as error:
        return [Check("cluster", "error", error.message, "KUBECONFIG must name a kubeconfig of an administrator of the cluster.")]


def looks(*, probe: bool) -> list[Look]:
    """Return the checks for this place: inside a slice only what can be seen from there."""
    from . import cli_doctor_checks as checks
    from . import cli_doctor_probe as probes

    if own_slice() is not None:
        return [checks.python, probes.own_slice_answers, probes.inside]
    plan: list[Look] = [
        checks.python,
        checks.driver,
        checks.libraries,
        checks.runtime,
        checks.agent_and_pool,
        checks.books,
        checks.host,
        checks.hub_parts,
        checks.lab_parts,
        checks.leftovers,
    ]
    return [*plan, probes.probe] if probe else plan


def run_checks(plan: list[Look]) -> list[Check]:
    """Run the looks in order; one that breaks is an error of its own and ends nothing."""
    facts = Facts()
    found: list[Check] = []
    for look in plan:
        try:
            found += look(facts)
        except Exception as error:  # whatever the machine is like, the other checks still help
            what = f"the check itself failed: {type(error).__name__}: {error}"
            found.append(Check(look.__name__.replace("_", " "), "error", what, "Report it."))
    return found


def show(checks: list[Check]) -> None:
    """Print one line a check, the remedies below theirs, and a last line that sums up."""
    from rich.text import Text

    out = console()
    for check in checks:
        out.print(Text.assemble((f"{check.level:>8}", _COLORS[check.level]), one_line(f"  {check.name}: {check.found}")), soft_wrap=True)
        if check.remedy and check.level in ("warning", "error"):
            out.print(f"{'->':>12} {check.remedy}", soft_wrap=True)
    errors, warnings = (sum(check.level == level for check in checks) for level in ("error", "warning"))
    out.print("All is well." if not errors and not warnings else f"{counted(errors, 'error')}, {counted(warnings, 'warning')}.", end="")
    idle = not_running(checks)
    out.print(f" Not running: {' and '.join(idle)}; {IDLE}." if idle else "")


def not_running(checks: list[Check]) -> list[str]:
    """Return which of agent and pool do not run, and need not: nothing here has asked for them yet."""
    if any(check.name == "agent" and check.level == "error" for check in checks):
        return []
    return [check.name for check in checks if check.name in ("agent", "pool") and check.level == "note"]
