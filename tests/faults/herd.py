"""A herd of accounts that one mark breaches and another restores, and one account that trades all the time."""

from __future__ import annotations

import asyncio
from random import Random
from typing import Final

from tests.faults.cell import Cell, until
from tests.faults.journal import Operation, Row
from tests.faults.load import SYMBOL, Load

HERD: Final = 40
LOW: Final = 43_000
"""11,000 + 1 x (43,000 - 50,000) = 4,000 is below 10 % of 43,000."""
HIGH: Final = 50_000
"""11,000 is not below 20 % of 50,000."""


class Busy(Load):
    """Three clients on one account, long 1 coin, that reduce while it is low and buy back while it is high."""

    def __init__(self, cell: Cell, seed: int) -> None:
        super().__init__(cell, seed=seed, clients=3, accounts=1, name="busy")
        self.is_low = False

    def _next(self, random: Random, account: str) -> Operation:
        price = LOW if self.is_low else HIGH
        return self.trade(account, "sell" if self.is_low else "buy", "0.000001", price)

    def trade(self, account: str, side: str, quantity: str, price: int) -> Operation:
        """A trade at ``price``."""
        body = {"account_id": account, "symbol": SYMBOL, "side": side, "quantity": quantity, "price": str(price)}
        return self.new("trade", account, body)

    async def _market_maker(self, random: Random) -> None:
        """The herd sets the marks."""


class Herd(Load):
    """Accounts in the same position; ``flip`` moves the mark and every one of them across its line."""

    def __init__(self, cell: Cell, seed: int) -> None:
        super().__init__(cell, seed=seed, clients=0, accounts=HERD, name="herd")
        self.flips = 0
        self._busy: Busy | None = None

    async def start(self, busy: Busy | None = None) -> None:
        """Fund the herd and the busy account, buy one coin each, and let the busy one trade."""
        assert busy is not None
        self._busy = busy
        await self.set_mark(HIGH)
        for account in [*self.accounts, *busy.accounts]:
            owner = busy if account in busy.accounts else self
            await owner.send(owner.new("deposit", account, {"amount": "11000"}))
            await owner.send(busy.trade(account, "buy", "1", HIGH) if owner is busy else self._long(account))
        busy.begin()

    def _long(self, account: str) -> Operation:
        body = {"account_id": account, "symbol": SYMBOL, "side": "buy", "quantity": "1", "price": str(HIGH)}
        return self.new("trade", account, body)

    @property
    def expected(self) -> tuple[int, int]:
        """How many liquidations and recoveries there have to be."""
        accounts = len(self.accounts) + 1
        return (self.flips + 1) // 2 * accounts, self.flips // 2 * accounts

    async def flip(self) -> None:
        """Breach every account, or restore every one."""
        self.flips += 1
        low = self.flips % 2 == 1
        assert await self.set_mark(LOW if low else HIGH)
        assert self._busy is not None
        self._busy.is_low = low

    async def recorded(self) -> tuple[int, int]:
        """How many liquidations and recoveries Postgres has."""
        (found,) = await self.cell.postgres(
            "SELECT (SELECT count(*) FROM liquidations), (SELECT count(*) FROM recoveries)"
        )
        return int(found[0]), int(found[1])

    async def missing(self) -> int:
        """How many rows of the newest flip are not in Postgres."""
        return sum(self.expected) - sum(await self.recorded())

    async def settled(self) -> None:
        """Wait until every row of the newest flip is in Postgres."""
        await until(self._is_settled, "rows of breaches are missing", self.cell.logs)

    async def _is_settled(self) -> bool:
        liquidations, recoveries = await self.recorded()
        return liquidations >= self.expected[0] and recoveries >= self.expected[1]

    async def count(self, result: Row) -> None:
        """Each account has a row for each flip, and no more."""
        await asyncio.sleep(0.5)
        for table, expected in zip(("liquidations", "recoveries"), self.expected, strict=True):
            rows = await self.cell.postgres(f"SELECT account_id, count(*) FROM {table} GROUP BY account_id")
            share = expected // (len(self.accounts) + 1)
            counted = {str(account_id): int(number) for account_id, number in rows}
            for account in [*self.accounts, *(self._busy.accounts if self._busy else [])]:
                difference = counted.get(account, 0) - share
                if difference:
                    result.complain(f"{account} has {counted.get(account, 0)} {table}, not {share}")
                result.lost += max(0, -difference)
                result.doubled += max(0, difference)
