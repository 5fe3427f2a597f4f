"""Which trades are accepted, which refused, with which code, in which order, and what to send next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from app import errors
from app.contracts import BTC_PERP
from app.services import trading
from app.services.trading import Account, Market, Position, TradeDecision, TradeOrder
from tests.unit.cast import (
    ALICE_LINE,
    ALICE_LONG_1_BTC,
    BTC,
    CAROL_LINE,
    CAROL_SHORT_1_BTC,
    DAVE_LONG_1_BTC_SHORT_10_ETH,
    ETH,
    LOT,
    TICK,
    UNIT,
    buy,
    holding_btc,
    market,
    sell,
)


def accepted(account: Account, order: TradeOrder, at: Market) -> TradeDecision:
    return trading.decide_trade(account, order, at)


def refused(account: Account, order: TradeOrder, at: Market) -> errors.Refusal:
    with pytest.raises(errors.Refusal) as refusal:
        trading.decide_trade(account, order, at)
    return refusal.value


def code(account: Account, order: TradeOrder, at: Market) -> str:
    """The code of the refusal, or ``accepted``."""
    try:
        trading.decide_trade(account, order, at)
    except errors.Refusal as refusal:
        return refusal.code
    return "accepted"


def flat(balance: str | Decimal) -> Account:
    return Account("gina", Decimal(balance))


def next_trade(refusal: errors.Refusal) -> TradeOrder:
    step: Any = refusal.members["next"]
    assert (step["method"], step["path"]) == ("POST", "/trade")
    body = step["body"]
    return TradeOrder(
        body["account_id"], body["symbol"], body["side"], Decimal(body["quantity"]), Decimal(body["price"])
    )


def next_deposit(refusal: errors.Refusal, account: Account) -> Account:
    """The account after the deposit that the refusal asks for."""
    step: Any = refusal.members["next"]
    assert step["path"].endswith("/deposit")
    return replace(account, balance=account.balance + Decimal(step["body"]["amount"]))


# Opening 1 BTC at a mark of 50,000 requires 0.2 x 50,000 = 10,000 of initial margin, plus what is lost at once.
OPENINGS = [
    pytest.param(buy("1", "50000"), "10000", id="long-at-the-mark"),
    pytest.param(sell("1", "50000"), "10000", id="short-at-the-mark"),
    pytest.param(buy("1", "50500"), "10500", id="long-500-above-the-mark-loses-500-at-once"),
    pytest.param(sell("1", "49500"), "10500", id="short-500-below-the-mark-loses-500-at-once"),
    pytest.param(buy("1", "49500"), "10000", id="long-500-below-the-mark-gains-nothing-that-counts"),
    pytest.param(sell("1", "50500"), "10000", id="short-500-above-the-mark-gains-nothing-that-counts"),
    pytest.param(buy("1", "45000"), "10000", id="long-at-the-edge-of-the-band-gains-nothing-that-counts"),
    pytest.param(sell("1", "55000"), "10000", id="short-at-the-edge-of-the-band-gains-nothing-that-counts"),
    pytest.param(buy("1", "55000"), "15000", id="long-at-the-far-edge-of-the-band"),
    pytest.param(sell("1", "45000"), "15000", id="short-at-the-far-edge-of-the-band"),
]


@pytest.mark.parametrize(("order", "required"), OPENINGS)
def test_opening_requires_the_initial_margin_and_the_open_loss(order: TradeOrder, required: str) -> None:
    assert code(flat(Decimal(required) + UNIT), order, market()) == "accepted"
    assert code(flat(Decimal(required)), order, market()) == "accepted"
    assert code(flat(Decimal(required) - UNIT), order, market()) == "insufficient_initial_margin"


def test_increasing_requires_the_initial_margin_of_the_whole_position() -> None:
    # Long 1 at 50,000 and 1 more at 50,000: 0.2 x 100,000 = 20,000
    for balance, expected in (
        ("20000.00000001", "accepted"),
        ("20000", "accepted"),
        ("19999.99999999", "insufficient_initial_margin"),
    ):
        assert code(holding_btc("alice", balance=balance), buy("1", "50000"), market()) == expected


def test_the_margin_of_the_other_positions_is_required_too() -> None:
    # Dave short 10 ETH, free margin 20,000 - 2,000 - 4,000 - 15,600 = -1,600 at his marks; with 1,600 more it is 0.
    # One lot of ETH more at the mark of 2,400 requires 0.25 x 0.24 = 0.06 more.
    more = sell("0.0001", "2400", symbol=ETH)
    at = market("48000", "2400")
    for balance, expected in (
        ("21600.06000001", "accepted"),
        ("21600.06", "accepted"),
        ("21600.05999999", "insufficient_initial_margin"),
    ):
        account = replace(DAVE_LONG_1_BTC_SHORT_10_ETH, balance=Decimal(balance))
        assert code(account, more, at) == expected


def test_a_flip_counts_what_it_realises_and_not_what_it_opens_with() -> None:
    # Long 1 from 50,000, mark 50,000, sell 2 at 51,000: +1,000 realised counts, +1,000 on the short half does not.
    # Required 0.2 x 50,000 = 10,000; available balance + 1,000.
    for balance, expected in (
        ("9000.00000001", "accepted"),
        ("9000", "accepted"),
        ("8999.99999999", "insufficient_initial_margin"),
    ):
        assert code(holding_btc("alice", balance=balance), sell("2", "51000"), market()) == expected


def test_a_flip_of_a_short_position_counts_the_same() -> None:
    # Short 1 from 50,000, mark 50,000, buy 2 at 49,000: +1,000 realised counts, +1,000 on the long half does not.
    for balance, expected in (
        ("9000.00000001", "accepted"),
        ("9000", "accepted"),
        ("8999.99999999", "insufficient_initial_margin"),
    ):
        short = holding_btc("carol", balance=balance, quantity="-1", cost="-50000")
        assert code(short, buy("2", "49000"), market()) == expected


def test_the_unrealised_gain_of_a_position_that_is_open_already_counts() -> None:
    # Long 1 from 40,000 at a mark of 50,000 with a balance of 10,000: equity 20,000, required for 2: 20,000
    for balance, expected in (
        ("10000.00000001", "accepted"),
        ("10000", "accepted"),
        ("9999.99999999", "insufficient_initial_margin"),
    ):
        assert code(holding_btc("alice", balance=balance, cost="40000"), buy("1", "50000"), market()) == expected


def float_free_margin(balance: str, quantity: str, price: str) -> float:
    """What the rule would see of an opening at the mark if it were computed in float64."""
    opened, mark = float(quantity), float(price)
    cost = float(Decimal(quantity) * Decimal(price))
    return float(balance) + (opened * mark - cost) - opened * mark * 0.2


def test_float_alone_refuses_what_is_exactly_enough() -> None:
    # 0.2 x 2 x 92,478 = 36,991.2, which is 36,991.200000000004 in float64
    assert float_free_margin("36991.2", "2", "92478") < 0
    assert code(flat("36991.2"), buy("2", "92478"), market("92478")) == "accepted"
    assert code(flat("36991.19999999"), buy("2", "92478"), market("92478")) == "insufficient_initial_margin"


def test_float_alone_accepts_what_is_one_unit_short() -> None:
    # 0.2 x 883 x 76,737.1 = 13,551,771.86, and 883 x 76,737.1 - 67,758,859.3 is more than that in float64
    assert float_free_margin("13551771.85999999", "883", "76737.1") >= 0
    assert code(flat("13551771.86"), buy("883", "76737.1"), market("76737.1")) == "accepted"
    assert code(flat("13551771.85999999"), buy("883", "76737.1"), market("76737.1")) == "insufficient_initial_margin"


@pytest.mark.parametrize(
    ("account", "order", "mark"),
    [
        pytest.param(ALICE_LONG_1_BTC, sell(LOT, "36000"), "40000", id="long-one-lot-at-the-worst-price"),
        pytest.param(ALICE_LONG_1_BTC, sell("1", "36000"), "40000", id="long-whole-at-the-worst-price"),
        pytest.param(ALICE_LONG_1_BTC, sell("0.5", "27000"), "30000", id="long-with-equity-below-zero"),
        pytest.param(CAROL_SHORT_1_BTC, buy(LOT, "66000"), "60000", id="short-one-lot-at-the-worst-price"),
        pytest.param(CAROL_SHORT_1_BTC, buy("1", "66000"), "60000", id="short-whole-at-the-worst-price"),
        pytest.param(CAROL_SHORT_1_BTC, buy("0.5", "88000"), "80000", id="short-with-equity-below-zero"),
    ],
)
def test_an_account_in_trouble_may_always_reduce_inside_the_band(
    account: Account, order: TradeOrder, mark: str
) -> None:
    decision = accepted(account, order, market(mark))
    prices = {BTC: Decimal(mark)}
    before = trading.account_margin(account, contracts={BTC: BTC_PERP}, prices=prices)
    assert before.free_margin < 0
    assert decision.margin.free_margin >= before.free_margin


@pytest.mark.parametrize(
    ("account", "order", "mark"),
    [
        # At the line equity is 4,000 = maintenance. Half sold at 36,000 loses 2,000 and leaves 2,000 = 0.1 x 20,000.
        (ALICE_LONG_1_BTC, sell("0.5", "36000"), ALICE_LINE),
        # At the line equity is 6,000 = maintenance. Half bought at 66,000 loses 3,000 and leaves 3,000.
        (CAROL_SHORT_1_BTC, buy("0.5", "66000"), CAROL_LINE),
    ],
)
def test_a_reduction_at_the_line_and_the_edge_of_the_band_makes_no_candidate(
    account: Account, order: TradeOrder, mark: Decimal
) -> None:
    after = accepted(account, order, market(str(mark))).margin
    assert after.equity == after.maintenance_margin
    assert not trading.is_candidate(after)


def test_a_reduction_that_leaves_free_margin_as_it_was_is_accepted() -> None:
    # With an initial rate of 10 %, half of 1 BTC sold 10 % below the mark loses 2,000 and frees 2,000.
    thin = replace(BTC_PERP, initial_rate=Decimal("0.10"))
    at = market("40000", contracts={BTC: thin})
    account = replace(ALICE_LONG_1_BTC, balance=Decimal(12_000))  # equity 2,000, used margin 4,000
    assert accepted(account, sell("0.5", "36000"), at).margin.free_margin == -2_000


def test_a_flip_of_an_account_in_trouble_is_no_reduction() -> None:
    # Closed at 39,999 Alice is left with 3,999 in cash, and short 1 more would require 7,999.8.
    assert code(ALICE_LONG_1_BTC, sell("1", "39999"), market("39999")) == "accepted"
    assert code(ALICE_LONG_1_BTC, sell("2", "39999"), market("39999")) == "below_maintenance_margin"


def test_a_candidate_is_refused_by_its_own_code_and_one_tick_above_the_line_is_not() -> None:
    order = buy(LOT, "40000")
    for mark, expected in (
        (ALICE_LINE + TICK, "insufficient_initial_margin"),
        (ALICE_LINE, "insufficient_initial_margin"),
        (ALICE_LINE - TICK, "below_maintenance_margin"),
    ):
        assert code(ALICE_LONG_1_BTC, order, market(str(mark))) == expected


@pytest.mark.parametrize(
    ("price", "expected"),
    [
        ("54999.99", "accepted"),
        ("55000", "accepted"),
        ("55000.01", "price_out_of_band"),
        ("45000.01", "accepted"),
        ("45000", "accepted"),
        ("44999.99", "price_out_of_band"),
    ],
)
@pytest.mark.parametrize("side", ["buy", "sell"])
def test_the_band_includes_its_edges(side: str, price: str, expected: str) -> None:
    order = buy(LOT, price) if side == "buy" else sell(LOT, price)
    assert code(flat("10000"), order, market("50000")) == expected


def test_the_band_binds_reductions_too() -> None:
    assert code(ALICE_LONG_1_BTC, sell("1", "44999.99"), market()) == "price_out_of_band"


@pytest.mark.parametrize(("price", "nearest"), [("60000", "55000.07"), ("40000", "45000.07")])
def test_out_of_the_band_says_the_nearest_price_of_the_tick_within_it(price: str, nearest: str) -> None:
    # 10 % around 50,000.07 is 45,000.063 to 55,000.077
    refusal = refused(flat("20000"), buy("1", price), market("50000.07"))
    assert refusal.members["lowest"] == "45000.063"
    assert refusal.members["highest"] == "55000.077"
    assert refusal.members["required"] == nearest
    assert refusal.members["available"] == price
    assert next_trade(refusal) == replace(buy("1", nearest), account_id="anyone")
    assert code(flat("20000"), next_trade(refusal), market("50000.07")) == "accepted"


@pytest.mark.parametrize("mark", ["0.001", "0.045"])
def test_out_of_a_band_that_holds_no_price_of_the_tick_nothing_is_suggested(mark: str) -> None:
    """Around 0.045 the band is 0.0405 to 0.0495, between two ticks; around 0.001 the nearest tick is 0."""
    refusal = refused(flat("20000"), buy("1", "0.05"), market(mark))
    if "next" in refusal.members:
        suggested = next_trade(refusal)
        trading.check_order(suggested, {BTC: BTC_PERP})
        assert code(flat("20000"), suggested, market(mark)) == "accepted"


def test_the_position_limit_includes_itself() -> None:
    # 1,000 BTC at 50,000 require 10,000,000
    rich = flat("20000000")
    for quantity, expected in (("999.999999", "accepted"), ("1000", "accepted"), ("1000.000001", "position_limit")):
        assert code(rich, buy(quantity, "50000"), market()) == expected
        assert code(rich, sell(quantity, "50000"), market()) == expected


def test_the_position_limit_counts_the_position_after_the_trade() -> None:
    long_999 = holding_btc("alice", balance="20000000", quantity="999", cost="49950000")
    assert code(long_999, buy("1", "50000"), market()) == "accepted"
    assert code(long_999, buy("1.000001", "50000"), market()) == "position_limit"
    assert code(long_999, sell("1999", "50000"), market()) == "accepted"
    assert code(long_999, sell("1999.000001", "50000"), market()) == "position_limit"


def test_beyond_the_position_limit_the_room_that_is_left_is_suggested() -> None:
    long_999 = holding_btc("alice", balance="20000000", quantity="999", cost="49950000")
    more = refused(long_999, buy("5", "50000"), market())
    assert next_trade(more).quantity == 1
    flip = refused(long_999, sell("2000", "50000"), market())
    assert next_trade(flip).quantity == 1999
    for refusal in (more, flip):
        assert code(long_999, next_trade(refusal), market()) == "accepted"


def test_at_the_position_limit_nothing_is_suggested() -> None:
    long_1000 = holding_btc("alice", balance="20000000", quantity="1000", cost="50000000")
    assert "next" not in refused(long_1000, buy(LOT, "50000"), market()).members


def test_with_less_than_a_lot_of_room_nothing_is_suggested() -> None:
    """A limit of 1 in lots of 0.4 leaves 0.2 beyond 0.8, which is no quantity that can be traded."""
    coarse = replace(BTC_PERP, lot_size=Decimal("0.4"), position_limit=Decimal(1))
    at = market(contracts={BTC: coarse})
    refusal = refused(holding_btc("alice", balance="50000", quantity="0.8", cost="40000"), buy("0.4", "50000"), at)
    assert "next" not in refusal.members or next_trade(refusal).quantity > 0


def test_a_position_beyond_the_limit_may_be_reduced() -> None:
    """A limit that was lowered afterwards keeps nobody from getting out."""
    beyond = holding_btc("alice", balance="20000000", quantity="1500", cost="75000000")
    assert code(beyond, sell("100", "50000"), market()) == "accepted"
    assert code(beyond, buy(LOT, "50000"), market()) == "position_limit"


def test_a_balance_beyond_forty_thousand_million_is_refused() -> None:
    # Long 1 from 50,000 sold at 50,000.01 realises 0.01.
    sold = sell("1", "50000.01")
    for balance, expected in (
        ("39999999999.98999999", "accepted"),
        ("39999999999.99", "accepted"),
        ("39999999999.99000001", "amount_limit"),
    ):
        assert code(holding_btc("alice", balance=balance), sold, market()) == expected


@pytest.mark.parametrize(
    ("age_us", "expected"), [(4_999_999, "accepted"), (5_000_000, "accepted"), (5_000_001, "stale_mark_price")]
)
def test_a_mark_is_stale_beyond_the_age_that_is_allowed(age_us: int, expected: str) -> None:
    at = market(age_us=age_us, mark_max_age_seconds=5)
    assert code(flat("10000"), buy("1", "50000"), at) == expected


def test_a_mark_is_never_stale_where_no_age_is_set() -> None:
    assert code(flat("10000"), buy("1", "50000"), market(age_us=10**15)) == "accepted"


def test_on_a_stale_mark_reductions_pass_and_flips_do_not() -> None:
    at = market("39999", age_us=6_000_000, mark_max_age_seconds=5)
    assert code(ALICE_LONG_1_BTC, sell("0.5", "39999"), at) == "accepted"
    assert code(ALICE_LONG_1_BTC, sell("1", "39999"), at) == "accepted"
    assert code(ALICE_LONG_1_BTC, sell("1.000001", "39999"), at) == "stale_mark_price"
    assert code(ALICE_LONG_1_BTC, buy(LOT, "39999"), at) == "stale_mark_price"


def test_on_a_stale_mark_reductions_still_meet_the_band() -> None:
    at = market(age_us=6_000_000, mark_max_age_seconds=5)
    assert code(ALICE_LONG_1_BTC, sell("1", "44999.99"), at) == "price_out_of_band"


def test_while_trading_is_halted_reductions_pass_and_nothing_else_does() -> None:
    halted = market(halted=True)
    assert code(ALICE_LONG_1_BTC, sell("0.5", "50000"), halted) == "accepted"
    assert code(CAROL_SHORT_1_BTC, buy("1", "50000"), halted) == "accepted"
    assert code(ALICE_LONG_1_BTC, sell("1.000001", "50000"), halted) == "trading_halted"
    assert code(ALICE_LONG_1_BTC, buy(LOT, "50000"), halted) == "trading_halted"
    assert code(flat("10000"), sell(LOT, "50000"), halted) == "trading_halted"


def test_without_a_mark_nothing_passes() -> None:
    unmarked = market(btc=None)
    assert code(flat("10000"), buy(LOT, "50000"), unmarked) == "no_mark_price"
    assert code(ALICE_LONG_1_BTC, sell("1", "50000"), unmarked) == "no_mark_price"


def test_the_mark_of_every_open_position_is_needed() -> None:
    assert code(DAVE_LONG_1_BTC_SHORT_10_ETH, sell("1", "48000"), market("48000")) == "no_mark_price"
    assert code(flat("10000"), buy(LOT, "48000"), market("48000")) == "accepted"


def test_without_a_mark_the_price_of_the_trade_is_suggested_as_one() -> None:
    refusal = refused(flat("10000"), buy("0.5", "50000.5"), market(btc=None))
    assert refusal.members["next"] == {
        "method": "POST",
        "path": "/mark-price",
        "body": {"symbol": BTC, "price": "50000.5"},
    }


def test_without_the_mark_of_another_position_its_average_price_is_suggested() -> None:
    refusal = refused(DAVE_LONG_1_BTC_SHORT_10_ETH, sell("1", "48000"), market("48000"))
    step: Any = refusal.members["next"]
    assert step["body"] == {"symbol": ETH, "price": "2000"}


# Long 999.5 BTC from 50,000 at a mark of 50,000: notional 49,975,000, maintenance 4,997,500. Everything below is wrong
# with the first trade, and each stage puts right what the stage before was refused for.
HANNAH = holding_btc("hannah", balance="4000000", quantity="999.5", cost="49975000")


@pytest.mark.parametrize(
    ("expected", "balance", "order", "at"),
    [
        ("trading_halted", "4000000", buy("1", "60000"), market(btc=None, halted=True)),
        ("trading_halted", "4000000", buy("1", "60000"), market(halted=True, age_us=6_000_000, mark_max_age_seconds=5)),
        ("no_mark_price", "4000000", buy("1", "60000"), market(btc=None, mark_max_age_seconds=5)),
        ("stale_mark_price", "4000000", buy("1", "60000"), market(age_us=6_000_000, mark_max_age_seconds=5)),
        ("price_out_of_band", "4000000", buy("1", "60000"), market()),
        ("position_limit", "4000000", buy("1", "50000"), market()),
        # 999.5 + 0.5 = 1,000; equity 4,000,000 < 4,997,500
        ("below_maintenance_margin", "4000000", buy("0.5", "50000"), market()),
        # equity 4,997,500 is not below; 0.2 x 50,000,000 = 10,000,000 is required
        ("insufficient_initial_margin", "4997500", buy("0.5", "50000"), market()),
        ("insufficient_initial_margin", "9999999.99999999", buy("0.5", "50000"), market()),
        ("accepted", "10000000", buy("0.5", "50000"), market()),
    ],
)
def test_the_first_of_the_refusals_that_apply_is_given(
    expected: str, balance: str, order: TradeOrder, at: Market
) -> None:
    assert code(replace(HANNAH, balance=Decimal(balance)), order, at) == expected


def test_the_amount_limit_comes_after_the_band_and_before_the_margin() -> None:
    # 1 ETH that cost 4e10 takes all equity away; selling 2 BTC at 50,000.01 would take the balance 0.01 beyond 4e10.
    ivan = Account(
        "ivan",
        Decimal(40_000_000_000),
        {BTC: Position(Decimal(1), Decimal(50_000)), ETH: Position(Decimal(1), Decimal(40_000_000_000))},
    )
    at = market("50000", "2400")
    assert code(ivan, sell("2", "60000"), at) == "price_out_of_band"
    assert code(ivan, sell("2", "50000.01"), at) == "amount_limit"
    assert code(ivan, sell("2", "50000"), at) == "below_maintenance_margin"


def test_insufficient_initial_margin_shows_its_parts_and_the_deposit_that_helps() -> None:
    # Alice at 50,000 buys 1 more at 49,000: after it equity is 14,000 + 1,000, the 1,000 does not count; 20,000 needed
    refusal = refused(ALICE_LONG_1_BTC, buy("1", "49000"), market())
    assert refusal.members == {
        "required": "20000",
        "available": "14000",
        "parts": {
            "equity_after": "15000",
            "opening_gain_not_counted": "1000",
            "used_margin_before": "10000",
            "free_margin_before": "4000",
        },
        "next": {"method": "POST", "path": "/accounts/anyone/deposit", "body": {"amount": "6000"}},
    }
    helped = next_deposit(refusal, ALICE_LONG_1_BTC)
    assert code(helped, buy("1", "49000"), market()) == "accepted"
    assert code(replace(helped, balance=helped.balance - UNIT), buy("1", "49000"), market()) == refusal.code


def test_below_maintenance_margin_shows_both_sides_of_the_line_and_the_deposit_that_helps() -> None:
    # Alice at 39,000: equity 3,000, maintenance 3,900. 1 more at 39,000 requires 0.2 x 78,000 = 15,600.
    refusal = refused(ALICE_LONG_1_BTC, buy("1", "39000"), market("39000"))
    parts: Any = refusal.members["parts"]
    assert (parts["equity_before"], parts["maintenance_margin_before"]) == ("3000", "3900")
    assert (refusal.members["required"], refusal.members["available"]) == ("15600", "3000")
    assert code(next_deposit(refusal, ALICE_LONG_1_BTC), buy("1", "39000"), market("39000")) == "accepted"


def test_a_deposit_that_is_suggested_is_rounded_up_to_the_unit() -> None:
    # 0.000001 BTC at a mark of 12,345.67890123 requires 0.002469135780246, of which cash can pay 0.00246914
    at = market("12345.67890123")
    refusal = refused(flat("0"), buy(LOT, "12345"), at)
    step: Any = refusal.members["next"]
    assert step["body"] == {"amount": "0.00246914"}
    assert code(next_deposit(refusal, flat("0")), buy(LOT, "12345"), at) == "accepted"
    assert code(flat("0.00246913"), buy(LOT, "12345"), at) == "insufficient_initial_margin"


def test_a_refusal_becomes_a_problem_document_with_its_code_and_its_next_step() -> None:
    status, document = errors.problem(refused(flat("9999"), buy("1", "50000"), market()))
    assert status == 409
    assert document["code"] == "insufficient_initial_margin"
    assert document["type"] == "urn:plimsoll:problem:insufficient_initial_margin"
    assert document["status"] == 409
    assert document["next"] == {"method": "POST", "path": "/accounts/anyone/deposit", "body": {"amount": "1"}}
    assert all(isinstance(document[name], str) for name in ("required", "available", "title", "detail"))


def _all_errors(error: type[errors.PlimsollError]) -> list[type[errors.PlimsollError]]:
    return [error, *(found for child in error.__subclasses__() for found in _all_errors(child))]


def test_every_error_has_one_status_and_one_title() -> None:
    named = {error.code: error for error in _all_errors(errors.PlimsollError) if hasattr(error, "code")}
    assert set(named) == set(errors.HTTP_STATUS)
    for code_, error in named.items():
        status, title = errors.HTTP_STATUS[code_]
        assert title
        assert (status == 409) == issubclass(error, errors.Refusal)
        assert (status == 503) == issubclass(error, errors.Unavailable)


def test_the_codes_of_the_design_are_all_there() -> None:
    refusals: Mapping[str, int] = {
        "trading_halted": 409, "no_mark_price": 409, "stale_mark_price": 409, "price_out_of_band": 409,
        "position_limit": 409, "amount_limit": 409, "below_maintenance_margin": 409,
        "insufficient_initial_margin": 409, "insufficient_free_margin": 409, "idempotency_conflict": 409,
        "mark_price_jump": 409, "unknown_account": 404, "state_missing": 503, "outbox_full": 503,
        "outcome_unknown": 503,
    }  # fmt: skip
    assert {name: errors.HTTP_STATUS[name][0] for name in refusals} == refusals
