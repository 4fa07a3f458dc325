"""``nbgpu run``: wait for a slice, start the program in it, say what it was refused, and end as it did."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import sys
import time
import uuid
from collections.abc import Mapping
from typing import NoReturn

from .cli_child import NOT_EXECUTABLE, Child, end_as
from .cli_common import own_slice
from .cli_serve import pool_on_demand
from .client import AgentClient, PoolClient
from .errors import InvalidValue, NbgpuError, Refused, Unavailable
from .launch import environment
from .logs import one_line
from .models import Event, Grant, GrantState, Owner, Request
from .paths import AGENT_SOCKET, runtime_dir
from .quantities import WHOLE_MILLI, format_memory, format_share, parse_fraction, parse_memory
from .words import counted

HUB = "command-line"
"""The hub's place in the owner of a slice that no hub asked for."""
BROUGHT = ("nvidia-smi",)
"""Programs that a slice's PATH may have and this terminal's not."""
TRIES = 5
LAST_WORDS_SECONDS = 1.0
"""How long the agent is given to say what an ended program was refused."""
NOT_FOUND = 127
OPTIONS = {"memory_milli": "--gpu", "memory_bytes": "--memory", "compute_milli": "--compute"}
"""What the command line calls a request's fields."""


def wanted(
    *, gpu: str | None, memory: str | None, compute: str | None, count: int = 1, model: str | None = None, mode: str = "burst"
) -> Request:
    """Return the request that the options describe.

    Raises
    ------
    InvalidValue
        An option outside its range; the message names the option.
    """
    if gpu is None and memory is None and compute is None:
        raise NbgpuError(
            "Say how much of a GPU: --gpu 1/4, or --memory 20GiB, or --compute 1/2.", code="invalid", status=400, field="--gpu"
        )
    if mode not in ("strict", "burst"):
        raise InvalidValue("--mode", mode, "strict or burst")
    if not 1 <= count <= 64:
        raise InvalidValue("--count", count, "a whole number from 1 to 64")
    share = parse_fraction(gpu, "--gpu") if gpu is not None else None
    compute_milli = parse_fraction(compute, "--compute") if compute is not None else share
    memory_bytes = parse_memory(memory, "--memory") if memory is not None else None
    return Request(
        request_id=uuid.uuid4().hex,
        owner=Owner(hub=HUB, user=user_name(), server=f"{socket.gethostname()}-{os.getpid()}"[:255]),
        device_count=count,
        compute_milli=compute_milli,
        memory_milli=share if memory_bytes is None else None,
        memory_bytes=memory_bytes,
        model=model,
        mode="strict" if mode == "strict" else "burst",
    )


def user_name() -> str:
    """Return the name of the user who runs this, from the password file rather than from the environment."""
    try:
        import pwd

        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return getpass.getuser() if os.environ.get("USER") else str(os.getuid())


def run_program(request: Request, command: list[str], *, wait: bool = True) -> NoReturn:
    """Acquire `request`, run `command` in the slice, and end as it did. Does not return."""
    refuse_inside()
    if command[0] not in BROUGHT:
        find_program(command[0], os.environ)  # a typing error is told now, not after the queue
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)
    try:
        pool, grant = acquire(request)
    except NbgpuError as error:
        raise in_options(error) from None
    try:
        grant = granted(pool, grant, wait=wait)
        launch = pool.prepare(request.request_id, None)
        env = environment(os.environ, launch)
        program = find_program(command[0], env)
        child = Child(program, command, env)
        try:
            pool.bind(request.request_id, child.pid)
        except BaseException:
            child.give_up()
            raise
    except BaseException:
        give_back(pool, request)
        raise
    tell(f"in a slice: {slice_in_words(grant)}")
    child.go()
    status = child.wait()
    refused = last_refusal(request.request_id)
    if refused is not None:
        tell(refused)
    end_as(status)


def last_refusal(slice_id: str) -> str | None:
    """Return what the program of a slice was refused last, as the agent tells it; None when there was nothing."""
    agent = AgentClient(runtime_dir() / AGENT_SOCKET, LAST_WORDS_SECONDS)
    deadline = time.monotonic() + LAST_WORDS_SECONDS
    events: list[Event] = []
    try:
        while not any(event.kind == "ended" for event in events) and time.monotonic() < deadline:  # what it left running goes on
            time.sleep(0.02)
            events = agent.events(slice_id=slice_id)
    except NbgpuError:
        pass  # the agent is away: its program has had its own error
    messages = [event.message for event in events if event.kind == "refused"]
    if not messages:
        return None
    # the agent knows no difference between a server and a program
    return messages[-1].replace("A program of this server", "The program").replace("this server's slice", "its slice")


def find_program(name: str, env: Mapping[str, str]) -> str:
    """Return the program's file, looked for as it would be inside the slice, whose PATH may hold more than this terminal's."""
    program = shutil.which(name, path=env.get("PATH"))
    if program is None:
        exists = os.path.exists(name)
        print(f"nbgpu: {name}: {'it may not be executed' if exists else 'no such program'}", file=sys.stderr)
        sys.exit(NOT_EXECUTABLE if exists else NOT_FOUND)
    return program


