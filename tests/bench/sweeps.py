"""B4 to B7: one sweep of every account, beside reading the same bytes, beside Postgres, beside key by key.

What is timed is the watchdog's own ``Sweeper`` in this process, from the request for a sweep until it says that the
sweep has ended: marks, columns, screen, verdicts, totals, and the note of what was swept. Before each sweep a new mark
is set and a thousand accounts are changed by the product's own commits, so that a sweep that reads only what changed
has something to read.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from random import Random
from typing import Final

import asyncpg
import numpy as np
import psutil
from redis.asyncio import Redis

from app import background
from app import redis_client as keys
from app.booking import Booking
from app.columns import INT64
from app.numbers import UNITS_PER_ONE, to_units
from app.records import parse_account
from app.services.trading import TransferOrder
from tests.bench.bulk import write_all, write_columns
from tests.bench.population import MARK, SEED, SYMBOL, Population, Units, account_name, populate
from tests.bench.ratios import Bound, Row
from tests.bench.stage import booking_on, settle, stage
from tests.harness import System
from watchdog.refresh import Refresher
from watchdog.sweep import Sweeper

MARKS: Final = (MARK, MARK - Decimal("0.001"))
"""Two marks between which no account above or below its line changes sides; those exactly on it are above at both."""

CHANGED_PER_SWEEP: Final = 1_000
CENT: Final = Decimal("0.01")
BOOKED_AT_ONCE: Final = 250
KEYS_AT_ONCE: Final = 1_000
CHEAP_ROUNDS: Final = 15
COLUMNS_BYTES_PER_ACCOUNT: Final = 300
"""What an account's columns and name may take in Redis, in its client's buffers and in this process together."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class World:
    """A population in running stores, who of it should be a candidate, and the memory of Redis that it took."""

    system: System
    booking: Booking
    population: Population
    expected: set[int]
    redis_bytes: int

    async def follow(self) -> None:
        """Bring the population to what its accounts' trades have made of it."""
        for key, column in (
            (keys.COLUMN_BALANCE, self.population.balance),
            (keys.quantity_column(SYMBOL), self.population.quantity),
            (keys.cost_column(SYMBOL), self.population.cost),
        ):
            column[:] = await _column(self.booking.store.client, key)


async def _column(client: Redis, key: str) -> Units:
    packed = await client.get(key) or b""
    assert isinstance(packed, bytes)
    return np.frombuffer(packed, dtype=INT64)


@asynccontextmanager
async def world(count: int, say: Say) -> AsyncIterator[World]:
    """``count`` accounts in fresh stores at the mark ``MARK``; no process of the product runs yet."""
    async with stage("world") as system, booking_on(system, refresh_accounts_per_sweep=1) as booking:
        started = time.monotonic()
        population = populate(count)
        await booking.marks.set_mark(SYMBOL, MARK, confirm=True)
        empty = (await booking.store.client.info("memory"))["used_memory"]
        await write_all(system, booking, population)
        await settle(system, booking.store.client)
        full = (await booking.store.client.info("memory"))["used_memory"]
        expected = population.candidates(MARK)
        say(f"{count:,} accounts written in {time.monotonic() - started:.0f} s, {len(expected):,} of them candidates")
        yield World(system, booking, population, expected, full - empty)


