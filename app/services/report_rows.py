"""The accounts of the margin report as JSON, thousands at once, to the last digit as Decimal would show them.

Money is int64 in units of a power of ten that holds every product at the present marks without rounding. A row whose
numbers could leave an int64, and any row that needs a second thought, is not ``plain`` and left to Decimal. All rows
get their texts at once, as records of one length: four digits at a time come from a table, and where a number is
shorter than the longest stand zero bytes, which are dropped at the end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from app.columns import Chunk, value_rows
from app.contracts import Contract
from app.numbers import DECIMAL_PLACES, UNITS_PER_ONE, to_units
from app.services import margin
from app.services.margin import AccountMargin, Exposure, Flags

Units: TypeAlias = NDArray[np.int64]
Characters: TypeAlias = NDArray[np.uint8]
Texts: TypeAlias = NDArray[np.uint8] | NDArray[np.uint32]
"""A character a row, or four."""

_Part: TypeAlias = bytes | Texts | NDArray[np.bytes_]

FITS_MAX: Final = 2.0**61
"""Rows whose sums stay below this many units fit an int64, with a bit to spare for what float64 says of them."""

INT64_MAX: Final = 2**63 - 1

RATIO_UNITS_MAX: Final = 2.0**50
"""Up to here float64 says a ratio in units of 1e-8 to within one."""

NAME_CHARACTERS: Final = re.compile(r"[A-Za-z0-9_.-]*")
NAME_LENGTH_MAX: Final = 64
GROUP: Final = 4
GROUPS: Final = 10**GROUP

_PLAIN_STATES: Final = (b"ok", b"candidate", b"recovering", b"negative_equity")


def _table() -> NDArray[np.uint32]:
    """Four digits of each number below 10,000: whole, without leading zeros, without trailing ones; and a zero."""
    texts = [f"{number:04d}" for number in range(GROUPS)]
    leading = [text.lstrip("0").rjust(GROUP, "\0") for text in texts]
    trailing = [text.rstrip("0").ljust(GROUP, "\0") for text in texts]
    return np.frombuffer("".join([*texts, *leading, *trailing, "\0\0\0" + "0"]).encode(), dtype=np.uint32)


_DIGITS: Final = _table()
_LEADING: Final = GROUPS
_TRAILING: Final = 2 * GROUPS
_ZERO: Final = 3 * GROUPS
_NULL: Final = np.frombuffer(b"null", dtype=np.uint32)[0]


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """One JSON object a plain row, in records of one length, with gaps; each object ends in a comma."""

    plain: Flags
    _records: bytearray

    def text(self, first: int, end: int) -> bytes:
        """The objects of rows ``first`` to ``end``, all of them plain, without the last comma."""
        length = len(self._records) // len(self.plain)
        return bytes(self._records[first * length : end * length].translate(None, b"\0")[:-1])


def encode_rows(chunk: Chunk, names: Sequence[str], *, contracts: Mapping[str, Contract]) -> EncodedRows:
    """The accounts in the rows of ``chunk``, called ``names``, valued at its marks."""
    prices = chunk.marks.prices
    places, rate_places = _places(contracts, prices)
    fits = _fitting(chunk, contracts, places + rate_places) & _named(names) & (chunk.breach >= 0)
    for symbol, quantity in chunk.quantity.items():
        fits &= (quantity % to_units(contracts[symbol].lot_size) == 0) & ((quantity == 0) | (symbol in prices))
    valued = _value(chunk, contracts=contracts, prices=prices, places=places, rate_places=rate_places)
    notional, used, maintenance = valued.exposure.notional, valued.used_margin, valued.maintenance_margin
    equity = valued.equity * 10**rate_places
    candidate = margin.is_candidate(notional=notional, equity=equity, maintenance_margin=maintenance)
    in_breach, is_open = chunk.breach != 0, notional != 0
    state = np.where(candidate, 1, np.where(in_breach, 2, np.where(~is_open & (chunk.balance < 0), 3, 0)))
    utilisation, utilisation_fits = _ratio(used, equity)
    ratio, ratio_fits = _ratio(maintenance, equity)
    without_ratio = is_open & (equity <= 0)
    money_places = places + rate_places
    parts: list[_Part] = [
        *(b'{"account_id":"', _names(names, fits)),
        *(b'","state":"', np.array(_PLAIN_STATES)[state]),
        *(b'","candidate":', np.array([b"false", b"true"])[candidate.astype(np.intp)]),
        *(b',"balance":"', *_number(chunk.balance, DECIMAL_PLACES)),
        *(b'","equity":"', *_number(equity, money_places)),
        *(b'","used_margin":"', *_number(used, money_places)),
        *(b'","maintenance_margin":"', *_number(maintenance, money_places)),
        *(b'","free_margin":"', *_number(equity - used, money_places)),
        *(b'","margin_utilisation":', *_quoted_or_null(utilisation, without_ratio)),
        *(b',"margin_ratio":', *_quoted_or_null(ratio, without_ratio)),
        *(b',"open_breach_id":', *_or_null(_number(chunk.breach, 0), ~in_breach), b"},"),
    ]
    records = _side_by_side(len(chunk), parts)
    return EncodedRows(fits & (without_ratio | (utilisation_fits & ratio_fits)), records)


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


def _fitting(chunk: Chunk, contracts: Mapping[str, Contract], places: int) -> Flags:
    """Which rows' sums fit an int64 in units of ``10**-places``."""
    flags: Flags = value_rows(chunk, contracts)[1] * 10.0**places < FITS_MAX
    return flags


