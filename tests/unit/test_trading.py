"""What a trade does to a position: open, increase, reduce, close and flip, long and short, exact at 1e-8."""

from __future__ import annotations

from decimal import Decimal

import pytest

from app import errors
from app.services import trading
from app.services.margin import average_price
from app.services.trading import FLAT, Fill, Position
from tests.unit.cast import (
    ALICE_LONG_1_BTC,
    BTC,
    CAROL_SHORT_1_BTC,
    CONTRACTS,
    DAVE_LONG_1_BTC_SHORT_10_ETH,
    ERIN_FLAT,
    ETH,
    UNIT,
    amounts,
    buy,
    market,
    order,
    sell,
)


def position(quantity: str, cost: str) -> Position:
    return Position(Decimal(quantity), Decimal(cost))


def apply(held: Position, quantity: str, price: str) -> Fill:
    return trading.apply_trade(held, signed_quantity=Decimal(quantity), price=Decimal(price))


def test_opening_a_long_position_records_its_cost_and_realises_nothing() -> None:
    # 0.5 x 60,000.1 = 30,000.05
    assert apply(FLAT, "0.5", "60000.1") == Fill(
        position=position("0.5", "30000.05"), realised_pnl=Decimal(0), closed=Decimal(0), opened=Decimal("0.5")
    )


def test_opening_a_short_position_records_a_negative_cost() -> None:
    assert apply(FLAT, "-0.5", "60000.1") == Fill(
        position=position("-0.5", "-30000.05"), realised_pnl=Decimal(0), closed=Decimal(0), opened=Decimal("-0.5")
    )


def test_increasing_a_position_adds_cost_and_realises_nothing() -> None:
    # 30,000.05 + 0.25 x 60,100 = 45,025.05; over 0.75 that is 60,033.4
    fill = apply(position("0.5", "30000.05"), "0.25", "60100")
    assert fill.position == position("0.75", "45025.05")
    assert average_price(quantity=fill.position.quantity, cost=fill.position.cost) == Decimal("60033.4")
    assert (fill.realised_pnl, fill.closed, fill.opened) == amounts(0, 0, "0.25")


def test_increasing_a_short_position_mirrors_it() -> None:
    fill = apply(position("-0.5", "-30000.05"), "-0.25", "60100")
    assert fill.position == position("-0.75", "-45025.05")
    assert (fill.realised_pnl, fill.closed, fill.opened) == amounts(0, 0, "-0.25")


def test_reducing_a_long_position_realises_against_its_share_of_the_cost() -> None:
    # A third of 45,025.05 is 15,008.35; 0.25 x 61,000 = 15,250; 15,250 - 15,008.35 = 241.65; 30,016.7 of cost stays
    fill = apply(position("0.75", "45025.05"), "-0.25", "61000")
    assert fill == Fill(
        position=position("0.5", "30016.70"), realised_pnl=Decimal("241.65"), closed=Decimal("-0.25"), opened=Decimal(0)
    )


def test_reducing_a_short_position_mirrors_it() -> None:
    fill = apply(position("-0.75", "-45025.05"), "0.25", "61000")
    assert fill == Fill(
        position=position("-0.5", "-30016.70"),
        realised_pnl=Decimal("-241.65"),
        closed=Decimal("0.25"),
        opened=Decimal(0),
    )


def test_closing_a_position_realises_all_of_its_cost() -> None:
    # long 3 for 100 closed at 40: 120 - 100 = 20; short 3 for 100 closed at 40: 100 - 120 = -20
    assert apply(position("3", "100"), "-3", "40") == Fill(FLAT, Decimal(20), Decimal(-3), Decimal(0))
    assert apply(position("-3", "-100"), "3", "40") == Fill(FLAT, Decimal(-20), Decimal(3), Decimal(0))


def test_flipping_a_long_position_is_a_close_and_an_open() -> None:
    # close 1 bought at 50,000 for 51,000: 1,000; open -2 at 51,000
    assert apply(position("1", "50000"), "-3", "51000") == Fill(
        position=position("-2", "-102000"), realised_pnl=Decimal(1_000), closed=Decimal(-1), opened=Decimal(-2)
    )


