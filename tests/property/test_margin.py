"""The margin of any account, against fractions."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from app.services import margin, trading
from app.services.trading import Account
from tests.property.repeatable import repeatable
from tests.property.worlds import CONTRACTS, World, reference, worlds

HALF_A_UNIT = Fraction(1, 2 * 10**8)


@repeatable
@given(worlds())
def test_every_margin_is_the_one_of_the_definitions(world: World) -> None:
    valued = trading.account_margin(world.account, contracts=CONTRACTS, prices=world.prices)
    expected = reference(world.account, world.prices)
    assert Fraction(valued.equity) == expected.equity
    assert Fraction(valued.exposure.notional) == expected.notional
    assert Fraction(valued.used_margin) == expected.used_margin
    assert Fraction(valued.maintenance_margin) == expected.maintenance_margin
    assert Fraction(valued.free_margin) == expected.equity - expected.used_margin


@repeatable
@given(worlds(near=True))
def test_the_verdicts_are_exact_within_a_few_units_of_their_lines(world: World) -> None:
    valued = trading.account_margin(world.account, contracts=CONTRACTS, prices=world.prices)
    expected = reference(world.account, world.prices)
    assert trading.is_candidate(valued) is expected.candidate
    assert trading.is_restored(valued, restore_at="initial") is expected.restored


@repeatable
@given(worlds())
def test_no_account_is_a_candidate_and_restored(world: World) -> None:
    valued = trading.account_margin(world.account, contracts=CONTRACTS, prices=world.prices)
    assert not (trading.is_candidate(valued) and trading.is_restored(valued, restore_at="initial"))
    assert trading.is_candidate(valued) is not trading.is_restored(valued, restore_at="maintenance")


@repeatable
@given(worlds(open_min=1))
def test_a_margin_ratio_above_one_or_none_means_a_candidate(world: World) -> None:
    valued = trading.account_margin(world.account, contracts=CONTRACTS, prices=world.prices)
    ratio = margin.margin_ratio(
        equity=valued.equity, notional=valued.exposure.notional, margin=valued.maintenance_margin
    )
    if ratio is None or ratio > 1:
        assert trading.is_candidate(valued)
    if trading.is_candidate(valued):
        # One that is above 1 by less than half a unit is shown as 1.
        assert ratio is None or ratio >= 1


@repeatable
@given(worlds(open_min=1), st.data())
def test_at_its_liquidation_price_equity_is_the_maintenance_margin(world: World, data: st.DataObject) -> None:
    """Up to the rounding for display, and with all other marks held. None means that no mark above 0 does it."""
    account = world.account
    symbol = data.draw(st.sampled_from(list(account.positions)))
    held, rate = account.positions[symbol], CONTRACTS[symbol].maintenance_rate
    others = {other: position for other, position in account.positions.items() if other != symbol}
    rest = trading.account_margin(Account("rest", Decimal(0), others), contracts=CONTRACTS, prices=world.prices)
    price = margin.liquidation_price(
        quantity=held.quantity,
        cost=held.cost,
        maintenance_rate=rate,
        balance=account.balance,
        other=rest.exposure,
    )

    def distance(mark: Fraction) -> Fraction:
        """Equity less maintenance margin, with this symbol's mark moved: a straight line."""
        without = reference(Account("rest", account.balance, others), world.prices)
        value = Fraction(held.quantity) * mark
        return without.equity - without.maintenance_margin + value - Fraction(held.cost) - abs(value) * Fraction(rate)

    slope = distance(Fraction(1)) - distance(Fraction(0))
    if price is None:
        # The line crosses zero at no mark above zero.
        assert distance(Fraction(0)) * slope >= 0
    else:
        assert abs(distance(Fraction(price))) <= HALF_A_UNIT * abs(slope)
        assert distance(Fraction(0)) * slope < 0


@repeatable
@given(worlds(open_min=1))
def test_the_average_price_is_within_half_a_unit_of_the_true_one(world: World) -> None:
    for held in world.account.positions.values():
        shown = margin.average_price(quantity=held.quantity, cost=held.cost)
        assert shown > 0
        assert abs(Fraction(shown) - Fraction(held.cost) / Fraction(held.quantity)) <= HALF_A_UNIT


@repeatable
@given(worlds())
def test_the_order_of_the_positions_changes_nothing(world: World) -> None:
    turned = Account("turned", world.account.balance, dict(reversed(list(world.account.positions.items()))))
    valued = trading.account_margin(world.account, contracts=CONTRACTS, prices=world.prices)
    assert trading.account_margin(turned, contracts=CONTRACTS, prices=world.prices) == valued
