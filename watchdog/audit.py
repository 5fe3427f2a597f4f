"""The audit: walk the user's keys a bounded piece per timer sweep, adopt honest edits, quarantine what cannot be read.

A row of the columns that is not what the account's ledger says is written again on the way; a column that was lost as a
whole is made anew by the next sweep.

Two walks go on at once: over the slots, which finds keys that were edited or lost, and over all of Redis' keys, which
finds accounts that were made by hand. The first is through after ``accounts / audit_accounts_per_sweep`` timer sweeps,
500 accounts a second by default; the second passes six times as many keys, the operation ids of a day among them. Who
is in quarantine is looked at again in each step, a bounded number in turn.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from app import errors
from app import redis_client as keys
from app.booking import Booking
from app.schemas import IDENTIFIER_PATTERN

KEYS_PER_ACCOUNT: Final = 6
"""About how many keys SCAN passes for each account: balance, equity, used_margin, ledger, positions, an operation."""

SCANNED_AT_ONCE: Final = 100
"""Redis answers nobody else while it passes so many keys: three thousand took it up to five milliseconds."""

LOOKED_UP_AT_ONCE: Final = 50
"""Of the accounts found so: to ask for hundreds at once kept the loop busy for milliseconds."""

CHECKED_AT_ONCE: Final = 5
"""A sweep that a mark asks for meanwhile waits no longer than the loop has so many in hand."""

REST_TIMES: Final = 4
"""It rests so many times as long as a piece took, while there is time: a trade meets one piece and not all of them."""

log = structlog.get_logger(__name__)


async def _go_on() -> None:
    """Nothing is more urgent."""


class _Pace:
    """Between the pieces of one step: what is more urgent goes first, and some rest, so many seconds in all."""

    def __init__(self, give_way: Callable[[], Awaitable[None]], rest_seconds: float) -> None:
        self._give_way = give_way
        self._rest_seconds = rest_seconds
        self._began = time.monotonic()

    async def next_piece(self) -> None:
        """Return when the next piece may begin."""
        rest = min(self._rest_seconds, REST_TIMES * (time.monotonic() - self._began))
        if rest > 0:
            self._rest_seconds -= rest
            await asyncio.sleep(rest)
        await self._give_way()
        self._began = time.monotonic()


class Audit:
    """Walks the accounts for one watchdog."""

    def __init__(self, booking: Booking) -> None:
        self._booking = booking
        self._client = booking.store.client
        self._accounts_per_step = booking.settings.audit_accounts_per_sweep
        self._next_slot = 0
        self._scan_cursor = 0
        self._quarantined_turn = 0

    async def step(self, *, give_way: Callable[[], Awaitable[None]] = _go_on, rest_seconds: float = 0.0) -> None:
        """One bounded part of both walks, a few accounts at a time.

        Whatever is more urgent comes first, and it rests in between for at most so many seconds.
        """
        pace = _Pace(give_way, rest_seconds)
        by_slot = await self._client.lrange(
            keys.ACCOUNTS, self._next_slot, self._next_slot + self._accounts_per_step - 1
        )
        self._next_slot = self._next_slot + len(by_slot) if len(by_slot) == self._accounts_per_step else 0
        names = {keys.as_text(name) for name in by_slot} | set(await self._made_by_hand(pace))
        quarantined = sorted(keys.as_text(name) for name in await self._client.hkeys(keys.QUARANTINED))
        self._quarantined_turn = (self._quarantined_turn + self._accounts_per_step) % max(1, len(quarantined))
        in_turn = [*quarantined[self._quarantined_turn :], *quarantined[: self._quarantined_turn]]
        names |= set(in_turn[: self._accounts_per_step])
        in_order = sorted(names)
        for first in range(0, len(in_order), CHECKED_AT_ONCE):
            some = in_order[first : first + CHECKED_AT_ONCE]
            await pace.next_piece()
            await asyncio.gather(*(self._check(name, was_quarantined=name in quarantined) for name in some))

    async def _made_by_hand(self, pace: _Pace) -> list[str]:
        """The accounts among the next balance keys that have no slot yet."""
        found: list[bytes | str] = []
        for _ in range(-(-self._accounts_per_step * KEYS_PER_ACCOUNT // SCANNED_AT_ONCE)):
            await pace.next_piece()
            self._scan_cursor, some = await self._client.scan(
                self._scan_cursor, match=keys.BALANCE_PATTERN, count=SCANNED_AT_ONCE
            )
            found += some
            if not self._scan_cursor:
                break
        names = [keys.as_text(key)[len("account:") : -len(":balance")] for key in found]
        known = [name for name in names if re.fullmatch(IDENTIFIER_PATTERN, name)]
        answers: list[object] = []
        for first in range(0, len(known), LOOKED_UP_AT_ONCE):
            await pace.next_piece()
            async with self._client.pipeline(transaction=False) as pipeline:
                for name in known[first : first + LOOKED_UP_AT_ONCE]:
                    pipeline.hexists(keys.ledger_key(name), "slot")
                answers += await pipeline.execute(raise_on_error=False)
        return [name for name, has_slot in zip(known, answers, strict=True) if has_slot is not True and has_slot != 1]

    async def _check(self, name: str, *, was_quarantined: bool) -> None:
        """Adopt an honest edit of one account, or set the account apart until its keys can be read again."""
        try:
            snapshot = await self._booking.read(name)
            account = self._booking.parse(snapshot)
            if not snapshot.agrees(account):
                await self._booking.adopt(snapshot)
            elif not snapshot.packed_agrees():
                await self._booking.column_repair.repack(name)
        except errors.AccountQuarantined as error:
            if not was_quarantined:
                log.warning("quarantined an account", account_id=name, reason=error.detail)
            await self._client.hset(keys.QUARANTINED, name, error.detail)
        except errors.UnknownAccount:
            await self._client.hdel(keys.QUARANTINED, name)
        else:
            if was_quarantined:
                log.warning("released an account from quarantine", account_id=name)
                await self._client.hdel(keys.QUARANTINED, name)
