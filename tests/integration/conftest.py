"""Fixtures of the acceptance tests: a desk at an API in this process, or at a whole system of processes.

The ``shared_`` ones live as long as a module. Its tests keep apart by the names of their accounts, set the mark they
need themselves, and use none of the fixtures on stores of a single test.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import asyncpg
import pytest
import pytest_asyncio
import redis
import redis.asyncio

from app import reconcile
from app.config import Settings
from app.embedded import Servers, Stores
from tests.conftest import execute, in_database_of
from tests.harness import System
from tests.integration.desk import Desk, api_in_this_process, new_key

_database_numbers: Final = itertools.count(1)


class DeskFactory(Protocol):
    """Open the API in this process with some settings, on the test's clean stores."""

    async def __call__(self, **overrides: str) -> Desk:
        """``overrides`` are settings by their name in lower case."""


@pytest.fixture
async def open_desk(stores: Stores) -> AsyncIterator[DeskFactory]:
    """A factory of desks at an API in this process."""
    async with AsyncExitStack() as opened:

        async def open_one(**overrides: str) -> Desk:
            api = api_in_this_process(stores, **overrides)  # type: ignore[arg-type]  # settings only
            return Desk(await opened.enter_async_context(api))

        yield open_one


@pytest.fixture
async def desk(open_desk: DeskFactory) -> Desk:
    """A desk at an API in this process, with the default settings. No watchdog runs."""
    return await open_desk()


class KeyMaker(Protocol):
    """Make an API key in the test's stores."""

    async def __call__(self, *scopes: str, accounts: Sequence[str] = ("*",)) -> str:
        """What is sent as ``Authorization: Bearer …``; see ``bearer``."""


@pytest.fixture
def make_key(stores: Stores) -> KeyMaker:
    """A maker of API keys, for an API with ``auth="on"``."""
    return partial(new_key, stores)


@pytest.fixture(scope="module")
def shared_stores(servers: Servers, template_database: str) -> Iterator[Stores]:
    """Stores that were clean when the module began."""
    with closing(redis.Redis.from_url(servers.redis_url)) as client:
        client.flushall()
    name = f"plimsoll_module_{next(_database_numbers)}"
    execute(servers.database_url, f"CREATE DATABASE {name} TEMPLATE {template_database}")
    stores = in_database_of(servers, name)
    reconcile.migrate(Settings(redis_url=stores.redis_url, database_url=stores.database_url), stores)
    yield stores
    execute(servers.database_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_desk(shared_stores: Stores) -> AsyncIterator[Desk]:
    """A desk at an API in this process. No watchdog runs."""
    async with api_in_this_process(shared_stores) as client:
        yield Desk(client)


@asynccontextmanager
async def processes(stores: Stores, *, api: bool) -> AsyncIterator[System]:
    """A watchdog, and an API or not, as processes with the default settings."""
    with tempfile.TemporaryDirectory(prefix="plimsoll-") as directory:
        running = System(stores, Path(directory))
        started = [await running.start_watchdog(wait=False)]
        try:
            if api:
                started.append(await running.start_api(wait=False))
            for process in started:
                await process.wait_until_ready()
            yield running
        finally:
            print(running.logs())  # noqa: T201 - pytest shows it with a failure
            # Beside the loop, which an API in this process goes on using.
            for process in started:
                await asyncio.to_thread(process.terminate)
            await running.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_system(shared_stores: Stores) -> AsyncIterator[System]:
    """One API and one watchdog."""
    async with processes(shared_stores, api=True) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def watched_desk(shared_desk: Desk, shared_stores: Stores) -> AsyncIterator[Desk]:
    """A desk at an API in this process, while one watchdog runs with the default settings."""
    async with processes(shared_stores, api=False):
        yield shared_desk


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_redis(shared_stores: Stores) -> AsyncIterator[redis.asyncio.Redis]:
    """The module's own connection to Redis, answering text."""
    async with redis.asyncio.Redis.from_url(shared_stores.redis_url, decode_responses=True) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_postgres(shared_stores: Stores) -> AsyncIterator[asyncpg.Connection]:
    """The module's own connection to Postgres, as the owner of everything."""
    connection = await asyncpg.connect(shared_stores.owner_url)
    yield connection
    await connection.close()