class Sweeps:
    """The product's sweeper in this process, timed a sweep at a time."""

    def __init__(self, booking: Booking, population: Population, expected: set[int]) -> None:
        self._booking = booking
        self._population = population
        self._expected = expected
        self._sweeper = Sweeper(booking, Refresher(booking))
        self._task = asyncio.create_task(self._sweeper.run(), name="sweeper")
        self._marks = 0
        self._random = Random(SEED)
        # Far above their lines, so that a deposit of a cent changes no verdict at any mark of the bench.
        self._healthy = np.array(population.healthy())

    async def close(self) -> None:
        """Stop sweeping."""
        await background.end([self._task])

    async def first(self) -> None:
        """Two sweeps that are not timed: the first finds all candidates and records their breaches."""
        for _ in range(2):
            await self._sweep()

    async def timed(self, *, change: bool = True) -> float:
        """Set a mark, change some accounts, and sweep; the seconds the sweep took."""
        self._marks += 1
        await self._booking.marks.set_mark(SYMBOL, MARKS[self._marks % 2], confirm=True)
        if change:
            await self._change()
        return await self._sweep()

    async def _sweep(self) -> float:
        # What follows a sweep, the refresh of displayed keys, is not part of it.
        await asyncio.sleep(0.3)
        gc.collect()
        started = time.perf_counter()
        await self._sweeper.request("mark")
        return time.perf_counter() - started

    async def _change(self) -> None:
        chosen = self._random.sample(range(len(self._healthy)), min(CHANGED_PER_SWEEP, len(self._healthy)))
        slots = self._healthy[chosen]
        for first in range(0, len(slots), BOOKED_AT_ONCE):
            await asyncio.gather(
                *(
                    self._booking.book_transfer(
                        TransferOrder(account_name(int(slot)), "deposit", CENT), client_transfer_id=None
                    )
                    for slot in slots[first : first + BOOKED_AT_ONCE]
                )
            )
        self._population.balance[slots] += to_units(CENT)

    async def faults(self) -> list[str]:
        """How the sweeps' result differs from brute force: counts, breaches in Redis, rows in Postgres."""
        found = []
        swept = self._sweeper.swept
        if swept is None or swept.accounts != len(self._population):
            return [f"the sweep saw {swept and swept.accounts} of {len(self._population)} accounts"]
        if swept.states["candidate"] != len(self._expected):
            found.append(f"{swept.states['candidate']} candidates, brute force finds {len(self._expected)}")
        column = await _column(self._booking.store.client, keys.COLUMN_BREACH)
        if set(np.flatnonzero(column).tolist()) != self._expected:
            found.append("the accounts in breach are not those that brute force finds")
        return found


@asynccontextmanager
async def sweeping(of: World) -> AsyncIterator[Sweeps]:
    """The sweeper, after the first sweeps."""
    sweeps = Sweeps(of.booking, of.population, of.expected)
    try:
        await sweeps.first()
        yield sweeps
    finally:
        await sweeps.close()


async def measure_beside_reading(of: World, say: Say, *, rounds: int = CHEAP_ROUNDS) -> Row:
    """B4."""
    row = Row(
        "B4",
        f"sweep of {len(of.population):,} accounts",
        "GETRANGE of the same bytes",
        "ms",
        must=Bound(1.5, "low", "≤ 1.5 ×"),
        aim=Bound(0.5, "low", "0.5 ×"),
        value_form="{:,.1f}",
    )
    async with sweeping(of) as sweeps:
        for _ in range(rounds):
            sweep, read = await sweeps.timed(), await _read_bytes(of)
            row.add(measured=sweep * 1_000, beside=read * 1_000)
        row.faults += await sweeps.faults()
    row.notes.append(f"{CHANGED_PER_SWEEP:,} accounts changed before each sweep")
    say(f"B4: {row.ratio.show('{:.2f}')}")
    return row


async def measure_beside_postgres(of: World, say: Say, *, rounds: int = CHEAP_ROUNDS) -> Row:
    """B5."""
    row = Row(
        "B5",
        f"sweep of {len(of.population):,} accounts",
        "Postgres: the same question",
        "ms",
        must=Bound(1.8, "high", "≥ 1.8 × faster"),
        aim=Bound(5, "high", "5 ×"),
        value_form="{:,.1f}",
    )
    connection = await asyncpg.connect(of.system.stores.owner_url)
    try:
        row.notes.append(await _postgres_table(connection, of.population))
        for _ in range(3):
            await _ask_postgres(connection, MARK)
        async with sweeping(of) as sweeps:
            for number in range(rounds):
                sweep = await sweeps.timed()
                seconds, found = await _ask_postgres(connection, MARKS[number % 2])
                row.add(measured=sweep * 1_000, beside=seconds * 1_000, ratio=seconds / sweep)
                if found != of.expected:
                    row.faults.append(f"Postgres finds {len(found)} candidates, brute force {len(of.expected)}")
            row.faults += await sweeps.faults()
        await connection.execute("DROP TABLE bench_accounts")
    finally:
        await connection.close()
    say(f"B5: {row.ratio.show('{:.2f}')}")
    return row


