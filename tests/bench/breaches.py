"""B8 and B9: how long a mark takes to become rows of liquidations, and how fast very many of them are written.

The API and the watchdog are real processes with their default settings: the watchdog sweeps on its timer too, refreshes
displayed keys and audits, and a mark may come in the middle of any of these.

When a row is committed is asked of Postgres itself: a trigger on ``liquidations`` notifies, and Postgres delivers a
notification when the transaction has committed. A mark's time is the one in its answer, Redis' own at the moment of its
acceptance, so the time that the answer takes to its client is counted too.
"""

from __future__ import annotations

import asyncio
import io
import math
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from random import Random
from statistics import median
from typing import Any, Final

import asyncpg
import orjson
import psycopg2

from app.contracts import BTC_PERP
from app.replay.connection import HttpConnections
from tests.bench.population import MARK, SEED, STEP, STEP_ACCOUNTS, SYMBOL, account_name
from tests.bench.ratios import ROUNDS_MIN, Bound, Row
from tests.bench.sweeps import Say, World
from tests.harness import Process, System

MARKS: Final = 200
QUIET: Final = Decimal("0.001")
"""A mark so much below a step takes nobody below a line."""

PAUSE_SECONDS_MAX: Final = 0.2
ROWS_TIMEOUT_SECONDS: Final = 30.0
BURST_ROWS: Final = 100_000
BURST_TIMEOUT_SECONDS: Final = 180.0
POLL_SECONDS: Final = 0.01

_TRIGGER: Final = """
    CREATE OR REPLACE FUNCTION bench_notify() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM pg_notify('bench_rows', mark_version || ' ' || count(*) || ' ' || max(id))
        FROM new_rows GROUP BY mark_version;
        RETURN NULL;
    END $$;
    CREATE OR REPLACE TRIGGER bench_notify AFTER INSERT ON liquidations REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION bench_notify();
"""


@dataclass(slots=True)
class Committed:
    """The rows of liquidations committed while we listened, by mark version, and when the last of each was."""

    rows: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    last: dict[int, float] = field(default_factory=dict)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def on_notify(self, connection: object, pid: int, channel: str, payload: object, /) -> None:
        """Called by asyncpg."""
        now = time.time()
        version, count, _ = (int(word) for word in str(payload).split())
        self.rows[version] += count
        self.last[version] = now
        self._news.set()

    async def wait(self, version: int, count: int, *, seconds: float) -> float:
        """The wall-clock time at which so many rows of ``version`` were committed. Raises ``TimeoutError``."""
        async with asyncio.timeout(seconds):
            while self.rows[version] < count:
                self._news.clear()
                await self._news.wait()
        return self.last[version]


@asynccontextmanager
async def _committed(system: System) -> AsyncIterator[Committed]:
    connection = await asyncpg.connect(system.stores.owner_url)
    committed = Committed()
    try:
        await connection.execute(_TRIGGER)
        await connection.add_listener("bench_rows", committed.on_notify)
        yield committed
    finally:
        await connection.close()


class Market:
    """The API and the watchdog of a system, and a client of both."""

    def __init__(self, api: Process, watchdog: Process) -> None:
        self.api = api
        self.watchdog = watchdog
        self._api = HttpConnections(api.url)
        self._watchdog = HttpConnections(watchdog.url)

    def close(self) -> None:
        """Close the connections."""
        self._api.close()
        self._watchdog.close()

    async def mark(self, price: Decimal) -> tuple[int, float]:
        """Set the mark; its version, and when it was accepted by the clock of Redis."""
        answer = await self._api.request(
            "POST", "/mark-price", {"symbol": SYMBOL, "price": f"{price:f}", "confirm": True}
        )
        if answer.status != 200:
            raise RuntimeError(f"the mark was answered {answer.status} {answer.content!r}")
        accepted = orjson.loads(answer.content)
        return accepted["version"], datetime.fromisoformat(accepted["timestamp"]).timestamp()

    async def swept(self, version: int, *, seconds: float = ROWS_TIMEOUT_SECONDS) -> None:
        """Wait until ``version`` has been swept."""
        async with asyncio.timeout(seconds):
            while True:
                ready = orjson.loads((await self._api.request("GET", "/health/ready")).content)
                if (ready["swept_version"] or 0) >= version:
                    return
                await asyncio.sleep(POLL_SECONDS)

    async def sweeps(self) -> tuple[float, float]:
        """How many sweeps the watchdog has made, and the seconds they took in all."""
        text = (await self._watchdog.request("GET", "/metrics")).content.decode()
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        name = "plimsoll_sweep_duration_seconds"
        return float(values[f"{name}_count"]), float(values[f"{name}_sum"])


