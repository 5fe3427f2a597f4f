"""F16 and F18: the clock of the watchdog jumps, and a watchdog that lives but does nothing is started again."""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import httpx
import psutil
import pytest

from tests.faults.checker import check
from tests.faults.conftest import CellFactory
from tests.faults.journal import Row
from tests.faults.watched import BREACHING_MARK, MARK, SteadyLoad, longest_gap, on_the_edge, recorded
from tests.harness import Process, environment, free_port
from tests.integration.test_cli import Up

INTERVAL_SECONDS: Final = 1.0
LIBRARY: Final = next(
    (
        path
        for folder in ("/usr/lib", "/usr/lib64", "/usr/local/lib")
        for path in Path(folder).rglob("libfaketime.so.1")
    ),
    None,
)
POLL_ROOM_SECONDS: Final = 0.25
LIVE_INTERVALS_MAX: Final = 3
RESTART_SECONDS_MAX: Final = 30


@pytest.mark.skipif(LIBRARY is None, reason="libfaketime is not installed (Debian: apt-get install libfaketime)")
async def test_sweeps_keep_their_cadence_when_the_clock_jumps(
    cell: CellFactory, row: Callable[[str, str], Row], rounds: Callable[[int, int], int], seed: int
) -> None:
    result = row("F16", "the watchdog's clock: -60 s, +60 s, +1 year and back")
    running = await cell(apis=1)
    load = SteadyLoad(running, seed=seed, clients=2)
    await load.start()
    await load.acknowledged(100)
    clock = running.directory / "clock"
    clock.write_text("+0\n")
    variables = {
        "REDIS_URL": running.stores.redis_url,
        "DATABASE_URL": running.stores.database_url,
        "DATA_DIR": str(running.directory),
        "WATCHDOG_PORT": str(port := free_port()),
    }
    watchdog = Process(
        "watchdog",
        [sys.executable, "-m", "watchdog"],
        environment({f"PLIMSOLL_{name}": value for name, value in variables.items()})
        | {
            "LD_PRELOAD": str(LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(clock),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            # Its own fix for waits on the monotonic clock makes each wait for Python's lock return at once or never:
            # a thread beside the loop then held the loop up for seconds.
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",
        },
        f"http://127.0.0.1:{port}",
        running.directory / "watchdog-faketime.log",
    )
    try:
        await watchdog.wait_until_ready()
        for jump in ("-60", "+0", "+60", "+0", "+31536000", "+0"):
            result.rounds += 1
            assert await load.set_mark(MARK)
            account = await on_the_edge(load)
            load.fault()
            clock.write_text(f"{jump}\n")
            gap = await longest_gap(running.http, watchdog.url, rounds(5, 3))
            shown = await running.http.get(f"{watchdog.url}/metrics")
            stamp = _sample(shown.text, "plimsoll_sweep_last_success_timestamp_seconds")
            assert abs(stamp - datetime.now(UTC).timestamp() - float(jump)) < 5, "the clock did not jump"
            if gap > 2 * INTERVAL_SECONDS + POLL_ROOM_SECONDS:
                result.complain(f"after {jump} s there was no sweep for {gap:.2f} s")
            assert await load.set_mark(BREACHING_MARK)
            result.recovered(await recorded(running, account))
        assert await load.set_mark(MARK)
        await load.stop()
        rows = await running.postgres("SELECT id, timestamp FROM liquidations ORDER BY id")
        stamps = [record["timestamp"] for record in rows]
        if stamps != sorted(stamps) or abs((stamps[-1] - datetime.now(UTC)).total_seconds()) > 60:
            result.complain(f"the rows do not stand in the order and at the time of Redis: {stamps}")
        await check(running, load, result)
    finally:
        watchdog.kill()
    result.require_green()


def _sample(text: str, name: str) -> float:
    return next(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"{name} "))


async def test_a_wedged_watchdog_is_not_live_within_three_intervals(
    cell: CellFactory, row: Callable[[str, str], Row], seed: int
) -> None:
    result = row("F18", "a watchdog that lives and does nothing")
    running = await cell(apis=1)
    load = SteadyLoad(running, seed=seed, clients=6)
    await load.start()
    await load.acknowledged(100)
    watchdog = running.start_worker("watchdog", failpoints="sweep.wedge=wedge@8", sweep_interval_seconds="1")
    await running.ready(watchdog)
    result.rounds += 1
    load.fault()
    last, wedged = time.monotonic(), 0.0
    deadline = time.monotonic() + 40
    while not wedged and time.monotonic() < deadline:
        answer = await running.http.get(f"{watchdog.url}/health/live")
        if answer.is_success:
            last = time.monotonic() - float(answer.json()["last_sign_of_life_seconds"])
        else:
            wedged = time.monotonic() - last
        await asyncio.sleep(0.02)
    await load.stop()
    if not 0 < wedged <= LIVE_INTERVALS_MAX * INTERVAL_SECONDS + POLL_ROOM_SECONDS:
        result.complain(f"its live check failed {wedged:.2f} s after its last sign of life")
    result.recovered(wedged)
    await check(running, load, result)
    result.require_green()


@pytest.fixture
def own_directory() -> Iterator[Path]:
    """A directory whose path is short enough for unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="plimsoll-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def test_up_starts_a_wedged_watchdog_again(own_directory: Path) -> None:
    running = Up(own_directory, failpoints="sweep.wedge=wedge@6", demo="off")
    try:
        first = running.child("watchdog").pid
        started = time.monotonic()
        running.wait_for("the watchdog failed 3 live checks in a row; starting it again")
        url = f"http://127.0.0.1:{running.watchdog_port}"
        while not _is_live(url):
            assert time.monotonic() - started < RESTART_SECONDS_MAX, running.output
            time.sleep(0.05)
        assert running.child("watchdog").pid != first
        assert not psutil.pid_exists(first)
    finally:
        running.stop()


def _is_live(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/live", trust_env=False).is_success
    except httpx.TransportError:
        return False
