"""One line in `hub.extraConfig`: `setup(c)` on a hub of zero-to-jupyterhub."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from traitlets.config import Config

pytest.importorskip("kubespawner")

from nbgpu_spawner import setup
from nbgpu_spawner.kube import KubeGPUSpawner

ROOT = Path(__file__).resolve().parents[2]
WHOLE = {"poolUrl": "http://nbgpu-pool.gpu:8200", "hubName": "science", "imageHasLab": True}


@pytest.fixture
def z2jh(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What z2jh's hub finds in its values; `z2jh.get_config` reads it there."""
    values: dict[str, Any] = {"custom": {"nbgpu": dict(WHOLE)}}
    module = ModuleType("z2jh")

    def get_config(key: str, default: Any = None) -> Any:
        found: Any = values
        for part in key.split("."):
            if not isinstance(found, dict) or part not in found:
                return default
            found = found[part]
        return found

    module.get_config = get_config  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "z2jh", module)
    monkeypatch.setenv("NBGPU_POOL_TOKEN", "t" * 48)
    return values


def configured() -> Config:
    c = Config()
    c.JupyterHub.spawner_class = "kubespawner.KubeSpawner"
    setup(c)
    return c


def test_the_one_line(z2jh: dict[str, Any]) -> None:
    c = configured()
    assert c.JupyterHub.spawner_class is KubeGPUSpawner
    assert (c.GPUSliceMixin.pool_url, c.GPUSliceMixin.pool_token) == (WHOLE["poolUrl"], "t" * 48)
    assert c.GPUSliceMixin.gpu_hub_name == "science"
    assert c.KubeGPUMixin.gpu_image_has_lab is True
    assert "services" not in c.JupyterHub  # no pool and no agent beside the hub


@pytest.mark.parametrize(
    ("nbgpu", "said"),
    [
        (None, "poolUrl is not set"),
        ({"hubName": "h"}, "poolUrl is not set"),
        ({**WHOLE, "poolURL": "x"}, "custom.nbgpu.poolURL means nothing"),
        ({**WHOLE, "imageHasLab": "yes"}, "must be true or false"),
        ("http://x", "must hold settings by name"),
    ],
)
def test_bad_settings_are_said_plainly(z2jh: dict[str, Any], nbgpu: Any, said: str) -> None:
    z2jh["custom"]["nbgpu"] = nbgpu
    with pytest.raises(ValueError, match=said):
        configured()


def test_a_missing_token_is_said_plainly(z2jh: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NBGPU_POOL_TOKEN")
    with pytest.raises(ValueError, match=r"NBGPU_POOL_TOKEN is not set; hub\.extraEnv"):
        configured()


def test_elsewhere_nothing_changes(tmp_path: Path) -> None:
    c = Config()
    setup(c, embedded=False, runtime=tmp_path)
    assert "pool_url" not in c.GPUSliceMixin


def test_the_values_that_are_shipped(z2jh: dict[str, Any]) -> None:
    shipped = yaml.safe_load((ROOT / "deploy" / "z2jh" / "values.yaml").read_text())
    z2jh["custom"] = shipped["custom"]
    c = Config()
    c.JupyterHub.spawner_class = "kubespawner.KubeSpawner"
    exec(shipped["hub"]["extraConfig"]["nbgpu"], {"c": c})
    assert c.JupyterHub.spawner_class is KubeGPUSpawner
    assert c.GPUSliceMixin.pool_url == "http://nbgpu-pool.nbgpu:8200"
    assert shipped["hub"]["extraEnv"]["NBGPU_POOL_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "nbgpu-hub-jupyterhub", "key": "token"}
    names = {name for one in shipped["singleuser"]["profileList"] for name in one.get("kubespawner_override", {})}
    assert all(KubeGPUSpawner.class_traits().get(name) for name in names)
