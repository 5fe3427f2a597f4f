"""Deposits and withdrawals: what may leave an account, what may come, and what to send instead."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from app import errors
from app.services import trading
from app.services.trading import Account, Market, TransferKind, TransferOrder
from tests.unit.cast import (
    ALICE_LONG_1_BTC,
    BTC,
    DAVE_LONG_1_BTC_SHORT_10_ETH,
    ERIN_FLAT,
    FRANK_FLAT_OWING_5,
    LOT,
    UNIT,
    holding_btc,
    market,
    transfer,
)


def code(account: Account, order: TransferOrder, at: Market) -> str:
    try:
        trading.decide_transfer(account, order, at)
    except errors.Refusal as refusal:
        return refusal.code
    return "accepted"


def refused(account: Account, amount: str, at: Market) -> errors.Refusal:
    with pytest.raises(errors.Refusal) as refusal:
        trading.decide_transfer(account, transfer("withdrawal", amount), at)
    return refusal.value


def withdraw_triple(account: Account, limit: str, at: Market) -> list[str]:
    """What one unit less than ``limit``, ``limit`` and one unit more come to."""
    return [code(account, transfer("withdrawal", Decimal(limit) + step), at) for step in (-UNIT, Decimal(0), UNIT)]


WITHIN = ["accepted", "accepted", "insufficient_free_margin"]


def test_a_deposit_adds_to_the_balance() -> None:
    decision = trading.decide_transfer(ERIN_FLAT, transfer("deposit", "0.00000001"), market())
    assert decision.account.balance == Decimal("10000.00000001")
    assert decision.margin is not None
    assert decision.margin.equity == Decimal("10000.00000001")


def test_a_withdrawal_takes_from_the_balance() -> None:
    decision = trading.decide_transfer(ERIN_FLAT, transfer("withdrawal", "10000"), market())
    assert decision.account.balance == 0


def test_a_flat_account_may_withdraw_its_balance_and_no_more() -> None:
    assert withdraw_triple(ERIN_FLAT, "10000", market()) == WITHIN


def test_an_account_with_a_loss_may_withdraw_its_free_margin_and_no_more() -> None:
    # Alice at 48,000: equity 12,000, used 9,600, free 2,400, below her balance of 14,000
    assert withdraw_triple(ALICE_LONG_1_BTC, "2400", market("48000")) == WITHIN


def test_an_account_with_a_gain_may_withdraw_its_balance_and_no_more() -> None:
    # Alice at 60,000: equity 24,000, used 12,000, free 12,000. At 80,000: equity 44,000, used 16,000, free 28,000,
    # above her balance of 14,000: a gain that is not realised does not leave.
    assert withdraw_triple(ALICE_LONG_1_BTC, "12000", market("60000")) == WITHIN
    assert withdraw_triple(ALICE_LONG_1_BTC, "14000", market("80000")) == WITHIN


def test_every_position_counts_for_a_withdrawal() -> None:
    # Dave's free margin is -1,600; with 2,000 more in cash it is 400.
    richer = replace(DAVE_LONG_1_BTC_SHORT_10_ETH, balance=Decimal(22_000))
    assert withdraw_triple(richer, "400", market("48000", "2400")) == WITHIN


def test_a_withdrawal_beyond_the_limit_says_what_would_pass() -> None:
    refusal = refused(ALICE_LONG_1_BTC, "5000", market("48000"))
    assert refusal.code == "insufficient_free_margin"
    assert refusal.members == {
        "required": "5000",
        "available": "2400",
        "balance": "14000",
        "free_margin": "2400",
        "next": {"method": "POST", "path": "/accounts/anyone/withdraw", "body": {"amount": "2400"}},
    }


def test_a_withdrawal_where_nothing_is_free_says_which_deposit_would_let_it_pass() -> None:
    # Alice at 44,000: equity 8,000, used 8,800, free -800. 5,000 can leave once 5,800 more are there.
    refusal = refused(ALICE_LONG_1_BTC, "5000", market("44000"))
    assert refusal.members["available"] == "0"
    step: Any = refusal.members["next"]
    assert (step["path"], step["body"]) == ("/accounts/anyone/deposit", {"amount": "5800"})
    helped = replace(ALICE_LONG_1_BTC, balance=ALICE_LONG_1_BTC.balance + 5_800)
    assert withdraw_triple(helped, "5000", market("44000")) == WITHIN


def test_a_withdrawal_where_less_than_a_unit_is_free_says_something_that_passes() -> None:
    # Long 0.000001 for 0.00987655 at 12,345.67890123: equity 0.00000001 + 0.01234567890123 - 0.00987655, which is
    # 0.00246913890123, less 0.2 x 0.01234567890123 leaves 0.000000003120984 of free margin.
    at = market("12345.67890123")
    speck = holding_btc("speck", balance="0.00000001", quantity=str(LOT), cost="0.00987655")
    step: Any = refused(speck, "1", at).members["next"]
    amount = Decimal(step["body"]["amount"])
    trading.check_amount(amount)
    kind: TransferKind = "deposit" if step["path"].endswith("deposit") else "withdrawal"
    assert code(speck, transfer(kind, amount), at) == "accepted"


def test_nothing_can_be_withdrawn_from_an_account_that_owes() -> None:
    assert code(FRANK_FLAT_OWING_5, transfer("withdrawal", UNIT), market()) == "insufficient_free_margin"


def test_a_balance_may_grow_to_forty_thousand_million_and_no_further() -> None:
    rich = Account("rich", Decimal(39_999_999_999))
    assert code(rich, transfer("deposit", "0.99999999"), market()) == "accepted"
    assert code(rich, transfer("deposit", "1"), market()) == "accepted"
    assert code(rich, transfer("deposit", "1.00000001"), market()) == "amount_limit"


def test_a_deposit_passes_whatever_the_market() -> None:
    deposit = transfer("deposit", "1")
    for at in (
        market(btc=None),
        market(halted=True),
        market(age_us=6_000_000, mark_max_age_seconds=5),
        market("0.00000001"),
    ):
        assert code(ALICE_LONG_1_BTC, deposit, at) == "accepted"


def test_a_deposit_without_a_mark_is_booked_and_not_valued() -> None:
    decision = trading.decide_transfer(ALICE_LONG_1_BTC, transfer("deposit", "1"), market(btc=None))
    assert decision.account.balance == 14_001
    assert decision.margin is None


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (market(btc=None, halted=True), "trading_halted"),
        (market(btc=None, mark_max_age_seconds=5), "no_mark_price"),
        (market("44000", age_us=5_000_001, mark_max_age_seconds=5), "stale_mark_price"),
        (market("44000", age_us=5_000_000, mark_max_age_seconds=5), "insufficient_free_margin"),
        (market("80000", age_us=5_000_000, mark_max_age_seconds=5), "accepted"),
    ],
)
def test_a_withdrawal_is_refused_by_the_first_code_that_applies(at: Market, expected: str) -> None:
    assert code(ALICE_LONG_1_BTC, transfer("withdrawal", "1"), at) == expected


def test_a_flat_account_needs_no_mark_to_withdraw() -> None:
    assert code(ERIN_FLAT, transfer("withdrawal", "10000"), market(btc=None)) == "accepted"


def test_a_withdrawal_without_a_mark_says_which_mark_is_missing() -> None:
    refusal = refused(ALICE_LONG_1_BTC, "1", market(btc=None))
    assert refusal.members["symbol"] == BTC
    step: Any = refusal.members["next"]
    assert step["body"] == {"symbol": BTC, "price": "50000"}


def test_a_transfer_leaves_the_positions_alone() -> None:
    for kind in ("deposit", "withdrawal"):
        decision = trading.decide_transfer(ALICE_LONG_1_BTC, transfer(kind, "1"), market())
        assert decision.account.positions == ALICE_LONG_1_BTC.positions
