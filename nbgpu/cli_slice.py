"""``nbgpu limit --slice ID --memory ... --compute ...``: another size of a whole slice, through the pool of its machine."""

from __future__ import annotations

from .cli_common import agent, console, find_slice, own_slice, percent, pool, print_json, slice_name
from .errors import InvalidValue, NbgpuError
from .models import Resize, SliceDevice
from .quantities import format_memory, parse_fraction, parse_memory

MEMORY = "an amount such as 20 GiB, or a fraction of one GPU such as 0.5, 1/2 or 50%"


def resize_slice(slice_start: str, *, memory: str | None, compute: str | None, as_json: bool) -> None:
    """Ask the pool to give a running slice other limits, on each of its GPUs; what is not named stays. Quotas and room decide.

    Raises
    ------
    NbgpuError
        In a server, whose slice its user changes in JupyterLab; no such slice; what the pool refuses.
    """
    wanted = size(memory, compute)
    if own_slice() is not None:
        raise NbgpuError(
            "From inside a slice only its kernels can be limited. The size of a server's slice is changed in JupyterLab: GPU slice, "
            "Change the size of this slice.",
            code="slice",
        )
    known = find_slice(agent().slices().slices, slice_start)
    grant = pool().resize(known.slice.slice_id, wanted)
    parts = grant.resizing or (grant.slice.devices if grant.slice is not None else [])
    if as_json:
        devices = [part.model_dump(mode="json") for part in parts]
        print_json({"slice_id": known.slice.slice_id, "in_force": grant.resizing is None, "devices": devices, "note": grant.note})
        return
    later = "" if grant.resizing is None else f" {grant.note or 'It is in force once `nbgpu status` shows it.'}"
    console().print(f"Slice {slice_name(known)}: {_words(parts)}.{later}", soft_wrap=True, markup=False)


def size(memory: str | None, compute: str | None) -> Resize:
    """Return what is asked for in the pool's words; InvalidValue names the option and what it must be."""
    asked: dict[str, int] = {}
    if memory:
        amount = memory.strip()[-1:].isalpha()
        try:
            asked["memory_bytes" if amount else "memory_milli"] = (parse_memory if amount else parse_fraction)(memory, "--memory")
        except InvalidValue:
            raise InvalidValue("--memory", memory, MEMORY) from None
    if compute:
        asked["compute_milli"] = parse_fraction(compute, "--compute")
    return Resize.model_validate(asked)


def _words(parts: list[SliceDevice]) -> str:
    return "; ".join(f"GPU {part.index} {format_memory(part.memory_bytes)}, {percent(part.compute_milli)} of its time" for part in parts)
