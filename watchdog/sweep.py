"""A sweep: one recomputation of every account's margin, and the record of what it found.

Read the columns chunk by chunk with their marks, screen each in float64, decide the survivors in Decimal, record.
Requests coalesce: however many come while a sweep runs, one more follows it, so the newest mark is always swept. A
sweep that only the timer asked for, at marks that were swept before, is overtaken by what is asked for before it has
judged anybody: the two are one sweep then.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np
import structlog
from numpy.typing import NDArray
from redis.exceptions import RedisError

from app import errors, failpoints
from app import redis_client as keys
from app.booking import Booking
from app.columns import Chunk, Marks, ScreenedChunk, Sums, Totals, near_rows, quarantined_slots, screen
from app.headroom import Headroom
from app.history import FencedError
from app.outbox import POSTGRES_ERRORS
from app.services.exact_rows import tell_exactly
from app.services.reports import ACCOUNT_STATES
from watchdog import metrics
from watchdog.breaches import BreachBook, Settled
from watchdog.kept_columns import KeptColumns, adopted_marks
from watchdog.refresh import Refresher

LEFT_OVER_READ_AT_ONCE: Final = 1_000
GIVE_WAY_SECONDS: Final = 0.2
RECORDING_AT_ONCE: Final = 8
"""Pieces of verdicts whose rows are on their way to Postgres: more would only wait there until they seem unanswered."""

THREAD_ROWS_MIN: Final = 16_384
"""Below, numpy is done before a thread has begun."""

PIECE_ROWS: Final = 1_048_576
"""Flags for each of its rows are a megabyte; for each of ten million they would be fresh memory, which has to be
waited for."""

_Found = TypeVar("_Found")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Swept:
    """What one sweep found. ``version`` is the oldest mark version that any row was judged at."""

    version: int
    marks: Marks
    accounts: int
    states: Mapping[str, int]
    open_breaches: int
    overdue: int
    totals: Totals
    chunks: Sequence[Chunk]
    quarantined: Mapping[int, str]


@dataclass(slots=True)
class _Tally:
    """What the chunks of a sweep add up to while it runs, as they were read.

    ``sums`` are of every account, ``left_out`` of those in quarantine, which are in no state; ``accounts`` has none.
    """

    settled: Settled = field(default_factory=Settled)
    sums: Sums = field(default_factory=Sums)
    left_out: Sums = field(default_factory=Sums)
    accounts: int = 0
    chunks: list[Chunk] = field(default_factory=list)

    def count(self, chunk: Chunk, quarantined: Mapping[int, str], *, sums: Sums | None) -> None:
        """Count the rows of ``chunk`` in; ``sums`` are those of all chunks, where somebody keeps them."""
        left_out = chunk.rows(chunk.indices_of(quarantined))
        self.left_out.add(left_out)
        self.accounts += len(chunk) - len(left_out)
        self.chunks.append(chunk)
        if sums is None:
            self.sums.add(chunk)
        else:
            self.sums = sums


class _Overtaken(Exception):
    """A sweep was asked for that does all that this one had to do, but for the audit, which is done."""


class Sweeper:
    """Sweeps for one watchdog, one sweep at a time."""

    def __init__(self, booking: Booking, refresher: Refresher) -> None:
        self._booking = booking
        self._refresher = refresher
        self._store = booking.store
        self._settings = booking.settings
        self._breaches = BreachBook(booking)
        self._columns = KeptColumns(booking)
        self._triggers: set[str] = set()
        self._asked = asyncio.Event()
        # For the sweep that has not begun yet: one that runs has taken its own away.
        self._waiting: list[asyncio.Future[None]] = []
        self._idle = asyncio.Event()
        self._idle.set()
        self.swept: Swept | None = None
        self.last_success = time.monotonic()
        self.last_sign_of_life = time.monotonic()
        self.running = False

    def notify(self, trigger: str) -> None:
        """Ask for a sweep of everything that is true now."""
        self._triggers.add(trigger)
        self._asked.set()
        self._idle.clear()

    async def idle(self) -> None:
        """Wait, for a while, until no sweep runs or is asked for: what is less urgent shares its loop and its Redis."""
        with suppress(TimeoutError):
            async with asyncio.timeout(GIVE_WAY_SECONDS):
                await self._idle.wait()

    async def request(self, trigger: str) -> None:
        """Ask for a sweep, and wait until one that began afterwards has ended, well or not."""
        self.notify(trigger)
        finished = asyncio.get_running_loop().create_future()
        self._waiting.append(finished)
        await finished

    async def run(self) -> None:
        """Sweep whenever asked, until cancelled. A sweep that fails is counted, and moves no success."""
        audited = False
        while True:
            await self._asked.wait()
            self._asked.clear()
            triggers, self._triggers = self._triggers, set()
            waiting, self._waiting = self._waiting, []
            self.running = True
            result = "failed"
            try:
                self.swept = await self._sweep(
                    audit="timer" in triggers and not audited,
                    may_be_overtaken=triggers == {"timer"} and not audited,
                )
                self.last_success = time.monotonic()
                metrics.show(self.swept)
                result = "ok"
            except _Overtaken:
                result = "overtaken"
            except (errors.Unavailable, RedisError, OSError) as error:
                result = "unavailable"
                log.warning("no sweep", reason=str(error))
            except Exception:
                log.exception("a sweep failed")
            finally:
                self.running = False
                self.last_sign_of_life = time.monotonic()
                audited = result == "overtaken"
                if audited:
                    self._triggers |= triggers
                    self._waiting = [*waiting, *self._waiting]
                else:
                    self._end(triggers, waiting, result)
            if result == "ok" and self.swept is not None:
                await self._refresh(self.swept)

    def _end(self, triggers: set[str], waiting: Sequence[asyncio.Future[None]], result: str) -> None:
        """Count a sweep that has ended, and tell whoever waited for it."""
        for trigger in triggers:
            metrics.SWEEPS.labels(trigger, result).inc()
        metrics.STATE_WRITABLE.set(result != "unavailable")
        for finished in waiting:
            if not finished.done():
                finished.set_result(None)
        if not self._asked.is_set():
            self._idle.set()

    async def _refresh(self, swept: Swept) -> None:
        try:
            await self._refresher.refresh(swept, asked=self._asked)
        except (errors.Unavailable, RedisError, OSError) as error:
            log.warning("equity and used_margin keys were not refreshed", reason=str(error))
        except Exception:
            log.exception("equity and used_margin keys were not refreshed")

    async def _sweep(self, *, audit: bool = False, may_be_overtaken: bool = False) -> Swept:
        started = time.monotonic()
        await failpoints.reach("sweep.slow")
        await failpoints.reach("sweep.wedge")
        failpoints.block("loop.block")
        quarantined, without_slot = await quarantined_slots(self._store.client)
        tally = _Tally()
        marks = await adopted_marks(self._booking)
        versions, epoch = [marks.version], marks.epoch
        recording: deque[asyncio.Task[None]] = deque()
        async with aclosing(self._columns.chunks(audit=audit)) as chunks:
            async for read, headroom in chunks:
                marks = read.marks
                # One that reads every row goes on: what follows would read them all again.
                if headroom is None or self.swept is None or marks.version != self.swept.version:
                    may_be_overtaken = False
                self._give_way(may_be_overtaken=may_be_overtaken)
                versions.append(marks.version)
                chunk = replace(read, marks=marks.fresh(self._settings.mark_max_age_seconds))
                near = await self._look_at(chunk, headroom, tally, quarantined)
                self.last_sign_of_life = time.monotonic()
                self._give_way(may_be_overtaken=may_be_overtaken)
                async with aclosing(self._settle(chunk, near, quarantined)) as parts:
                    async for part in parts:
                        self.last_sign_of_life = time.monotonic()
                        if len(recording) >= RECORDING_AT_ONCE:
                            await recording.popleft()
                        recording.append(asyncio.create_task(self._record(part, marks)))
                        tally.settled.add(part)
        await asyncio.gather(*recording)
        _log_transitions(tally.settled)
        await self._record_left_over(tally.settled)
        for name, reason in tally.settled.quarantined.items():
            await self._store.client.hset(keys.QUARANTINED, name, reason)
        answer = await self._store.run(
            keys.SWEPT,
            [keys.STATE_EPOCH, keys.STATE_RUN_ID, keys.STATE_SWEPT, keys.CHANGED],
            [self._store.signature, min(versions), epoch],
        )
        if answer[0] != "ok":
            raise errors.StateUnreconciled("another epoch began during the sweep", reason="state_unreconciled")
        metrics.SWEEP_DURATION.observe(time.monotonic() - started)
        return self._summary(tally, marks, min(versions), quarantined, without_slot)

    def _give_way(self, *, may_be_overtaken: bool) -> None:
        if may_be_overtaken and self._asked.is_set():
            raise _Overtaken

    async def _look_at(
        self, chunk: Chunk, headroom: Headroom | None, tally: _Tally, quarantined: Mapping[int, str]
    ) -> NDArray[np.intp]:
        """Count a chunk, and find the rows that need a second look."""

        def look_and_count() -> NDArray[np.intp]:
            near = headroom.near_rows(chunk.marks, len(chunk)) if headroom is not None else None
            tally.count(chunk, quarantined, sums=headroom.sums if headroom is not None else None)
            return near_rows(chunk, self._booking.contracts) if near is None else near

        return await _computed(look_and_count, rows=len(chunk))

    async def _settle(
        self, chunk: Chunk, near: NDArray[np.intp], quarantined: Mapping[int, str]
    ) -> AsyncGenerator[Settled]:
        """Take the second look, and record what it finds; a piece in which no row is near needs none."""
        ends = range(PIECE_ROWS, len(chunk), PIECE_ROWS)
        for piece, rows in zip(chunk.pieces(PIECE_ROWS), np.split(near, np.searchsorted(near, ends)), strict=True):
            if not len(rows):
                continue
            near_here = rows - (piece.first_slot - chunk.first_slot)
            screened = await _computed(partial(self._look_again, piece, near_here), rows=len(rows))
            async with aclosing(self._breaches.settle(piece, screened, quarantined)) as parts:
                async for part in parts:
                    yield part

    def _look_again(self, piece: Chunk, near: NDArray[np.intp]) -> ScreenedChunk:
        contracts, restore_at = self._booking.contracts, self._settings.restore_at
        screened = screen(piece, contracts, restore_at=restore_at, near=near)
        tell_exactly(screened, contracts)
        return screened

    async def _record(self, settled: Settled, marks: Marks) -> None:
        """Wait until the rows that some verdicts made are in Postgres, or it is known to be away."""
        answered = time.monotonic()
        new_mark = self.swept is None or marks.version > self.swept.version
        entries = [*settled.opened, *settled.ended]
        if not entries or not await self._booking.outbox.record(entries):
            return
        waited_seconds = time.monotonic() - answered
        for entry in settled.opened if new_mark else ():
            # Redis stamped both the mark and the row, so their difference needs no clock of ours.
            before_us = entry.time_us - max(marks.timestamps_us.values())
            metrics.MARK_TO_RECORD.observe(max(0.0, before_us / 1_000_000) + waited_seconds)

    async def _record_left_over(self, settled: Settled) -> None:
        """Write the breaches that somebody else found: another watchdog, or this one in a sweep that failed.

        Only then is every breach at these marks in Postgres, or Postgres known to be away.
        """
        outbox = self._booking.outbox
        if outbox.postgres_away:
            return
        own = {entry.id for entry in (*settled.opened, *settled.ended)}
        waiting: Any = await self._store.client.xrange(keys.OUTBOX, count=LEFT_OVER_READ_AT_ONCE)
        others = [
            entry_id
            for entry_id, fields in waiting
            if fields.keys() & {b"liquidation", b"recovery"} and int(entry_id.partition(b"-")[0]) not in own
        ]
        if not others and len(waiting) < LEFT_OVER_READ_AT_ONCE:
            return
        try:
            await outbox.drain()
        except FencedError as error:
            raise errors.StateUnreconciled("another epoch began during the sweep", reason="fenced") from error
        except POSTGRES_ERRORS as error:
            log.warning("breaches wait for Postgres", error=repr(error))

    def _summary(
        self,
        tally: _Tally,
        marks: Marks,
        version: int,
        quarantined: Mapping[int, str],
        without_slot: Sequence[str],
    ) -> Swept:
        in_breach = tally.sums.in_breach - tally.left_out.in_breach + tally.settled.breaches_more
        states = Counter(
            candidate=tally.settled.candidates,
            quarantined=len(quarantined) + len(without_slot),
            negative_equity=tally.sums.negative_equity - tally.left_out.negative_equity,
            # Every candidate of this sweep has an open breach by now, but for those that kept moving.
            recovering=max(0, in_breach - (tally.settled.candidates - tally.settled.overdue)),
        )
        states["ok"] = tally.accounts - states["candidate"] - states["recovering"] - states["negative_equity"]
        return Swept(
            version=version,
            marks=marks,
            accounts=tally.accounts,
            states={state: states[state] for state in ACCOUNT_STATES},
            open_breaches=in_breach,
            overdue=tally.settled.overdue,
            totals=tally.sums.value(marks.prices, self._booking.contracts),
            chunks=tally.chunks,
            quarantined=quarantined,
        )


async def _computed(compute: Callable[[], _Found], *, rows: int) -> _Found:
    """What ``compute`` finds in so many rows, of many in a thread: numpy leaves the loop to others meanwhile."""
    return compute() if rows < THREAD_ROWS_MIN else await asyncio.to_thread(compute)


def _log_transitions(settled: Settled) -> None:
    """One line for each kind of transition; every row is in history."""
    for event, entries in (("breaches opened", settled.opened), ("breaches ended", settled.ended)):
        if entries:
            log.warning(event, count=len(entries), accounts=[entry.account_id for entry in entries[:10]])
