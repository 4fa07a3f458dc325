"""Makes and ends slices at an agent until it dies; says then, as JSON, what was surely there and in which call it died."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from agent_harness import AgentProcess

from nbgpu.errors import Unavailable


def main() -> None:
    """Run until the agent is gone."""
    agent = AgentProcess(Path(sys.argv[1]))
    dice = random.Random(sys.argv[2])
    sure: dict[str, int] = {}
    """The device of each slice."""
    unsure: set[str] = set()
    during = "before"
    print("ready", flush=True)
    try:
        while True:
            during = "asking"
            device = dice.randrange(2)
            wanted = agent.slice(125, device=device)
            if list(sure.values()).count(device) < 8 and len(sure) < 12 and dice.random() < 0.6:  # a ninth would be refused
                during = "put"
                unsure = {wanted.slice_id}
                agent.put(wanted)
                sure[wanted.slice_id] = device
            elif sure:
                during = "delete"
                ended = dice.choice(sorted(sure))
                unsure = {ended}
                del sure[ended]
                agent.delete(ended)
            unsure = set()
    except Unavailable:
        pass
    print(json.dumps({"sure": sorted(sure), "unsure": sorted(unsure), "during": during}))


main()
