"""The values that cross a boundary between parts, as JSON. One definition each; units are in the names.

``docs/interfaces.md`` says which route carries which model.
"""

from __future__ import annotations

import copy
from enum import Enum
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

API_VERSION = 1
"""Version of every HTTP API of nbgpu: the ``/v1`` of its paths."""

Mode = Literal["strict", "burst"]
Backend = Literal["limiter", "driver"]
SliceId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{6,46}[a-z0-9]$")]
"""Name of a request and of the slice that it becomes: a DNS label, made by the client (``uuid4().hex``)."""
KernelId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,39}$")]
"""A Jupyter kernel's id; 39 characters is what the shared layout holds."""
NAME_LENGTH = 255
Name = Annotated[str, StringConstraints(min_length=1, max_length=NAME_LENGTH)]
Namespace = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
"""Name of a Kubernetes namespace."""
Milli = Annotated[int, Field(ge=1, le=1000)]
Bytes = Annotated[int, Field(ge=0, le=2**60)]
SessionSeconds = Annotated[float, Field(gt=0, le=1e7, allow_inf_nan=False)]
Pid = Annotated[int, Field(ge=1, le=2**31 - 1)]


T = TypeVar("T")


class Model(BaseModel):
    """Immutable, and closed: a key that is not named here is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def read_answer(kind: TypeAdapter[T], data: Any) -> T:
    """Return an API's answer as a value; what a newer version says beyond it is left out.

    Parameters
    ----------
    kind : TypeAdapter
        What the answer is to be.
    data : object
        The answer, decoded.

    Raises
    ------
    ValidationError
        It is something else.
    """
    try:
        return kind.validate_python(data)
    except ValidationError as error:
        unknown = [one["loc"] for one in error.errors(include_url=False) if one["type"] == "extra_forbidden"]
        if len(unknown) < error.error_count():
            raise
        data = copy.deepcopy(data)
        for *where, name in unknown:
            inner = data
            for step in where:
                inner = inner[step]
            del inner[name]
        return kind.validate_python(data)


class Device(Model):
    """One physical GPU that nbgpu may slice."""

    uuid: Name
    index: Annotated[int, Field(ge=0, lt=64)]
    model: Name
    node: Name
    memory_bytes: Bytes
    reserve_bytes: Bytes = 0
    """Kept back for the driver and contexts; slices get what is left."""
    simulated: bool = False
    healthy: bool = True

    @property
    def usable_bytes(self) -> int:
        """Memory that slices may hold together: memory minus reserve."""
        return self.memory_bytes - self.reserve_bytes


class Owner(Model):
    """Who holds a slice: one (named) server of a user of a hub."""

    hub: Name
    user: Name
    server: Annotated[str, StringConstraints(max_length=NAME_LENGTH)] = ""


class Request(Model):
    """What a spawner asks the pool for: the same part of each of `device_count` devices of one node.

    `compute_milli` and `memory_milli` / `memory_bytes` may be given alone: the one that is missing follows
    the other (half of the memory brings half of the time). At least one of the three is needed.
    """

    request_id: SliceId
    owner: Owner
    groups: Annotated[list[Name], Field(max_length=1000)] = []
    device_count: Annotated[int, Field(ge=1, le=64)] = 1
    compute_milli: Milli | None = None
    memory_milli: Milli | None = None
    memory_bytes: Annotated[int, Field(ge=1024**2, le=2**60)] | None = None
    model: Name | None = None
    mode: Mode = "burst"
    namespace: Namespace | None = None
    """Kubernetes namespace of the server's pod; None on one machine."""
    session_seconds: SessionSeconds | None = None
    """How long the server runs at most, as its hub says; None: nobody knows. A client leaves it out where it is None: a pool that is older
    does not know it."""


class SliceDevice(Model):
    """A slice's part of one device."""

    uuid: Name
    index: Annotated[int, Field(ge=0, lt=64)]
    model: Name
    memory_bytes: Bytes
    compute_milli: Annotated[int, Field(ge=0, le=1000)]
    """0, as the memory, only while the slice is parked (docs/idle.md)."""