def test_flipping_a_short_position_is_a_close_and_an_open() -> None:
    assert apply(position("-1", "-50000"), "3", "51000") == Fill(
        position=position("2", "102000"), realised_pnl=Decimal(-1_000), closed=Decimal(1), opened=Decimal(2)
    )


def test_one_lot_less_reduces_the_same_closes_and_one_lot_more_flips() -> None:
    held = position("1", "50000")
    # 50,000 x 0.999999 = 49,999.95 is removed, 0.05 stays
    assert apply(held, "-0.999999", "50000").position == position("0.000001", "0.05")
    assert apply(held, "-1", "50000").position == FLAT
    assert apply(held, "-1.000001", "50000").position == position("-0.000001", "-0.05")


@pytest.mark.parametrize(
    ("cost", "removed", "left"),
    [
        ("100.00000001", "50.00000000", "50.00000001"),  # half is ...50.000000005: 0 is even, so down
        ("100.00000003", "50.00000002", "50.00000001"),  # half is ...50.000000015: 1 is odd, so up
        ("100.00000002", "50.00000001", "50.00000001"),
        ("0.00000001", "0", "0.00000001"),
        ("0.00000003", "0.00000002", "0.00000001"),
    ],
)
def test_the_cost_of_a_part_is_rounded_once_half_even_and_the_remainder_stays(
    cost: str, removed: str, left: str
) -> None:
    fill = apply(position("2", cost), "-1", "60")
    assert fill.position == position("1", left)
    assert fill.realised_pnl == 60 - Decimal(removed)
    mirrored = apply(position("-2", f"-{cost}"), "1", "60")
    assert mirrored.position == position("-1", f"-{left}")
    assert mirrored.realised_pnl == Decimal(removed) - 60


def test_a_third_of_a_cost_keeps_its_remainder_until_the_last_part() -> None:
    # 100 / 3 = 33.33333333; then 66.66666667 / 2 = 33.333333335, half-even 33.33333334; 33.33333333 is left
    held, realised = position("3", "100"), Decimal(0)
    costs = []
    for _ in range(3):
        fill = apply(held, "-1", "40")
        costs.append(fill.position.cost)
        held, realised = fill.position, realised + fill.realised_pnl
    assert costs == [Decimal("66.66666667"), Decimal("33.33333333"), 0]
    assert held == FLAT
    assert realised == 20  # 3 x 40 - 100, with nothing created or lost


def test_the_smallest_trade_at_the_largest_price_and_the_largest_at_the_smallest_are_exact() -> None:
    assert apply(FLAT, "0.000001", "10000000").position.cost == 10
    assert apply(FLAT, "1000", "0.01").position.cost == 10
    assert apply(FLAT, "0.000001", "0.01").position.cost == UNIT
    assert apply(FLAT, "1000", "9999999.99").position.cost == Decimal("9999999990.00")


def test_a_decision_leaves_the_balance_of_an_opening_alone() -> None:
    decision = trading.decide_trade(ERIN_FLAT, buy("0.5", "50000"), market())
    assert decision.account.balance == 10_000
    assert decision.account.positions == {BTC: position("0.5", "25000")}
    assert decision.mark_price == 50_000
    assert (decision.margin.equity, decision.margin.used_margin) == amounts(10_000, 5_000)


def test_a_decision_books_realised_pnl_into_the_balance() -> None:
    # Alice sells half at 51,000: 25,500 - 25,000 = 500
    decision = trading.decide_trade(ALICE_LONG_1_BTC, sell("0.5", "51000"), market())
    assert decision.account.balance == 14_500
    assert decision.account.positions == {BTC: position("0.5", "25000")}


def test_a_decision_leaves_no_field_for_a_flat_position() -> None:
    closed_long = trading.decide_trade(ALICE_LONG_1_BTC, sell("1", "50000"), market())
    closed_short = trading.decide_trade(CAROL_SHORT_1_BTC, buy("1", "50000"), market())
    assert closed_long.account.positions == {}
    assert closed_short.account.positions == {}


