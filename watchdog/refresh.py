"""Keep the equity and used_margin keys near the truth: a bounded number of accounts after each sweep, a few at a time.

The rows are walked around in pieces. Of each piece those at most risk are written and some others in turn; in a store
that the budget covers, all of them. It rests after each call, and a sweep that is asked for meanwhile goes first: the
walk goes on after that one where it was, so keys are brought up to date however fast marks come.

No decision reads these keys; they are for whoever looks at Redis. A value is written only where the account's row is
still the one it was computed from, so a trade's own newer values stay.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
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

REST_TIMES: Final = 9
"""It rests so many times as long as a call took: each is a sync of the append-only file, and trades wait."""

RESTS_SECONDS_MAX: Final = 2.0
"""In a walk once around, however long its calls take where processors are short: the keys are not to fall behind."""

PIECE_ROWS_MAX: Final = 16_384
"""A mark waits for the look at so many rows as well."""


class Refresher:
    """Writes the two keys for one watchdog."""

    def __init__(self, booking: Booking) -> None:
        self._booking = booking
        self._next_slot = 0
        self._round = 0
        self._rested = float("-inf")

    async def refresh(self, swept: Swept, *, asked: asyncio.Event) -> None:
        """Bring the keys of some accounts up to date with ``swept``, once around, until a sweep is ``asked`` for.

        A call whose rest is over goes first: a flood of marks slows the walk down and does not stop it.
        """
        accounts, passed = sum(map(len, swept.chunks)), 0
        budget = self._booking.settings.refresh_accounts_per_sweep
        rows = min(max(ACCOUNTS_PER_CALL, ACCOUNTS_PER_CALL * accounts // budget), PIECE_ROWS_MAX)
        while passed < accounts:
            if await _asked_within(self._rested - time.monotonic(), asked):
                return
            began = time.monotonic()
            piece = self._next_piece(swept.chunks, accounts, rows)
            if accounts <= budget:
                indices: Sequence[int] = range(len(piece))
            else:
                indices = self._chosen(piece, max(1, budget * len(piece) // accounts // 2))
            readable = [index for index in indices if piece.first_slot + index not in swept.quarantined]
            await self._write(piece, readable, swept)
            passed += len(piece)
            now = time.monotonic()
            self._rested = now + min(REST_TIMES * (now - began), RESTS_SECONDS_MAX * len(piece) / accounts)

    def _next_piece(self, chunks: Sequence[Chunk], accounts: int, rows: int) -> Chunk:
        """So many rows after those of the last piece, fewer at the end of a chunk; after the last row, the first."""
        if self._next_slot >= accounts:
            self._next_slot, self._round = 0, self._round + 1
        chunk = next(chunk for chunk in chunks if self._next_slot < chunk.first_slot + len(chunk))
        piece = chunk.piece(self._next_slot - chunk.first_slot, rows)
        self._next_slot += len(piece)
        return piece

    def _chosen(self, piece: Chunk, count: int) -> list[int]:
        """The rows of ``piece`` to write: as many of those at most risk as of all, in turn from round to round."""
        in_turn = [(self._round * count + step) % len(piece) for step in range(count)]
        return sorted({*in_turn, *_most_at_risk(piece, self._booking.contracts, count)})

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


async def _asked_within(seconds: float, asked: asyncio.Event) -> bool:
    """Whether it was asked for something before so many seconds have passed."""
    if seconds <= 0:
        return False
    try:
        async with asyncio.timeout(seconds):
            return await asked.wait()
    except TimeoutError:
        # Both, if the loop was busy with something else when the time had passed.
        return asked.is_set()
