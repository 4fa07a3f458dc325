"""What a person in a notebook sees of an error of nbgpu: its message, and nothing of our code."""

from __future__ import annotations

import pytest
from IPython.core.interactiveshell import InteractiveShell


def test_a_notebook_without_a_slice_is_told_so_in_plain_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("NBGPU_SOCKET", raising=False)
    monkeypatch.setenv("JUPYTERHUB_USER", "ada")
    shell = InteractiveShell()
    shell.run_cell("import nbgpu\nnbgpu.slice()")
    said = "".join(capsys.readouterr())
    assert said.startswith("This server has no GPU slice.")
    assert "choose a fraction" in said
    assert "Traceback" not in said
    assert "here.py" not in said
