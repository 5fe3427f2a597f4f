"""From an empty system to a booked trade by doing what each answer says."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.desk import BTC_PERP, Desk

STEPS_MAX = 10


async def follow(desk: Desk, order: dict[str, Any]) -> list[str]:
    """Send ``order``, and whatever an answer names as ``next``, until the order is booked; the codes met."""
    codes: list[str] = []
    for _ in range(STEPS_MAX):
        answer = await desk.client.post("/trade", json=order)
        if answer.status_code == 201:
            return codes
        problem = answer.json()
        codes.append(problem["code"])
        step = problem["next"]
        if step["path"] == "/trade":
            order = step["body"]
            continue
        followed = await desk.client.request(step["method"], step["path"], json=step["body"])
        if not followed.is_success:
            codes.append(followed.json()["code"])
            step = followed.json()["next"]
            followed = await desk.client.request(step["method"], step["path"], json=step["body"])
        assert followed.is_success, followed.text
    raise AssertionError(f"not booked after {STEPS_MAX} steps: {codes}")


@pytest.mark.parametrize("side", ["buy", "sell"])
async def test_following_next_from_an_empty_system_leads_to_a_booked_trade(desk: Desk, side: str) -> None:
    order = {"account_id": "alice", "symbol": BTC_PERP, "side": side, "quantity": "1", "price": "60000"}
    assert await follow(desk, order) == ["unknown_account", "no_mark_price", "insufficient_initial_margin"]
    assert (await desk.account("alice"))["positions"][0]["quantity"] == ("1" if side == "buy" else "-1")


async def test_following_next_leads_past_the_band_the_limit_and_the_margin(desk: Desk) -> None:
    await desk.mark("50000")
    await desk.deposit("alice", "1")
    order = {"account_id": "alice", "symbol": BTC_PERP, "side": "buy", "quantity": "1999", "price": "60000"}
    assert await follow(desk, order) == ["price_out_of_band", "position_limit", "insufficient_initial_margin"]
    shown = await desk.account("alice")
    assert shown["positions"][0] | {"liquidation_price": None} == {
        "symbol": BTC_PERP,
        "quantity": "1000",
        "avg_price": "55000",
        "mark_price": "50000",
        "notional": "50000000",
        "unrealised_pnl": "-5000000",
        "liquidation_price": None,
    }


async def test_following_next_leads_a_candidate_out_of_its_trouble(desk: Desk) -> None:
    await desk.mark("50000")
    await desk.deposit("alice", "10000")
    await desk.buy("alice", "1", "50000")
    await desk.mark("41000")
    order = {"account_id": "alice", "symbol": BTC_PERP, "side": "buy", "quantity": "1", "price": "41000"}
    assert await follow(desk, order) == ["below_maintenance_margin"]
    assert (await desk.account("alice"))["positions"][0]["quantity"] == "2"
