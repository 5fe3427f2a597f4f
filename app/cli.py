"""The command ``plimsoll``."""

from __future__ import annotations

import os
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

GRACEFUL_SHUTDOWN_SECONDS = 10

app = typer.Typer(
    name="plimsoll",
    help="A margining service for perpetual futures, and the watchdog that guards it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
        import uvicorn

        from app.supervisor import say
        from app.up import base_url

        settings, _stores = _located()
        say(f"the API starts on {base_url(settings.api_host, settings.api_port)}")
        metrics_directory = _share_metrics(settings.api_workers)
        # uvicorn hands the signal on when it has finished; the directory is removed then.
        signal.signal(signal.SIGTERM, lambda _signal, _frame: sys.exit(0))
        try:
            uvicorn.run(
                "app.main:app",
                host=settings.api_host,
                port=settings.api_port,
                workers=settings.api_workers,
                loop="uvloop",
                http="httptools",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_SECONDS,
            )
        finally:
            if metrics_directory is not None:
                shutil.rmtree(metrics_directory, ignore_errors=True)


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
    """Empty both stores: every account, position, mark and row of history."""
    with _plain_errors(), _maintained() as (settings, stores):
        from app import reconcile

        if not yes:
            typer.echo(f"Redis     {_without_password(stores.redis_url)}")
            typer.echo(f"Postgres  {_without_password(stores.database_url)}")
            typer.confirm("Delete all state and all history in both?", abort=True)
        reconcile.reset(settings, stores)
        typer.echo("both stores are empty")


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
            )
        )
    raise typer.Exit(code)


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

    stores = locate_stores(get_settings())
    os.environ["PLIMSOLL_REDIS_URL"] = stores.redis_url
    os.environ["PLIMSOLL_DATABASE_URL"] = stores.database_url
    get_settings.cache_clear()
    return get_settings(), stores


def _share_metrics(workers: int) -> Path | None:
    """With several workers, give them a fresh directory to add up their metrics in, before any of them starts."""
    if workers == 1:
        return None
    directory = Path(tempfile.mkdtemp(prefix="plimsoll-metrics-"))
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
    return directory


def _without_password(url: str) -> str:
    from sqlalchemy.engine import make_url

    return make_url(url).render_as_string(hide_password=True)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What a user can do something about is one message and exit code 1; the rest, our mistake, a traceback."""
    try:
        yield
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        typer.echo(f"plimsoll: {message}", err=True)
        raise typer.Exit(1) from None


def _message(error: Exception) -> str | None:
    """The words for a user's mistake or an absent server; None for anything else."""
    import httpx
    import psycopg2
    import redis
    from pydantic import ValidationError
    from sqlalchemy.exc import OperationalError

    from app.errors import PlimsollError
    from app.server_process import EmbeddedServerError

    if isinstance(error, ValidationError):
        return "\n".join(
            f"PLIMSOLL_{'_'.join(str(part) for part in item['loc']).upper()}: {item['msg']}" for item in error.errors()
        )
    if isinstance(error, OperationalError | psycopg2.OperationalError):
        return f"Postgres: {' '.join(str(getattr(error, 'orig', None) or error).split())}"
    if isinstance(error, redis.ConnectionError | redis.TimeoutError):
        return f"Redis: {error}"
    if isinstance(error, httpx.TransportError):
        return f"the API does not answer: {error}"
    if isinstance(error, EmbeddedServerError | PlimsollError):
        return str(error)
    return None


if __name__ == "__main__":
    app()
