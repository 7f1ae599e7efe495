"""Amounts: exact values, units never guessed, and a printed form that reads back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halflap.amounts import EXAMPLES, Amount, Unit, parse_amount, parse_count
from halflap.errors import HalflapError


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("4.3e9", Amount(4_300_000_000)),
        ("4.3B", Amount(4_300_000_000)),
        ("12M", Amount(12_000_000)),
        ("64k", Amount(64_000)),
        ("1_000", Amount(1000)),
        ("50%", Amount(0.5, share=True)),
        ("12.5 %", Amount(0.125, share=True)),
        ("31.7GiB", Amount(34_037_615_821, "bytes")),
        ("512MB", Amount(512_000_000, "bytes")),
        ("20ms", Amount(0.02, "seconds")),
        ("1.5s", Amount(1.5, "seconds")),
        ("3us", Amount(3e-6, "seconds")),
        (65536, Amount(65536)),
        (4.3e9, Amount(4_300_000_000)),
    ],
)
def test_amounts_as_people_write_them(text: str | float, amount: Amount) -> None:
    assert parse_amount(text) == amount


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("500", "bytes"),
        ("20", "seconds"),
        ("31.7GiB", "count"),
        ("20ms", "bytes"),
        ("1.5", "count"),
        ("0.5B", "bytes"),
        ("-3", "count"),
        ("120%", "count"),
        ("0%", "count"),
        ("12XB", "count"),
        ("half", "count"),
        ("", "count"),
        ("1e400", "count"),
        (True, "count"),
        (float("nan"), "count"),
        (float("inf"), "count"),
    ],
)
def test_what_is_no_amount_is_refused_with_what_is_allowed(text: str | float, unit: Unit) -> None:
    with pytest.raises(HalflapError) as error:
        parse_amount(text, unit)
    assert repr(str(text)) in str(error.value)
    assert EXAMPLES[unit] in str(error.value)


def test_a_share_is_of_the_whole_and_a_value_is_not() -> None:
    assert parse_amount("25%").of(200) == 50
    assert parse_amount("25").of(200) == 25


def test_a_floor_may_be_more_than_the_whole() -> None:
    assert parse_amount("150%", "count", largest_share=100.0) == Amount(1.5, share=True)
    with pytest.raises(HalflapError, match="such as 150%, at most 10000%"):
        parse_amount("20000%", "count", largest_share=100.0)


@pytest.mark.parametrize(("text", "value"), [("0.5", 0.5), ("5.25", 5.25), ("1e-3", 0.001), ("1.235e+04", 12350.0)])
def test_a_rate_need_not_be_whole(text: str, value: float) -> None:
    assert parse_amount(text, "rate") == Amount(value, "rate")


def test_counts_of_tokens_take_no_shares() -> None:
    assert parse_count("2M") == 2_000_000
    with pytest.raises(HalflapError, match=r"12M$"):
        parse_count("50%")


AMOUNTS = st.one_of(
    st.integers(0, 10**15).map(Amount),
    st.integers(0, 10**15).map(lambda value: Amount(value, "bytes")),
    st.floats(1e-9, 1e6).map(lambda value: Amount(value, "seconds")),
    st.floats(1e-9, 1e9).map(lambda value: Amount(value, "rate")),
    st.integers(1, 10_000).map(lambda value: Amount(value / 10_000, share=True)),
)


@settings(max_examples=200)
@given(AMOUNTS)
def test_the_printed_form_reads_back(amount: Amount) -> None:
    assert parse_amount(str(amount), amount.unit) == amount
