"""What runs in the background stops when it is told to, whatever it is in the middle of."""

from __future__ import annotations

import asyncio
import time

import pytest

from app import database, outbox
from app.config import Settings
from app.embedded import Stores
from app.outbox import Outbox
from app.redis_client import StateStore

DRAIN_INTERVAL_SECONDS = 0.01
LOOP_TURNS_OF_A_DRAIN = 12
STOP_SECONDS = 2.0


async def test_an_outbox_stops_in_whichever_turn_of_the_loop_its_drain_is_told_to(
    stores: Stores, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Python 3.11 ``asyncio.wait_for``, with which redis-py sends, swallows a cancellation that comes as it ends."""
    monkeypatch.setattr(outbox, "DRAIN_INTERVAL_SECONDS", DRAIN_INTERVAL_SECONDS)
    store, engine = StateStore(stores.redis_url, settings), database.create_engine(stores.database_url)
    never_stopped = []
    for turns in range(LOOP_TURNS_OF_A_DRAIN):
        running = Outbox(store, engine, settings)
        await running.start()
        await asyncio.sleep(DRAIN_INTERVAL_SECONDS / 2)
        # The loop is late, so that the drain begins in its next turn.
        time.sleep(DRAIN_INTERVAL_SECONDS)  # noqa: ASYNC251 - to block the loop is the point
        for _ in range(turns):
            await asyncio.sleep(0)
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await running.stop()
        except TimeoutError:
            never_stopped.append(turns)
    await store.close()
    await engine.dispose()
    assert never_stopped == []
