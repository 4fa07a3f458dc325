"""The pool as a process against a cluster, and what must hold between its books and what is there."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import httpx
from gateway_kit import Gateway
from place_kit import GIB, Place, until
from ports import free_port

from nbgpu.claims import MOVE_LABEL, SLICE_LABEL
from nbgpu.kube import Json, NotFound, path

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "the-token-of-the-test-hub"


class Pool:
    """One replica of `python -m nbgpu_pool --kubernetes`."""

    started: ClassVar[list[Pool]] = []

    def __init__(self, place: Place, folder: Path, *, gateway: Gateway | None = None, tokens: Json | None = None, **config: Any):
        self.place = place
        self.port = free_port()
        self.folder = folder / uuid.uuid4().hex[:8]
        self.folder.mkdir()
        hubs = enumerate(self._hubs(tokens))
        known = [{"role": "hub", "hub": hub, "namespaces": spaces, "env": f"TOKEN_{n}"} for n, (hub, spaces) in hubs]
        (self.folder / "pool.yaml").write_text(json.dumps({"tokens": known, **config}))
        key = folder / "seal.key"
        if not key.exists():
            key.write_text(uuid.uuid4().hex)
        self.key = key.read_bytes()
        kubeconfig = os.environ["KUBECONFIG"]
        if gateway is not None:
            kubeconfig = str(self.folder / "kubeconfig")
            cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{gateway.port}"}}
            context = {"name": "x", "context": {"cluster": "c", "user": "u"}}
            told: Json = {"current-context": "x", "clusters": [cluster], "users": [{"name": "u", "user": {}}], "contexts": [context]}
            Path(kubeconfig).write_text(json.dumps({"apiVersion": "v1", "kind": "Config", **told}))
        self.env = {
            **os.environ, "KUBECONFIG": kubeconfig, "NBGPU_NAMESPACE": place.namespace, "PYTHONDONTWRITEBYTECODE": "",
            **{f"TOKEN_{n}": TOKEN if n == 0 else f"{TOKEN}-{hub}" for n, (hub, _) in enumerate(self._hubs(tokens))},
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "spawner")]),
        }  # fmt: skip
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30, trust_env=False
        )
        self.process: subprocess.Popen[bytes] | None = None

    def _hubs(self, tokens: Json | None) -> list[tuple[str, list[str]]]:
        return list((tokens or {"hub": [f"{self.place.namespace}*"]}).items())

    def speaks(self, hub: str) -> httpx.Client:
        """Return a client with the token of another hub than the first."""
        return httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", headers={"Authorization": f"Bearer {TOKEN}-{hub}"}, timeout=30, trust_env=False
        )

    def start(self, *, ready: bool = True) -> Pool:
        """Start the process, and wait until it leads with its books rebuilt."""
        if ready and not any(one.process is not None and one.process.poll() is None for one in self.started):
            with contextlib.suppress(NotFound):  # of one that was killed: as if the time had passed
                self.place.do(self.place.kube.delete(path("coordination.k8s.io/v1", "leases", self.place.namespace, "nbgpu-pool")))
        command = [
            sys.executable, "-m", "nbgpu_pool", "--kubernetes", "--listen", f"127.0.0.1:{self.port}",
            "--config", str(self.folder / "pool.yaml"), "--seal-key", str(self.folder.parent / "seal.key"),
        ]  # fmt: skip
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, env=self.env, stderr=log, stdout=log)
        self.started.append(self)
        if ready:
            until(self.ready, 40, self.log)
        return self

    @classmethod
    def stop_all(cls) -> None:
        """End all that were started, as Kubernetes ends a pod."""
        for pool in cls.started:
            pool.kill(signal.SIGTERM)
        cls.started.clear()

    def log(self) -> str:
        """Return what it has logged."""
        return (self.folder / "log").read_text()

    def ready(self) -> bool:
        """Return what /readyz says."""
        assert self.process is not None
        assert self.process.poll() is None, self.log()
        with contextlib.suppress(httpx.HTTPError):
            return self.http.get("/readyz").status_code == 200
        return False

    def answers(self) -> bool:
        """Return whether it serves at all."""
        with contextlib.suppress(httpx.HTTPError):
            return self.http.get("/healthz").status_code == 200
        return False

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End the process."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(20)

    def ask(self, request_id: str, user: str = "ada", **wish: Any) -> httpx.Response:
        """Ask for a slice and have its claim made."""
        return self.http.post("/v1/launches", json={"request": self.request(request_id, user, **wish)})

    def request(self, request_id: str, user: str = "ada", **wish: Any) -> Json:
        """Return a request of this run."""
        wish = {"compute_milli": 250, "model": self.place.model, "namespace": self.place.namespace, **wish}
        return {"request_id": request_id, "owner": {"hub": "hub", "user": user}, **wish}

    def granted(self, request_id: str, user: str = "ada", **wish: Any) -> Json:
        """Ask and return the grant, which must come at once."""
        answer = self.ask(request_id, user, **wish)
        assert answer.status_code == 200, answer.text
        grant = answer.json()["grant"]
        assert grant["state"] == "reserved", answer.text
        return grant

    def state(self, request_id: str) -> str:
        """Return a request's state; "unknown" for one that nobody knows."""
        answer = self.http.get(f"/v1/requests/{request_id}")
        return "unknown" if answer.status_code == 404 else answer.json()["state"]

    def reason(self, request_id: str) -> str:
        """Return a request's reason."""
        return self.http.get(f"/v1/requests/{request_id}").json()["reason"] or ""

    def grant(self, request_id: str) -> Json:
        """Return a grant as it is now."""
        return self.http.get(f"/v1/requests/{request_id}").json()

    def resize(self, request_id: str, **asked: Any) -> httpx.Response:
        """Ask for other limits."""
        return self.http.post(f"/v1/requests/{request_id}/resize", json=asked)

    def bind(self, request_id: str) -> httpx.Response:
        """Say that a pod carries the slice."""
        return self.http.post(f"/v1/requests/{request_id}/bind", json={})

    def give_back(self, request_id: str) -> None:
        """Ask a slice back."""
        assert self.http.delete(f"/v1/requests/{request_id}").status_code in (200, 204)

    def books(self) -> dict[str, tuple[int, int]]:
        """Return what the pool has given of this run's devices."""
        found = self.http.get("/v1/devices").json()
        return {
            one["device"]["uuid"]: (one["memory_granted_bytes"], one["compute_granted_milli"])
            for one in found
            if one["device"]["model"] == self.place.model
        }