class Slice(Model):
    """What one server holds. `slice_id` is the request id of the request that it was granted for."""

    slice_id: SliceId
    owner: Owner
    node: Name
    mode: Mode
    devices: Annotated[list[SliceDevice], Field(min_length=1, max_length=32)]
    """As many as one ResourceClaim may hold."""
    simulated: bool = False
    groups: Annotated[list[Name], Field(max_length=1000)] = []
    """Those groups of the owner that have a quota: the pool finds them here again after a restart."""
    namespace: Namespace | None = None
    """Kubernetes namespace of the server's pod; None on one machine."""


class Resize(Model):
    """New limits of a running slice, on each of its devices; what is left out stays as it is."""

    memory_bytes: Annotated[int, Field(ge=1024**2, le=2**60)] | None = None
    memory_milli: Milli | None = None
    compute_milli: Milli | None = None
    mode: Mode | None = None


class GrantState(str, Enum):
    """Where a request is: ``queued -> reserved -> bound -> releasing -> gone``."""

    queued = "queued"
    reserved = "reserved"
    """Granted; falls back to the pool when its TTL ends before a server carries it."""
    bound = "bound"
    releasing = "releasing"
    """Asked back; still counted until its last process is gone."""
    gone = "gone"
    """Released, cancelled or expired: `reason` says which."""


class Grant(Model):
    """A request and what became of it."""

    request: Request
    state: GrantState
    slice: Slice | None = None
    """From ``reserved`` on."""
    position: int | None = None
    """Place in the queue, 1 = next."""
    wait_seconds: float | None = None
    """Estimate of the time until granted; None when nothing is known."""
    wait_guessed: bool = False
    """The estimate rests on how long servers usually run anywhere: too few have ended here."""
    expires_seconds: float | None = None
    """Time left of a reservation."""
    reason: str | None = None
    """Why it waits, or how it ended, in plain words."""
    note: str | None = None
    """What its user should know while it is held: that its pod finds no node and why, that a node has to be started first, that it could
    not be resized."""
    resizing: list[SliceDevice] | None = None
    """Limits that were asked for and are not in force yet; `slice` says what is."""


class Reservation(Model):
    """A window in which devices are kept for a group: the one that is on, else the next."""

    name: Name
    group: Name
    begins_seconds: float
    """Until it begins; below 0: since then."""
    ends_seconds: float
    place_count: int
    """Places that were asked for."""
    ready_count: int
    """Places that are free or held by the group now; 0 before the devices are chosen."""
    devices: list[Name]
    short_count: int
    """Devices that are missing: the pool has no more that work."""


class AskBack(Model):
    """A slice that its user is asked to give back. The pool ends no server: `needs` says who would have to do what."""

    request_id: SliceId
    owner: Owner
    kind: str
    """``guarantee``: its room was lent and is needed; ``reserved``: kept for a group from a time on; ``session``: it has run for as long as
    it may."""
    due_seconds: float
    """Until it should be stopped; below 0: since then."""
    idle: bool
    reason: str
    needs: str


class Launch(Model):
    """How to start a process inside a prepared slice on this machine."""

    env: dict[str, str]
    """Set these; an empty value means unset."""
    slice_dir: str
    socket: str


class LaunchRequest(Model):
    """A request for a slice of this machine that is to be prepared at once, when it is granted at once."""

    request: Request
    uid: Annotated[int, Field(ge=0, lt=2**32 - 1)] | None = None
    """Who may use the slice's files; None = the agent's own user."""


class LaunchGrant(Model):
    """What became of a `LaunchRequest`; `launch` where it was granted."""

    grant: Grant
    launch: Launch | None = None


class KernelLimit(Model):
    """A kernel's limit inside its server's slice, on each of its devices; None = the slice's own."""

    memory_bytes: Bytes | None = None
    compute_milli: Milli | None = None
    """Of the whole device's time, and never more than this, however idle the device is."""


class DeviceUsage(Model):
    """Use of a slice's part of one device."""

    uuid: Name
    index: int
    model: Name
    memory_limit_bytes: Bytes
    memory_used_bytes: Bytes
    compute_limit_milli: Milli
    compute_used_milli: Annotated[int, Field(ge=0)]
    """Busy GPU time over wall time in the last second, 1000 = the whole device."""
    utilization_percent: Annotated[int, Field(ge=0, le=100)]
    """`compute_used_milli` over the limit, capped: what NVML says inside the slice."""


