"""What a person reads of a refusal."""

from __future__ import annotations

from nbgpu_agent.monitor import refusal_message

GIB = 1024**3


def test_says_who_which_limit_and_what_to_do():
    text = refusal_message("1a2b3c4d-5e6f", 2 * GIB, 3, "slice", 20 * GIB, 20 * GIB)
    assert "1a2b3c4d" in text
    assert "refused 2 GiB (3 times)" in text
    assert "this server's slice of 20 GiB is full (20 GiB in use)" in text
    assert "Free some" in text


def test_says_what_is_left_when_it_was_asked_for_too_much():
    assert "its own limit of 5 GiB has 3 GiB left. Free memory in it" in refusal_message("k", 4 * GIB, 1, "kernel", 5 * GIB, 2 * GIB)


def test_does_not_claim_a_full_slice_that_was_freed_since():
    text = refusal_message("k", GIB, 1, "kernel", 5 * GIB, 0)
    assert "was too full then (0 B in use now)" in text
    assert "left" not in text


def test_names_the_device_when_the_driver_refused():
    assert "the GPU itself had no room" in refusal_message("", GIB, 1, "device", 5 * GIB, 0)


def test_a_refusal_fits_a_notice_of_jupyterlab() -> None:
    """JupyterLab cuts a notice after 140 characters; what to do comes last. The notebook's name takes the kernel's place."""
    for used in (19.3, 15.9):
        text = refusal_message("3f2a0000-1111", int(9.7 * GIB), 1, "slice", int(19.5 * GIB), int(used * GIB))
        shown = text.replace("Notebook kernel 3f2a0000…", "fractions.ipynb")
        assert shown.endswith("larger slice.")
        assert len(shown) <= 140, shown


def test_where_the_slice_has_no_room_either_raising_the_kernels_limit_is_no_advice() -> None:
    text = refusal_message("k", 4 * GIB, 1, "kernel", 5 * GIB, 2 * GIB, both=True)
    assert "its own limit of 5 GiB has 3 GiB left" in text
    assert text.endswith("Free memory: the slice has no room either.")
