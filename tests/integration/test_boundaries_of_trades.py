"""Every threshold that a trade meets: one step above, at and below it."""

from __future__ import annotations

import pytest
import redis.asyncio

from tests.integration.desk import BTC_PERP, Desk, expect, outcome

pytestmark = pytest.mark.asyncio(loop_scope="module")

BOOKED = "booked"
NO_MARGIN = "insufficient_initial_margin"
OUT_OF_BAND = "price_out_of_band"
HALTED = "trading_halted"
BAD_PRICE = "invalid price"
BAD_QUANTITY = "invalid quantity"


@pytest.mark.parametrize("side", ["buy", "sell"])
@pytest.mark.parametrize(
    ("balance", "expected"),
    # 1 BTC at a mark of 50,000 is a notional of 50,000, and requires 20 % of it: 10,000.
    [("10000.00000001", BOOKED), ("10000", BOOKED), ("9999.99999999", NO_MARGIN)],
)
async def test_opening_takes_a_balance_of_the_initial_margin(
    shared_desk: Desk, side: str, balance: str, expected: str
) -> None:
    account = shared_desk.new_account()
    await shared_desk.mark("50000")
    await shared_desk.deposit(account, balance)
    assert outcome(await shared_desk.trade(account, side, "1", "50000")) == expected


@pytest.mark.parametrize("side", ["buy", "sell"])
@pytest.mark.parametrize(("quantity", "expected"), [("1.000001", NO_MARGIN), ("1", BOOKED), ("0.999999", BOOKED)])
async def test_a_balance_carries_five_times_itself_and_not_a_lot_more(
    shared_desk: Desk, side: str, quantity: str, expected: str
) -> None:
    account = shared_desk.new_account()
    await shared_desk.mark("50000")
    await shared_desk.deposit(account, "10000")
    assert outcome(await shared_desk.trade(account, side, quantity, "50000")) == expected


@pytest.mark.parametrize(("quantity", "expected"), [("0.500001", NO_MARGIN), ("0.5", BOOKED), ("0.499999", BOOKED)])
async def test_an_increase_needs_the_margin_of_the_whole_position_at_the_present_mark(
    shared_desk: Desk, quantity: str, expected: str
) -> None:
    account = shared_desk.new_account()
    await shared_desk.mark("50000")
    await shared_desk.deposit(account, "16000")
    await shared_desk.buy(account, "1", "50000")
    await shared_desk.mark("52000")
    # Equity 16,000 + 2,000 - 2,400 = 15,600, just 20 % of 1.5 BTC at 52,000.
    expect(await shared_desk.transfer("withdraw", account, "2400"), 201)
    assert outcome(await shared_desk.trade(account, "buy", quantity, "52000")) == expected


@pytest.mark.parametrize(("side", "price"), [("buy", "50000.01"), ("sell", "49999.99")])
@pytest.mark.parametrize(
    ("balance", "expected"),
    # One tick worse than the mark loses 0.01 on the spot: 10,000 + 0.01.
    [("10000.01000001", BOOKED), ("10000.01", BOOKED), ("10000.00999999", NO_MARGIN)],
)
async def test_what_opening_loses_against_the_mark_has_to_be_there_too(
    shared_desk: Desk, side: str, price: str, balance: str, expected: str
) -> None:
    account = shared_desk.new_account()
    await shared_desk.mark("50000")
    await shared_desk.deposit(account, balance)
    assert outcome(await shared_desk.trade(account, side, "1", price)) == expected


@pytest.mark.parametrize(("side", "price"), [("buy", "45000"), ("sell", "55000")])
@pytest.mark.parametrize(
    ("balance", "expected"),
    [("10000.00000001", BOOKED), ("10000", BOOKED), ("9999.99999999", NO_MARGIN)],
)
async def test_what_opening_gains_against_the_mark_makes_no_margin_from_nothing(
    shared_desk: Desk, side: str, price: str, balance: str, expected: str
) -> None:
    """At the edge of the band 1 BTC would gain 5,000 at once; its margin of 10,000 is asked for all the same."""
    account = shared_desk.new_account()
    await shared_desk.mark("50000")
    await shared_desk.deposit(account, balance)
    assert outcome(await shared_desk.trade(account, side, "1", price)) == expected


@pytest.mark.parametrize(("quantity", "expected"), [("2.500001", NO_MARGIN), ("2.5", BOOKED), ("2.499999", BOOKED)])
async def test_a_flip_counts_what_its_closing_part_gains_and_not_what_its_opening_part_does(
    shared_desk: Desk, quantity: str, expected: str
) -> None:
    account = shared_desk.new_account()
    await shared_desk.mark("50000")
    await shared_desk.deposit(account, "10000")
    await shared_desk.buy(account, "1", "50000")
    # Selling at 55,000 realises 5,000 on the BTC held; the 15,000 then there carry a short of 1.5 BTC.
    assert outcome(await shared_desk.trade(account, "sell", quantity, "55000")) == expected