class KernelDeviceUsage(Model):
    """Use of one device by one kernel."""

    uuid: Name
    memory_used_bytes: Bytes
    memory_peak_bytes: Bytes
    compute_used_milli: Annotated[int, Field(ge=0)]


class KernelAway(Model):
    """A kernel whose GPU memory its user has moved to the host (docs/idle.md)."""

    phase: Literal["parking", "parked", "restoring"]
    """On its way there, there, on its way back."""
    memory_bytes: Bytes
    since: float
    """Unix time, seconds."""
    wanted_seconds: float | None = None
    """How long it has waited for room to come back; None: nobody has used it since."""


class KernelUsage(Model):
    """Use by one kernel with all its processes; `kernel_id` None stands for everything else in the slice."""

    kernel_id: str | None
    pids: list[int]
    limit: KernelLimit
    """In force: a part of the slice's time follows the slice when that has another size, and memory is never more than the slice's."""
    limit_set: KernelLimit | None = None
    """As it was set, where that is something else."""
    devices: list[KernelDeviceUsage]
    refusals: int
    launches: int
    idle_seconds: float | None
    """Since its last launch; None when it never launched."""
    away: KernelAway | None = None
    """None: its memory is on the GPU."""


class Suspension(Model):
    """A process that the watchdog has suspended: it is not dead, and goes on when it may."""

    pid: int
    kernel_id: str | None
    """The notebook kernel that it says it is of."""
    kind: str
    """What it was suspended for, as in the watchdog's policy."""
    how: Literal["lock", "stop"]
    """``lock``: its calls to the GPU wait, it answers else; ``stop``: all of it stands still."""
    since: float
    """Unix time, seconds."""
    reason: str
    """What it did, for people."""


class Resume(Model):
    """Which suspended processes shall go on."""

    pid: Pid | None = None
    """None = all of the slice."""


class Lent(Model):
    """A slice whose GPU others may use while it is idle (docs/idle.md)."""

    phase: Literal["parking", "parked", "restoring"]
    memory_bytes: int
    """Of the slice's GPU memory: kept in the host's memory, or on its way there or back."""
    wanted_seconds: float | None = None
    """How long it has been wanted back; None: it is not."""
    position: int | None = None
    """Among those who want to come back to its GPUs, by how long they have: 1 = the next. None: it is not wanted back."""


class Usage(Model):
    """Use of one slice, now."""

    version: int = API_VERSION
    slice_id: SliceId
    mode: Mode
    backend: Backend
    simulated: bool
    time: float
    """Unix time, seconds."""
    devices: list[DeviceUsage]
    kernels: list[KernelUsage]
    suspended: list[Suspension] = []
    may_resume: bool = False
    """The slice's owner may let them go on."""
    lent: Lent | None = None
    """None: it holds its GPU."""
    may_suspend: bool = False
    """Its kernels' GPU memory may be moved to the host (``POST /v1/kernels/{kernel_id}/suspend``)."""


EventKind = Literal[
    "refused",
    "unlimited",
    "overhead",
    "over-limit",
    "over-share",
    "foreign",
    "hostile",
    "killed",
    "suspended",
    "resumed",
    "not-permitted",
    "limiter-only",
    "limit-changed",
    "kernel-ended",
    "throttled",
    "parked",
    "wanting",
    "restored",
    "suspended-by-user",
    "not-suspended",
    "wanting-memory",
    "restored-memory",
    "lost",
    "ended",
]
"""What agents tell of."""


class Event(Model):
    """Something that a person should know of a slice."""

    id: int
    """Rises by one; ask for what came after the last that you saw."""
    time: float
    """Unix time, seconds."""
    slice_id: SliceId | None
    kernel_id: str | None = None
    kind: str
    """What it is of, an `EventKind`; a newer agent may have others: who does not know one shows its message."""
    level: Literal["info", "warning", "error"]
    message: str
    """What happened, and what to do."""
    data: dict[str, int | float | str | None] = {}


