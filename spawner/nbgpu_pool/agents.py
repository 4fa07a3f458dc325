"""Which nodes have no agent that runs, as the pods of the chart's DaemonSet tell.

What an agent published stays for half a minute after it has gone, until the kubelet removes it; a pod that is sent there meanwhile waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

Json = dict[str, Any]
LABELS = "app.kubernetes.io/name=nbgpu,app.kubernetes.io/component=agent"
AWAY_SECONDS = 5.0
"""So long a node may be without one: an agent that is replaced, or starts anew, is back by then."""


class AgentPod(NamedTuple):
    """A pod of an agent."""

    node: str
    runs: bool
    """Its container does. Not whether it is ready: who keeps its port busy would take the node out of service."""


def keep_agent(thing: Json) -> AgentPod:
    """Return what matters of an agent's pod."""
    spec, status = cast("Json", thing.get("spec") or {}), cast("Json", thing.get("status") or {})
    containers = cast("list[Json]", status.get("containerStatuses") or [])
    return AgentPod(str(spec.get("nodeName", "")), any("running" in (one.get("state") or {}) for one in containers))


class Agents:
    """Remembers since when nodes have been without an agent.

    Parameters
    ----------
    away_seconds : float
        From when on that counts.
    """

    def __init__(self, away_seconds: float = AWAY_SECONDS):
        self._away_seconds = away_seconds
        self._since: dict[str, float] = {}
        self._seen = False

    def away(self, pods: Iterable[AgentPod], nodes: Iterable[str], now: float) -> frozenset[str]:
        """Return those of `nodes` whose agent is away; none where agents are no pods here, as nothing is known of them then.

        Parameters
        ----------
        nodes : iterable of str
            On which devices are offered.
        now : float
            Of a clock that never goes back, seconds.
        """
        there = list(pods)
        self._seen = self._seen or bool(there)
        served = {one.node for one in there if one.runs}
        self._since = {node: self._since.get(node, now) for node in nodes if node not in served} if self._seen else {}
        return frozenset(node for node, since in self._since.items() if now - since >= self._away_seconds)
