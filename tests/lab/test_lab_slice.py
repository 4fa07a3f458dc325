"""The notebook side on a real slice: pool, agent, limiter and driver (simulated where there is no GPU), a Jupyter server, kernels."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient

from nbgpu.quantities import format_memory

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ROOT / "nodeagent" / "nbgpu_agent" / "_lib"
EXAMPLE = ROOT / "examples" / "fractions.ipynb"
GIB = 1024**3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (LIBRARIES / "sim" / "libcuda.so.1").exists(), reason="C libraries not built: make setup"),
]


def wait_for(what: str, condition: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)
    return value


class Server:
    """A Jupyter server in a slice of a quarter."""

    def __init__(self, base: Path, port: int):
        self.base, self.port = base, port

    def call(self, path: str, body: object = None, method: str | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self.port}/{path}"
        request = urllib.request.Request(url, data, {"Authorization": "token secret"}, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or b"null")

    def answers(self) -> bool:
        try:
            return bool(self.call("api/status"))
        except (urllib.error.URLError, OSError):
            return False

    def usage(self) -> Any:
        return self.call("nbgpu/api/usage?after=0")

    def kernel(self, kernel_id: str) -> Any:
        """Return a kernel's use, at most a second old, once it is listed."""
        return wait_for("the kernel", lambda: next((one for one in self.usage()["kernels"] if one["kernel_id"] == kernel_id), None), 5)

    def open(self, notebook: str) -> Kernel:
        session = {"name": notebook, "type": "notebook", "path": notebook, "kernel": {"name": "python3"}}
        return Kernel(self.base, self.call("api/sessions", session)["kernel"]["id"])


