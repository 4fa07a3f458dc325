"""Why a request does not fit though there is room: it is on a GPU that takes nobody now. Pure."""

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
    if all(room.device.healthy for room in books.ordered_rooms()):
        return None
    for _, node in groupby(books.ordered_rooms(), key=lambda room: room.device.node):
        fit = [room for room in node if (part := resolve(want, room.device)) is not None and room.fits(part)]
        off = [room.device.uuid for room in fit if not room.device.healthy]
        if off and len(fit) >= want.device_count:
            return f"out of service: {books.unusable.get(off[0], UNKNOWN)}"
    return None
