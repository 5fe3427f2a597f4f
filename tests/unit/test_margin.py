"""Every margin formula, worked by hand."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from app.contracts import AMOUNT_LIMIT
from app.services import margin, reports, trading
from app.services.margin import NO_EXPOSURE, AccountMargin, Exposure
from app.services.trading import Account, Position
from tests.unit.cast import (
    ALICE_LINE,
    ALICE_LONG_1_BTC,
    ALICE_RESTORED,
    BTC,
    CAROL_LINE,
    CAROL_RESTORED,
    CAROL_SHORT_1_BTC,
    CAROL_SHORT_1_BTC_ONE_TICK_SAFE,
    CONTRACTS,
    DAVE_LONG_1_BTC_SHORT_10_ETH,
    DAVES_PRICES,
    ERIN_FLAT,
    ETH,
    FRANK_FLAT_OWING_5,
    TICK,
    UNIT,
    amounts,
)


def valued(account: Account, btc: Decimal | str) -> AccountMargin[Decimal]:
    return trading.account_margin(account, contracts=CONTRACTS, prices={BTC: Decimal(btc)})


def is_candidate(account: Account, btc: Decimal | str) -> bool:
    return trading.is_candidate(valued(account, btc))


def is_restored(account: Account, btc: Decimal | str) -> bool:
    return trading.is_restored(valued(account, btc), restore_at="initial")


def liquidation_price(account: Account, symbol: str, prices: dict[str, Decimal]) -> Decimal | None:
    held = account.positions[symbol]
    others = {other: position for other, position in account.positions.items() if other != symbol}
    rest = trading.account_margin(Account("rest", account.balance, others), contracts=CONTRACTS, prices=prices)
    return margin.liquidation_price(
        quantity=held.quantity,
        cost=held.cost,
        maintenance_rate=CONTRACTS[symbol].maintenance_rate,
        balance=account.balance,
        other=rest.exposure,
    )


def test_notional_is_the_value_at_the_mark_without_its_sign() -> None:
    # 0.5 x 60,000.1 = 30,000.05
    assert margin.notional(quantity=Decimal("0.5"), mark_price=Decimal("60000.1")) == Decimal("30000.05")
    assert margin.notional(quantity=Decimal("-0.5"), mark_price=Decimal("60000.1")) == Decimal("30000.05")


def test_unrealised_pnl_is_what_closing_at_the_mark_would_earn() -> None:
    # long 2 for 100,000 in all, mark 51,000: 2 x 51,000 - 100,000 = 2,000
    long_pnl = margin.unrealised_pnl(quantity=Decimal(2), cost=Decimal(100_000), mark_price=Decimal(51_000))
    # short 2 for 100,000 in all, mark 51,000: -2 x 51,000 + 100,000 = -2,000
    short_pnl = margin.unrealised_pnl(quantity=Decimal(-2), cost=Decimal(-100_000), mark_price=Decimal(51_000))
    assert (long_pnl, short_pnl) == amounts(2_000, -2_000)


def test_an_account_with_one_position() -> None:
    # Alice at 48,000: equity 14,000 + 48,000 - 50,000 = 12,000; used 0.2 x 48,000; maintenance 0.1 x 48,000
    found = valued(ALICE_LONG_1_BTC, "48000")
    assert found.exposure.notional == 48_000
    assert found.exposure.unrealised_pnl == -2_000
    assert (found.equity, found.used_margin, found.maintenance_margin) == amounts(12_000, 9_600, 4_800)
    assert found.free_margin == 12_000 - 9_600


def test_an_account_with_two_positions_adds_them_each_at_its_own_rates() -> None:
    found = trading.account_margin(DAVE_LONG_1_BTC_SHORT_10_ETH, contracts=CONTRACTS, prices=DAVES_PRICES)
    assert found.exposure.notional == 48_000 + 24_000
    assert found.equity == 14_000
    assert found.used_margin == 9_600 + 6_000
    assert found.maintenance_margin == 4_800 + 3_000
    assert found.free_margin == -1_600


def test_a_flat_account_is_its_balance() -> None:
    found = trading.account_margin(ERIN_FLAT, contracts=CONTRACTS, prices={})
    assert (found.equity, found.used_margin, found.maintenance_margin, found.free_margin) == amounts(
        10_000, 0, 0, 10_000
    )
    assert found.exposure == NO_EXPOSURE


def test_the_margins_are_not_rounded() -> None:
    # 0.000001 BTC at 12,345.67890123: notional 0.01234567890123, used 0.002469135780246, maintenance half of it
    speck = trading.account_margin(
        Account("speck", Decimal(0), {BTC: trading.Position(Decimal("0.000001"), Decimal(0))}),
        contracts=CONTRACTS,
        prices={BTC: Decimal("12345.67890123")},
    )
    assert speck.used_margin == Decimal("0.002469135780246")
    assert speck.maintenance_margin == Decimal("0.001234567890123")


def test_the_margins_of_the_largest_account_in_the_smallest_lots_are_not_rounded() -> None:
    """29 digits: one more than Python's decimals keep unless they are told to."""
    contract = replace(CONTRACTS[BTC], lot_size=UNIT, tick_size=Decimal(1), initial_rate=Decimal("0.21"))
    account = Account("big", AMOUNT_LIMIT, {BTC: Position(quantity=UNIT, cost=Decimal("0.1"))})
    found = trading.account_margin(account, contracts={BTC: contract}, prices={BTC: Decimal("1.00000001")})
    equity = Fraction(AMOUNT_LIMIT) + Fraction("0.0000000100000001") - Fraction("0.1")
    assert Fraction(found.equity) == equity
    shown = reports.account_summary(account, found, in_breach=False)
    assert Fraction(shown["equity"]) == equity
    assert Fraction(shown["free_margin"]) == equity - Fraction("0.000000002100000021")