def _value(
    chunk: Chunk,
    *,
    contracts: Mapping[str, Contract],
    prices: Mapping[str, Decimal],
    places: int,
    rate_places: int,
) -> AccountMargin[Any]:
    """Every row in int64: cash, notional and pnl in units of ``10**-places``, the margins ``rate_places`` finer.

    In rows that do not fit it wraps, and says nothing.
    """
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
    return AccountMargin(balance=chunk.balance * finer, exposure=exposure)


def _whole(value: Decimal, places: int) -> Units:
    """``value`` in units of ``10**-places``, which it is a multiple of, to be paired with every row of a column.

    One that is too large is only a large one: no row that holds a lot at such a mark fits.
    """
    return np.array(min(int(value.scaleb(places)), INT64_MAX), dtype=np.int64)


def _ratio(part: Units, equity: Units) -> tuple[Units, Flags]:
    """``part / equity`` in units of 1e-8, half-even, where equity is above 0; and where that can be said.

    Float64 is off by less than one unit. The remainder tells which way: of its two terms each may wrap, but their
    difference is smaller than equity and so what is left is right.
    """
    divisor = np.maximum(equity, 1)
    estimate = np.rint(part / divisor * UNITS_PER_ONE)
    fits = np.abs(estimate) < RATIO_UNITS_MAX
    units = np.where(fits, estimate, 0).astype(np.int64)
    remainder = part * UNITS_PER_ONE - units * divisor
    odd = (units & 1).astype(np.bool_)
    above, below = remainder - (divisor - remainder), -remainder - (divisor + remainder)
    units += (above > 0) | ((above == 0) & odd)
    units -= (below > 0) | ((below == 0) & odd)
    return units, fits


def _side_by_side(count: int, parts: Sequence[_Part]) -> bytearray:
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


def _named(names: Sequence[str]) -> Flags:
    """Which names can stand in JSON as they are."""
    if NAME_CHARACTERS.fullmatch("".join(names)) and max(map(len, names), default=0) <= NAME_LENGTH_MAX:
        return np.ones(len(names), dtype=np.bool_)
    return np.array(
        [len(name) <= NAME_LENGTH_MAX and NAME_CHARACTERS.fullmatch(name) is not None for name in names], dtype=np.bool_
    )


def _names(names: Sequence[str], fits: Flags) -> NDArray[np.bytes_]:
    return np.array(names if fits.all() else [name if fit else "" for name, fit in zip(names, fits, strict=True)], "S")


def _sign(character: str, shown: Flags) -> Characters:
    """``character`` in the rows that show it."""
    return shown * np.uint8(ord(character))


def _number(units: Units, places: int) -> list[Texts]:
    """``units`` of ``10**-places`` in plain notation: no minus zero, no trailing zeros."""
    absolute = np.abs(units)
    whole = absolute // 10**places
    parts: list[Texts] = [_sign("-", units < 0), *_whole_digits(whole)]
    if places:
        groups = -(-places // GROUP)
        fraction = (absolute - whole * 10**places) * 10 ** (groups * GROUP - places)
        parts += [_sign(".", fraction != 0), *_fraction_digits(fraction, groups)]
    return parts


def _whole_digits(whole: Units) -> list[Texts]:
    """Without leading zeros, but for a single one."""
    digits: list[Texts] = []
    rest = whole
    for _ in range(-(-len(str(max(0, int(whole.max(initial=0))))) // GROUP)):
        higher = rest // GROUPS
        index = rest - higher * GROUPS + (higher == 0) * _LEADING
        digits.insert(0, np.take(_DIGITS, index if digits else np.where(whole == 0, _ZERO, index), mode="clip"))
        rest = higher
    return digits


def _fraction_digits(fraction: Units, groups: int) -> list[Texts]:
    """Without trailing zeros."""
    digits: list[Texts] = []
    rest, nothing_after = fraction, np.ones(len(fraction), dtype=np.bool_)
    for _ in range(groups):
        higher = rest // GROUPS
        group = rest - higher * GROUPS
        digits.insert(0, np.take(_DIGITS, group + nothing_after * _TRAILING, mode="clip"))
        nothing_after &= group == 0
        rest = higher
    return digits


def _quoted_or_null(units: Units, null: Flags) -> list[Texts]:
    quote = _sign('"', ~null)
    return _or_null([quote, *_number(units, DECIMAL_PLACES), quote], null)


def _or_null(parts: Sequence[Texts], null: Flags) -> list[Texts]:
    if not null.any():
        return list(parts)
    return [null * _NULL, *(part * ~null for part in parts)]
