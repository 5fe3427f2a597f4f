"""A trade on an account this process changed last is decided without a read, and committed only if that was right."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import pytest
from redis.asyncio import Redis

from app import database, errors
from app import redis_client as keys
from app.booking import Booked, Booking
from app.config import Settings
from app.embedded import Stores
from app.outbox import Outbox
from app.recent import Basis
from app.records import Snapshot
from app.redis_client import StateStore
from app.services.trading import Account, TradeOrder, TransferOrder
from app.shared_accounts import AccountTexts, SharedAccounts
from tests.integration.desk import BTC_PERP

ELSEWHERE: Final = "50100"


class CountingBooking(Booking):
    """A real one that counts its reads, and keeps the snapshots it decides on."""

    reads = 0
    judged: tuple[Snapshot, ...] = ()

    def basis(self, snapshot: Snapshot, account: Account) -> Basis:
        self.judged += (snapshot,)
        return super().basis(snapshot, account)

    async def read(self, account_id: str, *, operation: str | None = None) -> Snapshot:
        self.reads += 1
        return await super().read(account_id, operation=operation)


@dataclass
class Counter:
    """One process's way to book, with the reads it took."""

    booking: CountingBooking
    redis: Redis

    async def deposit(self, amount: str) -> Booked:
        order = TransferOrder("alice", "deposit", Decimal(amount))
        return await self.booking.book_transfer(order, client_transfer_id=None)

    async def buy(self, quantity: str, *, client_trade_id: str | None = None, price: str = "50000") -> dict[str, Any]:
        order = TradeOrder("alice", BTC_PERP, "buy", Decimal(quantity), Decimal(price))
        return (await self.booking.book_trade(order, client_trade_id=client_trade_id)).answer

    async def reads_to_buy(self, quantity: str) -> int:
        before = self.booking.reads
        await self.buy(quantity)
        return self.booking.reads - before


@asynccontextmanager
async def counter_of(
    stores: Stores, settings: Settings, shared: SharedAccounts | None = None
) -> AsyncIterator[Counter]:
    store, engine = StateStore(stores.redis_url, settings), database.create_engine(stores.database_url)
    outbox = Outbox(store, engine, settings)
    await outbox.start()
    yield Counter(CountingBooking(store, outbox, settings, shared), store.client)
    await outbox.stop()
    await store.close()
    await engine.dispose()


@pytest.fixture
async def counters(stores: Stores, settings: Settings) -> AsyncIterator[tuple[Counter, Counter]]:
    """Two processes' worth; at the first of them alice has just bought, so it knows her and the mark."""
    async with AsyncExitStack() as opened:
        here, there = [await opened.enter_async_context(counter_of(stores, settings)) for _ in range(2)]
        await here.booking.marks.set_mark(BTC_PERP, Decimal(50000), confirm=True)
        await here.deposit("100000")
        await here.buy("0.1")
        yield here, there


async def test_a_trade_on_a_known_account_reads_nothing_and_books_the_same(counters: tuple[Counter, Counter]) -> None:
    here, there = counters
    assert await here.reads_to_buy("0.2") == 0
    assert await there.reads_to_buy("0.3") == 1
    answer = await here.buy("0.4")
    assert answer["position"] == {"quantity": "1", "avg_price": "50000"}
    assert (answer["balance"], answer["equity"], answer["used_margin"]) == ("100000", "100000", "10000")


async def test_a_wrong_guess_is_answered_with_the_account_as_another_process_left_it(
    counters: tuple[Counter, Counter],
) -> None:
    here, there = counters
    await there.buy("1")
    assert await here.reads_to_buy("0.5") == 0
    assert (await here.buy("0.1"))["position"]["quantity"] == "1.7"


async def test_what_a_wrong_guess_is_answered_with_is_what_a_read_finds(counters: tuple[Counter, Counter]) -> None:
    here, there = counters
    await there.buy("1")
    read = await there.booking.read("alice")
    await here.buy("0.5")
    found = here.booking.judged[-1]
    assert found == replace(read, now_us=found.now_us)


async def test_a_mark_that_moved_elsewhere_is_the_one_decided_on(counters: tuple[Counter, Counter]) -> None:
    here, there = counters
    await there.booking.marks.set_mark(BTC_PERP, Decimal(ELSEWHERE), confirm=False)
    assert (await here.buy("0.1"))["mark_price"] == ELSEWHERE
    assert await here.reads_to_buy("0.1") == 0


async def test_a_mark_set_by_hand_is_the_one_decided_on(counters: tuple[Counter, Counter]) -> None:
    here, _ = counters
    await here.redis.set(keys.mark_price_key(BTC_PERP), ELSEWHERE)
    assert (await here.buy("0.1"))["mark_price"] == ELSEWHERE


async def test_a_mark_that_cannot_be_read_stops_the_known_account_too(counters: tuple[Counter, Counter]) -> None:
    here, _ = counters
    await here.redis.delete(keys.mark_price_key(BTC_PERP))
    await here.redis.lpush(keys.mark_price_key(BTC_PERP), "50000")
    with pytest.raises(errors.NoMarkPrice):
        await here.buy("0.1")


async def test_a_mark_that_was_missing_and_is_set_by_hand_is_no_ground_for_a_guess(
    counters: tuple[Counter, Counter],
) -> None:
    here, _ = counters
    await here.redis.delete(keys.mark_price_key(BTC_PERP))
    await here.deposit("1")
    await here.redis.set(keys.mark_price_key(BTC_PERP), ELSEWHERE)
    assert (await here.deposit("1")).answer["equity"] == "100012"


