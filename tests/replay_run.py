"""Whole replays through real processes: ``plimsoll replay`` itself, and everything REST tells afterwards."""

from __future__ import annotations

import asyncio
import csv
import gzip
import json
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import pytest

from app import reconcile
from app.embedded import start_servers
from tests.harness import System, tail
from tests.oracle.walk import Walk, breach_rows, compare_rows, difference

DATA: Final = Path(__file__).parents[2] / "shared" / "data"
JANUARY_2022: Final = DATA / "btc-perp-2022-01-1m.csv.gz"
CRASH_OF_OCTOBER_2025: Final = DATA / "btcusdt-2025-10-10-crash-1m.csv"

ACCOUNTS: Final = 200
SEED: Final = 21
HISTORY: Final = ("trades", "transfers", "liquidations", "recoveries")
PAGE_ITEMS: Final = 500


@dataclass(frozen=True)
class Play:
    """One file, or a part of it, as ``plimsoll replay`` is told to play it."""

    file: Path
    ohlc: bool
    start: str | None = None
    end: str | None = None

    def arguments(self) -> list[str]:
        """The command line after ``plimsoll``."""
        return [
            "replay",
            str(self.file),
            "--lockstep",
            *(["--ohlc"] if self.ohlc else []),
            *(["--start", self.start] if self.start else []),
            *(["--end", self.end] if self.end else []),
            *("--accounts", str(ACCOUNTS), "--seed", str(SEED)),
        ]

    def marks(self) -> list[list[Decimal]]:
        """The marks of each bar as the file has them, read by other means than the replay's own."""
        opener = gzip.open if self.file.suffix == ".gz" else open
        with opener(self.file, "rt") as lines:
            rows = list(csv.reader(lines))[1:]
        chosen = [row for row in rows if (self.start or "") <= _iso_time(row[0]) < (self.end or "9")]
        names = slice(1, 5) if self.ohlc else slice(4, 5)
        return [[Decimal(price) for price in row[names]] for row in chosen]


def _iso_time(text: str) -> str:
    if text.isdecimal():
        return datetime.fromtimestamp(int(text) / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return text[:19].replace(" ", "T")


@dataclass
class Run:
    """What plays into one system left behind: their logs, and the system's own account of things."""

    plays: Sequence[Play]
    logs: list[Path] = field(default_factory=list)
    summaries: list[str] = field(default_factory=list)
    history: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    positions: dict[str, dict[str, Any]] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    verify: str = ""
    verify_code: int = -1

    def played_marks(self, number: int) -> list[Decimal]:
        """The marks of one play that were accepted, in order, as its log has them."""
        with self.logs[number].open(encoding="utf-8") as lines:
            entries = (json.loads(line) for line in lines)
            return [
                Decimal(entry["body"]["price"])
                for entry in entries
                if entry["path"] == "/mark-price" and entry["status"] == 200
            ]

    def walk(self, walk: Walk) -> Walk:
        """Lead ``walk`` along all logs."""
        for log in self.logs:
            walk.read(log)
        return walk

    def differences(self, walk: Walk) -> list[str]:
        """All that differs from what ``walk`` says there must be; only its answers where they differ already."""
        if walk.differences:
            return walk.differences
        oracle = walk.oracle
        found: list[str] = []
        for route, rows in (
            ("trades", oracle.trades),
            ("transfers", oracle.transfers),
            ("liquidations", breach_rows(oracle.breaches)),
            ("recoveries", breach_rows(oracle.recoveries)),
        ):
            found += [f"{route}: {text}" for text in compare_rows(rows, self.history[route])]
        for account_id, answer in self.positions.items():
            text = difference(oracle.positions(account_id).figures, answer)
            found += [f"GET /positions/{account_id}: {text}"] if text else []
        text = difference(oracle.totals(), self.report["totals"])
        return found + ([f"GET /margin-report: {text}"] if text else [])


@contextmanager
def replayed(plays: Sequence[Play]) -> Iterator[Run]:
    """Play ``plays`` one after the other into one fresh system, ask it for everything, and stop it."""
    missing = [play.file for play in plays if not play.file.exists()]
    if missing:
        pytest.skip(f"there is no {missing[0]}")
    directory = Path(tempfile.mkdtemp(prefix="plimsoll-"))
    try:
        yield asyncio.run(_replay(plays, directory))
    finally:
        shutil.rmtree(directory)


async def _replay(plays: Sequence[Play], directory: Path) -> Run:
    run = Run(plays)
    with start_servers(directory / "stores") as servers:
        system = System(servers.stores, directory)
        await asyncio.to_thread(reconcile.migrate, system.settings(), servers.stores)
        try:
            await system.start_watchdog(wait=False)
            await system.start_api()
            await system.watchdogs[0].wait_until_ready()
            for play in plays:
                await _play(run, play, system)
            await _ask_for_everything(run, system)
        except BaseException:
            print(system.logs())  # noqa: T201 - shown by pytest with the failure
            raise
        finally:
            await system.stop()
    return run


async def _play(run: Run, play: Play, system: System) -> None:
    log = system.directory / f"play-{len(run.logs)}.jsonl"
    output = log.with_suffix(".txt")
    started_at = time.monotonic()
    with output.open("wb") as written:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "app.cli", *play.arguments(), "--api", system.apis[0].url, "--log", str(log)),
            env=system.environment(),
            stdout=written,
            stderr=written,
        )
        code = await process.wait()
    summary = f"{output.read_text(encoding='utf-8')}in {time.monotonic() - started_at:.1f} s"
    assert code == 0, f"plimsoll {' '.join(play.arguments())} exited with {code}\n{summary}\n{tail(output)}"
    run.logs.append(log)
    run.summaries.append(summary)


async def _ask_for_everything(run: Run, system: System) -> None:
    for route in HISTORY:
        run.history[route] = [item async for item in _items(system, route)]
    for number in range(ACCOUNTS):
        account_id = f"replay-{number:03d}"
        run.positions[account_id] = (await system.client.get(f"/positions/{account_id}")).json()
    run.report = (await system.client.get("/margin-report", params={"limit": 1})).json()
    verified = await asyncio.to_thread(system.command, "verify")
    run.verify, run.verify_code = verified.stdout + verified.stderr, verified.returncode


async def _items(system: System, route: str) -> AsyncIterator[dict[str, Any]]:
    cursor: str | None = None
    while True:
        parameters = {"limit": str(PAGE_ITEMS), **({"cursor": cursor} if cursor else {})}
        answer = await system.client.get(f"/{route}", params=parameters)
        assert answer.status_code == 200, answer.text
        page = answer.json()
        for item in page["items"]:
            yield item
        cursor = page["next_cursor"]
        if cursor is None:
            return
