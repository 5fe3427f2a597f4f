"""Secrets are read from files, and never come out again: in no log, answer, metric, error, command line or schema."""

from __future__ import annotations

import asyncio
import os
import pty
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

import httpx
import psycopg2
import pytest
import redis.asyncio
from pydantic import ValidationError
from pydantic_settings import SettingsError

from app import reconcile
from app.booking import Booking
from app.config import Settings
from app.embedded import Servers, Stores
from tests.harness import Process, System
from tests.integration.desk import Desk, api_in_this_process, bearer, new_key

REDIS_CANARY: Final = "canary-redis-9f2c"
POSTGRES_CANARY: Final = "canary-postgres-51be"
WRONG_CANARY: Final = "canary-wrong-77aa"
CANARIES: Final = (REDIS_CANARY, POSTGRES_CANARY, WRONG_CANARY)


@pytest.fixture
async def guarded(own_servers: Servers) -> AsyncIterator[Stores]:
    """Stores that ask for passwords. The owner still needs none."""
    stores = own_servers.stores
    await asyncio.to_thread(reconcile.migrate, Settings(), stores)
    with closing(psycopg2.connect(stores.owner_url)) as connection, connection, connection.cursor() as cursor:
        cursor.execute("ALTER ROLE plimsoll PASSWORD %s", (POSTGRES_CANARY,))
    rules = own_servers.postgres.directory / "pg_hba.conf"
    rules.write_text("local all plimsoll scram-sha-256\nlocal all all trust\n")
    with closing(psycopg2.connect(stores.owner_url)) as connection, connection, connection.cursor() as cursor:
        cursor.execute("SELECT pg_reload_conf()")
    async with redis.asyncio.Redis.from_url(stores.redis_url) as client:
        await client.config_set("requirepass", REDIS_CANARY)
        yield Stores(
            f"{stores.redis_url}&password={REDIS_CANARY}",
            stores.database_url.replace("plimsoll@", f"plimsoll:{POSTGRES_CANARY}@"),
            stores.migrations_url,
        )
        with suppress(redis.ConnectionError):
            await client.config_set("requirepass", "")


def environment_of(pid: int) -> str:
    return Path(f"/proc/{pid}/environ").read_text(errors="replace")


async def test_a_secret_appears_in_no_log_answer_metric_error_or_schema(
    guarded: Stores, own_servers: Servers, tmp_path: Path
) -> None:
    redis_file, database_file = tmp_path / "redis-url", tmp_path / "database-url"
    redis_file.write_text(guarded.redis_url + "\n")
    database_file.write_text(guarded.database_url + "\n")
    nameless = Stores("", "", guarded.migrations_url)
    by_file = {"redis_url_file": str(redis_file), "database_url_file": str(database_file), "log_level": "debug"}
    running = FileSystem(nameless, tmp_path, {**by_file, "auth": "on"})
    key = await new_key(guarded, "read", "trade", "mark", "operate")
    secret = key.rpartition("_")[2]
    heard: list[str] = []

    def hear(answer: httpx.Response) -> None:
        heard.append(f"{answer.status_code} {answer.headers} {answer.text}")

    try:
        watchdog, api = await running.start_watchdog(), await running.start_api()
        client = running.client
        headers = bearer(key)
        desk = Desk(httpx.AsyncClient(base_url=api.url, headers=headers, trust_env=False, timeout=15))
        await desk.mark("45000")
        await desk.deposit("alice", "10000")
        await desk.buy("alice", "1", "45000")
        await desk.sweep("37000")

        async def ask_everything() -> None:
            for url in (api.url, watchdog.url):
                for path in ("/metrics", "/health/ready", "/health/live"):
                    hear(await client.get(f"{url}{path}", headers=headers))
            for path in ("/openapi.json", "/margin-report", "/positions/alice", "/trades", "/nowhere", "/docs"):
                hear(await client.get(path, headers=headers))
            hear(await client.get("/margin-report", headers=bearer(WRONG_CANARY)))
            hear(await client.get("/margin-report", headers=bearer(f"plimsoll_{'0' * 12}_{secret}")))
            hear(await client.post("/trade", headers=headers, content=b"{"))
            hear(await client.post("/trade", headers=headers, json={"account_id": "alice"}))
            hear(await client.post("/mark-price", headers=headers, json={"symbol": "BTC-PERP", "price": "NaN"}))
            hear(await client.post("/accounts/alice/deposit", headers=headers, json={"amount": "1"}))

        await ask_everything()
        for process in (api, watchdog):
            assert not any(canary in environment_of(process.pid) for canary in CANARIES)
        # With the stores down, one after the other.
        await asyncio.to_thread(own_servers.postgres.stop)
        await ask_everything()
        await asyncio.to_thread(own_servers.redis.stop)
        await ask_everything()
        for command in ("verify", "doctor", "migrate"):
            told = await asyncio.to_thread(running.command, command)
            assert told.returncode == 1, told.stdout
            heard += [told.stdout, told.stderr]
        await desk.client.aclose()
    finally:
        await running.stop()
    for process in (api, watchdog):
        heard.append(process.log.read_text())
    everything = "\n".join(heard)
    assert everything.count("HELP plimsoll_") > 20, "the metrics were not read"
    assert "redis" in everything
    assert "postgres" in everything
    for canary in (*CANARIES, secret):
        assert canary not in everything, everything[max(0, everything.find(canary) - 500) :][:1000]


