"""Why no GPU can be had, in words: none could ever hold a request, or those with room take nobody now. Pure."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

from nbgpu.quantities import format_memory
from nbgpu.words import counted

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


def impossible(books: Books, want: Want) -> str:
    """Return why no device could ever hold a request, in words."""
    models = sorted({device.model for device in books.devices.values()})
    if not models:
        return "No node offers a GPU at the moment. If that lasts, tell the admin: nbgpu's agent has to run on nodes with GPUs."
    if want.model is not None and want.model not in models:
        return f"No GPU of model {want.model} is here; there are: {', '.join(models)}."
    alike = [device for device in books.devices.values() if want.model in (None, device.model)]
    most = format_memory(max(device.usable_bytes for device in alike))
    if want.device_count > 1:
        count = max(Counter((device.node, device.model) for device in alike).values())
        had = counted(count, "GPU")
        return f"No node here has {want.device_count} GPUs of a model with that much each: the most is {had}, the largest has {most}."
    return f"No GPU here has that much: the largest has {most}."
