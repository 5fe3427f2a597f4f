"""Changes asked for at the same time are committed in one call of Redis, and each comes to what it would alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import count
from typing import Any, Final

import pytest
from redis.asyncio import Redis

from app import background, database, errors, reconcile
from app import redis_client as keys
from app.booking import Booked, Booking
from app.commit import COMMITS_PER_CALL
from app.config import Settings
from app.contracts import BTC_PERP, Contract
from app.embedded import Stores
from app.outbox import Outbox
from app.redis_client import Script, StateStore
from app.services import trading
from app.services.trading import Side, TradeOrder, TransferOrder
from app.verify import verify

BTC: Final = BTC_PERP.symbol
ETH: Final = "ETH-PERP"
NAMES: Final = ("alice", "bob", "carol", "dave")
ATTEMPTS_MAX: Final = 20


@dataclass
class Desk:
    """One process's way to book, with how many changes each of its calls of Redis committed."""

    booking: Booking
    redis: Redis
    settings: Settings
    stores: Stores
    calls: list[int] = field(default_factory=list)

    def deposit(self, account_id: str, amount: str = "100000") -> Coroutine[Any, Any, Booked]:
        return self.booking.book_transfer(
            TransferOrder(account_id, "deposit", Decimal(amount)), client_transfer_id=None
        )

    def trade(
        self,
        account_id: str,
        side: Side,
        quantity: str = "0.1",
        *,
        symbol: str = BTC,
        client_id: str | None = None,
    ) -> Coroutine[Any, Any, Booked]:
        order = TradeOrder(account_id, symbol, side, Decimal(quantity), Decimal(50000 if symbol == BTC else 2000))
        return self.booking.book_trade(order, client_trade_id=client_id)

    async def together(self, *asked: Coroutine[Any, Any, Booked]) -> list[Booked | BaseException]:
        """What comes of changes that are asked for in one turn of the loop."""
        self.calls.clear()
        return await asyncio.gather(*asked, return_exceptions=True)

    async def differences(self) -> list[str]:
        return (await asyncio.to_thread(verify, self.settings, self.stores)).differences


@asynccontextmanager
async def desk_on(
    stores: Stores, settings: Settings, monkeypatch: pytest.MonkeyPatch, *, outbox_runs: bool = True
) -> AsyncIterator[Desk]:
    store, engine = StateStore(stores.redis_url, settings), database.create_engine(stores.database_url)
    outbox = Outbox(store, engine, settings)
    if outbox_runs:
        await outbox.start()
    else:
        outbox.postgres_away = True
    opened = Desk(Booking(store, outbox, settings), store.client, settings, stores)
    run = StateStore.run

    async def counted(
        self: StateStore, script: Script, keys_called: Sequence[str], arguments: Sequence[str | bytes | int]
    ) -> list[Any]:
        answer = await run(self, script, keys_called, arguments)
        if script is keys.COMMIT:
            opened.calls.append(len(answer) - 1)
        return answer

    monkeypatch.setattr(StateStore, "run", counted)
    for symbol, price in ((BTC, 50000), (ETH, 2000))[: len(settings.contracts)]:
        await opened.booking.marks.set_mark(symbol, Decimal(price), confirm=True)
    yield opened
    await outbox.stop()
    await store.close()
    await engine.dispose()


