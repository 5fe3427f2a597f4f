"""The demo market, against an API that is a model of ours, as fast as it goes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest

from app.demo import MARK_INTERVAL_SECONDS, DemoMarket, Memory
from tests.model_api import ModelApi

pytestmark = pytest.mark.usefixtures("_no_pauses")


class Killed(BaseException):
    """What happens to the demo's process when ``make run`` is ended."""


@pytest.fixture
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.demo.MARK_INTERVAL_SECONDS", 0)
    monkeypatch.setattr("app.demo.BACKOFF_SECONDS", (0.0,))
    monkeypatch.setattr("app.replay.client.RETRY_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr("app.replay.client.UNANSWERED_SECONDS_MAX", 0.01)


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    return Memory(tmp_path / "demo.json")


async def run(
    model: ModelApi, memory: Memory, *, killed_at: int, interfere: Callable[[], object] | None = None
) -> None:
    """Run the market until it stops, or is killed at that mark version; ``interfere`` comes once, ten marks before."""
    waiting = [interfere] if interfere else []

    def look_on(method: str, path: str) -> None:
        if (method, path) == ("GET", "/health/ready"):
            if model.oracle.mark_version >= killed_at:
                raise Killed
            if waiting and model.oracle.mark_version >= killed_at - 10:
                waiting.pop()()

    model.before = look_on
    with contextlib.suppress(Killed):
        await DemoMarket(model.client(), memory).run()


async def test_an_empty_store_sees_a_breach_in_half_a_minute_and_a_recovery_in_the_next(memory: Memory) -> None:
    model = ModelApi()
    await run(model, memory, killed_at=200)
    first_breach = model.oracle.breaches[0].mark_version * MARK_INTERVAL_SECONDS
    first_recovery = model.oracle.recoveries[0].mark_version * MARK_INTERVAL_SECONDS
    assert 10 < first_breach < 30
    assert first_breach < first_recovery < 60
    assert all(account_id.startswith("demo-") for account_id in model.oracle.accounts)


async def test_twenty_minutes_of_it_stay_within_sight_of_its_opening_and_breach_now_and_then(
    memory: Memory,
) -> None:
    model = ModelApi()
    await run(model, memory, killed_at=2400)
    prices = [Decimal(body["price"]) for body in model.posted("/mark-price")]
    assert 45_000 < min(prices) < max(prices) < 70_000
    assert 4 < len(model.oracle.breaches) < 60


async def test_it_stops_for_good_at_a_mark_from_anyone_else(memory: Memory) -> None:
    model = ModelApi()
    await run(
        model, memory, killed_at=30, interfere=lambda: model.oracle.mark(symbol="BTC-PERP", price=Decimal(58_000))
    )
    assert model.oracle.mark_version == 21
    assert model.oracle.marks["BTC-PERP"] == 58_000
    await run(model, memory, killed_at=100)
    assert model.oracle.mark_version == 21


async def test_it_stops_for_good_at_a_mark_set_by_hand(memory: Memory) -> None:
    model = ModelApi()
    await run(model, memory, killed_at=30, interfere=lambda: model.oracle.marks.update({"BTC-PERP": Decimal(58_000)}))
    assert model.oracle.mark_version == 20
    await run(model, memory, killed_at=100)
    assert model.oracle.mark_version == 20


async def test_it_stays_away_if_somebody_set_a_mark_while_it_was_stopped(memory: Memory) -> None:
    model = ModelApi()
    await run(model, memory, killed_at=20)
    model.oracle.mark(symbol="BTC-PERP", price=Decimal(58_000))
    await run(model, memory, killed_at=100)
    assert model.oracle.mark_version == 21


async def test_it_goes_on_where_it_was_after_a_restart(memory: Memory) -> None:
    model = ModelApi()
    await run(model, memory, killed_at=100)
    last = model.oracle.marks["BTC-PERP"]
    await run(model, memory, killed_at=110)
    assert model.oracle.mark_version == 110
    assert abs(model.oracle.marks["BTC-PERP"] - last) < 2_000


async def test_a_kill_between_a_mark_and_its_answer_is_no_mark_of_somebody_else(memory: Memory) -> None:
    model = ModelApi()
    await run(model, memory, killed_at=20)
    noted = memory.recall()
    assert noted is not None
    unanswered = Decimal("59999.5")
    memory.note(type(noted)(21, unanswered))
    model.oracle.mark(symbol="BTC-PERP", price=unanswered)
    await run(model, memory, killed_at=30)
    assert model.oracle.mark_version == 30


async def test_it_leaves_a_store_with_other_accounts_alone(memory: Memory) -> None:
    model = ModelApi()
    model.oracle.transfer(account_id="alice", kind="deposit", amount=Decimal(1000), client_transfer_id="1")
    await run(model, memory, killed_at=10)
    assert model.oracle.mark_version == 0
    assert list(model.oracle.accounts) == ["alice"]


async def test_it_waits_while_the_api_is_away(memory: Memory) -> None:
    model = ModelApi()

    def go_away() -> None:
        model.outages = 40

    await run(model, memory, killed_at=30, interfere=go_away)
    assert model.outages == 0
    assert model.oracle.mark_version == 30
