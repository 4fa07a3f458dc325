"""Settings on a zero-to-jupyterhub hub: `custom.nbgpu` of the chart's values, and the pool's token from the environment."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

TOKEN_VARIABLE = "NBGPU_POOL_TOKEN"
_KEYS = ("poolUrl", "hubName", "imageHasLab")


@dataclass(frozen=True)
class Settings:
    """What `custom.nbgpu` says."""

    pool_url: str
    pool_token: str
    hub_name: str = "jupyterhub"
    image_has_lab: bool = False


def settings() -> Settings | None:
    """Return this hub's settings; None where it is no hub of zero-to-jupyterhub.

    Raises
    ------
    ValueError
        `custom.nbgpu` cannot be used; the message says why.
    """
    try:
        get_config = importlib.import_module("z2jh").get_config
    except ImportError:
        return None
    found = get_config("custom.nbgpu", None)
    told = _checked({} if found is None else found)
    if not told.get("poolUrl"):
        raise ValueError("nbgpu: custom.nbgpu.poolUrl is not set; it is the address that `helm install nbgpu` prints.")
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token:
        raise ValueError(f"nbgpu: {TOKEN_VARIABLE} is not set; hub.extraEnv takes it from the Secret that `helm install nbgpu` prints.")
    return Settings(told["poolUrl"], token, told.get("hubName", "jupyterhub"), told.get("imageHasLab", False))


def _checked(found: object) -> dict[str, Any]:
    if not isinstance(found, Mapping):
        raise ValueError(f"nbgpu: custom.nbgpu must hold settings by name ({', '.join(_KEYS)}), not {found!r}.")
    told = cast("Mapping[str, Any]", found)
    for name, value in told.items():
        if name not in _KEYS:
            raise ValueError(f"nbgpu: custom.nbgpu.{name} means nothing; there are {', '.join(_KEYS)}.")
        wanted = bool if name == "imageHasLab" else str
        if not isinstance(value, wanted):
            raise ValueError(f"nbgpu: custom.nbgpu.{name} is {value!r}; it must be {'true or false' if wanted is bool else 'a text'}.")
    return dict(told)