@asynccontextmanager
async def market(of: World) -> AsyncIterator[Market]:
    """A running API and watchdog, once everything has been swept; both are stopped at the end."""
    system = of.system
    api = await system.start_api()
    guard = await system.start_watchdog()
    found = Market(api, guard)
    try:
        version, _ = await found.mark(MARK)
        await found.swept(version)
        yield found
    finally:
        found.close()
        for process, group in ((guard, system.watchdogs), (api, system.apis)):
            process.resume()
            process.terminate()
            group.remove(process)


async def measure_mark_to_row(of: World, say: Say, *, marks: int = MARKS) -> Row:
    """B8."""
    row = Row(
        "B8",
        f"mark accepted to row committed, p99 of {marks} marks",
        "median sweep",
        "ms",
        must=Bound(3, "low", "≤ 3 ×"),
        aim=Bound(1.5, "low", "1.5 ×"),
        value_form="{:,.1f}",
    )
    random = Random(SEED)
    latencies: list[float] = []
    sweeps: list[float] = []
    marks, price = min(marks, of.population.steps), MARK
    async with market(of) as running, _committed(of.system) as committed:
        for _ in range(marks):
            price -= STEP
            await asyncio.sleep(random.uniform(0, PAUSE_SECONDS_MAX))
            version, accepted = await running.mark(price)
            latencies.append(await committed.wait(version, STEP_ACCOUNTS, seconds=ROWS_TIMEOUT_SECONDS) - accepted)
            await running.swept(version)
            await asyncio.sleep(random.uniform(0, PAUSE_SECONDS_MAX))
            sweeps += await _quiet_sweep(running, price - QUIET)
        row.faults += await _liquidated(of, price - QUIET, committed, versions=marks)
    if not sweeps:
        row.faults.append("no sweep was measured by itself")
        return row
    middle = median(sweeps)
    for block in range(ROUNDS_MIN):
        some, beside = latencies[block::ROUNDS_MIN], sweeps[block::ROUNDS_MIN]
        if some and beside:
            row.add(measured=percentile_99(some) * 1_000, beside=median(beside) * 1_000)
    row.samples = [latency * 1_000 for latency in latencies]
    row.overall = percentile_99(latencies) / middle
    p99, usual = percentile_99(latencies) * 1_000, median(latencies) * 1_000
    row.notes += [
        f"of all {marks} marks: p99 {p99:.1f} ms, median {usual:.1f} ms",
        f"{len(sweeps)} sweeps without a breach",
        f"{STEP_ACCOUNTS} breaches each; the spread is of {ROUNDS_MIN} blocks of marks",
    ]
    say(f"B8: {row.ratio.show('{:.2f}')}; {row.notes[0]}; median sweep {middle * 1_000:.1f} ms")
    return row


async def measure_burst(of: World, say: Say, *, rounds: int = ROUNDS_MIN, rows: int = BURST_ROWS) -> Row:
    """B9. It leaves most accounts of the population in breach."""
    row = Row(
        "B9",
        f"{rows:,} breaches on one mark",
        "the same rows by one COPY",
        "rows/s",
        must=Bound(0.2, "high", "≥ 0.2"),
        aim=Bound(0.5, "high", "0.5"),
    )
    async with market(of) as running, _committed(of.system) as committed:
        liquidated = await _accounts_liquidated(of.system)
        price = MARK - of.population.steps * STEP
        for number in range(rounds):
            price = of.population.mark_that_breaches(rows, below=price)
            # In a thread: a loop that stands still for seconds does not see that the server closed an idle connection.
            candidates = await asyncio.to_thread(of.population.candidates, price)
            new = {account_name(slot) for slot in candidates} - liquidated
            version, accepted = await running.mark(price)
            seconds = await committed.wait(version, len(new), seconds=BURST_TIMEOUT_SECONDS) - accepted
            await running.swept(version, seconds=BURST_TIMEOUT_SECONDS)
            running.watchdog.pause()
            try:
                copied, copy_seconds = await asyncio.to_thread(_copy, of.system.stores.owner_url, version)
            finally:
                running.watchdog.resume()
            row.add(measured=len(new) / seconds, beside=copied / copy_seconds)
            recorded = await _accounts_liquidated(of.system)
            if recorded - liquidated != new or copied != len(new):
                row.faults.append(f"{len(recorded - liquidated)} accounts were recorded, brute force finds {len(new)}")
            liquidated = recorded
            say(
                f"B9 round {number + 1}: {len(new):,} rows in {seconds:.1f} s, COPY {copy_seconds:.1f} s; "
                f"ratio {row.ratios[-1]:.3f}"
            )
    return row


