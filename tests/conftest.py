"""Fixtures: real Redis and Postgres, clean for each test, and real API and watchdog processes on them."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Final, Protocol

import asyncpg
import psycopg2
import pytest
import redis
import redis.asyncio
from sqlalchemy.engine import make_url

from app import reconcile
from app.config import Settings
from app.database import migrate
from app.embedded import Servers, Stores, start_servers
from tests.harness import System

TEMPLATE_DATABASE: Final = "plimsoll_template"

_reports = pytest.StashKey[dict[str, pytest.TestReport]]()
_database_numbers = itertools.count(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember how a test went, for the fixture that shows the logs of a failed one."""
    report = yield
    item.stash.setdefault(_reports, {})[report.when] = report
    return report


@pytest.fixture(autouse=True)
def _no_settings_of_the_developer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ``PLIMSOLL_...`` variable of the shell changes no test."""
    for name in [name for name in os.environ if name.startswith(("PLIMSOLL_", "PROMETHEUS_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """An empty directory with a path short enough for unix sockets; removed afterwards."""
    path = Path(tempfile.mkdtemp(prefix="plimsoll-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """One Redis and one Postgres for the whole run. Stop or damage :func:`own_servers` instead of these."""
    path = Path(tempfile.mkdtemp(prefix="plimsoll-"))
    try:
        with start_servers(path) as running:
            yield running
    finally:
        shutil.rmtree(path)


@pytest.fixture
def own_servers(data_dir: Path) -> Iterator[Servers]:
    """A Redis and a Postgres of this test's own, empty, to kill and restart."""
    with start_servers(data_dir) as running:
        yield running


@pytest.fixture(scope="session")
def template_database(servers: Servers) -> str:
    """A database with all tables and no rows, made once and copied for each test."""
    execute(servers.database_url, f"CREATE DATABASE {TEMPLATE_DATABASE}")
    migrate(in_database(servers.database_url, TEMPLATE_DATABASE))
    return TEMPLATE_DATABASE


@pytest.fixture
def stores(servers: Servers, template_database: str, tmp_path: Path) -> Iterator[Stores]:
    """Clean stores: tables without rows, and a Redis that holds its epoch and nothing else."""
    with closing(redis.Redis.from_url(servers.redis_url)) as client:
        client.flushall()
    name = f"plimsoll_test_{next(_database_numbers)}"
    execute(servers.database_url, f"CREATE DATABASE {name} TEMPLATE {template_database}")
    clean = in_database_of(servers, name)
    reconcile.migrate(
        Settings(redis_url=clean.redis_url, database_url=clean.database_url, data_dir=tmp_path),
        clean,
    )
    yield clean
    execute(servers.database_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def settings(stores: Stores, tmp_path: Path) -> Settings:
    """The default settings, on the clean stores."""
    return Settings(redis_url=stores.redis_url, database_url=stores.database_url, data_dir=tmp_path)


class SystemFactory(Protocol):
    """Start API and watchdog processes on clean stores."""

    async def __call__(self, *, api_workers: int = 1, watchdogs: int = 1, **overrides: str) -> System:
        """``overrides`` are settings by their name in lower case: ``sweep_interval_seconds="60"``."""


@pytest.fixture
async def system(stores: Stores, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[SystemFactory]:
    """A factory of running systems; what it started is stopped afterwards, its logs shown if the test failed."""
    started: list[System] = []

    async def start(*, api_workers: int = 1, watchdogs: int = 1, **overrides: str) -> System:
        directory = tmp_path / f"system-{len(started)}"
        directory.mkdir()
        running = System(stores, directory, dict(overrides))
        started.append(running)
        processes = [await running.start_watchdog(wait=False) for _ in range(watchdogs)]
        if api_workers:
            processes.append(await running.start_api(workers=api_workers, wait=False))
        for process in processes:
            await process.wait_until_ready()
        return running

    yield start
    reports = request.node.stash.get(_reports, {})
    if any(report.failed for report in reports.values()):
        for running in started:
            print(running.logs())  # noqa: T201 - shown by pytest with the failure
    for running in started:
        await running.stop()


@pytest.fixture
async def redis_client(stores: Stores) -> AsyncIterator[redis.asyncio.Redis]:
    """The test's own connection to Redis, answering text."""
    async with redis.asyncio.Redis.from_url(stores.redis_url, decode_responses=True) as client:
        yield client


@pytest.fixture
async def postgres(stores: Stores) -> AsyncIterator[asyncpg.Connection]:
    """The test's own connection to Postgres, as the owner of everything."""
    connection = await asyncpg.connect(stores.owner_url)
    yield connection
    await connection.close()


def in_database(database_url: str, name: str) -> str:
    """The same server, another database."""
    return make_url(database_url).set(database=name).render_as_string(hide_password=False)


def in_database_of(servers: Servers, name: str) -> Stores:
    """The stores of ``servers`` with another database, which the service uses as the role it is made for."""
    return Stores(
        servers.redis_url,
        database_url=in_database(servers.postgres.url, name),
        migrations_url=in_database(servers.postgres.owner_url, name),
    )


def execute(database_url: str, statement: str) -> None:
    """Run one statement outside of any transaction."""
    with closing(psycopg2.connect(database_url)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
