"""What must always hold between the two stores, checked while the system runs.

* ``conservation``: the balances add up to the transfers, the realised pnl and the adjustments there ever were.
* ``columns``: each account's packed row says what its keys say, edits by hand having been adopted.
* ``breaches``: the breaches open in Redis are the liquidations without a recovery.

A check reads Redis at one moment, waits until history has everything up to that moment's last id, and compares. Sums
of history are carried on from one check to the next, so that a check costs what has happened since. What seems wrong
is looked at again, from the very first row, before it is called a violation.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final

import numpy as np
import structlog
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from app import errors
from app import redis_client as keys
from app.booking import Booking
from app.columns import INT64, exact_sum
from app.numbers import format_decimal, from_units
from app.outbox import POSTGRES_ERRORS
from app.records import UNIT, unpack
from watchdog import metrics

INTERVAL_SECONDS: Final = 60.0
ROWS_PER_STATEMENT: Final = 200_000
"""Ids summed up by one statement: some tens of milliseconds of Postgres."""

HISTORY_TIMEOUT_SECONDS: Final = 10.0
POLL_SECONDS: Final = 0.1
RECHECK_SECONDS: Final = 1.0
ACCOUNTS_PER_CHECK: Final = 500
ACCOUNTS_PER_READ: Final = 5
"""A mark that comes meanwhile waits no longer than the loop has so many in hand: of 50 up to four milliseconds."""

SHOWN_MAX: Final = 10

_SUMS: Final = text(
    """
    SELECT
        (SELECT coalesce(sum(CASE kind WHEN 'deposit' THEN amount ELSE -amount END), 0)
         FROM transfers WHERE id > :after AND id <= :last)
        + (SELECT coalesce(sum(realised_pnl), 0) FROM trades WHERE id > :after AND id <= :last)
        + (SELECT coalesce(sum(balance_after - balance_before), 0) FROM adjustments WHERE id > :after AND id <= :last),
        (SELECT array_agg(id) FROM liquidations WHERE id > :after AND id <= :last),
        (SELECT array_agg(liquidation_id) FROM recoveries WHERE id > :after AND id <= :last)
    """
)

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class History:
    """What rows of history up to ``last_id`` add up to."""

    last_id: int = 0
    balance: Decimal = Decimal(0)
    open_breaches: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class State:
    """What Redis says at the moment of ``last_id``."""

    last_id: int
    balance: Decimal
    open_breaches: set[int]


class Invariants:
    """Checks for one watchdog."""

    def __init__(self, booking: Booking, engine: AsyncEngine) -> None:
        self._booking = booking
        self._client = booking.store.client
        self._engine = engine
        self._history = History()
        self._next_slot = 0
        self._different: set[str] = set()
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """Check now rather than when the interval has passed."""
        self._asked.set()

    async def run(self, *, interval_seconds: float = INTERVAL_SECONDS) -> None:
        """Check every ``interval_seconds``, and when asked, until cancelled. What cannot be checked stays as it was."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(interval_seconds):
                    await self._asked.wait()
            self._asked.clear()
            try:
                await self.check()
            except (errors.PlimsollError, RedisError, *POSTGRES_ERRORS) as error:
                log.warning("the invariants were not checked", reason=repr(error))

    async def check(self) -> dict[str, str]:
        """Check everything once and export it; a sentence for each invariant that is violated.

        Raises the stores' errors, and ``StoreUnavailable`` while history does not catch up.
        """
        violations = await self._compare()
        if violations:
            await asyncio.sleep(RECHECK_SECONDS)
            self._history = History()
            violations = await self._compare()
        if different := await self._different_accounts():
            violations["columns"] = f"the packed rows of {', '.join(different[:SHOWN_MAX])} differ from their keys"
        for invariant in metrics.INVARIANTS:
            metrics.INVARIANT_VIOLATIONS.labels(invariant).set(invariant in violations)
        metrics.INVARIANTS_CHECKED.set(time.time())
        for invariant, sentence in violations.items():
            log.error("an invariant is violated", invariant=invariant, difference=sentence)
        return violations

    async def _compare(self) -> dict[str, str]:
        await self._booking.store.require_state()
        state = await self._state()
        await self._history_has(state.last_id)
        await self._carry_on(state.last_id)
        violations = {}
        if state.balance != self._history.balance:
            violations["conservation"] = (
                f"at id {state.last_id} the balances are {format_decimal(state.balance)}, history makes them "
                f"{format_decimal(self._history.balance)}"
            )
        if wrong := sorted(state.open_breaches ^ self._history.open_breaches):
            violations["breaches"] = (
                f"at id {state.last_id} Redis has {len(state.open_breaches)} open breaches, history "
                f"{len(self._history.open_breaches)}; among those only one of them has: {wrong[:SHOWN_MAX]}"
            )
        return violations

    async def _state(self) -> State:
        async with self._client.pipeline(transaction=True) as pipeline:
            pipeline.get(keys.HISTORY_LAST_ID)
            pipeline.llen(keys.ACCOUNTS)
            pipeline.get(keys.COLUMN_BALANCE)
            pipeline.get(keys.COLUMN_BREACH)
            last_id, accounts, balances, breaches = await pipeline.execute()
        balance, breach = (
            np.frombuffer(packed or b"", dtype=INT64, count=min(accounts, len(packed or b"") // UNIT.size))
            for packed in (balances, breaches)
        )
        return State(
            last_id=int(last_id or 0),
            balance=from_units(exact_sum(balance)),
            open_breaches={int(value) for value in breach[breach != 0]},
        )

    async def _history_has(self, last_id: int) -> None:
        """Wait until no row up to ``last_id`` waits for Postgres."""
        deadline = time.monotonic() + HISTORY_TIMEOUT_SECONDS
        while await self._client.xrange(keys.OUTBOX, "-", str(last_id), count=1):
            if time.monotonic() > deadline:
                raise errors.StoreUnavailable("history does not catch up with the outbox", reason="postgres")
            await asyncio.sleep(POLL_SECONDS)

    async def _carry_on(self, last_id: int) -> None:
        """Bring the sums of history to ``last_id``; from the start where Redis has gone back since."""
        if last_id < self._history.last_id:
            self._history = History()
        history = self._history
        async with self._engine.connect() as connection:
            while history.last_id < last_id:
                last = min(history.last_id + ROWS_PER_STATEMENT, last_id)
                found = await connection.execute(_SUMS, {"after": history.last_id, "last": last})
                balance, opened, ended = found.one()
                history.balance += balance
                history.open_breaches |= set(opened or ())
                history.open_breaches -= set(ended or ())
                history.last_id = last

    async def _different_accounts(self) -> list[str]:
        """The accounts that differ from their packed rows, among the next few and those that differed before."""
        names = await self._client.lrange(keys.ACCOUNTS, self._next_slot, self._next_slot + ACCOUNTS_PER_CHECK - 1)
        self._next_slot = self._next_slot + len(names) if len(names) == ACCOUNTS_PER_CHECK else 0
        some = sorted({keys.as_text(name) for name in names} | self._different)
        for first in range(0, len(some), ACCOUNTS_PER_READ):
            batch = some[first : first + ACCOUNTS_PER_READ]
            found = await asyncio.gather(*(self._differs(name) for name in batch))
            for name, differs in zip(batch, found, strict=True):
                (self._different.add if differs else self._different.discard)(name)
        return sorted(self._different)

    async def _differs(self, name: str) -> bool:
        """Whether an account's packed row or its keys differ from its ledger; an edit by hand is adopted first.

        A packed row that does is the audit's to write again.
        """
        if await self._breach_differs(name):
            return True
        try:
            snapshot = await self._booking.read(name)
            if snapshot.agrees(self._booking.parse(snapshot)):
                return not snapshot.packed_agrees()
            if not await self._booking.adopt(snapshot):
                return False
            snapshot = await self._booking.read(name)
            return not snapshot.agrees(self._booking.parse(snapshot)) and not await self._booking.adopt(snapshot)
        except (errors.AccountQuarantined, errors.UnknownAccount):
            # Keys that cannot be read are the audit's to show.
            return False

    async def _breach_differs(self, name: str) -> bool:
        slot = await self._client.hget(keys.ledger_key(name), "slot")
        if slot is None or not slot.isdigit():
            return False
        async with self._client.pipeline(transaction=True) as pipeline:
            pipeline.hget(keys.ledger_key(name), "breach")
            pipeline.getrange(keys.COLUMN_BREACH, int(slot) * UNIT.size, (int(slot) + 1) * UNIT.size - 1)
            breach, packed = await pipeline.execute()
        return int(breach or 0) != unpack(packed)
