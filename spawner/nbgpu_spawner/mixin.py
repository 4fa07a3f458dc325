"""What is the same for every spawner that gives a server a slice of a GPU: traits, options, the grant's life, progress."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from jupyterhub.utils import maybe_future, url_path_join
from tornado.httputil import url_concat
from traitlets import Any as AnyTrait
from traitlets import Bool, Enum, Float, Integer, Unicode, default
from traitlets.config import Configurable

from nbgpu.errors import InvalidValue, NbgpuError, Refused, Unavailable
from nbgpu.models import NAME_LENGTH, Grant, GrantState, Owner, Request
from nbgpu.paths import POOL_SOCKET, runtime_dir, runtime_path

from . import askback, form, waiting
from .client import REFUSED_BY_NODE, PoolClient, PoolUnavailable
from .line import Line
from .options import SETTINGS, NotAnObject, UserOptions, Wish, check_against, wish_from
from .profiles import Profile, check_keys, for_groups, initialise, options_from_form, selected, wish_of
from .refusal import GPURefusal, refusal, spare_failure_counter

if TYPE_CHECKING:
    from jupyterhub.spawner import Spawner as _Spawner
else:
    _Spawner = Configurable

START_MARGIN_SECONDS = 30
"""What the server's own start needs of `start_timeout`, beside the wait for a GPU."""
_PATIENCE_SECONDS = 10.0
_RELEASE_SECONDS = 600.0
_clients: WeakKeyDictionary[Any, dict[tuple[str, str, str, float], PoolClient]] = WeakKeyDictionary()
T = TypeVar("T")
_background: set[asyncio.Task[Any]] = set()
_clean: set[Owner] = set()
"""Owners of whom this process knows that they hold nothing: what an earlier hub left behind was asked back once."""


