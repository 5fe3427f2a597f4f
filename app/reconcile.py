"""The life of the state: made by ``migrate``, reconciled after every restart of Redis, emptied by ``reset``.

Which of the two stores is ahead is decided by one number. Ids come from one counter in Redis, and what a restart may
lose is always the newest part: a counter that is not behind Postgres' largest id means that Redis lost nothing that
history knows, and rows with larger ids are exactly what it did lose.
"""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import structlog
from redis.exceptions import ResponseError, WatchError
from sqlalchemy import func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.orm import InstrumentedAttribute

from app import database, errors, restore
from app import redis_client as keys
from app.config import Settings
from app.history import FENCE_LOCK, insert_history
from app.models import HISTORY, Epoch, Liquidation, Recovery
from app.outbox import rows_and_others
from app.redis_client import StateStore

if TYPE_CHECKING:
    from app.embedded import Stores

RECONCILE_INTERVAL_SECONDS: Final = 0.5
REWRITE_POLL_SECONDS: Final = 0.02
HELD_ROWS_SECONDS: Final = 4.0
"""Two statements' time: a process that lives has written what it holds, or has given up."""

log = structlog.get_logger(__name__)


def migrate(settings: Settings, stores: Stores) -> None:
    """Bring the schema up to date and make the state's first epoch, or its next one when the contracts changed.

    Raises ``StateMissing`` when history exists and Redis has no state: starting anew would be a second history.
    """
    migrate_schema(stores)
    asyncio.run(_migrate_state(settings, stores))


def reset(settings: Settings, stores: Stores) -> None:
    """Empty both stores and make a new state. Everything is lost; asking first is the caller's part.

    Epochs go on counting, so that what a process still holds from before is fenced.
    """
    migrate_schema(stores)
    epoch = asyncio.run(_newest_epoch(stores))
    database.migrate(stores.owner_url, revision="base")
    asyncio.run(_flush(settings, stores))
    migrate_schema(stores)
    asyncio.run(_migrate_state(settings, stores, after_epoch=epoch))


def migrate_schema(stores: Stores) -> None:
    """The newest tables, and the service's rights to them where it runs as a role of its own."""
    service_url = None if stores.migrations_url is None else stores.database_url
    database.migrate(stores.owner_url, service_url=service_url)


async def keep_reconciled(store: StateStore, engine: AsyncEngine, settings: Settings) -> None:
    """Reconcile after every restart of Redis, for as long as the process lives."""
    complaint = ""
    while True:
        try:
            if await needs_reconciling(store):
                await store.check_durability(allow_unsafe=settings.allow_unsafe_redis)
                await reconcile(store, engine, settings)
            complaint = ""
        except Exception as error:  # noqa: BLE001  # any fault of either store: said once, and tried again
            if complaint != repr(error):
                complaint = repr(error)
                log.warning("not reconciled", reason=complaint)
        await asyncio.sleep(RECONCILE_INTERVAL_SECONDS)


async def needs_reconciling(store: StateStore) -> bool:
    """Whether this run of Redis has a state that was not compared with history yet; one being rebuilt needs more."""
    async with store.client.pipeline(transaction=True) as pipeline:
        pipeline.info("server")
        pipeline.get(keys.STATE_RUN_ID)
        pipeline.hget(keys.STATE_EPOCH, "status")
        server, run_id, status = await pipeline.execute()
    return bool(status == b"ready" and (run_id or b"").decode() != server["run_id"])


async def reconcile(store: StateStore, engine: AsyncEngine, settings: Settings) -> None:
    """Let writes go again after a restart of Redis, in a new epoch that fences whoever wrote before it.

    Accounts of which Redis lost the newest changes are rolled forward from their rows of history. Raises
    ``StateMissing`` when Redis came up empty: that takes a ``rebuild``.
    """
    await renew_append_only_file(store)
    await wait_for_held_rows(store, engine)
    async with engine.begin() as connection:
        await lock_history(connection)
        token = await begin(store)
        run_id = (await store.client.info("server"))["run_id"]
        if keys.as_text(await store.client.get(keys.STATE_RUN_ID) or b"") == run_id:
            return
        if await store.client.hget(keys.STATE_EPOCH, "status") != b"ready":
            raise errors.StateMissing("Redis holds no state, or one that is being rebuilt", reason="state_missing")
        last_id = await _last_id(store)
        recorded = await newest_history_id(connection)
        if last_id < recorded:
            await _roll_forward(store, connection, settings, last_id=last_id, recorded=recorded)
        await advance_epoch(store, connection, token=token, reason=f"Redis restarted as {run_id}", run_id=run_id)
    log.info("reconciled with history", last_id=last_id, recorded=recorded)


