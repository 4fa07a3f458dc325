"""Fractions and amounts of memory: exact, integer inside, and every bad input refused with its field and range."""

from __future__ import annotations

import contextlib
import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nbgpu.errors import InvalidValue
from nbgpu.quantities import (
    GIB,
    MIB,
    compute_for_memory_milli,
    format_memory,
    format_memory_of,
    format_share,
    format_time,
    memory_share_bytes,
    parse_fraction,
    parse_memory,
)

USABLE = 80 * GIB - 512 * MIB


@pytest.mark.parametrize(("parse", "written", "meant"), [
    (parse_fraction, "0,3", "0.3"), (parse_fraction, " 12,5 % ", "12.5 %"), (parse_fraction, "0,5/2", "0.5/2"),
    (parse_memory, "1,5 GiB", "1.5 GiB"),
])  # fmt: skip
def test_a_decimal_comma_is_named(parse, written, meant):  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidValue) as caught:
        parse(written, "field")
    assert caught.value.message.endswith(f", with a point in place of the comma: {meant}.")


@pytest.mark.parametrize(("parse", "written"), [(parse_fraction, "3,5"), (parse_fraction, "0,3,3"), (parse_memory, "5,5")])
def test_a_comma_is_not_named_where_it_is_not_the_fault(parse, written):  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidValue) as caught:
        parse(written, "field")
    assert "comma" not in caught.value.message


@pytest.mark.parametrize(
    ("written", "milli"),
    [
        (0.25, 250), ("0.25", 250), ("1/4", 250), ("25%", 250), (" 25 % ", 250), (Fraction(1, 4), 250), (1, 1000), ("1", 1000),
        ("100%", 1000), ("1/3", 333), (1 / 3, 333), ("2/3", 666), ("0.001", 1), (0.1, 100), (0.3, 300), (0.7, 700), ("12.5%", 125),
        ("1/1000", 1), ("0.5/2", 250),
    ],
)  # fmt: skip
def test_a_fraction_as_people_write_it(written: object, milli: int) -> None:
    assert parse_fraction(written) == milli


BAD_FRACTIONS = [
    0, -1, -0.25, 1.0001, 2, 1000, "0", "-1/4", "1/0", "0/0", "0/1", "5/4", "", " ", "a quarter", "1e309", 1e309, -1e309, float("nan"), 
    "nan", "inf", "0x1", "1_0", "25%%", "%", "/", "1/", "/4", "1/4/2", "\u0664", "1,5",
    None, True, False, [], {}, b"1/4", 1j,
    "9" * 5000, 10**400, "1/" + "9" * 400, "101%", "1e-1",
]  # fmt: skip


@pytest.mark.parametrize("written", ["0.0009", 0.0001, "0.05 %", Fraction(1, 10**9), "1/9999"])
def test_a_fraction_that_is_too_small_is_told_the_least(written: object) -> None:
    with pytest.raises(InvalidValue, match=r"it must be at least 0\.001, a thousandth of a GPU") as caught:
        parse_fraction(written)
    assert "above 0" not in caught.value.message


@pytest.mark.parametrize("written", BAD_FRACTIONS, ids=lambda value: repr(value)[:20])
def test_a_bad_fraction_names_field_and_range(written: object) -> None:
    with pytest.raises(InvalidValue) as caught:
        parse_fraction(written, field="gpu_compute")
    assert caught.value.status == 400
    assert caught.value.field == "gpu_compute"
    assert "gpu_compute" in caught.value.message
    assert "above 0 and up to 1" in caught.value.message
    assert len(caught.value.message) < 250, "a long input must not become a long message"


BAD_MEMORY = [
    0, -1, 1023, MIB - 1, 2**60 + 1, "0 GiB", "-5 GiB", "5", "5 GB", "5 gigabytes", "GiB", "", "1e9 GiB", "inf GiB", "nan GiB", "1/2 GiB",
    "2000000 TiB", "9" * 400 + " GiB", 1.5e9, float("nan"), None, True, [], "5 GiB extra", "\u0665 GiB", "5 \u212aiB", "0.5 KiB", 10**400,
]  # fmt: skip