class Idle(Model):
    """What the agent knows of a slice's being idle, and of its parking (docs/idle.md)."""

    state: Literal["held", "parking", "parked", "restoring"] = "held"
    idle_seconds: float | None = None
    """How long it has been idle; None: it cannot be parked now."""
    unused_seconds: float | None = None
    """How long no program has used its GPUs and no kernel of its server has been busy, whatever it holds; None: unknown, or kept."""
    full: Slice | None = None
    """With the limits that a parked slice comes back to."""
    wanted_seconds: float | None = None
    """How long a parked slice has wanted to come back; None: it does not."""
    position: int | None = None
    """Among those who want to come back to its GPUs, by how long they have: 1 = the next. None: it is not wanted back."""
    reason: str | None = None
    """Why it cannot be parked now, in words."""


class AgentSlice(Model):
    """A slice as the agent knows it: the truth on one machine."""

    slice: Slice
    """What it counts on its devices."""
    lowered: Slice | None = None
    """With the limits in force, while it still holds more memory than those: `slice` counts that until it is free."""
    state: Literal["prepared", "running", "releasing"]
    """``prepared``: no process has joined yet."""
    process_count: int
    created: float
    """Unix time, seconds."""
    memory_used_bytes: Bytes = 0
    backend: Backend = "limiter"
    """Who holds its memory: the limiter alone, or the driver too."""
    idle: Idle | None = None
    """None where slices are not parked."""


class AgentSlices(Model):
    """All slices of a node and its devices, with a generation that rises at every change of either."""

    generation: int
    slices: list[AgentSlice]
    devices: list[Device]


class Node(Model):
    """What an agent serves."""

    version: int = API_VERSION
    node: Name
    simulated: bool
    driver_version: str
    backend: Backend
    """Who holds slices' memory where it can: the limiter alone, or the driver too."""
    backend_reason: str = ""
    """Why it is that one."""
    devices: list[Device]


class Hint(Model):
    """How one idle server would let in somebody who waits (docs/placement.md). The pool only says so: nothing is moved or ended by it."""

    kind: Literal["move", "end"]
    """``move``: to another GPU, where it fits too; ``end``: it would have to stop."""
    request_id: SliceId
    """Who waits."""
    owner: Owner
    slice_id: SliceId
    """The idle server's."""
    slice_owner: Owner
    idle_seconds: float
    """How long it has been idle, as its node says."""
    from_devices: list[Name]
    """GPUs that it would leave, by UUID."""
    to_device: Name | None = None
    """Where it would go: a GPU of the same model."""
    to_node: Name | None = None
    devices: list[Name]
    """Where the request would go then."""


class Hints(Model):
    """All hints of a pool, in the order of its queue."""

    hints: list[Hint]
    idle_count: int
    """Servers that are idle for long enough and hold a GPU: all that could be moved."""
    parked_count: int
    """Servers that are parked: they hold nothing."""
    waiting_count: int


class Shape(Model):
    """What the start page asks about: a request without its owner."""

    device_count: Annotated[int, Field(ge=1, le=64)] = 1
    compute_milli: Milli | None = None
    memory_milli: Milli | None = None
    memory_bytes: Annotated[int, Field(ge=1024**2, le=2**60)] | None = None
    model: Name | None = None
    session_seconds: SessionSeconds | None = None


class AvailabilityQuery(Model):
    """Which of `shapes` could `owner` have now?"""

    owner: Owner
    groups: Annotated[list[Name], Field(max_length=1000)] = []
    shapes: Annotated[list[Shape], Field(max_length=100)]
    instead_of: SliceId | None = None
    """A request of theirs that waits, and that they would give up for it."""


class Availability(Model):
    """Whether one shape is free now, and if not, why and what to expect."""

    state: Literal["free", "wait", "forbidden", "impossible"]
    reason: str
    """Plain words: "free now", "in use: 3 people wait, about 4 minutes", "your quota is half a GPU"."""
    wait_seconds: float | None = None
    memory: dict[str, Bytes] = {}
    """What the shape means on each GPU model: memory limit in bytes by model name."""
    compute_milli: dict[str, Milli] = {}


class DeviceBooks(Model):
    """What the pool has given of one device."""

    device: Device
    memory_granted_bytes: Bytes
    compute_granted_milli: Annotated[int, Field(ge=0, le=1000)]
    slices: list[SliceId]
    least_bytes: Bytes = 0
    """The least memory that a new slice may have, of this GPU or any other (`smallest_memory` of the pool's configuration)."""
