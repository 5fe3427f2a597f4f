"""Verdicts on many accounts at once, each exact, with the texts that recording them takes.

Rows with one open position are judged in int64 and written together; all others, and rows that do not fit, are left to
Decimal. What is written here is what ``app.evidence`` and ``app.records`` write of each account by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final, Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from app.columns import Chunk
from app.contracts import Contract
from app.numbers import DECIMAL_PLACES, format_decimal
from app.services.exact_rows import (
    ExactMargins,
    Part,
    Texts,
    exact_margins,
    fitting_rows,
    number_texts,
    ratio,
    side_by_side,
)
from app.services.margin import Flags
from app.services.trading import RestoreAt

TEXTS_PER_VERDICT: Final = 3

Kind = Literal["liquidation", "recovery"]


@dataclass(slots=True)
class WrittenVerdicts:
    """What is to be recorded of some of the rows that were judged, a list of each part, in the order of ``rows``.

    ``positions`` are the values of the positions key in each symbol, nothing where it is flat, and ``bodies`` the
    evidence.
    """

    rows: list[int] = field(default_factory=list)
    balances: list[bytes] = field(default_factory=list)
    positions: list[tuple[bytes, ...]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)


@dataclass(slots=True)
class JudgedRows:
    """Which rows were judged and are candidates, and the verdicts that change something: a breach opens, or ends."""

    judged: Flags
    candidate: Flags
    written: WrittenVerdicts = field(default_factory=WrittenVerdicts)


def judge_rows(chunk: Chunk, contracts: Mapping[str, Contract], *, restore_at: RestoreAt) -> JudgedRows:
    """Judge the rows of ``chunk`` at its marks."""
    fits = fitting_rows(chunk, contracts) & (chunk.breach >= 0)
    held = sum((quantity != 0).astype(np.int8) for quantity in chunk.quantity.values())
    for symbol, cost in chunk.cost.items():
        fits &= (held == 1) & ((chunk.quantity[symbol] != 0) | (cost == 0))
    found = JudgedRows(judged=fits, candidate=np.zeros(len(chunk), dtype=np.bool_))
    symbols = list(contracts)
    for symbol, price in chunk.marks.prices.items():
        number = symbols.index(symbol)
        before, behind = (b"",) * number, (b"",) * (len(symbols) - number - 1)
        (rows,) = np.nonzero(fits & (chunk.quantity[symbol] != 0))
        if not len(rows):
            continue
        some = chunk.rows(rows)
        valued = exact_margins(some, contracts)
        average, average_fits = _average_price(some, symbol)
        candidate, in_breach = valued.candidate, some.breach != 0
        average_fits &= _plain(symbol)
        found.judged[rows] = average_fits
        found.candidate[rows] = candidate
        kinds: tuple[tuple[Kind, Flags], ...] = (
            ("liquidation", candidate & ~in_breach),
            ("recovery", in_breach & valued.restored(restore_at)),
        )
        for kind, flags in kinds:
            (chosen,) = np.nonzero(flags & average_fits)
            if len(chosen):
                texts = _texts(kind, some.rows(chosen), valued.rows(chosen), average[chosen], symbol, price)
                found.written.rows += rows[chosen].tolist()
                found.written.bodies += texts[::TEXTS_PER_VERDICT]
                found.written.balances += texts[1::TEXTS_PER_VERDICT]
                found.written.positions += [(*before, position, *behind) for position in texts[2::TEXTS_PER_VERDICT]]
    return found


def _plain(symbol: str) -> bool:
    """Whether ``symbol`` stands in JSON as it is; a symbol is whatever the configuration says."""
    return orjson.dumps(symbol) == b'"' + symbol.encode() + b'"'


def _average_price(chunk: Chunk, symbol: str) -> tuple[NDArray[np.int64], Flags]:
    quantity, cost = chunk.quantity[symbol], chunk.cost[symbol]
    return ratio(cost * np.sign(quantity), np.abs(quantity))


def _texts(
    kind: Kind, chunk: Chunk, valued: ExactMargins, average: NDArray[np.int64], symbol: str, price: Decimal
) -> list[bytes]:
    """Body, balance and position of one row after the other, all of which hold ``symbol`` and nothing else."""
    name, mark = symbol.encode(), format_decimal(price).encode()
    balance = number_texts(chunk.balance, DECIMAL_PLACES)
    quantity = number_texts(chunk.quantity[symbol], DECIMAL_PLACES)
    cost = number_texts(chunk.cost[symbol], DECIMAL_PLACES)
    equity = number_texts(valued.equity, valued.places)
    used = number_texts(valued.used_margin, valued.places)
    maintenance = number_texts(valued.maintenance_margin, valued.places)
    reason: list[Texts]
    if kind == "liquidation":
        reason = [
            *(b'"reason":"equity ', *equity, b" is below maintenance margin ", *maintenance),
            *(b" with ", *quantity, b" " + name + b" at " + mark + b'"}'),
        ]
    else:
        reason = [
            *(b'"liquidation_id":', *number_texts(chunk.breach, 0)),
            *(b',"reason":"the mark restored the account: equity ', *equity, b", used margin ", *used, b'"}'),
        ]
    parts: list[Part] = [
        b'{"mark_version":%d,"marks":{"%s":"%s"},"positions":{"%s":' % (chunk.marks.version, name, mark, name),
        *(b'{"quantity":"', *quantity, b'","cost":"', *cost, b'"}},"balance":"', *balance, b'","equity":"', *equity),
        *(b'","used_margin":"', *used, b'","maintenance_margin":"', *maintenance, b'",', *reason),
        *(b"\n", *balance),
        *(b'\n{"quantity": "', *quantity, b'", "avg_price": "', *number_texts(average, DECIMAL_PLACES)),
        *(b'", "cost": "', *cost, b'"}\n'),
    ]
    return bytes(side_by_side(len(chunk), parts).translate(None, b"\0")).split(b"\n")[:-1]
