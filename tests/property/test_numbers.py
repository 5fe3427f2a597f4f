"""Exact decimals, against fractions."""

from __future__ import annotations

import re
from decimal import Decimal, Inexact
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.numbers import (
    EXACT,
    UNITS_PER_ONE,
    exact,
    format_decimal,
    from_units,
    is_multiple,
    parse_decimal,
    to_units,
)
from app.services.margin import divide_half_even
from tests.property.repeatable import repeatable

CANONICAL = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]*[1-9])?")


def decimals(digits: int = 20, exponents: tuple[int, int] = (-12, 6)) -> st.SearchStrategy[Decimal]:
    """Decimals of up to so many digits, trailing zeros and minus zero among them."""
    return st.builds(
        lambda sign, coefficient, exponent: Decimal((sign, tuple(map(int, str(coefficient))), exponent)),
        st.integers(0, 1),
        st.one_of(st.integers(0, 10**digits - 1), st.integers(0, 10**4).map(lambda number: number * 1_000)),
        st.integers(*exponents),
    )


def nearest_even(value: Fraction, places: int) -> Fraction:
    """``value`` rounded half-even; Python rounds a fraction so."""
    return Fraction(round(value * 10**places), 10**places)


@repeatable
@given(dividend=decimals(), divisor=decimals().filter(bool), places=st.integers(0, 12))
@example(dividend=Decimal("-0.000000005"), divisor=Decimal(1), places=8)
@example(dividend=Decimal("0.000000015"), divisor=Decimal(-1), places=8)
@example(dividend=Decimal("4e18"), divisor=Decimal("3e-8"), places=8)
def test_a_division_is_the_true_quotient_rounded_once_half_even(
    dividend: Decimal, divisor: Decimal, places: int
) -> None:
    quotient = divide_half_even(dividend, divisor, places=places)
    assert Fraction(quotient) == nearest_even(Fraction(dividend) / Fraction(divisor), places)


@repeatable
@given(odd=st.integers(-(10**15), 10**15).map(lambda number: 2 * number + 1), divisor=decimals(10).filter(bool))
def test_a_tie_goes_to_the_even_neighbour(odd: int, divisor: Decimal) -> None:
    # odd / 2 units lie halfway between two units
    tie = EXACT.multiply(divisor, Decimal(odd).scaleb(-9) * 5)
    quotient = to_units(divide_half_even(tie, divisor))
    assert quotient % 2 == 0
    assert abs(2 * quotient - odd) == 1


@repeatable
@given(value=decimals(30, (-30, 30)))
def test_a_number_is_written_in_one_way_and_without_loss(value: Decimal) -> None:
    text = format_decimal(value)
    assert CANONICAL.fullmatch(text)
    assert text != "-0"
    assert Decimal(text) == value
    assert format_decimal(Decimal(text)) == text


@repeatable
@given(value=decimals(18, (-8, 2)))
def test_what_is_written_is_read_again(value: Decimal) -> None:
    assert parse_decimal(format_decimal(value)) == value


@repeatable
@given(text=st.one_of(st.text(max_size=45), st.from_regex(r"[-+]?[0-9_.]{0,20}([eE][-+]?[0-9]{0,4})?", fullmatch=True)))
def test_whatever_is_read_is_a_finite_number_and_anything_else_a_value_error(text: str) -> None:
    try:
        value = parse_decimal(text)
    except ValueError:
        return
    assert value.is_finite()
    assert value == Decimal(text)
    assert len(text) <= 40
    assert text.isascii()


@repeatable
@given(number=st.integers(-(2**63), 2**63 - 1))
def test_units_are_kept_over_all_of_an_int64(number: int) -> None:
    assert to_units(from_units(number)) == number
    assert Fraction(from_units(number)) == Fraction(number, UNITS_PER_ONE)


@repeatable
@given(value=decimals(20, (-12, 0)))
def test_units_are_whole_or_an_error(value: Decimal) -> None:
    scaled = Fraction(value) * UNITS_PER_ONE
    if scaled.denominator == 1:
        assert to_units(value) == scaled
    else:
        with pytest.raises(Inexact):
            to_units(value)


@repeatable
@given(value=decimals(18, (-10, 2)), step=decimals(6, (-8, 2)).filter(lambda step: step > 0))
def test_a_multiple_is_one_by_fractions_too(value: Decimal, step: Decimal) -> None:
    assert is_multiple(value, step) == ((Fraction(value) / Fraction(step)).denominator == 1)


@exact
def _product(one: Decimal, other: Decimal) -> Decimal:
    return one * other


@repeatable
@given(one=decimals(40, (0, 0)), other=decimals(40, (0, 0)))
def test_exact_means_exact_or_an_error(one: Decimal, other: Decimal) -> None:
    try:
        product = _product(one, other)
    except Inexact:
        assert len(str(abs(int(one) * int(other)))) > 60
    else:
        assert int(product) == int(one) * int(other)
