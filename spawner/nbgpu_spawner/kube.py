"""KubeGPUSpawner: KubeSpawner with a slice of a GPU. The pod builder is pure; the class only joins it to the mixin."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

from jupyterhub.utils import maybe_future
from kubernetes_asyncio.client.models import CoreV1ResourceClaim, V1EnvVar, V1Pod, V1PodResourceClaim, V1ResourceRequirements
from kubespawner import KubeSpawner
from traitlets import Bool, default

from nbgpu.errors import NbgpuError
from nbgpu.models import Grant

from .local import PROVISIONER
from .mixin import GPUSliceMixin
from .profiles import Profile, custom_fields

REQUEST_ANNOTATION = "nbgpu.io/request-id"
OWNER_ANNOTATION = "nbgpu.io/owner"
SLICE_LABEL = "nbgpu.io/slice"
CLAIM_IN_POD = "nbgpu"
NOTEBOOK = "notebook"


def claim_name(request_id: str) -> str:
    """Return the name of the ResourceClaim that the pool makes for a request."""
    return f"nbgpu-{request_id}"


def with_slice(pod: V1Pod, grant: Grant | None, *, provisioner: bool = False) -> V1Pod:
    """Return a copy of `pod` that carries `grant`.

    Parameters
    ----------
    pod : V1Pod
        As KubeSpawner makes it. Not changed.
    grant : Grant, optional
        None for a server without a GPU: its pod is only kept from seeing any.
    provisioner : bool
        The image has nbgpu's kernel provisioner.
    """
    pod = copy.deepcopy(pod)
    for container in [*(pod.spec.init_containers or []), *pod.spec.containers]:
        # CUDA images say "all", which an NVIDIA runtime obeys even for a pod that claims nothing; CDI devices do not need it
        _set_env(container, "NVIDIA_VISIBLE_DEVICES", "void")
    if grant is None:
        return pod
    request = grant.request
    notebook = next(container for container in pod.spec.containers if _name_of(container) == NOTEBOOK)
    if notebook.resources is None:
        notebook.resources = V1ResourceRequirements()
    notebook.resources.claims = [*(notebook.resources.claims or []), CoreV1ResourceClaim(name=CLAIM_IN_POD)]
    if provisioner:
        _set_env(notebook, "JUPYTER_DEFAULT_PROVISIONER_NAME", PROVISIONER)
    claim = V1PodResourceClaim(name=CLAIM_IN_POD, resource_claim_name=claim_name(request.request_id))
    pod.spec.resource_claims = [*(pod.spec.resource_claims or []), claim]
    pod.metadata.labels = {**(pod.metadata.labels or {}), SLICE_LABEL: request.request_id}
    pod.metadata.annotations = {
        **(pod.metadata.annotations or {}),
        REQUEST_ANNOTATION: request.request_id,
        OWNER_ANNOTATION: json.dumps(request.owner.model_dump(mode="json"), sort_keys=True),
    }
    return pod


def _set_env(container: Any, name: str, value: str) -> None:
    """Set a variable of a container; what an admin wrote in plain dicts KubeSpawner leaves as dicts, in part or whole."""
    plain = isinstance(container, dict)
    env = (container.get("env") if plain else container.env) or []
    env = [*(variable for variable in env if _name_of(variable) != name), V1EnvVar(name=name, value=value)]
    if plain:
        container["env"] = env
    else:
        container.env = env


def _name_of(item: Any) -> str:
    return item["name"] if isinstance(item, dict) else item.name


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

    @default("options_form")
    def _default_gpu_options_form(self) -> Any:
        own_template = self.profile_form_template or self.additional_profile_form_template_paths
        return self._options_form_default() if own_template else GPUSliceMixin.render_gpu_form

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._gpu_grant: Grant | None = None

    def _others_read_options(self) -> bool:
        return True  # KubeSpawner itself lets unknown keys pass, and hooks of z2jh users read them

    async def apply_gpu_profile(self, profile: Profile | None, options: dict[str, Any]) -> None:
        """Do nothing yet: KubeSpawner applies profiles in `load_user_options`."""

    async def load_user_options(self) -> None:
        """Apply the profile as KubeSpawner does, its errors as plain refusals, then a custom choice's fields."""
        self._gpu_grant = None
        try:
            profile = await self.check_gpu_options(self.user_options)
        except NbgpuError as error:
            raise self.refuse(error) from None
        await super().load_user_options()
        for name, value in custom_fields(profile, self.user_options).items() if profile else ():
            setattr(self, name, value)

    async def get_pod_manifest(self) -> V1Pod:
        """Return the pod with its slice: acquired and bound here, as late as can be, on the pod that KubeSpawner made."""
        pod = await maybe_future(super().get_pod_manifest())
        if self._gpu_grant is None:
            self._gpu_grant = await self.acquire_slice()
        if self._gpu_grant is not None:
            try:
                self.save_early_state()
                await self.bind_slice(None)
            except BaseException as error:
                await self.give_back()
                if isinstance(error, NbgpuError):
                    raise self.refuse(error) from None
                raise
        return with_slice(pod, self._gpu_grant, provisioner=self.gpu_image_has_lab)

    async def poll(self) -> Any:
        """Poll the pod; take the request id from it where a killed hub never saved it."""
        status = await super().poll()
        if status is None and self._gpu_request_id is None:
            pod = self.pod_reflector.pods.get(f"{self.namespace}/{self.pod_name}")  # pyright: ignore[reportOptionalMemberAccess]
            annotations = ((pod or {}).get("metadata") or {}).get("annotations") or {}
            if REQUEST_ANNOTATION in annotations:
                self._gpu_request_id, self._gpu_bound = annotations[REQUEST_ANNOTATION], True
        return status


class KubeGPUSpawner(KubeGPUMixin, KubeSpawner):
    """Servers as pods, each with a slice of a GPU."""