async def renew_append_only_file(store: StateStore) -> None:
    """Have Redis write its file anew, from what it holds, before anything is added to it.

    A Redis whose last write was torn cuts its file off, and may do so within a transaction (6.2 and 7.0 do). It has not
    carried out the half that stays, but its next start will, with the first transaction written after it: a trade that
    nobody was told of would come back in pieces, under an id that another has by then. Raises ``StateUnreconciled``.
    """
    try:
        if not (await store.client.info("persistence"))["aof_enabled"]:
            return
        if (await store.client.info("replication"))["second_repl_offset"] >= 0:
            return  # a replica that was promoted has loaded no file
        await store.client.bgrewriteaof()
    except ResponseError as error:
        # One is under way; or the file is not ours to rewrite.
        if "in progress" not in str(error):
            log.warning("Redis does not let its file be written anew", reason=str(error))
            return
    while True:
        found = await store.client.info("persistence")
        if not found["aof_rewrite_in_progress"] and not found["aof_rewrite_scheduled"]:
            break
        await asyncio.sleep(REWRITE_POLL_SECONDS)
    if found["aof_last_bgrewrite_status"] != "ok":
        raise errors.StateUnreconciled("Redis cannot write its file anew", reason="state_unreconciled")


async def wait_for_held_rows(store: StateStore, engine: AsyncEngine) -> None:
    """Give processes that hold rows which Redis has lost the time to write them, before a new epoch fences them.

    A row is missing where an account's rows beyond Redis' seq do not follow each other. Its process is alive or it is
    not: after a while the account is taken as its newest row left it, and ``verify`` names the row that is missing.
    """
    deadline = asyncio.get_running_loop().time() + HELD_ROWS_SECONDS
    while True:
        async with engine.connect() as connection:
            changed = await _changed_since(connection, await _last_id(store))
            incomplete = []
            for account_id, (count, seq) in changed.items():
                if count >= seq:
                    continue
                known = int(await store.client.hget(keys.ledger_key(account_id), "seq") or 0)
                if count < seq - known:
                    incomplete.append(account_id)
        if not incomplete:
            return
        if asyncio.get_running_loop().time() > deadline:
            log.error("rows of history are lost; their accounts are taken as newer rows left them", accounts=incomplete)
            return
        await asyncio.sleep(HELD_ROWS_SECONDS / 20)


async def _roll_forward(
    store: StateStore, connection: AsyncConnection, settings: Settings, *, last_id: int, recorded: int
) -> None:
    """Bring Redis from ``last_id`` to ``recorded``. The counter moves last: a crash before that repeats the whole."""
    symbols = [contract.symbol for contract in settings.contracts]
    # Rows that Redis kept and Postgres lacks are older than those that roll an account forward.
    kept: Any = await store.client.xrange(keys.OUTBOX)
    rows, _ = rows_and_others(kept)
    await insert_history(connection, rows)
    changed = await _changed_since(connection, last_id)
    accounts = await restore.accounts_in_history(connection, sorted(changed))
    await restore.restore_some(store, accounts.values(), symbols)
    now = datetime.now(UTC)
    await restore.restore_operations(
        store,
        restore.operations_in_history(
            connection, since=now - timedelta(seconds=settings.operation_ttl_seconds), after_id=last_id
        ),
        now=now,
        seconds_kept=settings.operation_ttl_seconds,
        progress=lambda _stage, _count: None,
    )
    opened, ended = [
        await connection.scalar(select(func.count()).select_from(model).where(model.id > last_id)) or 0
        for model in (Liquidation, Recovery)
    ]
    version = max(int(await store.client.get(keys.MARK_VERSION) or 0), await newest_mark_version(connection))
    async with store.client.pipeline(transaction=True) as pipeline:
        pipeline.incrby(keys.LIQUIDATIONS, opened)
        pipeline.incrby(keys.RECOVERIES, ended)
        pipeline.set(keys.MARK_VERSION, version)
        pipeline.set(keys.HISTORY_LAST_ID, recorded)
        await pipeline.execute()
    log.warning("rolled forward from history", accounts=len(accounts), rows=recorded - last_id)


async def _changed_since(connection: AsyncConnection, last_id: int) -> dict[str, tuple[int, int]]:
    """The accounts with rows above ``last_id``: how many, and the largest seq."""
    changed: dict[str, tuple[int, int]] = {}
    for model in HISTORY.values():
        query = select(model.account_id, func.count(), func.max(model.seq)).where(model.id > last_id)
        for account_id, count, seq in (await connection.execute(query.group_by(model.account_id))).all():
            before = changed.get(account_id, (0, 0))
            changed[account_id] = (before[0] + count, max(before[1], seq))
    return changed


