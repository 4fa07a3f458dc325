"""Servers as systemd units (SystemdSpawner and what is made of it, such as The Littlest JupyterHub's), each with a slice of a GPU."""

from __future__ import annotations

import asyncio
import os
import pwd
import time
from typing import TYPE_CHECKING, Any

from nbgpu.errors import NbgpuError, Unavailable
from nbgpu.procs import user_of

from .local import LocalGPUMixin

if TYPE_CHECKING:
    from jupyterhub.spawner import Spawner as _Systemd
else:
    from systemdspawner import SystemdSpawner as _Systemd


ACCOUNT_SECONDS = 5.0
"""So long a unit that has started may take to run as its user."""


class SystemdGPUSpawner(LocalGPUMixin, _Systemd):
    """SystemdSpawner whose units start inside a slice.

    Subclasses of SystemdSpawner are combined as ``class Mine(TheirSpawner, SystemdGPUSpawner)``: what they do in their `start`
    (making the user's account, say) is then done before the slice is prepared for that account.
    """

    if TYPE_CHECKING:
        unit_name: str
        dynamic_users: bool
        username_template: str
        extra_paths: list[str]

        def _expand_user_vars(self, string: str) -> str: ...

    _gpu_unit_pid: int | None = None

    def gpu_uid(self) -> int | None:
        """Return who may use the slice's files.

        Raises
        ------
        NbgpuError
            The account is not known before the unit runs (``dynamic_users``).
        """
        if self.dynamic_users:
            raise NbgpuError("Servers with dynamic users cannot have a GPU: their account is not known before they run.", code="setup")
        return pwd.getpwnam(self._expand_user_vars(self.username_template)).pw_uid

    def gpu_server_pid(self) -> int | None:
        """Return the unit's main process while it lives."""
        pid = self._gpu_unit_pid
        return pid if pid and os.path.exists(f"/proc/{pid}") else None

    async def gpu_started(self) -> None:
        """Learn the unit's main process."""
        self._gpu_unit_pid = await main_pid(self.unit_name)
        if self._gpu_unit_pid is None:
            raise Unavailable(f"The unit {self.unit_name} has ended as soon as it was started.", code="start")
        uid, deadline = self.gpu_uid(), time.monotonic() + ACCOUNT_SECONDS
        # It is root's until systemd has made it the user's, and no slice takes in another user's process.
        while user_of(self._gpu_unit_pid) not in (uid, None) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    def gpu_search_path(self, env: dict[str, str]) -> str | None:
        """Return where the server's command is looked for: the unit's PATH, which begins with `extra_paths`."""
        return os.pathsep.join([*(self._expand_user_vars(part) for part in self.extra_paths), env.get("PATH") or os.defpath])

    def get_state(self) -> dict[str, Any]:
        """Add the main process: a restarted hub cannot ask systemd before it looks at its servers."""
        state = super().get_state()
        if self._gpu_unit_pid:
            state["gpu_unit_pid"] = self._gpu_unit_pid
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Take it back."""
        super().load_state(state)
        self._gpu_unit_pid = state.get("gpu_unit_pid")

    def clear_state(self) -> None:
        """Forget it."""
        super().clear_state()
        self._gpu_unit_pid = None


async def main_pid(unit: str) -> int | None:
    """Return the main process of a systemd unit; None when it has none."""
    asked = await asyncio.create_subprocess_exec(
        "systemctl", "show", "--property=MainPID", "--value", unit, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    said, _ = await asked.communicate()
    text = said.decode().strip()
    return int(text) if text.isdigit() and int(text) else None