class Kernel:
    """A client of one kernel."""

    def __init__(self, base: Path, kernel_id: str):
        self.id = kernel_id
        self.client = BlockingKernelClient(connection_file=str(base / "runtime" / f"kernel-{kernel_id}.json"))
        self.client.load_connection_file()
        self.client.hb_channel.time_to_dead = 30.0  # a busy machine is not a dead kernel
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def run(self, code: str) -> str:
        """Return what `code` printed; fail when it raised."""
        printed: list[str] = []

        def keep(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream":
                printed.append(message["content"]["text"])

        reply = self.client.execute_interactive(code, timeout=60, output_hook=keep)
        assert reply["content"]["status"] == "ok", "\n".join(reply["content"].get("traceback", []))
        return "".join(printed)


TERMINAL = """
import subprocess, sys
done = subprocess.run([sys.executable, "-m", "nbgpu", *WORDS], capture_output=True, text=True, cwd=HOME)
print(done.stdout + done.stderr, end="")
"""


def terminal(kernel: Kernel, *words: str) -> str:
    """Return what `nbgpu` says to these words where a kernel runs: its environment is that of a terminal of its server."""
    return kernel.run(TERMINAL.replace("WORDS", repr(words)).replace("HOME", repr(str(ROOT))))


def cells() -> dict[str, str]:
    """The example's code cells by id, the long one cut to half a second."""
    notebook = json.loads(EXAMPLE.read_text())
    found = {cell["id"]: "".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"}
    assert "start < 10:" in found["launch"]
    found["launch"] = found["launch"].replace("start < 10:", "start < 0.5:")
    return found


def write_notebooks(folder: Path) -> None:
    folder.mkdir()
    shutil.copy(EXAMPLE, folder / "fractions.ipynb")
    capped = json.loads(EXAMPLE.read_text())
    capped["metadata"]["nbgpu"] = {"memory": "5 GiB"}
    (folder / "capped.ipynb").write_text(json.dumps(capped))


def environment(base: Path) -> dict[str, str]:
    """This checkout's parts, installed or not, in directories of the test's own."""
    shutil.copytree(ROOT / "labextension" / "jupyter-config", base / "config" / "jupyter_server_config.d")
    (base / "config" / "jupyter_server_config.json").write_text((ROOT / "labextension/jupyter-config/nbgpu_lab.json").read_text())
    paths = [str(ROOT / part) for part in ("", "spawner", "nodeagent", "labextension")]
    if "nbgpu-provisioner" not in {found.name for found in entry_points(group="jupyter_client.kernel_provisioners")}:
        info = base / "meta" / "nbgpu-0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nbgpu\nVersion: 0\n")
        line = "nbgpu-provisioner = nbgpu_lab.provisioner:SliceProvisioner\n"
        (info / "entry_points.txt").write_text(f"[jupyter_client.kernel_provisioners]\n{line}")
        paths.append(str(base / "meta"))
    own = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime", "NBGPU_RUNTIME_DIR": "nbgpu"}
    env = {**os.environ, **{name: str(base / folder) for name, folder in own.items()}}
    env["NBGPU_SIM_STATE"] = f"/dev/shm/{base.name}"
    env["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    return env


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    base = Path(tempfile.mkdtemp(prefix="nbgpu-lab-"))  # short: it holds Unix sockets
    env = environment(base)
    write_notebooks(base / "notebooks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        running = Server(base, probe.getsockname()[1])
    log = (base / "log").open("w")
    python = [sys.executable, "-m"]
    options = [f"--port={running.port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=secret", "--allow-root", "--no-browser"]
    jupyter = [*python, "jupyter_server", *options, f"--ServerApp.root_dir={base / 'notebooks'}"]
    (base / "nbgpu").mkdir()
    serve = subprocess.Popen([*python, "nbgpu", "serve"], env=env, stdout=log, stderr=log)
    process = None
    try:
        wait_for("pool and agent", lambda: (base / "nbgpu" / "pool.sock").exists() or serve.poll() is not None, 30)
        process = subprocess.Popen([*python, "nbgpu", "run", "--gpu", "1/4", "--", *jupyter], env=env, stdout=log, stderr=log)
        wait_for("the Jupyter server", lambda: running.answers() or process.poll() is not None, 60)
        assert process.poll() is None, (base / "log").read_text()[-3000:]
        yield running
    finally:
        for part in (process, serve):
            if part is not None:
                part.terminate()
                part.wait(30)
        Path(env["NBGPU_SIM_STATE"]).unlink(missing_ok=True)
        shutil.rmtree(base, ignore_errors=True)


def test_the_example_on_a_quarter(server: Server) -> None:
    code, kernel = cells(), server.open("fractions.ipynb")
    (device,) = server.usage()["devices"]
    limit = format_memory(device["memory_limit_bytes"])
    kernel.run(code["setup"])
    assert kernel.run(code["ask-driver"]).startswith(f"CUDA driver: {limit}, ")
    assert kernel.run(code["ask-nvml"]).startswith(f"NVML: {limit}, ")
    assert f"{device['memory_limit_bytes'] // 1024**2}MiB" in kernel.run(code["ask-smi"])

    free = kernel.run(code["allocate"]).rpartition(", ")[2].removesuffix(" free\n")
    held = int(device["memory_limit_bytes"] * 0.7)
    seen = wait_for("its memory", lambda: (use := server.kernel(kernel.id)) and use["devices"] and use, 2)
    wait_for("all of it", lambda: server.kernel(kernel.id)["devices"][0]["memory_used_bytes"] > held, 2)
    assert (seen["name"], seen["path"]) == ("fractions.ipynb", "fractions.ipynb")

    before = server.usage()["last_event"]
    assert kernel.run(code["refused"]) == "CUDA_ERROR_OUT_OF_MEMORY\n"
    notices = wait_for("the notice", lambda: server.call(f"nbgpu/api/events?after={before}"), 1)
    assert notices[0]["kind"] == "refused"
    assert notices[0]["message"].startswith("fractions.ipynb was refused ")
    assert f" has {free} left." in notices[0]["message"], "the notice says what the driver says"

    kernel.run(code["module"])
    assert "launches of 2 ms" in kernel.run(code["launch"])
    for _ in range(2):  # every cell can be run again
        kernel.run(code["allocate"])
        kernel.run(code["release"])
    wait_for("its launches", lambda: server.kernel(kernel.id)["launches"] > 0, 2)


def test_limits_of_one_notebook(server: Server) -> None:
    code, kernel = cells(), server.open("capped.ipynb")
    wait_for("the limit in its metadata", lambda: server.kernel(kernel.id)["limit"]["memory_bytes"] == 5 * GIB, 2)
    kernel.run(code["setup"])
    assert kernel.run(code["ask-driver"]).startswith("CUDA driver: 5 GiB, ")
    take = "blocks = [check(driver.cuMemAlloc(1024**3)) for _ in range(COUNT)]\n" + code["release"]
    kernel.run(take.replace("COUNT", "4"))
    attempt = "try:\n    blocks = [check(driver.cuMemAlloc(1024**3)) for _ in range(6)]\nexcept RuntimeError as error:\n    print(error)"
    assert kernel.run(attempt) == "CUDA_ERROR_OUT_OF_MEMORY\n"

    # control: without its limit the same kernel gets what it was refused
    server.call(f"nbgpu/api/kernels/{kernel.id}", {"memory": ""}, "PUT")
    wait_for("no limit", lambda: server.kernel(kernel.id)["limit"]["memory_bytes"] is None, 2)
    kernel.run(take.replace("COUNT", "6"))

    # the limit that the panel sets outlives a restart; the kernel's end removes it
    server.call(f"nbgpu/api/kernels/{kernel.id}", {"memory": "1/2"}, "PUT")
    server.call(f"api/kernels/{kernel.id}/restart", {})
    half = server.usage()["devices"][0]["memory_limit_bytes"] // 2
    assert abs(server.kernel(kernel.id)["limit"]["memory_bytes"] - half) <= 1024**2


def test_the_command_line_knows_notebooks_by_name_and_limits_them_while_they_run(server: Server) -> None:
    shutil.copy(server.base / "notebooks" / "fractions.ipynb", server.base / "notebooks" / "quiet.ipynb")
    kernel = server.open("quiet.ipynb")

    def nbgpu(*words: str) -> str:
        return terminal(kernel, *words)

    def listed() -> dict[str, Any]:
        return {one["name"]: one for one in json.loads(nbgpu("limit", "--json"))["kernels"]}

    quiet = wait_for("a kernel that has used no GPU, by its notebook's name", lambda: listed().get("quiet.ipynb"), 10)
    assert (quiet["kernel_id"], quiet["path"], quiet["devices"]) == (kernel.id, "quiet.ipynb", [])
    assert (
        nbgpu("limit", "quiet", "--memory", "50%", "--compute", "1/2")
        == "quiet.ipynb: memory 9.7 GiB, 1/2 of the slice's time (12.5 % of the GPU).\n"
    )
    wait_for("the limit in the usage", lambda: server.kernel(kernel.id)["limit"]["compute_milli"] == 125, 5)
    assert "at most 19.5 GiB" in nbgpu("limit", "quiet.ipynb", "--memory", "900GiB")

    # below what it holds: nothing is lost, nothing more is given, and all three places say so
    code = cells()
    kernel.run(code["setup"])
    kernel.run("blocks = [check(driver.cuMemAlloc(1024**3)) for _ in range(4)]")
    before = server.usage()["last_event"]
    assert "It holds 4" in nbgpu("limit", "quiet", "--memory", "2GiB")
    assert "of 2 GiB, over" in nbgpu("status")
    (notice,) = [one for one in server.call(f"nbgpu/api/events?after={before}") if one["kind"] == "over-limit"]
    assert notice["message"].startswith("quiet.ipynb holds 4")
    attempt = "try:\n    check(driver.cuMemAlloc(1024**3))\nexcept RuntimeError as error:\n    print(error)"
    assert kernel.run(attempt) == "CUDA_ERROR_OUT_OF_MEMORY\n"
    assert nbgpu("limit", "quiet", "--memory", "6GiB").endswith("memory 6 GiB, 1/2 of the slice's time (12.5 % of the GPU).\n")
    assert kernel.run(attempt) == "", "the control: above what it holds there is room again"


def test_a_limit_above_the_slice_is_refused(server: Server) -> None:
    with pytest.raises(urllib.error.HTTPError) as refusal:
        server.call("nbgpu/api/kernels/abc", {"memory": "900 GiB"}, "PUT")
    assert refusal.value.code == 400
    assert "at most 19.5 GiB, this server's slice" in json.loads(refusal.value.read())["error"]["message"]