async def test_a_refusal_for_margin_tells_the_deposit_that_is_missing_to_the_last_digit(shared_desk: Desk) -> None:
    account = shared_desk.new_account()
    await shared_desk.mark("50000")
    await shared_desk.deposit(account, "9999.99999999")
    refused = expect(await shared_desk.trade(account, "buy", "1", "50000"), 409)
    assert (refused["required"], refused["available"]) == ("10000", "9999.99999999")
    assert refused["next"] == {
        "method": "POST",
        "path": f"/accounts/{account}/deposit",
        "body": {"amount": "0.00000001"},
    }
    await shared_desk.deposit(account, refused["next"]["body"]["amount"])
    await shared_desk.buy(account, "1", "50000")


@pytest.mark.parametrize("side", ["buy", "sell"])
@pytest.mark.parametrize(
    ("price", "expected"),
    # 10 % of 50,000 on either side: 45,000 to 55,000.
    [
        ("55000.01", OUT_OF_BAND),
        ("55000", BOOKED),
        ("54999.99", BOOKED),
        ("45000.01", BOOKED),
        ("45000", BOOKED),
        ("44999.99", OUT_OF_BAND),
    ],
)
async def test_a_price_lies_within_a_tenth_of_the_mark(shared_desk: Desk, side: str, price: str, expected: str) -> None:
    account = shared_desk.new_account()
    await shared_desk.mark("50000")
    await shared_desk.deposit(account, "1000000")
    assert outcome(await shared_desk.trade(account, side, "1", price)) == expected


@pytest.mark.parametrize(("price", "nearest"), [("60000", "54999.99"), ("40000", "45000")])
async def test_a_price_outside_the_band_is_answered_with_the_nearest_tick_inside(
    shared_desk: Desk, price: str, nearest: str
) -> None:
    account = shared_desk.new_account()
    # The band is 44,999.991 to 54,999.989 plus: its edges lie between ticks.
    await shared_desk.mark("49999.995")
    await shared_desk.deposit(account, "1000000")
    refused = expect(await shared_desk.trade(account, "buy", "1", price), 409)
    assert (refused["code"], refused["next"]["body"]["price"]) == (OUT_OF_BAND, nearest)
    assert outcome(await shared_desk.client.post("/trade", json=refused["next"]["body"])) == BOOKED


@pytest.mark.parametrize(
    ("price", "expected"),
    # A tick is 0.01.
    [
        ("50000.02", BOOKED),
        ("50000.01", BOOKED),
        ("50000.015", BAD_PRICE),
        ("50000.01000001", BAD_PRICE),
        ("50000.00999999", BAD_PRICE),
    ],
)
async def test_a_price_is_a_multiple_of_the_tick(shared_desk: Desk, price: str, expected: str) -> None:
    account = shared_desk.new_account()
    await shared_desk.mark("50000")
    await shared_desk.deposit(account, "1000000")
    assert outcome(await shared_desk.trade(account, "buy", "1", price)) == expected


@pytest.mark.parametrize(
    ("quantity", "expected"),
    # A lot is 0.000001.
    [
        ("0.000002", BOOKED),
        ("0.000001", BOOKED),
        ("0.0000015", BAD_QUANTITY),
        ("0.00000101", BAD_QUANTITY),
        ("0.00000099", BAD_QUANTITY),
    ],
)
async def test_a_quantity_is_a_multiple_of_the_lot(shared_desk: Desk, quantity: str, expected: str) -> None:
    account = shared_desk.new_account()
    await shared_desk.mark("50000")
    await shared_desk.deposit(account, "1000000")
    assert outcome(await shared_desk.trade(account, "buy", quantity, "50000")) == expected


async def test_an_answer_to_a_number_off_the_grid_shows_the_grid(shared_desk: Desk) -> None:
    refused = expect(await shared_desk.trade("alice", "buy", "1", "50000.015"), 422)
    assert refused["step"] == "0.01"
    refused = expect(await shared_desk.trade("alice", "buy", "0.0000015", "50000"), 422)
    assert refused["step"] == "0.000001"


@pytest.mark.parametrize(
    ("price", "expected"), [("10000000.01", BAD_PRICE), ("10000000", BOOKED), ("9999999.99", BOOKED)]
)
async def test_a_price_is_at_most_ten_million(shared_desk: Desk, price: str, expected: str) -> None:
    account = shared_desk.new_account()
    await shared_desk.mark("10000000")
    await shared_desk.deposit(account, "10000000")
    assert outcome(await shared_desk.trade(account, "buy", "1", price)) == expected


@pytest.mark.parametrize("side", ["buy", "sell"])
@pytest.mark.parametrize(
    ("quantity", "expected"), [("1000.000001", "position_limit"), ("1000", BOOKED), ("999.999999", BOOKED)]
)
async def test_a_position_is_at_most_a_thousand_long_or_short(
    shared_desk: Desk, side: str, quantity: str, expected: str
) -> None:
    account = shared_desk.new_account()
    await shared_desk.mark("100")
    await shared_desk.deposit(account, "1000000")
    answer = await shared_desk.trade(account, side, quantity, "100")
    assert outcome(answer) == expected
    assert expected == BOOKED or answer.json()["next"]["body"]["quantity"] == "1000"


