"""``PLIMSOLL_RESTORE_AT=maintenance``: a breach ends as soon as the account is no candidate any more."""

from __future__ import annotations

import asyncio

from app import reconcile
from app.config import Settings
from app.embedded import Stores
from tests.conftest import SystemFactory
from tests.integration.conftest import DeskFactory

# Long 1 BTC from 50,000 with 10,000.4 has just its maintenance margin at 44,444.


async def test_a_breach_ends_at_the_maintenance_margin_by_mark_or_deposit_and_not_a_step_below(
    system: SystemFactory, open_desk: DeskFactory, stores: Stores
) -> None:
    # The line belongs to the state's signature, so that two processes never judge by different ones.
    judged_so = Settings(redis_url=stores.redis_url, database_url=stores.database_url, restore_at="maintenance")
    await asyncio.to_thread(reconcile.migrate, judged_so, stores)
    desk = await open_desk(restore_at="maintenance")
    await system(api_workers=0, restore_at="maintenance")
    await desk.mark("50000")
    for name, balance in (("richer", "10000.40000001"), ("at-the-line", "10000.4"), ("poorer", "10000.39999999")):
        await desk.deposit(name, balance)
        await desk.buy(name, "1", "50000")

    async def states() -> list[str]:
        return [str((await desk.account(name))["state"]) for name in ("richer", "at-the-line", "poorer")]

    await desk.sweep("44443")
    assert await states() == ["candidate"] * 3
    await desk.sweep("44444")
    assert await states() == ["ok", "ok", "candidate"]
    assert (await desk.account("poorer"))["open_breach"]["restored_at_equity"] == "4444.4"
    await desk.deposit("poorer", "0.00000001")
    assert await states() == ["ok", "ok", "ok"]
    assert len(await desk.rows("recoveries")) == 3
