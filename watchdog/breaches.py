"""Open and end breaches: decide each survivor of the screen in Decimal, and record the verdict once.

A verdict is on the row that was read, at the marks it was read with. The script that records it refuses when that row
is no longer the record, or when the account's last breach transition was at a newer mark version; the account is then
read and judged again, a few times, and counted overdue if it keeps moving.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final, Literal

import numpy as np
import structlog

from app import errors, failpoints
from app import redis_client as keys
from app.booking import Booking
from app.columns import Chunk, ScreenedChunk, account_names
from app.evidence import liquidation_body, recovery_body
from app.history import HistoryEntry
from app.numbers import format_decimal
from app.records import Snapshot, encode_position
from app.services import reports, trading
from app.services.margin import AccountMargin
from app.services.trading import Account

ATTEMPTS_MAX: Final = 5
VERDICTS_AT_ONCE: Final = 500

log = structlog.get_logger(__name__)

Kind = Literal["liquidation", "recovery"]


@dataclass(slots=True)
class Settled:
    """What came of the verdicts on some accounts: the rows they made, and the accounts that kept moving.

    ``breaches_more`` is how many more of them are in a breach than when they were read, whoever recorded it.
    """

    opened: list[HistoryEntry] = field(default_factory=list)
    ended: list[HistoryEntry] = field(default_factory=list)
    candidates: int = 0
    breaches_more: int = 0
    overdue: int = 0
    quarantined: dict[str, str] = field(default_factory=dict)

    def add(self, other: Settled) -> None:
        """Count ``other`` in."""
        self.opened += other.opened
        self.ended += other.ended
        self.candidates += other.candidates
        self.breaches_more += other.breaches_more
        self.overdue += other.overdue
        self.quarantined |= other.quarantined


@dataclass(frozen=True, slots=True)
class _Judged:
    """An account as it was read, valued at the marks it was read with, and the breach it was in (0 for none)."""

    account: Account
    valued: AccountMargin[Decimal]
    prices: Mapping[str, Decimal]
    mark_version: int
    breach: int

    @property
    def is_candidate(self) -> bool:
        return trading.is_candidate(self.valued)


class BreachBook:
    """Records verdicts for one watchdog."""

    def __init__(self, booking: Booking) -> None:
        self._booking = booking
        self._store = booking.store

    async def settle(
        self, chunk: Chunk, screened: ScreenedChunk, quarantined: Mapping[int, str]
    ) -> AsyncIterator[Settled]:
        """Judge every row that the screen lets through and record what changed, a bounded number at a time."""
        in_breach = chunk.breach != 0
        readable = chunk.readable(quarantined)
        # An open breach of a clear candidate changes nothing, so that verdict needs no second look.
        unchanged = readable & in_breach & screened.surely_candidate
        yield Settled(candidates=int(unchanged.sum()))
        survivors = np.flatnonzero(readable & ~unchanged & (screened.may_be_candidate | screened.may_be_restored))
        for first in range(0, len(survivors), VERDICTS_AT_ONCE):
            indices = [int(index) for index in survivors[first : first + VERDICTS_AT_ONCE]]
            names = await account_names(self._store.client, [chunk.first_slot + index for index in indices])
            verdicts = (self._settle_row(chunk, index, name) for index, name in zip(indices, names, strict=True))
            settled = Settled()
            for one in await asyncio.gather(*verdicts):
                settled.add(one)
            yield settled

    async def _settle_row(self, chunk: Chunk, index: int, name: str) -> Settled:
        account = chunk.account(index, name)
        prices = chunk.marks.prices
        valued = trading.account_margin(account, contracts=self._booking.contracts, prices=prices)
        judged = _Judged(account, valued, prices, chunk.marks.version, int(chunk.breach[index]))
        return await self._settle(judged)

    async def _settle(self, judged: _Judged) -> Settled:
        """Record a verdict; one that is refused as stale is made again on what the account is now.

        An account that cannot be read is set apart, so that it keeps no other from being judged.
        """
        name, was_in_breach = judged.account.account_id, bool(judged.breach)
        try:
            for _ in range(ATTEMPTS_MAX):
                kind = self._verdict(judged)
                if kind is None:
                    more = bool(judged.breach) - was_in_breach
                    return Settled(candidates=int(judged.is_candidate), breaches_more=more)
                entry = await self._record(judged, kind)
                if entry is not None and kind == "liquidation":
                    return Settled(opened=[entry], candidates=1, breaches_more=1 - was_in_breach)
                if entry is not None:
                    return Settled(ended=[entry], breaches_more=-int(was_in_breach))
                current = await self._judge_again(name)
                if current is None:
                    return Settled()
                judged = current
        except (errors.AccountQuarantined, errors.UnknownAccount) as error:
            return Settled(quarantined={name: error.detail})
        except (errors.OutboxFull, errors.Contended) as error:
            log.warning("a verdict is overdue", account_id=name, reason=error.detail)
        else:
            log.warning("a verdict is overdue: the account keeps moving", account_id=name)
        return Settled(overdue=int(judged.is_candidate and not judged.breach), candidates=int(judged.is_candidate))

    def _verdict(self, judged: _Judged) -> Kind | None:
        if judged.breach:
            restored = trading.is_restored(judged.valued, restore_at=self._booking.settings.restore_at)
            return "recovery" if restored else None
        return "liquidation" if judged.is_candidate else None

    async def _record(self, judged: _Judged, kind: Kind) -> HistoryEntry | None:
        """The row of history that the verdict made, or None if the account was not the one judged any more."""
        account, name = judged.account, judged.account.account_id
        if kind == "liquidation":
            body = liquidation_body(account, judged.valued, prices=judged.prices, mark_version=judged.mark_version)
        else:
            body = recovery_body(
                account,
                judged.valued,
                prices=judged.prices,
                mark_version=judged.mark_version,
                liquidation_id=judged.breach,
                cause="the mark",
            )
        await failpoints.reach("breach.verdict")
        answer = await self._store.run(
            keys.BREACH,
            [
                keys.STATE_EPOCH,
                keys.STATE_RUN_ID,
                keys.HISTORY_LAST_ID,
                keys.OUTBOX,
                keys.balance_key(name),
                keys.positions_key(name),
                keys.ledger_key(name),
                keys.COLUMN_BREACH,
                keys.LIQUIDATIONS if kind == "liquidation" else keys.RECOVERIES,
                keys.ACCOUNTS,
            ],
            [
                self._store.signature,
                name,
                kind,
                judged.mark_version,
                format_decimal(account.balance),
                judged.breach or "",
                body,
                *_record_texts(account),
            ],
        )
        if answer[0] != "ok":
            return None
        _, history_id, seq, time_us, epoch = answer
        return HistoryEntry(int(history_id), kind, name, seq, int(epoch), int(time_us), body)

    async def _judge_again(self, name: str) -> _Judged | None:
        """The account as it is now at the marks of now; an edit by hand is adopted first. None without a mark."""
        snapshot = await self._booking.read(name)
        for symbol in snapshot.marks_set_by_hand(self._booking.contracts):
            await self._booking.marks.adopt(symbol)
        account = self._booking.parse(snapshot)
        if not snapshot.agrees(account):
            await self._booking.adopt(snapshot)
        snapshot = await self._booking.read(name)
        account = self._booking.parse(snapshot)
        prices = self._fresh_prices(snapshot)
        valued = reports.value_account(account, contracts=self._booking.contracts, prices=prices)
        if valued is None:
            return None
        breach = snapshot.breach.id if snapshot.breach else 0
        return _Judged(account, valued, prices, snapshot.mark_version, breach)

    def _fresh_prices(self, snapshot: Snapshot) -> dict[str, Decimal]:
        """The marks that are not stale: nothing is breached on one that is."""
        limit_seconds = self._booking.settings.mark_max_age_seconds
        return {
            symbol: mark.price
            for symbol, mark in snapshot.marks(self._booking.contracts).items()
            if limit_seconds is None or snapshot.now_us - mark.timestamp_us <= limit_seconds * 1_000_000
        }


def _record_texts(account: Account) -> Sequence[str]:
    """The fields of the positions key as Plimsoll writes them, alternating with their values."""
    return [text for symbol, position in account.positions.items() for text in (symbol, encode_position(position))]
