"""The code that frees a kernel's caches: run as the front end runs it, with frameworks of which only the names are real."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

SOURCE = Path(__file__).resolve().parents[2] / "labextension" / "src" / "free.ts"
CODE = re.search(r"export const CODE = `(.*?)`;", SOURCE.read_text(), re.S)
assert CODE is not None
EXPRESSION = f"(lambda names: (exec({json.dumps(CODE[1])}, names), names['said'])[1])({{}})"
NAMES = ("torch", "cupy", "jax", "tensorflow")


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was called of the frameworks; none is there yet."""
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return []


def framework(monkeypatch: pytest.MonkeyPatch, name: str, **parts: object) -> None:
    module = ModuleType(name)
    module.__dict__.update(parts)
    monkeypatch.setitem(sys.modules, name, module)


def said() -> str:
    return str(eval(EXPRESSION, {}))


def test_a_kernel_without_frameworks_imports_none(done: list[str]) -> None:
    assert said() == ""
    assert not set(NAMES) & sys.modules.keys()


def test_each_frees_what_it_can(done: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(is_initialized=lambda: True, empty_cache=lambda: done.append("torch"))
    framework(monkeypatch, "torch", cuda=cuda)
    pools = {
        "get_default_memory_pool": lambda: SimpleNamespace(free_all_blocks=lambda: done.append("cupy")),
        "get_default_pinned_memory_pool": lambda: SimpleNamespace(free_all_blocks=lambda: done.append("pinned")),
    }
    framework(monkeypatch, "cupy", **pools)
    framework(monkeypatch, "jax", clear_caches=lambda: done.append("jax"))
    framework(monkeypatch, "tensorflow")
    assert said() == "torch=done cupy=done jax=done tensorflow=keeps"
    assert done == ["torch", "cupy", "pinned", "jax"]


def test_what_cannot_is_said_and_hinders_no_other(done: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    framework(monkeypatch, "torch", cuda=SimpleNamespace(is_initialized=lambda: False))
    framework(monkeypatch, "cupy")  # of a version without its pools
    framework(monkeypatch, "jax", clear_caches=lambda: done.append("jax"))
    assert said() == "torch=unused cupy=AttributeError jax=done"
    assert done == ["jax"]


@pytest.fixture
def kernel() -> Iterator[BlockingKernelClient]:
    manager = KernelManager()
    manager.start_kernel()
    client = manager.blocking_client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.mark.slow
def test_the_notebook_is_as_before(kernel: BlockingKernelClient) -> None:
    """No name, no history, no number of a cell, no output: the answer comes beside."""
    kernel.execute_interactive("import gc; said, x = 'mine', 1", timeout=60)
    outputs: list[str] = []
    reply = kernel.execute_interactive(
        "", silent=True, store_history=False, user_expressions={"said": EXPRESSION}, timeout=60,
        output_hook=lambda message: outputs.append(message["msg_type"]),
    )  # fmt: skip
    assert reply["content"]["user_expressions"]["said"]["data"] == {"text/plain": "''"}
    assert [kind for kind in outputs if kind != "status"] == []
    names = "sorted(name for name in globals() if name[0] != '_' and name not in ('In', 'Out', 'exit', 'quit', 'get_ipython', 'open'))"
    after = kernel.execute_interactive("", silent=True, user_expressions={"names": names, "said": "said"}, timeout=60)
    found = {name: one["data"]["text/plain"] for name, one in after["content"]["user_expressions"].items()}
    assert found == {"names": "['gc', 'said', 'x']", "said": "'mine'"}
    assert after["content"]["execution_count"] == reply["content"]["execution_count"]
