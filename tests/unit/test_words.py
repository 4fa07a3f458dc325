"""Counts in sentences: no "1 slices", no "2 times"."""

from __future__ import annotations

from nbgpu.cli_doctor import Check, show
from nbgpu.cli_run import in_words, request_in_words
from nbgpu.models import Owner, Request
from nbgpu.words import counted, times
from nbgpu_agent.monitor import refusal_message
from nbgpu_spawner.waiting import duration


def test_one_and_many() -> None:
    assert [counted(number, "slice") for number in (0, 1, 2)] == ["0 slices", "1 slice", "2 slices"]
    assert counted(2, "process", "processes") == "2 processes"
    assert [times(number) for number in (1, 2, 3)] == ["once", "twice", "3 times"]


def test_times_of_a_wait() -> None:
    assert [in_words(seconds) for seconds in (0.2, 1, 20, 90, 5400)] == ["1 second", "1 second", "20 seconds", "2 minutes", "2 hours"]
    assert [duration(seconds) for seconds in (1, 30, 150)] == ["1 second", "30 seconds", "2 minutes"]


def test_a_refusal_that_came_twice() -> None:
    assert "was refused 1 GiB (twice): " in refusal_message("", 1024**3, 2, "slice", 2 * 1024**3, 0)


def test_several_gpus_of_a_request() -> None:
    request = Request(request_id="request-0001", owner=Owner(hub="h", user="u"), device_count=2, memory_milli=500)
    assert request_in_words(request) == "half of a GPU, on each of 2 GPUs"


def test_doctor_sums_up(capsys) -> None:  # type: ignore[no-untyped-def]
    show([Check("one", "error", "is wrong"), Check("two", "warning", "is odd"), Check("three", "warning", "is odd")])
    assert "1 error, 2 warnings." in capsys.readouterr().out