def refuse_inside() -> None:
    """Raise in a program that has its slice already: one cannot be inside two."""
    own = own_slice()
    if own is not None:
        raise NbgpuError("This terminal is inside a slice already (`nbgpu status` shows it): start the program directly.", code="inside")


def acquire(request: Request) -> tuple[PoolClient, Grant]:
    """Send the request to the pool, starting one where none runs.

    One in the background may end, idle, just as it is asked: then the next try starts another.
    """
    for attempt in range(TRIES):
        pool = pool_on_demand()
        try:
            return pool, pool.acquire(request)
        except Unavailable as error:
            if attempt == TRIES - 1:
                raise
            time.sleep(0.2 if error.code == "away" else 1.0)
        except NbgpuError as error:
            if error.status != 503 or attempt == TRIES - 1:
                raise
            time.sleep(1.0)
    raise AssertionError("unreachable")


def in_options(error: NbgpuError) -> NbgpuError:
    """Return what the pool says of a request's field as said of the option that set it."""
    option, allowed = OPTIONS.get(error.field or ""), error.message.partition("; it must be ")[2]
    if error.status != 400 or option is None or not allowed:
        return error
    return NbgpuError(f"{option}: it must be {allowed}", code=error.code, status=error.status, field=option)


def granted(pool: PoolClient, grant: Grant, *, wait: bool) -> Grant:
    """Wait in the queue, saying where, until the grant is reserved; return it."""
    if grant.state is GrantState.queued and not wait:
        raise Refused(f"Nothing is free now: {grant.reason or 'others hold it'}. Without --no-wait this would wait its turn.")
    said = ""
    while grant.state is GrantState.queued:
        said = say_place(grant, said)
        try:
            for change in pool.grant_events(grant.request.request_id):
                said = say_place(change, said) if change.state is GrantState.queued else said
        except Unavailable:
            time.sleep(1.0)  # the pool restarts, or was silent for long: ask again
        grant = pool.grant(grant.request.request_id)
    if said and sys.stderr.isatty():
        print(file=sys.stderr)
    if grant.state in (GrantState.releasing, GrantState.gone) or grant.slice is None:
        raise Refused(f"The request ended before it was granted: {grant.reason or 'no reason given'}.")
    return grant


def say_place(grant: Grant, said: str) -> str:
    """Say where in the queue it stands, once for each change; return what was said."""
    place = f"number {grant.position} in the queue" if grant.position else "in the queue"
    about = "perhaps" if grant.wait_guessed else "about"
    time_left = f", {about} {in_words(grant.wait_seconds)}" if grant.wait_seconds is not None else ""
    reason = f": {grant.reason}" if grant.reason else ""
    line = one_line(f"waiting for {request_in_words(grant.request)}, {place}{time_left}{reason} (Ctrl-C leaves)")
    if line == said:
        return said
    if sys.stderr.isatty():
        print(f"\r\033[Knbgpu: {line}", end="", file=sys.stderr, flush=True)
    else:
        tell(line)
    return line


def in_words(seconds: float) -> str:
    """Return a time for people: ``20 seconds``, ``4 minutes``, ``2 hours``."""
    if seconds < 90:
        return counted(max(1, round(seconds)), "second")
    return f"{round(seconds / 60)} minutes" if seconds < 5400 else f"{round(seconds / 3600)} hours"


def request_in_words(request: Request) -> str:
    """Return what is asked for: ``a quarter of a GPU``, ``20 GiB of a GPU``."""
    if request.memory_bytes is not None:
        part = f"{format_memory(request.memory_bytes)} of a GPU"
    else:
        share = request.memory_milli or request.compute_milli or 0
        part = "a whole GPU" if share == WHOLE_MILLI else f"{format_share(share)} of a GPU"
    return f"{part}, on each of {request.device_count} GPUs" if request.device_count > 1 else part


def time_in_words(milli: int) -> str:
    """Return a share of time: ``a quarter of the time``, ``all the time``."""
    return "all the time" if milli == WHOLE_MILLI else f"{format_share(milli)} of the time"


def slice_in_words(grant: Grant) -> str:
    """Return what was granted: ``19.8 GiB and a quarter of the time of GPU 0 (Simulated H100 80GB), burst``."""
    assert grant.slice is not None
    parts = [
        f"{format_memory(device.memory_bytes)} and {time_in_words(device.compute_milli)} of GPU {device.index} ({device.model})"
        for device in grant.slice.devices
    ]
    return f"{'; '.join(parts)}, {grant.slice.mode}"


def give_back(pool: PoolClient, request: Request) -> None:
    """Leave the queue, or return the reservation; where that fails its TTL does it."""
    try:
        pool.cancel(request.request_id)
    except NbgpuError as error:
        tell(f"could not give the slice back ({error.message}); it falls back to the pool by itself within a minute")


def tell(line: str) -> None:
    """Say something on stderr, when a person may read it."""
    if os.environ.get("NBGPU_QUIET") != "1":
        print(f"nbgpu: {one_line(line)}", file=sys.stderr, flush=True)