def test_a_decision_leaves_the_other_positions_alone() -> None:
    decision = trading.decide_trade(DAVE_LONG_1_BTC_SHORT_10_ETH, sell("1", "48000"), market("48000", "2400"))
    assert decision.account.positions == {ETH: position("-10", "-20000")}
    assert decision.account.balance == 18_000


def test_a_decision_changes_nothing_of_what_it_was_given() -> None:
    trading.decide_trade(ALICE_LONG_1_BTC, sell("1", "51000"), market())
    assert ALICE_LONG_1_BTC.balance == 14_000
    assert ALICE_LONG_1_BTC.positions == {BTC: position("1", "50000")}


def check(quantity: str, price: str) -> None:
    trading.check_order(order("buy", quantity, price), CONTRACTS)


def field_refused(quantity: str, price: str) -> str:
    with pytest.raises(errors.InvalidField) as refusal:
        check(quantity, price)
    return str(refusal.value.members["field"])


def test_a_price_lies_on_the_tick() -> None:
    assert field_refused("1", "49999.999") == "price"
    check("1", "50000.00")
    check("1", "50000.01")
    assert field_refused("1", "50000.001") == "price"


def test_a_quantity_lies_on_the_lot() -> None:
    assert field_refused("0.0000009", "50000") == "quantity"
    check("0.000001", "50000")
    assert field_refused("0.0000011", "50000") == "quantity"


@pytest.mark.parametrize("value", ["0", "-0", "-1"])
def test_quantity_and_price_are_above_zero(value: str) -> None:
    assert field_refused(value, "50000") == "quantity"
    assert field_refused("1", value) == "price"


def test_a_price_is_at_most_the_largest_of_its_contract() -> None:
    check("1", "9999999.99")
    check("1", "10000000")
    assert field_refused("1", "10000000.01") == "price"


def test_a_quantity_is_at_most_what_flips_the_largest_position() -> None:
    check("1999.999999", "1")
    check("2000", "1")
    assert field_refused("2000.000001", "1") == "quantity"


def test_numbers_of_any_length_are_refused_by_their_field() -> None:
    assert field_refused("9" * 40, "50000") == "quantity"
    assert field_refused("1e99", "50000") == "quantity"
    assert field_refused("1e-99", "50000") == "quantity"
    assert field_refused("1", "1e99") == "price"
    assert field_refused("1", "1e-99") == "price"


def test_an_unknown_symbol_is_refused_with_those_there_are() -> None:
    with pytest.raises(errors.InvalidField) as refusal:
        trading.check_order(buy("1", "50000", symbol="DOGE-PERP"), CONTRACTS)
    assert refusal.value.members["field"] == "symbol"
    assert refusal.value.members["allowed"] == [BTC, ETH]


def amount_refused(amount: Decimal) -> str:
    with pytest.raises(errors.InvalidField) as refusal:
        trading.check_amount(amount)
    return refusal.value.detail


def test_an_amount_has_at_most_eight_decimals_and_is_above_zero() -> None:
    assert "above 0" in amount_refused(Decimal(0))
    assert "above 0" in amount_refused(-UNIT)
    assert "8 decimals" in amount_refused(Decimal("0.000000009"))
    trading.check_amount(UNIT)
    assert "8 decimals" in amount_refused(Decimal("0.000000011"))


def test_an_amount_is_at_most_forty_thousand_million() -> None:
    trading.check_amount(Decimal("39999999999.99999999"))
    trading.check_amount(Decimal(40_000_000_000))
    assert "at most 40000000000" in amount_refused(Decimal("40000000000.00000001"))


def test_a_mark_is_checked_by_the_same_rule_and_names_its_own_field() -> None:
    with pytest.raises(errors.InvalidField) as refusal:
        trading.check_amount(Decimal("10000000.01"), name="price", maximum=CONTRACTS[BTC].price_max)
    assert refusal.value.members["field"] == "price"
    trading.check_amount(Decimal("50000.00000001"), name="price", maximum=CONTRACTS[BTC].price_max)
