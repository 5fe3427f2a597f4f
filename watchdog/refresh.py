"""Keep the equity and used_margin keys near the truth: accounts at risk first, a bounded number after each sweep.

A sweep that was asked for goes first, unless the keys have waited for a second.

No decision reads these keys; they are for whoever looks at Redis. A value is written only where the account's row is
still the one it was computed from, so a trade's own newer values stay.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from app import redis_client as keys
from app.booking import Booking
from app.columns import Chunk, account_names, value_rows
from app.contracts import Contract
from app.numbers import format_decimal
from app.services import reports

if TYPE_CHECKING:
    from watchdog.sweep import Swept

ACCOUNTS_PER_CALL: Final = 8
"""A mark that comes meanwhile waits for one call: with 25 accounts in it, its p99 was a fifth longer."""

PAUSE_SECONDS: Final = 0.25
REST_TIMES: Final = 9
"""It rests so many times as long as it worked: each of its calls is a sync of the append-only file, and trades wait."""

GIVE_WAY_SECONDS: Final = 1
ROWS_AT_ONCE: Final = 131_072
THREAD_ROWS_MIN: Final = 16_384
"""Below, numpy is done before a thread has begun."""


class Refresher:
    """Writes the two keys for one watchdog."""

    def __init__(self, booking: Booking) -> None:
        self._booking = booking
        self._next_slot = 0
        self._rested = float("-inf")

    async def refresh(self, swept: Swept, *, asked: asyncio.Event) -> None:
        """Bring some accounts' keys up to date with ``swept``: all of them in a small store.

        Not after every sweep of a flood of marks; the timer's sweep brings what such a pause left out. One that stops
        because a sweep was ``asked`` for is done again after that one.
        """
        began = time.monotonic()
        if began < self._rested:
            return
        budget = self._booking.settings.refresh_accounts_per_sweep
        async for chunk, indices in self._chosen(swept, budget):
            readable = [index for index in indices if chunk.first_slot + index not in swept.quarantined]
            for first in range(0, len(readable), ACCOUNTS_PER_CALL):
                if asked.is_set() and began - self._rested < GIVE_WAY_SECONDS:
                    return
                await self._write(chunk, readable[first : first + ACCOUNTS_PER_CALL], swept)
        self._rested = began + max(PAUSE_SECONDS, (REST_TIMES + 1) * (time.monotonic() - began))

    async def _chosen(self, swept: Swept, budget: int) -> AsyncIterator[tuple[Chunk, list[int]]]:
        """The rows to write by chunk: all if the budget allows, else half of it at most risk, half in turn."""
        accounts = sum(map(len, swept.chunks))
        if accounts <= budget:
            for chunk in swept.chunks:
                yield chunk, list(range(len(chunk)))
            return
        in_turn = [(self._next_slot + step) % accounts for step in range(budget // 2)]
        for chunk in swept.chunks:
            # A piece at a time, so that a sweep does not wait until a million rows are valued.
            for piece in chunk.pieces(ROWS_AT_ONCE):
                count = max(1, budget * len(piece) // accounts // 2)
                if len(piece) < THREAD_ROWS_MIN:
                    at_risk = _most_at_risk(piece, self._booking.contracts, count)
                else:
                    at_risk = await asyncio.to_thread(_most_at_risk, piece, self._booking.contracts, count)
                yield piece, sorted({*piece.indices_of(in_turn).tolist(), *at_risk})
        self._next_slot = (self._next_slot + budget // 2) % accounts

    async def _write(self, chunk: Chunk, indices: Sequence[int], swept: Swept) -> None:
        if not indices:
            return
        contracts = self._booking.contracts
        columns = [keys.COLUMN_BALANCE]
        for symbol in contracts:
            columns += [keys.quantity_column(symbol), keys.cost_column(symbol)]
        names = await account_names(self._booking.store.client, [chunk.first_slot + index for index in indices])
        account_keys: list[str] = []
        arguments: list[str | bytes | int] = [self._booking.store.signature, len(columns)]
        for index, name in zip(indices, names, strict=True):
            valued = reports.value_account(chunk.account(index, name), contracts=contracts, prices=swept.marks.prices)
            if valued is None:
                continue
            account_keys += [keys.equity_key(name), keys.used_margin_key(name)]
            arguments += [
                chunk.first_slot + index,
                chunk.packed_row(index),
                format_decimal(valued.equity),
                format_decimal(valued.used_margin),
            ]
        await self._booking.store.run(
            keys.REFRESH, [keys.STATE_EPOCH, keys.STATE_RUN_ID, *columns, *account_keys], arguments
        )


def _most_at_risk(piece: Chunk, contracts: Mapping[str, Contract], count: int) -> list[int]:
    """The open rows of ``piece`` with the least equity above their maintenance margin."""
    if count >= len(piece):
        return list(range(len(piece)))
    valued, _ = value_rows(piece, contracts)
    valuable = piece.is_open() & ~piece.is_unvalued()
    headroom = np.where(valuable, valued.equity - valued.maintenance_margin, np.inf)
    found: list[int] = np.argpartition(headroom, count)[:count].tolist()
    return found
