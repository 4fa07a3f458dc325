"""``%gpu`` and the monitor, as far as they are Python."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys

import nbconvert
import nbformat
import pytest
from fake_slice_agent import GIB, FakeAgent

import nbgpu
from nbgpu.errors import NbgpuError
from nbgpu_lab import magic
from nbgpu_lab.cell import MIME


async def test_summary(agent: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    agent.kernel("me", 2 * GIB)
    agent.limits["me"] = {"memory_bytes": 5 * GIB, "compute_milli": None}
    monkeypatch.setenv("NBGPU_KERNEL_ID", "me")
    said = await asyncio.to_thread(magic.summary)
    assert repr(said).splitlines() == [
        "GPU 0 (Simulated H100 80GB): 3 of 20 GiB used, compute 40 % of a quarter",
        "This kernel: 2 GiB of its own limit of 5 GiB",
    ]
    html = said._repr_html_()
    assert html is not None
    for words in ("3 of 20 GiB", "40 % of a quarter", "2 GiB of its own limit of 5 GiB", 'scope="row"', 'aria-label="Memory"'):
        assert words in html


async def test_what_others_named_is_text(agent: FakeAgent) -> None:
    usage = agent.usage()
    usage["devices"][0]["model"] = "<img src=x onerror=alert(1)>"
    html = magic.table(usage, None)
    assert "&lt;img src=x" in html
    assert "<img" not in html


class Shell:
    """As much of IPython's shell as the magic meets."""

    def __init__(self, own: object = None):
        self.magics = {"gpu": own} if own else {}

    def find_line_magic(self, name: str) -> object:
        return self.magics.get(name)

    def register_magic_function(self, function: object, kind: str, name: str) -> None:
        self.magics[name] = function


def test_a_magic_of_the_users_own_is_left_alone() -> None:
    bare, taken = Shell(), Shell(own="mine")
    magic.register(bare)
    magic.register(taken)
    assert (bare.magics, taken.magics) == ({"gpu": magic.show}, {"gpu": "mine"})


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.delenv("NBGPU_SOCKET", raising=False)
    assert magic.summary().text.startswith("No GPU slice here")
    monkeypatch.setenv("NBGPU_SOCKET", f"{tmp_path}/none.sock")
    assert "does not answer" in magic.summary().text


def test_both_monitors_know_their_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from nbgpu_lab.widget import SliceMonitor  # what `nbgpu[widget]` is for

    monkeypatch.setenv("NBGPU_KERNEL_ID", "1a2b3c4d")
    assert nbgpu.SliceMonitor()._repr_mimebundle_()[MIME] == {"kernel_id": "1a2b3c4d"}
    assert SliceMonitor().kernel_id == "1a2b3c4d"


async def test_the_monitor_is_data_and_text(agent: FakeAgent) -> None:
    """IPython sends it as it is, and who cannot draw it, as nbconvert, shows the numbers of then."""
    from IPython.core.formatters import DisplayFormatter

    agent.kernel("me", 2 * GIB)
    data, metadata = await asyncio.to_thread(DisplayFormatter().format, nbgpu.SliceMonitor())
    assert (set(data), metadata) == ({MIME, "text/plain"}, {})
    first, second = data["text/plain"].splitlines()
    assert re.fullmatch(r"GPU slice at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S+", first)
    assert second == "GPU 0 (Simulated H100 80GB): 3 of 20 GiB used, compute 40 % of a quarter"
    cell = nbformat.v4.new_code_cell("nbgpu.SliceMonitor()", outputs=[nbformat.v4.new_output("display_data", data)])
    page, _ = nbconvert.HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    assert second in page
    assert MIME not in page


def test_the_monitor_needs_no_widgets() -> None:
    """A Python without anywidget and ipywidgets, in which their import fails."""
    code = "import sys; sys.modules |= dict.fromkeys(('anywidget', 'ipywidgets', 'traitlets')); import nbgpu; "
    code += f"print(nbgpu.SliceMonitor()._repr_mimebundle_()[{MIME!r}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("{'kernel_id': "), done.stderr


def test_keep_says_what_came_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(magic, "_ask", lambda *what: asked.append(what) or {"state": "held"})
    monkeypatch.setenv("NBGPU_KERNEL_ID", "me")
    assert magic.answer("keep").text.startswith("This notebook keeps its GPU")
    assert magic.answer(" keep  off ").text.endswith("while it is idle.")
    assert asked == [("PUT", "/v1/idle/kernels/me", {"protected": True}), ("PUT", "/v1/idle/kernels/me", {"protected": False})]
    assert "%gpu keep off" in magic.answer("keep it").text
    monkeypatch.setattr(magic, "_ask", lambda *_: NbgpuError("No.", code="not-offered", status=404))
    assert magic.answer("keep").text == "Idle notebooks keep their GPU here anyway."
    monkeypatch.delenv("NBGPU_KERNEL_ID")
    assert "nothing to keep" in magic.answer("keep").text
