"""Headroom: how far the equity of rows that are kept is above their maintenance margin, as a line over the marks.

Equity and maintenance margin are both linear in the marks. So a row that did not change takes two float64 operations a
symbol at a new mark, where :func:`app.columns.near_rows` takes twenty from the packed row; the sums over all rows,
which are apart from any mark, take none. No verdict is made here: it says at which rows :func:`app.columns.screen` has
to look.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

from app.columns import NO_ROWS, SCREEN_BLOCK_ROWS, Chunk, Marks, Sums, for_every_row, in_usdt, largest, room_for
from app.contracts import Contract
from app.services import margin
from app.services.margin import Column

NO_COST = for_every_row(Decimal(0))
ONE = for_every_row(Decimal(1))


class Headroom:
    """The lines of so many rows, all of which are empty at first.

    ``sums`` and ``sizes`` are of every row put; a size is the largest that any row ever had, so it only grows.
    """

    def __init__(self, contracts: Mapping[str, Contract], rows: int) -> None:
        self._contracts = contracts
        self.sums = Sums()
        # Nobody looks twice at a row without a position: it is infinitely far above its line. One in breach is always
        # looked at, wherever it is: it counts as infinitely far below.
        self._at_zero: Column = np.full(rows, np.inf)
        self._per_mark: dict[str, Column] = {symbol: np.zeros(rows) for symbol in contracts}
        self._size_at_zero = 0.0
        self._size_per_mark = dict.fromkeys(contracts, 0.0)

    def __len__(self) -> int:
        return len(self._at_zero)

    def put(self, slots: slice | NDArray[np.int64], after: Chunk, *, before: Chunk | None = None) -> None:
        """Take the rows ``after`` for those of ``slots``, in the place of ``before``; each slot at most once."""
        if before is not None:
            self.sums.add(before, times=-1)
        self.sums.add(after)
        balance = in_usdt(after.balance)
        at_zero, size = balance, largest(balance)
        for symbol, contract in self._contracts.items():
            quantity, cost = in_usdt(after.quantity[symbol]), in_usdt(after.cost[symbol])
            at_one = margin.position_exposure(
                quantity=quantity,
                cost=NO_COST,
                mark_price=ONE,
                initial_rate=for_every_row(contract.initial_rate),
                maintenance_rate=for_every_row(contract.maintenance_rate),
            )
            self._per_mark[symbol][slots] = at_one.unrealised_pnl - at_one.maintenance_margin
            self._size_per_mark[symbol] = max(self._size_per_mark[symbol], largest(quantity))
            at_zero = at_zero - cost
            size += largest(cost)
        self._size_at_zero = max(self._size_at_zero, size)
        at_zero = np.where(after.is_open(), at_zero, np.inf)
        self._at_zero[slots] = np.where(after.breach != 0, -np.inf, at_zero)

    def near_rows(self, marks: Marks, rows: int) -> NDArray[np.intp] | None:
        """``app.columns.near_rows`` of the first ``rows`` rows; None unless every symbol has a mark."""
        if set(marks.prices) != set(self._contracts):
            return None
        prices = {symbol: float(price) for symbol, price in marks.prices.items()}
        size = self._size_at_zero + sum(self._size_per_mark[symbol] * price for symbol, price in prices.items())
        room = room_for(np.array(size), self._contracts)
        found = [NO_ROWS]
        for first in range(0, rows, SCREEN_BLOCK_ROWS):
            block = slice(first, min(first + SCREEN_BLOCK_ROWS, rows))
            headroom = self._at_zero[block]
            for symbol, price in prices.items():
                headroom = headroom + self._per_mark[symbol][block] * price
            found.append(np.flatnonzero(headroom < room) + first)
        return np.concatenate(found)

    def grow(self, rows: int) -> None:
        """Room for ``rows`` rows; the new ones are empty."""
        more = rows - len(self)
        self._at_zero = np.pad(self._at_zero, (0, more), constant_values=np.inf)
        self._per_mark = {symbol: np.pad(column, (0, more)) for symbol, column in self._per_mark.items()}
