"""Stand-in for zero-to-jupyterhub's module of this name: its chart's values, which the hub's pod has mounted as a Secret."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

VALUES = Path("/usr/local/etc/jupyterhub/secret/values.yaml")


@cache
def _values() -> dict[str, Any]:
    return yaml.safe_load(VALUES.read_text())


def get_config(key: str, default: Any = None) -> Any:
    """Return the value of a dotted key."""
    found: Any = _values()
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            return default
        found = found[part]
    return found


def set_config_if_not_none(section: Any, name: str, key: str) -> None:
    """Set a trait where the values have something for it."""
    if (found := get_config(key)) is not None:
        setattr(section, name, found)