class GPUSliceMixin(_Spawner):
    """Gives a spawner's servers a slice of a GPU. Put it before the spawner class: ``class Mine(GPUSliceMixin, SomeSpawner)``.

    A subclass calls `acquire_slice` when the server is about to be made and `bind_slice` when it carries the grant; the rest
    (release, refusal, options, progress) happens here.
    """

    user_options = UserOptions(help="What the user asked for: by the form, or as JSON through the REST API.")
    gpu_fraction = AnyTrait(
        None,
        allow_none=True,
        config=True,
        help="""Share of one GPU, of its memory and of its compute time: 0.25, "1/4" or "25%". None: no GPU, unless `gpu_memory` is set.
        Where no profiles are set, a user's first start page begins with it; later ones begin with the user's last choice.

        For example::

            c.GPUSliceMixin.gpu_fraction = 0.25
        """,
    )
    gpu_memory = AnyTrait(
        None,
        allow_none=True,
        config=True,
        help="""GPU memory, such as "20 GiB", in place of the fraction's; without a fraction the compute share follows the memory.""",
    )
    gpu_compute = AnyTrait(
        None, allow_none=True, config=True, help="Share of the GPU's time, when it shall differ from the share of its memory."
    )
    gpu_count = AnyTrait(1, config=True, help="On how many GPUs of one machine the server gets its part, the same on each.")
    gpu_model = Unicode(None, allow_none=True, config=True, help="Model of GPU, as the pool names it. None: any.")
    gpu_mode = Enum(
        ["strict", "burst"],
        "burst",
        config=True,
        help="strict: never more than the share of compute time. burst: more while others are idle; the share is guaranteed.",
    )
    gpu_session_seconds = Float(
        None,
        allow_none=True,
        config=True,
        help="How long a server runs at most; for profiles. The pool plans with it and asks it back then.",
    )
    gpu_wait_timeout = Integer(
        600,
        min=0,
        config=True,
        help="""Seconds that a start may wait in the pool's queue for a GPU. `start_timeout` must hold it and the start itself;
        where it does not, the wait is cut short, with a warning in the log.""",
    )
    gpu_hub_name = Unicode(
        "jupyterhub", config=True, help="Name of this hub, in the pool's books. Hubs that share a pool need different ones."
    )
    gpu_resize = Bool(
        None,
        allow_none=True,
        config=True,
        help="""Whether users may make the slice of a running server larger or smaller, from JupyterLab, within their quotas.
        None: where a profile lets them say how much (`gpu_custom`), or there are no profiles.""",
    )
    gpu_end_asked_back = Bool(
        False,
        config=True,
        help="""Whether the hub ends servers that the pool asks back (docs/quotas.md), once their notice is over: only those whose users
        were told in JupyterLab. False: their users are asked, and the servers go on.""",
    )
    gpu_isolates = Bool(True, help="False: all servers run as one account, which the start page then says.")
    pool_socket = Unicode(config=True, help="Unix socket of the pool on this machine. Not used when `pool_url` is set.")
    pool_url = Unicode("", config=True, help="Address of the pool on a network, such as http://nbgpu-pool:8200.")
    pool_token = Unicode("", config=True, help="Bearer token of role hub, for `pool_url`.")
    pool_timeout = Float(10.0, min=0.1, config=True, help="Seconds that one call to the pool may take.")
    gpu_settles_at_once = True
    """Of a class: nothing is told of a start once it has its slice, but by the spawner itself."""

    @default("pool_socket")
    def _default_pool_socket(self) -> str:
        return str((runtime_path() if self.pool_url else runtime_dir()) / POOL_SOCKET)

    @default("start_timeout")
    def _default_start_timeout(self) -> int:
        return self.gpu_wait_timeout + 2 * START_MARGIN_SECONDS

    @default("http_timeout")
    def _default_http_timeout(self) -> int:
        return 120  # seconds: the first start of JupyterLab on a small or busy machine takes long

    @default("options_form")
    def _default_gpu_options_form(self) -> Any:
        return GPUSliceMixin.render_gpu_form

    @default("options_from_form")
    def _default_gpu_options_from_form(self) -> Any:
        return self.gpu_options_from_form

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._gpu_configured = self._gpu_values()
        self._gpu_request_id: str | None = None
        self._gpu_bound = False
        self._gpu_progress = waiting.Progress()
        self._gpu_leaving = asyncio.Event()
        self._gpu_waiting = False
        self._gpu_line: Line | None = None
        self._gpu_given: Request | None = None
        """Granted already: what another start of this server waited for was given up for it."""
        self._gpu_taken = False
        self._gpu_refused: form.Refused | None = None
        self._gpu_last_options: dict[str, Any] = dict(self.user_options or {})

    # -- options: form, REST and profile

    async def gpu_profiles(self) -> list[Profile]:
        """Return this user's part of `profile_list`, resolved and complete; empty where there is none at all.

        Raises
        ------
        Refused
            All are for groups that the user is not in.
        """
        profiles = getattr(self, "profile_list", None)
        profiles = await maybe_future(profiles(self)) if callable(profiles) else profiles
        return initialise(for_groups(profiles, self.gpu_group_names()))

    async def check_gpu_options(self, options: Any) -> Profile | None:
        """Return the profile that `options` select, when all that they ask for exists.

        Raises
        ------
        InvalidValue
            The same for the form and for the REST API.
        """
        if isinstance(options, NotAnObject) or not isinstance(options, dict):
            raise InvalidValue("user_options", getattr(options, "value", options), "an object of option names and values")
        profile = selected(await self.gpu_profiles(), options)
        check_keys(profile, options, others_allowed=self._others_read_options())
        wish = wish_of(profile, options, self._gpu_configured)
        if wish is not None:
            with suppress(PoolUnavailable, asyncio.TimeoutError):  # then the start says so
                books = await asyncio.wait_for(self.pool.devices(), 2)
                check_against(wish, [book.device for book in books], max((book.least_bytes for book in books), default=0))
        return profile

    def _others_read_options(self) -> bool:
        own = self.apply_user_options is None and self.options_form == GPUSliceMixin.render_gpu_form
        return not own

    async def gpu_options_from_form(self, form_data: dict[str, list[Any]]) -> dict[str, Any]:
        """Return ``user_options`` for what the start page sent, or raise a 400 with the field and its range."""
        options = options_from_form(form_data)
        try:
            await self.check_gpu_options(options)
        except NbgpuError as error:
            page = self.user.spawner  # whose form the hub answers with, also when another server of this user was meant
            (page if isinstance(page, GPUSliceMixin) else self)._gpu_refused = form.Refused(options, error.message, error.field or "")
            raise refusal(error, self._log_name) from None
        return options

    async def apply_group_overrides(self) -> None:
        """Start from the configuration: a spawner object that failed before carries that attempt's profile."""
        for name, value in self._gpu_configured.items():
            setattr(self, name, value)
        await super().apply_group_overrides()

    async def _run_apply_user_options(self, user_options: Any) -> None:
        # overridden rather than `apply_user_options` set: that one is the admin's, and the hub logs a stack trace for what it raises
        try:
            profile = await self.check_gpu_options(user_options)
        except NbgpuError as error:
            self._forget_options(user_options)
            raise self.refuse(error) from None
        self._gpu_last_options = dict(user_options)
        await self.apply_gpu_profile(profile, user_options)
        if self.apply_user_options:
            await super()._run_apply_user_options(user_options)

    def _forget_options(self, refused: Any) -> None:
        """What was refused is not what the next start begins with: the hub has saved it as that before it asked us."""
        last = {} if refused == self._gpu_last_options else self._gpu_last_options
        self.user_options = last
        if self.orm_spawner is not None:
            self.orm_spawner.user_options = last

    async def apply_gpu_profile(self, profile: Profile | None, options: dict[str, Any]) -> None:
        """Set the traits that the checked `options` stand for."""
        raise NotImplementedError

    async def render_gpu_form(self) -> str:
        """Return the start page's fields."""
        state = await self.gpu_start_state()
        if not state.rows and not state.problem:
            return ""
        refused, self._gpu_refused = self._gpu_refused, None  # shown on the page that answers, not on a later one
        return form.render(state, self.user_options or {}, self.gpu_availability_url(), refused)

    def gpu_availability_url(self) -> str:
        """Return where the open start page asks what is free now."""
        base = self.hub.base_url if self.hub else "/hub/"
        return url_concat(url_path_join(base, "api/nbgpu/availability"), {"user": self.user.name, "server": self.name})

    async def gpu_start_state(self) -> form.StartState:
        """Return what the start page shows, as of now."""
        problem = ""
        try:
            profiles = await self.gpu_profiles()
        except Refused as error:
            profiles, problem = [], error.message
        if not profiles:
            return form.StartState(rows=(), time=time.time(), problem=problem, isolates=self.gpu_isolates)
        who, wait = (self.gpu_owner(), self.gpu_groups()), self._wait_seconds()
        return await form.ask(self.pool, profiles, self._gpu_configured, *who, isolates=self.gpu_isolates, patience_seconds=wait)

    # -- the grant's life

    @property
    def pool(self) -> PoolClient:
        """The pool's client, shared by all spawners of this hub."""
        key = (self.pool_socket, self.pool_url, self.pool_token, self.pool_timeout)
        clients = _clients.setdefault(asyncio.get_running_loop(), {})
        if key not in clients:
            clients[key] = PoolClient(*key)
        return clients[key]

    def gpu_owner(self) -> Owner:
        """Return who the slice is for: named servers are owners of their own."""
        return Owner(hub=_short(self.gpu_hub_name), user=_short(self.user.name), server=_short(self.name or ""))

    def gpu_groups(self) -> list[str]:
        """Return the user's groups, as the hub knows them."""
        return [_short(name) for name in self.gpu_group_names()]

    def gpu_group_names(self) -> list[str]:
        """Return the names of the user's groups, whole."""
        return [group.name for group in self.user.groups]

    def _gpu_values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SETTINGS}

    def refuse(self, error: NbgpuError) -> GPURefusal:
        """Return what to raise for `error`; it will not count as a failure of the hub."""
        spare_failure_counter(self)
        return refusal(error, self._log_name)

    async def acquire_slice(self) -> Grant | None:
        """Return the grant for this start, waiting in the queue where needed; None without a GPU.

        Raises
        ------
        GPURefusal
            With the reason in plain words. Nothing is held then.
        """
        # made before the first await: whatever happens after it, this id releases what was granted
        given, self._gpu_given = self._gpu_given, None
        request_id = self._gpu_request_id = given.request_id if given is not None else uuid.uuid4().hex
        self._gpu_bound = False
        self._gpu_leaving.clear()
        self._gpu_waiting, self._gpu_taken = True, False
        try:
            wish = wish_from(self._gpu_values())
            if wish is None:
                self._gpu_request_id = None
                return None
            await self.make_way()
            if given is not None and given != self.gpu_request(wish, request_id):  # a group's overrides make it another
                await self.give_back()
                request_id = self._gpu_request_id = uuid.uuid4().hex
            grant = await self._wait_for_grant(wish, request_id)
            self._gpu_progress.tell(self.gpu_got(wish, grant), percent=20)
            return grant
        except NbgpuError as error:
            await self.give_back()
            raise self.refuse(error) from None
        except BaseException:
            await self.give_back()
            raise
        finally:
            self._gpu_waiting, self._gpu_line = False, None
            if self.gpu_settles_at_once:
                self._gpu_progress.settle()

    async def make_way(self) -> None:
        """Remove what this server's last life has left and what would stand in the way of a new slice."""

    def gpu_got(self, wish: Wish, grant: Grant) -> str:
        """Return what a user reads once there is a slice."""
        return f"Got {wish}."

    def gpu_patience_seconds(self) -> float:
        """Return how long a start waits for a pool that is away."""
        return min(_PATIENCE_SECONDS, self.pool_timeout)

    def gpu_request(self, wish: Wish, request_id: str) -> Request:
        """Return what the pool is asked for."""
        return wish.request(request_id, self.gpu_owner(), self.gpu_groups())

    async def _wait_for_grant(self, wish: Wish, request_id: str) -> Grant:
        request = self.gpu_request(wish, request_id)
        start = time.monotonic()
        if request.owner not in _clean:
            await self._patiently(lambda: self.pool.release_owner(request.owner, request_id), start)
        _clean.discard(request.owner)
        grant = await self._patiently(lambda: self.ask_for_slice(request), start)
        if grant.state is GrantState.queued:
            self.save_early_state()  # one that is granted at once is soon saved; until then its reservation's TTL answers for it
            grant = await self._stand_in_line(wish, request, grant, start)
        self._gpu_line = None
        if grant.slice is None or grant.state not in (GrantState.reserved, GrantState.bound):
            raise Unavailable(grant.reason or "The GPU pool took the reservation back. Try again.", code="no-room")
        return grant

    async def _stand_in_line(self, wish: Wish, request: Request, grant: Grant, start: float) -> Grant:
        """Wait until a queued request is granted or has ended; tell where it stands."""
        wait_seconds = self._wait_seconds()
        if wait_seconds < self.gpu_wait_timeout:
            told = self._log_name, self.gpu_wait_timeout, self.start_timeout, wait_seconds, self.gpu_wait_timeout + START_MARGIN_SECONDS
            self.log.warning(
                "%s: gpu_wait_timeout is %i s, but start_timeout (%i s) leaves %i s for waiting; set start_timeout to %i or more", *told
            )
        line = Line(wish, grant, await self.gpu_profiles(), self._gpu_configured, self.user_options or {}, wait_seconds)
        self._gpu_line = line
        pause = 0.2
        while grant.state is GrantState.queued:
            line.grant = grant
            if self._gpu_progress.readers:
                await line.look(self.pool)
            self._tell_line(line)
            if time.monotonic() - start > wait_seconds:
                raise Unavailable(waiting.no_room(wish, wait_seconds, grant), code="no-room")
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._gpu_leaving.wait(), pause)
            if self._gpu_leaving.is_set():
                break
            pause = min(pause * 1.5, 1.0)
            try:
                grant, line.problem = await self.pool.grant(request.request_id), ""
            except PoolUnavailable:  # it may be restarting; the deadline above holds
                line.problem = "The GPU pool does not answer at the moment. Your request is kept here, and sent again when it does."
            except NbgpuError as error:
                if error.status != 404:
                    raise
                grant = await self._patiently(lambda: self.ask_for_slice(request), time.monotonic())  # a restarted pool forgot the queue
                line.problem = ""
        if self._gpu_leaving.is_set() or (self._gpu_taken and grant.state is GrantState.gone):
            words = "You took a smaller share instead." if self._gpu_taken else "You left the queue. Nothing is reserved for you."
            raise NbgpuError(words, code="left", status=409)
        return grant

    async def take_instead(self, options: dict[str, Any]) -> Request:
        """Give what this start waits for up for what `options` stand for, when that can be had now; the start then ends.

        Returns
        -------
        Request
            Granted: for the start of this server that comes next.

        Raises
        ------
        NbgpuError
            In the user's words. It waits on as before.
        """
        try:
            wish = wish_of(await self.check_gpu_options(options), options, self._gpu_configured)
            if wish is None:
                raise InvalidValue("choice", options.get("profile"), "a share of a GPU: to start without one, leave the queue")
            if self._gpu_request_id is None or self._gpu_line is None or self._gpu_taken:
                raise NbgpuError("Your server waits for nothing any more.", code="state", status=409)
            request, old = self.gpu_request(wish, uuid.uuid4().hex), self._gpu_request_id
            self._gpu_taken = True
            try:
                await self._patiently(lambda: self.pool.replace(old, request), time.monotonic())  # again where only the answer was lost
            except BaseException:
                self._gpu_taken = False
                in_background(self._release(request.request_id, request.owner))
                raise
        except NbgpuError as error:
            if self._gpu_line is not None:
                self._gpu_line.notice(error.message)
            raise
        self._gpu_leaving.set()
        return request

    def gpu_begin_with(self, granted: Request) -> None:
        """Let the next start of this server begin with what is granted to it already."""
        self._gpu_given, self._gpu_request_id, self._gpu_bound = granted, granted.request_id, False

    def _tell_line(self, line: Line) -> None:
        self._gpu_progress.tell(*waiting.event(line.place(), self.gpu_url("leave"), self.gpu_url("smaller")))

    async def gpu_queue_page(self, token: str) -> str:
        """Return the queue page's part of the hub's page."""
        line = self._gpu_line
        if line is not None:
            await line.look(self.pool)
            self._tell_line(line)  # the page's script reads all events: the last one says what the page says
        return waiting.page(line.place() if line is not None else None, self.gpu_url("leave"), self.gpu_url("smaller"), token)

    @property
    def gpu_waits(self) -> bool:
        """Whether a start of this server stands in line."""
        return self._gpu_line is not None

    async def ask_for_slice(self, request: Request) -> Grant:
        """Send the request, also again, to the pool."""
        return await self.pool.acquire(request)

    async def _patiently(self, call: Any, start: float) -> Any:
        """Try `call` again while the pool is away, for as long as a restart takes."""
        told = False
        while True:
            try:
                return await call()
            except PoolUnavailable as error:
                if error.code == REFUSED_BY_NODE or time.monotonic() - start > self.gpu_patience_seconds():
                    raise
                if not told:
                    told = True
                    why = error.__cause__ or error.message
                    self.log.warning("%s: the GPU pool at %s does not answer: %s", self._log_name, self.pool.where, why)
                words = "The GPU pool does not answer yet; trying again." if error.code != "token" else error.message
                self._gpu_progress.tell(words, percent=5)
                await asyncio.sleep(0.5)

    def _wait_seconds(self) -> float:
        return min(self.gpu_wait_timeout, max(0, self.start_timeout - START_MARGIN_SECONDS))

    async def bind_slice(self, pid: int | None) -> None:
        """Tell the pool that a server carries the grant."""
        request_id = self._gpu_request_id
        if request_id is not None:
            await self._patiently(lambda: self.pool.bind(request_id, pid), time.monotonic())
            self._gpu_bound = True
            askback.watch(self)

    async def give_back(self) -> None:
        """Ask the pool to take the grant back, even when the calling task is being cancelled."""
        if self._gpu_request_id is None:
            return
        task = in_background(self._release(self._gpu_request_id, self.gpu_owner()))
        self._gpu_request_id = None
        await asyncio.shield(task)

    async def _release(self, request_id: str, owner: Owner) -> None:
        try:
            await asyncio.wait_for(self.pool.release(request_id), 5)
            _clean.add(owner)
        except (NbgpuError, asyncio.TimeoutError) as error:
            self.log.warning("%s: could not release request %s yet: %s", self._log_name, request_id, error or type(error).__name__)
            in_background(self._release_later(request_id))

    async def _release_later(self, request_id: str) -> None:
        """Ask again until the pool answers. In the end a reservation ends by its TTL, a slice with its processes."""
        deadline = time.monotonic() + _RELEASE_SECONDS
        while time.monotonic() < deadline:
            await asyncio.sleep(1)
            with suppress(NbgpuError, asyncio.TimeoutError):
                await asyncio.wait_for(self.pool.release(request_id), 5)
                self.log.info("%s: released request %s", self._log_name, request_id)
                return

    async def run_post_stop_hook(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Run the admin's hook, then release: the hub calls this after every end of a start or a server, unlike `stop`."""
        try:
            await maybe_future(super().run_post_stop_hook())
        finally:
            await self.release_slice()

    async def release_slice(self) -> None:
        """Release the grant; when the server could not be stopped, make sure that it stays counted until it is gone."""
        pid = self.gpu_server_pid()
        if self._gpu_request_id is not None and not self._gpu_bound and pid:
            with suppress(NbgpuError):
                await self.pool.bind(self._gpu_request_id, pid)
        await self.give_back()

    def gpu_running_request(self) -> str | None:
        """Return the id of the slice that a running server holds; None: it has none, or has not started yet."""
        return self._gpu_request_id if self._gpu_bound and self.ready else None

    def gpu_server_pid(self) -> int | None:
        """Return the pid of this server while it lives on this machine."""
        return None

    def leave_gpu_queue(self) -> bool:
        """End a start that waits for a GPU; False when none does."""
        if self._gpu_request_id is None or not self._gpu_waiting:
            return False
        self._gpu_leaving.set()
        return True

    def gpu_url(self, action: str) -> str:
        """Return where the button for an action of the queue page posts to."""
        base = self.hub.base_url if self.hub else "/hub/"
        return url_concat(url_path_join(base, "nbgpu", action), {"user": self.user.name, "server": self.name})

    # -- state: what a restarted hub needs

    def save_early_state(self) -> None:
        """Save the state before `start` returns: a hub that is killed meanwhile finds and releases what it had asked for."""
        if self.orm_spawner is not None:
            self.orm_spawner.state = self.get_state()
            self.user.db.commit()

    def get_state(self) -> dict[str, Any]:
        """Add the request id: all that is needed to release."""
        state = super().get_state()
        if self._gpu_request_id:
            state["gpu_request_id"] = self._gpu_request_id
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Take the request id back. Never asks the pool, which starts after this."""
        super().load_state(state)
        self._gpu_request_id = state.get("gpu_request_id")
        self._gpu_bound = self._gpu_request_id is not None
        if self._gpu_bound:
            askback.watch(self)

    def clear_state(self) -> None:
        """Forget the last start's messages; not the request id, which is still to be released after a server died."""
        super().clear_state()
        self._gpu_progress = waiting.Progress()

    async def progress(self) -> AsyncGenerator[dict[str, Any], None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Yield what happens while waiting for a GPU, then what the spawner itself has to say."""
        async for event in self._gpu_progress.events(lambda: self._gpu_progress):
            yield event
        async for event in super().progress():
            if (
                event.get("message") == "Spawning server..." and self._gpu_request_id is not None
            ):  # the hub's, where there is nothing to tell
                event = {**event, "message": "The GPU is yours. Your server is starting; that takes some seconds."}
            yield event


def _short(name: str) -> str:
    """Return a name as the pool takes it: one that is too long is cut, and still no other's."""
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 65]}~{hashlib.sha256(name.encode()).hexdigest()}"


def in_background(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Start `work`, which goes on even when whoever waits for it is cancelled."""
    task = asyncio.ensure_future(work)
    _background.add(task)  # the loop holds tasks weakly
    task.add_done_callback(_background.discard)
    return task
