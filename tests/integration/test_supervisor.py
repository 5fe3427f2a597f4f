"""A process that ``plimsoll up`` looks after: started again when it exits or stops answering, and stopped whole."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import psutil
import pytest

from app import supervisor
from app.supervisor import Child, NotReady, stop_left_over
from tests.harness import free_port

SERVER = """
import http.server, os, pathlib, signal, subprocess, sys, time

port, directory = int(sys.argv[1]), pathlib.Path(sys.argv[2])
(directory / "starts").open("a").write(f"{os.getpid()}\\n")
if (directory / "exit").exists():
    sys.exit(3)
if (directory / "worker").exists():
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (directory / "worker").write_text(str(worker.pid))

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if (directory / "wedged").exists() else 200)
        self.end_headers()

    def log_message(self, *_):
        pass

signal.signal(signal.SIGTERM, signal.SIG_IGN if (directory / "stubborn").exists() else signal.SIG_DFL)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class Served:
    """The child, its directory of switches, and the task that looks after it."""

    def __init__(self, directory: Path, client: httpx.AsyncClient) -> None:
        self.directory = directory
        self.client = client
        port = free_port()
        command = [sys.executable, "-c", SERVER, str(port), str(directory)]
        self.child = Child("server", command, os.environ, f"http://127.0.0.1:{port}", directory)

    def switch(self, name: str) -> Path:
        path = self.directory / name
        path.touch()
        return path

    def starts(self) -> list[int]:
        path = self.directory / "starts"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    async def until_started(self, times: int) -> None:
        async with asyncio.timeout(20):
            while len(self.starts()) < times:
                await asyncio.sleep(0.01)


@pytest.fixture
async def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    for name, seconds in {
        "LIVE_INTERVAL_SECONDS": 0.05, "BACKOFF_SECONDS_MIN": 0.05, "WEDGED_STOP_TIMEOUT_SECONDS": 0.2,
    }.items():  # fmt: skip
        monkeypatch.setattr(supervisor, name, seconds)
    async with httpx.AsyncClient(timeout=1, trust_env=False) as client:
        served = Served(tmp_path, client)
        await served.child.start()
        await served.child.wait_until_ready(client)
        looked_after = asyncio.create_task(served.child.keep_running(client))
        yield served
        looked_after.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await looked_after
        await served.child.stop()


async def test_one_that_is_killed_is_started_again(served: Served) -> None:
    psutil.Process(served.starts()[0]).kill()
    await served.until_started(2)
    await served.child.wait_until_ready(served.client)


async def test_one_that_fails_three_live_checks_is_started_again(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    wedged = served.switch("wedged")
    await served.until_started(2)
    wedged.unlink()
    await served.child.wait_until_ready(served.client)
    assert "plimsoll: the server failed 3 live checks in a row; starting it again in 0.05 s" in capsys.readouterr().out


async def test_one_that_keeps_dying_is_waited_for_longer_each_time(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    served.switch("exit")
    psutil.Process(served.starts()[0]).kill()
    await served.until_started(4)
    said = capsys.readouterr().out
    for line in (
        "exited with -9; starting it again in 0.05 s",
        "exited with 3; starting it again in 0.1 s",
        "in 0.2 s",
    ):
        assert line in said


async def test_one_that_ignores_sigterm_is_killed(served: Served) -> None:
    served.switch("stubborn")
    psutil.Process(served.starts()[0]).kill()
    await served.until_started(2)
    await served.child.wait_until_ready(served.client)
    assert await served.child.stop(0.2)
    assert not psutil.pid_exists(served.starts()[1])


async def test_workers_of_a_killed_one_do_not_outlive_it(served: Served) -> None:
    worker = served.switch("worker")
    psutil.Process(served.starts()[0]).kill()
    await served.until_started(2)
    await served.child.wait_until_ready(served.client)
    orphan = psutil.Process(int(worker.read_text()))
    worker.unlink()
    psutil.Process(served.starts()[1]).kill()
    await served.until_started(3)
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE


async def test_one_that_exits_before_it_is_ready_is_an_error(tmp_path: Path) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        served = Served(tmp_path, client)
        served.switch("exit")
        await served.child.start()
        with pytest.raises(NotReady, match="The server exited with 3"):
            await served.child.wait_until_ready(client)
        assert not await served.child.stop()


async def test_one_that_a_killed_owner_left_is_stopped_by_the_next(tmp_path: Path) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        served = Served(tmp_path, client)
        process = await served.child.start()
        await served.child.wait_until_ready(client)
        await asyncio.to_thread(stop_left_over, tmp_path)
        assert await process.wait() != 0
        assert list(tmp_path.glob("*.pid.json")) == []
        await served.child.stop()
