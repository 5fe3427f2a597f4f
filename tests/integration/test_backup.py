"""Backup and restore, as docs/operations.md says it: the commands of that page, on another Redis and Postgres."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

from app.embedded import Servers
from tests.conftest import SystemFactory
from tests.harness import System

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
BUY = {
    "account_id": "alice", "symbol": "BTC-PERP", "side": "buy", "quantity": "0.5", "price": "60000",
    "client_trade_id": "first",
}  # fmt: skip
FIGURES = ("balance", "equity", "used_margin", "positions", "open_breach", "state")


def commands(heading: str) -> str:
    """The shell lines under a heading."""
    section = OPERATIONS.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    (block,) = re.finditer(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return str(block[1])


def run(script: str, running: System, servers: Servers, directory: Path) -> str:
    """Run shell lines on the stores of ``running``; what they print."""
    path = [str(Path(sys.executable).parent), str(servers.postgres.programs), os.environ["PATH"]]
    variables = running.environment(migrations_url=running.stores.owner_url) | {"PATH": os.pathsep.join(path)}
    finished = subprocess.run(
        ["sh", "-euc", script], check=False, capture_output=True, text=True, env=variables, cwd=directory, timeout=60
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


async def test_a_backup_restored_elsewhere_is_the_same_state_and_history(
    system: SystemFactory, servers: Servers, own_servers: Servers, tmp_path: Path
) -> None:
    here = await system()
    await here.client.post("/accounts/alice/deposit", json={"amount": "10000"})
    await here.client.post("/mark-price", json={"symbol": "BTC-PERP", "price": "60000"})
    booked = (await here.client.post("/trade", json=BUY)).json()
    await here.client.post("/mark-price", json={"symbol": "BTC-PERP", "price": "44000"})
    async with asyncio.timeout(30):
        while not (await here.client.get("/liquidations")).json()["items"]:
            await asyncio.sleep(0.1)
    account = (await here.client.get("/positions/alice")).json()
    breaches = (await here.client.get("/liquidations")).json()["items"]
    await asyncio.to_thread(run, commands("Backup"), here, servers, tmp_path)

    there = System(own_servers.stores, tmp_path)
    printed = await asyncio.to_thread(run, commands("Restore"), there, own_servers, tmp_path)
    assert "rebuilt 1 accounts" in printed
    assert "1 accounts and 3 rows agree" in printed
    try:
        await there.start_api()
        await there.client.post("/mark-price", json={"symbol": "BTC-PERP", "price": "44000"})
        restored = (await there.client.get("/positions/alice")).json()
        assert {name: restored[name] for name in FIGURES} == {name: account[name] for name in FIGURES}
        assert account["state"] == "candidate"
        assert (await there.client.get("/liquidations")).json()["items"] == breaches
        again = await there.client.post("/trade", json=BUY)
        assert (again.status_code, again.json()["trade_id"]) == (200, booked["trade_id"])
    finally:
        await there.stop()
