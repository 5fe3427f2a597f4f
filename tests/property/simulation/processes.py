"""Simulated processes: the product's own booking, outbox and watchdog; each operation may crash or pause."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from app import database, errors, reconcile
from app import redis_client as keys
from app.booking import Booking
from app.config import Settings
from app.embedded import Stores
from app.history import FencedError, HistoryEntry
from app.models import HISTORY
from app.outbox import POSTGRES_ERRORS, Outbox, Waiting, entry_from_stream
from app.redis_client import StateStore
from tests.property.simulation.steps import CURRENT, Crash, Steps, Stop, Weather, between
from watchdog.audit import Audit
from watchdog.refresh import Refresher
from watchdog.sweep import Sweeper

TABLES: Final = (*(model.__tablename__ for model in HISTORY.values()), "epochs")
TURNS_TO_SETTLE: Final = 5


class DirectOutbox(Outbox):
    """The outbox without its two tasks: who records writes the rows itself, through the same code."""

    async def record(self, entries: Sequence[HistoryEntry]) -> bool:
        """As the writer's task does it, one batch at a time."""
        recorded = True
        try:
            recorded = not await self._write(entries, epoch=entries[0].epoch)
        except FencedError:
            loop = asyncio.get_running_loop()
            waiting = Waiting(entries, loop.create_future(), loop.time())
            await self._write_again([waiting])
            recorded = await waiting.answer
        except (*POSTGRES_ERRORS, errors.PlimsollError, RedisError):
            return False
        await between("delete | answer")
        return recorded


class SimulatedProcess:
    """An API or a watchdog: what it has in memory dies with it."""

    def __init__(self, arena: Arena) -> None:
        self.store = StateStore(arena.stores.redis_url, arena.settings)
        self.outbox = DirectOutbox(self.store, arena.engine, arena.settings)
        self.booking = Booking(self.store, self.outbox, arena.settings)
        self.sweeper = Sweeper(self.booking, Refresher(self.booking))
        self.audit = Audit(self.booking)

    async def sweep(self) -> None:
        """One sweep, as the watchdog's loop makes it."""
        self.sweeper.swept = await self.sweeper._sweep()


@dataclass(slots=True)
class Ended:
    """How an operation of a simulated process went: its answer, its error, a crash, or where it is paused."""

    steps: Steps
    process: SimulatedProcess
    task: asyncio.Task[Any]

    @property
    def paused(self) -> bool:
        """Whether it waits to be resumed or killed."""
        return not self.task.done()

    @property
    def error(self) -> BaseException | None:
        """What it ended with, if not with an answer."""
        return self.task.exception()

    @property
    def crashed(self) -> bool:
        """Whether its process is gone."""
        return isinstance(self.error, Crash)


@dataclass(slots=True)
class Arena:
    """The real stores that every example runs on, cleaned in between, and what all examples count together."""

    loop: asyncio.AbstractEventLoop
    stores: Stores
    settings: Settings
    engine: AsyncEngine
    owner: AsyncEngine
    redis: Redis
    store: StateStore
    weather: Weather = field(default_factory=Weather)
    crashes: Counter[tuple[str, str]] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    unchanged: Counter[str] = field(default_factory=Counter)
    examples: int = 0

    @classmethod
    async def open(cls, stores: Stores) -> Arena:
        """Connect to the stores of a test."""
        # Chunks so small that a watchdog keeps its columns and reads what changed.
        settings = Settings(redis_url=stores.redis_url, database_url=stores.database_url, sweep_chunk_accounts=1)
        return cls(
            loop=asyncio.get_running_loop(),
            stores=stores,
            settings=settings,
            engine=database.create_engine(stores.database_url),
            owner=database.create_engine(stores.owner_url),
            redis=Redis.from_url(stores.redis_url),
            store=StateStore(stores.redis_url, settings),
        )

    async def close(self) -> None:
        """Close the connections of the arena itself."""
        await self.redis.aclose()
        await self.store.close()
        await self.engine.dispose()
        await self.owner.dispose()

    async def clean(self) -> None:
        """Empty both stores and make a new state."""
        self.examples += 1
        self.weather.postgres_away = False
        self.weather.written.clear()
        await self.redis.flushdb()
        async with self.owner.begin() as connection:
            # History is immutable; only the owner of the server may set its triggers aside.
            await connection.execute(text("SET LOCAL session_replication_role = replica"))
            for table in TABLES:
                await connection.execute(text(f"DELETE FROM {table}"))
        await self.redis.set(keys.HISTORY_LAST_ID, 0)
        run_id = (await self.redis.info("server"))["run_id"]
        async with self.engine.connect() as connection:
            token = await reconcile.begin(self.store)
            await reconcile.advance_epoch(self.store, connection, token=token, reason="simulated", run_id=run_id)

    async def start(self) -> SimulatedProcess:
        """Start a process."""
        return SimulatedProcess(self)

    async def perform(
        self, doing: str, process: SimulatedProcess, operation: Callable[[], Awaitable[Any]], stop: Stop | None
    ) -> Ended:
        """Run one operation of ``process`` until it ends, crashes or pauses as ``stop`` says."""
        steps = Steps(doing, stop, self.crashes)

        async def main() -> Any:  # noqa: ANN401 - whatever the operation answers
            CURRENT.set(steps)
            return await operation()

        task = asyncio.create_task(main())
        paused = asyncio.create_task(steps.paused.wait())
        await asyncio.wait({task, paused}, return_when=asyncio.FIRST_COMPLETED)
        paused.cancel()
        ended = Ended(steps, process, task)
        await self.settle(ended)
        return ended

    async def finish(self, ended: Ended, *, kill: bool) -> None:
        """Resume or kill a paused operation, and see it end."""
        if kill:
            ended.steps.kill()
        else:
            ended.steps.resume()
        await asyncio.wait({ended.task})
        await self.settle(ended)

    @staticmethod
    async def settle(ended: Ended) -> None:
        """Let calls that were sent arrive: the other verdicts of a sweep that crashed, rows that are deleted."""
        for _ in range(TURNS_TO_SETTLE):
            await asyncio.sleep(0)
        while ended.steps.calls_under_way or ended.process.store.batcher._pipelines:
            await asyncio.sleep(0)
        for _ in range(TURNS_TO_SETTLE):
            await asyncio.sleep(0)
        await ended.process.store.batcher.close()

    async def fingerprint(self) -> tuple[Any, ...]:
        """What differs after every step that changed one of the stores."""
        async with self.redis.pipeline(transaction=True) as pipeline:
            pipeline.get(keys.HISTORY_LAST_ID)
            pipeline.get(keys.MARK_VERSION)
            pipeline.hget(keys.STATE_EPOCH, "epoch")
            pipeline.xlen(keys.OUTBOX)
            answers = await pipeline.execute()
        return (*answers, len(self.weather.written))

    async def waiting(self) -> list[HistoryEntry]:
        """What the outbox holds, in stream order."""
        found: Any = await self.redis.xrange(keys.OUTBOX)
        return [entry_from_stream(entry_id, fields) for entry_id, fields in found]

    async def rows(self, query: str) -> list[tuple[Any, ...]]:
        """The rows of a query on history."""
        async with self.engine.connect() as connection:
            return [tuple(row) for row in (await connection.execute(text(query))).all()]
