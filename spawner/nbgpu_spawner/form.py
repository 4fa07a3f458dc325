"""The start page: what each profile is, whether it is free now, and if not, why. Values in, HTML out; `ask` is the only I/O."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jinja2

from nbgpu.errors import InvalidValue, NbgpuError
from nbgpu.models import Availability, AvailabilityQuery, DeviceBooks, Owner
from nbgpu.quantities import format_memory, format_share, format_time
from nbgpu.words import rough_time, rough_time_down

from .client import NO_ANSWER, PoolClient
from .options import LABELS, Wish
from .profiles import UNLISTED, Profile, custom_fields, wish_of
from .sizes import NOT_TRIED, Free, Tried, choices, largest_free

POLL_SECONDS = 2
"""How often an open page asks again: with the time of the answer (2 s, then it says that none comes) what it shows is at most 5 s old."""
_ASK_SECONDS = 1.5

WAIT = "You can start it and wait in line"

RowState = Literal["always", "free", "wait", "forbidden", "impossible", "unknown", "custom"]
MARKS: Mapping[str, str] = {
    "always": "\u2713",
    "free": "\u2713",
    "wait": "\u2026",
    "forbidden": "\u2715",
    "impossible": "\u2715",
    "unknown": "?",
    "custom": "\u270e",
}


@dataclass(frozen=True)
class Row:
    """One profile, as the user sees it."""

    slug: str
    name: str
    description: str
    what: str
    """What it is: memory and time."""
    state: RowState
    status: str
    """Free now, or why not and what to expect."""
    default: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def disabled(self) -> bool:
        """Whether it cannot be chosen at all."""
        return self.state in ("forbidden", "impossible")

    def as_json(self) -> dict[str, Any]:
        """Return what changes while the page is open."""
        return {
            "slug": self.slug,
            "what": self.what,
            "state": self.state,
            "mark": MARKS[self.state],
            "status": self.status,
            "disabled": self.disabled,
        }


@dataclass(frozen=True)
class Refused:
    """What a user just sent and why it was refused: the page that answers has it filled in, with the message at its field."""

    options: Mapping[str, Any]
    message: str
    field: str


@dataclass(frozen=True)
class StartState:
    """Everything that the start page shows."""

    rows: tuple[Row, ...]
    time: float
    """Unix time, seconds."""
    offer: Row | None = None
    """Where none of the rows with a GPU is free: the largest share that is."""
    problem: str = ""
    simulated: bool = False
    isolates: bool = True
    models: tuple[str, ...] = ()
    most_devices: int = 1

    def as_json(self) -> dict[str, Any]:
        """Return what an open page asks for again and again."""
        offer = {**self.offer.as_json(), "name": self.offer.name} if self.offer else None
        profiles = [row.as_json() for row in self.rows]
        return {"time": self.time, "problem": self.problem, "simulated": self.simulated, "profiles": profiles, "offer": offer}


async def ask(
    pool: PoolClient,
    profiles: list[Profile],
    configured: Mapping[str, Any],
    owner: Owner,
    groups: list[str],
    *,
    isolates: bool,
    patience_seconds: float,
) -> StartState:
    """Return the start page's state as the pool sees it now; a pool that is away is said, not raised."""
    wishes = [_wish(profile, configured) for profile in profiles]
    shapes = [wish.shape for wish in wishes if isinstance(wish, Wish)]
    custom = [profile for profile in profiles if profile.get("gpu_custom")]
    problem, books, answers, free, said = "", [], None, None, NOT_TRIED

    async def look() -> tuple[list[DeviceBooks], list[Availability], Free | None, Tried]:
        query = AvailabilityQuery(owner=owner, groups=groups, shapes=shapes)
        books, answers = await asyncio.gather(pool.devices(max_age_seconds=1), pool.availability(query))
        none_free = bool(answers) and not any(one.state == "free" for one in answers)
        tried = choices(profiles if none_free else custom, configured, books=books)
        if not tried:
            return books, answers, None, NOT_TRIED
        more = query.model_copy(update={"shapes": [one.wish.shape for one in tried]})
        said = Tried(tried, await pool.availability(more))
        return books, answers, largest_free(*said) if none_free else None, said.of(profile["slug"] for profile in custom)

    try:
        books, answers, free, said = await asyncio.wait_for(look(), _ASK_SECONDS)
    except asyncio.TimeoutError:
        problem = NO_ANSWER
    except NbgpuError as error:
        problem = error.message
    return start_state(
        profiles, wishes, books, answers, free, said, problem=problem, isolates=isolates, patience_seconds=patience_seconds, now=time.time()
    )


