"""Every threshold that a deposit, a withdrawal or a mark meets: one step above, at and below it."""

from __future__ import annotations

import pytest
import redis.asyncio

from tests.integration.desk import BTC_PERP, Desk, expect, outcome

pytestmark = pytest.mark.asyncio(loop_scope="module")

BOOKED = "booked"
ACCEPTED = "accepted"
NOT_FREE = "insufficient_free_margin"
JUMP = "mark_price_jump"
BAD_AMOUNT = "invalid amount"
BAD_PRICE = "invalid price"


async def long_1_btc(desk: Desk, *, balance: str, mark: str = "50000") -> str:
    """An account with this balance that bought 1 BTC at 50,000, and then the mark moved."""
    account = desk.new_account()
    await desk.mark("50000")
    await desk.deposit(account, balance)
    await desk.buy(account, "1", "50000")
    await desk.mark(mark)
    return account


@pytest.mark.parametrize(
    ("amount", "expected"), [("1000.00000001", NOT_FREE), ("1000", BOOKED), ("999.99999999", BOOKED)]
)
async def test_a_flat_account_may_take_out_its_balance(shared_desk: Desk, amount: str, expected: str) -> None:
    account = shared_desk.new_account()
    await shared_desk.deposit(account, "1000")
    assert outcome(await shared_desk.transfer("withdraw", account, amount)) == expected


@pytest.mark.parametrize(
    ("amount", "expected"),
    # Equity 20,000; 1 BTC at 50,000 uses 10,000 of it.
    [("10000.00000001", NOT_FREE), ("10000", BOOKED), ("9999.99999999", BOOKED)],
)
async def test_a_withdrawal_is_at_most_the_free_margin(shared_desk: Desk, amount: str, expected: str) -> None:
    account = await long_1_btc(shared_desk, balance="20000")
    assert outcome(await shared_desk.transfer("withdraw", account, amount)) == expected


@pytest.mark.parametrize(
    ("amount", "expected"),
    # At 75,000 the free margin is 10,000 + 25,000 - 15,000 = 20,000, and the cash 10,000.
    [("10000.00000001", NOT_FREE), ("10000", BOOKED), ("9999.99999999", BOOKED)],
)
async def test_a_withdrawal_is_at_most_the_balance_however_much_profit_is_unrealised(
    shared_desk: Desk, amount: str, expected: str
) -> None:
    account = await long_1_btc(shared_desk, balance="10000", mark="75000")
    assert outcome(await shared_desk.transfer("withdraw", account, amount)) == expected


async def test_a_withdrawal_that_is_too_large_is_answered_with_the_one_that_passes(shared_desk: Desk) -> None:
    account = await long_1_btc(shared_desk, balance="12345.67")
    refused = expect(await shared_desk.transfer("withdraw", account, "10000"), 409)
    assert (refused["required"], refused["available"]) == ("10000", "2345.67")
    assert refused["next"] == {
        "method": "POST",
        "path": f"/accounts/{account}/withdraw",
        "body": {"amount": "2345.67"},
    }
    expect(await shared_desk.client.post(refused["next"]["path"], json=refused["next"]["body"]), 201)


async def test_without_free_margin_a_withdrawal_is_answered_with_the_deposit_it_would_take(shared_desk: Desk) -> None:
    account = await long_1_btc(shared_desk, balance="10000", mark="49000")
    # Equity 9,000 less 9,800 in use: 800 are missing before the first can leave.
    refused = expect(await shared_desk.transfer("withdraw", account, "1"), 409)
    assert refused["next"]["path"].endswith("/deposit")
    assert refused["next"]["body"] == {"amount": "801"}


@pytest.mark.parametrize(
    ("amount", "expected"),
    # The limit is 40,000,000,000; 0.00000002 less is there already.
    [("0.00000003", "amount_limit"), ("0.00000002", BOOKED), ("0.00000001", BOOKED)],
)
async def test_a_balance_is_at_most_forty_billion(shared_desk: Desk, amount: str, expected: str) -> None:
    account = shared_desk.new_account()
    await shared_desk.deposit(account, "39999999999.99999998")
    assert outcome(await shared_desk.transfer("deposit", account, amount)) == expected


@pytest.mark.parametrize(
    ("amount", "expected"),
    [("40000000000.00000001", BAD_AMOUNT), ("40000000000", BOOKED), ("39999999999.99999999", BOOKED)],
)
async def test_an_amount_is_at_most_forty_billion(shared_desk: Desk, amount: str, expected: str) -> None:
    account = shared_desk.new_account()
    assert outcome(await shared_desk.transfer("deposit", account, amount)) == expected


