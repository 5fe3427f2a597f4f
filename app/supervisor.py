"""Processes of ours that ``plimsoll up`` looks after: started, watched, started again, stopped."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

import httpx
import typer

from app.server_process import EmbeddedServerError, ServerProcess

READY_TIMEOUT_SECONDS: Final = 60.0
STOP_TIMEOUT_SECONDS: Final = 12.0
"""Ten for the requests in flight, two for what follows."""
LIVE_INTERVAL_SECONDS: Final = 1.0
LIVE_TIMEOUT_SECONDS: Final = 2.0
LIVE_FAILURES_MAX: Final = 3
LIVE_GRACE_SECONDS: Final = 30.0
"""What a process that was started again has to become live."""
WEDGED_STOP_TIMEOUT_SECONDS: Final = 3.0
BACKOFF_SECONDS_MIN: Final = 0.5
BACKOFF_SECONDS_MAX: Final = 30.0
STEADY_SECONDS: Final = 60.0
"""A process that lived this long is started again at once when it dies."""


class NotReady(EmbeddedServerError):
    """The API or the watchdog did not come up."""


def say(line: str) -> None:
    """One line for whoever looks at the terminal."""
    typer.echo(f"plimsoll: {line}")


class Child:
    """The API or the watchdog: a process in a session of its own, started again when it dies or stops answering."""

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str], url: str, data_dir: Path) -> None:
        self.name = name
        self.url = url
        self._command = command
        self._environment = environment
        self._record = data_dir / f"{name}.pid.json"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> asyncio.subprocess.Process:
        """Start it and record its id, for the case that nobody is left to stop it."""
        self._process = await asyncio.create_subprocess_exec(
            *self._command, env=self._environment, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
        )
        process = ServerProcess.with_id(self._process.pid)
        if process is not None:
            self._record.write_text(json.dumps({"pid": process.pid, "created": process.created}))
        return self._process

    async def wait_until_ready(self, client: httpx.AsyncClient) -> None:
        """Wait for ``/health/ready``. Raises :class:`NotReady` with what it answered last."""
        assert self._process is not None
        answer = "no answer"
        with suppress(TimeoutError):
            async with asyncio.timeout(READY_TIMEOUT_SECONDS):
                while self._process.returncode is None:
                    try:
                        response = await client.get(f"{self.url}/health/ready")
                    except httpx.TransportError:
                        pass
                    else:
                        answer = response.text
                        if response.is_success:
                            return
                    await asyncio.sleep(0.05)
        if self._process.returncode is not None:
            raise NotReady(f"The {self.name} exited with {self._process.returncode}; its messages are above.")
        raise NotReady(f"The {self.name} is not ready after {READY_TIMEOUT_SECONDS:.0f} s: {answer}")

    async def keep_running(self, client: httpx.AsyncClient) -> None:
        """Start it again, for ever, when it has exited or fails its live check three times in a row.

        It has to be ready when this begins.
        """
        loop = asyncio.get_running_loop()
        backoff_seconds, grace_seconds = BACKOFF_SECONDS_MIN, 0.0
        while True:
            started = loop.time()
            assert self._process is not None
            why = await self._until_down(client, self._process, grace_seconds)
            if loop.time() - started > STEADY_SECONDS:
                backoff_seconds = BACKOFF_SECONDS_MIN
            say(f"the {self.name} {why}; starting it again in {backoff_seconds:g} s")
            await self.stop(WEDGED_STOP_TIMEOUT_SECONDS)
            await asyncio.sleep(backoff_seconds)
            backoff_seconds = min(2 * backoff_seconds, BACKOFF_SECONDS_MAX)
            await self.start()
            grace_seconds = LIVE_GRACE_SECONDS

    async def _until_down(
        self, client: httpx.AsyncClient, process: asyncio.subprocess.Process, grace_seconds: float
    ) -> str:
        """Wait until it is down; how. Until ``grace_seconds`` have passed or it was live once, it may fail checks."""
        loop = asyncio.get_running_loop()
        grace_ends = loop.time() + grace_seconds
        failures = 0
        while failures < LIVE_FAILURES_MAX:
            with suppress(TimeoutError):
                async with asyncio.timeout(LIVE_INTERVAL_SECONDS):
                    return f"exited with {await process.wait()}"
            try:
                live = (await client.get(f"{self.url}/health/live")).is_success
            except httpx.TransportError:
                live = False
            if live:
                failures, grace_ends = 0, 0
            elif loop.time() > grace_ends:
                failures += 1
        return f"failed {failures} live checks in a row"

    async def stop(self, timeout_seconds: float = STOP_TIMEOUT_SECONDS) -> bool:
        """SIGTERM, and SIGKILL to the whole session for what is left of it in the end; whether it ran."""
        process = self._process
        if process is None:
            return False
        ran = process.returncode is None
        if ran:
            with suppress(ProcessLookupError):
                process.terminate()
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_seconds):
                    await process.wait()
        _kill_session(process.pid)
        await process.wait()
        self._process = None
        self._record.unlink(missing_ok=True)
        return ran


def stop_left_over(data_dir: Path) -> None:
    """Stop the API and the watchdog of an ``up`` that was killed: they would hold its ports."""
    left_over: list[ServerProcess] = []
    for record in data_dir.glob("*.pid.json"):
        described = json.loads(record.read_text() or "{}")
        process = ServerProcess.recorded(described.get("pid"), described.get("created"))
        if process is not None:
            say(f"stopping the {record.name.removesuffix('.pid.json')} of an earlier run (process {process.pid})")
            process.send_signal(signal.SIGTERM)
            left_over.append(process)
        record.unlink()
    for process in left_over:
        process.wait(STOP_TIMEOUT_SECONDS)
        _kill_session(process.pid)
        process.wait(STOP_TIMEOUT_SECONDS)


def _kill_session(pid: int) -> None:
    """Kill what is left of a session: it, and the workers it started, whom its death leaves running."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
