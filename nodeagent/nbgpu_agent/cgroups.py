"""A cgroup per slice, where one can be made: whatever a slice's processes start, stays in it.

The slice's cgroup is a child of the one that its server is in already, so that a systemd unit keeps what is its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

PREFIX = "nbgpu-"
_POD = re.compile(r"(?:^|-)pod([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12})(?:\.slice)?$")
"""A pod's cgroup as the kubelet names it: ``pod<uid>`` with cgroupfs, ``kubepods-burstable-pod<uid with _>.slice`` with systemd."""


def _hierarchy() -> tuple[Path, str] | None:
    """Return the mount point and the controller's name in ``/proc/<pid>/cgroup`` ("" = v2) of the hierarchy to use."""
    base = Path("/sys/fs/cgroup")
    if (base / "cgroup.controllers").exists():
        return base, ""
    for controller in ("freezer", "pids"):
        if (base / controller / "cgroup.procs").exists():
            return base / controller, controller
    return None


def within(path: str, above: str) -> bool:
    """Return whether the cgroup `path` is `above` or below it."""
    return path == above or path.startswith(above + "/")


def pod_of(path: str) -> tuple[str, str] | None:
    """Return (UID, cgroup) of the pod that a cgroup is in.

    The outermost that looks like one: a pod that may make cgroups of its own makes them below its own, whatever it calls them.
    """
    parts = path.split("/")
    for number, part in enumerate(parts):
        match = _POD.search(part)
        if match is not None:
            return match[1].replace("_", "-"), "/".join(parts[: number + 1])
    return None


class Cgroups:
    """Makes, reads and removes the cgroups of slices; every method is a no-op or empty where that cannot be done."""

    def __init__(self) -> None:
        self._found = _hierarchy()
        self._pods: dict[str, Path] = {}
        """Cgroups of pods that were found, by their UID."""

    @property
    def version_2(self) -> bool:
        """Whether the hierarchy used here is cgroup v2 at its usual place, the one that drivers know."""
        return self._found is not None and not self._found[1]

    def path_of(self, pid: int) -> str | None:
        """Return the cgroup of a process in the hierarchy used here, as a path under its mount point."""
        if self._found is None:
            return None
        controller = self._found[1]
        try:
            with open(f"/proc/{pid}/cgroup") as file:
                for line in file:
                    number, names, path = line.rstrip("\n").split(":", 2)
                    if (controller and controller in names.split(",")) or (not controller and number == "0"):
                        return None if "/.." in path else path
        except (OSError, ValueError):
            pass
        return None

    def full_path(self, pid: int) -> str | None:
        """Return the cgroup of a process as a path of the file system.

        Slices are told apart by the whole path: a tenant that was given a cgroup of its own may name one below it after any slice.
        """
        path = self.path_of(pid)
        return None if path is None or self._found is None else str(self._found[0] / path.lstrip("/"))

    def holds(self, path: str, pid: int) -> bool:
        """Return whether a process is in the cgroup `path` or in one below it."""
        own = self.full_path(pid)
        return own is not None and within(own, path)

    def create(self, slice_id: str, pid: int) -> Path | None:
        """Make a slice's cgroup below that of `pid`; None where it cannot be made."""
        current = self.path_of(pid)
        if self._found is None or current is None:
            return None
        above = self._found[0] / current.lstrip("/")
        while above.name.startswith(PREFIX):  # started from inside another slice
            above = above.parent
        path = above / f"{PREFIX}{slice_id}"
        try:
            path.mkdir(exist_ok=True)
        except OSError:
            return None
        return path if os.access(path / "cgroup.procs", os.W_OK) else None

    @staticmethod
    def add(path: Path, pid: int) -> bool:
        """Move a process into a cgroup; False when it is gone or may not be moved."""
        try:
            (path / "cgroup.procs").write_text(str(pid))
        except OSError:
            return False
        return True

    @staticmethod
    def members(path: Path) -> set[int]:
        """Return the pids in a cgroup and in those below it."""
        pids: set[int] = set()
        for directory, _, _ in os.walk(path):
            try:
                with open(f"{directory}/cgroup.procs") as file:
                    pids.update(int(line) for line in file)
            except OSError:
                continue
        pids.discard(0)  # a process of another pid namespace
        return pids

    def pod_of(self, pid: int) -> str | None:
        """Return the UID of the pod that a process is in; None for one in no pod."""
        path = self.path_of(pid)
        found = pod_of(path) if path is not None else None
        return found[0] if found is not None else None

    def pod_members(self, pods: Iterable[str]) -> set[int]:
        """Return the pids of all processes in these pods, those of their sandboxes too."""
        found: set[int] = set()
        wanted = set(pods)
        for uid in wanted & self._pods.keys():
            if (self._pods[uid] / "cgroup.procs").exists():
                found |= self.members(self._pods[uid])
                wanted.discard(uid)
            else:
                del self._pods[uid]
        if wanted and self._found is not None:
            for name in os.listdir("/proc"):
                if name.isdigit() and (path := self.path_of(int(name))) is not None and (pod := pod_of(path)) and pod[0] in wanted:
                    found.add(int(name))
                    self._learn(self._found[0], *pod)
        return found

    def pod_directory(self, uid: str) -> Path | None:
        """Return a pod's cgroup, from before its first container starts; None where it cannot be seen from here."""
        if self._found is None:
            return None
        if uid not in self._pods or not (self._pods[uid] / "cgroup.procs").exists():
            base, names = self._found[0], (f"pod{uid}", f"*-pod{uid.replace('-', '_')}.slice")
            # below the kubelet's root, of guaranteed pods and of the other two classes
            places = (place for above in ("*kubepods*", "*kubepods*/*") for name in names for place in base.glob(f"{above}/{name}"))
            found = next(places, None)
            if found is None:
                self.pod_members([uid])  # wherever its processes are
                return self._pods.get(uid)
            self._pods[uid] = found
        return self._pods[uid]

    def _learn(self, base: Path, uid: str, path: str) -> None:
        """Remember where a pod's cgroup is, as far as it can be seen from here: next time it need not be looked for."""
        directory = base / path.lstrip("/")
        if len(self._pods) >= 4096:  # those of pods that have ended
            self._pods = {one: place for one, place in self._pods.items() if place.exists()}
        if len(self._pods) < 4096 and (directory / "cgroup.procs").exists():
            self._pods[uid] = directory

    @staticmethod
    def remove(path: Path) -> bool:
        """Remove a slice's cgroup and those below it; return whether it is gone. One with a zombie in it cannot go yet."""
        for directory, _, _ in os.walk(path, topdown=False):
            try:
                os.rmdir(directory)
            except OSError:
                continue
        return not path.exists()
