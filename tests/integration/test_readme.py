"""The README's transcript and the operator's SQL, run as they stand against a running system."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis.asyncio

from tests.conftest import SystemFactory
from tests.harness import System

README = Path(__file__).parents[2] / "README.md"
OPERATIONS = README.parent / "docs" / "operations.md"
TIMES = re.compile(r'"\d{4}-\d\d-\d\dT[\d:.]+Z"')
DEADLINE_SECONDS = 5


def transcript() -> list[tuple[str, str]]:
    """Each command of the console blocks, with the output shown under it."""
    blocks = re.findall(r"^```console\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    shown = []
    for block in blocks:
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.replace("\\\n", " ").partition("\n")
            shown.append((command.strip(), output.strip()))
    return shown


def run(command: str, running: System) -> str:
    """What the command prints, with the ports of ``running`` in the place of the usual ones."""
    for usual, process in (("localhost:8000", running.apis[0]), ("localhost:8001", running.watchdogs[0])):
        command = command.replace(usual, process.url.removeprefix("http://"))
    finished = subprocess.run(  # noqa: S602  # a line of our own README, with its quotes
        command,
        shell=True,
        check=True,
        capture_output=True,
        text=True,
        timeout=10,
        env={name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
    )
    return finished.stdout


def has_parts_in_order(output: str, shown: str) -> bool:
    """Whether ``output`` is ``shown``, where ``…`` stands for anything; times and white space do not count."""
    plain_output, plain_shown = (re.sub(r"\s+", "", TIMES.sub('"TIME"', text)) for text in (output, shown))
    pattern = ".*".join(re.escape(part) for part in plain_shown.split("…"))
    return re.fullmatch(pattern, plain_output) is not None


async def assert_prints(command: str, shown: str, running: System) -> None:
    """A reader is slower than a sweep, so a command that reads may be asked again."""
    deadline = time.monotonic() + (DEADLINE_SECONDS if " -d " not in command else 0)
    while True:
        output = await asyncio.to_thread(run, command, running)
        if has_parts_in_order(output, shown):
            return
        assert time.monotonic() < deadline, f"{command}\nprints\n{output}\nand the README shows\n{shown}"
        await asyncio.sleep(0.1)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not on PATH")
async def test_the_transcript_is_what_a_new_system_prints_and_ends_in_a_liquidation_row(system: SystemFactory) -> None:
    running = await system()
    commands = transcript()
    assert len(commands) >= 5
    for command, shown in commands:
        await assert_prints(command, shown, running)
    last_command, last_output = commands[-1]
    assert "/liquidations" in last_command
    assert "is below maintenance margin" in last_output
    metric_shown = re.search(r"`(curl -s localhost:8001/metrics)` shows `([^`]+)`", README.read_text())
    assert metric_shown is not None
    assert metric_shown[2] in (await asyncio.to_thread(run, metric_shown[1], running)).splitlines()


async def test_the_operators_correction_of_a_row_in_the_dead_letters_lets_verify_agree_again(
    system: SystemFactory, redis_client: redis.asyncio.Redis, postgres: asyncpg.Connection
) -> None:
    running = await system(watchdogs=0)
    await running.client.post("/accounts/alice/deposit", json={"amount": "5"})
    await postgres.execute(
        "INSERT INTO transfers (id, account_id, seq, epoch, timestamp, mark_version, kind, amount, client_transfer_id, "
        "balance_after) VALUES (2, 'foreign', 1, 1, now(), 0, 'deposit', 1, 'x', 1)"
    )
    await running.client.post("/accounts/alice/deposit", json={"amount": "7"})
    letters: Any = await redis_client.xrange("outbox:dead", "-", "+")
    ((entry, dead),) = letters
    assert dead["kind"] == "transfer"
    assert (await asyncio.to_thread(running.command, "verify")).returncode == 1
    with pytest.raises(asyncpg.IntegrityConstraintViolationError, match="history is immutable"):
        await postgres.execute("DELETE FROM transfers WHERE id = 2")

    (correction,) = re.findall(r"^```sql\n(.*?)^```$", OPERATIONS.read_text(), re.MULTILINE | re.DOTALL)
    await postgres.execute(correction.replace("…the row…", dead["row"]))
    await redis_client.xdel("outbox:dead", entry)
    verified = await asyncio.to_thread(running.command, "verify")
    assert verified.returncode == 0, verified.stdout
