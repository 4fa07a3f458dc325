"""Fixtures of the limiter's tests."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from limiter_kit import COMPUTE_SCALE, ROOT
from limiter_slice import SliceFiles


@pytest.fixture(scope="session")
def compute_machine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the benchmark's simulated machine. One for all tests: the simulated NVML in this process stays with its first one."""
    sys.path.append(str(ROOT / "bench"))
    import compute

    compute.build()
    before = dict(os.environ)
    try:
        return compute.Machine(tmp_path_factory.mktemp("machine"), COMPUTE_SCALE, devices=2)
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def make_slice() -> Iterator[Callable[..., SliceFiles]]:
    """Make slices' files in memory, gone after the test."""
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="nbgpu-test-slice-", dir=base) as folder:
        made: list[SliceFiles] = []

        def make(**options: Any) -> SliceFiles:
            made.append(SliceFiles(Path(folder) / str(len(made)), **options))
            return made[-1]

        yield make
        for files in made:
            files.close()
