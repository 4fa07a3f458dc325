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
    sure: set[str] = set()
    unsure: set[str] = set()
    during = "before"
    try:
        while True:
            during = "asking"
            wanted = agent.slice(125, device=dice.randrange(2))
            if len(sure) < 12 and dice.random() < 0.6:
                during = "put"
                unsure = {wanted.slice_id}
                agent.put(wanted)
                sure |= unsure
            elif sure:
                during = "delete"
                unsure = {dice.choice(sorted(sure))}
                sure -= unsure
                agent.delete(next(iter(unsure)))
            unsure = set()
    except Unavailable:
        pass
    print(json.dumps({"sure": sorted(sure), "unsure": sorted(unsure), "during": during}))


main()
