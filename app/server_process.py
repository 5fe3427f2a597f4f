"""A server process we own: started in a session of its own, or found again by its recorded id and start time."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil

SOCKET_PATH_BYTES_MAX = 103
"""The longest path of a unix socket that both Linux (108 with its NUL) and macOS (104) take."""
LOG_LINES_SHOWN = 15
POLL_SECONDS = 0.02


class EmbeddedServerError(Exception):
    """Something a user has to do something about; its text is the whole message."""


class ServerNotFound(EmbeddedServerError):
    """There is no binary to start."""


class ServerFailed(EmbeddedServerError):
    """A server did not come up, does not answer, or did not stop."""


class NewerData(EmbeddedServerError):
    """The data was written by a newer server, which an older one would misread or take for empty."""


class ServerProcess:
    """One process, known by its id *and* start time: an id alone may meanwhile be somebody else's."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self.pid: int = process.pid
        self.created: float = process.create_time()

    @classmethod
    def spawn(
        cls,
        command: Sequence[str],
        *,
        log: Path,
        directory: Path,
        user: tuple[int, int] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Self:
        """Start ``command`` in its own session, its output appended to ``log``; ``user`` as in :func:`as_user`."""
        with log.open("ab") as output:
            return cls(
                psutil.Popen(
                    list(command),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    cwd=directory,
                    env=environment,
                    start_new_session=True,
                    **as_user(user),
                )
            )

    @classmethod
    def recorded(cls, pid: object, created: object) -> Self | None:
        """The process with this id and start time, if it still runs."""
        if not isinstance(pid, int) or not isinstance(created, float):
            return None
        try:
            found = cls(psutil.Process(pid))
        except psutil.NoSuchProcess:
            return None
        return found if found.is_running() and abs(found.created - created) < 1 else None

    @classmethod
    def with_id(cls, pid: int) -> Self | None:
        """The process with this id, if it runs."""
        try:
            found = cls(psutil.Process(pid))
        except psutil.NoSuchProcess:
            return None
        return found if found.is_running() else None

    def is_running(self) -> bool:
        """False also once it has exited and waits for its parent to notice."""
        try:
            # Of a child of ours, wait() also takes the exit status, so that no zombie stays.
            self._process.wait(0)
        except psutil.TimeoutExpired:
            pass
        else:
            return False
        try:
            return self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def working_directory(self) -> Path | None:
        """Where it runs, or None if it is gone or not for us to ask."""
        try:
            return Path(self._process.cwd())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return None

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has gone."""
        with suppress(psutil.NoSuchProcess):
            self._process.send_signal(number)

    def wait(self, seconds: float) -> bool:
        """Wait at most this long for it to exit; whether it has."""
        deadline = time.monotonic() + seconds
        while self.is_running():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def stop(self, signals: Sequence[tuple[signal.Signals, float]]) -> bool:
        """Send each signal, and wait its seconds, until the process has exited; whether it has."""
        for number, seconds in signals:
            self.send_signal(number)
            if self.wait(seconds):
                return True
        return False


def as_user(user: tuple[int, int] | None) -> dict[str, Any]:
    """The arguments that make ``subprocess`` run something as a user and group id; none for our own."""
    return {} if user is None else {"user": user[0], "group": user[1], "extra_groups": []}


def socket_directory(directory: Path, socket_name: str, owner: int) -> Path:
    """``directory``, or a short private one under /tmp if the socket's path would be longer than the system takes.

    Raises :class:`EmbeddedServerError` if somebody else has made that one first.
    """
    if len(os.fsencode(directory / socket_name)) <= SOCKET_PATH_BYTES_MAX:
        return directory
    digest = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    for base in (Path(tempfile.gettempdir()), Path("/tmp")):  # noqa: S108 - private: its owner and mode are checked
        short = base / f"plimsoll-{digest}"
        if len(os.fsencode(short / socket_name)) > SOCKET_PATH_BYTES_MAX:
            continue
        short.mkdir(mode=0o700, exist_ok=True)
        if short.is_symlink() or short.stat().st_uid not in {owner, os.geteuid()}:
            raise EmbeddedServerError(f"{short}, wanted for a socket of {directory}, belongs to somebody else")
        if short.stat().st_uid != owner:
            os.chown(short, owner, -1)
        short.chmod(0o700)
        return short
    raise EmbeddedServerError(
        f"the path {directory} is too long for a unix socket, and so is that of the temporary one"
    )


def remove_socket_directory(path: Path, directory: Path) -> None:
    """Remove what :func:`socket_directory` made outside of ``directory``, unless something lies there."""
    if path != directory:
        with suppress(OSError):
            path.rmdir()


def last_lines(log: Path) -> str:
    """The end of a log, to be shown with an error."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:])
    except OSError as error:
        return str(error)
