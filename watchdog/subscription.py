"""The subscription: every message on ``mark_price`` asks for a sweep, and so does every time it had to be made anew.

A message is a hint. A connection that broke may have lost any number of them without an error, so each (re)subscribe
asks for a full sweep, and the timer covers the rest.
"""

from __future__ import annotations

import asyncio
from typing import Final

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.redis_client import MARK_CHANNEL
from watchdog.sweep import Sweeper

RECONNECT_SECONDS: Final = 0.2
POLL_SECONDS: Final = 5.0

log = structlog.get_logger(__name__)


async def listen(client: Redis, sweeper: Sweeper) -> None:
    """Turn messages into requests for a sweep, over as many connections as it takes, until cancelled."""
    while True:
        try:
            async with client.pubsub() as subscription:
                await subscription.subscribe(MARK_CHANNEL)
                while True:
                    message = await subscription.get_message(ignore_subscribe_messages=False, timeout=POLL_SECONDS)
                    if message is None:
                        continue
                    if message["type"] == "subscribe":
                        sweeper.notify("subscribe")
                    elif message["type"] == "message":
                        sweeper.notify("mark")
        except (RedisError, OSError) as error:
            log.warning("the subscription broke", error=repr(error))
            await asyncio.sleep(RECONNECT_SECONDS)
