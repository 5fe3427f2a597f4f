"""What the faults of the watchdog share: an account on the edge, a load that sets no marks, and sweeps counted."""

from __future__ import annotations

import asyncio
import time
from random import Random
from typing import Final

import httpx

from tests.faults.cell import Cell, until
from tests.faults.load import Load

MARK: Final = 50_000
BREACHING_MARK: Final = 41_000
"""0.9 BTC bought at 50,000 on 10,000 of cash is a candidate below 43,209.88."""


class SteadyLoad(Load):
    """Trades, deposits and withdrawals; the marks are the test's own, and so are the accounts in ``edges``."""

    def __init__(self, cell: Cell, *, seed: int, clients: int = 4, name: str = "load") -> None:
        super().__init__(cell, seed=seed, clients=clients, name=name)
        self.edges: list[str] = []

    async def stop(self) -> None:
        """As of any load; from here on its journal is about the edges too."""
        await super().stop()
        self.accounts += self.edges

    async def _market_maker(self, random: Random) -> None:
        """Set none."""


async def on_the_edge(load: SteadyLoad) -> str:
    """A new account that breaches at ``BREACHING_MARK``; its operations are in the journal."""
    account = f"{load.name}-edge-{len(load.edges)}"
    load.edges.append(account)
    deposit = load.new("deposit", account, {"amount": "10000"})
    await load.send(deposit)
    body = {"account_id": account, "symbol": "BTC-PERP", "side": "buy", "quantity": "0.9", "price": f"{MARK}"}
    bought = load.new("trade", account, body)
    await load.send(bought)
    assert (deposit.outcome, bought.outcome) == ("ok", "ok"), (deposit, bought)
    return account


async def recorded(cell: Cell, account: str) -> float:
    """Wait for the account's row in ``liquidations``; the seconds that took."""
    started = time.monotonic()

    async def is_recorded() -> bool:
        return bool(await cell.postgres("SELECT 1 FROM liquidations WHERE account_id = $1", account))

    await until(is_recorded, f"{account} has no liquidation", cell.logs)
    return time.monotonic() - started


async def sweeps(client: httpx.AsyncClient, url: str, sample: str = "plimsoll_sweeps_total{") -> float:
    """The sum of the samples that begin with ``sample``, of the watchdog at ``url``."""
    text = (await client.get(f"{url}/metrics")).text
    found = [line for line in text.splitlines() if line.startswith(sample)]
    return sum(float(line.rpartition(" ")[2]) for line in found)


async def longest_gap(client: httpx.AsyncClient, url: str, seconds: float) -> float:
    """The longest time without a successful sweep within so many seconds."""
    ended = time.monotonic() + seconds
    last, moved, gap = await _ok(client, url), time.monotonic(), 0.0
    while time.monotonic() < ended:
        await asyncio.sleep(0.02)
        count = await _ok(client, url)
        now = time.monotonic()
        gap = max(gap, now - moved)
        if count != last:
            last, moved = count, now
    return gap


async def _ok(client: httpx.AsyncClient, url: str) -> float:
    return await sweeps(client, url, "plimsoll_sweep_duration_seconds_count")
