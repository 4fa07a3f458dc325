"""The kubelet's side of the agent: two Unix sockets with gRPC on them.

Each agent has sockets of its own names, so that two of them on one node (an update of the DaemonSet) do not take each other's; the kubelet
calls the one that registered last. Until an agent has the runtime directory to itself it passes calls on to the one that has.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from nbgpu.claims import DRIVER, device_name
from nbgpu.errors import NbgpuError
from nbgpu.models import Device

from ..agent import Agent
from ..runtime import SOCKET_PATH_MAX, StartError
from .api import dra_pb2, health_pb2, registration_pb2
from .checkpoint import Prepared

log = logging.getLogger("nbgpu.agent")
SERVICE = "k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin"
VERSIONS = ["v1.DRAPlugin", "v1alpha1.DRAResourceHealth"]
ENDPOINT = "kubelet.endpoint"
"""In the runtime directory: the socket of the agent that has it."""
STANDBY_SECONDS = 40.0
"""How long a call waits for the agent before to end; the kubelet gives a call 45 s."""
GRACE_SECONDS = 2.0
HEALTH_SECONDS = 15.0
HEALTH_TICK_SECONDS = 1.0
AGAIN_SECONDS = 600.0
"""How long the log is spared the same refusal of the same claim, of a pod that is tried again without end."""
_grpc: Any = importlib.import_module("grpc")


class Claims(Protocol):
    """Who prepares claims."""

    async def prepare(self, namespace: str, name: str, uid: str) -> Sequence[Prepared]:
        """Make a claim's slice ready for containers."""
        ...

    async def unprepare(self, namespace: str, name: str, uid: str) -> None:
        """End a claim's slice."""
        ...


def _bytes(message: Any) -> bytes:
    return message.SerializeToString()


def registry(kubelet_dir: Path) -> Path:
    """Return where the kubelet looks for sockets of plugins."""
    return kubelet_dir / "plugins_registry"


def sweep(kubelet_dir: Path) -> None:
    """Remove sockets of agents that were killed: nobody listens there, and the kubelet goes on trying."""
    for path in (*registry(kubelet_dir).glob(f"{DRIVER}*-reg.sock"), *(kubelet_dir / "plugins" / DRIVER).glob("dra*.sock")):
        probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError:
            pass
        finally:
            probe.close()


