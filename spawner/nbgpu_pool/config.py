"""The pool's configuration file (YAML or JSON): a closed model with clear errors.

Example
-------
::

    reservation_ttl_seconds: 120
    session_guess_seconds: 3600           # how long servers run here, until enough have ended to know: for estimates
    smallest_memory: 512 MiB              # less is refused: no program could start in such a slice
    quotas:
      default: {limit: 1}                 # each user, all servers together, in GPUs
      users:
        ada: {limit: 2, memory: "120 GiB", guarantee: 1/2}
      groups:
        students: {limit: 4, guarantee: 1, per_user: 1/4}
    placement: {rule: best-fit}           # or `value`: docs/placement.md
    queue: {total: 1000, per_user: 5, overtake_count: 200, overtake_seconds: 7200, order: arrival}
    idle: {after_seconds: 1800, least_memory: 4 GiB, protect_groups: [staff]} # one machine: docs/idle.md
    give_back: {end_idle_after_seconds: 1800, notice_seconds: 300} # of guarantees with `lend: true`: docs/quotas.md
    reservations:                         # classes: docs/quotas.md
      - {name: biology, group: biology, count: 40, share: 1/8, days: [tue], from: 9:00, to: 11:00, time_zone: Europe/Berlin}
    coming:                               # Kubernetes: nodes that an autoscaler starts when a pod asks for one
      - {name: a100, model: NVIDIA A100-SXM4-80GB, devices: 8, memory: 80 GiB, reserve: 2 GiB, nodes: 4, labels: {pool: a100}}
    tokens:                               # only for --listen; the Unix socket needs none
      - {role: hub, hub: jupyterhub, file: /etc/nbgpu/hub.token}
      - {role: read, env: NBGPU_READ_TOKEN}
      - {role: hub, hub: jhub, namespaces: [jhub, "jhub-*"], file: /etc/nbgpu/jhub.token} # on Kubernetes each hub's names them
"""

from __future__ import annotations

import math
import os
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from nbgpu.claims import FOREIGN_HUB
from nbgpu.errors import InvalidValue, NbgpuError
from nbgpu.quantities import MIB, WHOLE_MILLI, parse_memory

from .auth import Principal, Token
from .coming import Coming
from .giveback import GiveBack
from .idle import IdlePolicy
from .placement import Policy
from .queue import Fairness
from .quotas import Limits, Quotas
from .state import Settings
from .windows import DAYS, Window
from .yaml_lines import line_of, node_of, repeated

_GPUS = "a number of GPUs from 0 to 100000, such as 0.5, 1/4, 25% or 2"
MOST_TOLD = 20
"""Mistakes that one message names."""


class ConfigError(NbgpuError):
    """The configuration file cannot be used."""

    code = "config"
    status = 500


def _gpus(value: object) -> object:
    """Return an amount of GPUs, which may be above 1, as milli-GPU."""
    if value is None:
        return None
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        text = str(value).strip()
        exact = Fraction(text[:-1]) / 100 if text.endswith("%") else Fraction(text)
        if not 0 <= exact <= 100_000:
            raise ValueError
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"it must be {_GPUS}") from None
    return math.floor(exact * WHOLE_MILLI)


def _share(value: object) -> object:
    """Return a share of one GPU, as milli-GPU."""
    try:
        milli = _gpus(value)
    except ValueError:
        milli = None
    if not isinstance(milli, int) or not 1 <= milli <= WHOLE_MILLI:
        raise ValueError("it must be a share of one GPU, above 0 and at most 1, such as 1/8, 0.125 or 12.5%")
    return milli


def _memory(value: object) -> object:
    if value is None:
        return None
    try:
        return parse_memory(value)
    except InvalidValue as error:
        raise ValueError(error.message.partition("; ")[2].rstrip(".")) from None


def _minutes(value: object) -> object:
    """Return minutes since midnight; YAML reads 9:00 without quotation marks as 540 by itself."""
    hours, colon, minutes = value.partition(":") if isinstance(value, str) else ("", "", "")
    if colon and hours.isdecimal() and minutes.isdecimal() and len(minutes) == 2 and int(minutes) < 60:
        value = int(hours) * 60 + int(minutes)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 24 * 60:
        raise ValueError("it must be a time of the day from 0:00 to 24:00, such as 9:00")
    return value


def _zone(value: object) -> object:
    try:
        return ZoneInfo(str(value))
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError("it must be a time zone as the IANA names them, such as Europe/Berlin") from None


