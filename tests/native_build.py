"""`nodeagent/build.py`, which is a program, for tests that compile something."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def build_module() -> ModuleType:
    """It as a module."""
    spec = importlib.util.spec_from_file_location("nbgpu_build", ROOT / "nodeagent" / "build.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["nbgpu_build"] = module
    spec.loader.exec_module(module)
    return module
