"""``%gpu`` and the monitor, as far as they are Python."""

from __future__ import annotations

import asyncio

import pytest
from fake_slice_agent import GIB, FakeAgent

import nbgpu
from nbgpu.errors import NbgpuError
from nbgpu_lab import magic


async def test_summary(agent: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    agent.kernel("me", 2 * GIB)
    agent.limits["me"] = {"memory_bytes": 5 * GIB, "compute_milli": None}
    monkeypatch.setenv("NBGPU_KERNEL_ID", "me")
    text = await asyncio.to_thread(magic.summary)
    assert text.splitlines() == [
        "GPU 0 (Simulated H100 80GB): 3 of 20 GiB used, compute 40 % of a quarter",
        "This kernel: 2 GiB of its own limit of 5 GiB",
    ]


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.delenv("NBGPU_SOCKET", raising=False)
    assert magic.summary().startswith("No GPU slice here")
    monkeypatch.setenv("NBGPU_SOCKET", f"{tmp_path}/none.sock")
    assert "does not answer" in magic.summary()


def test_monitor_knows_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBGPU_KERNEL_ID", "1a2b3c4d")
    assert nbgpu.SliceMonitor().kernel_id == "1a2b3c4d"


def test_keep_says_what_came_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(magic, "_ask", lambda *what: asked.append(what) or {"state": "held"})
    monkeypatch.setenv("NBGPU_KERNEL_ID", "me")
    assert magic.answer("keep").startswith("This notebook keeps its GPU")
    assert magic.answer(" keep  off ").endswith("while it is idle.")
    assert asked == [("PUT", "/v1/idle/kernels/me", {"protected": True}), ("PUT", "/v1/idle/kernels/me", {"protected": False})]
    assert "%gpu keep off" in magic.answer("keep it")
    monkeypatch.setattr(magic, "_ask", lambda *_: NbgpuError("No.", code="not-offered", status=404))
    assert magic.answer("keep") == "Idle notebooks keep their GPU here anyway."
    monkeypatch.delenv("NBGPU_KERNEL_ID")
    assert "nothing to keep" in magic.answer("keep")
