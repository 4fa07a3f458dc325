"""Stand-in for zero-to-jupyterhub's configuration file: the same settings from the same values, as far as these tests have any.

What counts for nbgpu is the order: the chart's own settings, then `hub.config`, and `hub.extraConfig` last of all.
"""

import os
import sys

c = get_config()  # noqa: F821
sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))

from z2jh import get_config, set_config_if_not_none  # noqa: E402

c.JupyterHub.spawner_class = "kubespawner.KubeSpawner"
c.ConfigurableHTTPProxy.api_url = f"http://{os.environ['PROXY_API_SERVICE_HOST']}:{os.environ['PROXY_API_SERVICE_PORT']}"
c.ConfigurableHTTPProxy.should_start = False
c.JupyterHub.cleanup_servers = False  # a hub that restarts leaves its servers alone
c.JupyterHub.last_activity_interval = 60
c.JupyterHub.tornado_settings = {"slow_spawn_timeout": 0}
c.JupyterHub.db_url = "sqlite:///jupyterhub.sqlite"  # hub.db.type: sqlite-pvc
c.JupyterHub.hub_bind_url = "http://:8081"
# by address: the proxy of these tests runs outside of the cluster and its DNS
c.JupyterHub.hub_connect_url = f"http://{os.environ['HUB_SERVICE_HOST']}:{os.environ['HUB_SERVICE_PORT']}"

c.KubeSpawner.namespace = os.environ["POD_NAMESPACE"]
c.KubeSpawner.common_labels = {"app": "jupyterhub", "chart": "jupyterhub-4.3.1", "release": os.environ["HELM_RELEASE_NAME"]}
for trait, key in (
    ("start_timeout", "startTimeout"),
    ("image_pull_policy", "image.pullPolicy"),
    ("events_enabled", "events"),
    ("extra_labels", "extraLabels"),
    ("extra_annotations", "extraAnnotations"),
    ("uid", "uid"),
    ("fs_gid", "fsGid"),
    ("tolerations", "extraTolerations"),
    ("node_selector", "nodeSelector"),
    ("mem_limit", "memory.limit"),
    ("mem_guarantee", "memory.guarantee"),
    ("cpu_limit", "cpu.limit"),
    ("cpu_guarantee", "cpu.guarantee"),
    ("environment", "extraEnv"),
    ("profile_list", "profileList"),
    ("extra_pod_config", "extraPodConfig"),
):
    set_config_if_not_none(c.KubeSpawner, trait, f"singleuser.{key}")
c.KubeSpawner.image = f"{get_config('singleuser.image.name')}:{get_config('singleuser.image.tag')}"
set_config_if_not_none(c.Spawner, "cmd", "singleuser.cmd")
set_config_if_not_none(c.Spawner, "default_url", "singleuser.defaultUrl")
if get_config("singleuser.cloudMetadata.blockWithIptables"):
    raise ValueError("this stand-in makes no init containers; `restricted` would refuse them")

for section, settings in get_config("hub.config", {}).items():
    for name, value in settings.items():
        setattr(c[section], name, value)
for key, text in sorted(get_config("hub.extraConfig", {}).items()):
    print(f"Loading extra config: {key}")
    exec(text)