@pytest.mark.parametrize(
    ("quantity", "expected"), [("2000.000001", BAD_QUANTITY), ("2000", BOOKED), ("1999.999999", BOOKED)]
)
async def test_a_flip_goes_from_one_limit_to_the_other_and_no_trade_is_larger(
    shared_desk: Desk, quantity: str, expected: str
) -> None:
    account = shared_desk.new_account()
    await shared_desk.mark("100")
    await shared_desk.deposit(account, "1000000")
    await shared_desk.sell(account, "1000", "100")
    assert outcome(await shared_desk.trade(account, "buy", quantity, "100")) == expected


@pytest.mark.parametrize(
    ("mark", "expected"),
    # Long 1 BTC from 50,000 with 10,000.4: equity is mark - 39,999.6, maintenance 0.1 x mark; both 4,444.4 at 44,444.
    [("44444.00000001", NO_MARGIN), ("44444", NO_MARGIN), ("44443.99999999", "below_maintenance_margin")],
)
async def test_an_increase_of_a_candidate_is_refused_as_such_and_of_another_for_lack_of_margin(
    shared_desk: Desk, mark: str, expected: str
) -> None:
    account = shared_desk.new_account()
    await shared_desk.mark("50000")
    await shared_desk.deposit(account, "10000.4")
    await shared_desk.buy(account, "1", "50000")
    await shared_desk.mark(mark)
    assert outcome(await shared_desk.trade(account, "buy", "0.000001", "44444")) == expected


@pytest.mark.parametrize("price", ["39600", "44000", "48400"])
async def test_a_candidate_may_always_reduce_even_at_the_worst_price_of_the_band(shared_desk: Desk, price: str) -> None:
    account = shared_desk.new_account()
    await shared_desk.mark("50000")
    await shared_desk.deposit(account, "10000")
    await shared_desk.buy(account, "1", "50000")
    await shared_desk.mark("44000")
    assert (await shared_desk.account(account))["candidate"] is True
    await shared_desk.sell(account, "0.1", price)


async def test_a_reduction_of_an_account_without_free_margin_passes(shared_desk: Desk) -> None:
    account = shared_desk.new_account()
    await shared_desk.mark("50000")
    await shared_desk.deposit(account, "10000")
    await shared_desk.buy(account, "1", "50000")
    await shared_desk.mark("49000")
    assert (await shared_desk.account(account))["free_margin"] == "-800"
    await shared_desk.sell(account, "0.000001", "49000")


@pytest.mark.parametrize(
    ("side", "quantity", "expected"),
    [
        ("sell", "0.5", BOOKED),
        ("sell", "1", BOOKED),
        ("sell", "1.000001", HALTED),
        ("buy", "0.000001", HALTED),
    ],
)
async def test_while_trading_is_halted_reductions_pass_and_nothing_that_opens(
    shared_desk: Desk, shared_redis: redis.asyncio.Redis, side: str, quantity: str, expected: str
) -> None:
    account = shared_desk.new_account()
    await shared_desk.mark("50000")
    await shared_desk.deposit(account, "100000")
    await shared_desk.buy(account, "1", "50000")
    await shared_redis.set("state:halted", "1")
    try:
        assert outcome(await shared_desk.trade(account, side, quantity, "50000")) == expected
    finally:
        await shared_redis.delete("state:halted")


@pytest.mark.parametrize("price", ["55000.01", "44999.99"])
async def test_a_reduction_outside_the_band_is_refused(shared_desk: Desk, price: str) -> None:
    account = shared_desk.new_account()
    await shared_desk.mark("50000")
    await shared_desk.deposit(account, "10000")
    await shared_desk.buy(account, "1", "50000")
    assert outcome(await shared_desk.trade(account, "sell", "1", price)) == OUT_OF_BAND


async def test_without_a_mark_not_even_a_reduction_passes(shared_desk: Desk, shared_redis: redis.asyncio.Redis) -> None:
    account = shared_desk.new_account()
    await shared_desk.mark("50000")
    await shared_desk.deposit(account, "10000")
    await shared_desk.buy(account, "1", "50000")
    await shared_redis.delete(f"mark_price:{BTC_PERP}")
    assert outcome(await shared_desk.trade(account, "sell", "1", "50000")) == "no_mark_price"


async def test_a_trade_of_an_account_that_does_not_exist_is_answered_with_the_deposit_that_makes_it(
    shared_desk: Desk,
) -> None:
    account = shared_desk.new_account()
    unknown = expect(await shared_desk.trade(account, "buy", "1", "50000"), 404)
    assert (unknown["code"], unknown["next"]["path"]) == ("unknown_account", f"/accounts/{account}/deposit")
