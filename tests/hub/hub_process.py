"""A real JupyterHub with its proxy, as processes, for a test to talk to, kill and start again."""

from __future__ import annotations

import contextlib
import html
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from ports import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
TOKEN = "test-token-of-this-run"
PASSWORD = "open sesame"
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For httpx, which else reads all certificates of the machine for each call: 27 ms of CPU, where tests ask twenty times a second."""

CONFIG = """
import sys
from nbgpu_spawner import setup
c.JupyterHub.bind_url = "http://127.0.0.1:{port}"
c.JupyterHub.hub_port = {hub_port}
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{api_port}"
c.ConfigurableHTTPProxy.command = [{proxy!r}]
c.ConfigurableHTTPProxy.auth_token = "proxy-token-of-this-run"
c.JupyterHub.authenticator_class = "dummy"
c.DummyAuthenticator.password = {password!r}
c.Authenticator.allow_all = True
c.JupyterHub.spawner_class = "simple"
c.SimpleLocalProcessSpawner.home_dir_template = {homes!r} + "/{{username}}"
c.Spawner.cmd = [{python!r}, {server!r}]
c.Spawner.environment = {{"NBGPU_TEST_MARK": {mark!r}, "NBGPU_TEST_HUB_VERSION": {version!r}}}
c.LocalProcessSpawner.term_timeout = c.LocalProcessSpawner.interrupt_timeout = 3
c.JupyterHub.concurrent_spawn_limit = 0
c.JupyterHub.tornado_settings = {{"slow_spawn_timeout": 1.5}}  # REST answers 202 when a start takes longer
c.JupyterHub.services = [{{"name": "test", "api_token": {token!r}}}]
scopes = ["admin:users", "admin:servers", "access:servers", "list:users", "read:hub"]
c.JupyterHub.load_roles = [{{"name": "test", "services": ["test"], "scopes": scopes}}]
{more}
"""


def proxy_command() -> str | None:
    """Return the path of configurable-http-proxy; None where it is not installed."""
    return shutil.which("configurable-http-proxy") or shutil.which(str(ROOT / "node_modules/.bin/configurable-http-proxy"))


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait for a condition and return its value; fail after the deadline."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"after {seconds} s still not: {what}"
        time.sleep(0.05)
    return value


class Hub:
    """One hub in a directory of its own.

    Parameters
    ----------
    place : Path
        Its directory: configuration, database, homes, log.
    more : str
        Lines added to the configuration; they call ``setup(c, ...)``.
    python : str
        The Python that runs it.
    environment : dict
        Set for the hub and what it starts.
    """

    def __init__(self, place: Path, more: str, python: str = sys.executable, environment: dict[str, str] | None = None):
        self.place, self.python = place, python
        self.port, self.hub_port, self.api_port = free_port(), free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}/hub/"
        self.log = place / "hub.log"
        self.process: subprocess.Popen[bytes] | None = None
        ask_version = [python, "-c", "import jupyterhub; print(jupyterhub.__version__)"]
        self.version = subprocess.run(ask_version, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
        paths = [str(ROOT), str(ROOT / "spawner"), str(ROOT / "nodeagent"), str(ROOT / "labextension")]
        self.environment = {**os.environ, "PYTHONPATH": ":".join(paths), "NBGPU_TEST_MARK": str(place), **(environment or {})}
        (place / "config.py").write_text(
            CONFIG.format(
                port=self.port,
                hub_port=self.hub_port,
                api_port=self.api_port,
                proxy=proxy_command(),
                password=PASSWORD,
                homes=str(place / "homes"),
                python=sys.executable,
                server=str(Path(__file__).with_name("light_server.py")),
                mark=str(place),
                version=self.version,
                token=TOKEN,
                more=more,
            )
        )

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [self.python, "-m", "jupyterhub", "-f", str(self.place / "config.py")]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(command, cwd=self.place, env=self.environment, stdout=out, stderr=out, start_new_session=True)
        until(self.answers, 60, "the hub answers\n" + self.log.read_text()[-3000:])

    def answers(self) -> bool:
        """Return whether the hub is up behind its proxy."""
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()[-5000:]
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(self.url + "api", timeout=2, verify=NO_TLS).status_code == 200
        return False

    def kill(self) -> None:
        """SIGKILL the hub alone; its proxy, services and servers live on."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def end(self) -> None:
        """End the hub and everything that it started: each carries the mark of this hub in its environment."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in self.left():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            deadline = time.monotonic() + 3
            while self.left() and time.monotonic() < deadline:
                time.sleep(0.05)

    def left(self) -> list[int]:
        """Return the living processes of this hub."""
        mark = f"NBGPU_TEST_MARK={self.place}\0".encode()
        found: list[int] = []
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != os.getpid():
                with contextlib.suppress(OSError):
                    if mark in Path(f"/proc/{entry}/environ").read_bytes() + b"\0":
                        found.append(int(entry))
        return found

    def api(self, method: str, path: str, body: Any = None, token: str = TOKEN) -> httpx.Response:
        """Call the hub's REST API."""
        headers = {"Authorization": f"token {token}"}
        return httpx.request(method, self.url + "api/" + path, json=body, headers=headers, timeout=60, verify=NO_TLS)

    def add(self, *users: str) -> None:
        """Make users."""
        for user in users:
            assert self.api("POST", f"users/{user}").status_code in (201, 409)

    def spawn(self, user: str, options: Any = None) -> httpx.Response:
        """Start a user's server through REST."""
        return self.api("POST", f"users/{user}/server", {} if options is None else options)

    def spawn_aside(self, user: str, options: Any) -> None:
        """Start a user's server without waiting for the answer."""

        def ask() -> None:
            with contextlib.suppress(httpx.HTTPError):
                self.spawn(user, options)

        threading.Thread(target=ask, daemon=True).start()

    def server(self, user: str) -> dict[str, Any] | None:
        """Return the user's default server, as the REST API has it; None when there is none."""
        return self.api("GET", f"users/{user}").json()["servers"].get("")

    def ready(self, user: str, seconds: float = 30) -> dict[str, Any]:
        """Wait until a user's server is ready."""
        return until(lambda: (server := self.server(user)) and server["ready"] and server, seconds, f"{user}'s server is ready")

    def gone(self, user: str, seconds: float = 30) -> None:
        """Wait until a user has no server, none that starts and none that stops."""
        until(lambda: self.server(user) is None, seconds, f"{user}'s server is gone")

    def stop(self, user: str) -> None:
        """Stop a user's server and wait for its end."""
        assert self.api("DELETE", f"users/{user}/server").status_code in (202, 204)
        self.gone(user)

    def login(self, user: str) -> Browser:
        """Log in as a browser would."""
        return Browser(self, user)