def start_state(
    profiles: list[Profile],
    wishes: Sequence[Wish | InvalidValue | None],
    books: list[DeviceBooks],
    answers: list[Availability] | None,
    free: Free | None = None,
    custom: Tried = NOT_TRIED,
    *,
    problem: str = "",
    isolates: bool = True,
    patience_seconds: float | None = None,
    now: float = 0.0,
) -> StartState:
    """Return the start page's state.

    Parameters
    ----------
    profiles, wishes : list
        The profiles and what each stands for: None without a GPU, an error where it is set up wrongly.
    books : list of DeviceBooks
        The pool's devices.
    answers : list of Availability, optional
        One for each `Wish`, in their order; None when the pool did not answer.
    free : Free, optional
        The largest share that is free, where none of the `wishes` is.
    custom : Tried
        What a custom choice was tried with.
    patience_seconds : float, optional
        How long a start waits in line.
    """
    left = iter(answers or [])
    line = f"{WAIT}, for {rough_time(patience_seconds)} at most." if patience_seconds else f"{WAIT}."
    rows = tuple(_row(profile, wish, left, answers is not None, custom, line) for profile, wish in zip(profiles, wishes, strict=True))
    nodes = [book.device.node for book in books]
    return StartState(
        rows=rows,
        time=now,
        offer=_offer(free) if free else None,
        problem=problem,
        simulated=any(book.device.simulated for book in books),
        isolates=isolates,
        models=tuple(sorted({book.device.model for book in books})),
        most_devices=max((nodes.count(node) for node in nodes), default=1),
    )


def render(state: StartState, typed: Mapping[str, Any], url: str, refused: Refused | None = None) -> str:
    """Return the fields of the start page as HTML.

    Parameters
    ----------
    state : StartState
        What to show.
    typed : mapping
        What the user chose last (``user_options``); what no longer exists is ignored.
    url : str
        Where the open page asks again.
    refused : Refused, optional
        What the user sent just now in vain; shown in place of `typed`.
    """
    typed = refused.options if refused else typed
    typed = {key: str(value) for key, value in typed.items() if isinstance(value, (str, int, float))}
    chosen = _chosen(state.rows, typed)
    shown_time = time.strftime("%H:%M:%S", time.localtime(state.time))
    return template("start.html").render(
        state=state,
        typed=typed,
        chosen=chosen,
        url=url,
        time=shown_time,
        refused=refused,
        labels=LABELS,
        marks=MARKS,
        unlisted=UNLISTED,
        poll_seconds=POLL_SECONDS,
    )


def describe(wish: Wish, answer: Availability | None) -> str:
    """Return what a share is in plain terms: ``19.5 GiB, at least a quarter of the GPU's time``."""
    shape = wish.shape
    memory = answer.memory if answer else {}
    compute = answer.compute_milli if answer else {}
    if memory:
        amounts = {format_memory(amount) for amount in memory.values()}
        if len(amounts) == 1:
            parts = [amounts.pop()]
        else:
            parts = [" or ".join(f"{format_memory(amount)} ({model})" for model, amount in sorted(memory.items()))]
    elif shape.memory_bytes:
        parts = [format_memory(shape.memory_bytes)]
    else:
        parts = [f"{_share(shape.memory_milli or shape.compute_milli or 0)} of a GPU's memory"]
    shares = sorted({milli for milli in (*compute.values(), shape.compute_milli) if milli})
    if shares:
        parts.append(_time(shares[0], wish.mode))
    if shape.session_seconds is not None:
        parts.append(f"for {rough_time_down(shape.session_seconds)} at most")
    text = ", ".join(parts)
    if shape.device_count > 1:
        text += f"; on each of {shape.device_count} GPUs"
    return f"{text}; {shape.model} only" if shape.model else text


