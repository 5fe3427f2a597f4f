"""``plimsoll`` with keys and without: what refuses to start, and what its commands do with them."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import asyncpg
import httpx
import pytest
from typer.testing import CliRunner, Result

from app.api_keys import SCOPES
from app.cli import app
from app.config import get_settings
from app.embedded import Stores
from tests.conftest import SystemFactory
from tests.harness import environment
from tests.integration.desk import bearer, eventually

SECRET: Final = re.compile("plimsoll_[0-9a-f]{12}_[0-9a-f]")
EVERY_SCOPE: Final = [word for scope in SCOPES for word in ("--scope", scope)]
MOMENT: Final = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00"
REFRESH_SECONDS = 0.5
BARS = """timestamp,open,high,low,close,volume
2022-01-01 00:00:00,60000,60000,60000,60000,1
2022-01-01 00:01:00,60000,60100,59900,60050,1
"""

Command = Callable[..., Result]


@pytest.mark.parametrize("command", ["api", "watchdog", "up"])
def test_without_keys_nothing_starts_beyond_loopback(command: str, data_dir: Path) -> None:
    host = "0.0.0.0"
    variable = "PLIMSOLL_WATCHDOG_HOST" if command == "watchdog" else "PLIMSOLL_API_HOST"
    words = ["-m", "watchdog"] if command == "watchdog" else ["-m", "app.cli", command]
    refused = subprocess.run(
        [sys.executable, *words],
        check=False,
        capture_output=True,
        text=True,
        env=environment(
            {variable: host, "PLIMSOLL_DATA_DIR": str(data_dir), "PLIMSOLL_REDIS_URL": "redis://127.0.0.1:1"}
        ),
        timeout=60,
    )
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert f"{variable}={host}" in line
    assert "PLIMSOLL_AUTH=on" in line
    assert "PLIMSOLL_ALLOW_KEYLESS=1" in line
    assert list(data_dir.iterdir()) == []


@pytest.fixture
def run(stores: Stores, tmp_path: Path) -> Command:
    """Run a command of ``plimsoll`` in this process, on the test's stores."""

    def run_one(*words: str, code: int = 0, **settings: str) -> Result:
        variables = {"redis_url": stores.redis_url, "database_url": stores.database_url, "data_dir": str(tmp_path)}
        get_settings.cache_clear()
        done = CliRunner().invoke(
            app, words, env={f"PLIMSOLL_{name.upper()}": value for name, value in {**variables, **settings}.items()}
        )
        get_settings.cache_clear()
        assert done.exit_code == code, done.output
        return done

    return run_one


def test_a_key_is_shown_once_listed_without_its_secret_and_revoked_for_good(run: Command) -> None:
    made = run("keys", "create", "--name", "desk 7", "--scope", "read", "--scope", "trade", "--account", "desk7-*")
    key = made.stdout.strip()
    _, key_id, secret = key.split("_")
    assert (len(key_id), len(secret)) == (12, 64)
    assert secret not in made.stderr
    assert re.search(
        rf"^{key_id}  read,trade  desk7-\* +{MOMENT}  - +desk 7$", run("keys", "list").stdout, re.MULTILINE
    )
    assert f"key {key_id} is revoked; refused everywhere within 2 s" in run("keys", "revoke", key_id).stdout
    run("keys", "revoke", key_id)
    listed = run("keys", "list").stdout
    assert re.search(rf"^{key_id}  read,trade  desk7-\* +{MOMENT}  {MOMENT}  desk 7$", listed, re.MULTILINE)
    assert secret not in listed
    assert run("keys", "revoke", "000000000000", code=1).stderr == "plimsoll: there is no key 000000000000\n"
    assert "whose trades" in run("keys", "create", "--name", "x", "--scope", "trade", code=1).stderr


async def test_the_commands_halt_and_resume_on_record(
    run: Command, stores: Stores, postgres: asyncpg.Connection
) -> None:
    for _ in range(2):
        assert "trading is halted since" in (await asyncio.to_thread(run, "halt", "--reason", "a test")).stdout
    assert (await asyncio.to_thread(run, "resume", "--reason", "over")).stdout == "trading goes on\n"
    await asyncio.to_thread(run, "resume", "--reason", "over")
    refused = await asyncio.to_thread(run, "halt", "--reason", "two\nlines", code=1)
    assert "a reason has 1 to 200 characters" in refused.stderr
    for table, reason in (("halts", "a test"), ("resumptions", "over")):
        rows = await postgres.fetch(f"SELECT reason, key_id FROM {table}")
        assert [tuple(row) for row in rows] == [(reason, None)]


async def ask(method: str, url: str, **options: Any) -> httpx.Response:  # noqa: ANN401 - httpx's
    """Ask on a connection of its own: any of the workers answers."""
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.request(method, url, **options)


async def test_processes_that_ask_for_keys(system: SystemFactory, run: Command, tmp_path: Path) -> None:
    running = await system(api_workers=2, auth="on", keys_refresh_seconds=str(REFRESH_SECONDS), log_level="debug")
    url, page = running.apis[0].url, f"{running.watchdogs[0].url}/metrics"
    key = (
        await asyncio.to_thread(run, "keys", "create", "--name", "me", *EVERY_SCOPE, "--account", "*")
    ).stdout.strip()

    # The watchdog's metrics take a key as well; that of a halt is where an alert looks for it.
    refused = await ask("GET", page)
    assert (refused.status_code, refused.json()["code"]) == (401, "key_required")
    assert refused.headers["WWW-Authenticate"].startswith("Bearer ")
    for act, shown in (("halt", 1), ("resume", 0)):
        answer = await ask("POST", f"{url}/{act}", json={"reason": "a test"}, headers=bearer(key))
        assert answer.status_code == 200
        assert f"\nplimsoll_halted {shown}.0\n" in (await ask("GET", page, headers=bearer(key))).text

    # The replay takes a key, by its option or its variable, and says so.
    bars = tmp_path / "bars.csv"
    bars.write_text(BARS)
    play = ("replay", str(bars), "--accounts", "2", "--api", url)
    assert "--key" in (await asyncio.to_thread(run, *play, code=1)).stderr
    assert "Replay" in (await asyncio.to_thread(run, *play, "--key", key)).stdout
    await asyncio.to_thread(run, *play, api_key=key)

    # Both workers refuse a revoked key.
    key_id = key.split("_")[1]
    await asyncio.to_thread(run, "keys", "revoke", key_id)

    async def is_refused_by_all() -> bool:
        answers = [await ask("GET", f"{url}/trades", headers=bearer(key)) for _ in range(8)]
        return {answer.status_code for answer in answers} == {401}

    await eventually(is_refused_by_all, "all workers to refuse the key")
    await running.stop()
    logs = "".join(process.log.read_text() for process in (*running.apis, *running.watchdogs))
    assert key_id in logs
    assert key[-64:] not in logs
    assert not SECRET.search(logs)