async def _last_id(store: StateStore) -> int:
    return int(await store.client.get(keys.HISTORY_LAST_ID) or 0)


async def lock_history(connection: AsyncConnection) -> None:
    """Keep every writer of history out until this transaction ends."""
    await connection.execute(text(f"SELECT pg_advisory_xact_lock({FENCE_LOCK})"))


async def newest_history_id(connection: AsyncConnection) -> int:
    """The largest id of any kind of history, 0 for none."""
    return max([await _largest(connection, model.id) for model in HISTORY.values()])


async def newest_mark_version(connection: AsyncConnection) -> int:
    """The largest mark version that any row was decided on, 0 for none."""
    return max([await _largest(connection, model.mark_version) for model in HISTORY.values()])


async def _largest(connection: AsyncConnection, column: InstrumentedAttribute[int]) -> int:
    """The largest value of ``column``, 0 where there is none."""
    return await connection.scalar(select(func.coalesce(func.max(column), 0))) or 0


async def _newest_epoch(stores: Stores) -> int:
    engine = database.create_maintenance_engine(stores.database_url)
    try:
        async with engine.connect() as connection:
            return await _largest(connection, Epoch.epoch)
    finally:
        await engine.dispose()


async def _migrate_state(settings: Settings, stores: Stores, *, after_epoch: int = 0) -> None:
    store, engine = StateStore(stores.redis_url, settings), database.create_maintenance_engine(stores.database_url)
    try:
        async with engine.begin() as connection:
            await lock_history(connection)
            token = await begin(store)
            signature = await store.client.hget(keys.STATE_EPOCH, "signature")
            run_id = (await store.client.info("server"))["run_id"]
            await store.check_durability(allow_unsafe=settings.allow_unsafe_redis)
            if signature is None:
                if await newest_history_id(connection):
                    raise errors.StateMissing(
                        "Postgres has history and Redis has no state: start Redis on its own data, run "
                        "`plimsoll rebuild` to restore it from history, or `plimsoll reset` to empty both",
                        reason="state_missing",
                    )
                await store.client.set(keys.HISTORY_LAST_ID, 0)
                await advance_epoch(
                    store,
                    connection,
                    token=token,
                    reason="made by migrate",
                    run_id=run_id,
                    after_epoch=after_epoch,
                )
            elif keys.as_text(signature) != store.signature:
                await advance_epoch(store, connection, token=token, reason="contracts or layout changed", run_id=None)
        if await needs_reconciling(store):
            await reconcile(store, engine, settings)
    finally:
        await store.close()
        await engine.dispose()


async def begin(store: StateStore) -> str:
    """Take over from whoever reconciled before; the token that ``advance_epoch`` wants. Call it under the lock.

    The lock ends with the commit in Postgres, before Redis hears of it. Who gets it next could be told that nothing
    was reconciled, and roll accounts back that trade again already; or the first one's late word could follow it.
    """
    token = uuid.uuid4().hex
    await store.client.set(keys.STATE_RECONCILER, token)
    return token


async def advance_epoch(
    store: StateStore,
    connection: AsyncConnection,
    *,
    token: str,
    reason: str,
    run_id: str | None,
    after_epoch: int = 0,
) -> None:
    """The next epoch, in Postgres first: what is still written in the old one is fenced from then on.

    Raises ``StateUnreconciled`` when another process has begun meanwhile: it is that one's part now.
    """
    epoch = max(await _largest(connection, Epoch.epoch), after_epoch) + 1
    await connection.execute(
        insert(Epoch).values(epoch=epoch, signature=store.signature, reason=reason, timestamp=datetime.now(UTC))
    )
    await connection.commit()
    async with store.client.pipeline(transaction=True) as pipeline:
        await pipeline.watch(keys.STATE_RECONCILER)
        if keys.as_text(await pipeline.get(keys.STATE_RECONCILER) or b"") != token:
            raise errors.StateUnreconciled("another process reconciles", reason="state_unreconciled")
        pipeline.multi()  # type: ignore[no-untyped-call]
        pipeline.hset(keys.STATE_EPOCH, mapping={"epoch": epoch, "status": "ready", "signature": store.signature})
        if run_id is not None:
            pipeline.set(keys.STATE_RUN_ID, run_id)
        try:
            await pipeline.execute()
        except WatchError as error:
            raise errors.StateUnreconciled("another process reconciles", reason="state_unreconciled") from error


async def _flush(settings: Settings, stores: Stores) -> None:
    store = StateStore(stores.redis_url, settings)
    try:
        await store.client.flushdb()
    finally:
        await store.close()
