"""Open and end breaches: decide each survivor of the screen exactly, and record the verdict once.

A verdict is on the row that was read, at the marks it was read with. One call of the script records many, each judged
on its own: it refuses one whose row is no longer the record, or whose account's last breach transition was at a newer
mark version; that account is then read and judged again, a few times, and counted overdue if it keeps moving.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import chain, count
from typing import Final

import numpy as np
import structlog
from numpy.typing import NDArray

from app import background, errors, failpoints
from app import redis_client as keys
from app.booking import Booking
from app.columns import INT64, Chunk, ScreenedChunk, account_names
from app.evidence import liquidation_body, recovery_body
from app.history import HistoryEntry
from app.numbers import format_decimal
from app.records import Snapshot, encode_position
from app.services import reports, trading
from app.services.margin import AccountMargin
from app.services.trading import Account
from app.services.verdict_rows import judge_rows

ATTEMPTS_MAX: Final = 5
VERDICTS_AT_ONCE: Final = 600
SETTLING_AT_ONCE: Final = 2
"""Of such pieces: one is judged while another is recorded."""

VERDICTS_PER_CALL: Final = 150
"""A script holds up everybody else at Redis for as long as it runs."""

_NO_SLOT: Final = -1

log = structlog.get_logger(__name__)


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

    def note(self, account_id: str, outcome: HistoryEntry | str, *, was_in_breach: bool) -> None:
        """Count in a recorded verdict, or one on an account whose keys are not what they should be."""
        if isinstance(outcome, str):
            self.quarantined[account_id] = outcome
        elif outcome.kind == "liquidation":
            self.opened.append(outcome)
            self.candidates += 1
            self.breaches_more += 1 - was_in_breach
        else:
            self.ended.append(outcome)
            self.breaches_more -= was_in_breach


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


_Outcome = HistoryEntry | str | None
"""The row a verdict made, why its account is set apart, or nothing: the account was not the one judged any more."""


@dataclass(slots=True)
class _Verdicts:
    """What is to be recorded of accounts judged at one mark version, a list of each part.

    ``slots`` are those where the accounts were found in ``epoch``. ``breaches`` are those that the accounts were in
    when they were judged: one that was in none (0) has one now, of any other it ends. ``positions`` are the values of
    the positions key in each of ``symbols``, nothing where it is flat.
    """

    mark_version: int
    symbols: Sequence[str]
    epoch: str = ""
    accounts: list[str] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    breaches: list[int] = field(default_factory=list)
    balances: list[bytes] = field(default_factory=list)
    positions: list[tuple[bytes, ...]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    def add(self, account_id: str, judged: _Judged, body: bytes, *, slot: int = _NO_SLOT) -> None:
        """Append the verdict on an account by itself."""
        held = judged.account.positions
        self.accounts.append(account_id)
        self.slots.append(slot)
        self.breaches.append(judged.breach)
        self.balances.append(format_decimal(judged.account.balance).encode())
        self.positions.append(
            tuple(encode_position(held[symbol]).encode() if symbol in held else b"" for symbol in self.symbols)
        )
        self.bodies.append(body)

    def parts(self, size: int) -> Iterator[_Verdicts]:
        """So many at a time, in their order."""
        for first in range(0, len(self.accounts), size):
            some = slice(first, first + size)
            yield _Verdicts(
                self.mark_version,
                self.symbols,
                self.epoch,
                self.accounts[some],
                self.slots[some],
                self.breaches[some],
                self.balances[some],
                self.positions[some],
                self.bodies[some],
            )

    def account_keys(self) -> list[str]:
        """The keys of the accounts as the script takes them."""
        return [
            *map(keys.balance_key, self.accounts),
            *map(keys.positions_key, self.accounts),
            *map(keys.ledger_key, self.accounts),
        ]

    def arguments(self) -> list[str | bytes | int]:
        """The verdicts as the script takes them."""
        return [
            self.mark_version,
            self.epoch,
            len(self.symbols),
            *self.symbols,
            _packed(self.slots),
            _packed(self.breaches),
            *self.accounts,
            *self.balances,
            *self.bodies,
            *chain.from_iterable(self.positions),
        ]

    def entries(self, epoch: int, time_us: int, first_id: int, answers: Sequence[object]) -> Iterator[_Outcome]:
        """What came of each verdict, by the answers of the script: a seq, a list with a key, or a word."""
        ids = count(first_id)
        for account_id, breach, body, answer in zip(self.accounts, self.breaches, self.bodies, answers, strict=True):
            if isinstance(answer, int):
                kind = "recovery" if breach else "liquidation"
                yield HistoryEntry(next(ids), kind, account_id, answer, epoch, time_us, body)
            elif isinstance(answer, list):
                yield f"the key {keys.as_text(answer[1])} is not what it should be"
            else:
                yield None


class BreachBook:
    """Records verdicts for one watchdog."""

    def __init__(self, booking: Booking) -> None:
        self._booking = booking
        self._store = booking.store

    async def settle(
        self, chunk: Chunk, screened: ScreenedChunk, quarantined: Mapping[int, str]
    ) -> AsyncGenerator[Settled]:
        """Judge every row that the screen lets through and record what changed, a bounded number at a time.

        While Redis records some, the next are judged.
        """
        readable = chunk.readable(quarantined)
        # An open breach of a clear candidate changes nothing, so that verdict needs no second look.
        unchanged = readable & screened.in_breach & screened.surely_candidate
        yield Settled(candidates=int(unchanged.sum()))
        survivors = np.flatnonzero(readable & ~unchanged & (screened.may_be_candidate | screened.may_be_restored))
        settling: deque[asyncio.Task[Settled]] = deque()
        try:
            for first in range(0, len(survivors), VERDICTS_AT_ONCE):
                some = survivors[first : first + VERDICTS_AT_ONCE]
                settling.append(asyncio.create_task(self._settle_rows(chunk, some)))
                if len(settling) == SETTLING_AT_ONCE:
                    yield await settling.popleft()
            while settling:
                yield await settling.popleft()
        finally:
            await background.end(settling)

    async def _settle_rows(self, chunk: Chunk, indices: NDArray[np.intp]) -> Settled:
        """Record the verdicts on some rows together; the accounts that moved meanwhile are settled one by one."""
        names = await account_names(self._store.client, (chunk.first_slot + indices).tolist())
        settled, verdicts = self._verdicts_on(chunk, indices, names)
        calls = list(verdicts.parts(VERDICTS_PER_CALL))
        moved: list[tuple[str, bool]] = []
        for call, outcomes in zip(calls, await asyncio.gather(*map(self._record, calls)), strict=True):
            for account_id, breach, outcome in zip(call.accounts, call.breaches, outcomes, strict=True):
                if outcome is None:
                    moved.append((account_id, bool(breach)))
                else:
                    settled.note(account_id, outcome, was_in_breach=bool(breach))
        for one in await asyncio.gather(*(self._settle_again(name, was_in_breach=was) for name, was in moved)):
            settled.add(one)
        return settled

    def _verdicts_on(self, chunk: Chunk, indices: NDArray[np.intp], names: Sequence[str]) -> tuple[Settled, _Verdicts]:
        """What the rows that change nothing come to, and the verdicts on the others."""
        rows = chunk.rows(indices)
        found = judge_rows(rows, self._booking.contracts, restore_at=self._booking.settings.restore_at)
        written = found.written
        slots = (chunk.first_slot + indices).tolist()
        verdicts = _Verdicts(
            chunk.marks.version,
            list(self._booking.contracts),
            chunk.marks.epoch,
            accounts=[names[row] for row in written.rows],
            slots=[slots[row] for row in written.rows],
            breaches=rows.breach[written.rows].tolist(),
            balances=written.balances,
            positions=written.positions,
            bodies=written.bodies,
        )
        unchanged = found.judged.copy()
        unchanged[written.rows] = False
        settled = Settled(candidates=int(np.count_nonzero(found.candidate & unchanged)))
        for row in np.flatnonzero(~found.judged).tolist():
            judged = self._judge(rows.account(row, names[row]), rows, int(rows.breach[row]))
            if (body := self._body(judged)) is None:
                settled.candidates += int(judged.is_candidate)
            else:
                verdicts.add(names[row], judged, body, slot=slots[row])
        return settled, verdicts

    def _judge(self, account: Account, chunk: Chunk, breach: int) -> _Judged:
        prices = chunk.marks.prices
        valued = trading.account_margin(account, contracts=self._booking.contracts, prices=prices)
        return _Judged(account, valued, prices, chunk.marks.version, breach)

    async def _settle_again(self, name: str, *, was_in_breach: bool) -> Settled:
        """Judge an account whose verdict was refused as stale on what it is now, until it holds still.

        An account that cannot be read is set apart, so that it keeps no other from being judged.
        """
        candidate, in_breach = not was_in_breach, was_in_breach
        try:
            for _ in range(ATTEMPTS_MAX - 1):
                judged = await self._judge_again(name)
                if judged is None:
                    return Settled()
                candidate, in_breach = judged.is_candidate, bool(judged.breach)
                body = self._body(judged)
                if body is None:
                    return Settled(candidates=int(candidate), breaches_more=in_breach - was_in_breach)
                verdict = _Verdicts(judged.mark_version, list(self._booking.contracts))
                verdict.add(name, judged, body)
                (outcome,) = await self._record(verdict)
                if outcome is not None:
                    settled = Settled()
                    settled.note(name, outcome, was_in_breach=was_in_breach)
                    return settled
        except (errors.AccountQuarantined, errors.UnknownAccount) as error:
            return Settled(quarantined={name: error.detail})
        except (errors.OutboxFull, errors.Contended) as error:
            log.warning("a verdict is overdue", account_id=name, reason=error.detail)
        else:
            log.warning("a verdict is overdue: the account keeps moving", account_id=name)
        return Settled(overdue=int(candidate and not in_breach), candidates=int(candidate))

    def _body(self, judged: _Judged) -> bytes | None:
        """The evidence of the verdict, or None where nothing changes."""
        account, valued = judged.account, judged.valued
        if not judged.breach:
            if not judged.is_candidate:
                return None
            return liquidation_body(account, valued, prices=judged.prices, mark_version=judged.mark_version)
        if not trading.is_restored(valued, restore_at=self._booking.settings.restore_at):
            return None
        return recovery_body(
            account,
            valued,
            prices=judged.prices,
            mark_version=judged.mark_version,
            liquidation_id=judged.breach,
            cause="the mark",
        )

    async def _record(self, verdicts: _Verdicts) -> list[_Outcome]:
        """What came of each verdict: its row of history, None if the account had moved, or why it is set apart."""
        await failpoints.reach("breach.verdict")
        _, epoch, time_us, first_id, answers = await self._store.run(
            keys.BREACH,
            [
                keys.STATE_EPOCH,
                keys.STATE_RUN_ID,
                keys.HISTORY_LAST_ID,
                keys.OUTBOX,
                keys.COLUMN_BREACH,
                keys.ACCOUNTS,
                keys.LIQUIDATIONS,
                keys.RECOVERIES,
                keys.CHANGED,
                *verdicts.account_keys(),
            ],
            [self._store.signature, *verdicts.arguments()],
        )
        return list(verdicts.entries(int(epoch), int(time_us), int(first_id), answers))

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


def _packed(numbers: Sequence[int]) -> bytes:
    """``numbers`` as they lie in a column."""
    return np.array(numbers, dtype=INT64).tobytes()
