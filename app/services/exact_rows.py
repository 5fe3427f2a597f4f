"""Accounts valued and written as text thousands at once, to the last digit as Decimal would show them.

Money is int64 in units of a power of ten that holds every product at the present marks without rounding. A row whose
numbers could leave an int64 does not *fit*, and is left to Decimal. All rows get their texts at once, as records of one
length: four digits at a time come from a table, and where a number is shorter than the longest stand zero bytes, which
are dropped at the end. Records are as short as the rows at hand allow: to drop zero bytes, each byte is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from app.columns import Chunk, ScreenedChunk, value_rows
from app.contracts import Contract
from app.numbers import DECIMAL_PLACES, UNITS_PER_ONE, to_units
from app.services import margin
from app.services.margin import Exposure, Flags
from app.services.trading import RestoreAt

Units: TypeAlias = NDArray[np.int64]
Texts: TypeAlias = bytes | NDArray[np.uint8] | NDArray[np.uint32]
"""What stands in every row alike; or a character a row, or four."""

Part: TypeAlias = Texts | NDArray[np.bytes_]

FITS_MAX: Final = 2.0**61
"""Rows whose sums stay below this many units fit an int64, with a bit to spare for what float64 says of them."""

INT64_MAX: Final = 2**63 - 1
PLACES_MAX: Final = 18
"""Powers of ten beyond this leave an int64 by themselves."""

RATIO_UNITS_MAX: Final = 2.0**50
"""Up to here float64 says a ratio in units of 1e-8 to within one."""

GROUP: Final = 4
GROUPS: Final = 10**GROUP
GROUPS_SHORT: Final = 2
"""So many groups fit an uint32, of which the processor divides four times as many at once."""


def _table() -> NDArray[np.uint32]:
    """Four digits of each number below 10,000: all, without leading zeros, so but with a last one, without trailing."""
    texts = [f"{number:04d}" for number in range(GROUPS)]
    leading = [text.lstrip("0").rjust(GROUP, "\0") for text in texts]
    ones = ["\0\0\0" + "0", *leading[1:]]
    trailing = [text.rstrip("0").ljust(GROUP, "\0") for text in texts]
    return np.frombuffer("".join([*texts, *leading, *ones, *trailing]).encode(), dtype=np.uint32)


_DIGITS: Final = _table()
_LEADING: Final = np.uint32(GROUPS)
_ONES: Final = np.uint32(2 * GROUPS)
_TRAILING: Final = np.uint32(3 * GROUPS)


@dataclass(frozen=True, slots=True)
class ExactMargins:
    """Rows valued at their marks, exact: what they hold, and their margins in units of ``10**-places``."""

    notional: Units
    equity: Units
    used_margin: Units
    maintenance_margin: Units
    places: int

    def rows(self, chosen: NDArray[np.intp]) -> ExactMargins:
        """Some of the rows."""
        return ExactMargins(
            self.notional[chosen],
            self.equity[chosen],
            self.used_margin[chosen],
            self.maintenance_margin[chosen],
            self.places,
        )

    @property
    def candidate(self) -> Flags:
        """Which rows are of candidates."""
        units: Any = self  # integers serve as well as floats, and are exact
        flags: Flags = margin.is_candidate(
            notional=units.notional, equity=units.equity, maintenance_margin=units.maintenance_margin
        )
        return flags

    def restored(self, restore_at: RestoreAt) -> Flags:
        """Which rows are of accounts whose breach, if they are in one, ends."""
        units: Any = self
        flags: Flags = margin.is_restored(
            notional=units.notional,
            equity=units.equity,
            restore_margin=units.used_margin if restore_at == "initial" else units.maintenance_margin,
        )
        return flags


def fitting_rows(chunk: Chunk, contracts: Mapping[str, Contract]) -> Flags:
    """Which rows are open only where there is a mark, on whole lots, with sums that fit an int64 at these marks."""
    prices = chunk.marks.prices
    places = sum(_places(contracts, prices))
    fits: Flags = value_rows(chunk, contracts)[1] * 10.0**places < FITS_MAX
    if places > PLACES_MAX:
        fits[:] = False
    for symbol, quantity in chunk.quantity.items():
        fits &= (quantity % to_units(contracts[symbol].lot_size) == 0) & ((quantity == 0) | (symbol in prices))
    return fits


def exact_margins(chunk: Chunk, contracts: Mapping[str, Contract]) -> ExactMargins:
    """The margins of the rows of ``chunk``, all of which fit."""
    prices = chunk.marks.prices
    places, rate_places = _places(contracts, prices)
    if places + rate_places > PLACES_MAX:
        places, rate_places = DECIMAL_PLACES, 0  # no row fits: all that come here are empty
    finer = 10 ** (places - DECIMAL_PLACES)
    zeros = np.zeros(len(chunk), dtype=np.int64)
    exposure: Exposure[Any] = Exposure(zeros, zeros, zeros, zeros)
    for symbol, price in prices.items():
        contract = contracts[symbol]
        exposure += margin.position_exposure(
            quantity=chunk.quantity[symbol] // to_units(contract.lot_size),
            cost=chunk.cost[symbol] * finer,
            mark_price=_whole(price * contract.lot_size, places),
            initial_rate=_whole(contract.initial_rate, rate_places),
            maintenance_rate=_whole(contract.maintenance_rate, rate_places),
        )
    return ExactMargins(
        notional=exposure.notional,
        equity=(chunk.balance * finer + exposure.unrealised_pnl) * 10**rate_places,
        used_margin=exposure.used_margin,
        maintenance_margin=exposure.maintenance_margin,
        places=places + rate_places,
    )


def tell_exactly(screened: ScreenedChunk, contracts: Mapping[str, Contract]) -> None:
    """Set the flags of candidates right where float64 leaves a doubt; those of a row that does not fit stay.

    A row exactly at its line is such a row at every look, and nothing becomes of it: nobody need be asked who it is.
    """
    rows = screened.near
    rows = rows[screened.may_be_candidate[rows] & ~screened.surely_candidate[rows]]
    rows = rows[fitting_rows(screened.chunk.rows(rows), contracts)]
    candidate = exact_margins(screened.chunk.rows(rows), contracts).candidate
    screened.may_be_candidate[rows] = screened.surely_candidate[rows] = candidate


def _places(contracts: Mapping[str, Contract], prices: Mapping[str, Decimal]) -> tuple[int, int]:
    """How many decimals notionals may have at ``prices``, and how many more the margins."""
    places = max(
        [DECIMAL_PLACES]
        + [_decimals(contracts[symbol].lot_size) + _decimals(price) for symbol, price in prices.items()]
    )
    rates = [rate for contract in contracts.values() for rate in (contract.initial_rate, contract.maintenance_rate)]
    return places, max(map(_decimals, rates))


def _decimals(value: Decimal) -> int:
    return max(0, -int(value.normalize().as_tuple().exponent))


def _whole(value: Decimal, places: int) -> Units:
    """``value`` in units of ``10**-places``, which it is a multiple of, to be paired with every row of a column.

    One that is too large is only a large one: no row that holds a lot at such a mark fits.
    """
    return np.array(min(int(value.scaleb(places)), INT64_MAX), dtype=np.int64)


def ratio(part: Units, whole: Units) -> tuple[Units, Flags]:
    """``part / whole`` in units of 1e-8, half-even, where ``whole`` is above 0; and where that can be said.

    Float64 is off by less than one unit. The remainder tells which way: of its two terms each may wrap, but their
    difference is smaller than ``whole`` and so what is left is right.
    """
    divisor = np.maximum(whole, 1)
    estimate = np.rint(part / divisor * UNITS_PER_ONE)
    fits = np.abs(estimate) < RATIO_UNITS_MAX
    units = np.where(fits, estimate, 0).astype(np.int64)
    remainder = part * UNITS_PER_ONE - units * divisor
    odd = (units & 1).astype(np.bool_)
    above, below = remainder - (divisor - remainder), -remainder - (divisor + remainder)
    units += (above > 0) | ((above == 0) & odd)
    units -= (below > 0) | ((below == 0) & odd)
    return units, fits


def emptied(chunk: Chunk, rows: Flags) -> Chunk:
    """``chunk``, with nothing in those ``rows``."""

    def kept(column: Units) -> Units:
        return np.where(rows, np.int64(0), column)

    return replace(
        chunk,
        balance=kept(chunk.balance),
        breach=kept(chunk.breach),
        quantity={symbol: kept(column) for symbol, column in chunk.quantity.items()},
        cost={symbol: kept(column) for symbol, column in chunk.cost.items()},
    )


def side_by_side(count: int, parts: Sequence[Part]) -> bytearray:
    """``count`` rows of characters: texts that every row has, and columns of texts between them."""
    types = [np.dtype(f"S{len(part)}") if isinstance(part, bytes) else part.dtype for part in parts]
    layout = np.dtype([(str(number), item) for number, item in enumerate(types)])
    every_row = b"".join(part if isinstance(part, bytes) else bytes(part.itemsize) for part in parts)
    records = bytearray(every_row) * count
    columns = np.frombuffer(records, dtype=layout)
    for number, part in enumerate(parts):
        if not isinstance(part, bytes):
            columns[str(number)] = part
    return records


def number_texts(units: Units, places: int) -> list[Texts]:
    """``units`` of ``10**-places`` in plain notation: no minus zero, no trailing zeros."""
    absolute = np.abs(units).astype(np.uint64)
    whole = absolute // 10**places
    parts = _whole_digits(whole)
    if (negative := units < 0).any():
        parts.insert(0, shown_in(b"-", negative))
    if places and (fraction := absolute - whole * 10**places).any():
        parts += [shown_in(b".", fraction != 0), *_fraction_digits(fraction, places)]
    return parts


def shown_in(character: bytes, rows: Flags) -> NDArray[np.uint8]:
    """``character`` in those ``rows``."""
    return rows * np.uint8(ord(character))


def _groups(
    number: NDArray[np.uint64], count: int, *, missing: int = 0
) -> Iterator[tuple[NDArray[np.uint32], NDArray[Any]]]:
    """The ``count`` groups of digits of each number, the last one first, and what is before it.

    The last group has ``missing`` digits less than the others, and gets as many zeros.
    """
    rest: NDArray[Any] = number
    size = 10 ** (GROUP - missing)
    for left in range(count, 0, -1):
        if left == min(count, GROUPS_SHORT):
            rest = rest.astype(np.uint32)
        higher = rest // size
        yield ((rest - higher * size) * (GROUPS // size)).astype(np.uint32, copy=False), higher
        rest, size = higher, GROUPS


def _whole_digits(whole: NDArray[np.uint64]) -> list[Texts]:
    """Without leading zeros, but for a single one."""
    count = -(-len(str(whole.max(initial=0))) // GROUP)
    digits: list[Texts] = []
    for group, higher in _groups(whole, count):
        first = _LEADING if digits else _ONES
        index = group + (first if len(digits) == count - 1 else (higher == 0) * first)
        digits.insert(0, np.take(_DIGITS, index, mode="clip"))
    return digits


def _fraction_digits(fraction: NDArray[np.uint64], places: int) -> list[Texts]:
    """Without trailing zeros, and without groups that no row has anything in or after."""
    count = -(-places // GROUP)
    digits: list[Texts] = []
    nothing_after: Flags = np.ones(len(fraction), dtype=np.bool_)
    for group, _ in _groups(fraction, count, missing=count * GROUP - places):
        nothing_here = group == 0
        if digits or not nothing_here.all():
            digits.insert(0, np.take(_DIGITS, group + nothing_after * _TRAILING, mode="clip"))
            nothing_after &= nothing_here
    return digits
