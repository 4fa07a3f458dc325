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


def test_a_directory_that_somebody_else_was_faster_to_make_is_not_used(place: Path) -> None:
    directory = paths.runtime_dir()
    place.mkdir(mode=0o777)
    os.chown(place, STRANGER, STRANGER)
    with pytest.raises(NbgpuError, match="belongs to another user"):
        hub.services(directory, quotas={})
    assert not list(place.iterdir()), "nothing of the configuration is told to a stranger"


def test_control_ones_own_is_made_and_used(place: Path) -> None:
    assert hub.services(paths.runtime_dir(), quotas={})
    assert hub.services(paths.runtime_dir(), quotas={}), "again"
    assert (place / "pool.json").exists()