@pytest.mark.parametrize("written", BAD_MEMORY, ids=lambda value: repr(value)[:20])
def test_a_bad_amount_of_memory_names_field_and_range(written: object) -> None:
    with pytest.raises(InvalidValue) as caught:
        parse_memory(written)
    assert caught.value.field == "gpu_memory"
    assert "binary unit" in caught.value.message


def test_a_decimal_unit_is_refused_with_what_to_write() -> None:
    with pytest.raises(InvalidValue, match=r"such as 20 GiB or 512 MiB: 5 GiB"):
        parse_memory("5 GB")
    with pytest.raises(InvalidValue, match=r"512 MiB\.?$"):
        parse_memory("0 GB")


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("20 GiB", 20 * GIB), ("20GiB", 20 * GIB), ("20G", 20 * GIB), ("20 gi", 20 * GIB), ("512 MiB", 512 * MIB), ("1.5 GiB", 1536 * MIB),
        ("1 TiB", 1024 * GIB), ("2048 KiB", 2 * MIB), (MIB, MIB), (MIB + 1, MIB), ("1.7 MiB", MIB), (2**60, 2**60),
    ],
)  # fmt: skip
def test_an_amount_of_memory_as_people_write_it(written: object, size: int) -> None:
    assert parse_memory(written) == size


@given(st.fractions(min_value=Fraction(1, 1000), max_value=1))
@example(Fraction(1, 3))
@example(Fraction(999_999_999, 1_000_000_000))
def test_rounding_is_down_and_exact(share: Fraction) -> None:
    milli = parse_fraction(share)
    assert Fraction(milli, 1000) <= share < Fraction(milli + 1, 1000)
    assert isinstance(milli, int)


@given(st.integers(1, 1000))
def test_every_milli_survives_each_way_of_writing_it(milli: int) -> None:
    tenths = f"{milli // 10}.{milli % 10}"
    for written in (Fraction(milli, 1000), f"{milli}/1000", f"{milli / 1000!r}", milli / 1000, f"{tenths}%"):
        assert parse_fraction(written) == milli, written


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=16).filter(lambda shares: sum(shares) <= 1000), st.integers(MIB, 2**42))
def test_shares_never_add_up_to_more_than_the_device(shares: list[int], usable: int) -> None:
    parts = [memory_share_bytes(usable, milli) for milli in shares]
    assert sum(parts) <= usable
    assert all(part % MIB == 0 for part in parts)


@given(st.integers(GIB, 2**42), st.data())
def test_compute_for_memory_is_the_smallest_that_brings_it(usable: int, data: st.DataObject) -> None:
    wanted = data.draw(st.integers(1, memory_share_bytes(usable, 1000)))
    milli = compute_for_memory_milli(wanted, usable)
    assert memory_share_bytes(usable, milli) >= wanted
    assert milli == 1 or memory_share_bytes(usable, milli - 1) < wanted


@given(st.integers(1, 2**20))
def test_written_and_read_memory_agree(mebibytes: int) -> None:
    shown = format_memory(mebibytes * MIB)
    assert parse_memory(shown) <= mebibytes * MIB < parse_memory(shown) * 11 // 10 + MIB


@given(st.text(max_size=40))
def test_any_text_is_a_share_or_is_refused(text: str) -> None:
    for parse in (parse_fraction, parse_memory):
        with contextlib.suppress(InvalidValue):
            assert parse(text) > 0


def test_words_for_people() -> None:
    assert format_share(250) == "a quarter"
    assert format_share(375) == "37.5 %"
    assert [format_time(milli) for milli in (250, 1000)] == ["a quarter of the GPU's time", "all of the GPU's time"]
    assert format_share(400) == "40 %"
    assert format_memory(memory_share_bytes(USABLE, 250)) == "19.8 GiB"
    assert format_memory(512 * MIB) == "512 MiB"
    assert format_memory(GIB) == "1 GiB"
    assert format_memory(100) == "100 B"


WORDS = json.loads((Path(__file__).parents[1] / "data" / "memory_words.json").read_text())


def test_memory_reads_as_on_the_page() -> None:
    """The front end's tests hold it to the same table."""
    for amount, text in WORDS["memory"]:
        assert format_memory(amount) == text
    for used, limit, text in WORDS["memory_of"]:
        assert format_memory_of(used, limit) == text
