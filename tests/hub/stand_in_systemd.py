"""Stands in for `systemctl` and `systemd-run` where no systemd runs: starts a unit's command as its user, and knows its pid.

The units' state is files in ``NBGPU_TEST_UNITS``: one a unit, with the pid of its main process.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

UNITS = Path(os.environ["NBGPU_TEST_UNITS"])


def living(unit: str) -> int:
    """Return the pid of a unit's main process; 0 when it does not run."""
    try:
        pid = int((UNITS / unit).read_text())
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return 0
    return 0 if state == "Z" else pid


def systemctl(words: list[str]) -> int:
    """Answer the few questions that SystemdSpawner and nbgpu ask."""
    if words == ["--version"]:
        print("systemd 252 (a stand-in)")
        return 0
    pid = living(words[-1])
    if words[0] == "show":
        assert words[1:3] == ["--property=MainPID", "--value"], words
        print(pid)
        return 0
    if words[0] == "stop":
        for number in (signal.SIGTERM, signal.SIGKILL):
            for _ in range(50 if living(words[-1]) else 0):
                os.kill(pid, number)
                time.sleep(0.05)
                if not living(words[-1]):
                    break
        return 0
    return {"is-active": 0 if pid else 3, "is-failed": 1}[words[0]]


def systemd_run(words: list[str]) -> int:
    """Start a transient unit."""
    options: dict[str, str] = {}
    properties: dict[str, str] = {}
    while words and words[0].startswith("--"):
        word = words.pop(0)
        name, equals, value = word.partition("=")
        value = value if equals else words.pop(0)
        if name == "--property":
            key, _, content = value.partition("=")
            properties[key] = content
        else:
            options[name] = value
    lines = Path(properties["EnvironmentFile"]).read_text().splitlines()
    env = {line.partition("=")[0]: "".join(shlex.split(line.partition("=")[2])) for line in lines}
    process = subprocess.Popen(
        words, env=env, cwd=options["--working-directory"], user=int(options["--uid"]), group=int(options["--gid"]), extra_groups=[],
        stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    (UNITS / options["--unit"]).write_text(str(process.pid))
    return 0
