"""`nbgpu serve` without its children."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbgpu import cli_serve
from nbgpu.cli_serve import Both
from nbgpu.errors import Unavailable


def test_who_serves_a_directory_that_was_removed_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_serve, "POLL_SECONDS", 0.01)
    place = tmp_path / "run"
    place.mkdir()
    both = Both(place)
    place.rmdir()
    with pytest.raises(Unavailable, match="was removed"):
        both.watch(0)