async def measure_beside_keys(of: World, say: Say, *, rounds: int = 5) -> Row:
    """B6."""
    row = Row(
        "B6",
        f"sweep of {len(of.population):,} accounts",
        "each account by its own keys, pipelined",
        "ms",
        must=Bound(200, "high", "≥ 200 × faster"),
        aim=Bound(1_000, "high", "1,000 ×"),
        value_form="{:,.1f}",
    )
    async with sweeping(of) as sweeps:
        for number in range(rounds):
            sweep = await sweeps.timed()
            seconds = await _read_keys(of)
            row.add(measured=sweep * 1_000, beside=seconds * 1_000, ratio=seconds / sweep)
            say(f"B6 round {number + 1}: {seconds:.1f} s by keys, {sweep * 1_000:.1f} ms a sweep")
        row.faults += await sweeps.faults()
    found = await _candidates_by_keys(of)
    if found != of.expected:
        row.faults.append(f"by their keys {len(found)} accounts are candidates, brute force {len(of.expected)}")
    row.notes.append("only the reading is timed beside it, not the parsing and deciding")
    return row


async def measure_ten_times(count: int, say: Say, *, rounds: int = 5) -> Row:
    """B7: columns only, ``count`` accounts and ten times as many, in two pairs of stores at once."""
    row = Row(
        "B7",
        f"sweep of {count * 10:,} accounts",
        f"of {count:,}",
        "ms",
        must=Bound(11, "low", "expected ≤ 11 ×"),
        aim=Bound(10, "low", "10 ×"),
        value_form="{:,.1f}",
    )
    needed = count * 10 * COLUMNS_BYTES_PER_ACCOUNT
    available = psutil.virtual_memory().available
    if available < needed:
        row.not_measured = f"{available / 2**30:.1f} GiB of memory are available, {needed / 2**30:.1f} are needed"
        return row
    row.notes.append("columns and names only, without the accounts' own keys; no candidate, nothing changed in between")
    async with _columns_only(count) as small, _columns_only(count * 10) as large:
        for number in range(rounds):
            beside, measured = await small.timed(change=False), await large.timed(change=False)
            row.add(measured=measured * 1_000, beside=beside * 1_000)
            say(f"B7 round {number + 1}: {measured * 1_000:.0f} ms / {beside * 1_000:.0f} ms")
        row.faults += [*await small.faults(), *await large.faults()]
    return row


@asynccontextmanager
async def _columns_only(count: int) -> AsyncIterator[Sweeps]:
    async with stage("columns") as system, booking_on(system, refresh_accounts_per_sweep=1) as booking:
        await booking.marks.set_mark(SYMBOL, MARK, confirm=True)
        population = populate(count)
        below = list(population.candidates(MARK))
        # Without keys there is nobody to record a breach of: the candidates get a million each.
        population.balance[below] += 1_000_000 * UNITS_PER_ONE
        await write_columns(booking, population)
        sweeps = Sweeps(booking, population, set())
        try:
            # The first finds that nothing was ever noted and begins to note; the second reads every row to keep it.
            await sweeps.first()
            await sweeps.timed(change=False)
            yield sweeps
        finally:
            await sweeps.close()


