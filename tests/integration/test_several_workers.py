"""The API's metrics with several workers: they add up, and a worker that is killed takes no count with it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
from prometheus_client.mmap_dict import MmapedDict

from app.shared_accounts import SharedAccounts
from tests.conftest import SystemFactory
from tests.harness import Process
from tests.integration.desk import BTC_PERP, eventually

REQUESTS = 60
LIVE = 'plimsoll_http_request_duration_seconds_count{method="GET",route="/health/live",status="200"}'
REFUSED = 'plimsoll_refusals_total{code="mark_price_jump"}'
BREAKER = "plimsoll_postgres_breaker_open"


async def test_counters_of_two_workers_add_up_and_stay_right_when_one_is_killed(system: SystemFactory) -> None:
    running = await system(api_workers=2)
    api = running.apis[0]
    deposited = await running.client.post("/accounts/alice/deposit", json={"amount": "10000"})
    assert deposited.status_code == 201
    await mark(running.client, "50000")
    body = {"account_id": "alice", "symbol": BTC_PERP, "side": "buy", "quantity": "0.1", "price": "50000"}
    assert (await running.client.post("/trade", json=body)).status_code == 201
    files = directory_of(workers(api))
    assert SharedAccounts(files).take("alice") is not None, "the workers share no accounts"

    asked = await live_checks_of_both(api, files)
    before = await counted(api, asked)
    answered = requests_by_process(files)
    assert sum(answered.values()) == asked

    check_with_promtool((await running.client.get("/metrics")).content)

    # A scrape is answered by either worker; both say the same.
    assert all([await same(api, before) for _ in range(6)])

    victim = max(answered, key=lambda pid: answered[pid])
    assert psutil.Process(victim).ppid() == api.pid
    os.kill(victim, signal.SIGKILL)

    async def is_replaced() -> bool:
        return len(workers(api)) == 2 and victim not in workers(api)

    await eventually(is_replaced, "another worker", within_seconds=30)
    await api.wait_until_ready()
    after = await counters(api)
    assert {name: value for name, value in after.items() if value < before.get(name, 0)} == {}
    assert after[LIVE] == asked

    # The counts go on from there, the files of the dead worker's gauges are gone, the breaker's gauge is not.
    await live_checks(api, REQUESTS)
    assert (await mark(running.client, "100000", confirm=False)).status_code == 409
    finally_shown = await counted(api, asked + REQUESTS)
    assert finally_shown[REFUSED] == finally_shown["plimsoll_marks_refused_total"] == 1
    assert finally_shown[BREAKER] == 0

    async def only_the_living_have_gauges() -> bool:
        await counters(api)  # a scrape removes those of the dead
        return {int(file.stem.rpartition("_")[2]) for file in files.glob("gauge_live*.db")} == workers(api)

    await eventually(only_the_living_have_gauges, "the new worker's gauges beside the other's", within_seconds=30)

    api.terminate()
    assert not files.exists(), "the directory of a stopped API stays"


def check_with_promtool(page: bytes) -> None:
    """Where there is one; of a page that several workers add up, as the unit tests do of one process's."""
    promtool = shutil.which("promtool")
    if promtool is not None:
        checked = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, check=False)
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


async def mark(client: httpx.AsyncClient, price: str, *, confirm: bool = True) -> httpx.Response:
    return await client.post("/mark-price", json={"symbol": BTC_PERP, "price": price, "confirm": confirm})


async def live_checks(api: Process, count: int) -> None:
    """Ask on a new connection each time: whichever worker is first to accept it answers."""
    none_kept = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=api.url, trust_env=False, limits=none_kept) as client:
        for _ in range(count):
            assert (await client.get("/health/live")).status_code == 200


async def live_checks_of_both(api: Process, files: Path) -> int:
    """Ask until each worker has answered, and say how often that was.

    The API is ready when one worker is: the other may be importing still, or be slower to accept for a while.
    """
    asked = 0

    async def both_answered() -> bool:
        nonlocal asked
        await live_checks(api, REQUESTS)
        asked += REQUESTS
        return len(requests_by_process(files)) == 2

    await eventually(both_answered, "an answer of each worker", within_seconds=30)
    return asked


async def counters(api: Process) -> dict[str, float]:
    """Every sample of one scrape that never goes back, and the breaker, by its name in the exposition."""
    async with httpx.AsyncClient(base_url=api.url, trust_env=False) as client:
        lines = (await client.get("/metrics")).text.splitlines()
    samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples if "_sum" not in name}


async def counted(api: Process, checks: int) -> dict[str, float]:
    """``counters`` with exactly so many live checks: the last is counted after its answer, perhaps by the other."""

    async def are_counted() -> bool:
        return (await counters(api))[LIVE] >= checks

    await eventually(are_counted, f"{checks} live checks", within_seconds=10)
    shown = await counters(api)
    assert shown[LIVE] == checks
    return shown


async def same(api: Process, before: dict[str, float]) -> bool:
    now = await counters(api)
    scrapes = 'route="/metrics"'
    return {n: v for n, v in now.items() if scrapes not in n} == {n: v for n, v in before.items() if scrapes not in n}


def workers(api: Process) -> set[int]:
    """The worker processes of the API: its children but for the resource tracker, and but for those that ended."""
    found = set()
    for child in psutil.Process(api.pid).children():
        with suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
            if any("spawn_main" in word for word in child.cmdline()):
                found.add(child.pid)
    return found


def directory_of(pids: set[int]) -> Path:
    """The directory that the workers share."""
    (directory,) = {psutil.Process(pid).environ()["PROMETHEUS_MULTIPROC_DIR"] for pid in pids}
    return Path(directory)


def requests_by_process(directory: Path) -> dict[int, int]:
    """How many live checks each worker counted in its own file."""
    counted = {}
    for file in directory.glob("histogram_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        if not file.stat().st_size:  # of a worker that has just begun
            continue
        values = MmapedDict.read_all_values_from_file(str(file))  # type: ignore[no-untyped-call]
        here = sum(int(value) for key, value, *_ in values if "_bucket" in key and "/health/live" in key)
        if here:
            counted[pid] = here
    return counted
