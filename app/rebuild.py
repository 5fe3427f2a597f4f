"""``plimsoll rebuild``: the whole state from history alone, frozen until it is done. Marks start missing."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import structlog
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app import database, errors, restore
from app import redis_client as keys
from app.config import Settings
from app.halts import restore_halt
from app.history import FencedError
from app.models import Liquidation, Recovery
from app.outbox import Outbox
from app.reconcile import (
    advance_epoch,
    begin,
    lock_history,
    migrate_schema,
    newest_history_id,
    newest_mark_version,
    wait_for_held_rows,
)
from app.redis_client import StateStore

if TYPE_CHECKING:
    from app.embedded import Stores

KEYS_AT_ONCE: Final = 5_000
OWN_KEYS: Final = (
    "account:*",
    "positions:*",
    "operation:*",
    "columns:*",
    "mark:*",
    "mark_price:*",
    "counters:*",
    keys.ACCOUNTS,
    keys.OUTBOX,
    keys.HISTORY_LAST_ID,
    keys.STATE_SWEPT,
    keys.STATE_RUN_ID,
    keys.QUARANTINED,
)
"""What a rebuild replaces. The epoch stays, frozen; dead letters and a halt are the operator's."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """How much of history the state was made from."""

    accounts: int
    newest_id: int


def rebuild(settings: Settings, stores: Stores, progress: restore.Progress) -> Rebuilt:
    """Replace the state in Redis by what history says; safe to interrupt and to repeat.

    The tables are brought up to date first, and the service's rights to them: a restored backup may lack both.
    Raises ``StateAheadOfHistory`` while Redis holds changes that Postgres does not have.
    """
    migrate_schema(stores)
    return asyncio.run(_rebuild(settings, stores, progress))


async def _rebuild(settings: Settings, stores: Stores, progress: restore.Progress) -> Rebuilt:
    store, engine = StateStore(stores.redis_url, settings), database.create_maintenance_engine(stores.database_url)
    try:
        before: dict[Any, Any] = await store.client.hgetall(keys.STATE_EPOCH)
        await store.client.hset(keys.STATE_EPOCH, mapping={"status": "frozen", "signature": store.signature})
        try:
            await _drain(Outbox(store, engine, settings))
            await wait_for_held_rows(store, engine)
            async with engine.begin() as connection:
                await lock_history(connection)
                # Whoever reconciled until now may have let writes go again: from here on it cannot.
                token = await begin(store)
                await store.client.hset(keys.STATE_EPOCH, "status", "frozen")
                newest_id = await newest_history_id(connection)
                await _require_not_ahead(store, newest_id)
                return await _replace(store, connection, settings, newest_id, token, progress)
        except errors.StateAheadOfHistory:
            if before:
                await store.client.hset(keys.STATE_EPOCH, mapping=before)
            raise
    finally:
        await store.close()
        await engine.dispose()


async def _drain(outbox: Outbox) -> None:
    """Let Postgres have what waits in Redis; where it may not, the check that follows says so."""
    try:
        await outbox.drain()
    except FencedError as error:
        log.warning("the outbox is of an older epoch", reason=str(error))


async def _require_not_ahead(store: StateStore, newest_id: int) -> None:
    waiting = int(await store.client.xlen(keys.OUTBOX))
    last_id = int(await store.client.get(keys.HISTORY_LAST_ID) or 0)
    dead = int(await store.client.xlen(keys.OUTBOX_DEAD))
    if waiting or last_id > newest_id + dead:
        raise errors.StateAheadOfHistory(
            f"Redis is at id {last_id} with {waiting} rows waiting, Postgres at {newest_id}: restoring would lose "
            "what only Redis has. Let the outbox drain first; `plimsoll reset` would give all of it up",
            reason="state_ahead_of_history",
        )


async def _replace(
    store: StateStore,
    connection: AsyncConnection,
    settings: Settings,
    newest_id: int,
    token: str,
    progress: restore.Progress,
) -> Rebuilt:
    for pattern in OWN_KEYS:
        await _delete(store, pattern)
    accounts = await restore.accounts_in_history(connection)
    symbols = [contract.symbol for contract in settings.contracts]
    await restore.restore_all(store, accounts, symbols, progress)
    now = datetime.now(UTC)
    since = now - timedelta(seconds=settings.operation_ttl_seconds)
    await restore.restore_operations(
        store,
        restore.operations_in_history(connection, since=since),
        now=now,
        seconds_kept=settings.operation_ttl_seconds,
        progress=progress,
    )
    async with store.client.pipeline(transaction=True) as pipeline:
        for key, model in ((keys.LIQUIDATIONS, Liquidation), (keys.RECOVERIES, Recovery)):
            pipeline.set(key, await connection.scalar(select(func.count()).select_from(model)) or 0)
        pipeline.set(keys.HISTORY_LAST_ID, newest_id)
        pipeline.set(keys.MARK_VERSION, await newest_mark_version(connection))
        await pipeline.execute()
    await restore_halt(store, connection)
    run_id = (await store.client.info("server"))["run_id"]
    await advance_epoch(store, connection, token=token, reason="rebuilt from history", run_id=run_id)
    log.info("rebuilt the state from history", accounts=len(accounts), newest_id=newest_id)
    return Rebuilt(accounts=len(accounts), newest_id=newest_id)


async def _delete(store: StateStore, pattern: str) -> None:
    """Delete the keys that match ``pattern``, a bounded number at a time."""
    found: list[bytes | str] = []
    async for key in store.client.scan_iter(match=pattern, count=KEYS_AT_ONCE):
        found.append(key)
        if len(found) >= KEYS_AT_ONCE:
            await store.client.unlink(*found)
            found.clear()
    if found:
        await store.client.unlink(*found)
