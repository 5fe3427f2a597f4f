"""Where a bench runs: embedded Redis and Postgres in a directory of their own, and real processes of the product."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import asyncpg
from redis.asyncio import Redis

from app import database, reconcile
from app.booking import Booking
from app.embedded import start_servers
from app.outbox import Outbox
from app.redis_client import StateStore
from tests.harness import System

SCRATCH: Final = Path("/tmp/bench")  # noqa: S108 - a short path, as unix sockets need; each stage has its own inside
POLL_SECONDS: Final = 0.1


@asynccontextmanager
async def stage(name: str) -> AsyncIterator[System]:
    """Fresh stores, migrated, as ``plimsoll up`` starts them.

    Everything is stopped and removed at the end; the logs are shown if something failed.
    """
    SCRATCH.mkdir(exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=SCRATCH))
    try:
        servers = await asyncio.to_thread(start_servers, directory / "d")
        try:
            system = System(servers.stores, directory)
            await asyncio.to_thread(reconcile.migrate, system.settings(), servers.stores)
            try:
                yield system
            except BaseException:
                print(system.logs(), flush=True)  # noqa: T201 - with the failure
                raise
            finally:
                await system.stop()
        finally:
            await asyncio.to_thread(servers.stop)
    finally:
        shutil.rmtree(directory)


@asynccontextmanager
async def booking_on(system: System, **more: object) -> AsyncIterator[Booking]:
    """The product's own booking in this process, to prepare what is measured."""
    settings = system.settings(**more)
    store = StateStore(system.stores.redis_url, settings)
    engine = database.create_engine(system.stores.database_url)
    outbox = Outbox(store, engine, settings)
    await outbox.start()
    try:
        if await reconcile.needs_reconciling(store):
            await reconcile.reconcile(store, engine, settings)
        yield Booking(store, outbox, settings)
    finally:
        await outbox.stop()
        await store.close()
        await engine.dispose()


async def settle(system: System, client: Redis) -> None:
    """Have what was written in bulk on disk, and tidied up, before anything is measured.

    Else both servers do so, unasked, in the middle of what is measured.
    """
    connection = await asyncpg.connect(system.stores.owner_url)
    try:
        await connection.execute("VACUUM ANALYZE")
        await connection.execute("CHECKPOINT")
    finally:
        await connection.close()
    await client.bgrewriteaof()
    while (await client.info("persistence"))["aof_rewrite_in_progress"]:
        await asyncio.sleep(POLL_SECONDS)
    await asyncio.to_thread(os.sync)


async def require_durable(client: Redis) -> str:
    """How Redis keeps what it is told, in its own words. Raises ``RuntimeError`` unless every write is synced."""
    found = {name: (await client.config_get(name))[name] for name in ("appendonly", "appendfsync")}
    if found != {"appendonly": "yes", "appendfsync": "always"}:
        raise RuntimeError(f"a bench of durable trades runs on an append-only file synced always, not {found}")
    return "appendonly yes, appendfsync always"
