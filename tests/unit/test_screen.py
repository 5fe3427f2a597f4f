"""One formula, two scales: float64 screens, Decimal decides.

Each account here is one that float64 alone judges wrongly. The screen lets it through, and the verdict is right.
"""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest

from app.columns import screen, value_rows
from app.services import margin, trading
from app.services.exact_rows import tell_exactly
from app.services.trading import Account
from tests.unit.cast import (
    ALICE_LONG_1_BTC,
    BTC,
    CAROL_SHORT_1_BTC,
    CONTRACTS,
    DAVE_LONG_1_BTC_SHORT_10_ETH,
    DAVES_PRICES,
    ERIN_FLAT,
    FRANK_FLAT_OWING_5,
    chunk_of,
    holding_btc,
)

IN_BREACH = 77


def float_verdicts(account: Account, mark: str) -> tuple[bool, bool]:
    """Candidate and restored, by the same formula in float64 and nothing else."""
    held = account.position(BTC)
    exposure = margin.position_exposure(
        quantity=np.array([float(held.quantity)]),
        cost=np.array([float(held.cost)]),
        mark_price=np.array(float(mark)),
        initial_rate=np.array(0.2),
        maintenance_rate=np.array(0.1),
    )
    equity = np.array([float(account.balance)]) + exposure.unrealised_pnl
    candidate = margin.is_candidate(
        notional=exposure.notional, equity=equity, maintenance_margin=exposure.maintenance_margin
    )
    restored = margin.is_restored(notional=exposure.notional, equity=equity, restore_margin=exposure.used_margin)
    return bool(candidate[0]), bool(restored[0])


def verdicts(account: Account, mark: str) -> tuple[bool, bool]:
    """Candidate and restored, as they are decided."""
    valued = trading.account_margin(account, contracts=CONTRACTS, prices={BTC: Decimal(mark)})
    return trading.is_candidate(valued), trading.is_restored(valued, restore_at="initial")


# Each line: the account, the mark, and what is true of it.
@pytest.mark.parametrize(
    ("account", "mark", "candidate"),
    [
        # 3 x 46,169 - 177,434.07 = -38,927.07; + 52,777.77 = 13,850.70 = 0.1 x 138,507: at the line
        (holding_btc("long", balance="52777.77", quantity="3", cost="177434.07"), "46169", False),
        # 60,951.7 - 75,627 = -14,675.3; + 22,238 = 7,562.7 = 0.1 x 75,627: at the line
        (holding_btc("short", balance="22238", quantity="-1", cost="-60951.7"), "75627", False),
        # 873 x 78,297.1 - 71,482,113 = -3,128,744.7; + 9,964,081.53 is 6,835,336.83 = 0.1 x 68,353,368.3: a unit below
        (holding_btc("long", balance="9964081.52999999", quantity="873", cost="71482113"), "78297.1", True),
        # 81,244,608 - 912 x 81,369.2 = 7,035,897.6; + 384,973.44 is 7,420,871.04 = 0.1 x 74,208,710.4: a unit below
        (holding_btc("short", balance="384973.43999999", quantity="-912", cost="-81244608"), "81369.2", True),
    ],
)
def test_a_candidate_is_decided_where_float_is_wrong(account: Account, mark: str, candidate: bool) -> None:
    assert float_verdicts(account, mark)[0] is not candidate
    assert verdicts(account, mark)[0] is candidate
    screened = screen(chunk_of([account], {BTC: Decimal(mark)}), CONTRACTS, restore_at="initial")
    assert screened.may_be_candidate[0]
    assert not screened.surely_candidate[0]


