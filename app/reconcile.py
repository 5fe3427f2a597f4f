"""The life of the state: made by ``migrate``, compared with history after every restart of Redis, emptied by ``reset``.

Whether Redis still is the newer of the two stores is decided by one number: ids come from one counter in Redis, so a
counter that is not behind Postgres' largest id means that nothing history knows is missing from Redis.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import structlog
from sqlalchemy import func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app import database, errors
from app import redis_client as keys
from app.config import Settings
from app.history import FENCE_LOCK
from app.models import HISTORY, Epoch
from app.redis_client import StateStore

if TYPE_CHECKING:
    from app.embedded import Stores

RECONCILE_INTERVAL_SECONDS: Final = 0.5

log = structlog.get_logger(__name__)


def migrate(settings: Settings, stores: Stores) -> None:
    """Bring the schema up to date and make the state's first epoch, or its next one when the contracts changed.

    Raises ``StateMissing`` when history exists and Redis has no state: starting anew would be a second history.
    """
    database.migrate(stores.database_url)
    asyncio.run(_migrate_state(settings, stores))


def reset(settings: Settings, stores: Stores) -> None:
    """Empty both stores and make a new state. Everything is lost; asking first is the caller's part."""
    database.migrate(stores.database_url, revision="base")
    asyncio.run(_flush(settings, stores))
    migrate(settings, stores)


async def keep_reconciled(store: StateStore, engine: AsyncEngine) -> None:
    """Reconcile after every restart of Redis, for as long as the process lives."""
    complaint = ""
    while True:
        try:
            if await needs_reconciling(store):
                await reconcile(store, engine)
            complaint = ""
        except Exception as error:  # noqa: BLE001  # any fault of either store: said once, and tried again
            if complaint != repr(error):
                complaint = repr(error)
                log.warning("not reconciled", reason=complaint)
        await asyncio.sleep(RECONCILE_INTERVAL_SECONDS)


async def needs_reconciling(store: StateStore) -> bool:
    """Whether this run of Redis has not been compared with history yet."""
    async with store.client.pipeline(transaction=True) as pipeline:
        pipeline.info("server")
        pipeline.get(keys.STATE_RUN_ID)
        pipeline.exists(keys.STATE_EPOCH)
        server, run_id, exists = await pipeline.execute()
    return bool(exists) and (run_id or b"").decode() != server["run_id"]


async def reconcile(store: StateStore, engine: AsyncEngine) -> None:
    """Let writes go again after a restart of Redis, in a new epoch that fences whoever wrote before it.

    Raises ``StateMissing`` when Redis came up empty and ``StateBehindHistory`` when it lost writes that history has:
    nothing is written until the state has been restored.
    """
    async with engine.begin() as connection:
        await connection.execute(text(f"SELECT pg_advisory_xact_lock({FENCE_LOCK})"))
        run_id = (await store.client.info("server"))["run_id"]
        if keys.as_text(await store.client.get(keys.STATE_RUN_ID) or b"") == run_id:
            return
        if not await store.client.exists(keys.STATE_EPOCH):
            raise errors.StateMissing("Redis holds no state", reason="state_missing")
        last_id = int(await store.client.get(keys.HISTORY_LAST_ID) or 0)
        recorded = await newest_history_id(connection)
        if last_id < recorded:
            raise errors.StateBehindHistory(
                f"Redis came back at id {last_id}, history is at {recorded}; its last writes are lost",
                reason="state_behind_history",
            )
        await _advance_epoch(store, connection, reason=f"Redis restarted as {run_id}", run_id=run_id)
    log.info("reconciled with history", last_id=last_id, recorded=recorded)


async def newest_history_id(connection: AsyncConnection) -> int:
    """The largest id of any kind of history, 0 for none."""
    newest = 0
    for model in HISTORY.values():
        newest = max(newest, await connection.scalar(select(func.coalesce(func.max(model.id), 0))) or 0)
    return newest


async def _migrate_state(settings: Settings, stores: Stores) -> None:
    store, engine = StateStore(stores.redis_url, settings), database.create_engine(stores.database_url)
    try:
        async with engine.begin() as connection:
            await connection.execute(text(f"SELECT pg_advisory_xact_lock({FENCE_LOCK})"))
            signature = await store.client.hget(keys.STATE_EPOCH, "signature")
            run_id = (await store.client.info("server"))["run_id"]
            if signature is None:
                if await newest_history_id(connection):
                    raise errors.StateMissing(
                        "Postgres has history and Redis has no state: start Redis on its own data, "
                        "or run `plimsoll reset` to empty both",
                        reason="state_missing",
                    )
                await store.client.set(keys.HISTORY_LAST_ID, 0)
                await _advance_epoch(store, connection, reason="made by migrate", run_id=run_id)
            elif keys.as_text(signature) != store.signature:
                await _advance_epoch(store, connection, reason="contracts or layout changed", run_id=None)
        if await needs_reconciling(store):
            await reconcile(store, engine)
    finally:
        await store.close()
        await engine.dispose()


async def _advance_epoch(store: StateStore, connection: AsyncConnection, *, reason: str, run_id: str | None) -> None:
    """The next epoch, in Postgres first: a crash before Redis hears of it leaves writes refused, not unfenced."""
    epoch = (await connection.scalar(select(func.coalesce(func.max(Epoch.epoch), 0))) or 0) + 1
    await connection.execute(
        insert(Epoch).values(epoch=epoch, signature=store.signature, reason=reason, timestamp=datetime.now(UTC))
    )
    await connection.commit()
    async with store.client.pipeline(transaction=True) as pipeline:
        pipeline.hset(keys.STATE_EPOCH, mapping={"epoch": epoch, "status": "ready", "signature": store.signature})
        if run_id is not None:
            pipeline.set(keys.STATE_RUN_ID, run_id)
        await pipeline.execute()


async def _flush(settings: Settings, stores: Stores) -> None:
    store = StateStore(stores.redis_url, settings)
    try:
        await store.client.flushdb()
    finally:
        await store.close()
