"""Rows of history on their way to Postgres: what the scripts stamped, and the fenced insert that records them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final, NamedTuple

import asyncpg
import orjson
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.models import HISTORY, HistoryRow

FENCE_LOCK: Final = 0x706C696D
"""Advisory lock: writers of history share it, a new epoch takes it alone."""

STATEMENT_TIMEOUT_SECONDS: Final = 2.0
UNIX_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_NAIVE_EPOCH: Final = UNIX_EPOCH.replace(tzinfo=None)


class FencedError(Exception):
    """History is taken only from the newest epoch, and these rows are of an older one."""


class HistoryEntry(NamedTuple):
    """A row of history on its way to Postgres: what the commit script stamped, and the body as JSON."""

    id: int
    kind: str
    account_id: str
    seq: int
    epoch: int
    time_us: int
    body: bytes

    def row_json(self) -> bytes:
        """The whole row as one JSON object, its decimals as strings."""
        head = orjson.dumps(
            {
                "id": self.id,
                "account_id": self.account_id,
                "seq": self.seq,
                "epoch": self.epoch,
                "timestamp": timestamp_text(self.time_us),
            }
        )
        return head[:-1] + b"," + self.body[1:]


def timestamp_of(time_us: int) -> datetime:
    """The time ``time_us`` microseconds after the Unix epoch, in UTC, without a float in between."""
    return UNIX_EPOCH + timedelta(microseconds=time_us)


@lru_cache(maxsize=256)
def timestamp_text(time_us: int) -> str:
    """ISO 8601 in UTC with microseconds. A row shares its time with its answer and the rows of its call."""
    return (_NAIVE_EPOCH + timedelta(microseconds=time_us)).isoformat(timespec="microseconds") + "Z"


def _columns(model: type[HistoryRow]) -> str:
    return ", ".join(column.name for column in model.__table__.columns)


def _typed_columns(model: type[HistoryRow]) -> str:
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    return ", ".join(f"{column.name} {column.type.compile(dialect=dialect)}" for column in model.__table__.columns)


# The names in these statements come from the models, all values are parameters.
_INSERT: Final = {
    kind: f"INSERT INTO {model.__tablename__} ({_columns(model)}) "  # noqa: S608
    f"SELECT {_columns(model)} FROM jsonb_to_recordset($1::text::jsonb) AS row ({_typed_columns(model)}) "
    # Asked once a statement, and seen by a snapshot of its own, taken when the lock was granted (migration 0004).
    "WHERE $2::bigint IS NULL OR (SELECT fenced_epoch()) = $2::bigint "
    # Of two writers of one row the later may meet any of its unique indexes first, not only that of the id.
    "ON CONFLICT DO NOTHING RETURNING id"
    for kind, model in HISTORY.items()
}
_SAME: Final = {
    kind: f"WITH rows AS (SELECT {_columns(model)} FROM jsonb_to_recordset($1::text::jsonb) "  # noqa: S608
    f"AS row ({_typed_columns(model)})) SELECT id FROM (SELECT * FROM rows INTERSECT "
    f"SELECT {_columns(model)} FROM {model.__tablename__} WHERE id IN (SELECT id FROM rows)) AS same"
    for kind, model in HISTORY.items()
}


class KeptConnection:
    """One connection of ``engine``, kept by its only user from one batch of history to the next.

    To hand one out and take it back costs SQLAlchemy more than the rows of a batch do (ADR 031).
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._connection: AsyncConnection | None = None
        self._driver: asyncpg.Connection | None = None

    async def open(self) -> asyncpg.Connection:
        """The driver's connection, made anew where the last has ended. Raises as connecting does."""
        if self._driver is None or self._driver.is_closed():
            await self.close()
            self._connection = await self._engine.connect()
            self._driver = await _driver(self._connection)
        return self._driver

    async def close(self) -> None:
        """End the connection; it goes to nobody else."""
        connection, self._connection, self._driver = self._connection, None, None
        if connection is not None:
            await connection.invalidate()
            await connection.close()


async def write_history(
    source: AsyncEngine | KeptConnection, entries: Sequence[HistoryEntry], *, epoch: int
) -> list[HistoryEntry]:
    """Insert ``entries`` in one transaction; answer those whose id was there already with other content.

    Those of one kind are one statement, which ends its transaction itself. Raises ``FencedError`` when ``epoch`` is not
    the newest, and asyncpg's errors.
    """
    if isinstance(source, KeptConnection):
        driver = await source.open()
        try:
            return await _write(driver, entries, epoch=epoch)
        except FencedError:
            raise
        except BaseException:
            # Whatever is wrong with the session, a right that it lacks or a transaction that it is in, is not kept.
            await source.close()
            raise
    async with source.connect() as connection, _invalidating(connection):
        return await _write(await _driver(connection), entries, epoch=epoch)


async def _write(driver: asyncpg.Connection, entries: Sequence[HistoryEntry], *, epoch: int) -> list[HistoryEntry]:
    if len({entry.kind for entry in entries}) <= 1:
        return await _insert(driver, entries, epoch=epoch)
    # An account may have rows of several kinds here: history must not have the later without the earlier.
    async with driver.transaction():
        return await _insert(driver, entries, epoch=epoch)


async def insert_history(connection: AsyncConnection, entries: Sequence[HistoryEntry]) -> list[HistoryEntry]:
    """As ``write_history``, in the transaction of a ``connection`` that holds the fence itself."""
    return await _insert(await _driver(connection), entries, epoch=None)


async def _insert(
    driver: asyncpg.Connection, entries: Sequence[HistoryEntry], *, epoch: int | None
) -> list[HistoryEntry]:
    """Insert ``entries``, kinds and rows always in one order: two writers of the same rows must not deadlock.

    An id that is there with the same content is a row written before, and no news; the others are answered.
    """
    contradicted = []
    rows_of: dict[str, list[HistoryEntry]] = {kind: [] for kind in HISTORY}
    for entry in sorted(entries, key=lambda entry: entry.id):
        rows_of[entry.kind].append(entry)
    for kind, rows in rows_of.items():
        if not rows:
            continue
        inserted = await driver.fetch(_INSERT[kind], _as_array(rows), epoch, timeout=STATEMENT_TIMEOUT_SECONDS)
        if len(inserted) == len(rows):
            continue
        newest = await driver.fetchval("SELECT max(epoch) FROM epochs", timeout=STATEMENT_TIMEOUT_SECONDS)
        if epoch not in {None, newest}:
            raise FencedError(f"epoch {epoch} is not the newest, {newest}")
        new = {record["id"] for record in inserted}
        known = [row for row in rows if row.id not in new]
        same = await driver.fetch(_SAME[kind], _as_array(known), timeout=STATEMENT_TIMEOUT_SECONDS)
        recorded = {record["id"] for record in same}
        contradicted += [row for row in known if row.id not in recorded]
    return contradicted


def _as_array(rows: Sequence[HistoryEntry]) -> str:
    return (b"[" + b",".join(row.row_json() for row in rows) + b"]").decode()


@asynccontextmanager
async def _invalidating(connection: AsyncConnection) -> AsyncIterator[None]:
    """Keep a driver's connection that broke or hangs out of the pool; SQLAlchemy does not see what was said to it."""
    try:
        yield
    except (OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.PostgresConnectionError):
        await connection.invalidate()
        raise


async def _driver(connection: AsyncConnection) -> asyncpg.Connection:
    """The asyncpg connection under SQLAlchemy's, for statements in batches."""
    driver = (await connection.get_raw_connection()).driver_connection
    assert isinstance(driver, asyncpg.Connection)
    return driver
