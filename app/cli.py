"""The command ``plimsoll``."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from app.config import Settings
    from app.embedded import Stores

GRACEFUL_SHUTDOWN_SECONDS = 8
SCOPES_HELP = "read, trade, mark or operate; more than once for more."
ACCOUNTS_HELP = "An account, a prefix such as 'desk-*', or '*'; more than once for more. (Default: every account.)"

app = typer.Typer(
    name="plimsoll",
    help="A margining service for perpetual futures, and the watchdog that guards it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
keys = typer.Typer(name="keys", help="API keys: who may do what while PLIMSOLL_AUTH=on.", no_args_is_help=True)
app.add_typer(keys)


@app.command()
def up(
    demo: Annotated[bool, typer.Option("--demo", help="Run the demo market too, unless PLIMSOLL_DEMO=off.")] = False,
) -> None:
    """Run everything on this machine: Redis, Postgres, migrations, API and watchdog. Ctrl-C stops it."""
    with _plain_errors():
        from app import up as one_machine

        try:
            one_machine.up(_settings(), demo=demo)
        except KeyboardInterrupt:
            typer.echo("plimsoll: interrupted")


@app.command()
def api() -> None:
    """Serve the REST API."""
    with _plain_errors():
        import structlog
        import uvicorn

        from app.logging import configure_logging
        from app.security import require_keys_beyond_loopback
        from app.up import base_url

        settings = _settings()
        # uvicorn speaks before the application does, and of several workers it is their parent that speaks.
        configure_logging(settings.log_level, process="api")
        log = structlog.get_logger(__name__)
        require_keys_beyond_loopback(settings, host=settings.api_host, variable="PLIMSOLL_API_HOST")
        _located()
        if settings.auth == "off":
            who = "whoever reaches it may do anything" if settings.allow_keyless else "only this machine is served"
            log.warning("the API asks for no keys (PLIMSOLL_AUTH=off)", served=who)
        log.info("the API starts", url=base_url(settings.api_host, settings.api_port))
        shared_directory = _share(settings.api_workers)
        # uvicorn hands the signal on when it has finished; the directory is removed then.
        signal.signal(signal.SIGTERM, lambda _signal, _frame: sys.exit(0))
        try:
            uvicorn.run(
                "app.main:app",
                host=settings.api_host,
                port=settings.api_port,
                workers=settings.api_workers,
                loop="uvloop",
                http="app.http_protocol:BoundedHttpProtocol",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_SECONDS,
            )
        finally:
            if shared_directory is not None:
                shutil.rmtree(shared_directory, ignore_errors=True)


@app.command()
def watchdog() -> None:
    """Run the watchdog, as `python -m watchdog` does."""
    with _plain_errors():
        _located()
        os.execv(sys.executable, [sys.executable, "-m", "watchdog"])  # noqa: S606 - this very program, no shell


@app.command()
def migrate() -> None:
    """Bring the tables of Postgres up to date and let writes into an empty Redis."""
    with _plain_errors():
        settings, stores = _located()
        from app import reconcile

        reconcile.migrate(settings, stores)
        typer.echo("migrated")


@app.command()
def verify() -> None:
    """Recompute every account from its history and compare it with Redis, to the last digit."""
    with _plain_errors(), _maintained() as (settings, stores):
        from app.verify import verify as compare

        found = compare(settings, stores)
        for difference in found.differences:
            typer.echo(difference)
        if found.differences:
            typer.echo(f"{len(found.differences)} differences; {found.accounts} accounts, {found.rows} rows", err=True)
            raise typer.Exit(1)
        typer.echo(f"{found.accounts} accounts and {found.rows} rows agree")


@app.command()
def rebuild() -> None:
    """Restore Redis from Postgres alone: balances, positions, open breaches, operation ids. Marks start missing."""
    with _plain_errors(), _maintained() as (settings, stores):
        from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

        from app.rebuild import rebuild as restore

        with Progress(SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn()) as shown:
            tasks = {stage: shown.add_task(stage, total=None) for stage in ("accounts", "operation ids")}
            rebuilt = restore(settings, stores, lambda stage, count: shown.advance(tasks[stage], count))
        typer.echo(f"rebuilt {rebuilt.accounts} accounts from history up to id {rebuilt.newest_id}; set the marks next")


@app.command()
def reset(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Empty both stores: every account, position, mark, row of history and API key."""
    with _plain_errors(), _maintained() as (settings, stores):
        from app import reconcile

        if not yes:
            typer.echo(f"Redis     {_without_password(stores.redis_url)}")
            typer.echo(f"Postgres  {_without_password(stores.database_url)}")
            typer.confirm("Delete all state and all history in both?", abort=True)
        reconcile.reset(settings, stores)
        typer.echo("both stores are empty")


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array, for a program.")] = False,
) -> None:
    """Look at both stores, the clocks, the outbox and the sweeps, and say how to mend what is wrong."""
    with _plain_errors():
        import json
        from dataclasses import asdict

        from app import doctor as examination

        findings = examination.examine(*_located())
        if as_json:
            typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
        else:
            for line in examination.lines(findings):
                typer.echo(line)
    if any(finding.level == "fail" for finding in findings):
        raise typer.Exit(1)


