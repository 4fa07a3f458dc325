"""What the extension adds to a Jupyter server's start."""

from __future__ import annotations

import json
import subprocess
import sys

MEASURE = """
import json, sys, time
import jupyter_server.serverapp, jupyter_server.base.handlers, jupyter_client.provisioning.factory
before, start = set(sys.modules), time.perf_counter()
import nbgpu_lab.extension
print(json.dumps({"ms": (time.perf_counter() - start) * 1000, "modules": sorted(set(sys.modules) - before)}))
"""


def test_import_is_light() -> None:
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, check=True, timeout=60).stdout) for _ in range(3)
    ]
    assert {module.split(".")[0] for module in runs[0]["modules"]} <= {"nbgpu", "nbgpu_lab"}
    # the best of three: other programs on the machine are no part of it
    assert min(run["ms"] for run in runs) <= 50