def new_id() -> str:
    """Return a request id."""
    return uuid.uuid4().hex


def served(place: Place, pool: Pool, user: str = "ada", *, soon: bool = False, **wish: object) -> str:
    """Return the request of a pod that runs; `soon`: the room for it may still have to be published."""
    request = new_id()
    if soon:
        until(lambda: pool.ask(request, user, **wish).json()["grant"]["state"] == "reserved", why="for room")
    else:
        pool.granted(request, user, **wish)
    assert pool.bind(request).status_code == 200
    place.pod(request)
    until(lambda: place.phase(request) == "Running", why="for the pod")
    return request


def check(place: Place, pool: Pool, carried: Iterable[str]) -> None:
    """Assert what must hold whenever things have settled.

    Parameters
    ----------
    carried : iterable of str
        Requests whose pods live: exactly these have claims of the pool.
    """
    until(lambda: pool.books() == place.held(), why=f"books {pool.books()}, cluster {place.held()}\n{pool.log()}")
    for uuid_, (memory, milli) in place.held().items():
        assert memory <= 80 * GIB, uuid_
        assert milli <= 1000, uuid_
    until(lambda: not [one for one in place.claims() if MOVE_LABEL in one["metadata"].get("labels", {})], 5, "for the note about a move")
    ours = {one["metadata"]["labels"][SLICE_LABEL] for one in place.claims() if SLICE_LABEL in one["metadata"].get("labels", {})}
    assert ours == set(carried)
    assert {one for one in ours if place.phase(one) == "Running"} == set(carried)