class Browser:
    """A logged-in session, with cookies, that fills in forms."""

    def __init__(self, hub: Hub, user: str):
        self.hub, self.user = hub, user
        self.http = httpx.Client(base_url=hub.url, follow_redirects=True, timeout=60, headers={"Sec-Fetch-Mode": "navigate"}, verify=NO_TLS)
        token = self.token(self.http.get("login").text)
        answer = self.http.post("login", data={"username": user, "password": PASSWORD, "_xsrf": token}, follow_redirects=False)
        assert answer.status_code == 302, answer.text

    @staticmethod
    def token(page: str) -> str:
        """Return the page's XSRF token."""
        found = re.search(r'name="_xsrf" value="([^"]+)"', page) or re.search(r'xsrf_token: "([^"]+)"', page)
        assert found, page
        return found[1]

    def form(self) -> str:
        """Return the start page."""
        page = self.http.get("spawn")
        assert page.status_code == 200, page.text
        return page.text

    def submit(self, fields: dict[str, str], follow: bool = False) -> httpx.Response:
        """Send the start page's form."""
        token = self.token(self.form())
        return self.http.post(f"spawn/{self.user}?_xsrf={token}", data=fields, follow_redirects=follow)

    def progress(self, seconds: float = 30) -> Iterator[dict[str, Any]]:
        """Yield the progress page's events."""
        token = self.token(self.http.get("home").text)
        url = f"api/users/{self.user}/server/progress?_xsrf={token}"
        with self.http.stream("GET", url, timeout=seconds, headers={"Accept": "text/event-stream"}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line[6:])

    def watch(self, seconds: float = 30) -> list[dict[str, Any]]:
        """Collect the progress events in the background; the list grows while they come."""
        events: list[dict[str, Any]] = []

        def read() -> None:
            with contextlib.suppress(httpx.HTTPError):
                for event in self.progress(seconds):
                    events.append(event)

        threading.Thread(target=read, daemon=True).start()
        return events


def error_text(page: str) -> str:
    """Return what the start page says went wrong."""
    found = re.search(r'<p class="spawn-error-msg[^>]*>Error: (.*?)</p>', page, re.S)
    return html.unescape(found[1]).strip() if found else ""