def test_integers_tell_of_a_row_at_its_line_and_leave_one_that_does_not_fit_to_decimal() -> None:
    accounts = [
        # 46,169 - 50,000 = -3,831; + 8,447.9 = 4,616.9 = 0.1 x 46,169: at the line; then a unit above, and one below
        holding_btc("at", balance="8447.9"),
        holding_btc("above", balance="8447.90000001"),
        holding_btc("below", balance="8447.89999999"),
        # a hundred thousand times as much: beyond an int64
        holding_btc("large", balance="844790000", quantity="100000", cost="5000000000"),
    ]
    screened = screen(chunk_of(accounts, {BTC: Decimal(46_169)}), CONTRACTS, restore_at="initial")
    assert (screened.may_be_candidate[0], screened.surely_candidate[0]) == (True, False)
    tell_exactly(screened, CONTRACTS)
    assert screened.may_be_candidate.tolist() == [False, False, True, True]
    assert screened.surely_candidate.tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("account", "mark", "restored"),
    [
        # 3 x 46,169 - 177,434.07 = -38,927.07; + 66,628.47 = 27,701.40 = 0.2 x 138,507: restored
        (holding_btc("long", balance="66628.47", quantity="3", cost="177434.07"), "46169", True),
        # 62,878.2 - 6 x 10,116 = 2,182.2; + 9,957 = 12,139.2 = 0.2 x 60,696: restored
        (holding_btc("short", balance="9957", quantity="-6", cost="-62878.2"), "10116", True),
        # 808 x 96,484.1 - 62,400,870.4 = 15,558,282.4; + 33,548.16 = 15,591,830.56 = 0.2 x 77,959,152.8: a unit below
        (holding_btc("long", balance="33548.15999999", quantity="808", cost="62400870.4"), "96484.1", False),
        # 82,800,365.7 - 989 x 69,767.4 = 13,800,407.1; - 415.38 = 13,799,991.72 = 0.2 x 68,999,958.6: a unit below
        (holding_btc("short", balance="-415.38000001", quantity="-989", cost="-82800365.7"), "69767.4", False),
    ],
)
def test_a_recovery_is_decided_where_float_is_wrong(account: Account, mark: str, restored: bool) -> None:
    assert float_verdicts(account, mark)[1] is not restored
    assert verdicts(account, mark)[1] is restored
    chunk = chunk_of([account], {BTC: Decimal(mark)}, breaches=[IN_BREACH])
    assert screen(chunk, CONTRACTS, restore_at="initial").may_be_restored[0]


def test_accounts_away_from_their_lines_need_no_second_look() -> None:
    # At 39,000 Alice is 900 below her line and Carol 17,100 above hers.
    chunk = chunk_of([ALICE_LONG_1_BTC, CAROL_SHORT_1_BTC, ERIN_FLAT, FRANK_FLAT_OWING_5], {BTC: Decimal(39_000)})
    screened = screen(chunk, CONTRACTS, restore_at="initial")
    assert screened.surely_candidate.tolist() == [True, False, False, False]
    assert screened.may_be_candidate.tolist() == [True, False, False, False]
    assert screened.chunk.is_open().tolist() == [True, True, False, False]


def test_only_accounts_in_breach_may_be_restored() -> None:
    accounts = [CAROL_SHORT_1_BTC, CAROL_SHORT_1_BTC, ERIN_FLAT, FRANK_FLAT_OWING_5, ALICE_LONG_1_BTC]
    chunk = chunk_of(accounts, {BTC: Decimal(39_000)}, breaches=[IN_BREACH, 0, 0, IN_BREACH, IN_BREACH])
    assert screen(chunk, CONTRACTS, restore_at="initial").may_be_restored.tolist() == [True, False, False, True, False]


def test_where_a_breach_is_restored_is_a_setting() -> None:
    # Alice at 42,000: equity 6,000 between maintenance 4,200 and used margin 8,400
    chunk = chunk_of([ALICE_LONG_1_BTC], {BTC: Decimal(42_000)}, breaches=[IN_BREACH])
    assert not screen(chunk, CONTRACTS, restore_at="initial").may_be_restored[0]
    assert screen(chunk, CONTRACTS, restore_at="maintenance").may_be_restored[0]


def test_nothing_is_judged_on_a_missing_mark() -> None:
    accounts = [DAVE_LONG_1_BTC_SHORT_10_ETH, ALICE_LONG_1_BTC, ERIN_FLAT]
    chunk = chunk_of(accounts, {BTC: Decimal(10_000)}, breaches=[IN_BREACH] * 3)
    screened = screen(chunk, CONTRACTS, restore_at="initial")
    assert screened.chunk.is_unvalued().tolist() == [True, False, False]
    assert screened.chunk.is_open().tolist() == [True, True, False]
    assert screened.may_be_candidate.tolist() == [False, True, False]
    assert screened.surely_candidate.tolist() == [False, True, False]
    assert screened.may_be_restored.tolist() == [False, False, True]


def test_the_columns_of_two_symbols_are_valued_each_at_its_own_rates() -> None:
    valued, _ = value_rows(chunk_of([DAVE_LONG_1_BTC_SHORT_10_ETH], DAVES_PRICES), CONTRACTS)
    assert valued.equity.tolist() == [14_000.0]
    assert valued.used_margin.tolist() == [15_600.0]
    assert valued.maintenance_margin.tolist() == [7_800.0]


def test_a_chunk_of_nobody_is_screened() -> None:
    assert screen(chunk_of([], DAVES_PRICES), CONTRACTS, restore_at="initial").may_be_candidate.tolist() == []
