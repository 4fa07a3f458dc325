"""What a user or an admin may ask of the GPU, and whether it can be had at all. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from traitlets import Dict

from nbgpu.errors import InvalidValue
from nbgpu.models import Device, Mode, Owner, Request, Shape
from nbgpu.quantities import format_memory, format_share, least_allowed, memory_share_bytes, parse_fraction, parse_memory

FIELDS = ("gpu_fraction", "gpu_memory", "gpu_compute", "gpu_count", "gpu_model", "gpu_mode")
"""The spawner's traits that say how much GPU a server gets; also the names in ``user_options`` of a custom choice."""
SESSION = "gpu_session_seconds"
"""How long a server runs at most: the admin's word alone, in the configuration or a profile."""
SETTINGS = (*FIELDS, SESSION)
"""The spawner's traits of which a request is made."""
LABELS: Mapping[str, str] = {
    "profile": "Profile",
    "gpu_fraction": "Share of a GPU",
    "gpu_memory": "GPU memory",
    "gpu_compute": "Share of the GPU's time",
    "gpu_count": "Number of GPUs",
    "gpu_model": "GPU model",
    "gpu_mode": "Mode",
}
"""What the start page calls them: errors use the same words, on the page and from the REST API."""
MOST_DEVICES = 16


class NotAnObject(dict[str, Any]):
    """What came as ``user_options`` and is no JSON object: empty as options, until they are checked and refused."""

    def __init__(self, value: object):
        super().__init__()
        self.value = value


class UserOptions(Dict):
    """Takes what JupyterHub 5 passes on unseen. A plain `Dict` raises while the hub sets a start up: a 500, and a server that never was."""

    def validate(self, obj: Any, value: Any) -> Any:
        return super().validate(obj, value if isinstance(value, dict) else NotAnObject(value))


@dataclass(frozen=True)
class Wish:
    """How much GPU a server shall have; `asked` keeps the words it was asked with, for error messages."""

    shape: Shape
    mode: Mode
    asked: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def request(self, request_id: str, owner: Owner, groups: Iterable[str]) -> Request:
        """Return this wish as the request that the pool gets."""
        shape = self.shape
        return Request(
            request_id=request_id,
            owner=owner,
            groups=list(groups),
            device_count=shape.device_count,
            compute_milli=shape.compute_milli,
            memory_milli=shape.memory_milli,
            memory_bytes=shape.memory_bytes,
            model=shape.model,
            mode=self.mode,
            session_seconds=shape.session_seconds,
        )

    def __str__(self) -> str:
        shape = self.shape
        share = shape.memory_milli or shape.compute_milli
        if shape.memory_bytes:
            what = f"{format_memory(shape.memory_bytes)} of a GPU"
        elif share == 1000:
            what = "a whole GPU"
        else:
            what = f"{format_share(share or 0)} of a GPU"
        if shape.device_count > 1:
            what = f"{what}, on each of {shape.device_count} GPUs"
        return f"{what} ({shape.model})" if shape.model else what


def wish_from(values: Mapping[str, Any]) -> Wish | None:
    """Return what `values` (`SETTINGS` to values, None or missing = not set) ask for; None is a server without a GPU.

    Raises
    ------
    InvalidValue
        Names the field and the allowed range.
    """
    asked = {name: values[name] for name in FIELDS if values.get(name) not in (None, "")}
    fraction = _parsed(parse_fraction, "gpu_fraction", asked)
    compute = _parsed(parse_fraction, "gpu_compute", asked) if "gpu_compute" in asked else fraction
    memory_bytes = _parsed(parse_memory, "gpu_memory", asked)
    count = _count(asked.get("gpu_count", 1))
    mode = _mode(asked.get("gpu_mode", "burst"))
    model = _model(asked.get("gpu_model"))
    if fraction is None and compute is None and memory_bytes is None:
        return None
    shape = Shape(
        device_count=count,
        compute_milli=compute,
        memory_milli=fraction if memory_bytes is None else None,
        memory_bytes=memory_bytes,
        model=model,
        session_seconds=_session(values.get(SESSION)),
    )
    return Wish(shape=shape, mode=mode, asked=asked)


def _session(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 60 <= value <= 1e7:
        raise InvalidValue(SESSION, value, "a number of seconds from 60 to 10000000")
    return float(value)


def check_against(wish: Wish, devices: Iterable[Device], least_bytes: int = 0) -> None:
    """Refuse what no machine of the pool could ever hold.

    Parameters
    ----------
    wish : Wish
        What is asked for.
    devices : iterable of Device
        All devices of the pool; none known means nothing can be said.
    least_bytes : int
        The least memory that a slice may have.

    Raises
    ------
    InvalidValue
        Names the field and what there is.
    """
    known = list(devices)
    if not known:
        return
    shape = wish.shape
    if shape.model is not None:
        models = sorted({device.model for device in known})
        known = [device for device in known if device.model == shape.model]
        if not known:
            raise wrong("gpu_model", shape.model, "one of " + ", ".join(models))
    if shape.memory_bytes is not None:
        most = max(device.usable_bytes for device in known)
        if shape.memory_bytes > most:
            raise wrong("gpu_memory", wish.asked.get("gpu_memory"), f"at most {format_memory(most)}, what one GPU has")
    smallest = min(device.usable_bytes for device in known if device.usable_bytes >= (shape.memory_bytes or 0))
    part = shape.memory_bytes or memory_share_bytes(smallest, shape.memory_milli or shape.compute_milli or 0)
    allowed = least_allowed(part, smallest, least_bytes)
    if allowed is not None:
        field = next(name for name in ("gpu_memory", "gpu_fraction", "gpu_compute") if name in wish.asked)
        raise wrong(field, wish.asked[field], allowed)
    nodes = [device.node for device in known if device.usable_bytes >= (shape.memory_bytes or 0)]
    most = max(nodes.count(node) for node in nodes)
    if shape.device_count > most:
        raise wrong("gpu_count", shape.device_count, _whole(most) + ", the GPUs of one machine")


def wrong(field: str, value: object, allowed: str) -> InvalidValue:
    """Return the error for an input of the start page, in the words of that page."""
    return InvalidValue(field, value, allowed, LABELS.get(field))


def _parsed(parse: Callable[[Any, str], int], field: str, asked: Mapping[str, Any]) -> int | None:
    if field not in asked:
        return None
    try:
        return parse(_plain_bytes(asked[field]) if parse is parse_memory else asked[field], field)
    except InvalidValue as error:
        raise wrong(field, asked[field], error.allowed) from None


def _whole(most: int) -> str:
    return "1" if most == 1 else f"a whole number from 1 to {most}"


def _plain_bytes(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _count(value: Any) -> int:
    text = value.strip() if isinstance(value, str) else value
    if isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 10:
        text = int(text)
    if isinstance(text, bool) or not isinstance(text, int) or not 1 <= text <= MOST_DEVICES:
        raise wrong("gpu_count", value, _whole(MOST_DEVICES))
    return text


def _mode(value: Any) -> Mode:
    if value == "strict":
        return "strict"
    if value == "burst":
        return "burst"
    raise wrong("gpu_mode", value, "strict or burst")


def _model(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not 1 <= len(value) <= 255:
        raise wrong("gpu_model", value, "the name of a GPU model of the pool")
    return value
