"""``plimsoll verify`` finds each way in which Redis and history can part, and names the account it happened to."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import asyncpg
import pytest
import redis.asyncio

from app.embedded import Stores
from tests.conftest import SystemFactory
from tests.integration.desk import BTC_PERP, Desk, command, differences


@dataclass(frozen=True)
class Tamperer:
    """Someone with both stores in his hands, the superuser's rights among them, and something against Carol."""

    redis: redis.asyncio.Redis
    postgres: asyncpg.Connection

    async def edit_position(self, name: str, text: str) -> None:
        """Change one member of the position."""
        position = json.loads(await self.redis.hget("positions:carol", BTC_PERP) or "")
        await self.redis.hset("positions:carol", BTC_PERP, json.dumps({**position, name: text}))

    async def pack(self, column: str, units: int) -> None:
        """Change her value in a column of the packed copy."""
        slot = (await self.redis.lrange("accounts", 0, -1)).index("carol")
        await command(self.redis, "SETRANGE", column, 8 * slot, struct.pack("<q", units))

    async def rewrite_history(self, statement: str) -> None:
        """Run a statement with the triggers that keep history immutable off."""
        tables = ("trades", "transfers", "liquidations", "recoveries", "adjustments")
        for table in tables:
            await self.postgres.execute(f"ALTER TABLE {table} DISABLE TRIGGER immutable")
        await self.postgres.execute(statement)
        for table in tables:
            await self.postgres.execute(f"ALTER TABLE {table} ENABLE TRIGGER immutable")


async def balance_by_one_digit(by: Tamperer) -> None:
    await by.redis.set("account:carol:balance", "9999.99999999")


async def balance_by_one_digit_behind_its_columns_too(by: Tamperer) -> None:
    await by.redis.set("account:carol:balance", "9999.99999999")
    await by.pack("columns:balance", 999_999_999_999)


async def packed_balance_alone(by: Tamperer) -> None:
    await by.pack("columns:balance", 999_999_999_999)


async def average_price(by: Tamperer) -> None:
    await by.edit_position("avg_price", "25000.00333334")


async def cost_behind_its_column_too(by: Tamperer) -> None:
    await by.edit_position("cost", "37500.00500001")
    await by.pack(f"columns:{BTC_PERP}:cost", 3_750_000_500_001)


async def quantity_behind_its_column_too(by: Tamperer) -> None:
    await by.edit_position("quantity", "1.499999")
    await by.pack(f"columns:{BTC_PERP}:quantity", 149_999_900)


async def position_gone_in_redis(by: Tamperer) -> None:
    await by.redis.delete("positions:carol")


async def account_gone_in_redis(by: Tamperer) -> None:
    await by.redis.delete(
        "positions:carol", *(f"account:carol:{name}" for name in ("balance", "equity", "used_margin", "ledger"))
    )


async def balance_key_gone_in_redis(by: Tamperer) -> None:
    await by.redis.delete("account:carol:balance")


async def balance_that_is_no_number(by: Tamperer) -> None:
    await by.redis.set("account:carol:balance", "NaN")


async def first_row_missing(by: Tamperer) -> None:
    await by.rewrite_history("DELETE FROM transfers WHERE account_id = 'carol' AND seq = 1")


async def row_in_the_middle_missing(by: Tamperer) -> None:
    await by.rewrite_history("DELETE FROM trades WHERE account_id = 'carol' AND seq = 2")


async def last_row_missing(by: Tamperer) -> None:
    await by.rewrite_history("DELETE FROM trades WHERE account_id = 'carol' AND seq = 3")


async def row_doubled(by: Tamperer) -> None:
    await by.postgres.execute("ALTER TABLE trades DROP CONSTRAINT uq_trades_account_id_seq")
    await by.rewrite_history(copy_of_a_trade(seq="seq"))


async def row_doubled_with_a_number_of_its_own(by: Tamperer) -> None:
    await by.rewrite_history(copy_of_a_trade(seq="seq + 1"))