@pytest.fixture
async def desk(stores: Stores, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    """A desk where each of ``NAMES`` has funds and a position, as this process left them."""
    async with desk_on(stores, settings, monkeypatch) as opened:
        for name in NAMES:
            await opened.deposit(name)
            await opened.trade(name, "buy")
        yield opened


def booked(outcomes: Sequence[Booked | BaseException]) -> list[dict[str, Any]]:
    """The answers, every one of them to a booked operation."""
    answers = []
    for outcome in outcomes:
        assert isinstance(outcome, Booked), outcome
        answers.append(outcome.answer)
    return answers


async def test_accounts_that_trade_at_once_are_committed_in_one_call(desk: Desk) -> None:
    answers = booked(await desk.together(*(desk.trade(name, "buy", "0.2") for name in NAMES)))
    assert desk.calls == [len(NAMES)]
    first = answers[0]["trade_id"]
    assert [answer["trade_id"] for answer in answers] == [first + number for number in range(len(NAMES))]
    assert {answer["position"]["quantity"] for answer in answers} == {"0.3"}
    assert all(answer["recorded"] for answer in answers)
    assert await desk.differences() == []


async def test_no_call_commits_more_than_it_may(desk: Desk) -> None:
    names = [f"many-{number}" for number in range(2 * COMMITS_PER_CALL + 3)]
    booked(await desk.together(*(desk.deposit(name) for name in names)))
    booked(await desk.together(*(desk.trade(name, "sell") for name in names)))
    assert desk.calls == [COMMITS_PER_CALL, COMMITS_PER_CALL, 3]
    assert await desk.differences() == []


async def test_accounts_that_are_made_at_once_get_rows_of_their_own(desk: Desk) -> None:
    made = len(NAMES)
    for attempt in count():
        names = [f"{name}-{attempt}" for name in ("erin", "frank", "grace")]
        booked(await desk.together(*(desk.deposit(name) for name in names)))
        slots = [int(await desk.redis.hget(keys.ledger_key(name), "slot") or -1) for name in names]
        assert sorted(slots) == list(range(made, made + len(names)))
        assert [await desk.redis.lindex(keys.ACCOUNTS, slot) for slot in slots] == [name.encode() for name in names]
        made += len(names)
        # Redis writes what a script answers in pieces, so the reads before may be answered one by one.
        if desk.calls == [len(names)]:
            break
        assert attempt < ATTEMPTS_MAX, "no three accounts were made by one call"
    assert await desk.differences() == []


async def test_of_two_changes_of_one_account_in_a_call_the_later_is_decided_again(desk: Desk) -> None:
    known, *_ = booked(await desk.together(desk.deposit("alice", "1"), desk.deposit("bob", "1")))
    answers = booked(await desk.together(*(desk.deposit("alice", "10") for _ in range(3))))
    assert sorted(Decimal(answer["balance"]) - Decimal(known["balance"]) for answer in answers) == [10, 20, 30]
    assert sum(desk.calls) > len(answers)
    assert await desk.differences() == []


async def test_one_account_that_is_made_twice_at_once_has_one_row(desk: Desk) -> None:
    answers = booked(await desk.together(desk.deposit("erin", "1"), desk.deposit("erin", "2")))
    assert max(Decimal(answer["balance"]) for answer in answers) == 3
    assert await desk.redis.llen(keys.ACCOUNTS) == len(NAMES) + 1
    assert await desk.differences() == []


async def test_one_operation_that_is_sent_twice_at_once_is_booked_once(desk: Desk) -> None:
    outcomes = await desk.together(
        desk.trade("alice", "buy", client_id="once"), desk.trade("alice", "buy", client_id="once")
    )
    first, second = booked(outcomes)
    # The repeat may be answered while the row is on its way: it says what is so at that moment.
    for answer in (first, second):
        assert isinstance(answer.pop("recorded"), bool)
    assert first == second
    assert {outcome.outcome for outcome in outcomes if isinstance(outcome, Booked)} == {"booked", "replayed"}
    assert first["position"]["quantity"] == "0.2"
    assert await desk.differences() == []


async def test_positions_opened_and_closed_in_one_call_are_counted(desk: Desk) -> None:
    booked(await desk.together(desk.deposit("erin"), desk.deposit("frank")))
    booked(
        await desk.together(
            desk.trade("alice", "sell"),
            desk.trade("bob", "buy"),
            desk.trade("erin", "buy"),
            desk.trade("frank", "sell"),
        )
    )
    assert len(desk.calls) == 1
    assert await desk.redis.get(keys.open_positions_key(BTC)) == b"%d" % (len(NAMES) - 1 + 2)
    assert await desk.differences() == []


@pytest.mark.parametrize("key", [keys.balance_key, keys.positions_key, keys.ledger_key])
async def test_an_account_whose_key_is_damaged_keeps_no_other_from_being_committed(
    desk: Desk, key: Callable[[str], str]
) -> None:
    await desk.redis.delete(key("alice"))
    await desk.redis.sadd(key("alice"), "not what it should be")
    alice, *others = await desk.together(*(desk.trade(name, "buy") for name in NAMES))
    assert isinstance(alice, errors.AccountQuarantined)
    assert len(booked(others)) == len(NAMES) - 1
    assert desk.calls == [len(NAMES)]


async def test_a_ledger_that_names_the_slot_of_another_is_refused_and_the_other_committed(desk: Desk) -> None:
    await desk.redis.hset(keys.ledger_key("alice"), "slot", 1)
    alice, bob = await desk.together(desk.trade("alice", "buy"), desk.trade("bob", "buy"))
    assert isinstance(alice, errors.AccountQuarantined)
    assert booked([bob])[0]["position"]["quantity"] == "0.2"


async def test_a_guess_on_an_account_that_cannot_be_read_any_more_keeps_no_other_from_being_booked(desk: Desk) -> None:
    await desk.redis.hset(keys.ledger_key("alice"), "seq", "abc")
    alice, *others = await desk.together(*(desk.trade(name, "buy") for name in NAMES))
    assert isinstance(alice, errors.AccountQuarantined)
    assert {answer["position"]["quantity"] for answer in booked(others)} == {"0.2"}


async def test_a_decision_that_breaks_breaks_no_other(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    decide = trading.decide_trade

    def broken_for_alice(account: trading.Account, order: TradeOrder, market: trading.Market) -> trading.TradeDecision:
        return decide(account, order, market) if account.account_id != "alice" else 1 / 0  # type: ignore[return-value]

    monkeypatch.setattr(trading, "decide_trade", broken_for_alice)
    alice, *others = await desk.together(*(desk.trade(name, "buy") for name in NAMES))
    assert isinstance(alice, ZeroDivisionError)
    assert len(booked(others)) == len(NAMES) - 1


async def test_a_damaged_counter_of_open_positions_stops_trades_and_no_deposit(desk: Desk) -> None:
    await desk.redis.set(keys.open_positions_key(BTC), "many")
    alice, bob = await desk.together(desk.trade("alice", "buy"), desk.deposit("bob", "1"))
    assert isinstance(alice, errors.StateDamaged)
    assert booked([bob])[0]["balance"] == "100001"


async def test_counters_of_the_wrong_type_are_found_before_anything_is_written(desk: Desk) -> None:
    await desk.redis.hset(keys.ledger_key("bob"), mapping={"breach": "7", "breach_at": "1", "breach_version": "1"})
    before = await desk.redis.get(keys.HISTORY_LAST_ID)
    for key in (keys.open_positions_key(BTC), keys.RECOVERIES):
        await desk.redis.delete(key)
        await desk.redis.sadd(key, "not a number")
    alice, bob = await desk.together(desk.trade("alice", "sell"), desk.deposit("bob", "1"))
    assert isinstance(alice, errors.StateDamaged)
    assert isinstance(bob, errors.StateDamaged)
    assert await desk.redis.get(keys.HISTORY_LAST_ID) == before
    assert await desk.redis.get(keys.balance_key("bob")) == b"100000"


async def test_the_end_of_a_breach_takes_its_place_in_the_outbox_too(
    stores: Stores, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = settings.model_copy(update={"outbox_hard_limit": 6})
    async with desk_on(stores, small, monkeypatch, outbox_runs=False) as desk:
        booked(await desk.together(*(desk.deposit(name) for name in NAMES)))
        for name in NAMES:
            await desk.redis.hset(
                keys.ledger_key(name), mapping={"breach": "7", "breach_at": "1", "breach_version": "1"}
            )
        first, *others = await desk.together(*(desk.deposit(name, "1") for name in NAMES))
        booked([first])
        assert all(isinstance(other, errors.OutboxFull) for other in others)
        assert await desk.redis.xlen(keys.OUTBOX) == len(NAMES) + 2


async def test_a_breach_that_ends_among_others_has_its_own_row(desk: Desk) -> None:
    await desk.redis.hset(keys.ledger_key("bob"), mapping={"breach": "7", "breach_at": "1", "breach_version": "1"})
    outcomes = await desk.together(*(desk.deposit(name, "1") for name in NAMES))
    ids = [answer["transfer_id"] for answer in booked(outcomes)]
    recovered = await desk.booking.outbox.is_recorded("recovery", ids[1] + 1, until=time.monotonic() + 2)
    assert recovered
    assert ids[1] + 1 not in ids
    assert len(set(ids)) == len(NAMES)
    assert await desk.redis.get(keys.RECOVERIES) == b"1"
    assert await desk.redis.hget(keys.ledger_key("bob"), "breach") == b""


async def test_the_outbox_is_full_after_so_many_of_a_call(
    stores: Stores, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = settings.model_copy(update={"outbox_soft_limit": 3, "outbox_hard_limit": 5})
    async with desk_on(stores, small, monkeypatch, outbox_runs=False) as desk:
        booked(await desk.together(desk.deposit("alice"), desk.deposit("bob")))
        first, second = await desk.together(desk.trade("alice", "buy"), desk.trade("bob", "buy"))
        assert booked([first])[0]["recorded"] is False
        assert isinstance(second, errors.OutboxFull)
        # A deposit adds no risk: it may go to the hard limit.
        outcomes = await desk.together(*(desk.deposit(name, "1") for name in ("carol", "dave", "erin")))
        assert len(booked(outcomes[:2])) == 2
        assert isinstance(outcomes[2], errors.OutboxFull)


async def test_when_redis_refuses_the_call_each_is_told_by_its_own_id(desk: Desk) -> None:
    await desk.redis.config_set("maxmemory", 1)
    try:
        outcomes = await desk.together(*(desk.trade(name, "buy", client_id=f"of-{name}") for name in NAMES))
    finally:
        await desk.redis.config_set("maxmemory", 0)
    for name, outcome in zip(NAMES, outcomes, strict=True):
        assert isinstance(outcome, errors.StoreUnavailable)
        assert outcome.members["client_trade_id"] == f"of-{name}"
    assert len(booked(await desk.together(*(desk.trade(name, "buy") for name in NAMES)))) == len(NAMES)
    assert await desk.differences() == []


async def test_scripts_that_are_flushed_all_the_time_keep_nobody_from_trading(desk: Desk) -> None:
    async def flush() -> None:
        while True:
            await desk.redis.script_flush()

    flushing = asyncio.create_task(flush())
    for _ in range(50):
        booked(await desk.together(*(desk.trade(name, "buy", "0.001") for name in NAMES)))
    await background.end([flushing])
    assert await desk.differences() == []


async def test_trades_in_several_symbols_share_a_call(
    stores: Stores, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    contracts = (BTC_PERP, Contract(symbol=ETH))
    both = settings.model_copy(update={"contracts": contracts})
    async with desk_on_contracts(stores, both, monkeypatch) as desk:
        booked(await desk.together(desk.deposit("alice"), desk.deposit("bob"), desk.deposit("carol")))
        answers = booked(
            await desk.together(
                desk.trade("alice", "buy"),
                desk.trade("bob", "sell", symbol=ETH),
                desk.trade("carol", "buy", symbol=ETH),
            )
        )
        assert len(desk.calls) == 1
        assert [answer["used_margin"] for answer in answers] == ["1000", "40", "40"]
        booked(await desk.together(desk.trade("alice", "buy", symbol=ETH), desk.trade("bob", "buy", symbol=ETH)))
        assert await desk.redis.mget(keys.open_positions_key(BTC), keys.open_positions_key(ETH)) == [b"1", b"2"]
        assert await desk.differences() == []


@asynccontextmanager
async def desk_on_contracts(stores: Stores, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    """A desk on a state of the contracts of ``settings``."""
    client = Redis.from_url(stores.redis_url)
    await client.flushall()
    await client.aclose()
    await asyncio.to_thread(reconcile.migrate, settings, stores)
    async with desk_on(stores, settings, monkeypatch) as desk:
        yield desk
