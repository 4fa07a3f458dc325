"""The command line: what options mean, errors in one line, and nothing imported that a command does not need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nbgpu import cli_doctor_checks
from nbgpu.cli_common import find_slice, percent
from nbgpu.cli_doctor import Facts
from nbgpu.cli_run import in_options, in_words, request_in_words, slice_in_words, wanted
from nbgpu.cli_serve import without_prefix
from nbgpu.errors import InvalidValue, NbgpuError, Refused
from nbgpu.launch import environment
from nbgpu.models import AgentSlice, Grant, GrantState, Launch, Owner, Slice, SliceDevice
from nbgpu.quantities import GIB


def nbgpu(*words: str, runtime: Path, **more: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "NBGPU_RUNTIME_DIR": str(runtime), **more}
    env.pop("NBGPU_SOCKET", None)
    return subprocess.run([sys.executable, "-m", "nbgpu", *words], capture_output=True, text=True, timeout=60, env=env)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"gpu": "1/4"}, {"compute_milli": 250, "memory_milli": 250, "memory_bytes": None}),
        ({"gpu": "1/4", "memory": "20GiB"}, {"compute_milli": 250, "memory_milli": None, "memory_bytes": 20 * GIB}),
        ({"gpu": "1/4", "compute": "1/2"}, {"compute_milli": 500, "memory_milli": 250, "memory_bytes": None}),
        ({"memory": "20GiB"}, {"compute_milli": None, "memory_milli": None, "memory_bytes": 20 * GIB}),
        ({"compute": "1/8"}, {"compute_milli": 125, "memory_milli": None, "memory_bytes": None}),
        ({"gpu": "1", "count": 2, "mode": "strict", "model": "H100"}, {"device_count": 2, "mode": "strict", "model": "H100"}),
    ],
    ids=str,
)
def test_what_the_options_of_run_ask_for(options: dict[str, object], part: dict[str, object]) -> None:
    request = wanted(**{"gpu": None, "memory": None, "compute": None, **options})  # type: ignore[arg-type]
    assert {name: getattr(request, name) for name in part} == part


def test_each_run_is_an_owner_and_a_request_of_its_own() -> None:
    first, second = (wanted(gpu="1/4", memory=None, compute=None) for _ in range(2))
    assert first.request_id != second.request_id
    assert first.owner.user == second.owner.user != ""


@pytest.mark.parametrize("value", ["0", "-1", "nan", "1/0", "1e309", "2", ""])
@pytest.mark.parametrize("option", ["gpu", "compute"])
def test_a_bad_fraction_names_the_option(option: str, value: str) -> None:
    with pytest.raises(InvalidValue, match=f"--{option}") as caught:
        wanted(**{"gpu": None, "memory": None, "compute": None, option: value})  # type: ignore[arg-type]
    assert caught.value.field == f"--{option}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--gpu", "1/0", "--", "true"], "--gpu is '1/0'"),
        (["run", "--", "true"], "Say how much of a GPU"),
        (["run", "--gpu", "1/4", "--mode", "turbo", "--", "true"], "strict or burst"),
        (["run", "--gpu", "1/4", "--count", "0", "--", "true"], "--count"),
        (["status"], "The agent is not running"),
        (["limit"], "The agent is not running"),
        (["limit", "abc"], "Say what it may have"),
        (["status", "--pool", "http://127.0.0.1:1"], "The pool at http://127.0.0.1:1 does not answer: Connection refused. Is"),
        (["agent", "--reserve", "-1"], "; or 0 for none."),
        (["agent", "--sim-devices", "0", "--simulate"], "--sim-devices is 0; it must be a whole number from 1 to 16."),
        (["agent", "--sim-devices", "17", "--simulate"], "--sim-devices is 17"),
        (["resume"], "The agent is not running"),
        (["resume", "--all", "99999"], "--all or one process, not both"),
        (["resume", "--all", "kernel-one"], "--all or one process, not both"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_is_one_line_and_an_exit_status(runtime: Path, words: list[str], said: str) -> None:
    done = nbgpu(*words, runtime=runtime)
    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("command", ["status", "limit"])
def test_in_a_hubs_server_without_a_slice_that_is_said(runtime: Path, command: str) -> None:
    done = nbgpu(command, runtime=runtime, JUPYTERHUB_SERVICE_PREFIX="/user/ada/")
    assert done.returncode == 1
    assert "No GPU slice here" in done.stderr


def test_debug_shows_where(runtime: Path) -> None:
    assert "Traceback" in nbgpu("status", runtime=runtime, NBGPU_DEBUG="1").stderr


def test_a_program_that_does_not_exist_asks_for_no_gpu(runtime: Path) -> None:
    done = nbgpu("run", "--gpu", "1/4", "--", "no-such-program", runtime=runtime)
    assert done.returncode == 127
    assert done.stderr == "nbgpu: no-such-program: no such program\n"
    assert list(runtime.iterdir()) == []


def test_help_and_version(runtime: Path) -> None:
    assert "fraction of a GPU" in nbgpu("--help", runtime=runtime).stdout
    assert nbgpu("--version", runtime=runtime).stdout.startswith("nbgpu ")
    assert nbgpu("nonsense", runtime=runtime).returncode == 2


def test_the_command_line_imports_late() -> None:
    heavy = ["pydantic", "http.client", "fastapi", "rich.table", "jupyterhub"]
    code = f"import sys, nbgpu.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_doctor_without_anything_running(runtime: Path) -> None:
    done = nbgpu("doctor", "--no-probe", "--json", runtime=runtime)
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    for part in ("agent", "pool"):
        assert checks[part]["level"] == "note"
        assert checks[part]["found"].startswith(f"not running in {runtime}")
    assert json.loads(done.stdout)["not_running"] == ["agent", "pool"]
    assert done.returncode == int(any(check["level"] == "error" for check in checks.values()))
    last = nbgpu("doctor", "--no-probe", runtime=runtime).stdout.splitlines()[-1]
    assert "Not running: agent and pool; a hub or `nbgpu run` starts them" in last


def test_doctor_blames_what_a_unit_should_have_started(runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_doctor_checks, "UNITS", tmp_path)
    monkeypatch.setattr(cli_doctor_checks, "SYSTEM_RUNTIME", runtime)
    assert [check.level for check in cli_doctor_checks.agent_and_pool(Facts())] == ["note", "note"], "control: no unit, nothing to blame"
    (tmp_path / "nbgpu-agent.service").touch()
    agent, pool = cli_doctor_checks.agent_and_pool(Facts())
    assert (agent.level, pool.level) == ("error", "note")
    assert "systemctl status nbgpu-agent.service" in agent.remedy


def test_doctor_says_what_is_wrong_with_a_runtime_directory(runtime: Path) -> None:
    runtime.chmod(0o777)
    done = nbgpu("doctor", "--no-probe", runtime=runtime)
    assert done.returncode == 1
    assert f"others may write to {runtime}" in done.stdout
    assert f"chmod 0755 {runtime}" in done.stdout


def test_the_environment_of_a_slice() -> None:
    slice_env = {"LD_PRELOAD": "/r/lib/1/libnbgpu.so", "PATH": "/r/lib/1/sim:/agents/bin", "GONE": "", "NEW": "1"}
    launch = Launch(env=slice_env, slice_dir="/r/slices/a", socket="/r/slices/a/api.sock")
    merged = environment({"PATH": "/bin:/r/lib/1/sim", "GONE": "x", "HOME": "/h"}, launch)
    assert merged == {"LD_PRELOAD": "/r/lib/1/libnbgpu.so", "PATH": "/r/lib/1/sim:/bin", "NEW": "1", "HOME": "/h"}
    assert environment({}, launch)["PATH"] == "/r/lib/1/sim:/agents/bin"


def known(slice_id: str, user: str) -> AgentSlice:
    device = SliceDevice(uuid="GPU-1", index=0, model="m", memory_bytes=GIB, compute_milli=250)
    piece = Slice(slice_id=slice_id, owner=Owner(hub="h", user=user), node="n", mode="burst", devices=[device])
    return AgentSlice(slice=piece, state="running", process_count=1, created=0.0)


def test_a_slice_is_known_by_the_start_of_its_id() -> None:
    first, second = known("aaaaaaaa1111", "ada"), known("aaaabbbb2222", "grace")
    assert find_slice([first, second], "aaaaa") is first
    assert find_slice([first], None) is first
    for start, said in (("aaaa", "More than one"), ("x", "No slice"), ("", "No slice"), (None, "are 2 slices")):
        with pytest.raises(NbgpuError, match=said):
            find_slice([first, second], start)
    with pytest.raises(NbgpuError, match="is no slice"):
        find_slice([], None)


def test_what_the_pool_refuses_is_said_of_the_option() -> None:
    said = in_options(InvalidValue("memory_milli", 3, "at least 0.7 % of a GPU here"))
    assert (said.message, said.field, said.status) == ("--gpu: it must be at least 0.7 % of a GPU here.", "--gpu", 400)
    other = Refused("Your quota is half a GPU.")
    assert in_options(other) is other


def test_what_a_log_has_said_has_no_prefix_inside_a_sentence() -> None:
    assert without_prefix(["nbgpu: An agent already serves /r: `nbgpu status` shows it.", "nbgpu agent: 1"]) == (
        "An agent already serves /r: `nbgpu status` shows it. nbgpu agent: 1"
    )


def test_the_pool_is_called_as_it_was_called(runtime: Path) -> None:
    assert nbgpu("pool", "-h", runtime=runtime).stdout.startswith("usage: nbgpu pool ")


def test_doctor_finds_the_proxy_of_a_hub_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cli_doctor_checks, "PROXY", "proxy-of-this-test")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    (tmp_path / "proxy-of-this-test").write_text("#!/bin/sh\nread line\n")

    def level() -> str:
        return cli_doctor_checks.hub_parts(Facts())[0].level

    assert level() == "warning", "control: it is nowhere"
    proxy = subprocess.Popen(["/bin/sh", str(tmp_path / "proxy-of-this-test")], stdin=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 5  # the system shows its words a moment after it began
        while level() != "ok":
            assert time.monotonic() < deadline, "it runs"
    finally:
        proxy.communicate()
    assert level() == "warning"
    programs = tmp_path / "node_modules" / ".bin"
    programs.mkdir(parents=True)
    (programs / "proxy-of-this-test").symlink_to("/bin/sh")
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    assert level() == "ok", "beside the virtual environment, wherever one stands"


def test_the_whole_of_a_gpu() -> None:
    assert request_in_words(wanted(gpu="1", memory=None, compute=None)) == "a whole GPU"
    assert request_in_words(wanted(gpu="1", memory=None, compute=None, count=2)) == "a whole GPU, on each of 2 GPUs"
    for milli, words in ((1000, "78 GiB and all the time of GPU 1 (m), strict"), (500, "78 GiB and half of the time of GPU 1 (m), strict")):
        device = SliceDevice(uuid="GPU-1", index=1, model="m", memory_bytes=78 * GIB, compute_milli=milli)
        piece = Slice(slice_id="aaaaaaaa1111", owner=Owner(hub="h", user="u"), node="n", mode="strict", devices=[device])
        request = wanted(gpu="1", memory=None, compute=None)
        assert slice_in_words(Grant(request=request, state=GrantState.bound, slice=piece)) == words


def test_words_for_people() -> None:
    assert percent(125) == "12.5 %"
    assert in_words(20) == "20 seconds"
    assert in_words(240) == "4 minutes"
    assert in_words(7200) == "2 hours"
    assert request_in_words(wanted(gpu="1/4", memory=None, compute=None, count=2)) == "a quarter of a GPU, on each of 2 GPUs"
    assert request_in_words(wanted(gpu=None, memory="20GiB", compute=None)) == "20 GiB of a GPU"