def test_the_same_formula_serves_a_decimal_and_a_column() -> None:
    columns = margin.position_exposure(
        quantity=np.array([1.0, -1.0]),
        cost=np.array([50_000.0, -50_000.0]),
        mark_price=np.array(48_000.0),
        initial_rate=np.array(0.2),
        maintenance_rate=np.array(0.1),
    )
    assert columns.notional.tolist() == [48_000.0, 48_000.0]
    assert columns.unrealised_pnl.tolist() == [-2_000.0, 2_000.0]
    assert columns.used_margin.tolist() == [9_600.0, 9_600.0]
    assert columns.maintenance_margin.tolist() == [4_800.0, 4_800.0]


def test_exposures_add() -> None:
    one = Exposure(
        notional=Decimal(1), unrealised_pnl=Decimal(2), used_margin=Decimal(3), maintenance_margin=Decimal(4)
    )
    assert one + one == Exposure(Decimal(2), Decimal(4), Decimal(6), Decimal(8))
    assert margin.total_exposure([one, NO_EXPOSURE]) == one
    assert margin.total_exposure([]) == NO_EXPOSURE


def test_a_long_account_is_a_candidate_one_tick_below_its_line_and_not_at_it() -> None:
    assert not is_candidate(ALICE_LONG_1_BTC, ALICE_LINE + TICK)
    assert not is_candidate(ALICE_LONG_1_BTC, ALICE_LINE)
    assert is_candidate(ALICE_LONG_1_BTC, ALICE_LINE - TICK)


def test_a_short_account_is_a_candidate_one_tick_above_its_line_and_not_at_it() -> None:
    assert not is_candidate(CAROL_SHORT_1_BTC, CAROL_LINE - TICK)
    assert not is_candidate(CAROL_SHORT_1_BTC, CAROL_LINE)
    assert is_candidate(CAROL_SHORT_1_BTC, CAROL_LINE + TICK)


def test_one_tick_of_safety_holds_for_one_tick() -> None:
    assert not is_candidate(CAROL_SHORT_1_BTC_ONE_TICK_SAFE, CAROL_LINE)
    assert not is_candidate(CAROL_SHORT_1_BTC_ONE_TICK_SAFE, CAROL_LINE + TICK)
    assert is_candidate(CAROL_SHORT_1_BTC_ONE_TICK_SAFE, CAROL_LINE + 2 * TICK)


@pytest.mark.parametrize(("change", "expected"), [(UNIT, False), (Decimal(0), False), (-UNIT, True)])
def test_the_smallest_unit_of_cash_decides_at_the_line(change: Decimal, expected: bool) -> None:
    account = Account("alice", ALICE_LONG_1_BTC.balance + change, ALICE_LONG_1_BTC.positions)
    assert is_candidate(account, ALICE_LINE) is expected


def test_a_flat_account_is_never_a_candidate() -> None:
    assert not is_candidate(ERIN_FLAT, "50000")
    assert not is_candidate(FRANK_FLAT_OWING_5, "50000")