class FileSystem(System):
    """A system whose processes get their addresses by file alone."""

    def environment(self, **more: str) -> dict[str, str]:
        """Without the variables that would win over the files."""
        found = super().environment(**more)
        return {name: value for name, value in found.items() if name not in {f"PLIMSOLL_{kind}_URL" for kind in KINDS}}


KINDS: Final = ("REDIS", "DATABASE")


async def test_a_wrong_password_is_not_quoted(guarded: Stores, tmp_path: Path) -> None:
    wrong = Stores(
        guarded.redis_url.replace(REDIS_CANARY, WRONG_CANARY),
        guarded.database_url.replace(POSTGRES_CANARY, WRONG_CANARY),
        guarded.migrations_url,
    )
    running = System(wrong, tmp_path, {"log_level": "debug"})
    processes = [await running.start_api(wait=False), await running.start_watchdog(wait=False)]
    said = []
    for command in ("migrate", "verify", "doctor"):
        told = await asyncio.to_thread(running.command, command)
        assert told.returncode == 1
        assert "password" in told.stdout + told.stderr
        said += [told.stdout, told.stderr]
    for process in processes:
        answer = await _first_answer(process)
        assert answer.status_code == 503
        said.append(answer.text)
    await running.stop()
    said += [process.log.read_text() for process in processes]
    assert not [canary for canary in CANARIES if canary in "".join(said)], said


async def _first_answer(process: Process) -> httpx.Response:
    """What ``/health/ready`` says once the process is up."""
    async with httpx.AsyncClient(base_url=process.url, trust_env=False) as client:
        while True:
            try:
                return await client.get("/health/ready")
            except httpx.TransportError:
                assert process.returncode is None, process.log.read_text()
                await asyncio.sleep(0.05)


async def test_our_own_mistake_is_logged_without_the_variables_around_it(
    stores: Stores, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> None:
        password = WRONG_CANARY
        raise RuntimeError(f"a mistake of {len(password)} letters")

    monkeypatch.setattr(Booking, "book_transfer", fail)
    async with api_in_this_process(stores, raise_app_exceptions=False) as client:
        answer = await client.post("/accounts/alice/deposit", json={"amount": "1"})
    assert answer.status_code == 500
    assert WRONG_CANARY not in answer.text + "".join(capsys.readouterr())


def test_a_traceback_on_a_terminal_shows_no_variables() -> None:
    master, terminal = pty.openpty()
    program = (
        "import structlog; from app.logging import configure_logging\n"
        "configure_logging('info', process='api')\n"
        f"def fail(password): raise RuntimeError('a mistake')\n"
        f"try: fail(''.join({list(WRONG_CANARY)!r}))\n"
        "except RuntimeError: structlog.get_logger().exception('it failed')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stderr=terminal, env={**os.environ, "TERM": "xterm"})
    os.close(terminal)
    shown = os.read(master, 65536).decode()
    os.close(master)
    assert "a mistake" in shown
    assert WRONG_CANARY not in shown


def test_any_setting_may_come_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"redis_url": "redis://x", "api_port": "9000", "contracts": '[{"symbol": "ETH-PERP"}]', "api_key": "k"}
    for name, content in files.items():
        (tmp_path / name).write_text(f"{content}\n")
        monkeypatch.setenv(f"PLIMSOLL_{name.upper()}_FILE", str(tmp_path / name))
    settings = Settings()
    assert settings.redis_url == "redis://x"
    assert settings.api_port == 9000
    assert settings.contracts[0].symbol == "ETH-PERP"
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "k"


def test_a_setting_and_its_file_do_not_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "url").write_text(f"redis://:{WRONG_CANARY}@x")
    monkeypatch.setenv("PLIMSOLL_REDIS_URL", f"redis://:{WRONG_CANARY}@x")
    monkeypatch.setenv("PLIMSOLL_REDIS_URL_FILE", str(tmp_path / "url"))
    with pytest.raises(SettingsError, match="PLIMSOLL_REDIS_URL and PLIMSOLL_REDIS_URL_FILE are both set") as refused:
        Settings()
    assert WRONG_CANARY not in str(refused.value)


def test_a_file_that_is_not_there_stops_the_start_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLIMSOLL_DATABASE_URL_FILE", str(tmp_path / "nothing"))
    with pytest.raises(SettingsError, match=r"PLIMSOLL_DATABASE_URL_FILE: .*nothing: No such file"):
        Settings()


def test_settings_and_stores_keep_addresses_out_of_their_text_and_refused_values_out_of_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("REDIS_URL", "DATABASE_URL", "MIGRATIONS_URL", "API_KEY"):
        monkeypatch.setenv(f"PLIMSOLL_{name}", f"redis://:{WRONG_CANARY}@x")
    assert WRONG_CANARY not in repr(Settings()) + str(Settings())
    assert WRONG_CANARY not in repr(Stores(WRONG_CANARY, WRONG_CANARY, WRONG_CANARY))
    monkeypatch.setenv("PLIMSOLL_API_PORT", WRONG_CANARY)
    with pytest.raises(ValidationError) as refused:
        Settings()
    assert WRONG_CANARY not in str(refused.value)
