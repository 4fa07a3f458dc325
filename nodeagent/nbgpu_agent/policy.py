"""What the watchdog does about what it finds: a policy of the installation. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from nbgpu.errors import InvalidValue

Action = Literal["event", "suspend", "kill"]
Kind = Literal["unlimited", "overhead", "over-limit", "over-share"]
"""What may be acted on. A process of no slice (`foreign`) is nobody's here: it is told and never touched."""
ACTIONS: tuple[Action, ...] = ("event", "suspend", "kill")
KINDS: tuple[Kind, ...] = ("unlimited", "overhead", "over-limit", "over-share")
_ACTION_OF: dict[str, Action] = {one: one for one in ACTIONS}
_KIND_OF: dict[str, Kind] = {one: one for one in KINDS}


@dataclass(frozen=True)
class Policy:
    """What is done, by kind of finding.

    Parameters
    ----------
    grace_seconds : float or None
        How long a process stays suspended before it is killed; None = for ever.
    resume : bool
        Let a suspended process go on once what it was suspended for is over.
    escalate : bool
        After three actions on a slice within a minute kill all its processes.
    owner_resumes : bool
        The slice's owner may let a suspended process go on, as an administrator may.
    """

    actions: Mapping[Kind, Action] = field(default_factory=dict[Kind, Action])
    grace_seconds: float | None = None
    resume: bool = True
    escalate: bool = False
    owner_resumes: bool = False

    def action(self, kind: Kind) -> Action:
        """Return what is done about findings of a kind."""
        return self.actions.get(kind, "event")

    @property
    def acts(self) -> bool:
        """Whether anything is ever done."""
        return any(action != "event" for action in self.actions.values())

    @property
    def suspends(self) -> bool:
        """Whether anything is suspended."""
        return "suspend" in self.actions.values()


def parse_actions(text: str, name: str = "--watchdog") -> dict[Kind, Action]:
    """Return the actions of ``kill`` (for all kinds) or ``unlimited=kill,over-limit=suspend``; InvalidValue for anything else."""
    found: dict[Kind, Action] = {}
    for word in filter(None, (part.strip() for part in text.split(","))):
        named, equals, wanted = word.rpartition("=")
        action = _ACTION_OF.get(wanted)
        kinds: list[Kind] = list(_KIND_OF.values()) if not equals else [_KIND_OF[named]] if named in _KIND_OF else []
        if named == "foreign" and action == "event":
            continue
        if action is None or not kinds:
            allowed = f"KIND=ACTION with commas between (kinds: {', '.join(KINDS)}), or one ACTION for all ({', '.join(ACTIONS)})"
            raise InvalidValue(name, word, allowed)
        for kind in kinds:
            found[kind] = action
    return found
