"""What the acceptance rule promises, for any account at any marks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from app import errors
from app.contracts import AMOUNT_LIMIT
from app.numbers import SMALLEST_UNIT, from_units
from app.services import trading
from app.services.trading import Account, Position, Side, TradeOrder, TransferOrder
from tests.property.repeatable import repeatable
from tests.property.worlds import (
    CONTRACTS,
    World,
    marks,
    orders_in_band,
    positions,
    prices_in_band,
    reductions_in_band,
    reference,
    units,
    worlds,
)
from tests.unit.cast import BTC, ETH


def code(world: World, order: TradeOrder) -> str:
    """The code of the refusal, or ``accepted``."""
    try:
        trading.decide_trade(world.account, order, world.market)
    except errors.Refusal as refusal:
        return refusal.code
    return "accepted"


def moved(world: World, amount: Decimal) -> World:
    """``world`` with so much more cash."""
    return replace(world, account=replace(world.account, balance=world.account.balance + amount))


def suggested(refusal: errors.Refusal) -> TradeOrder:
    step: Any = refusal.members["next"]
    assert step["path"] == "/trade"
    body = step["body"]
    return TradeOrder(
        body["account_id"], body["symbol"], body["side"], Decimal(body["quantity"]), Decimal(body["price"])
    )


def refused(world: World, order: TradeOrder) -> errors.Refusal:
    with pytest.raises(errors.Refusal) as refusal:
        trading.decide_trade(world.account, order, world.market)
    return refusal.value


@repeatable
@given(worlds(), st.data())
def test_no_accepted_trade_makes_a_candidate(world: World, data: st.DataObject) -> None:
    order = data.draw(orders_in_band(world))
    before = reference(world.account, world.prices)
    try:
        decision = trading.decide_trade(world.account, order, world.market)
    except errors.Refusal:
        return
    after = reference(decision.account, world.prices)
    assert before.candidate or not after.candidate


@dataclass(frozen=True)
class Judged:
    """A trade judged by the rule of DESIGN section 4 once more, in fractions."""

    missing: Fraction
    """What free margin lacks to 0 after the trade, its opening gain not counted."""
    helps: bool
    was_candidate: bool

    @property
    def code(self) -> str:
        if self.missing <= 0 or self.helps:
            return "accepted"
        return "below_maintenance_margin" if self.was_candidate else "insufficient_initial_margin"


def judged(world: World, order: TradeOrder) -> Judged:
    """What the rule says of ``order``; without an example where an amount limit comes first."""
    held = world.account.position(order.symbol)
    fill = trading.apply_trade(held, signed_quantity=order.signed_quantity, price=order.price)
    left = {symbol: position for symbol, position in world.account.positions.items() if symbol != order.symbol}
    if fill.position.quantity:
        left[order.symbol] = fill.position
    account = Account("after", world.account.balance + fill.realised_pnl, left)
    assume(max(abs(account.balance), abs(fill.position.cost)) <= AMOUNT_LIMIT)
    before, after = reference(world.account, world.prices), reference(account, world.prices)
    gain = Fraction(fill.opened) * (Fraction(world.prices[order.symbol]) - Fraction(order.price))
    free_before, free_after = before.equity - before.used_margin, after.equity - after.used_margin
    return Judged(
        missing=max(gain, Fraction(0)) - free_after,
        helps=not fill.opened and free_after >= free_before,
        was_candidate=before.candidate,
    )


@repeatable
@given(worlds(), st.data())
def test_a_trade_is_accepted_by_the_rule_and_by_nothing_else(world: World, data: st.DataObject) -> None:
    order = data.draw(orders_in_band(world))
    assert code(world, order) == judged(world, order).code


@repeatable
@given(worlds(), st.integers(-2, 1), st.data())
def test_the_rule_is_exact_to_the_unit(world: World, beside: int, data: st.DataObject) -> None:
    """The same with just so much cash that the trade is within two units of the line."""
    order = data.draw(orders_in_band(world))
    amount = -units(-judged(world, order).missing) + beside
    at_line = moved(world, from_units(amount))
    assume(abs(at_line.account.balance) <= AMOUNT_LIMIT)
    expected = judged(at_line, order)
    assert (expected.missing <= 0) is (beside >= 0)
    assert code(at_line, order) == expected.code


@repeatable
@given(worlds(open_min=1), st.data())
def test_every_reduction_inside_the_band_is_accepted_and_helps(world: World, data: st.DataObject) -> None:
    """Long and short, in trouble or not, candidates too."""
    order = data.draw(reductions_in_band(world))
    # A hand-made balance at the edge of what is kept may have no room for the result.
    assume(abs(world.account.balance) <= AMOUNT_LIMIT / 2)
    assume(abs(world.account.position(order.symbol).cost) <= AMOUNT_LIMIT / 4)
    decision = trading.decide_trade(world.account, order, world.market)
    before, after = reference(world.account, world.prices), reference(decision.account, world.prices)
    assert after.equity - after.used_margin >= before.equity - before.used_margin
    assert after.equity - after.maintenance_margin >= before.equity - before.maintenance_margin


@repeatable
@given(mark=marks(CONTRACTS[BTC]), cash=st.integers(0, 10**15), side=st.sampled_from(["buy", "sell"]), data=st.data())
def test_a_good_price_makes_no_margin_from_nothing(mark: Decimal, cash: int, side: Side, data: st.DataObject) -> None:
    """What may be opened below the mark (above it, when selling) may be opened at the mark, and the other way round."""
    world = World(Account("gina", from_units(cash)), {BTC: mark.quantize(Decimal("0.01"))})
    at_mark = world.prices[BTC]
    price = data.draw(prices_in_band(CONTRACTS[BTC], at_mark))
    assume(price <= at_mark if side == "buy" else price >= at_mark)
    # As many lots as the cash pays for at the mark, give or take one.
    affordable = int(5 * world.account.balance / at_mark / CONTRACTS[BTC].lot_size)
    lots = min(max(1, affordable + data.draw(st.integers(-1, 1))), 10**9)
    order = TradeOrder("gina", BTC, side, lots * CONTRACTS[BTC].lot_size, price)
    assert code(world, order) == code(world, replace(order, price=at_mark))


@repeatable
@given(worlds(), st.data())
def test_the_deposit_that_is_suggested_is_the_smallest_that_lets_the_trade_pass(
    world: World, data: st.DataObject
) -> None:
    order = data.draw(orders_in_band(world))
    try:
        trading.decide_trade(world.account, order, world.market)
        return
    except (errors.InsufficientInitialMargin, errors.BelowMaintenanceMargin) as refusal:
        step: Any = refusal.members["next"]
    except errors.AmountLimit:
        return
    assert step["path"] == "/accounts/somebody/deposit"
    amount = Decimal(step["body"]["amount"])
    # An account that owes all it may can need more than one deposit.
    assume(max(amount, world.account.balance + amount) <= AMOUNT_LIMIT / 2)
    trading.check_amount(amount)
    deposit = TransferOrder("somebody", "deposit", amount)
    helped = replace(world, account=trading.decide_transfer(world.account, deposit, world.market).account)
    assert code(helped, order) == "accepted"
    assert code(moved(helped, -SMALLEST_UNIT), order) in {"insufficient_initial_margin", "below_maintenance_margin"}


@repeatable
@given(worlds(symbols=[BTC]), st.sampled_from(["buy", "sell"]), st.integers(1, 10**9))
def test_the_price_that_is_suggested_is_the_nearest_in_the_band(world: World, side: Side, ticks: int) -> None:
    tick = CONTRACTS[BTC].tick_size
    rich = replace(world, account=Account("rich", AMOUNT_LIMIT / 2))
    order = TradeOrder("rich", BTC, side, CONTRACTS[BTC].lot_size, ticks * tick)
    distance = abs(Fraction(order.price) - Fraction(world.prices[BTC]))
    assume(distance > Fraction(CONTRACTS[BTC].price_band) * Fraction(world.prices[BTC]))
    refusal = refused(rich, order)
    assert refusal.code == "price_out_of_band"
    nearest = suggested(refusal)
    trading.check_order(nearest, CONTRACTS)
    assert code(rich, nearest) == "accepted"
    towards = tick if order.price > nearest.price else -tick
    assert code(rich, replace(nearest, price=nearest.price + towards)) == "price_out_of_band"


@repeatable
@given(
    held=st.one_of(st.none(), positions(CONTRACTS[BTC], Decimal(50_000))),
    beyond=st.one_of(st.integers(1, 3), st.integers(1, 10**9)),
    side=st.sampled_from(["buy", "sell"]),
)
def test_the_quantity_that_is_suggested_is_all_the_room_there_is(
    held: Position | None, beyond: int, side: Side
) -> None:
    rich = World(Account("rich", AMOUNT_LIMIT / 2, {} if held is None else {BTC: held}), {BTC: Decimal(50_000)})
    held_quantity = rich.account.position(BTC).quantity
    left = CONTRACTS[BTC].position_limit - (held_quantity if side == "buy" else -held_quantity)
    order = TradeOrder("rich", BTC, side, left + beyond * CONTRACTS[BTC].lot_size, Decimal(50_000))
    refusal = refused(rich, order)
    assert refusal.code == "position_limit"
    if "next" not in refusal.members:
        assert code(rich, replace(order, quantity=CONTRACTS[BTC].lot_size)) == "position_limit"
        return
    room = suggested(refusal)
    trading.check_order(room, CONTRACTS)
    assert code(rich, room) == "accepted"
    assert code(rich, replace(room, quantity=room.quantity + CONTRACTS[BTC].lot_size)) == "position_limit"


@repeatable
@given(worlds(), st.one_of(st.none(), st.integers(1, 4 * 10**18)), st.integers(-2, 2))
def test_a_withdrawal_leaves_neither_cash_nor_free_margin_below_zero(
    world: World, anything: int | None, beside: int
) -> None:
    """Of any amount, and of within two units of the largest there is."""
    before = reference(world.account, world.prices)
    limit = min(Fraction(world.account.balance), before.equity - before.used_margin)
    amount = max(1, units(limit) + beside) if anything is None else anything
    withdrawal = TransferOrder("somebody", "withdrawal", from_units(amount))
    if Fraction(withdrawal.amount) <= limit:
        after = trading.decide_transfer(world.account, withdrawal, world.market).account
        left = reference(after, world.prices)
        assert after.balance >= 0
        assert left.equity - left.used_margin >= 0
    else:
        with pytest.raises(errors.InsufficientFreeMargin):
            trading.decide_transfer(world.account, withdrawal, world.market)


@repeatable
@given(worlds(), st.integers(1, 10**15))
def test_what_a_refused_withdrawal_suggests_passes_and_one_unit_more_does_not(world: World, amount: int) -> None:
    withdrawal = TransferOrder("somebody", "withdrawal", from_units(amount))
    try:
        trading.decide_transfer(world.account, withdrawal, world.market)
        return
    except errors.InsufficientFreeMargin as refusal:
        step: Any = refusal.members["next"]
    sent = Decimal(step["body"]["amount"])
    # Less than a unit of free margin is a case of its own in the unit tests.
    assume(sent > 0)
    if step["path"].endswith("/withdraw"):
        most = replace(withdrawal, amount=sent)
        assert trading.decide_transfer(world.account, most, world.market).margin is not None
        with pytest.raises(errors.InsufficientFreeMargin):
            trading.decide_transfer(world.account, replace(most, amount=sent + SMALLEST_UNIT), world.market)
    else:
        assume(world.account.balance + sent <= AMOUNT_LIMIT and sent <= AMOUNT_LIMIT)
        helped = moved(world, sent)
        assert trading.decide_transfer(helped.account, withdrawal, world.market).margin is not None
        with pytest.raises(errors.InsufficientFreeMargin):
            trading.decide_transfer(moved(helped, -SMALLEST_UNIT).account, withdrawal, world.market)


@repeatable
@given(worlds(symbols=[BTC, ETH], open_min=1), st.data())
def test_the_mark_that_is_suggested_is_one_that_can_be_set(world: World, data: st.DataObject) -> None:
    """Following ``no_mark_price`` from an account of which nothing is marked leads to some other answer."""
    order = data.draw(reductions_in_band(world))
    # An account that owes all it may cannot realise a loss.
    assume(abs(world.account.balance) <= AMOUNT_LIMIT / 2)
    unmarked = World(world.account, {})
    for _ in world.account.positions:
        refusal = refused(unmarked, order)
        assert refusal.code == "no_mark_price"
        step: Any = refusal.members["next"]
        symbol, price = step["body"]["symbol"], Decimal(step["body"]["price"])
        trading.check_amount(price, name="price", maximum=CONTRACTS[symbol].price_max)
        unmarked = World(world.account, {**unmarked.prices, symbol: price})
    assert code(unmarked, order) == "accepted"
