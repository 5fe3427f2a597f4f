"""Fixtures of the fault tests: rounds, the seed, cells, and the table that all rows end in."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random, SystemRandom
from typing import Final, Protocol

import pytest

from app.embedded import Servers
from tests.conftest import execute, in_database
from tests.faults.cell import Cell, open_cell
from tests.faults.journal import Row, table
from tests.faults.zygote import Zygote
from tests.harness import environment

SHORT: Final = os.environ.get("PLIMSOLL_FAULTS_ROUNDS") == "short"
SEED: Final = int(os.environ.get("PLIMSOLL_FAULTS_SEED") or SystemRandom().randrange(10**6))
TABLE: Final = os.environ.get("PLIMSOLL_FAULTS_TABLE")
TEST_SECONDS_MAX: Final = 400

_rows = pytest.StashKey[list[Row]]()
_numbers = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is a fault test, and may take its time."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)
            item.add_marker(pytest.mark.timeout(TEST_SECONDS_MAX))


def pytest_report_header() -> str:
    """The seed, which repeats the run."""
    return f"faults: PLIMSOLL_FAULTS_SEED={SEED}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table, and keep it where it was asked for."""
    rows = config.stash.get(_rows, [])
    if not rows:
        return
    terminalreporter.section(f"faults, PLIMSOLL_FAULTS_SEED={SEED}")
    terminalreporter.write_line(table(rows))
    for row in rows:
        for reason in row.reasons()[:5]:
            terminalreporter.write_line(f"{row.fault}: {reason[:200]}")
    if TABLE:
        page = Path(__file__).with_name("reliability.md.in").read_text()
        Path(TABLE).write_text(page.replace("@TABLE@", table(rows)))


@pytest.fixture
def rounds() -> Callable[[int, int], int]:
    """How many rounds: the first number in full, the second in the short form."""
    return lambda full, short: short if SHORT else full


@pytest.fixture
def seed() -> int:
    """The seed of the run."""
    return SEED


@pytest.fixture
def random(request: pytest.FixtureRequest) -> Random:
    """A generator of this test's own, from the seed of the run."""
    return Random(f"{SEED} {request.node.name}")


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Callable[[str, str], Row]:
    """Make a row of the table; it is shown red if the test fails before its end."""

    def make(fault: str, what: str) -> Row:
        made = Row(fault, what)
        request.config.stash.setdefault(_rows, []).append(made)
        return made

    return make


class CellFactory(Protocol):
    """Open a cell."""

    async def __call__(self, *, apis: int = 1, watchdogs: int = 0, **overrides: str) -> Cell:
        """``overrides`` are settings by their names in lower case."""


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """One for the whole run: what it starts is told all it needs."""
    log = tmp_path_factory.mktemp("zygote") / "zygote.log"
    running = Zygote(log, environment({}))
    yield running
    running.close()


@pytest.fixture
async def cell(servers: Servers, template_database: str, zygote: Zygote) -> AsyncIterator[CellFactory]:
    """A factory of cells: a Redis and a database each, closed afterwards."""
    async with AsyncExitStack() as stack:

        async def make(*, apis: int = 1, watchdogs: int = 0, **overrides: str) -> Cell:
            directory = Path(tempfile.mkdtemp(prefix="plimsoll-"))
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            name = f"plimsoll_fault_{next(_numbers)}"
            execute(servers.database_url, f"CREATE DATABASE {name} TEMPLATE {template_database}")
            stack.callback(execute, servers.database_url, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            opened = await stack.enter_async_context(
                open_cell(directory, in_database(servers.database_url, name), zygote, **overrides)
            )
            workers = [opened.start_worker("watchdog") for _ in range(watchdogs)]
            workers += [opened.start_worker("api") for _ in range(apis)]
            for worker in workers:
                await opened.ready(worker)
            return opened

        yield make
