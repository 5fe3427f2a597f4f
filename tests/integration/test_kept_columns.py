"""The columns a watchdog keeps: after the changed rows were read they are what a full read finds, byte for byte."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from importlib import resources
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncEngine

from app import database, errors
from app import redis_client as keys
from app.booking import Booking
from app.columns import Chunk, Sums, column_names, read_chunk, read_chunks
from app.config import Settings
from app.contracts import Contract
from app.embedded import Stores
from app.outbox import Outbox
from app.reconcile import reconcile
from app.records import UNIT
from app.redis_client import StateStore
from app.services.trading import TradeOrder, TransferOrder
from watchdog import kept_columns, metrics, sweep
from watchdog.audit import Audit
from watchdog.kept_columns import KeptColumns
from watchdog.refresh import Refresher
from watchdog.sweep import Sweeper

BTC: Final = "BTC-PERP"
CHUNK: Final = 3
NAMES: Final = [f"account-{number}" for number in range(12)]
GUARD: Final = (resources.files("app") / "scripts" / "guard.lua").read_text(encoding="utf-8")
CHANGES_KEPT: Final = 16_384
"""``changes_kept`` of app/scripts/guard.lua."""

TIMER_SWEEPS_OF_A_WHOLE_TURN: Final = 4
"""Ten accounts are four chunks of three."""


@dataclass
class Desk:
    """What changes accounts, and a watchdog's columns beside it, on clean stores."""

    booking: Booking
    redis: Redis
    engine: AsyncEngine
    kept: KeptColumns
    chunks_read: list[int] = field(default_factory=list)

    async def deposit(self, name: str, amount: str = "10000") -> None:
        await self.booking.book_transfer(TransferOrder(name, "deposit", Decimal(amount)), client_transfer_id=None)

    async def trade(self, name: str, side: str, quantity: str) -> None:
        mark = await self.redis.get(keys.mark_price_key(BTC))
        assert mark is not None
        order = TradeOrder(name, BTC, side, Decimal(quantity), Decimal(keys.as_text(mark)))  # type: ignore[arg-type]
        await self.booking.book_trade(order, client_trade_id=None)

    async def mark(self, price: str) -> None:
        await self.booking.marks.set_mark(BTC, Decimal(price), confirm=True)

    async def new_epoch(self) -> None:
        """As after a restart of Redis."""
        await self.redis.delete(keys.STATE_RUN_ID)
        await reconcile(self.booking.store, self.engine, self.booking.settings)

    async def read_kept(self, kept: KeptColumns, *, audit: bool = False) -> tuple[dict[str, bytes], int]:
        """Every row as ``kept`` answers it, packed by column, and how many chunks it read from Redis for that."""
        self.chunks_read.clear()
        packed = _packed([chunk async for chunk, _ in kept.chunks(audit=audit)])
        return packed, len(self.chunks_read)

    async def read_in_full(self) -> dict[str, bytes]:
        contracts = self.booking.contracts
        return _packed([chunk async for chunk in read_chunks(self.redis, contracts, chunk_accounts=CHUNK)])


def _packed(chunks: list[Chunk]) -> dict[str, bytes]:
    columns = dict.fromkeys(column_names([BTC]), b"")
    for chunk in chunks:
        for name, column in zip(columns, kept_columns._columns_of(chunk), strict=True):
            columns[name] += column.tobytes()
    return columns


