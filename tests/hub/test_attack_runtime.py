"""A stranger on the machine makes somebody's runtime directory in /tmp before they do, with a pool of the stranger's own in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_harness import ROOT
from fake_pool import FakePool

STRANGER, VICTIM = 61234, 61235
PROGRAM = f"""
import os, sys
sys.path[:0] = {[str(ROOT), str(ROOT / "spawner"), str(ROOT / "nodeagent")]!r}
import nbgpu.cli, nbgpu.cli_common, nbgpu.cli_run, nbgpu.cli_serve, nbgpu.cli_child, nbgpu.launch, pwd, shlex, rich.console, encodings.idna
os.setgroups([]), os.setgid({VICTIM}), os.setuid({VICTIM})  # a Python that root alone may read serves both
nbgpu.cli.main()
"""
pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(os.geteuid() != 0, reason="needs root: two users of their own")]


class Strangers(FakePool):
    """Says that it lives, as a real one does."""

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        return (200, {"status": "ok", "ready": True, "connected": True}) if path == "/healthz" else super().answer(method, path, body)


@pytest.fixture
def trap() -> Iterator[tuple[Path, Path]]:
    """The directory, and a file that is written where the stranger's code has run."""
    place = Path(f"/tmp/nbgpu-{VICTIM}")
    assert not place.exists()
    place.mkdir()
    own = Path(tempfile.mkdtemp(prefix="nbgpu-test-", dir="/tmp"))
    own.chmod(0o755)
    (own / "evil").mkdir()
    (own / "out").mkdir()
    (own / "out").chmod(0o777)
    (own / "evil" / "sitecustomize.py").write_text(f"import os\nopen({str(own / 'out/ran')!r}, 'w').write(str(os.getuid()))\n")
    pool = Strangers(place / "pool.sock")
    pool.launch_env = {"NBGPU_SOCKET": "/nowhere/api.sock", "PYTHONPATH": str(own / "evil")}
    (place / "pool.sock").chmod(0o666)
    os.chown(place, STRANGER, STRANGER)
    yield place, own / "out/ran"
    pool.close()
    shutil.rmtree(place)
    shutil.rmtree(own)


def run_as_victim(**more: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1", **more}
    command = [sys.executable, "-c", PROGRAM, "run", "--gpu", "1/4", "--no-wait", "--", "/usr/bin/python3", "-c", "pass"]
    return subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=60, check=False)


def test_a_strangers_pool_is_not_believed(trap: tuple[Path, Path]) -> None:
    place, ran = trap
    done = run_as_victim(NBGPU_RUNTIME_DIR=f"/tmp/../{place}")
    assert ran.exists(), f"the control: who names the directory trusts it: {done.stderr}"
    ran.unlink()
    done = run_as_victim()
    assert not ran.exists(), "a program of the stranger's ran as the victim"
    assert done.returncode != 0
    assert "belongs to another user" in done.stderr
    assert "Traceback" not in done.stderr
