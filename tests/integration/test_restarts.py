"""A restart in the middle of a breach: the breach stays the one it was."""

from __future__ import annotations

from app.embedded import Stores
from tests.conftest import SystemFactory
from tests.integration.desk import Desk, differences


async def carol_in_breach(desk: Desk) -> None:
    """Long 1 BTC from 50,000 with 10,000, at a mark of 44,000: equity 4,000, maintenance margin 4,400."""
    await desk.mark("50000")
    await desk.deposit("carol", "10000")
    await desk.buy("carol", "1", "50000")
    await desk.sweep("44000")
    assert (await desk.account("carol"))["state"] == "candidate"


async def falls_on_without_another_row(desk: Desk, stores: Stores, before: list[dict[str, object]]) -> None:
    for price in ("43900", "43800", "43700"):
        await desk.sweep(price)
    assert await desk.breaches("carol") == before
    assert (await desk.account("carol"))["open_breach"]["id"] == before[0]["id"]
    assert await differences(stores) == []


async def test_api_and_watchdog_stopped_and_started_again_in_the_middle_of_a_breach_add_no_row(
    system: SystemFactory, stores: Stores
) -> None:
    running = await system()
    (api,), (watchdog,) = running.apis, running.watchdogs
    desk = Desk(running.client)
    await carol_in_breach(desk)
    before = await desk.breaches("carol")
    assert watchdog.terminate() == 0
    assert api.terminate() == 0
    watchdog = await running.start_watchdog(wait=False)
    await running.start_api(port=int(api.url.rpartition(":")[2]))
    await watchdog.wait_until_ready()
    await falls_on_without_another_row(desk, stores, before)


async def test_a_watchdog_killed_in_the_middle_of_a_breach_and_started_again_adds_no_row(
    system: SystemFactory, desk: Desk, stores: Stores
) -> None:
    running = await system(api_workers=0)
    await carol_in_breach(desk)
    before = await desk.breaches("carol")
    running.watchdogs[0].kill()
    await running.start_watchdog()
    await falls_on_without_another_row(desk, stores, before)
