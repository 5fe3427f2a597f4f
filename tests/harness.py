"""Real API and watchdog processes for tests, on free loopback ports, stopped by their own process ids."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx

from app.config import Settings
from app.embedded import Stores

READY_TIMEOUT_SECONDS: Final = 30.0
STOP_TIMEOUT_SECONDS: Final = 15.0
REQUEST_TIMEOUT_SECONDS: Final = 15.0
LOG_LINES_SHOWN: Final = 60


def free_port() -> int:
    """A loopback port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(overrides: Mapping[str, str]) -> dict[str, str]:
    """This process's environment, without the developer's own ``PLIMSOLL_...``, and with ``overrides``."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PLIMSOLL_", "PROMETHEUS_"))}
    return inherited | dict(overrides)


def tail(log: Path) -> str:
    """The end of a log file, under its name."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join([f"--- {log.name}", *lines[-LOG_LINES_SHOWN:]])


class Process:
    """One process of the system under test, in a session of its own."""

    def __init__(self, name: str, command: list[str], env: Mapping[str, str], url: str, log: Path) -> None:
        self.name = name
        self.url = url
        self.log = log
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                command,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._popen.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._popen.poll()

    async def wait_until_ready(self) -> None:
        """Wait for ``/health/ready``; fail with the end of its log."""
        deadline = time.monotonic() + READY_TIMEOUT_SECONDS
        answer = "no answer"
        async with httpx.AsyncClient(base_url=self.url, timeout=2, trust_env=False) as client:
            while self.returncode is None and time.monotonic() < deadline:
                try:
                    response = await client.get("/health/ready")
                except httpx.TransportError as error:
                    answer = repr(error)
                else:
                    answer = response.text
                    if response.is_success:
                        return
                await asyncio.sleep(0.02)
        raise AssertionError(
            f"{self.name} is not ready (exit code {self.returncode}): {answer}\n{tail(self.log)}",
        )

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the process itself, not to its workers."""
        self._popen.send_signal(number)

    def pause(self) -> None:
        """SIGSTOP."""
        self.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self.send_signal(signal.SIGCONT)

    def terminate(self) -> int:
        """SIGTERM, and wait; its exit code. Fails if it stays."""
        if self.returncode is None:
            self._popen.terminate()
        return self.wait()

    def wait(self) -> int:
        """Wait for it to stop by itself; its exit code. Fails if it stays."""
        try:
            return self._popen.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} did not stop on SIGTERM\n{tail(self.log)}") from None

    def kill(self) -> None:
        """SIGKILL to the process and its workers, as a power cut would."""
        # The session's id is the process's own, and nobody else's while one of its members lives.
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()


@dataclass
class System:
    """One pair of stores, and the API and watchdog processes started on it so far.

    ``client`` speaks to the first API. ``overrides`` are environment variables of every process started from here.
    """

    stores: Stores
    directory: Path
    overrides: dict[str, str] = field(default_factory=dict)
    apis: list[Process] = field(default_factory=list)
    watchdogs: list[Process] = field(default_factory=list)
    _client: httpx.AsyncClient | None = None

    @property
    def client(self) -> httpx.AsyncClient:
        """An HTTP client of the first API."""
        if self._client is None:
            self._client = httpx.AsyncClient(
                base_url=self.apis[0].url, timeout=REQUEST_TIMEOUT_SECONDS, trust_env=False
            )
        return self._client

    def environment(self, **more: str) -> dict[str, str]:
        """What a process of this system is started with; names are without ``PLIMSOLL_``, in any case."""
        variables = {
            "REDIS_URL": self.stores.redis_url,
            "DATABASE_URL": self.stores.database_url,
            "DATA_DIR": str(self.directory),
            "DRAIN_SECONDS": "0",  # no test but that of draining waits for it
            **self.overrides,
            **more,
        }
        return environment({f"PLIMSOLL_{name.upper()}": value for name, value in variables.items()})

    def settings(self, **more: object) -> Settings:
        """The settings of a process of this system, for calls in the test's own process."""
        return Settings(
            redis_url=self.stores.redis_url,
            database_url=self.stores.database_url,
            data_dir=self.directory,
            **{**self.overrides, **more},  # type: ignore[arg-type]
        )

    async def start_api(self, *, workers: int = 1, wait: bool = True, port: int | None = None, **more: str) -> Process:
        """Start one API with this many worker processes; by default, wait until it is ready."""
        port = port or free_port()
        process = Process(
            f"api-{len(self.apis)}",
            [sys.executable, "-m", "app.cli", "api"],
            self.environment(api_host="127.0.0.1", api_port=str(port), api_workers=str(workers), **more),
            f"http://127.0.0.1:{port}",
            self.directory / f"api-{len(self.apis)}.log",
        )
        self.apis.append(process)
        if wait:
            await process.wait_until_ready()
        return process

    async def start_watchdog(self, *, wait: bool = True, port: int | None = None, **more: str) -> Process:
        """Start one watchdog; by default, wait until it is ready."""
        port = port or free_port()
        process = Process(
            f"watchdog-{len(self.watchdogs)}",
            [sys.executable, "-m", "watchdog"],
            self.environment(watchdog_host="127.0.0.1", watchdog_port=str(port), **more),
            f"http://127.0.0.1:{port}",
            self.directory / f"watchdog-{len(self.watchdogs)}.log",
        )
        self.watchdogs.append(process)
        if wait:
            await process.wait_until_ready()
        return process

    async def metric(self, process: Process, sample: str) -> float | None:
        """The value of one sample, named as in the exposition: ``plimsoll_sweeps_total{result="ok",...}``."""
        async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_SECONDS, trust_env=False) as client:
            text = (await client.get(f"{process.url}/metrics")).text
        for line in text.splitlines():
            name, _, value = line.rpartition(" ")
            if name == sample:
                return float(value)
        return None

    def command(self, *arguments: str, answers: str = "") -> subprocess.CompletedProcess[str]:
        """Run ``plimsoll ...`` on these stores, with ``answers`` on its input. It alone may become the owner."""
        owner = {"migrations_url": self.stores.migrations_url} if self.stores.migrations_url else {}
        return subprocess.run(
            [sys.executable, "-m", "app.cli", *arguments],
            check=False,
            capture_output=True,
            text=True,
            env=self.environment(**owner),
            input=answers,
            timeout=60,
        )

    async def stop(self) -> None:
        """Stop what runs; SIGKILL for what a test has paused."""
        if self._client is not None:
            await self._client.aclose()
        for process in [*self.apis, *self.watchdogs]:
            if process.returncode is None:
                process.resume()
                process.terminate()

    def logs(self) -> str:
        """The end of every log."""
        return "\n".join(tail(process.log) for process in [*self.apis, *self.watchdogs])
