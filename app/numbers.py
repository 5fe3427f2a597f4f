"""Exact decimals: the context money is computed in, the unit it is stored in, the text it is shown as."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from decimal import Context, Decimal, DivisionByZero, Inexact, InvalidOperation, Overflow, getcontext, setcontext
from typing import Final, ParamSpec, TypeVar

DECIMAL_PLACES: Final = 8
SMALLEST_UNIT: Final = Decimal(1).scaleb(-DECIMAL_PLACES)
UNITS_PER_ONE: Final = 10**DECIMAL_PLACES
DIGITS_MAX: Final = 40
"""The longest text of a number that is read at all; it bounds the work that a hostile one can cause."""

EXACT: Final = Context(prec=60, traps=[Inexact, InvalidOperation, DivisionByZero, Overflow])
"""Sixty digits hold every product of this service; whatever would still be rounded raises ``Inexact``."""

# To find one of its methods takes a context half as long as to run it, so these are looked up once.
_product, _remainder, _whole = EXACT.multiply, EXACT.remainder, EXACT.to_integral_exact

_PLAIN_NUMBER: Final = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2})?", re.ASCII)

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def exact(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Run ``function`` in the EXACT context: a rounding nobody asked for raises ``decimal.Inexact``.

    Where an exact function has called it, that context is there already. It is set as it is, not as a copy, which costs
    as much as a small sum: nothing here changes a context.
    """

    @functools.wraps(function)
    def in_exact_context(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        outside = getcontext()
        if outside is EXACT:
            return function(*args, **kwargs)
        setcontext(EXACT)
        try:
            return function(*args, **kwargs)
        finally:
            setcontext(outside)

    return in_exact_context


def is_multiple(value: Decimal, step: Decimal) -> bool:
    """Whether ``value``, which the caller knows to be no giant, lies on the grid of ``step``."""
    return not _remainder(value, step)


def parse_decimal(text: str) -> Decimal:
    """The number that ``text`` spells in plain ASCII digits; raises ``ValueError`` for anything else.

    ``NaN``, infinities, white space, underscores, a leading plus and digits of other scripts are refused before
    ``Decimal`` sees them.
    """
    if len(text) > DIGITS_MAX or not _PLAIN_NUMBER.fullmatch(text):
        raise ValueError(f"not a plain decimal number of at most {DIGITS_MAX} characters")
    return Decimal(text)


def format_decimal(value: Decimal) -> str:
    """Plain notation: no exponent, no minus zero, no trailing zeros."""
    text = str(value)
    if "E" in text:
        text = f"{value:f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def to_units(value: Decimal) -> int:
    """``value`` in units of 1e-8; raises ``decimal.Inexact`` if that is not a whole number."""
    return int(_whole(_product(value, UNITS_PER_ONE)))


def from_units(units: int) -> Decimal:
    """The decimal that ``units`` of 1e-8 are."""
    return Decimal(units).scaleb(-DECIMAL_PLACES, context=EXACT)