async def test_a_wrong_guess_is_made_once_though_the_mark_version_went_back(counters: tuple[Counter, Counter]) -> None:
    here, _ = counters
    await here.redis.set(keys.MARK_VERSION, "0")
    judged = len(here.booking.judged)
    for _ in range(3):
        await here.buy("0.1")
    assert len(here.booking.judged) == judged + 1


async def test_a_halt_is_heard_of(counters: tuple[Counter, Counter]) -> None:
    here, _ = counters
    await here.redis.set(keys.STATE_HALTED, "1")
    with pytest.raises(errors.TradingHalted):
        await here.buy("0.1")
    await here.redis.delete(keys.STATE_HALTED)
    await here.buy("0.1")
    assert await here.reads_to_buy("0.1") == 0


async def test_an_edit_by_hand_is_adopted(counters: tuple[Counter, Counter]) -> None:
    here, _ = counters
    await here.redis.set(keys.balance_key("alice"), "70000")
    assert (await here.buy("0.1"))["balance"] == "70000"


async def test_an_account_that_is_gone_is_not_written(counters: tuple[Counter, Counter]) -> None:
    here, _ = counters
    await here.redis.delete(keys.balance_key("alice"))
    with pytest.raises(errors.AccountQuarantined):
        await here.buy("0.1")


async def test_a_new_epoch_is_noticed(counters: tuple[Counter, Counter]) -> None:
    here, _ = counters
    await here.redis.hincrby(keys.STATE_EPOCH, "epoch", 1)
    judged = len(here.booking.judged)
    assert await here.reads_to_buy("0.1") == 0
    assert len(here.booking.judged) == judged + 1


async def test_nothing_is_refused_on_a_guess(counters: tuple[Counter, Counter]) -> None:
    here, there = counters
    with pytest.raises(errors.InsufficientInitialMargin):
        await here.buy("10")
    await there.deposit("1000000")
    await here.buy("0.1")
    await there.deposit("1000000")
    assert (await here.buy("10"))["position"]["quantity"] == "10.2"


async def test_an_operation_booked_elsewhere_is_replayed(counters: tuple[Counter, Counter]) -> None:
    here, there = counters
    first = await there.buy("0.1", client_trade_id="once")
    assert (await here.buy("0.1", client_trade_id="once"))["trade_id"] == first["trade_id"]


async def test_an_account_in_breach_is_never_guessed(counters: tuple[Counter, Counter]) -> None:
    here, _ = counters
    await here.redis.hset(keys.ledger_key("alice"), mapping={"breach": "7", "breach_at": "1", "breach_version": "1"})
    assert await here.reads_to_buy("0.1") == 0
    assert await here.redis.hget(keys.ledger_key("alice"), "breach") == b""
    assert await here.reads_to_buy("0.1") == 1


async def test_where_marks_go_stale_every_trade_reads(stores: Stores, settings: Settings) -> None:
    aging = settings.model_copy(update={"mark_max_age_seconds": 60.0})
    async with counter_of(stores, aging) as here:
        await here.booking.marks.set_mark(BTC_PERP, Decimal(50000), confirm=True)
        await here.deposit("100000")
        assert [await here.reads_to_buy("0.1") for _ in range(3)] == [1, 1, 1]


@pytest.fixture
async def workers(
    stores: Stores, settings: Settings, tmp_path: Path
) -> AsyncIterator[tuple[Counter, Counter, SharedAccounts]]:
    """Two workers of one API, both of which know the mark, and what they share; the second bought for alice last."""
    SharedAccounts.create(tmp_path)
    async with AsyncExitStack() as opened:
        here, there = [
            await opened.enter_async_context(counter_of(stores, settings, SharedAccounts(tmp_path))) for _ in range(2)
        ]
        await here.booking.marks.set_mark(BTC_PERP, Decimal(50000), confirm=True)
        await here.deposit("100000")
        await here.buy("0.1")
        await there.buy("0.1")
        yield here, there, SharedAccounts(tmp_path)


async def test_a_worker_guesses_an_account_as_another_left_it(
    workers: tuple[Counter, Counter, SharedAccounts],
) -> None:
    for buyer in (*workers[:2], *workers[:2], workers[1]):
        judged = len(buyer.booking.judged)
        assert await buyer.reads_to_buy("0.1") == 0
        assert len(buyer.booking.judged) == judged, "the guess was wrong"
    assert (await workers[0].buy("0.1"))["position"]["quantity"] == "0.8"


@pytest.mark.parametrize(
    "wrong",
    [
        {"balance_text": b"1"},  # too little for the trade, which is refused only on what was read
        {"balance_text": b"900000"},
        {"fields": ()},
        {"fields": (b"BTC-PERP", b'{"quantity": "-0.2", "avg_price": "50000", "cost": "-10000"}')},
        {"seq_text": b"2"},
        {"epoch": b"0"},
        {"balance_text": b"100000x"},
        {"fields": (b"BTC-PERP", b'{"quantity": "0.2", "avg_p')},
        {"fields": (b"BTC-PE", b"")},
    ],
    ids=str,
)
async def test_whatever_the_workers_share_nothing_is_booked_on_what_is_wrong(
    workers: tuple[Counter, Counter, SharedAccounts], wrong: dict[str, Any]
) -> None:
    here, _, shared = workers
    texts = shared.take("alice")
    assert texts is not None
    shared.keep(texts._replace(**wrong))
    answer = await here.buy("0.1")
    assert (answer["balance"], answer["position"]["quantity"]) == ("100000", "0.3")
    newest = shared.take("alice")
    assert newest is not None
    assert newest.seq_text == b"4"


async def test_while_another_worker_changes_an_account_it_is_read(
    workers: tuple[Counter, Counter, SharedAccounts],
) -> None:
    here, _, shared = workers
    await here.buy("0.1")
    assert isinstance(shared.take("alice"), AccountTexts)
    assert await here.reads_to_buy("0.1") == 1
