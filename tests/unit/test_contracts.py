"""A contract is checked at start-up: what could not be kept exact, or could make candidates, does not start."""

from __future__ import annotations

from dataclasses import fields, replace
from decimal import Decimal
from typing import Any

import pytest

from app.contracts import AMOUNT_LIMIT, BTC_PERP, Contract, ContractError, contracts_digest
from app.services import trading
from app.services.trading import FLAT
from tests.unit.cast import BTC, ETH_PERP


def contract(**changed: str) -> Contract:
    """BTC-PERP with some of its numbers replaced."""
    numbers: dict[str, Any] = {name: Decimal(text) for name, text in changed.items()}
    return replace(BTC_PERP, **numbers)


def starts(**changed: str) -> None:
    """Such a contract starts."""
    contract(**changed)


def refused(**changed: str) -> str:
    """The reason for which such a contract does not start."""
    with pytest.raises(ContractError) as refusal:
        contract(**changed)
    return str(refusal.value)


def test_btc_perp_is_what_the_task_says() -> None:
    assert BTC_PERP.symbol == "BTC-PERP"
    assert (BTC_PERP.initial_rate, BTC_PERP.maintenance_rate) == (Decimal("0.20"), Decimal("0.10"))
    assert (BTC_PERP.tick_size, BTC_PERP.lot_size) == (Decimal("0.01"), Decimal("0.000001"))
    assert BTC_PERP.price_band == Decimal("0.10")


@pytest.mark.parametrize(
    "name", ["tick_size", "lot_size", "maintenance_rate", "price_band", "price_max", "position_limit"]
)
def test_each_number_is_above_zero(name: str) -> None:
    assert name in refused(**{name: "0"})
    assert name in refused(**{name: f"-{getattr(BTC_PERP, name)}"})


def test_tick_times_lot_is_a_multiple_of_the_smallest_unit() -> None:
    # tick 0.01 x lot: 0.0000009 -> 0.9e-8, 0.000001 -> 1e-8, 0.0000011 -> 1.1e-8, 0.000002 -> 2e-8
    assert "cash flow" in refused(lot_size="0.0000009")
    starts(lot_size="0.000001")
    assert "cash flow" in refused(lot_size="0.0000011")
    starts(lot_size="0.000002")


def test_the_largest_notional_is_forty_thousand_million() -> None:
    # price_max 10,000,000 x 4,000 = 4e10
    starts(position_limit="3999.999999")
    assert contract(position_limit="4000").position_limit * BTC_PERP.price_max == AMOUNT_LIMIT
    assert "above 40000000000" in refused(position_limit="4000.000001")


def test_the_maintenance_rate_is_at_most_the_initial_rate() -> None:
    starts(initial_rate="0.1001")
    starts(initial_rate="0.10")
    assert "rates" in refused(initial_rate="0.0999")


def test_the_initial_rate_is_below_one() -> None:
    starts(initial_rate="0.9999")
    assert "rates" in refused(initial_rate="1")
    assert "rates" in refused(initial_rate="1.0001")


def test_the_band_is_at_most_the_maintenance_rate() -> None:
    starts(price_band="0.0999")
    starts(price_band="0.10")
    assert "exceeds maintenance_rate" in refused(price_band="0.1001")


def test_a_lot_that_a_packed_column_cannot_hold_does_not_start() -> None:
    """A quantity is packed in units of 1e-8: tick 100 x lot 1e-10 keeps cash exact, and the quantity not."""
    starts(tick_size="100", lot_size="0.00000001")
    assert "lot_size" in refused(tick_size="100", lot_size="0.0000000001")


def test_a_position_limit_that_a_packed_column_cannot_hold_does_not_start() -> None:
    """An int64 of 1e-8 ends at 92,233,720,368.54775807 coins, however little one of them costs."""
    cheap = {"tick_size": "0.00000001", "lot_size": "1", "price_max": "0.01"}
    starts(**cheap, position_limit="92233720368")
    assert "position_limit" in refused(**cheap, position_limit="92233720369")


@pytest.mark.parametrize("name", [field.name for field in fields(Contract) if field.name != "symbol"])
@pytest.mark.parametrize("text", ["NaN", "Infinity"])
def test_what_is_no_number_does_not_start_and_the_reason_names_it(name: str, text: str) -> None:
    assert BTC in refused(**{name: text})


def test_every_quantity_and_price_of_a_contract_gives_an_exact_cash_flow() -> None:
    fill = trading.apply_trade(FLAT, signed_quantity=BTC_PERP.lot_size, price=BTC_PERP.tick_size)
    assert fill.position.cost == Decimal("0.00000001")


def test_the_digest_is_the_same_for_the_same_contracts_in_any_order() -> None:
    assert contracts_digest([BTC_PERP, ETH_PERP]) == contracts_digest([ETH_PERP, replace(BTC_PERP)])
    assert len(contracts_digest([BTC_PERP])) == 16


def test_the_digest_is_the_same_for_equal_contracts_however_their_numbers_are_written() -> None:
    """0.2 and 0.20 are one rate: a process configured with either must not find the state a mismatch."""
    written_otherwise = contract(initial_rate="0.2", price_max="1E+7")
    assert written_otherwise == BTC_PERP
    assert contracts_digest([written_otherwise]) == contracts_digest([BTC_PERP])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("symbol", "XBT-PERP"),
        ("tick_size", Decimal("0.02")),
        ("lot_size", Decimal("0.000002")),
        ("initial_rate", Decimal("0.200001")),
        ("maintenance_rate", Decimal("0.100001")),
        ("price_band", Decimal("0.099999")),
        ("price_max", Decimal("9999999.99")),
        ("position_limit", Decimal("999.999999")),
    ],
)
def test_the_digest_differs_with_any_change(name: str, value: str | Decimal) -> None:
    changes: dict[str, Any] = {name: value}
    assert contracts_digest([replace(BTC_PERP, **changes)]) != contracts_digest([BTC_PERP])


def test_the_table_of_changes_above_names_every_field() -> None:
    """A field that is added is added to the digest, and here."""
    assert {field.name for field in fields(Contract)} == {
        "symbol", "tick_size", "lot_size", "initial_rate", "maintenance_rate", "price_band", "price_max",
        "position_limit",
    }  # fmt: skip


def test_the_digest_differs_with_a_contract_more_or_less() -> None:
    assert contracts_digest([BTC_PERP]) != contracts_digest([BTC_PERP, ETH_PERP])
