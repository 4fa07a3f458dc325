"""Why no GPU can be had, in words: none could ever hold a request, or those with room take nobody now. Pure."""

from __future__ import annotations

from itertools import groupby

from .books import Books
from .shapes import Want, resolve

UNKNOWN = "the GPU is not healthy, or its node is away"


def out_of_service(books: Books, want: Want) -> str | None:
    """Return, in words, why `want` cannot be had of a GPU that has room for it; None where there is no such GPU.

    Parameters
    ----------
    want : Want
        For which no place was found on devices that are healthy.
    """
    if books.all_healthy:
        return None
    for _, node in groupby(books.ordered_rooms(), key=lambda room: room.device.node):
        fit = [room for room in node if (part := resolve(want, room.device)) is not None and room.fits(part)]
        off = [room.device.uuid for room in fit if not room.device.healthy]
        if off and len(fit) >= want.device_count:
            return f"out of service: {books.unusable.get(off[0], UNKNOWN)}"
    return None


def impossible(books: Books, model: str | None, device_count: int) -> str:
    """Return why no device could ever hold a request, in words."""
    models = sorted({device.model for device in books.devices.values()})
    if not models:
        return "No node offers a GPU at the moment. If that lasts, tell the admin: nbgpu's agent has to run on nodes with GPUs."
    if model is not None and model not in models:
        return f"No GPU here is a {model}; there are: {', '.join(models)}."
    if device_count > 1:
        return f"No node here has {device_count} GPUs with that much each."
    return "No GPU here has that much."
