"""JupyterHub on a shared GPU workstation: real accounts, each server with a slice of a GPU."""

from nbgpu_spawner import setup

c = get_config()  # noqa: F821

c.JupyterHub.bind_url = "http://127.0.0.1:8000"  # put a TLS proxy in front, or set c.JupyterHub.ssl_key and ssl_cert
c.JupyterHub.cleanup_servers = False  # a restart of the hub ends no notebook
c.JupyterHub.db_url = "sqlite:////var/lib/nbgpu/jupyterhub.sqlite"
c.JupyterHub.cookie_secret_file = "/var/lib/nbgpu/cookie_secret"
c.ConfigurableHTTPProxy.pid_file = "/var/lib/nbgpu/proxy.pid"

c.JupyterHub.authenticator_class = "pam"
c.Authenticator.allow_all = True  # whoever has an account here; or c.Authenticator.allowed_users = {"ada", "grace"}
c.Authenticator.admin_users = {"root"}
c.Spawner.default_url = "/lab"

setup(
    c,
    quotas={
        "default": {"limit": 1},  # each person, all servers together: one GPU
        # "groups": {"students": {"limit": 2, "per_user": "1/4"}},
    },
)
