"""What several commands share: which API to speak to, and how to print."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .client import AgentClient, PoolClient, SliceClient
from .errors import NbgpuError
from .here import no_slice
from .logs import one_line
from .models import AgentSlice, Node, Slice
from .paths import AGENT_SOCKET, POOL_SOCKET, runtime_dir

if TYPE_CHECKING:
    from rich.console import Console

SHORT_ID = 8
"""So many characters of a slice's id are shown; any start of it that is its own is understood."""
WIDTH_WITHOUT_TERMINAL = 200
"""In a file or a pipe no line is broken."""


def own_slice() -> SliceClient | None:
    """Return the API of the slice that this process lives in; None outside of one."""
    path = os.environ.get("NBGPU_SOCKET")
    return SliceClient(path) if path else None


def agent() -> AgentClient:
    """Return the agent's admin API of this runtime directory.

    Raises
    ------
    NbgpuError
        This is a hub's server without a slice, to which no agent's socket is shown.
    """
    path = runtime_dir() / AGENT_SOCKET
    if not path.exists() and own_slice() is None and "JUPYTERHUB_SERVICE_PREFIX" in os.environ:
        raise no_slice()
    return AgentClient(path)


def pool() -> PoolClient:
    """Return the pool's API of this runtime directory."""
    return PoolClient(runtime_dir() / POOL_SOCKET)


def in_a_pod() -> bool:
    """Return whether this process is in a pod: the pool of its agent is another pod, and not to be looked for here."""
    return "KUBERNETES_SERVICE_HOST" in os.environ


def find_slice(slices: list[AgentSlice], start: str | None) -> AgentSlice:
    """Return the slice whose id begins with `start`; with None, the only one."""
    if start is None:
        if len(slices) == 1:
            return slices[0]
        what = "is no slice" if not slices else f"are {len(slices)} slices; name one with --slice: {', '.join(map(slice_name, slices))}"
        raise NbgpuError(f"There {what}.", code="slice")
    found = [known for known in slices if start and known.slice.slice_id.startswith(start)]
    if len(found) != 1:
        raise NbgpuError(
            f"{'No' if not found else 'More than one'} slice's id begins with {start!r}; `nbgpu status` lists them.", code="slice"
        )
    return found[0]


def slice_name(known: AgentSlice) -> str:
    """Return a slice for people: ``3f2a9c01 (ada)``."""
    return f"{known.slice.slice_id[:SHORT_ID]} ({owner_name(known.slice)})"


def short_ids(ids: Iterable[str]) -> dict[str, str]:
    """Return for each id its first characters, as many as tell it from the others."""
    known = sorted(set(ids))
    found: dict[str, str] = {}
    for number, one in enumerate(known):
        shared = max((_shared(one, other) for other in (*known[max(0, number - 1) : number], *known[number + 1 : number + 2])), default=0)
        found[one] = one[: max(SHORT_ID, shared + 1)]
    return found


def _shared(one: str, other: str) -> int:
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def owner_name(piece: Slice) -> str:
    """Return who holds a slice: ``ada``, ``ada/second``."""
    owner = piece.owner
    return f"{owner.user}/{owner.server}" if owner.server else owner.user


def backend_words(node: Node) -> str:
    """Return who holds slices' memory on a node, and why."""
    return f"memory held by: {node.backend}" + (f" ({node.backend_reason})" if node.backend_reason else "")


def limiter_only(node: Node, slices: list[AgentSlice]) -> str:
    """Return which slices the driver does not hold though it holds others; "" for none."""
    found = [slice_name(one) for one in slices if node.backend == "driver" and one.backend == "limiter" and one.state != "prepared"]
    return f"Held by the limiter alone, as the driver cannot (their events say why): {', '.join(found)}" if found else ""


def percent(milli: int) -> str:
    """Return thousandths as per cent: ``25 %``, ``12.5 %``."""
    return f"{milli // 10} %" if milli % 10 == 0 else f"{milli / 10:.1f} %"


def print_json(value: Any) -> None:
    """Print one JSON object for programs."""
    print(json.dumps(value, indent=2))


def console() -> Console:
    """Return where tables are printed. Names are others' words: none is taken for markup, none reaches the terminal as it is."""
    from rich.console import Console
    from rich.text import Text

    class PlainConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(one_line(text), **options)

    terminal = PlainConsole(highlight=False, markup=False, emoji=False)
    if not terminal.is_terminal:
        terminal = PlainConsole(highlight=False, markup=False, emoji=False, width=WIDTH_WITHOUT_TERMINAL)
    return terminal