_KINDS = {
    "extra_forbidden": "there is no such key here",
    "missing": "it is missing",
    "model_type": "it must be keys and values, such as {key: value}",
    "model_attributes_type": "it must be keys and values, such as {key: value}",
    "dict_type": "it must be keys and values, such as {key: value}",
    "list_type": "it must be a list, such as [a, b]",
}
"""By Pydantic's name of a mistake, where it says it in words of its own."""

Gpus = Annotated[int | None, BeforeValidator(_gpus)]
Share = Annotated[int, BeforeValidator(_share)]
Memory = Annotated[int | None, BeforeValidator(_memory)]
Seconds = Annotated[float, Field(gt=0, le=1e7)]


class Closed(BaseModel):
    """A part of the file; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DefaultQuota(Closed):
    """What each user may hold."""

    limit: Gpus = None
    memory: Memory = None


class UserQuota(DefaultQuota):
    """What one user may hold, and what is kept free for them."""

    guarantee: Gpus = 0
    lend: bool = False
    """Others may use what the guarantee keeps while nobody it is kept for waits for it; it is then taken back (`give_back`)."""

    @model_validator(mode="after")
    def _within(self) -> UserQuota:
        if self.limit is not None and (self.guarantee or 0) > self.limit:
            raise ValueError("guarantee must not be above limit: nobody can hold that much")
        return self


class GroupQuota(UserQuota):
    """What a group's members may hold together, what is kept free for them, and what each may hold."""

    weight: Annotated[int, Field(ge=1, le=1000)] = 1
    """Where the queue goes by shares (`queue: {order: fair}`): 2 = twice as much is as fair."""
    per_user: Gpus = None
    per_user_memory: Memory = None


class QuotaConfig(Closed):
    """All quotas."""

    default: DefaultQuota = DefaultQuota()
    users: dict[str, UserQuota] = {}
    groups: dict[str, GroupQuota] = {}


class QueueConfig(Closed):
    """Bounds of the queue."""

    total: Annotated[int, Field(ge=0, le=100_000)] = 1000
    per_user: Annotated[int, Field(ge=0, le=100_000)] = 10
    overtake_count: Annotated[int, Field(ge=0, le=1_000_000)] = 200
    """How often a request that does not fit may be overtaken."""
    overtake_seconds: Annotated[float, Field(ge=0, le=1e7)] = 7200.0
    """And for how long."""
    order: Literal["arrival", "fair"] = "arrival"
    """``fair``: of those who wait, the group that holds least comes first (docs/quotas.md)."""


class PlacementConfig(Closed):
    """Where requests go (docs/placement.md)."""

    rule: Literal["best-fit", "value"] = "best-fit"
    """``value``: where least is lost of what others are likely to ask for, learnt from the requests."""


class IdleConfig(Closed):
    """When an idle slice's GPU memory is moved to the host, so that others can use what it holds (docs/idle.md)."""

    after_seconds: Seconds | None = None
    """How long it must have been idle; none: never. The agent must allow it too (``--idle-host-memory``)."""
    least_memory: Memory = None
    """Smaller slices are left alone."""
    protect_users: list[Annotated[str, Field(min_length=1, max_length=255)]] = []
    """Whose slices are left alone."""
    protect_groups: list[Annotated[str, Field(min_length=1, max_length=255)]] = []


class GiveBackConfig(Closed):
    """How what was lent of a guarantee is taken back (docs/quotas.md)."""

    shrink: bool = True
    """Burst slices are made smaller, by what they do not use."""
    least: Share = 500
    """And keep at least this part of what they were granted."""
    end_idle_after_seconds: Seconds | None = None
    """Servers idle for so long are asked back; none: no server is."""
    notice_seconds: Annotated[float, Field(ge=0, le=1e7)] = 300.0
    busy_notice_seconds: Seconds | None = None
    """Busy servers are asked back too, with so much notice; none: never."""

    @model_validator(mode="after")
    def _patient(self) -> GiveBackConfig:
        if self.busy_notice_seconds is not None and self.busy_notice_seconds < self.notice_seconds:
            raise ValueError("busy_notice_seconds must be at least notice_seconds: who works has no less notice than who does not")
        return self

    def policy(self) -> GiveBack:
        """Return what the core needs of it."""
        return GiveBack(self.shrink, self.least, self.end_idle_after_seconds, self.notice_seconds, self.busy_notice_seconds)