@app.command()
def halt(
    reason: Annotated[str, typer.Option("--reason", help="For the record.")],
) -> None:
    """Halt trading: refuse trades that open and withdrawals. Works while the API is down."""
    with _plain_errors():
        from app import halts

        shown = halts.from_the_command(halts.halt, *_located(), reason=reason)
        recorded = "" if shown["recorded"] else " (not on record yet)"
        typer.echo(f"trading is halted since {shown['since'] or 'it was set by hand'}{recorded}")


@app.command()
def resume(
    reason: Annotated[str, typer.Option("--reason", help="For the record.")],
) -> None:
    """Resume trading."""
    with _plain_errors():
        from app import halts

        halts.from_the_command(halts.resume, *_located(), reason=reason)
        typer.echo("trading goes on")


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True, help="Bars, .csv or .csv.gz.")],
    api_url: Annotated[
        str | None, typer.Option("--api", help="Where the API is. (Default: PLIMSOLL_API_PORT on this machine.)")
    ] = None,
    lockstep: Annotated[bool, typer.Option("--lockstep", help="Wait until each mark has been swept.")] = False,
    ohlc: Annotated[bool, typer.Option("--ohlc", help="Four marks a bar instead of its close.")] = False,
    speed: Annotated[
        float | None, typer.Option("--speed", min=0.001, help="Times real time; left out, as fast as it goes.")
    ] = None,
    accounts: Annotated[int, typer.Option("--accounts", min=0, help="How many accounts trade along.")] = 200,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same trades.")] = 1,
    start: Annotated[datetime | None, typer.Option("--start", help="The first bar, in UTC.")] = None,
    end: Annotated[datetime | None, typer.Option("--end", help="Bars before this, in UTC.")] = None,
    log: Annotated[
        Path | None, typer.Option("--log", help="Write each request and answer here, as JSON lines.")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option("--key", help="The API key. (Default: PLIMSOLL_API_KEY, which no list of processes shows.)"),
    ] = None,
) -> None:
    """Play recorded bars as marks through the REST API, against accounts that trade as they go."""
    with _plain_errors():
        from app.replay import ReplayOptions
        from app.replay import replay as play
        from app.up import base_url

        settings = _settings()
        code = play(
            ReplayOptions(
                file=file,
                api_url=api_url or base_url(settings.api_host, settings.api_port),
                lockstep=lockstep,
                ohlc=ohlc,
                speed=speed,
                accounts=accounts,
                seed=seed,
                start=start and start.replace(tzinfo=UTC),
                end=end and end.replace(tzinfo=UTC),
                log=log,
                api_key=key or (settings.api_key.get_secret_value() if settings.api_key else None),
            )
        )
    raise typer.Exit(code)