def _wish(profile: Profile, configured: Mapping[str, Any]) -> Wish | InvalidValue | None:
    if profile.get("gpu_custom"):
        return None
    try:
        return wish_of(profile, {}, configured)
    except InvalidValue as error:
        return error


def _row(
    profile: Profile, wish: Wish | InvalidValue | None, answers: Iterable[Availability], answered: bool, custom: Tried, line: str
) -> Row:
    what, state, status = "", "always", "Always available"
    if profile.get("gpu_custom"):
        state, status = "custom", _most(custom.of([profile["slug"]]), line)
    elif isinstance(wish, InvalidValue):
        state, status = "impossible", f"Set up wrongly, please tell the admin: {wish.message}"
    elif wish is not None:
        answer = next(iter(answers), None) if answered else None
        what = describe(wish, answer)
        state, status = (answer.state, _status(answer, line)) if answer else ("unknown", "Nobody knows now whether it is free")
    return Row(
        slug=profile["slug"],
        name=profile["display_name"],
        description=profile.get("description") or "",
        what=what,
        state=state,  # pyright: ignore[reportArgumentType]
        status=status,
        default=bool(profile.get("default")),
        options=profile.get("profile_options") or {},
    )


def _offer(free: Free) -> Row:
    name = f"The largest share that is free now: {free.choice.wish}"
    return Row(
        slug=free.choice.value,
        name=name,
        description="",
        what=describe(free.choice.wish, free.answer),
        state="free",
        status=_status(free.answer, ""),
    )


def _status(answer: Availability, line: str) -> str:
    reason = answer.reason.strip().rstrip(".")
    if answer.state == "free":
        return f"{reason[:1].upper()}{reason[1:]}" if reason else "Free now"
    if answer.state == "forbidden":
        return f"Not for you: {reason}"
    if answer.state == "impossible":
        return f"Not possible here: {reason}"
    return f"{reason[:1].upper()}{reason[1:]}. {line}" if reason else f"In use. {line}"


def _most(custom: Tried, line: str) -> str:
    """Return the most that this person can have by a custom choice: their quota and what is kept for others counted."""
    free = largest_free(*custom)
    if free is not None:
        memory = min(free.answer.memory.values(), default=0)
        milli = min(free.answer.compute_milli.values(), default=0)
        return f"The most that you can have of one GPU now: {format_memory(memory)} and {_share(milli)} of its time"
    if not custom.answers:
        return "Nobody knows now what is free"
    forbidden = [answer for answer in custom.answers if answer.state == "forbidden"]
    if forbidden and not any(answer.state == "wait" for answer in custom.answers):
        return _status(forbidden[-1], line)  # not even the smallest
    return f"No GPU has room for you now. {line}"


def _time(milli: int, mode: str) -> str:
    if milli == 1000:
        return format_time(milli)
    return f"{'at least' if mode == 'burst' else 'exactly'} {format_time(milli)}"


def _share(milli: int) -> str:
    return "all" if milli == 1000 else format_share(milli)


def _chosen(rows: Iterable[Row], typed: Mapping[str, Any]) -> str:
    """Return the profile that is checked: never none, and none that is disabled where another is not."""
    named = typed.get("profile")
    if not named and custom_fields(None, typed):
        named = next((row.slug for row in rows if row.state == "custom"), None)
    wanted = [row for row in rows if row.slug == named] + [row for row in rows if row.default] + list(rows)
    return next((row.slug for row in wanted if not row.disabled), wanted[0].slug if wanted else "")


@cache
def template(name: str) -> jinja2.Template:
    """Return one of this package's templates."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(name)