class Plugin:
    """Serves the kubelet.

    Parameters
    ----------
    instance : str
        What tells this agent's sockets from another's: its pod's UID, or anything of its own.
    """

    def __init__(self, kubelet_dir: Path, runtime: Path, instance: str):
        self._kubelet = kubelet_dir
        self._note = runtime / ENDPOINT
        self.endpoint = kubelet_dir / "plugins" / DRIVER / f"dra-{instance}.sock"
        self.registration = registry(kubelet_dir) / f"{DRIVER}-{instance}-reg.sock"
        for path in (self.endpoint, self.registration):
            if len(str(path)) > SOCKET_PATH_MAX:
                raise StartError(f"The kubelet's directory {kubelet_dir} has too long a path for the sockets in it.")
        self.registered = asyncio.Event()
        self._claims: Claims | None = None
        self._agent: Agent | None = None
        self._serving = asyncio.Event()
        self._servers: list[Any] = []
        self._over = asyncio.Event()
        self._said: dict[str, tuple[str, float]] = {}
        """What the log was told last of a claim that is refused, and when; by its UID."""
        self.started = False

    # -- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the sockets; the kubelet finds them by itself."""
        self.started = True
        try:
            self.endpoint.parent.mkdir(parents=True, exist_ok=True)
            registry(self._kubelet).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartError(f"The kubelet's directory {self._kubelet} cannot be written: {error.strerror}. See --kubelet-dir.") from None
        await asyncio.to_thread(sweep, self._kubelet)
        handler = _grpc.unary_unary_rpc_method_handler
        dra = {
            "NodePrepareResources": handler(
                self._prepare, dra_pb2.NodePrepareResourcesRequest.FromString, dra_pb2.NodePrepareResourcesResponse.SerializeToString
            ),
            "NodeUnprepareResources": handler(
                self._unprepare, dra_pb2.NodeUnprepareResourcesRequest.FromString, dra_pb2.NodeUnprepareResourcesResponse.SerializeToString
            ),
        }
        health = {
            "NodeWatchResources": _grpc.unary_stream_rpc_method_handler(
                self._watch_health, health_pb2.NodeWatchResourcesRequest.FromString, health_pb2.NodeWatchResourcesResponse.SerializeToString
            )
        }
        registration = {
            "GetInfo": handler(self._info, registration_pb2.InfoRequest.FromString, registration_pb2.PluginInfo.SerializeToString),
            "NotifyRegistrationStatus": handler(
                self._told, registration_pb2.RegistrationStatus.FromString, registration_pb2.RegistrationStatusResponse.SerializeToString
            ),
        }
        await self._listen(self.endpoint, {SERVICE: dra, "v1alpha1.DRAResourceHealth": health})
        await self._listen(self.registration, {"pluginregistration.Registration": registration})

    async def _listen(self, path: Path, services: dict[str, dict[str, Any]]) -> None:
        path.unlink(missing_ok=True)
        server: Any = _grpc.aio.server(options=[("grpc.max_receive_message_length", 4 * 1024 * 1024)])
        server.add_generic_rpc_handlers([_grpc.method_handlers_generic_handler(name, methods) for name, methods in services.items()])
        before = os.umask(0o177)
        try:
            if server.add_insecure_port(f"unix:{path}") == 0:
                raise StartError(f"No socket can be made at {path}.")
            await server.start()
        finally:
            os.umask(before)
        self._servers.append(server)

    def serve(self, claims: Claims, agent: Agent) -> None:
        """Answer from now on: the runtime directory is this agent's."""
        self._claims, self._agent = claims, agent
        fresh = self._note.with_name(f".{ENDPOINT}")
        fresh.write_text(str(self.endpoint))
        fresh.rename(self._note)
        self._serving.set()

    async def stop(self) -> None:
        """Answer what is being asked, then remove the sockets."""
        self._over.set()
        self.registration.unlink(missing_ok=True)
        await asyncio.gather(*(server.stop(GRACE_SECONDS) for server in self._servers))
        for path in (self.registration, self.endpoint):
            path.unlink(missing_ok=True)

    # -- registration --------------------------------------------------------------------------------------------------

    async def _info(self, request: Any, context: Any) -> Any:
        return registration_pb2.PluginInfo(type="DRAPlugin", name=DRIVER, endpoint=str(self.endpoint), supported_versions=VERSIONS)

    async def _told(self, request: registration_pb2.RegistrationStatus, context: Any) -> Any:
        if request.plugin_registered:
            log.info("registered with the kubelet as driver %s", DRIVER)
            self.registered.set()
        else:
            log.error("the kubelet refuses driver %s: %s", DRIVER, request.error)
        return registration_pb2.RegistrationStatusResponse()

    # -- claims --------------------------------------------------------------------------------------------------------

    async def _prepare(self, request: Any, context: Any) -> Any:
        passed = await self._pass_on("NodePrepareResources", request, dra_pb2.NodePrepareResourcesResponse)
        if passed is not None:
            return passed
        found: dict[str, Any] = {}
        for claim in request.claims:
            parts, why = await self._try(claim, "prepared", lambda claims, one=claim: claims.prepare(one.namespace, one.name, one.uid))
            devices = [
                dra_pb2.Device(
                    request_names=[part.request],
                    pool_name=part.pool,
                    device_name=part.device,
                    cdi_device_ids=part.cdi,
                    **({} if part.share_id is None else {"share_id": part.share_id}),
                )
                for part in parts or ()
            ]
            found[claim.uid] = dra_pb2.NodePrepareResourceResponse(devices=devices, error=why)
        return dra_pb2.NodePrepareResourcesResponse(claims=found)

    async def _unprepare(self, request: Any, context: Any) -> Any:
        passed = await self._pass_on("NodeUnprepareResources", request, dra_pb2.NodeUnprepareResourcesResponse)
        if passed is not None:
            return passed
        found: dict[str, Any] = {}
        for claim in request.claims:
            _, why = await self._try(claim, "let go", lambda claims, one=claim: claims.unprepare(one.namespace, one.name, one.uid))
            found[claim.uid] = dra_pb2.NodeUnprepareResourceResponse(error=why)
        return dra_pb2.NodeUnprepareResourcesResponse(claims=found)

    async def _try(self, claim: Any, what: str, work: Callable[[Claims], Awaitable[Any]]) -> tuple[Any, str]:
        """Return what `work` returns and "", or None and why it failed."""
        assert self._claims is not None
        try:
            return await work(self._claims), ""
        except NbgpuError as error:
            level = logging.WARNING if self._is_news(claim.uid, error.message) else logging.DEBUG
            log.log(level, "claim %s/%s is not %s: %s", claim.namespace, claim.name, what, error.message)
            return None, error.message
        except Exception as error:  # never an end of the agent
            log.exception("claim %s/%s is not %s", claim.namespace, claim.name, what)
            return None, f"nbgpu's agent met an error ({type(error).__name__}); its log says more."

    def _is_news(self, uid: str, message: str) -> bool:
        """Return whether this was not said of the claim in the last `AGAIN_SECONDS`: the kubelet asks without end."""
        now = time.monotonic()
        self._said = {key: one for key, one in self._said.items() if now - one[1] < AGAIN_SECONDS}
        if self._said.get(uid, ("", 0.0))[0] == message:
            return False
        self._said[uid] = (message, now)
        return True

    async def _pass_on(self, method: str, request: Any, answer: Any) -> Any | None:
        """Return the answer of the agent that has the runtime directory; None once that is this one."""
        if self._serving.is_set():
            return None
        with contextlib.suppress(OSError):
            other = self._note.read_text()
            if other != str(self.endpoint) and os.path.exists(other):
                async with _grpc.aio.insecure_channel(f"unix:{other}") as channel:
                    call = channel.unary_unary(
                        f"/{SERVICE}/{method}",
                        request_serializer=_bytes,
                        response_deserializer=answer.FromString,
                    )
                    try:
                        return await call(request, timeout=STANDBY_SECONDS)
                    except _grpc.aio.AioRpcError as error:
                        log.info("the agent before this one does not answer any more (%s)", error.code().name)
        await asyncio.wait_for(self._serving.wait(), STANDBY_SECONDS)
        return None

    # -- health ----------------------------------------------------------------------------------------------------------

    async def _watch_health(self, request: Any, context: Any) -> AsyncGenerator[Any, None]:
        """Tell of every device, whenever one of them has changed, and often enough not to be thought dead."""
        told: list[bool] = []
        next_at = 0.0
        while not self._over.is_set():
            devices = list(self._agent.devices.values()) if self._agent is not None else []
            now = [device.healthy for device in devices]
            if devices and (now != told or time.monotonic() >= next_at):
                told, next_at = now, time.monotonic() + HEALTH_SECONDS
                yield health_pb2.NodeWatchResourcesResponse(devices=[self._health(device) for device in devices])
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._over.wait(), HEALTH_TICK_SECONDS)

    @staticmethod
    def _health(device: Device) -> Any:
        return health_pb2.DeviceHealth(
            device=health_pb2.DeviceIdentifier(pool_name=device.node, device_name=device_name(device.uuid)),
            health=health_pb2.HEALTHY if device.healthy else health_pb2.UNHEALTHY,
            last_updated_time=int(time.time()),
            health_check_timeout_seconds=int(4 * HEALTH_SECONDS),
        )