async def _read_bytes(of: World) -> float:
    """The seconds that the same columns take by GETRANGE, in the same chunks, and nothing else."""
    settings, count = of.booking.settings, len(of.population)
    size = settings.sweep_chunk_accounts
    columns = [keys.COLUMN_BALANCE, keys.COLUMN_BREACH, keys.quantity_column(SYMBOL), keys.cost_column(SYMBOL)]
    client: Redis = of.booking.store.client
    gc.collect()
    started = time.perf_counter()
    for first in range(0, count, size):
        async with client.pipeline(transaction=False) as pipeline:
            for column in columns:
                pipeline.getrange(column, first * 8, (first + size) * 8 - 1)
            await pipeline.execute()
    return time.perf_counter() - started


async def _postgres_table(connection: asyncpg.Connection, population: Population) -> str:
    """The accounts as float8 columns, every page in memory; what the plan says of its parallelism."""
    await connection.execute(
        "CREATE UNLOGGED TABLE bench_accounts (slot int4, balance float8, quantity float8, cost float8)"
    )
    columns = (population.balance, population.quantity, population.cost)
    as_float = [(column / UNITS_PER_ONE).tolist() for column in columns]
    await connection.copy_records_to_table(
        "bench_accounts", records=zip(range(len(population)), *as_float, strict=True)
    )
    await connection.execute("VACUUM ANALYZE bench_accounts")
    for setting in (
        "max_parallel_workers_per_gather = 2",
        "parallel_setup_cost = 0",
        "min_parallel_table_scan_size = 0",
        "jit = off",
    ):
        await connection.execute(f"SET {setting}")
    plan = await connection.fetch(f"EXPLAIN (ANALYZE, BUFFERS) {_QUESTION}", float(MARK))
    lines = [line[0].strip() for line in plan]
    planned = [line for line in lines if line.startswith(("Workers Launched", "Buffers"))]
    return f"Postgres' plan: {'; '.join(planned[:2])}"


_QUESTION: Final = (
    "SELECT slot FROM bench_accounts WHERE quantity <> 0 "
    "AND balance + quantity * $1::float8 - cost < 0.1::float8 * abs(quantity) * $1::float8"
)


async def _ask_postgres(connection: asyncpg.Connection, mark: Decimal) -> tuple[float, set[int]]:
    gc.collect()
    started = time.perf_counter()
    rows = await connection.fetch(_QUESTION, float(mark))
    seconds = time.perf_counter() - started
    return seconds, {row["slot"] for row in rows}


async def _read_keys(of: World) -> float:
    """The seconds that it takes to read every account's balance and positions by their own keys, pipelined."""
    client, count = of.booking.store.client, len(of.population)
    seconds = 0.0
    for first in range(0, count, KEYS_AT_ONCE):
        names = [account_name(slot) for slot in range(first, min(count, first + KEYS_AT_ONCE))]
        started = time.perf_counter()
        await _read_some(client, names)
        seconds += time.perf_counter() - started
    return seconds


async def _read_some(client: Redis, names: list[str]) -> list[object]:
    async with client.pipeline(transaction=False) as pipeline:
        for name in names:
            pipeline.get(keys.balance_key(name))
            pipeline.hgetall(keys.positions_key(name))
        return list(await pipeline.execute())


async def _candidates_by_keys(of: World) -> set[int]:
    """Who is a candidate by the keys, in Decimal: the user's keys and the columns tell the same."""
    client, contracts, count = of.booking.store.client, of.booking.contracts, len(of.population)
    rate = contracts[SYMBOL].maintenance_rate
    found = set()
    for first in range(0, count, KEYS_AT_ONCE):
        slots = range(first, min(count, first + KEYS_AT_ONCE))
        names = [account_name(slot) for slot in slots]
        answers = await _read_some(client, names)
        for slot, name, balance, fields in zip(slots, names, answers[::2], answers[1::2], strict=True):
            flat = [item for pair in fields.items() for item in pair]  # type: ignore[attr-defined]
            account = parse_account(name, balance, flat, contracts)  # type: ignore[arg-type]
            held = account.position(SYMBOL)
            equity = account.balance + held.quantity * MARK - held.cost
            if held.quantity and equity < rate * abs(held.quantity) * MARK:
                found.add(slot)
    return found
