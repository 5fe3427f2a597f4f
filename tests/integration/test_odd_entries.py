"""What somebody adds to the outbox by hand is put aside, and rows go on."""

from __future__ import annotations

import redis.asyncio

from app.embedded import Stores
from tests.integration.desk import Desk, differences, eventually, expect

PUT_ASIDE_WITHIN_SECONDS = 5.0


async def test_an_entry_that_somebody_adds_to_the_outbox_stops_no_commit_for_long(
    desk: Desk, redis_client: redis.asyncio.Redis, stores: Stores
) -> None:
    """Redis gives it the time for an id, far beyond those of rows, and a stream takes no id below its last one."""
    await desk.mark("50000")
    await desk.deposit("alice", "10000")
    await redis_client.xadd("outbox", {"what": "by hand"})
    assert expect(await desk.trade("alice", "buy", "0.1", "50000"), 503)["code"] == "outcome_unknown"

    async def is_booked_again() -> bool:
        return (await desk.trade("alice", "buy", "0.1", "50000")).status_code == 201

    await eventually(is_booked_again, "a trade to be booked", within_seconds=PUT_ASIDE_WITHIN_SECONDS)
    assert await redis_client.xlen("outbox:dead") == 1
    assert await differences(stores) == []
