"""Rate limits of API keys, counted in Redis for all workers together.

The counters are ``limits``' own, under ``limits:`` and gone two seconds after the last request. They are counted apart
from the state: on connections of their own, and while Redis does not answer each worker counts for itself.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Final

import structlog
from limits import RateLimitItem, RateLimitItemPerSecond
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.storage.redis.bridge import RedisBridge
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from app import errors
from app.batcher import Batcher
from app.redis_client import RATE_LIMIT_PREFIX
from app.sentinel import connection_pool

CONNECTIONS_MAX: Final = 2
TIMEOUT_SECONDS: Final = 0.2
AWAY_SECONDS: Final = 1.0
"""How long a worker counts for itself before it asks a Redis that did not answer again."""

log = structlog.get_logger(__name__)


class BatchedStorage(RedisStorage):
    """``limits``' storage in Redis, its one call a request sent through our batcher.

    Through redis-py a call took 82 µs of processor time at 64 at once, through the batcher 19.
    """

    def __init__(self, redis_url: str) -> None:
        pool = connection_pool(
            redis_url,
            max_connections=CONNECTIONS_MAX,
            timeout_seconds=TIMEOUT_SECONDS,
            socket_timeout=TIMEOUT_SECONDS,
            socket_connect_timeout=TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )
        # The pool says where Redis is; an address of its own the library only reads.
        super().__init__(
            "redis://localhost:6379",
            implementation="redispy",
            key_prefix=RATE_LIMIT_PREFIX,
            connection_pool=pool,  # type: ignore[arg-type]  # its documented option
        )
        self._pool = pool
        self._batcher = Batcher(pool, timeout_seconds=TIMEOUT_SECONDS)
        self._sha = hashlib.sha1(RedisBridge.SCRIPT_ACQUIRE_SLIDING_WINDOW, usedforsecurity=False).hexdigest()

    async def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Count ``amount``, unless it would be more than ``limit`` in ``expiry`` seconds. Raises redis-py's errors."""
        windows = (self._previous_window_key(key), self._current_window_key(key))
        counters = [self.bridge.prefixed_key(name) for name in windows]
        script = RedisBridge.SCRIPT_ACQUIRE_SLIDING_WINDOW
        return bool(await self._batcher.evaluate(self._sha, script, counters, (limit, expiry, amount)))

    async def close(self) -> None:
        """Wait for the calls under way, and close the connections."""
        await self._batcher.close()
        await self._pool.disconnect()


class RateLimits:
    """How many requests a second one key may send to one route: a limit for those that read, one for the others."""

    def __init__(self, redis_url: str, *, reads_per_second_max: int, writes_per_second_max: int) -> None:
        self._reads = RateLimitItemPerSecond(reads_per_second_max)
        self._writes = RateLimitItemPerSecond(writes_per_second_max)
        self._storage = BatchedStorage(redis_url)
        self._shared = SlidingWindowCounterRateLimiter(self._storage)
        self._own = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._away_until = float("-inf")

    async def count(self, key_id: str, route: str, *, reads: bool) -> None:
        """Count one request. Raises ``RateLimited`` for one too many."""
        item = self._reads if reads else self._writes
        if not await self._hit(item, key_id, route):
            raise errors.RateLimited(
                f"more than {item.amount} requests a second to {route} with this key", limit_per_second=item.amount
            )

    async def _hit(self, item: RateLimitItem, key_id: str, route: str) -> bool:
        now = asyncio.get_running_loop().time()
        if now >= self._away_until:
            try:
                return await self._shared.hit(item, key_id, route)
            except (RedisError, OSError) as error:
                log.warning("rate limits are counted by each worker for itself", error=repr(error))
                self._away_until = now + AWAY_SECONDS
        return await self._own.hit(item, key_id, route)

    async def close(self) -> None:
        """Close the connections to Redis."""
        await self._storage.close()
