"""Exact decimals: what is read as a number, what is written, and what a unit is."""

from __future__ import annotations

from decimal import Decimal, Inexact, getcontext

import pytest

from app.numbers import (
    DIGITS_MAX,
    EXACT,
    exact,
    format_decimal,
    from_units,
    is_multiple,
    parse_decimal,
    to_units,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", "0"),
        ("-0", "0"),
        ("0.5", "0.5"),
        ("-12.50", "-12.5"),
        ("40000000000.00000001", "40000000000.00000001"),
        ("1e2", "100"),
        ("1E-8", "0.00000001"),
        ("1e+99", "1e99"),
    ],
)
def test_plain_ascii_digits_are_a_number(text: str, value: str) -> None:
    assert parse_decimal(text) == Decimal(value)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", " 1", "1 ", "1\n", "+1", "--1", "-", ".5", "5.", "01", "-01", "1_000", "1,5", "0x10", "1e", "e5",
        "1e100", "1e999999", "1e-100", "NaN", "nan", "sNaN", "Infinity", "-inf", "abc", "٣", "\uff11", "1\u00a0",
        "\u22121", "1\x00",
    ],
)  # fmt: skip
def test_nothing_else_is_a_number(text: str) -> None:
    with pytest.raises(ValueError, match="plain decimal number"):
        parse_decimal(text)


def test_a_number_is_read_up_to_forty_characters() -> None:
    assert parse_decimal("1" * (DIGITS_MAX - 1)) == int("1" * 39)
    assert parse_decimal("1" * DIGITS_MAX) == int("1" * 40)
    with pytest.raises(ValueError, match="at most 40 characters"):
        parse_decimal("1" * (DIGITS_MAX + 1))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("0", "0"),
        ("-0", "0"),
        ("-0.00", "0"),
        ("0E-10", "0"),
        ("0E+5", "0"),
        ("-0E+5", "0"),
        ("1E+3", "1000"),
        ("-1E+3", "-1000"),
        ("1000", "1000"),
        ("10.010", "10.01"),
        ("1.00000000", "1"),
        ("1E-8", "0.00000001"),
        ("-1.5E-7", "-0.00000015"),
        ("39999999999.99999999", "39999999999.99999999"),
    ],
)
def test_a_number_is_written_without_exponent_minus_zero_or_trailing_zeros(value: str, text: str) -> None:
    assert format_decimal(Decimal(value)) == text


def test_a_unit_is_one_hundred_millionth_and_nothing_finer_is_kept() -> None:
    assert to_units(Decimal("0.00000001")) == 1
    assert to_units(Decimal("0.00000002")) == 2
    with pytest.raises(Inexact):
        to_units(Decimal("0.000000009"))
    with pytest.raises(Inexact):
        to_units(Decimal("0.000000011"))


def test_units_keep_every_digit_of_the_largest_amounts() -> None:
    assert to_units(Decimal("40000000000.00000001")) == 4_000_000_000_000_000_001
    assert to_units(Decimal("-40000000000.00000001")) == -4_000_000_000_000_000_001
    assert from_units(4_000_000_000_000_000_001) == Decimal("40000000000.00000001")
    assert from_units(-1) == Decimal("-0.00000001")
    assert from_units(0) == 0


def test_a_step_has_multiples_and_no_others() -> None:
    assert not is_multiple(Decimal("0.0099999"), Decimal("0.01"))
    assert is_multiple(Decimal("0.01"), Decimal("0.01"))
    assert not is_multiple(Decimal("0.0100001"), Decimal("0.01"))
    assert is_multiple(Decimal(0), Decimal("0.01"))
    assert is_multiple(Decimal("-0.75"), Decimal("0.25"))


@exact
def _quotient(dividend: Decimal, divisor: Decimal) -> Decimal:
    return dividend / divisor


@exact
def _product(one: Decimal, other: Decimal) -> Decimal:
    return one * other


def test_a_rounding_that_nobody_asked_for_raises() -> None:
    assert _quotient(Decimal(1), Decimal(8)) == Decimal("0.125")
    with pytest.raises(Inexact):
        _quotient(Decimal(1), Decimal(3))


def test_the_exact_context_holds_sixty_digits() -> None:
    thirty_digits, thirty_one_digits = Decimal("9" * 30), Decimal("9" * 31)
    assert _product(thirty_digits, thirty_digits) == int("9" * 30) ** 2
    with pytest.raises(Inexact):
        _product(thirty_digits, thirty_one_digits)


def test_the_exact_context_ends_with_the_function() -> None:
    outside = getcontext().copy()
    _product(Decimal(2), Decimal(3))
    with pytest.raises(Inexact):
        _quotient(Decimal(1), Decimal(3))
    assert getcontext().prec == outside.prec
    assert getcontext().traps == outside.traps
    assert EXACT.traps[Inexact]