@pytest.mark.parametrize("verb", ["deposit", "withdraw"])
@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        ("0.00000002", BOOKED),
        ("0.00000001", BOOKED),
        ("0.000000015", BAD_AMOUNT),
        ("0.000000009", BAD_AMOUNT),
        ("0", BAD_AMOUNT),
    ],
)
async def test_an_amount_has_at_most_eight_decimals(shared_desk: Desk, verb: str, amount: str, expected: str) -> None:
    account = shared_desk.new_account()
    await shared_desk.deposit(account, "1")
    assert outcome(await shared_desk.transfer(verb, account, amount)) == expected


async def test_a_deposit_passes_while_trading_is_halted_and_a_withdrawal_waits(
    shared_desk: Desk, shared_redis: redis.asyncio.Redis
) -> None:
    account = shared_desk.new_account()
    await shared_redis.set("state:halted", "1")
    try:
        await shared_desk.deposit(account, "10")
        assert outcome(await shared_desk.transfer("withdraw", account, "1")) == "trading_halted"
    finally:
        await shared_redis.delete("state:halted")


async def test_beside_an_open_position_without_a_mark_a_deposit_passes_and_a_withdrawal_does_not(
    shared_desk: Desk, shared_redis: redis.asyncio.Redis
) -> None:
    account = await long_1_btc(shared_desk, balance="20000")
    await shared_redis.delete(f"mark_price:{BTC_PERP}")
    answer = await shared_desk.deposit(account, "1")
    assert (answer["balance"], answer["equity"]) == ("20001", None)
    assert outcome(await shared_desk.transfer("withdraw", account, "1")) == "no_mark_price"


async def test_a_withdrawal_from_an_account_that_does_not_exist_makes_none(shared_desk: Desk) -> None:
    account = shared_desk.new_account()
    assert outcome(await shared_desk.transfer("withdraw", account, "1")) == "unknown_account"
    assert outcome(await shared_desk.client.get(f"/positions/{account}")) == "unknown_account"


@pytest.mark.parametrize(
    ("price", "expected"),
    # 50 % of 50,000 on either side.
    [
        ("75000.00000001", JUMP),
        ("75000", ACCEPTED),
        ("74999.99999999", ACCEPTED),
        ("25000.00000001", ACCEPTED),
        ("25000", ACCEPTED),
        ("24999.99999999", JUMP),
    ],
)
async def test_a_mark_half_away_from_the_last_is_the_farthest_that_passes_without_a_word(
    shared_desk: Desk, price: str, expected: str
) -> None:
    await long_1_btc(shared_desk, balance="100000")
    answer = await shared_desk.client.post("/mark-price", json={"symbol": BTC_PERP, "price": price})
    assert outcome(answer) == expected


async def test_a_refused_jump_is_answered_with_how_to_confirm_it_and_then_passes(shared_desk: Desk) -> None:
    await long_1_btc(shared_desk, balance="100000")
    refused = expect(await shared_desk.client.post("/mark-price", json={"symbol": BTC_PERP, "price": "1"}), 409)
    assert refused["next"]["body"] == {"symbol": BTC_PERP, "price": "1", "confirm": True}
    accepted = expect(await shared_desk.client.post(refused["next"]["path"], json=refused["next"]["body"]), 200)
    assert accepted["price"] == "1"


async def test_a_refused_mark_moves_no_version(shared_desk: Desk) -> None:
    await long_1_btc(shared_desk, balance="100000")
    version = await shared_desk.mark("50000")
    expect(await shared_desk.client.post("/mark-price", json={"symbol": BTC_PERP, "price": "1"}), 409)
    assert await shared_desk.mark("50000") == version + 1


@pytest.mark.parametrize(
    ("price", "expected"),
    [
        ("10000000.00000001", BAD_PRICE),
        ("10000000", ACCEPTED),
        ("9999999.99999999", ACCEPTED),
        ("0.00000001", ACCEPTED),
        ("0.000000001", BAD_PRICE),
        ("50000.123456789", BAD_PRICE),
        ("0", BAD_PRICE),
        ("-50000", BAD_PRICE),
    ],
)
async def test_a_mark_is_above_zero_at_most_ten_million_and_has_at_most_eight_decimals(
    shared_desk: Desk, price: str, expected: str
) -> None:
    body = {"symbol": BTC_PERP, "price": price, "confirm": True}
    assert outcome(await shared_desk.client.post("/mark-price", json=body)) == expected


async def test_every_accepted_mark_moves_the_version_on_by_one_an_equal_one_too(shared_desk: Desk) -> None:
    first = await shared_desk.mark("50000")
    assert [await shared_desk.mark("50000"), await shared_desk.mark("50001")] == [first + 1, first + 2]
