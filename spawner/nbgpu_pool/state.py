"""What goes in and out of the pool's core beside requests: its settings, what a ledger has, what the shell is to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from nbgpu.models import Device, Slice

from .giveback import GiveBack
from .idle import IdlePolicy
from .placement import DEFAULT_POLICY, Policy
from .queue import Fairness
from .quotas import Quotas
from .sessions import GUESS_SECONDS
from .shapes import Part
from .windows import Window


@dataclass(frozen=True)
class Settings:
    """What an admin can set, in the core's units."""

    quotas: Quotas = field(default_factory=Quotas)
    fairness: Fairness = field(default_factory=Fairness)
    reservation_ttl_seconds: float = 120.0
    queue_ttl_seconds: float = 300.0
    """A queued request that nobody has asked for so long is dropped."""
    session_guess_seconds: float = GUESS_SECONDS
    """How long a session is taken to last until enough have ended."""
    smallest_bytes: int = 0
    """Least memory of a slice."""
    queue_total: int = 1000
    queue_per_user: int = 10
    policy: Policy = DEFAULT_POLICY
    idle: IdlePolicy = field(default_factory=IdlePolicy)
    give_back: GiveBack = field(default_factory=GiveBack)
    windows: tuple[Window, ...] = ()
    """Times at which devices are kept for a group."""
    start_seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    """How long a node takes to start, by the name of its group (`coming`)."""


@dataclass(frozen=True)
class Seen:
    """A slice in a ledger's snapshot."""

    slice: Slice
    """With the limits that are in force."""
    state: str
    """``prepared``, ``running`` or ``releasing``."""
    age_seconds: float = 0.0
    wanted: Slice | None = None
    """With the limits that the ledger was told and has not brought in force."""
    refused: bool = False
    """The node has looked at `wanted` and said no."""
    placed: bool = True
    """It has its devices; False where that is still Kubernetes' to decide."""
    refusal: str = ""
    """Why no node is found for its pod, in the scheduler's words."""
    full: Slice | None = None
    """With the limits that a parked slice comes back to; None: it is not parked."""
    idle_seconds: float | None = None
    """How long it has been idle; None: it cannot be parked."""
    unused_seconds: float | None = None
    """How long nobody has used it, whether or not it could be parked; None: unknown."""
    wanted_seconds: float | None = None
    """How long a parked slice has wanted to come back; None: it does not."""
    parking: bool = False
    """It is on its way there at this moment."""
    used_bytes: int | None = None
    """GPU memory that it uses in all; None: unknown."""
    keeps: bool = False
    """`wanted` is in force, and it still holds more memory than that: `slice` counts it until it is free."""


@dataclass(frozen=True)
class Snapshot:
    """All that a ledger has, at one moment."""

    begun: int
    """The core's mark when the ledger was asked."""
    devices: Sequence[Device]
    slices: Sequence[Seen]
    less: Mapping[str, Part] = field(default_factory=dict[str, Part])
    """By device: how much less is free than the limits in force say, as the node does not offer it (yet)."""
    coming: Sequence[Device] = ()
    """Devices of nodes that would be started where they are asked for (`nbgpu.claims.is_coming`)."""

    known: frozenset[str] | None = None
    """Ids of all slices, where `slices` are only those that may have changed since the snapshot before."""
    whole: bool = True
    """The ledger was not followed before it: what it had said is forgotten."""
    unusable: Mapping[str, str] = field(default_factory=dict[str, str])
    """By device that is not healthy: why, in words, where the ledger knows."""

    @cached_property
    def ids(self) -> frozenset[str]:
        """Ids of the slices that there are."""
        return self.known if self.known is not None else frozenset(seen.slice.slice_id for seen in self.slices)


@dataclass
class Effects:
    """What the shell has to do after a command."""

    releases: list[str] = field(default_factory=list[str])
    """Slices to ask back from the ledger, again and again until it has answered."""
    resizes: list[str] = field(default_factory=list[str])
    """Slices whose wanted limits the ledger has to be told, again and again until it has answered."""
    parks: list[str] = field(default_factory=list[str])
    """Slices that the ledger is to be asked to park, once."""
    moves: list[str] = field(default_factory=list[str])
    """Slices to move to another node, again and again until the ledger has answered."""
    asked: list[str] = field(default_factory=list[str])
    """Slices that somebody is to give back: `Held.asks` says for whom, by when, and who would have to end them."""
    granted: list[str] = field(default_factory=list[str])
    ended: list[str] = field(default_factory=list[str])
