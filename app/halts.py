"""Halting and resuming: the key in Redis that refuses increases, and the rows that say who did it and why.

A halt acts first and is recorded after, so that nothing delays it; a resumption is recorded first and acts after, so
that nothing adds risk without a record. The key holds the row of its halt, so whoever finds a halt can record it.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Protocol

import orjson
import structlog
from redis.exceptions import WatchError
from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_sessionmaker

from app import errors
from app import redis_client as keys
from app.background import within
from app.config import Settings
from app.database import create_engine, create_sessions, format_timestamp
from app.models import Halt, Resumption
from app.outbox import POSTGRES_ERRORS
from app.redis_client import StateStore
from app.schemas import REASON_PATTERN

if TYPE_CHECKING:
    from app.embedded import Stores

REASON: Final = re.compile(REASON_PATTERN)
ATTEMPTS_MAX: Final = 5

log = structlog.get_logger(__name__)


class Act(Protocol):
    """``halt`` or ``resume``."""

    async def __call__(
        self,
        store: StateStore,
        sessions: async_sessionmaker[AsyncSession],
        *,
        reason: str,
        key_id: str | None,
        now: datetime,
    ) -> dict[str, Any]:
        """What ``POST /halt`` answers."""


@dataclass(frozen=True, slots=True)
class _Note:
    """What ``state:halted`` holds: the row of its halt."""

    id: str
    reason: str
    key_id: str | None
    timestamp: str

    @classmethod
    def read(cls, value: bytes | str) -> _Note | None:
        """The note in ``value``; None for anything that was set by hand."""
        try:
            note = cls(**orjson.loads(value))
            datetime.fromisoformat(note.timestamp)
            whole = re.fullmatch("[0-9a-f]{32}", note.id) and REASON.fullmatch(note.reason)
        except (ValueError, TypeError):
            return None
        return note if whole and isinstance(note.key_id, str | None) else None

    def row(self) -> dict[str, Any]:
        return {**asdict(self), "timestamp": datetime.fromisoformat(self.timestamp)}


async def halt(
    store: StateStore, sessions: async_sessionmaker[AsyncSession], *, reason: str, key_id: str | None, now: datetime
) -> dict[str, Any]:
    """Refuse whatever adds risk from now on. Once halted it stays the first halt, however often it is asked for.

    Works while Postgres is away: ``recorded`` is false then, and true once it was asked for again. Raises redis-py's
    errors.
    """
    note = _Note(uuid.uuid4().hex, reason, key_id, format_timestamp(now))
    changed = await store.client.set(keys.STATE_HALTED, orjson.dumps(note), nx=True)
    if not changed:
        found = _Note.read(await store.client.get(keys.STATE_HALTED) or b"")
        if found is None:
            return {"halted": True, "id": None, "since": None, "reason": None, "recorded": False}
        note = found
    recorded = True
    try:
        await within(store.request_seconds, _halted(sessions, note))
    except POSTGRES_ERRORS as error:
        log.warning("the halt is not recorded yet; halt again when Postgres is back", error=repr(error))
        recorded = False
    return {"halted": True, "id": note.id, "since": note.timestamp, "reason": note.reason, "recorded": recorded}


async def resume(
    store: StateStore, sessions: async_sessionmaker[AsyncSession], *, reason: str, key_id: str | None, now: datetime
) -> dict[str, Any]:
    """Let trading go on; no change where it is not halted. A halt that was set by hand gets its row on the way.

    Raises Postgres' errors, and then trading stays halted; and redis-py's.
    """
    for _ in range(ATTEMPTS_MAX):
        async with store.client.pipeline(transaction=True) as pipeline:
            await pipeline.watch(keys.STATE_HALTED)
            value = await pipeline.get(keys.STATE_HALTED)
            if value is None:
                return {"halted": False, "id": None, "since": None, "reason": None, "recorded": True}
            note = _Note.read(value) or _Note(uuid.uuid4().hex, "set by hand in Redis", None, format_timestamp(now))
            row = {"halt_id": note.id, "reason": reason, "key_id": key_id, "timestamp": now}
            recorded = await _resumed(sessions, note, row)
            pipeline.multi()  # type: ignore[no-untyped-call]
            pipeline.delete(keys.STATE_HALTED)
            try:
                await pipeline.execute()
            except WatchError:
                continue  # another halt, or somebody else resumed
        return {
            "halted": False, "id": note.id, "since": format_timestamp(recorded.timestamp), "reason": recorded.reason,
            "recorded": True,
        }  # fmt: skip
    raise errors.Contended(f"the halt changed under {ATTEMPTS_MAX} attempts", reason="contended")


async def _halted(sessions: async_sessionmaker[AsyncSession], note: _Note) -> None:
    """Record a halt, unless it is."""
    async with sessions.begin() as session:
        await session.execute(insert(Halt).values(note.row()).on_conflict_do_nothing())


async def _resumed(sessions: async_sessionmaker[AsyncSession], note: _Note, row: Mapping[str, Any]) -> Resumption:
    """Record the end of a halt, and the halt. One that was recorded before, and did not come about, is what counts."""
    async with sessions.begin() as session:
        await session.execute(insert(Halt).values(note.row()).on_conflict_do_nothing())
        await session.execute(insert(Resumption).values(row).on_conflict_do_nothing())
        return (await session.scalars(select(Resumption).where(Resumption.halt_id == note.id))).one()


def from_the_command(act: Act, settings: Settings, stores: Stores, *, reason: str) -> dict[str, Any]:
    """``halt`` or ``resume`` for one command, without an API."""
    if not REASON.fullmatch(reason):
        raise errors.InvalidField("a reason has 1 to 200 characters", field="reason")
    return asyncio.run(_from_the_command(act, settings, stores, reason))


async def _from_the_command(act: Act, settings: Settings, stores: Stores, reason: str) -> dict[str, Any]:
    store, engine = StateStore(stores.redis_url, settings), create_engine(stores.database_url)
    try:
        return await act(store, create_sessions(engine), reason=reason, key_id=None, now=datetime.now(UTC))
    finally:
        await store.close()
        await engine.dispose()


async def restore_halt(store: StateStore, connection: AsyncConnection) -> None:
    """Put back a halt that history knows and Redis has lost: an empty Redis must not resume trading by itself."""
    query = (
        select(Halt.id, Halt.reason, Halt.key_id, Halt.timestamp)
        .where(~Halt.id.in_(select(Resumption.halt_id)))
        .order_by(Halt.timestamp.desc())
        .limit(1)
    )
    found = (await connection.execute(query)).first()
    if found is not None:
        note = _Note(found.id, found.reason, found.key_id, format_timestamp(found.timestamp))
        await store.client.set(keys.STATE_HALTED, orjson.dumps(note), nx=True)
