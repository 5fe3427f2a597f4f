"""``plimsoll up``: Redis, Postgres, migrations, API, watchdog and demo on one machine, watched until Ctrl-C."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import signal
import socket
import sys
from collections.abc import Awaitable
from datetime import UTC, datetime
from typing import Final

import httpx
import typer

from app.api_keys import SCOPES, replace_key, with_engine
from app.config import Settings
from app.embedded import Servers, claim, start_servers
from app.logging import configure_logging
from app.security import require_keys_beyond_loopback
from app.server_process import EmbeddedServerError
from app.supervisor import LIVE_TIMEOUT_SECONDS, Child, say, stop_left_over

STORE_INTERVAL_SECONDS: Final = 1.0
BACKOFF_SECONDS_MAX: Final = 30.0
NOT_INHERITED: Final = (
    *("PLIMSOLL_REDIS_URL_FILE", "PLIMSOLL_DATABASE_URL_FILE"),
    *("PLIMSOLL_MIGRATIONS_URL", "PLIMSOLL_MIGRATIONS_URL_FILE"),
)
"""What the API and the watchdog are not started with: they use the embedded servers, and never as the owner."""

DEMO_KEY: Final = "demo of plimsoll up"
"""The name of the demo's API key. It is kept in memory alone; the next demo revokes it."""


class PortInUse(EmbeddedServerError):
    """Something else listens where the API or the watchdog would."""


def up(settings: Settings, *, demo: bool) -> None:
    """Run everything until Ctrl-C or SIGTERM. Raises ``EmbeddedServerError`` with what to do about it."""
    from app.reconcile import migrate  # noqa: PLC0415 - after the ports are known to be free

    require_keys_beyond_loopback(settings, host=settings.api_host, variable="PLIMSOLL_API_HOST")
    require_keys_beyond_loopback(settings, host=settings.watchdog_host, variable="PLIMSOLL_WATCHDOG_HOST")
    signal.signal(signal.SIGTERM, _interrupt)
    configure_logging(settings.log_level, process="up")
    # It would tell of every live check and every request of the demo.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    data_dir = settings.data_dir.resolve()
    claimed = claim(data_dir)
    stop_left_over(data_dir)
    api_port = _free_port(settings.api_host, settings.api_port, "API", "PLIMSOLL_API_PORT")
    watchdog_port = _free_port(settings.watchdog_host, settings.watchdog_port, "watchdog", "PLIMSOLL_WATCHDOG_PORT")
    settings = settings.model_copy(
        update={"data_dir": data_dir, "api_port": api_port, "watchdog_port": watchdog_port},
    )
    servers = start_servers(data_dir, settings.redis_server, claimed=claimed)
    try:
        say(f"Redis {servers.redis.version} and Postgres {servers.postgres.version} run, data in {data_dir}")
        settings = settings.model_copy(
            update={"redis_url": servers.stores.redis_url, "database_url": servers.stores.database_url},
        )
        migrate(settings, servers.stores)
        asyncio.run(_run(settings, servers, demo=demo))
    finally:
        # Stopping is bounded in time; a second Ctrl-C must not cut it in half.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        servers.stop(say)


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _free_port(host: str, port: int, name: str, variable: str) -> int:
    """``port`` if nothing listens on it, or a free one for 0. Raises :class:`PortInUse`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortInUse(
                f"The {name} cannot listen on {host}:{port} ({error.strerror}). Stop what does, or set {variable} to "
                "another port."
            ) from error
        return int(probe.getsockname()[1])


def base_url(host: str, port: int) -> str:
    """Where a process of this machine reaches a server that listens on ``host``."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


