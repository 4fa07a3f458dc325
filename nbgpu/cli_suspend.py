"""``nbgpu suspend``: a kernel's GPU memory to the host's, and back by ``nbgpu resume`` (docs/idle.md); in a terminal of its server."""

from __future__ import annotations

from .cli_common import console, own_slice, print_json
from .cli_limit import all_kernels, away_words, called, find_kernel, kernel_name, name_json
from .client import SliceClient
from .errors import NbgpuError
from .kernel_names import read_names
from .models import KernelUsage, Usage


def suspend(start: str, *, as_json: bool) -> None:
    """Begin to move the GPU memory of one kernel to the host's."""
    own = own_slice()
    if own is None:
        raise NbgpuError("A kernel's memory is moved in a terminal of its own server: this is none.", code="no-slice", status=404)
    usage = own.usage()
    names = read_names(usage.slice_id)
    _move(own, usage, find_kernel(all_kernels(usage, names), start, names), "suspend", as_json=as_json)


def bring_back(start: str, *, as_json: bool) -> bool:
    """Begin to move a kernel's memory back to the GPU; return False where no kernel of this server so called has it in the host's.

    A number is the process so numbered where that is suspended, whatever kernel's id begins with it.
    """
    own = own_slice()
    usage = None if own is None else own.usage()
    found = [] if usage is None else away(usage, start)
    if own is None or usage is None or len(found) != 1:
        return False
    if any(one.kernel_id == found[0].kernel_id or str(one.pid) == start for one in usage.suspended):
        return False
    _move(own, usage, found[0], "resume", as_json=as_json)
    return True


def away(usage: Usage, start: str = "") -> list[KernelUsage]:
    """Return the kernels whose memory is in the host's: all, or whose notebook is called `start` or whose id begins so."""
    names = read_names(usage.slice_id)
    held = [kernel for kernel in usage.kernels if kernel.away is not None and kernel.kernel_id is not None]
    named = [kernel for kernel in held if kernel.kernel_id in names and start in called(names[kernel.kernel_id])]
    return named or [kernel for kernel in held if (kernel.kernel_id or "").startswith(start)]


def _move(own: SliceClient, usage: Usage, kernel: KernelUsage, where: str, *, as_json: bool) -> None:
    kernel_id = kernel.kernel_id or ""
    names = read_names(usage.slice_id)
    name = kernel_name(kernel_id, names)
    try:
        now = own.move_kernel(kernel_id, where)
    except NbgpuError as error:  # the agent knows ids only
        error.message = error.message.replace(f"Notebook kernel {kernel_id[:8]}…", name)
        raise
    if as_json:
        told = {"kernel_id": kernel_id, "away": now and now.model_dump(mode="json")} | name_json(names, kernel_id)
        print_json({"slice_id": usage.slice_id} | told)
        return
    how = f" `nbgpu resume {name}` brings it back, and so does a cell that runs in it." if where == "suspend" else ""
    console().print(f"{name}: {away_words(now) if now else 'on the GPU'}.{how}", soft_wrap=True)
