"""A cell: one Redis and one database of its own, and API and watchdog processes on them, each to be killed alone."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from signal import Signals
from typing import Final

import asyncpg
import httpx
import orjson
import redis.asyncio
from redis.exceptions import RedisError

from app import reconcile
from app import redis_client as keys
from app.config import Settings
from app.embedded import Servers, Stores
from app.embedded_redis import RedisServer
from app.sentinel import connection_pool
from tests.conftest import in_database_of
from tests.faults.zygote import Zygote
from tests.harness import free_port, tail

PATIENCE_SECONDS: Final = 20.0
CONNECTIONS_MAX: Final = 32
POLL_SECONDS: Final = 0.02
STUTTER_SECONDS: Final = 0.1


@dataclass(slots=True)
class Worker:
    """One API or watchdog process."""

    kind: str
    pid: int
    url: str
    log: Path


@dataclass
class Cell:
    """``overrides`` are settings of every process started from here, by their names in lower case."""

    directory: Path
    redis: RedisServer
    stores: Stores
    zygote: Zygote
    overrides: dict[str, str] = field(default_factory=dict)
    apis: list[Worker] = field(default_factory=list)
    watchdogs: list[Worker] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.http = httpx.AsyncClient(
            timeout=httpx.Timeout(15, connect=2),
            limits=httpx.Limits(max_connections=200, max_keepalive_connections=100),
            trust_env=False,
        )
        self._living: set[int] = set()
        self.client = redis.asyncio.Redis(
            connection_pool=connection_pool(
                self.stores.redis_url, max_connections=CONNECTIONS_MAX, timeout_seconds=PATIENCE_SECONDS
            )
        )
        self._started = 0

    def settings(self, **more: object) -> Settings:
        """The settings of a process of this cell."""
        return Settings(
            redis_url=self.stores.redis_url,
            database_url=self.stores.database_url,
            data_dir=self.directory,
            **{**self.overrides, **more},  # type: ignore[arg-type]
        )

    def start_worker(self, kind: str, **more: str) -> Worker:
        """Start an ``api`` or a ``watchdog`` and do not wait for it."""
        port, number = free_port(), self._started
        self._started += 1
        variables = {
            "REDIS_URL": self.stores.redis_url,
            "DATABASE_URL": self.stores.database_url,
            "DATA_DIR": str(self.directory),
            "WATCHDOG_HOST": "127.0.0.1",
            "WATCHDOG_PORT": str(port),
            **self.overrides,
            **more,
        }
        log = self.directory / f"{kind}-{number}.log"
        pid = self.zygote.start(
            kind, port, log, {f"PLIMSOLL_{name.upper()}": value for name, value in variables.items()}
        )
        self._living.add(pid)
        worker = Worker(kind, pid, f"http://127.0.0.1:{port}", log)
        (self.apis if kind == "api" else self.watchdogs).append(worker)
        return worker

    async def start(self, kind: str, **more: str) -> Worker:
        """Start one and wait until it is ready."""
        worker = self.start_worker(kind, **more)
        await self.ready(worker)
        return worker

    async def ready(self, worker: Worker) -> float:
        """Wait for ``/health/ready``; how many seconds it took."""
        return await until(lambda: self._is_ready(worker), f"{worker.kind} is not ready", self.logs)

    async def _is_ready(self, worker: Worker) -> bool:
        try:
            return (await self.http.get(f"{worker.url}/health/ready", timeout=2)).is_success
        except httpx.TransportError:
            return False

    def kill(self, worker: Worker) -> None:
        """SIGKILL."""
        self.forget(worker)
        self._living.discard(worker.pid)
        self.zygote.kill(worker.pid)

    def is_running(self, worker: Worker) -> bool:
        """Whether it has not exited by itself."""
        return self.zygote.is_running(worker.pid)

    def forget(self, worker: Worker) -> None:
        """Send it no more requests."""
        for group in (self.apis, self.watchdogs):
            if worker in group:
                group.remove(worker)

    def signal(self, worker: Worker, number: Signals) -> None:
        """Send a signal to one process."""
        os.kill(worker.pid, number)

    def signal_redis(self, number: Signals) -> None:
        """Send a signal to Redis."""
        assert self.redis.process is not None
        os.kill(self.redis.process.pid, number)

    async def stutter(self, random: Random) -> None:
        """Let reads pile up, and answer them: what comes next finds their commits under way."""
        self.signal_redis(Signals.SIGSTOP)
        await asyncio.sleep(STUTTER_SECONDS)
        self.signal_redis(Signals.SIGCONT)
        await asyncio.sleep(random.uniform(0, 0.005))

    async def kill_redis(self) -> None:
        """SIGKILL to Redis, gone when this returns."""
        process = self.redis.process
        assert process is not None
        process.send_signal(Signals.SIGKILL)
        await asyncio.to_thread(process.wait, 5.0)

    async def start_redis(self) -> None:
        """Start Redis on whatever its directory holds."""
        await asyncio.to_thread(self.redis.start)

    async def postgres(self, query: str, *arguments: object) -> list[asyncpg.Record]:
        """The rows of one query, over a connection of the test's own."""
        connection = await asyncpg.connect(self.stores.database_url)
        try:
            return list(await connection.fetch(query, *arguments))
        finally:
            await connection.close()

    async def drained(self) -> float:
        """Wait until no history waits in Redis; how many seconds it took."""

        async def is_empty() -> bool:
            try:
                return await self.client.xlen(keys.OUTBOX) == 0
            except (RedisError, OSError):
                return False

        return await until(is_empty, "the outbox is not empty", self.logs)

    def slowest_request_seconds(self) -> float:
        """The longest that an API process took over a request; each that failed or was slow is in its log.

        As the server has it: a client that shares two cores with other rows may wait for itself.
        """
        lines = [line for log in self.directory.glob("api-*.log") for line in log.read_bytes().splitlines()]
        requests = [orjson.loads(line) for line in lines if b'"milliseconds"' in line]
        return max((request["milliseconds"] / 1000 for request in requests), default=0.0)

    def logs(self) -> str:
        """The ends of the logs."""
        return "\n".join(tail(log) for log in sorted(self.directory.glob("*.log"))[-8:])

    async def close(self) -> None:
        """Kill the processes and stop Redis."""
        for pid in self._living:
            self.zygote.kill(pid)
        await self.http.aclose()
        await self.client.aclose()
        if self.redis.process is not None:
            self.redis.process.send_signal(Signals.SIGCONT)
        if self.redis.is_running():
            await asyncio.to_thread(self.redis.stop)


