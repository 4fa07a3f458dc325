"""A set-user-id program under the preload: the limiter is loaded into it, reads nothing of its caller's and opens nothing.

The library gets into such a program through ``/etc/ld.so.preload`` only, as in a container; here in a mount namespace of the test's own.
"""

from __future__ import annotations

import ctypes as c
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from limiter_kit import limiter, null_driver, program
from limiter_slice import MIB, SliceFiles

Make = Callable[..., SliceFiles]
CALLER, OWNER = 65534, 1
IN_OPEN, IN_ACCESS, NONBLOCK = 0x20, 0x1, 0o4000
LIBC = c.CDLL(None, use_errno=True)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a set-user-id program, another user and a mount namespace")


class Opened:
    """Whether anything in a folder is opened meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.fd = LIBC.inotify_init1(NONBLOCK)
        assert LIBC.inotify_add_watch(self.fd, str(folder).encode(), IN_OPEN | IN_ACCESS) >= 0

    def end(self) -> bool:
        """Stop looking; what was seen."""
        try:
            return len(os.read(self.fd, 4096)) > 0
        except BlockingIOError:
            return False
        finally:
            os.close(self.fd)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every user can read, with an /etc of its own that preloads the limiter everywhere."""
    for tool in ("unshare", "setpriv"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on this machine (Debian: util-linux)")
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0:
        pytest.skip("mount namespaces are not allowed here")
    with tempfile.TemporaryDirectory(prefix="nbgpu-test-secure-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        for source in (limiter(), null_driver() / "libcuda.so.1", program("secure")):
            shutil.copy(source, folder)
        (folder / "etc").mkdir()
        for known in ("passwd", "group", "nsswitch.conf", "ld.so.cache"):
            if Path("/etc", known).exists():
                shutil.copy(f"/etc/{known}", folder / "etc")
        (folder / "etc" / "ld.so.preload").write_text(f"{folder}/libnbgpu.so\n")
        yield folder


def outcome(place: Path, program: Path, files: SliceFiles) -> tuple[str, bool]:
    """What it printed as another user, and whether the slice's files were opened."""
    opened = Opened(files.directory)
    inner = f"mount --bind {place}/etc /etc && exec setpriv --reuid {CALLER} --regid {CALLER} --clear-groups {program} {place}/libcuda.so.1"
    env = {"PATH": os.environ["PATH"], "NBGPU_SLICE_DIR": str(files.directory), "NBGPU_KERNEL_ID": "a-kernel"}
    done = subprocess.run(["unshare", "-m", "sh", "-c", inner], env=env, capture_output=True, text=True, timeout=60)
    seen = opened.end()
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout.strip(), seen


def test_a_set_user_id_program_is_left_alone(place: Path, make_slice: Make) -> None:
    files = make_slice(mem_limit=4 * MIB)
    files.directory.parent.chmod(0o755)
    for path in (files.directory, files.directory / "ctl", files.directory / "use"):
        os.chown(path, CALLER, CALLER)
    ordinary, secure = place / "secure", place / "set-user-id"
    shutil.copy(ordinary, secure)
    os.chown(secure, OWNER, OWNER)
    secure.chmod(0o4755)
    assert outcome(place, ordinary, files) == ("0 1 1 1 0 2", True), "the control: without the bit it is limited"
    slots = files.use.high_water
    said, seen = outcome(place, secure, files)
    if said.startswith("0 "):
        pytest.skip("set-user-id programs gain nothing here (a file system mounted nosuid, or no new privileges)")
    assert said == "1 1 0 0 0 0"
    assert not seen
    assert files.use.high_water == slots, "no slot was taken"
