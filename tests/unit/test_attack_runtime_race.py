"""A stranger makes somebody's runtime directory in /tmp between the look at it and its making (docs/security.md)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbgpu import paths
from nbgpu.errors import NbgpuError
from nbgpu_spawner import hub

STRANGER = 61234
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a directory of somebody else's")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "nbgpu-1000"
    monkeypatch.setattr(paths, "_in_tmp", lambda: found)
    monkeypatch.setattr(paths, "runtime_path", lambda: found)
    return found


def test_who_looks_for_it_has_it_from_then_on(place: Path) -> None:
    """Of a directory that is not there a stranger could make one before it is made, or before a pool in it is spoken to."""
    assert paths.runtime_dir() == place
    assert (place.stat().st_uid, place.stat().st_mode & 0o777) == (os.geteuid(), 0o755)


def test_a_directory_that_somebody_else_was_faster_to_make_is_not_used(place: Path) -> None:
    directory = paths.runtime_path()
    place.mkdir(mode=0o777)
    os.chown(place, STRANGER, STRANGER)
    with pytest.raises(NbgpuError, match="belongs to another user"):
        hub.services(directory, quotas={})
    assert not list(place.iterdir()), "nothing of the configuration is told to a stranger"


def test_control_ones_own_is_made_and_used(place: Path) -> None:
    assert hub.services(paths.runtime_dir(), quotas={})
    assert hub.services(paths.runtime_dir(), quotas={}), "again"
    assert (place / "pool.json").exists()