async def _run(settings: Settings, servers: Servers, *, demo: bool) -> None:
    """Start API, watchdog and demo, and look after them until a signal comes."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    api_url = base_url(settings.api_host, settings.api_port)
    watchdog_url = base_url(settings.watchdog_host, settings.watchdog_port)
    inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    environment = inherited | {
        "PLIMSOLL_REDIS_URL": servers.stores.redis_url,
        "PLIMSOLL_DATABASE_URL": servers.stores.database_url,
        "PLIMSOLL_DATA_DIR": str(settings.data_dir),
        "PLIMSOLL_API_PORT": str(settings.api_port),
        "PLIMSOLL_WATCHDOG_PORT": str(settings.watchdog_port),
    }
    api = Child("api", [sys.executable, "-m", "app.cli", "api"], environment, api_url, settings.data_dir)
    watchdog = Child("watchdog", [sys.executable, "-m", "watchdog"], environment, watchdog_url, settings.data_dir)
    tasks: list[asyncio.Task[None]] = []
    async with httpx.AsyncClient(timeout=LIVE_TIMEOUT_SECONDS, trust_env=False) as client:
        try:
            await asyncio.gather(api.start(), watchdog.start())
            if await _unless_stopped(stopped, _all_ready(client, api, watchdog)):
                _welcome(servers, api_url, watchdog_url, settings)
                tasks = [asyncio.create_task(child.keep_running(client)) for child in (api, watchdog)]
                tasks.append(asyncio.create_task(_keep_servers(servers)))
                if demo and settings.demo == "on":
                    tasks.append(asyncio.create_task(_run_demo(api_url, settings, servers), name="demo"))
                await _first_failure(stopped, tasks)
        finally:
            for task in reversed(tasks):
                running = not task.done()
                task.cancel()
                await asyncio.wait([task])
                if running and task.get_name() == "demo":
                    say("stopped the demo")
            for child in (api, watchdog):
                if await child.stop():
                    say(f"stopped the {child.name}")


async def _all_ready(client: httpx.AsyncClient, *children: Child) -> None:
    async with asyncio.TaskGroup() as group:
        for child in children:
            group.create_task(child.wait_until_ready(client))


async def _unless_stopped(stopped: asyncio.Event, work: Awaitable[None]) -> bool:
    """Do ``work``, or leave it when the signal comes first; whether it was done."""
    signalled = asyncio.create_task(stopped.wait())
    working = asyncio.ensure_future(work)
    done, _pending = await asyncio.wait({signalled, working}, return_when=asyncio.FIRST_COMPLETED)
    signalled.cancel()
    working.cancel()
    if working not in done:
        return False
    failure = working.exception()
    if isinstance(failure, BaseExceptionGroup):
        raise failure.exceptions[0]
    if failure is not None:
        raise failure
    return True


async def _first_failure(stopped: asyncio.Event, tasks: list[asyncio.Task[None]]) -> None:
    """Wait for the signal; a task that fails on the way is our mistake and ends it all."""
    signalled = asyncio.create_task(stopped.wait())
    pending: set[asyncio.Task[None]] = set(tasks)
    while not signalled.done():
        done, _pending = await asyncio.wait({signalled, *pending}, return_when=asyncio.FIRST_COMPLETED)
        for task in done & pending:
            pending.discard(task)
            task.result()


async def _run_demo(api_url: str, settings: Settings, servers: Servers) -> None:
    from app.demo import run_demo  # noqa: PLC0415 - only where the demo runs

    api_key = None
    if settings.auth == "on":
        # It looks at the whole report to find out whether it is alone, so its key reaches every account.
        api_key = await with_engine(
            servers.stores.database_url,
            lambda engine: replace_key(engine, name=DEMO_KEY, scopes=SCOPES, accounts=["*"], now=datetime.now(UTC)),
        )
    await run_demo(api_url, state_file=settings.data_dir / "demo.json", api_key=api_key)


async def _keep_servers(servers: Servers) -> None:
    """Start an embedded server again that has exited, as Redis does when it cannot write its file."""
    backoff_seconds = STORE_INTERVAL_SECONDS
    while True:
        await asyncio.sleep(backoff_seconds)
        try:
            restarted = await asyncio.to_thread(servers.restart_dead)
        except EmbeddedServerError as error:
            say(str(error))
            backoff_seconds = min(2 * backoff_seconds, BACKOFF_SECONDS_MAX)
        else:
            backoff_seconds = STORE_INTERVAL_SECONDS
            for name in restarted:
                say(f"{name} had exited and was started again")


def _welcome(servers: Servers, api_url: str, watchdog_url: str, settings: Settings) -> None:
    """What runs where, and lines to paste."""
    key = """ -H "Authorization: Bearer $PLIMSOLL_API_KEY\"""" if settings.auth == "on" else ""
    deposit = ["curl", "-s", f"{api_url}/accounts/alice/deposit"]
    deposit += ["-H", "content-type: application/json", "-d", '{"amount": "10000"}']
    keys = "a key      plimsoll keys create --name me --scope read --scope operate\n  " if key else ""
    typer.echo(
        f"""
Plimsoll is up.

  API        {api_url}
  docs       {api_url}/docs
  metrics    {api_url}/metrics and {watchdog_url}/metrics

  {keys}deposit    {shlex.join(deposit)}{key}
  report     curl -s {api_url}/margin-report{key}
  Redis      {servers.redis_cli_line}
  Postgres   {servers.psql_line}

Ctrl-C stops everything; the state stays in {settings.data_dir}.
"""
    )
