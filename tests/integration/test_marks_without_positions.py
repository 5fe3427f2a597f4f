"""A mark may be anything while nobody holds the symbol: the guard against a mistyped one is for open positions."""

from __future__ import annotations

from tests.integration.desk import BTC_PERP, Desk, outcome


async def mark_without_a_word(desk: Desk, price: str) -> str:
    return outcome(await desk.client.post("/mark-price", json={"symbol": BTC_PERP, "price": price}))


async def test_any_mark_passes_before_the_first_position(desk: Desk) -> None:
    assert await mark_without_a_word(desk, "50000") == "accepted"
    assert await mark_without_a_word(desk, "1") == "accepted"


async def test_a_jump_is_refused_from_the_first_position_on_until_the_last_is_closed(desk: Desk) -> None:
    await desk.mark("50000")
    for account in ("alice", "bob"):
        await desk.deposit(account, "100000")
    await desk.buy("alice", "1", "50000")
    await desk.sell("bob", "1", "50000")
    assert await mark_without_a_word(desk, "1") == "mark_price_jump"
    await desk.sell("alice", "1", "50000")
    assert await mark_without_a_word(desk, "1") == "mark_price_jump"
    # A flip leaves a position open as well.
    await desk.buy("bob", "2", "50000")
    assert await mark_without_a_word(desk, "1") == "mark_price_jump"
    await desk.sell("bob", "1", "50000")
    assert await mark_without_a_word(desk, "1") == "accepted"