def test_a_long_account_is_restored_where_equity_reaches_used_margin() -> None:
    assert is_restored(ALICE_LONG_1_BTC, ALICE_RESTORED + TICK)
    assert is_restored(ALICE_LONG_1_BTC, ALICE_RESTORED)
    assert not is_restored(ALICE_LONG_1_BTC, ALICE_RESTORED - TICK)


def test_a_short_account_is_restored_where_equity_reaches_used_margin() -> None:
    assert is_restored(CAROL_SHORT_1_BTC, CAROL_RESTORED - TICK)
    assert is_restored(CAROL_SHORT_1_BTC, CAROL_RESTORED)
    assert not is_restored(CAROL_SHORT_1_BTC, CAROL_RESTORED + TICK)


def test_between_the_two_lines_an_account_is_neither_a_candidate_nor_restored() -> None:
    assert not is_candidate(ALICE_LONG_1_BTC, "42000")
    assert not is_restored(ALICE_LONG_1_BTC, "42000")


def test_restoring_at_maintenance_ends_a_breach_at_the_line_where_it_began() -> None:
    for price, expected in ((ALICE_LINE + TICK, True), (ALICE_LINE, True), (ALICE_LINE - TICK, False)):
        assert trading.is_restored(valued(ALICE_LONG_1_BTC, price), restore_at="maintenance") is expected


def test_a_flat_account_is_restored_whatever_it_owes() -> None:
    assert is_restored(FRANK_FLAT_OWING_5, "50000")


def test_one_predicate_decides_for_decimals_and_for_columns() -> None:
    """One tick above, at and below the line: equity 4,000 and 4,000 of maintenance margin at 40,000."""
    notional, maintenance = np.array([40_000.0] * 3), np.array([4_000.0] * 3)
    equity = np.array([4_000.01, 4_000.0, 3_999.99])
    columns = margin.is_candidate(notional=notional, equity=equity, maintenance_margin=maintenance)
    assert columns.tolist() == [False, False, True]
    assert columns.tolist() == [
        margin.is_candidate(notional=Decimal(40_000), equity=Decimal(str(value)), maintenance_margin=Decimal(4_000))
        for value in equity.tolist()
    ]
    restored = margin.is_restored(notional=notional, equity=equity, restore_margin=maintenance)
    assert restored.tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("dividend", "divisor", "places", "quotient"),
    [
        ("1", "8", 2, "0.12"),  # 0.125: a tie, 2 is even
        ("3", "8", 2, "0.38"),  # 0.375: a tie, 7 is odd
        ("-1", "8", 2, "-0.12"),
        ("-3", "8", 2, "-0.38"),
        ("3", "-8", 2, "-0.38"),
        ("-3", "-8", 2, "0.38"),
        ("0.12499", "1", 2, "0.12"),  # just below a tie
        ("0.12501", "1", 2, "0.13"),  # just above a tie
        ("1", "3", 8, "0.33333333"),
        ("2", "3", 8, "0.66666667"),
        ("-2", "3", 8, "-0.66666667"),
        ("0", "-7", 8, "0"),
        ("0.000000005", "1", 8, "0"),  # a tie, 0 is even
        ("0.000000015", "1", 8, "0.00000002"),
        ("40000000000", "0.000001", 8, "40000000000000000"),
    ],
)
def test_a_division_rounds_once_half_even(dividend: str, divisor: str, places: int, quotient: str) -> None:
    assert margin.divide_half_even(Decimal(dividend), Decimal(divisor), places=places) == Decimal(quotient)


def test_a_division_sees_the_true_quotient_and_not_one_rounded_before() -> None:
    # The tie is at ...000.5; 1e-40 above it is less than a context of 28 digits keeps next to 4e10.
    just_above_a_tie = Decimal("40000000000.5000000000000000000000000000000000000001")
    assert margin.divide_half_even(Decimal("40000000000.5"), Decimal(1), places=0) == 40_000_000_000
    assert margin.divide_half_even(just_above_a_tie, Decimal(1), places=0) == 40_000_000_001
    just_below_a_tie = Decimal("40000000001.4999999999999999999999999999999999999999")
    assert margin.divide_half_even(just_below_a_tie, Decimal(1), places=0) == 40_000_000_001


def test_a_division_by_zero_raises() -> None:
    with pytest.raises(ZeroDivisionError):
        margin.divide_half_even(Decimal(1), Decimal(0))


def test_the_average_price_is_cost_over_quantity() -> None:
    # 45,025.05 / 0.75 = 60,033.4; and 100 / 3 rounded
    assert margin.average_price(quantity=Decimal("0.75"), cost=Decimal("45025.05")) == Decimal("60033.4")
    assert margin.average_price(quantity=Decimal(-3), cost=Decimal(-100)) == Decimal("33.33333333")


