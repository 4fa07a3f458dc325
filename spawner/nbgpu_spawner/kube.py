"""KubeGPUSpawner: KubeSpawner with a slice of a GPU. What it adds to a pod is `pod`'s; here is when, and what follows from it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from aiohttp import ClientError
from jupyterhub.utils import maybe_future
from kubernetes_asyncio.client import V1DeleteOptions, V1Pod, V1Preconditions
from kubernetes_asyncio.client.exceptions import ApiException
from kubespawner import KubeSpawner
from traitlets import Bool, default

from nbgpu.errors import NbgpuError, Unavailable
from nbgpu.models import Grant, GrantState, Request

from .mixin import GPUSliceMixin, in_background
from .options import Wish
from .pod import carried_by, lives, name_slice, plain_part, why_refused, why_unscheduled, with_slice
from .profiles import Profile, custom_fields, for_groups

LATE_SECONDS = 90.0
"""How long after a start was cut short its pod may still appear: an API server drops a request after a minute."""
KEEP_TRYING_SECONDS = 600.0
PATIENCE_SECONDS = 90.0
_AWAY = (ClientError, ConnectionError, TimeoutError, asyncio.TimeoutError)

if TYPE_CHECKING:

    class _Mixed(GPUSliceMixin, KubeSpawner):  # pyright: ignore
        """What the mixin is mixed with."""

else:
    _Mixed = GPUSliceMixin


class KubeGPUMixin(_Mixed):
    """`GPUSliceMixin` for KubeSpawner and its subclasses: ``class Mine(KubeGPUMixin, MyKubeSpawner)``."""

    gpu_image_has_lab = Bool(
        False,
        config=True,
        help="""The users' image has nbgpu[lab] installed, so kernels may be started by its provisioner.
        Without it there, this would hide every kernel.""",
    )

    gpu_settles_at_once = False

    @default("options_form")
    def _default_gpu_options_form(self) -> Any:
        own_template = self.profile_form_template or self.additional_profile_form_template_paths
        return self._options_form_default() if own_template else GPUSliceMixin.render_gpu_form

    @default("k8s_api_request_retry_timeout")
    def _default_retry_timeout(self) -> int:
        return int(PATIENCE_SECONDS)  # seconds: an API server that is being replaced is back by then

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._gpu_grant: Grant | None = None
        self._gpu_claim_made = False
        self._gpu_creating = False
        """A pod was sent for, and the API server has not yet said that it has it."""
        self._gpu_id_from_pod = False

    def _others_read_options(self) -> bool:
        return True  # KubeSpawner itself lets unknown keys pass, and hooks of z2jh users read them

    async def apply_gpu_profile(self, profile: Profile | None, options: dict[str, Any]) -> None:
        """Do nothing yet: KubeSpawner applies profiles in `load_user_options`."""

    def _get_initialized_profile_list(self, profile_list: Any) -> Any:
        try:
            mine = for_groups(profile_list, self.gpu_group_names())
        except NbgpuError as error:
            raise self.refuse(error) from None
        return super()._get_initialized_profile_list(mine)

    async def load_user_options(self) -> None:
        """Apply the profile as KubeSpawner does, its errors as plain refusals, then a custom choice's fields."""
        self._gpu_grant, self._gpu_creating = None, False
        try:
            profile = await self.check_gpu_options(self.user_options)
        except NbgpuError as error:
            raise self.refuse(error) from None
        await super().load_user_options()
        for name, value in custom_fields(profile, self.user_options).items() if profile else ():
            setattr(self, name, value)

    # -- a start

    async def get_pod_manifest(self) -> V1Pod:
        """Return the pod with its slice: acquired and bound here, as late as can be, on the pod that KubeSpawner made."""
        pod = await maybe_future(super().get_pod_manifest())
        if self._gpu_grant is None:
            self._gpu_grant = await self._get_slice()
        return with_slice(pod, self._gpu_grant, provisioner=self.gpu_image_has_lab)

    async def _get_slice(self) -> Grant | None:
        """Acquire a slice, have its claim made, and say that a pod will carry it."""
        grant = await self.acquire_slice()
        if grant is None:
            return None
        self._gpu_id_from_pod = False
        try:
            if not self._gpu_claim_made:  # it had to wait
                await self._patiently(lambda: self.pool.prepare(grant.request.request_id, None), time.monotonic())
            self.save_early_state()
            await self.bind_slice(None)
        except BaseException as error:
            await self.give_back()
            if isinstance(error, NbgpuError):
                raise self.refuse(error) from None
            raise
        return grant

    def gpu_request(self, wish: Wish, request_id: str) -> Request:
        """Return what the pool is asked for: in the namespace of the pod."""
        return super().gpu_request(wish, request_id).model_copy(update={"namespace": self.namespace})

    async def ask_for_slice(self, request: Request) -> Grant:
        """Send the request; what is granted at once has its claim already."""
        answer = await self.pool.launch(request, None)
        self._gpu_claim_made = answer.launch is not None
        return answer.grant

    def gpu_patience_seconds(self) -> float:
        """Return how long a start waits for a pool that is away: in a cluster it may be on its way to another node."""
        return min(PATIENCE_SECONDS, max(10.0, self.start_timeout / 2))

    def gpu_got(self, wish: Wish, grant: Grant) -> str:
        """Return what a user reads once there is a slice."""
        if grant.note or grant.slice is None:
            return f"Got {wish}. {plain_part(grant.note or '')}".rstrip()
        return f"Got {wish}. Waiting for {grant.slice.node} to start your server."

    async def make_way(self) -> None:
        """Remove a pod of this server that a killed hub or a failed stop has left.

        KubeSpawner would when it meets it, after the slice was acquired: which may be waiting for what that pod holds.
        """
        if self._pod() is None:
            return
        self._gpu_progress.tell("Removing what is left of your last server.", percent=5)
        try:
            await self.stop(True)
        except (ApiException, *_AWAY) as error:
            self.log.warning("%s: the pod of its last life cannot be removed: %s", self._log_name, _short_words(error))
            message = "What is left of your last server could not be removed yet. Try again in a minute."
            raise Unavailable(message, code="old-server") from error

    async def _make_create_pod_request(self, pod: V1Pod, request_timeout: float) -> bool:
        """Create the pod as KubeSpawner does, again also when the API server is away; before each new try look after the slice.

        KubeSpawner deletes a pod that it meets. Where that was this very pod, its answer being late, the slice was in use; and between
        two tries a slice may run out that no pod carries.
        """
        if self._gpu_creating and self._gpu_grant is not None:
            await self._keep_slice(pod)
        self._gpu_creating = True
        try:
            made = await super()._make_create_pod_request(pod, request_timeout)
        except (ApiException, *_AWAY) as error:
            if isinstance(error, ApiException) and _is_refusal(error):
                self._gpu_creating = False
                self.log.error("%s: Kubernetes refuses its pod: %s %s", self._log_name, error.status, _message_of(error))
                raise self.refuse(NbgpuError(why_refused(error.body), code="pod-refused", status=503)) from None
            self.log.warning("%s: creating the pod failed, trying again: %s", self._log_name, _short_words(error))
            self._gpu_progress.tell("Kubernetes does not answer; trying again.", percent=20)
            made = False
        if made:
            self._gpu_creating = False
            self._gpu_progress.settle()  # what follows, Kubernetes' events tell
        return made

    async def _keep_slice(self, pod: V1Pod) -> None:
        """Make sure that the slice of a pod that is to be created once more is still there; else get another."""
        assert self._gpu_grant is not None
        request = self._gpu_grant.request
        try:
            grant = await self._patiently(lambda: self.ask_for_slice(request), time.monotonic())
        except NbgpuError as error:
            self.log.warning("%s: request %s is lost: %s", self._log_name, request.request_id, error)
        else:
            if grant.state in (GrantState.reserved, GrantState.bound):
                return
            self.log.warning("%s: request %s is %s: %s", self._log_name, request.request_id, grant.state.value, grant.reason)
        await self.give_back()
        self._gpu_grant = await self._get_slice()
        if self._gpu_grant is not None:
            name_slice(pod, self._gpu_grant)

    # -- the end

    async def release_slice(self) -> None:
        """Release the slice, and see to a pod that may still carry it: one that could not be stopped, or that comes late."""
        request_id, late = self._gpu_request_id, self._gpu_creating
        self._gpu_creating = False
        if request_id is not None and self._gpu_id_from_pod:
            # who can edit pods could name somebody else's slice there: what is this owner's is known without it
            self._gpu_request_id, self._gpu_id_from_pod = None, False
            await asyncio.shield(in_background(self._release_owner(request_id)))
        else:
            await super().release_slice()
        if request_id is not None and (late or self._lives(request_id)):
            in_background(self._remove_late(request_id))

    async def _release_owner(self, request_id: str) -> None:
        try:
            await asyncio.wait_for(self.pool.release_owner(self.gpu_owner()), 5)
        except (NbgpuError, asyncio.TimeoutError) as error:
            self.log.warning("%s: could not release what its pod carried (%s): %s", self._log_name, request_id, error)

    async def _remove_late(self, request_id: str) -> None:
        """Delete the pod of a slice that was given back, for as long as one may appear or refuses to go."""
        begun = time.monotonic()
        seen = False
        while time.monotonic() - begun < (KEEP_TRYING_SECONDS if seen else LATE_SECONDS):
            await asyncio.sleep(1)
            if not self._lives(request_id):
                if seen:
                    return
                continue
            if not seen:
                self.log.warning("%s: its pod is there though its server is stopped (%s): deleting it", self._log_name, request_id)
            seen = True
            with suppress(ApiException, *_AWAY):
                await self._delete_pod(self._pod() or {})

    async def _delete_pod(self, pod: Mapping[str, Any]) -> None:
        meta = pod.get("metadata") or {}
        if meta:
            only_this = V1DeleteOptions(preconditions=V1Preconditions(uid=meta["uid"]), grace_period_seconds=self.delete_grace_period)
            await asyncio.wait_for(
                self.api.delete_namespaced_pod(name=meta["name"], namespace=meta["namespace"], body=only_this),
                self.k8s_api_request_timeout,
            )

    # -- what there is

    def _pod(self) -> Mapping[str, Any] | None:
        """Return this server's pod, as the watch that KubeSpawner has shows it."""
        reflector = self.pod_reflector
        return reflector.pods.get(f"{self.namespace}/{self.pod_name}") if reflector is not None else None

    def _lives(self, request_id: str) -> bool:
        pod = self._pod()
        return carried_by(pod) == request_id and lives(pod)

    async def _start_reflector(self, kind: str, reflector_class: Any, replace: bool = False, **kwargs: Any) -> Any:
        """Watch as KubeSpawner does, patiently, and anew where a watch never began or gave up.

        KubeSpawner keeps such a watch for good. It shows no pods, so that every server counts as stopped while its pod runs on.
        """
        begun = time.monotonic()
        while True:
            there = self.__class__.reflectors.get(self._get_reflector_key(kind))
            dead = there is not None and there.first_load_future.done() and (there.watch_task is None or there.watch_task.done())
            try:
                return await super()._start_reflector(kind, reflector_class, replace=replace or dead, **kwargs)
            except Exception as error:  # also what it trips over when an error's body is no JSON
                self.log.warning("%s: cannot watch %s: %s", self._log_name, kind, _short_words(error))
                if _is_refusal(error):
                    raise
                if time.monotonic() - begun > self.gpu_patience_seconds():
                    away = Unavailable("Kubernetes does not answer. Try again in a minute.", code="cluster-away")
                    raise self.refuse(away) from error
            self._gpu_progress.tell("Kubernetes does not answer; trying again.", percent=5)
            await asyncio.sleep(0.5)

    async def _watches(self) -> bool:
        """Return whether the pods are being watched. It goes on trying; what calls this does not wait for more than one answer."""
        watching = in_background(self._start_watching_pods())
        await asyncio.wait({watching}, timeout=self.k8s_api_request_timeout)
        return watching.done() and watching.exception() is None

    async def poll(self) -> Any:
        """Poll the pod; take the request id from it where a killed hub never saved it.

        While Kubernetes does not answer, what ran counts as running: a hub that starts then must not end its users' servers.
        """
        if not await self._watches():
            return None
        if self._gpu_request_id is None:
            found = carried_by(self._pod())  # before KubeSpawner's poll, which deletes a pod that has ended
            if found is not None:
                self._gpu_request_id, self._gpu_bound, self._gpu_id_from_pod = found, True, True
        return await super().poll()

    def get_state(self) -> dict[str, Any]:
        """Add whether only a pod's annotation tells the request id: who can edit pods could have written it."""
        return {**super().get_state(), **({"gpu_id_from_pod": True} if self._gpu_id_from_pod else {})}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take the request id back, and how far it can be believed."""
        super().load_state(state)
        self._gpu_id_from_pod = bool(state.get("gpu_id_from_pod"))

    async def progress(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield what happens while waiting for a GPU, then Kubernetes' events, and what they mean where it is not plain."""
        told = ""
        async for event in super().progress():
            yield event
            plain = why_unscheduled(event.get("raw_event"))
            if plain is not None:
                plain = await self._what_pool_says() or plain
                if plain != told:
                    told = plain
                    yield {"progress": event.get("progress", 30), "message": plain}

    async def _what_pool_says(self) -> str:
        """Return what the pool says of a slice whose pod finds no node: it may be trying another."""
        grant: Grant | None = None
        if self._gpu_request_id is not None:
            with suppress(NbgpuError):
                grant = await self.pool.grant(self._gpu_request_id)
        return plain_part(grant.note) if grant is not None and grant.note else ""


def _is_refusal(error: BaseException) -> bool:
    """Return whether the API server has answered that this cannot be: asking again would not help."""
    return isinstance(error, ApiException) and error.status is not None and error.status < 500


def _message_of(error: ApiException) -> str:
    """Return the API server's own words."""
    with suppress(TypeError, ValueError, AttributeError):
        return str(json.loads(error.body or "")["message"])[:1000]
    return str(error.reason)


def _short_words(error: BaseException) -> str:
    if isinstance(error, ApiException):
        return f"{error.status} {error.reason}"
    return str(error) or type(error).__name__


class KubeGPUSpawner(KubeGPUMixin, KubeSpawner):
    """Servers as pods, each with a slice of a GPU."""
