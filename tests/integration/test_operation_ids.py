"""Operation ids: a retry gets the first answer whatever has happened since, and books nothing."""

from __future__ import annotations

import httpx
import pytest
import redis.asyncio

from tests.integration.desk import BTC_PERP, Desk, expect, outcome

pytestmark = pytest.mark.asyncio(loop_scope="module")

FIRST = "first-trade"


async def trade(desk: Desk, account: str, **more: str) -> httpx.Response:
    order = {"side": "buy", "quantity": "1", "price": "50000", "client_trade_id": FIRST, **more}
    return await desk.client.post("/trade", json={"account_id": account, "symbol": BTC_PERP, **order})


async def booked_account(desk: Desk) -> tuple[str, dict[str, object]]:
    """An account whose whole margin went into one trade, and the answer to that trade."""
    account = desk.new_account()
    await desk.mark("50000")
    await desk.deposit(account, "10000")
    return account, expect(await trade(desk, account), 201)


async def retry_gets_the_first_answer(desk: Desk, account: str, first: dict[str, object]) -> None:
    answer = await trade(desk, account)
    assert expect(answer, 200) == first
    assert answer.headers["Idempotency-Replayed"] == "true"
    assert len(await desk.rows("trades", account_id=account)) == 1


async def test_a_retry_answers_200_with_the_first_result_and_says_so(shared_desk: Desk) -> None:
    account, first = await booked_account(shared_desk)
    await retry_gets_the_first_answer(shared_desk, account, first)


async def test_a_retry_is_not_refused_for_margin_that_the_first_has_used(shared_desk: Desk) -> None:
    account, first = await booked_account(shared_desk)
    assert outcome(await trade(shared_desk, account, client_trade_id="second")) == "insufficient_initial_margin"
    await retry_gets_the_first_answer(shared_desk, account, first)


async def test_a_retry_is_not_refused_for_a_mark_that_has_left_its_price_behind(shared_desk: Desk) -> None:
    account, first = await booked_account(shared_desk)
    await shared_desk.mark("30000")
    assert outcome(await trade(shared_desk, account, client_trade_id="second")) == "price_out_of_band"
    await retry_gets_the_first_answer(shared_desk, account, first)


async def test_a_retry_is_not_refused_while_trading_is_halted(
    shared_desk: Desk, shared_redis: redis.asyncio.Redis
) -> None:
    account, first = await booked_account(shared_desk)
    await shared_redis.set("state:halted", "1")
    try:
        await retry_gets_the_first_answer(shared_desk, account, first)
    finally:
        await shared_redis.delete("state:halted")


async def test_a_retry_is_not_refused_for_a_mark_that_is_gone(
    shared_desk: Desk, shared_redis: redis.asyncio.Redis
) -> None:
    account, first = await booked_account(shared_desk)
    await shared_redis.delete(f"mark_price:{BTC_PERP}")
    await retry_gets_the_first_answer(shared_desk, account, first)


async def test_a_retry_may_write_the_same_content_in_other_digits(shared_desk: Desk) -> None:
    account, first = await booked_account(shared_desk)
    answer = await trade(shared_desk, account, quantity="1.000", price="5e4", side="BUY")
    assert expect(answer, 200) == first


@pytest.mark.parametrize(
    "other", [{"quantity": "0.999999"}, {"price": "50000.01"}, {"side": "sell"}], ids=["quantity", "price", "side"]
)
async def test_the_same_id_with_other_content_conflicts_and_shows_the_first(
    shared_desk: Desk, other: dict[str, str]
) -> None:
    account, _ = await booked_account(shared_desk)
    conflict = expect(await trade(shared_desk, account, **other), 409)
    assert conflict["code"] == "idempotency_conflict"
    assert conflict["first"] == {"symbol": BTC_PERP, "side": "buy", "quantity": "1", "price": "50000"}
    assert len(await shared_desk.rows("trades", account_id=account)) == 1


async def test_a_refusal_consumes_no_id(shared_desk: Desk) -> None:
    account = shared_desk.new_account()
    await shared_desk.mark("50000")
    await shared_desk.deposit(account, "9999")
    assert outcome(await trade(shared_desk, account)) == "insufficient_initial_margin"
    await shared_desk.deposit(account, "1")
    assert outcome(await trade(shared_desk, account)) == "booked"


async def test_an_id_refused_with_one_content_may_be_booked_with_another(shared_desk: Desk) -> None:
    account = shared_desk.new_account()
    await shared_desk.mark("50000")
    await shared_desk.deposit(account, "5000")
    assert outcome(await trade(shared_desk, account)) == "insufficient_initial_margin"
    assert outcome(await trade(shared_desk, account, quantity="0.5")) == "booked"


async def test_two_accounts_may_use_the_same_id(shared_desk: Desk) -> None:
    await booked_account(shared_desk)
    await booked_account(shared_desk)


async def test_a_trade_a_deposit_and_a_withdrawal_of_one_account_may_use_the_same_id(shared_desk: Desk) -> None:
    account, _ = await booked_account(shared_desk)
    for verb in ("deposit", "withdraw"):
        answer = await shared_desk.transfer(verb, account, "1", client_transfer_id=FIRST)
        assert outcome(answer) == "booked"


async def test_a_transfer_is_replayed_and_conflicts_as_a_trade_does(shared_desk: Desk) -> None:
    account = shared_desk.new_account()
    first = await shared_desk.deposit(account, "10", client_transfer_id="salary")
    again = await shared_desk.transfer("deposit", account, "10.00", client_transfer_id="salary")
    assert expect(again, 200) == first
    other = await shared_desk.transfer("deposit", account, "11", client_transfer_id="salary")
    assert outcome(other) == "idempotency_conflict"
    assert (await shared_desk.account(account))["balance"] == "10"


async def test_a_retry_of_a_withdrawal_that_emptied_the_account_is_replayed(shared_desk: Desk) -> None:
    account = shared_desk.new_account()
    await shared_desk.deposit(account, "10")
    answers = [await shared_desk.transfer("withdraw", account, "10", client_transfer_id="all-of-it") for _ in range(2)]
    assert [outcome(answer) for answer in answers] == ["booked", "replayed"]


async def test_without_an_id_of_the_client_the_server_makes_one_that_can_be_used_for_a_retry(
    shared_desk: Desk,
) -> None:
    account = shared_desk.new_account()
    await shared_desk.mark("50000")
    await shared_desk.deposit(account, "100000")
    first = await shared_desk.buy(account, "1", "50000")
    second = await shared_desk.buy(account, "1", "50000")
    assert first["client_trade_id"] != second["client_trade_id"]
    answer = await trade(shared_desk, account, client_trade_id=first["client_trade_id"])
    assert expect(answer, 200)["trade_id"] == first["trade_id"]