def test_the_ratios_of_an_account_worked_by_hand() -> None:
    # Dave: 7,800 / 14,000 = 0.557142857..., 15,600 / 14,000 = 1.114285714...
    ratio = margin.margin_ratio(equity=Decimal(14_000), notional=Decimal(72_000), margin=Decimal(7_800))
    utilisation = margin.margin_ratio(equity=Decimal(14_000), notional=Decimal(72_000), margin=Decimal(15_600))
    assert (ratio, utilisation) == (Decimal("0.55714286"), Decimal("1.11428571"))


def test_the_margin_ratio_is_one_at_the_line() -> None:
    at_line = valued(ALICE_LONG_1_BTC, ALICE_LINE)
    ratio = margin.margin_ratio(
        equity=at_line.equity, notional=at_line.exposure.notional, margin=at_line.maintenance_margin
    )
    assert ratio == 1


@pytest.mark.parametrize(("equity", "ratio"), [(UNIT, Decimal(400_000_000_000)), (Decimal(0), None), (-UNIT, None)])
def test_a_ratio_is_null_unless_equity_is_above_zero(equity: Decimal, ratio: Decimal | None) -> None:
    # 4,000 / 1e-8 = 4e11
    assert margin.margin_ratio(equity=equity, notional=Decimal(40_000), margin=Decimal(4_000)) == ratio


@pytest.mark.parametrize("equity", ["10", "0", "-10"])
def test_a_ratio_is_zero_when_flat(equity: str) -> None:
    assert margin.margin_ratio(equity=Decimal(equity), notional=Decimal(0), margin=Decimal(0)) == 0


def test_the_liquidation_price_of_one_position_is_its_line() -> None:
    assert liquidation_price(ALICE_LONG_1_BTC, BTC, {}) == ALICE_LINE
    assert liquidation_price(CAROL_SHORT_1_BTC, BTC, {}) == CAROL_LINE
    assert liquidation_price(CAROL_SHORT_1_BTC_ONE_TICK_SAFE, BTC, {}) == CAROL_LINE + TICK


def test_the_liquidation_price_of_each_of_two_positions_holds_the_other_mark() -> None:
    # BTC: 20,000 - 4,000 + m - 50,000 = 3,000 + 0.1 m, so 0.9 m = 37,000
    assert liquidation_price(DAVE_LONG_1_BTC_SHORT_10_ETH, BTC, DAVES_PRICES) == Decimal("41111.11111111")
    # ETH: 20,000 - 2,000 - 10 m + 20,000 = 4,800 + 1.25 m, so 11.25 m = 33,200
    assert liquidation_price(DAVE_LONG_1_BTC_SHORT_10_ETH, ETH, DAVES_PRICES) == Decimal("2951.11111111")


@pytest.mark.parametrize(("balance", "price"), [("50000.9", None), ("50000", None), ("49999.1", Decimal(1))])
def test_a_long_position_that_cash_covers_whole_has_no_liquidation_price(balance: str, price: Decimal | None) -> None:
    # balance + m - 50,000 = 0.1 m has its root at (50,000 - balance) / 0.9: below 0, 0, and 0.9 / 0.9 = 1
    found = margin.liquidation_price(
        quantity=Decimal(1),
        cost=Decimal(50_000),
        maintenance_rate=Decimal("0.10"),
        balance=Decimal(balance),
        other=NO_EXPOSURE,
    )
    assert found == price


def test_a_short_position_that_no_mark_can_save_has_no_liquidation_price() -> None:
    # balance + 50,000 - m = 0.1 m has its root at (balance + 50,000) / 1.1: at -50,000.11 below 0
    found = margin.liquidation_price(
        quantity=Decimal(-1),
        cost=Decimal(-50_000),
        maintenance_rate=Decimal("0.10"),
        balance=Decimal("-50000.11"),
        other=NO_EXPOSURE,
    )
    assert found is None


def test_the_liquidation_price_is_rounded_half_even_and_the_line_is_not() -> None:
    # balance 9,999.99999999 and m - 50,000: 0.9 m = 40,000.00000001, m = 44,444.444444455...; half up and even agree
    found = liquidation_price(Account("thin", Decimal("9999.99999999"), ALICE_LONG_1_BTC.positions), BTC, {})
    assert found == Decimal("44444.44444446")
    assert Fraction(found) != Fraction("40000.00000001") / Fraction("0.9")