class ReservationConfig(Closed):
    """Places that are kept for a group at certain times (docs/quotas.md)."""

    name: Annotated[str, Field(min_length=1, max_length=255)]
    """For people: "kept for ..."."""
    group: Annotated[str, Field(min_length=1, max_length=255)]
    count: Annotated[int, Field(ge=1, le=100_000)]
    share: Share
    """Of one GPU, each place."""
    days: Annotated[list[Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]], Field(min_length=1)]
    begin: Annotated[int, BeforeValidator(_minutes), Field(alias="from")]
    end: Annotated[int, BeforeValidator(_minutes), Field(alias="to")]
    time_zone: Annotated[ZoneInfo, BeforeValidator(_zone)]
    drain_seconds: Annotated[float, Field(ge=0, le=86_400)] = 14_400.0
    """So long before, sessions that would run into it are not placed there any more; those of unknown length are, as the last choice."""
    notice_seconds: Annotated[float, Field(ge=0, le=86_400)] = 1800.0
    """So long before, nobody comes who would not be gone, and who is there is asked back."""
    model: Annotated[str, Field(min_length=1, max_length=255)] | None = None

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    @model_validator(mode="after")
    def _in_order(self) -> ReservationConfig:
        if self.begin >= self.end:
            raise ValueError("`to` must be after `from`; a window over midnight is two: one to 24:00, one from 0:00 on the next day")
        if self.notice_seconds > self.drain_seconds:
            raise ValueError("drain_seconds must be at least notice_seconds")
        return self

    def window(self) -> Window:
        """Return what the core needs of it."""
        return Window(
            self.name, self.group, self.count, self.share, frozenset(DAYS.index(day) for day in self.days), self.begin, self.end,
            self.time_zone, self.drain_seconds, self.notice_seconds, self.model,
        )  # fmt: skip


class ComingConfig(Closed):
    """A group of alike nodes that an autoscaler starts when a pod asks for one."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
    model: Annotated[str, Field(min_length=1, max_length=255)]
    """Of their GPUs, as the agent will publish it."""
    devices: Annotated[int, Field(ge=1, le=64)]
    """GPUs of each node."""
    memory: Memory
    """Of each GPU."""
    reserve: Memory = 0
    nodes: Annotated[int, Field(ge=1, le=1000)]
    """Most nodes that the group may have."""
    labels: dict[str, str] = {}
    """By which its nodes are known; without any: by the GPUs' model."""
    start_seconds: Seconds = 300.0

    def group(self) -> Coming:
        """Return what the pool needs of it."""
        labels, memory, reserve = frozenset(self.labels.items()), self.memory or 0, self.reserve or 0
        return Coming(self.name, self.model, self.devices, memory, reserve, self.nodes, labels, self.start_seconds)


class TokenConfig(Closed):
    """A bearer token, read from a file or an environment variable."""

    role: Literal["hub", "agent", "read"]
    hub: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    namespaces: list[Annotated[str, Field(min_length=1, max_length=255)]] | None = None
    """Patterns of the Kubernetes namespaces where this hub's servers may run."""
    file: Path | None = None
    env: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> TokenConfig:
        if (self.role == "hub") != (self.hub is not None):
            raise ValueError("role hub needs `hub` (the hub's id), and only that role does")
        if self.namespaces is not None and self.role != "hub":
            raise ValueError("only role hub has `namespaces`")
        if self.hub == FOREIGN_HUB:
            raise ValueError(f"a hub cannot be called {FOREIGN_HUB}: claims that no hub made are booked under that name")
        if (self.file is None) == (self.env is None):
            raise ValueError("give the token in either `file` or `env`")
        return self

    def load(self) -> Token:
        """Read the secret.

        Raises
        ------
        ConfigError
            It is not there, or too short to be one.
        """
        where = f"environment variable {self.env}" if self.env else f"file {self.file}"
        try:
            secret = os.environ.get(self.env or "", "") if self.file is None else self.file.read_text()
        except OSError as error:
            raise ConfigError(f"The token of role {self.role} cannot be read from {where}: {error.strerror}.") from None
        secret = secret.strip()
        if len(secret) < 16:
            raise ConfigError(f"The token of role {self.role} in {where} is missing or shorter than 16 characters.")
        return Token(secret, Principal(self.role, self.hub, None if self.namespaces is None else tuple(self.namespaces)))


