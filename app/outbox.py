"""From the outbox to Postgres: group commits, a breaker while Postgres is away, and the drain of what was left over.

The commit script has put each row in the stream ``outbox`` already, so nothing here can lose one: the process that
booked it writes it at once, together with all that waits, and deletes it from the stream; whatever it leaves behind,
dead or slow, any process drains.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import asyncpg
import structlog
from redis.exceptions import RedisError, ResponseError
from sqlalchemy import select
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine

from app import background, errors, failpoints, metrics
from app import redis_client as keys
from app.config import Settings
from app.history import FencedError, HistoryEntry, KeptConnection, write_history
from app.models import HISTORY
from app.redis_client import StateStore

DRAIN_INTERVAL_SECONDS: Final = 0.5
PING_INTERVAL_SECONDS: Final = 0.5
LEFT_OVER_AGE_SECONDS: Final = 2.0
"""An entry this old in the stream is not about to be written by the process that booked it."""

FENCED_ATTEMPTS_MAX: Final = 10
FENCED_PAUSE_SECONDS: Final = 0.05

POISON_CLASSES: Final = ("22", "23")
"""SQLSTATE classes of a row that Postgres can never take: data exceptions and integrity violations."""

POSTGRES_ERRORS: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    DBAPIError,
    SQLAlchemyError,
    PoolTimeoutError,
    OSError,
    TimeoutError,
)

log = structlog.get_logger(__name__)


class Waiting(NamedTuple):
    """Rows on their way to Postgres, who waits for all of them, and since when by the clock of the loop."""

    entries: Sequence[HistoryEntry]
    answer: asyncio.Future[bool]
    since: float


@dataclass(frozen=True, slots=True)
class OutboxState:
    """How much history waits for Postgres, and since when."""

    entries: int
    oldest_age_seconds: float


class Outbox:
    """The writer of history of one process."""

    def __init__(self, store: StateStore, engine: AsyncEngine, settings: Settings) -> None:
        self._store = store
        self._engine = engine
        self._kept = KeptConnection(engine)
        self._settings = settings
        self._waiting: list[Waiting] = []
        self._in_hand: list[Waiting] = []
        self._patience: asyncio.TimerHandle | None = None
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._ping: asyncio.Task[None] | None = None
        self._postgres_answered = float("-inf")
        self.postgres_away = False

    @property
    def postgres_away(self) -> bool:
        """The breaker: while it is open nobody waits for Postgres."""
        return self._postgres_away

    @postgres_away.setter
    def postgres_away(self, away: bool) -> None:
        self._postgres_away = away
        metrics.POSTGRES_BREAKER_OPEN.set(away)

    async def start(self) -> None:
        """Begin to write and to drain."""
        self._tasks = [
            asyncio.create_task(self._write_forever(), name="outbox writer"),
            asyncio.create_task(self._drain_forever(), name="outbox drain"),
        ]

    async def stop(self) -> None:
        """Write what waits, bounded by one statement's time, then end."""
        if self._waiting and not self.postgres_away:
            await asyncio.wait([item.answer for item in self._waiting], timeout=self._settings.record_timeout_seconds)
        await background.end(self._tasks)
        if self._patience is not None:
            self._patience.cancel()
        await self._kept.close()

    async def record(self, entries: Sequence[HistoryEntry]) -> bool:
        """Wait until ``entries`` are committed in Postgres; False once it is known to be away.

        Either way they are in the stream and will be recorded.
        """
        if self.postgres_away:
            return False
        loop = asyncio.get_running_loop()
        now = loop.time()
        size = self._settings.outbox_batch_rows
        waiting = [
            Waiting(entries[first : first + size], loop.create_future(), now) for first in range(0, len(entries), size)
        ]
        self._waiting += waiting
        self._wake.set()
        if self._patience is None:
            self._patience = loop.call_at(now + self._settings.record_timeout_seconds, self._end_patience)
        return all([await item.answer for item in waiting])

    def _end_patience(self) -> None:
        """Answer whoever waits, if one of them has waited too long; the rows stay where they are.

        One timer for all of them, set again only when it fires: one a row would cost as much as its commit.
        """
        self._patience = None
        unanswered = [item for item in (*self._in_hand, *self._waiting) if not item.answer.done()]
        if not unanswered:
            return
        loop = asyncio.get_running_loop()
        give_up_at = unanswered[0].since + self._settings.record_timeout_seconds
        if loop.time() < give_up_at:
            self._patience = loop.call_at(give_up_at, self._end_patience)
            return
        self._open_breaker("no answer in time")
        _answer(unanswered, recorded=False)

    async def is_recorded(self, kind: str, history_id: int, *, until: float) -> bool:
        """Whether the row is in Postgres; False where that cannot be said now, or by ``until``, a time of the loop."""
        if self.postgres_away:
            return False
        seconds = until - asyncio.get_running_loop().time()
        try:
            return await background.within(seconds, self._has_row(kind, history_id))
        except POSTGRES_ERRORS:  # a TimeoutError is one of these
            return False

    async def _has_row(self, kind: str, history_id: int) -> bool:
        model = HISTORY[kind]
        async with self._engine.connect() as connection:
            return await connection.scalar(select(model.id).where(model.id == history_id)) is not None

    async def has_postgres(self, *, within_seconds: float) -> bool:
        """Whether it answers in time, asked at most once in a while: what this process wrote since is an answer."""
        now = asyncio.get_running_loop().time()
        if self.postgres_away or now - self._postgres_answered > PING_INTERVAL_SECONDS:
            # One at a time, however many ask: they would take the connections of the writer.
            if self._ping is None or self._ping.done():
                self._ping = asyncio.create_task(self.ping_postgres())
                self._ping.add_done_callback(lambda ping: ping.cancelled() or ping.exception())
            try:
                await background.within(within_seconds, self._ping)
            except (errors.StoreUnavailable, TimeoutError):
                return False
        return True

    async def ping_postgres(self) -> None:
        """Raise ``StoreUnavailable`` unless Postgres answers."""
        try:
            async with self._engine.connect() as connection:
                await connection.exec_driver_sql("SELECT 1")
            self._postgres_answered = asyncio.get_running_loop().time()
        except POSTGRES_ERRORS as error:
            raise errors.StoreUnavailable("Postgres did not answer", reason="postgres") from error

    async def state(self) -> OutboxState:
        """The length of the stream and the age of its oldest entry."""
        async with self._store.client.pipeline(transaction=True) as pipeline:
            pipeline.xlen(keys.OUTBOX)
            pipeline.xrange(keys.OUTBOX, count=1)
            pipeline.time()
            length, oldest, (seconds, microseconds) = await pipeline.execute()
        age_us = 0
        # One that no script wrote has no age; the next drain puts it aside.
        rows, _ = rows_and_others(oldest)
        for row in rows:
            age_us = seconds * 1_000_000 + microseconds - row.time_us
        return OutboxState(entries=length, oldest_age_seconds=max(0.0, age_us / 1_000_000))

    async def drain(self, *, older_than_seconds: float = 0.0) -> int:
        """Write the entries in the stream that are old enough, in stream order; answer how many.

        Raises Postgres' errors and Redis'.
        """
        written, after = 0, "-"
        while True:
            await self._let_rows_follow()
            async with self._store.client.pipeline(transaction=True) as pipeline:
                pipeline.hget(keys.STATE_EPOCH, "epoch")
                pipeline.xrange(keys.OUTBOX, min=after, count=self._settings.outbox_batch_rows)
                pipeline.time()
                epoch, found, (seconds, microseconds) = await pipeline.execute()
            now_us = seconds * 1_000_000 + microseconds
            rows, others = rows_and_others(found)
            await self._bury_others(others)
            entries = [row for row in rows if now_us - row.time_us >= older_than_seconds * 1_000_000]
            if not entries:
                return written
            await self._write(entries, epoch=int(epoch or 0))
            written += len(entries)
            after = f"({entries[-1].id}-0"

    async def _bury_others(self, found: Sequence[tuple[bytes, dict[bytes, bytes]]]) -> None:
        """Move entries that no script wrote, whole, to the dead letters."""
        for entry_id, fields in found:
            log.error("the outbox holds what no script wrote", entry=entry_id)
            metrics.DEAD_LETTERS.inc()
            odd = [item for pair in fields.items() for item in pair]
            await self._store.batcher.execute("XADD", keys.OUTBOX_DEAD, "*", "reason", "not a row", *odd)
            await self._store.batcher.execute("XDEL", keys.OUTBOX, entry_id)

    async def _let_rows_follow(self) -> None:
        """Put aside what was added with the time for an id, which would keep each commit from being made."""
        names = [keys.OUTBOX, keys.OUTBOX_DEAD, keys.HISTORY_LAST_ID, keys.OUTBOX_ANEW]
        try:
            answer = await self._store.batcher.evaluate(keys.PUT_ASIDE.sha, keys.PUT_ASIDE.text, names, ())
            _, aside = keys.checked(answer)
        except (ResponseError, errors.PlimsollError) as error:
            # Rows that can be drained are drained all the same.
            log.warning("the outbox could not be looked through", error=str(error))
            return
        if aside:
            metrics.DEAD_LETTERS.inc(aside)
            log.error("the outbox held what no script wrote", entries=aside)

    async def _write_forever(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                self._in_hand = self._take_batch()
                try:
                    await self._write_batch(self._in_hand)
                except Exception:
                    log.exception("the writer of history failed; the rows wait in the outbox")
                    self._open_breaker("our mistake")
                finally:
                    _answer(self._in_hand, recorded=False)
                    self._in_hand = []

    def _take_batch(self) -> list[Waiting]:
        """What has waited longest, as many rows as fit a batch; what waits for one answer stays together."""
        rows, count = 0, 0
        for item in self._waiting:
            rows += len(item.entries)
            if count and rows > self._settings.outbox_batch_rows:
                break
            count += 1
        batch = self._waiting[:count]
        del self._waiting[:count]
        return batch

    async def _write_batch(self, batch: list[Waiting]) -> None:
        """Write ``batch`` and answer who waits for a row of it; whom this leaves waiting is answered False."""
        # A row of an older epoch may be one that Redis has lost since: only the drain, which reads what Redis holds
        # now, may still write it.
        epoch = batch[-1].entries[-1].epoch
        if older := [item for item in batch if any(row.epoch != epoch for row in item.entries)]:
            await self._write_again(older)
            batch = [item for item in batch if all(row.epoch == epoch for row in item.entries)]
            if not batch:
                return
        try:
            buried = await self._write(_entries(batch), epoch=epoch, over=self._kept)
        except FencedError:
            metrics.HISTORY_FENCED.inc()
            await self._write_again(batch)
        except (*POSTGRES_ERRORS, errors.PlimsollError, RedisError) as error:
            self._open_breaker(repr(error))
        else:
            self.postgres_away = False
            self._postgres_answered = asyncio.get_running_loop().time()
            if buried:
                _answer([item for item in batch if any(row.id in buried for row in item.entries)], recorded=False)
            _answer(batch, recorded=True)

    async def _write_again(self, batch: Sequence[Waiting]) -> None:
        """Write those rows of a fenced batch that Redis still holds, in its new epoch.

        Postgres is not away. A row that stayed in Redis alone until it is old enough to be drained would have been
        acknowledged in one store only, and be gone with the next power cut.
        """
        held: set[HistoryEntry] = set()
        for _ in range(FENCED_ATTEMPTS_MAX):
            # Redis hears of a new epoch right after Postgres.
            await asyncio.sleep(FENCED_PAUSE_SECONDS)
            try:
                entries = _entries(batch)
                epoch, held = await self._still_held(entries)
                buried = await self._write([entry for entry in entries if entry in held], epoch=epoch)
                held = {entry for entry in held if entry.id not in buried}
                break
            except (*POSTGRES_ERRORS, FencedError, errors.PlimsollError, RedisError) as error:
                held = set()
                log.debug("fenced rows wait", error=repr(error))
        for item in batch:
            _answer([item], recorded=held.issuperset(item.entries))

    async def _still_held(self, entries: Sequence[HistoryEntry]) -> tuple[int, set[HistoryEntry]]:
        """The epoch of Redis, and which of ``entries`` its stream holds. An id alone proves nothing.

        A Redis that came back without its last writes has given the ids of those to others.
        """
        async with self._store.client.pipeline(transaction=True) as pipeline:
            pipeline.hget(keys.STATE_EPOCH, "epoch")
            for entry in entries:
                pipeline.xrange(keys.OUTBOX, f"{entry.id}-0", f"{entry.id}-0")
            epoch, *found = await pipeline.execute()
        rows, _ = rows_and_others([entry for entries in found for entry in entries])
        return int(epoch or 0), set(rows)

    async def _drain_forever(self) -> None:
        while True:
            await asyncio.sleep(DRAIN_INTERVAL_SECONDS)
            try:
                if await self.drain(older_than_seconds=0.0 if self.postgres_away else LEFT_OVER_AGE_SECONDS):
                    log.info("drained the outbox")
                if self.postgres_away:
                    await self.ping_postgres()
                    self.postgres_away = False
                    log.info("Postgres is back")
            except FencedError:
                metrics.HISTORY_FENCED.inc()
            except (*POSTGRES_ERRORS, errors.PlimsollError, RedisError) as error:
                log.debug("the outbox waits", error=repr(error))
            except Exception:
                log.exception("the drain of the outbox failed; it goes on")

    async def _write(
        self, entries: Sequence[HistoryEntry], *, epoch: int, over: KeptConnection | None = None
    ) -> set[int]:
        """Record ``entries`` and take them out of the stream; answers the ids of those that had to be put aside."""
        await failpoints.reach("outbox.before_postgres")
        try:
            contradicted = await write_history(over or self._engine, entries, epoch=epoch)
        except asyncpg.PostgresError as error:
            if not (error.sqlstate or "").startswith(POISON_CLASSES):
                raise
            return await self._write_one_by_one(entries, epoch=epoch)
        await failpoints.reach("outbox.after_postgres_commit")
        for entry in contradicted:
            await self._bury(entry, "a row with this id says something else")
        self._delete(entries)
        return {entry.id for entry in contradicted}

    def _delete(self, entries: Sequence[HistoryEntry]) -> None:
        """Take recorded rows out of the stream. Nobody waits: a row that stays is drained, which changes nothing."""
        deleted = self._store.batcher.defer("XDEL", keys.OUTBOX, *[entry.id for entry in entries])
        deleted.add_done_callback(lambda answer: answer.cancelled() or answer.exception())

    async def _write_one_by_one(self, entries: Sequence[HistoryEntry], *, epoch: int) -> set[int]:
        """Let the rows that Postgres takes flow, and put those it can never take aside; answers their ids."""
        buried = set()
        for entry in entries:
            try:
                contradicted = await write_history(self._engine, [entry], epoch=epoch)
            except asyncpg.PostgresError as error:
                if not (error.sqlstate or "").startswith(POISON_CLASSES):
                    raise
                await self._bury(entry, str(error))
                buried.add(entry.id)
            else:
                if contradicted:
                    await self._bury(entry, "a row with this id says something else")
                    buried.add(entry.id)
            self._delete([entry])
        return buried

    async def _bury(self, entry: HistoryEntry, reason: str) -> None:
        """Keep a row that Postgres cannot take in the dead-letter stream, and say so."""
        log.error("history refused a row", id=entry.id, kind=entry.kind, account_id=entry.account_id, reason=reason)
        metrics.DEAD_LETTERS.inc()
        await self._store.batcher.execute(
            "XADD", keys.OUTBOX_DEAD, "*", "reason", reason, "kind", entry.kind, "row", entry.row_json()
        )

    def _open_breaker(self, reason: str) -> None:
        if not self.postgres_away:
            log.warning("Postgres is away; history waits in the outbox", reason=reason)
        self.postgres_away = True


def rows_and_others(
    found: Sequence[tuple[bytes, dict[bytes, bytes]]],
) -> tuple[list[HistoryEntry], list[tuple[bytes, dict[bytes, bytes]]]]:
    """The rows among entries of the stream, and the entries that no script wrote."""
    rows, others = [], []
    for entry_id, fields in found:
        try:
            rows.append(entry_from_stream(entry_id, fields))
        except (KeyError, ValueError):
            others.append((entry_id, fields))
    return rows, others


def entry_from_stream(entry_id: bytes, fields: dict[bytes, bytes]) -> HistoryEntry:
    """The entry that a commit script appended. Raises ``KeyError`` or ``ValueError`` for anything else."""
    history_id, _, part = entry_id.partition(b"-")
    if part != b"0":
        raise ValueError(entry_id)
    if b"kind" in fields:
        # As layout 3 wrote them: its rows are acknowledged, and may still wait when it is left behind.
        kind, *words = (fields[name] for name in (b"kind", b"account", b"seq", b"epoch", b"time", b"body"))
    else:
        ((kind, value),) = fields.items()
        words = value.split(b"\n", 4)
    account_id, seq, epoch, time_us, body = words
    entry = HistoryEntry(
        id=int(history_id),
        kind=kind.decode(),
        account_id=account_id.decode(),
        seq=int(seq),
        epoch=int(epoch),
        time_us=int(time_us),
        body=body,
    )
    if entry.kind not in HISTORY:
        raise KeyError(entry.kind)
    try:
        entry.row_json().decode()
    except (OverflowError, TypeError) as error:
        raise ValueError("no row of history has such numbers") from error
    return entry


def _entries(batch: Sequence[Waiting]) -> list[HistoryEntry]:
    return [entry for item in batch for entry in item.entries]


def _answer(batch: Sequence[Waiting], *, recorded: bool) -> None:
    for item in batch:
        if not item.answer.done():
            item.answer.set_result(recorded)