@pytest.fixture
async def desk(stores: Stores, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    """Ten accounts, each with a position, in chunks of three."""
    settings = settings.model_copy(update={"sweep_chunk_accounts": CHUNK})
    store, engine = StateStore(stores.redis_url, settings), database.create_engine(stores.database_url)
    outbox = Outbox(store, engine, settings)
    await outbox.start()
    booking = Booking(store, outbox, settings)
    made = Desk(booking, store.client, engine, KeptColumns(booking))

    async def counted(client: Redis, first: int, count: int, contracts: dict[str, Contract]) -> Chunk:
        made.chunks_read.append(first)
        return await read_chunk(client, first, count, contracts)

    monkeypatch.setattr(kept_columns, "read_chunk", counted)
    await made.mark("50000")
    for name in NAMES[:10]:
        await made.deposit(name)
        await made.trade(name, "buy", "0.5")
    yield made
    await outbox.stop()
    await store.close()
    await engine.dispose()


async def test_the_first_sweep_reads_every_row_and_the_next_only_what_changed(desk: Desk) -> None:
    _, chunks_read = await desk.read_kept(desk.kept)
    assert chunks_read == 4
    await desk.deposit(NAMES[4], "0.01")
    await desk.deposit(NAMES[10])
    await desk.deposit(NAMES[11])
    packed, chunks_read = await desk.read_kept(desk.kept)
    assert chunks_read == 0
    assert packed == await desk.read_in_full()
    assert len(packed[keys.COLUMN_BALANCE]) == 12 * UNIT.size


async def test_the_rows_come_with_the_marks_of_the_same_moment(desk: Desk) -> None:
    await desk.read_kept(desk.kept)
    await desk.mark("50001.5")
    (first, *_) = [chunk async for chunk, _ in desk.kept.chunks()]
    in_full = await read_chunk(desk.redis, 0, CHUNK, desk.booking.contracts)
    assert first.marks.prices == {BTC: Decimal("50001.5")}
    assert (first.marks.version, first.marks.timestamps_us) == (in_full.marks.version, in_full.marks.timestamps_us)
    assert first.marks.epoch == in_full.marks.epoch
    await desk.redis.set(keys.mark_price_key(BTC), "50002")
    (first, *_) = [chunk async for chunk, _ in desk.kept.chunks()]
    assert (first.marks.prices, first.marks.version) == ({BTC: Decimal(50002)}, in_full.marks.version + 1)
    assert not first.marks.by_hand


@pytest.mark.parametrize("prices", [("33000",), ("33000", "50000")], ids=["opened", "opened and ended"])
async def test_breaches_are_read_by_the_next_sweep(desk: Desk, prices: Sequence[str]) -> None:
    sweeper = Sweeper(desk.booking, Refresher(desk.booking))
    for price in prices:
        before, _ = await desk.read_kept(desk.kept)
        await desk.mark(price)
        await sweeper._sweep()
        packed, chunks_read = await desk.read_kept(desk.kept)
        assert (packed, chunks_read) == (await desk.read_in_full(), 0)
        assert packed[keys.COLUMN_BREACH] != before[keys.COLUMN_BREACH]


NOTE: Final = """
for i = 1, tonumber(ARGV[1]) do note_changes(KEYS[1], changes_noted(KEYS[1]), string.rep('\\0', 8)) end
"""


async def note_changes(desk: Desk, count: int) -> None:
    """So many changes of the first account's row, each noted as every script notes them."""
    await desk.redis.eval(GUARD + NOTE, 1, keys.CHANGED, str(count))


@pytest.mark.parametrize("behind", [1, 1_023, 1_024, 1_025, CHANGES_KEPT - 1, CHANGES_KEPT])
async def test_a_sweep_behind_as_many_changes_as_are_kept_reads_only_those(desk: Desk, behind: int) -> None:
    # As close to the next time that old changes are dropped as can be.
    await note_changes(desk, 2 * CHANGES_KEPT - await noted(desk))
    await desk.read_kept(desk.kept)
    await desk.deposit(NAMES[7], "0.01")
    await note_changes(desk, behind - 1)
    packed, found = await desk.read_kept(desk.kept)
    assert (packed, found) == (await desk.read_in_full(), 0)


@pytest.mark.parametrize(("missed", "chunks_read"), [(0, 0), (1, 4)])
async def test_a_sweep_behind_more_changes_than_are_there_reads_every_row(
    desk: Desk, missed: int, chunks_read: int
) -> None:
    await note_changes(desk, CHANGES_KEPT - missed - await noted(desk))
    await desk.read_kept(desk.kept)
    await desk.deposit(NAMES[7], "0.01")
    await note_changes(desk, CHANGES_KEPT + missed - 1)
    assert await noted(desk) == 2 * CHANGES_KEPT
    await desk.deposit(NAMES[8], "0.01")
    assert await noted(desk) == CHANGES_KEPT + 1
    packed, found = await desk.read_kept(desk.kept)
    assert (packed, found) == (await desk.read_in_full(), chunks_read)


async def noted(desk: Desk) -> int:
    return await desk.redis.strlen(keys.CHANGED) // UNIT.size - 1


async def test_an_empty_system_and_its_first_accounts_are_read(stores: Stores, settings: Settings) -> None:
    settings = settings.model_copy(update={"sweep_chunk_accounts": 1})
    store, engine = StateStore(stores.redis_url, settings), database.create_engine(stores.database_url)
    outbox = Outbox(store, engine, settings)
    await outbox.start()
    booking = Booking(store, outbox, settings)
    desk = Desk(booking, store.client, engine, KeptColumns(booking))
    for accounts in range(4):
        packed, _ = await desk.read_kept(desk.kept)
        assert packed == await desk.read_in_full()
        assert len(packed[keys.COLUMN_BREACH]) == accounts * UNIT.size
        await desk.deposit(NAMES[accounts])
    await outbox.stop()
    await store.close()
    await engine.dispose()


async def test_a_row_written_without_a_note_is_found_by_the_sweeps_of_the_timer(desk: Desk) -> None:
    await desk.read_kept(desk.kept)
    before = metrics.UNNOTED_CHANGES._value.get()
    await desk.redis.setrange(keys.cost_column(BTC), 8 * UNIT.size, UNIT.pack(7))
    damaged = await desk.read_in_full()
    found = [await desk.read_kept(desk.kept, audit=True) for _ in range(TIMER_SWEEPS_OF_A_WHOLE_TURN)]
    assert [packed == damaged for packed, _ in found] == [False, False, True, True]
    # One chunk each time, and every row once the third of them was found to differ.
    assert [chunks_read for _, chunks_read in found] == [1, 1, 1 + 4, 1]
    assert metrics.UNNOTED_CHANGES._value.get() == before + 1


async def test_what_changed_with_a_note_is_no_difference_to_the_timer(desk: Desk) -> None:
    await desk.read_kept(desk.kept)
    before = metrics.UNNOTED_CHANGES._value.get()
    for name in [*NAMES, *NAMES]:
        await desk.deposit(name, "1")
        packed, chunks_read = await desk.read_kept(desk.kept, audit=True)
        assert chunks_read == 1
        assert packed == await desk.read_in_full()
    assert metrics.UNNOTED_CHANGES._value.get() == before


async def test_a_lost_column_is_made_anew_before_anything_is_answered(desk: Desk) -> None:
    await desk.read_kept(desk.kept)
    in_full = await desk.read_in_full()
    await desk.redis.delete(keys.quantity_column(BTC))
    packed, _ = await desk.read_kept(desk.kept)
    assert packed == in_full


async def test_columns_that_another_made_anew_are_read_in_full(desk: Desk) -> None:
    await desk.read_kept(desk.kept)
    in_full = await desk.read_in_full()
    await desk.redis.delete(keys.quantity_column(BTC))
    await desk.booking.column_repair.rebuild()
    packed, chunks_read = await desk.read_kept(desk.kept)
    assert (packed, chunks_read) == (in_full, 4)


@pytest.mark.parametrize("damage", [b"", b"x", b"fifteen letters"])
async def test_every_row_is_read_when_the_changes_were_lost(desk: Desk, damage: bytes) -> None:
    await desk.read_kept(desk.kept)
    await desk.deposit(NAMES[3], "1")
    await desk.redis.set(keys.CHANGED, damage)
    assert await desk.read_kept(desk.kept) == (await desk.read_in_full(), 4)
    await desk.deposit(NAMES[5], "1")
    assert await desk.read_kept(desk.kept) == (await desk.read_in_full(), 4)
    await desk.deposit(NAMES[6], "1")
    assert await desk.read_kept(desk.kept) == (await desk.read_in_full(), 0)


async def test_a_system_in_which_nothing_changes_is_not_read_in_full_for_ever(desk: Desk) -> None:
    await desk.redis.delete(keys.CHANGED)
    sweeper = Sweeper(desk.booking, Refresher(desk.booking))
    chunks_read = []
    for _ in range(4):
        desk.chunks_read.clear()
        await sweeper._sweep()
        chunks_read.append(len(desk.chunks_read))
    assert chunks_read == [4, 4, 0, 0]
    await desk.deposit(NAMES[3], "1")
    assert await desk.read_kept(sweeper._columns) == (await desk.read_in_full(), 0)


async def test_the_rows_kept_are_judged_piece_by_piece_each_under_its_own_name(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten accounts are pieces of four, four and two; in the second nobody is near a line."""
    monkeypatch.setattr(sweep, "PIECE_ROWS", 4)
    sweeper = Sweeper(desk.booking, Refresher(desk.booking))
    await sweeper._sweep()
    # Long 10 or 9 from 50,000 with 10,000: at 49,000 equity is 0 or 1,000, below a tenth of the notional.
    for name, more in ((NAMES[2], "8.5"), (NAMES[8], "9.5"), (NAMES[9], "9.5")):
        await desk.deposit(name, "100000")
        await desk.trade(name, "buy", more)
        await desk.redis.set(keys.balance_key(name), "10000")
        await Audit(desk.booking).step()
    await desk.mark("49000")
    desk.chunks_read.clear()
    swept = await sweeper._sweep()
    assert desk.chunks_read == []
    assert (swept.states["candidate"], swept.states["ok"], swept.open_breaches) == (3, 7, 3)
    breached = [name for name in NAMES[:10] if await desk.redis.hget(keys.ledger_key(name), "breach")]
    assert breached == [NAMES[2], NAMES[8], NAMES[9]]


async def test_every_row_is_read_in_a_new_epoch(desk: Desk) -> None:
    await desk.read_kept(desk.kept)
    await desk.new_epoch()
    assert (await desk.read_kept(desk.kept))[1] == 4
    assert (await desk.read_kept(desk.kept))[1] == 0


async def test_changes_of_another_type_are_named_and_nothing_is_written(desk: Desk) -> None:
    balance = await desk.redis.get(keys.balance_key(NAMES[0]))
    await desk.redis.delete(keys.CHANGED)
    await desk.redis.rpush(keys.CHANGED, "x")
    with pytest.raises(errors.StateDamaged, match=keys.CHANGED):
        await desk.deposit(NAMES[0])
    assert await desk.redis.get(keys.balance_key(NAMES[0])) == balance


STEP: Final = st.one_of(
    st.tuples(st.just("deposit"), st.sampled_from(NAMES)),
    st.tuples(st.sampled_from(["buy", "sell"]), st.sampled_from(NAMES)),
    st.tuples(st.just("sweep at"), st.sampled_from(["44000", "46000", "50000", "54000", "57000"])),
    st.tuples(st.just("edit by hand"), st.sampled_from(NAMES)),
    st.tuples(st.just("damage and repack"), st.sampled_from(NAMES)),
    st.tuples(st.just("lose"), st.sampled_from(column_names([BTC]))),
    st.tuples(st.just("overflow"), st.just("")),
    st.tuples(st.just("new epoch"), st.just("")),
    st.tuples(st.just("other watchdog reads"), st.just("")),
)


@given(data=st.data())
@examples(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
async def test_after_any_changes_what_is_kept_is_what_a_full_read_finds(desk: Desk, data: st.DataObject) -> None:
    """The state goes on from one example to the next; the second watchdog reads now and then."""
    other = KeptColumns(desk.booking)
    sweeper = Sweeper(desk.booking, Refresher(desk.booking))
    for _ in range(3):
        for step, what in data.draw(st.lists(STEP, max_size=8)):
            await _take(desk, step, what, sweeper, other)
        packed, _ = await desk.read_kept(desk.kept, audit=data.draw(st.booleans()))
        assert packed == await desk.read_in_full()
        sums = Sums()
        async for chunk in read_chunks(desk.redis, desk.booking.contracts, chunk_accounts=CHUNK):
            sums.add(chunk)
        assert desk.kept._headroom.sums == sums
    assert (await desk.read_kept(other))[0] == await desk.read_in_full()


async def _take(desk: Desk, step: str, what: str, sweeper: Sweeper, other: KeptColumns) -> None:
    match step:
        case "deposit":
            await desk.deposit(what)
        case "buy" | "sell":
            with suppress(errors.PlimsollError):
                await desk.trade(what, step, "0.5")
        case "sweep at":
            await desk.mark(what)
            await sweeper._sweep(audit=True)
        case "edit by hand":
            await desk.redis.set(keys.balance_key(what), "12345.67")
            if not await desk.redis.hexists(keys.positions_key(what), BTC):
                position = json.dumps({"quantity": "0.1", "avg_price": "50000"})
                await desk.redis.hset(keys.positions_key(what), BTC, position)
            await Audit(desk.booking).step()
        case "damage and repack":
            slot = await desk.redis.hget(keys.ledger_key(what), "slot")
            if slot is not None:
                await desk.redis.setrange(keys.COLUMN_BALANCE, int(slot) * UNIT.size, UNIT.pack(1))
                await desk.booking.column_repair.repack(what)
        case "lose":
            await desk.redis.delete(what)
            await desk.booking.column_repair.rebuild()
        case "overflow":
            await note_changes(desk, 2 * CHANGES_KEPT)
        case "new epoch":
            await desk.new_epoch()
        case _:
            packed: Any = (await desk.read_kept(other))[0]
            assert packed == await desk.read_in_full()
