"""A Redis whose last write was torn by a power cut: half a transaction at the end of its file must never come back."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from app import reconcile
from app.config import Settings
from app.embedded_redis import RedisServer
from app.redis_client import StateStore

TRANSACTION = "redis.call('SET', KEYS[1], '1') redis.call('SET', KEYS[2], '1') return 1"


@pytest.fixture
def server() -> Iterator[RedisServer]:
    directory = Path(tempfile.mkdtemp(prefix="plimsoll-"))  # short, for its socket's sake
    found = RedisServer(directory)
    found.start()
    yield found
    found.stop()
    shutil.rmtree(directory, ignore_errors=True)


async def kill(server: RedisServer) -> None:
    assert server.process is not None
    server.process.send_signal(signal.SIGKILL)
    await asyncio.to_thread(server.process.wait, 5.0)


async def test_half_a_transaction_is_not_carried_out_by_the_start_after_next(server: RedisServer) -> None:
    path = server.directory / "appendonly.aof"
    store = StateStore(server.url, Settings())
    try:
        await store.client.set("whole", "1")
        await store.client.eval(TRANSACTION, 2, "torn:first", "torn:second")
        await kill(server)
        # Redis cuts off the second SET, of which something is there, and lets the first stay without its EXEC.
        os.truncate(path, path.read_bytes().index(b"torn:second"))
        await asyncio.to_thread(server.start)
        assert await store.client.keys() == [b"whole"]
        assert b"torn:first" in path.read_bytes()

        await reconcile.renew_append_only_file(store)
        await store.client.eval(TRANSACTION, 2, "next:first", "next:second")
        await kill(server)
        await asyncio.to_thread(server.start)
        assert sorted(await store.client.keys()) == [b"next:first", b"next:second", b"whole"]
    finally:
        await store.close()
