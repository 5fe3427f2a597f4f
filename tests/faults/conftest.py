"""Fixtures of the fault tests: rounds, the seed, cells, and the table that all rows end in."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from random import Random, SystemRandom
from typing import Any, Final, Protocol

import pytest

from app.embedded import Servers
from tests.conftest import execute
from tests.faults.cell import Cell, history_in, open_cell
from tests.faults.journal import Row, table
from tests.faults.zygote import Zygote
from tests.harness import environment

SHORT: Final = os.environ.get("PLIMSOLL_FAULTS_ROUNDS") == "short"
SEED: Final = int(os.environ.get("PLIMSOLL_FAULTS_SEED") or SystemRandom().randrange(10**6))
TABLE: Final = os.environ.get("PLIMSOLL_FAULTS_TABLE")
TEST_SECONDS_MAX: Final = 400
LONGEST: Final = "test_simulation_at_length.py"

# Tests may run in several processes at once: all of them draw from one seed.
os.environ["PLIMSOLL_FAULTS_SEED"] = str(SEED)

_rows = pytest.StashKey[list[Row]]()
"""Of a test its own rows, of a run all of them."""

_numbers = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is a fault test, and may take its time.

    What takes longest goes first, or the other processes would wait for it at the end.
    """
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)
            item.add_marker(pytest.mark.timeout(TEST_SECONDS_MAX))
    items.sort(key=lambda item: item.path.name != LONGEST)


def pytest_report_header() -> str:
    """The seed, which repeats the run."""
    return f"faults: PLIMSOLL_FAULTS_SEED={SEED}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A row is red if its test fails, wherever that happens; and it says how long the test took."""
    report = yield
    for row in item.stash.get(_rows, []):
        if report.when == "call":
            row.took_seconds = call.duration
        if report.failed and not row.reasons():
            row.complain(f"the test failed: {report.longreprtext.splitlines()[-1][:200]}")
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """One of several processes hands its rows to the one that prints the table."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["rows"] = [asdict(row) for row in session.config.stash.get(_rows, [])]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:  # noqa: ANN401 - pytest-xdist's
    """Take the rows of a process that has ended; one that crashed has none."""
    rows = node.config.stash.setdefault(_rows, [])
    rows += [Row(**row) for row in getattr(node, "workeroutput", {}).get("rows", [])]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table, and keep it where it was asked for."""
    rows = config.stash.get(_rows, [])
    if not rows:
        return
    shown = "\n\n".join([_summary(rows), table(rows), *_beside(terminalreporter)])
    terminalreporter.section("faults")
    terminalreporter.write_line(shown)
    for row in rows:
        for reason in row.reasons()[:5]:
            terminalreporter.write_line(f"{row.fault}: {reason[:200]}")
    if TABLE:
        page = Path(__file__).with_name("reliability.md.in").read_text()
        Path(TABLE).write_text(page.replace("@TABLE@", shown))


def _summary(rows: Sequence[Row]) -> str:
    """What run this was, in a line."""
    green = sum(not row.reasons() for row in rows)
    form = "short form" if SHORT else "full form"
    return f"{green} of {len(rows)} rows green; {form}, `PLIMSOLL_FAULTS_SEED={SEED}`."


def _beside(terminalreporter: pytest.TerminalReporter) -> list[str]:
    """What the table cannot show: tests that were skipped, and tests that failed, rows of the table or not."""
    lines = []
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        lines.append(f"* not run: `{report.nodeid.rpartition('::')[2]}`: {reason.removeprefix('Skipped: ')}")
    for category in ("failed", "error"):
        lines += [
            f"* {category}: `{report.nodeid.rpartition('::')[2]}`"
            for report in terminalreporter.stats.get(category, [])
        ]
    return ["\n".join(lines)] if lines else []


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
        for holder in (request.config, request.node):
            holder.stash.setdefault(_rows, []).append(made)
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
                open_cell(directory, history_in(servers, name), zygote, **overrides)
            )
            workers = [opened.start_worker("watchdog") for _ in range(watchdogs)]
            workers += [opened.start_worker("api") for _ in range(apis)]
            for worker in workers:
                await opened.ready(worker)
            return opened

        yield make
