"""A cell with a Postgres of its own, to be stopped, started and spoilt."""

from __future__ import annotations

import asyncio
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from app.embedded import Stores
from app.embedded_postgres import PostgresServer
from tests.conftest import execute
from tests.faults.cell import Cell, open_cell
from tests.faults.zygote import Zygote

STOP_SECONDS = 20.0


@dataclass(slots=True)
class HistoryServer:
    """One Postgres and the cell on it."""

    server: PostgresServer
    cell: Cell

    async def stop_immediately(self) -> None:
        """SIGQUIT: no goodbye to anyone, and a recovery from the log at the next start."""
        process = self.server.process
        assert process is not None
        process.send_signal(signal.SIGQUIT)
        assert await asyncio.to_thread(process.wait, STOP_SECONDS), "Postgres does not stop"

    def fall_silent(self) -> None:
        """SIGSTOP to every process of it: connections stand, and nothing is answered."""
        assert self.server.process is not None
        for process in psutil.Process(self.server.process.pid).children(recursive=True):
            process.send_signal(signal.SIGSTOP)
        self.server.process.send_signal(signal.SIGSTOP)

    async def stop_silent(self) -> None:
        """Let a silent one go down, at once and without a goodbye."""
        process = self.server.process
        assert process is not None
        process.send_signal(signal.SIGQUIT)
        for child in psutil.Process(process.pid).children(recursive=True):
            child.send_signal(signal.SIGKILL)
        process.send_signal(signal.SIGCONT)
        assert await asyncio.to_thread(process.wait, STOP_SECONDS), "Postgres does not stop"

    async def start(self) -> None:
        """Start it again on its data."""
        await asyncio.to_thread(self.server.start)

    async def execute(self, *statements: str) -> None:
        """Run statements as its owner, each on its own."""
        for statement in statements:
            await asyncio.to_thread(execute, self.server.owner_url, statement)


@asynccontextmanager
async def open_history_server(
    zygote: Zygote, *, apis: int = 1, watchdogs: int = 0, **overrides: str
) -> AsyncIterator[HistoryServer]:
    """A running cell whose Postgres is nobody else's."""
    directory = Path(tempfile.mkdtemp(prefix="plimsoll-"))
    server = PostgresServer(directory)
    try:
        await asyncio.to_thread(server.start)
        stores = Stores("", database_url=server.url, migrations_url=server.owner_url)
        async with open_cell(directory, stores, zygote, **overrides) as cell:
            workers = [cell.start_worker("watchdog") for _ in range(watchdogs)]
            workers += [cell.start_worker("api") for _ in range(apis)]
            for worker in workers:
                await cell.ready(worker)
            yield HistoryServer(server, cell)
    finally:
        if server.is_running():
            await asyncio.to_thread(server.stop)
        shutil.rmtree(directory, ignore_errors=True)