async def row_with_another_price(by: Tamperer) -> None:
    await by.rewrite_history("UPDATE trades SET price = price + 0.01 WHERE account_id = 'carol' AND seq = 3")


async def open_breach_forgotten(by: Tamperer) -> None:
    await by.redis.hset("account:carol:ledger", "breach", "1")


def copy_of_a_trade(*, seq: str) -> str:
    """The statements that insert Carol's last trade again under an id of its own."""
    return (
        "CREATE TEMPORARY TABLE again AS SELECT * FROM trades WHERE account_id = 'carol' AND seq = 3; "
        f"UPDATE again SET id = id + 1000, seq = {seq}; "
        "INSERT INTO trades SELECT * FROM again"
    )


TAMPERINGS: tuple[Callable[[Tamperer], Awaitable[None]], ...] = (
    balance_by_one_digit,
    balance_by_one_digit_behind_its_columns_too,
    packed_balance_alone,
    average_price,
    cost_behind_its_column_too,
    quantity_behind_its_column_too,
    position_gone_in_redis,
    account_gone_in_redis,
    balance_key_gone_in_redis,
    balance_that_is_no_number,
    first_row_missing,
    row_in_the_middle_missing,
    last_row_missing,
    row_doubled,
    row_doubled_with_a_number_of_its_own,
    row_with_another_price,
    open_breach_forgotten,
)


@pytest.fixture
async def three_accounts(desk: Desk) -> Desk:
    """Bob, Carol and Dora, each with a deposit of 10,000 and two trades that left 1.5 BTC at a cost of 37,500.005."""
    await desk.mark("25000")
    for account in ("bob", "carol", "dora"):
        await desk.deposit(account, "10000")
        await desk.buy(account, "1", "25000")
        await desk.buy(account, "0.5", "25000.01")
    return desk


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let verify look again at once: nothing moves here but what the test moves."""
    monkeypatch.setattr("app.verify.RETRY_SECONDS", 0.01)


@pytest.mark.parametrize("tampering", TAMPERINGS, ids=lambda tampering: tampering.__name__)
async def test_verify_names_the_account_that_was_tampered_with_and_no_other(
    three_accounts: Desk,
    impatient: None,
    redis_client: redis.asyncio.Redis,
    postgres: asyncpg.Connection,
    stores: Stores,
    tampering: Callable[[Tamperer], Awaitable[None]],
) -> None:
    assert await differences(stores) == []
    await tampering(Tamperer(redis_client, postgres))
    found = await differences(stores)
    assert {difference.split(":")[0] for difference in found} == {"carol"}, found


async def test_an_account_made_by_hand_that_no_watchdog_has_adopted_yet_differs(
    three_accounts: Desk, impatient: None, redis_client: redis.asyncio.Redis, stores: Stores
) -> None:
    await redis_client.set("account:by-hand:balance", "10000")
    assert {difference.split(":")[0] for difference in await differences(stores)} == {"by-hand"}


async def test_the_command_exits_0_when_all_agrees_and_1_with_the_account_named_when_not(
    three_accounts: Desk, redis_client: redis.asyncio.Redis, postgres: asyncpg.Connection, system: SystemFactory
) -> None:
    running = await system(api_workers=0, watchdogs=0)
    agreed = running.command("verify")
    assert (agreed.returncode, agreed.stdout) == (0, "3 accounts and 9 rows agree\n"), agreed.stderr
    await balance_by_one_digit_behind_its_columns_too(Tamperer(redis_client, postgres))
    found = running.command("verify")
    assert found.returncode == 1
    assert "carol: balance is 9999.99999999 in Redis, history makes it 10000" in found.stdout.splitlines()


async def test_verify_waits_for_an_account_that_trades_meanwhile(three_accounts: Desk, stores: Stores) -> None:
    """What moves between the two reads is looked at again, and is no difference."""

    async def trade() -> None:
        for _ in range(20):
            await three_accounts.buy("carol", "0.000001", "25000")
            await asyncio.sleep(0.02)

    found, _ = await asyncio.gather(differences(stores), trade())
    assert found == []