async def _quiet_sweep(running: Market, price: Decimal) -> list[float]:
    """The seconds of the one sweep that a mark without a breach causes; nothing if the timer's came in between."""
    count, total = await running.sweeps()
    version, _ = await running.mark(price)
    await running.swept(version)
    new_count, new_total = await running.sweeps()
    return [new_total - total] if new_count == count + 1 else []


def percentile_99(values: list[float]) -> float:
    """The 99th percentile by the nearest rank."""
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


async def _liquidated(of: World, price: Decimal, committed: Committed, *, versions: int) -> list[str]:
    """What is wrong with the rows: their number for each mark, their accounts, or a verdict that is not true."""
    faults = []
    found = [count for count in committed.rows.values() if count]
    if found != [STEP_ACCOUNTS] * versions:
        faults.append(f"the marks made {sorted(set(found))} rows each, not {STEP_ACCOUNTS}, on {len(found)} marks")
    candidates = await asyncio.to_thread(of.population.candidates, price)
    expected = {account_name(slot) for slot in candidates | of.expected}
    recorded = await _accounts_liquidated(of.system)
    if recorded != expected:
        faults.append(f"{len(recorded ^ expected)} accounts are recorded and should not be, or the other way round")
    return faults + await _untrue_rows(of.system)


async def _accounts_liquidated(system: System) -> set[str]:
    connection = await asyncpg.connect(system.stores.owner_url)
    try:
        return {record[0] for record in await connection.fetch("SELECT account_id FROM liquidations")}
    finally:
        await connection.close()


async def _untrue_rows(system: System) -> list[str]:
    """The rows whose own evidence, in Decimal, is no breach."""
    connection = await asyncpg.connect(system.stores.owner_url)
    try:
        rows: list[Any] = await connection.fetch("SELECT id, balance, marks, positions FROM liquidations")
    finally:
        await connection.close()
    faults = []
    for history_id, balance, marks, positions in rows:
        mark = Decimal(orjson.loads(marks)[SYMBOL])
        held = orjson.loads(positions)[SYMBOL]
        quantity, cost = Decimal(held["quantity"]), Decimal(held["cost"])
        if not balance + quantity * mark - cost < BTC_PERP.maintenance_rate * abs(quantity) * mark:
            faults.append(f"liquidation {history_id} is of an account that was no candidate")
    return faults


def _copy(database_url: str, version: int) -> tuple[int, float]:
    """Write the rows of one mark version again by one COPY, into a table like theirs; how many, and the seconds."""
    with closing(psycopg2.connect(database_url)) as connection, connection.cursor() as cursor:
        rows = io.StringIO()
        cursor.copy_expert(f"COPY (SELECT * FROM liquidations WHERE mark_version = {version:d}) TO STDOUT", rows)
        cursor.execute("DROP TABLE IF EXISTS bench_liquidations")
        cursor.execute("CREATE TABLE bench_liquidations (LIKE liquidations INCLUDING ALL)")
        connection.commit()
        rows.seek(0)
        started = time.perf_counter()
        cursor.copy_expert("COPY bench_liquidations FROM STDIN", rows)
        count = cursor.rowcount
        connection.commit()
        seconds = time.perf_counter() - started
        cursor.execute("DROP TABLE bench_liquidations")
        connection.commit()
    return count, seconds