@keys.command()
def create(
    scope: Annotated[list[str], typer.Option("--scope", help=SCOPES_HELP)],
    name: Annotated[str, typer.Option("--name", help="Whose it is, for the list.")],
    account: Annotated[list[str] | None, typer.Option("--account", help=ACCOUNTS_HELP)] = None,
) -> None:
    """Make a key and print it, once: nothing can show it again."""
    with _plain_errors(), _maintained() as (_settings, stores):
        from app import api_keys

        key_id, key = asyncio.run(
            api_keys.with_engine(
                stores.database_url,
                lambda engine: api_keys.create_key(
                    engine, name=name, scopes=scope, accounts=account or [], now=datetime.now(UTC)
                ),
            )
        )
        typer.echo(f"key {key_id} is made; this is the only time it is shown", err=True)
        typer.echo(key)


@keys.command("list")
def list_keys() -> None:
    """List every key there ever was, without its secret."""
    with _plain_errors(), _maintained() as (_settings, stores):
        from app import api_keys

        rows = [("id", "scopes", "accounts", "created", "revoked", "name")]
        for key in asyncio.run(api_keys.with_engine(stores.database_url, api_keys.list_keys)):
            times = [moment.isoformat(timespec="seconds") if moment else "-" for moment in (key.created, key.revoked)]
            rows.append((key.id, ",".join(key.scopes), ",".join(key.accounts), times[0], times[1], key.name))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@keys.command()
def revoke(key_id: Annotated[str, typer.Argument(help="The key's id, as the list shows it.")]) -> None:
    """Revoke a key for good; every process refuses it within PLIMSOLL_KEYS_REFRESH_SECONDS."""
    with _plain_errors(), _maintained() as (settings, stores):
        from app import api_keys

        known = asyncio.run(
            api_keys.with_engine(
                stores.database_url, lambda engine: api_keys.revoke_key(engine, key_id, now=datetime.now(UTC))
            )
        )
        if not known:
            typer.echo(f"plimsoll: there is no key {key_id}", err=True)
            raise typer.Exit(1)
        typer.echo(f"key {key_id} is revoked; refused everywhere within {settings.keys_refresh_seconds:g} s")


def _settings() -> Settings:
    from app.config import get_settings

    return get_settings()


@contextmanager
def _maintained() -> Iterator[tuple[Settings, Stores]]:
    """The stores for one command; the embedded ones of a ``DATA_DIR`` that is not up are started for its time."""
    from app.config import get_settings
    from app.embedded import StoresNotFound, start_servers

    servers = None
    try:
        located = _located()
    except StoresNotFound:
        settings = get_settings()
        if not (settings.data_dir / "servers.json").exists():
            raise
        servers = start_servers(settings.data_dir, settings.redis_server)
        located = (settings, servers.stores)
    try:
        yield located
    finally:
        if servers is not None:
            servers.stop()


def _located() -> tuple[Settings, Stores]:
    """The settings and the stores; what this process starts finds the same ones, by its environment."""
    from app.config import get_settings
    from app.embedded import locate_stores

    settings = get_settings()
    stores = locate_stores(settings)
    # What was configured is found again where it stands: a secret out of a file is not for the environment.
    if settings.redis_url is None:
        os.environ["PLIMSOLL_REDIS_URL"] = stores.redis_url
    if settings.database_url is None:
        os.environ["PLIMSOLL_DATABASE_URL"] = stores.database_url
    get_settings.cache_clear()
    return get_settings(), stores


def _share(workers: int) -> Path | None:
    """With several workers, give them a fresh directory for their metrics and accounts, before any of them starts."""
    if workers == 1:
        return None
    from app.shared_accounts import SharedAccounts

    directory = Path(tempfile.mkdtemp(prefix="plimsoll-metrics-"))
    SharedAccounts.create(directory)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
    return directory


def _without_password(url: str) -> str:
    """``url`` to be shown; it may name several hosts, and hold a password of the store's and one of its sentinels."""
    return re.sub("(password=)[^&]*", r"\1***", re.sub("(//[^:@/]*):[^/]*@", r"\1:***@", url))


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What a user can do something about is one message and exit code 1; the rest, our mistake, a traceback."""
    try:
        yield
    except Exception as error:
        from app.start_refusal import reason_of

        message = reason_of(error)
        if message is None:
            raise
        typer.echo(f"plimsoll: {message}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
