"""The replay itself: bars become marks, traders act between them, and all of it goes through the REST API."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import BinaryIO, Final

import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from app.numbers import format_decimal
from app.replay.bars import Bar, BarFileError, marks_of, read_bars
from app.replay.client import ApiClient, Exchange, ReplayError
from app.replay.connection import CONNECTIONS_MAX
from app.replay.population import population
from app.replay.summary import Tally, summary
from app.replay.trader import SYMBOL, Answer, Moves, Request, Trader

INTERRUPTED: Final = 130
"""The exit code of a command that Ctrl-C ended."""


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """What the command line says. ``speed`` is in bars' time per real time, None as fast as it goes."""

    file: Path
    api_url: str
    lockstep: bool
    ohlc: bool
    speed: float | None
    accounts: int
    seed: int
    start: datetime | None
    end: datetime | None
    log: Path | None
    api_key: str | None = field(default=None, repr=False)


def replay(options: ReplayOptions) -> int:
    """Play the file and print a summary; answers the exit code: 0, 1 when it could not go on, 130 on Ctrl-C."""
    console, complaints = Console(), Console(stderr=True)
    try:
        bars = read_bars(options.file, start=options.start, end=options.end)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            tally = runner.run(_replay(options, bars, console))
    except (BarFileError, ReplayError, OSError) as error:
        complaints.print(f"replay: {error}", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    console.print(summary(tally))
    return 0


async def _replay(options: ReplayOptions, bars: Sequence[Bar], console: Console) -> Tally:
    client = ApiClient.connect(options.api_url, api_key=options.api_key)
    log = options.log.open("wb") if options.log else None
    try:
        return await Player(options, client, log).play(bars, console)
    finally:
        if log is not None:
            log.close()
        client.close()


class Player:
    """One play of one file.

    Between two marks the traders that are woken act at the same time, each one request after the other. An account
    meets no other account, so their requests may be logged trader by trader: each order that keeps every account's
    own is an order in which they took effect. A play is repeated by the same file, options and answers.
    """

    def __init__(self, options: ReplayOptions, client: ApiClient, log: BinaryIO | None) -> None:
        self._options = options
        self._client = client
        self._log = log
        self._tally = Tally()
        self._connections = asyncio.Semaphore(CONNECTIONS_MAX)

    async def play(self, bars: Sequence[Bar], console: Console) -> Tally:
        """Play ``bars`` from the first to the last and count what came of it."""
        options, tally = self._options, self._tally
        random = Random(options.seed)
        marks_per_bar = [marks_of(bar, ohlc=options.ohlc, random=random) for bar in bars]
        marks_in_play = sum(map(len, marks_per_bar))
        first_version, _ = await self._client.versions()
        traders = population(
            accounts=options.accounts,
            seed=options.seed,
            run_id=_run_id(options, bars[0], first_version),
            marks_in_play=marks_in_play,
        )
        started_at = time.monotonic()
        await self._act(traders, [trader.arrive() for trader in traders])
        version = first_version
        with _progress(console) as progress:
            task = progress.add_task(options.file.name, total=marks_in_play)
            for bar, marks in zip(bars, marks_per_bar, strict=True):
                if options.speed is not None:
                    due_at = started_at + (bar.opened_at - bars[0].opened_at).total_seconds() / options.speed
                    await asyncio.sleep(max(0.0, due_at - time.monotonic()))
                for mark in marks:
                    version = await self._post_mark(mark)
                    woken = [trader for trader in traders if trader.is_woken(tally.marks, mark)]
                    await self._act(woken, [trader.act(tally.marks, mark) for trader in woken])
                    tally.marks += 1
                    progress.advance(task)
                tally.bars += 1
        await self._client.until_swept(version)
        accounts = {trader.account_id for trader in traders}
        tally.breaches = await self._count("/liquidations", first_version, accounts)
        tally.recoveries = await self._count("/recoveries", first_version, accounts)
        tally.elapsed_seconds = time.monotonic() - started_at
        return tally

    async def _post_mark(self, mark: Decimal) -> int:
        """Post ``mark`` and, in lockstep, wait for its sweep; answers its version.

        The store may hold a mark of another time, from which this one is a jump: the refusal says how to insist.
        """
        answer = await self._send(Request("POST", "/mark-price", {"symbol": SYMBOL, "price": format_decimal(mark)}))
        if answer.code == "mark_price_jump":
            instead = answer.body["next"]
            answer = await self._send(Request(instead["method"], instead["path"], instead["body"]))
        if not answer.accepted:
            raise ReplayError(f"the mark {mark} was answered with {answer.status}: {answer.body}")
        version = int(answer.body["version"])
        if self._options.lockstep:
            self._tally.sweep_seconds.append(await self._client.until_swept(version))
        return version

    async def _send(self, request: Request) -> Answer:
        attempts = await self._client.send(request)
        self._record(attempts)
        return attempts[-1].answer

    async def _act(self, traders: Sequence[Trader], moves: Sequence[Moves]) -> None:
        if not traders:
            return
        for exchanges in await asyncio.gather(*map(self._carry_out, moves)):
            self._record(exchanges)

    async def _carry_out(self, moves: Moves) -> list[Exchange]:
        """Send one trader's requests one after the other and tell it the answers."""
        exchanges: list[Exchange] = []
        async with self._connections:
            try:
                request = next(moves)
                while True:
                    attempts = await self._client.send(request)
                    exchanges += attempts
                    request = moves.send(attempts[-1].answer)
            except StopIteration:
                return exchanges

    def _record(self, exchanges: Sequence[Exchange]) -> None:
        for exchange in exchanges:
            self._tally.count(exchange)
            if self._log is not None:
                self._log.write(exchange.to_json())

    async def _count(self, path: str, version: int, accounts: set[str]) -> int:
        return len([item async for item in self._client.items_since(path, version) if item["account_id"] in accounts])


def _run_id(options: ReplayOptions, first_bar: Bar, first_version: int) -> str:
    """Begins every operation id: the same for the same play, another for another play into the same store."""
    parts = (options.seed, options.file.name, first_bar.opened_at.isoformat(), options.ohlc, first_version)
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:10]


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("marks"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        refresh_per_second=4,
    )