class Config(Closed):
    """The whole file."""

    reservation_ttl_seconds: Seconds = 120.0
    queue_ttl_seconds: Seconds = 300.0
    """A queued request that nobody has asked for so long is dropped."""
    session_guess_seconds: Seconds = 3600.0
    """How long a server is taken to run while too few have ended to know: for the estimates of a wait, which then say so."""
    smallest_memory: Annotated[int, BeforeValidator(_memory)] = 512 * MIB
    """Least memory of a slice on each of its GPUs: a program's CUDA context takes some hundred MiB of it, by GPU and driver."""
    quotas: QuotaConfig = QuotaConfig()
    placement: PlacementConfig = PlacementConfig()
    queue: QueueConfig = QueueConfig()
    idle: IdleConfig = IdleConfig()
    """One machine only."""
    give_back: GiveBackConfig = GiveBackConfig()
    reservations: list[ReservationConfig] = []
    """Times at which places are kept for a group."""
    coming: list[ComingConfig] = []
    """On Kubernetes: nodes that would be started where they are asked for."""
    tokens: list[TokenConfig] = []

    @model_validator(mode="after")
    def _named_once(self) -> Config:
        for part, names in (
            ("group of `coming`", [one.name for one in self.coming]),
            ("of `reservations`", [one.name for one in self.reservations]),
        ):
            if len(set(names)) < len(names):
                raise ValueError(f"each {part} needs a name of its own")
        return self

    def settings(self) -> Settings:
        """Return what the core needs of it."""
        return Settings(
            quotas=Quotas(
                default=_limits(self.quotas.default),
                users={name: _limits(quota) for name, quota in self.quotas.users.items()},
                groups={name: _limits(quota) for name, quota in self.quotas.groups.items()},
            ),
            fairness=Fairness(self.queue.overtake_count, self.queue.overtake_seconds, self.queue.order == "fair"),
            reservation_ttl_seconds=self.reservation_ttl_seconds,
            queue_ttl_seconds=self.queue_ttl_seconds,
            session_guess_seconds=self.session_guess_seconds,
            smallest_bytes=self.smallest_memory,
            policy=Policy(by_value=self.placement.rule == "value"),
            idle=IdlePolicy(
                self.idle.after_seconds,
                self.idle.least_memory or 0,
                frozenset(self.idle.protect_users),
                frozenset(self.idle.protect_groups),
            ),
            give_back=self.give_back.policy(),
            windows=tuple(one.window() for one in self.reservations),
            queue_total=self.queue.total,
            queue_per_user=self.queue.per_user,
            start_seconds={group.name: group.start_seconds for group in self.coming},
        )


def _limits(quota: DefaultQuota) -> Limits:
    return Limits(
        limit_milli=quota.limit,
        limit_bytes=quota.memory,
        guarantee_milli=(quota.guarantee or 0) if isinstance(quota, UserQuota) else 0,
        lend=isinstance(quota, UserQuota) and quota.lend,
        weight=quota.weight if isinstance(quota, GroupQuota) else 1,
        per_user_milli=quota.per_user if isinstance(quota, GroupQuota) else None,
        per_user_bytes=quota.per_user_memory if isinstance(quota, GroupQuota) else None,
    )


def load(path: Path | None) -> Config:
    """Read the configuration file; None = all defaults.

    Raises
    ------
    ConfigError
        With the file and, in its order, the line of each mistake, the key and what it must be.
    """
    if path is None:
        return Config()
    try:
        text = path.read_text()
        raw: Any = yaml.safe_load(text)
        node = node_of(text)
    except OSError as error:
        raise ConfigError(f"The pool's configuration {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"The pool's configuration {path} is no YAML: {' '.join(str(error).split())}") from None
    if raw is None:
        raise ConfigError(f"The pool's configuration {path} says nothing; write {{}} in it where all defaults are meant.")
    wrong = [(line, key, f"it is there already, at line {first}; write it once") for line, key, first in repeated(node)]
    config: Config | None = None
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        for one in error.errors(include_url=False, include_context=False):
            key = ".".join(str(part) for part in one["loc"]) or "the file"
            words = _KINDS.get(one["type"]) or one["msg"].removeprefix("Value error, ").replace("Input should be", "it must be")
            wrong.append((line_of(node, one["loc"]), key, words))
    if config is not None and not wrong:
        return config
    said = "; ".join(f"line {line}, {key}: {what}" for line, key, what in sorted(wrong)[:MOST_TOLD])
    more = f"; and {len(wrong) - MOST_TOLD} more" if len(wrong) > MOST_TOLD else ""
    raise ConfigError(f"The pool's configuration {path} is wrong at {said}{more}.")