async def until(condition: Callable[[], Awaitable[bool]], complaint: str, logs: Callable[[], str] = str) -> float:
    """Poll until ``condition`` holds, and answer the seconds that took; fail with ``complaint`` and the logs."""
    started = time.monotonic()
    while not await condition():
        if time.monotonic() - started > PATIENCE_SECONDS:
            raise AssertionError(f"{complaint} after {PATIENCE_SECONDS:g} s\n{logs()}")
        await asyncio.sleep(POLL_SECONDS)
    return time.monotonic() - started


async def has_died(running: Cell, worker: Worker) -> bool:
    """Whether a process has died by itself."""
    return not running.is_running(worker)


def history_in(servers: Servers, name: str) -> Stores:
    """The database of that name on ``servers``, and no Redis."""
    return replace(in_database_of(servers, name), redis_url="")


@asynccontextmanager
async def open_cell(directory: Path, stores: Stores, zygote: Zygote, **overrides: str) -> AsyncIterator[Cell]:
    """A running cell on the empty stores given; without an address of Redis it gets its own under ``directory``."""
    state = RedisServer(directory)
    if not stores.redis_url:
        await asyncio.to_thread(state.start)
        stores = replace(stores, redis_url=state.url)
    cell = Cell(directory, state, stores, zygote, dict(overrides))
    try:
        await asyncio.to_thread(reconcile.migrate, cell.settings(), cell.stores)
        yield cell
    finally:
        await cell.close()
