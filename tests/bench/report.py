"""B11: the margin report of a million accounts, streamed, beside orjson of the same rows when they are in memory."""

from __future__ import annotations

import asyncio
import gc
import http.client
import time
from decimal import Decimal
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import orjson

from app.contracts import BTC_PERP
from app.numbers import from_units
from tests.bench.population import MARK, Population, account_name
from tests.bench.ratios import Bound, Row
from tests.bench.sweeps import Say, World

GROWTH_BYTES_MAX: Final = 150 * 10**6
READ_BYTES: Final = 1 << 20
TIMEOUT_SECONDS: Final = 300


async def measure_report(of: World, say: Say, *, rounds: int = 5) -> Row:
    """B11."""
    count = len(of.population)
    row = Row(
        "B11",
        f"GET /margin-report of {count:,} accounts",
        "orjson of the same rows in memory",
        "accounts/s",
        must=Bound(0.3, "high", "≥ 0.3, memory < +150 MB"),
        aim=Bound(0.6, "high", "0.6"),
    )
    api = await of.system.start_api()
    growth = 0
    try:
        await of.booking.marks.set_mark("BTC-PERP", MARK, confirm=True)
        await asyncio.to_thread(_fetch, f"{api.url}/margin-report?limit=1000")
        for number in range(rounds):
            resting = _reset_peak(api.pid)
            seconds, body = await asyncio.to_thread(_fetch, f"{api.url}/margin-report")
            growth = max(growth, _peak(api.pid) - resting)
            report = orjson.loads(body)
            gc.freeze()
            started = time.perf_counter()
            written = len(orjson.dumps(report["accounts"]))
            beside = time.perf_counter() - started
            row.add(measured=count / seconds, beside=count / beside)
            say(f"B11 round {number + 1}: {seconds:.1f} s streamed, {beside:.2f} s in memory, {written:,} bytes")
            if number == 0:
                row.faults += _differences(report, of)
            elif len(report["accounts"]) != count:
                row.faults.append(f"{len(report['accounts'])} accounts in the report")
            del report, body
            gc.unfreeze()
            gc.collect()
    finally:
        api.terminate()
        of.system.apis.remove(api)
    row.notes.append(f"resident memory of the API: +{growth / 10**6:.0f} MB at most")
    if growth >= GROWTH_BYTES_MAX:
        row.unmet.append(f"memory grew by {growth / 10**6:.0f} MB")
    return row


def _fetch(url: str) -> tuple[float, bytes]:
    """The seconds until the last byte, and the body."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=TIMEOUT_SECONDS)
    started = time.perf_counter()
    connection.request("GET", f"{parts.path}?{parts.query}")
    response = connection.getresponse()
    pieces = []
    while piece := response.read(READ_BYTES):
        pieces.append(piece)
    seconds = time.perf_counter() - started
    connection.close()
    if response.status != 200:
        raise RuntimeError(f"the report was answered {response.status} {b''.join(pieces)[:500]!r}")
    return seconds, b"".join(pieces)


def _reset_peak(pid: int) -> int:
    """Let the kernel begin a new peak of the process's resident memory; what it is now, in bytes."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return _status(pid, "VmRSS")


def _peak(pid: int) -> int:
    return _status(pid, "VmHWM")


def _status(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _differences(report: dict[str, Any], of: World) -> list[str]:
    """How the report differs from brute force: its candidates, and every account's equity and maintenance margin."""
    faults = []
    population: Population = of.population
    candidates = {shown["account_id"] for shown in report["liquidation_candidates"]}
    if candidates != {account_name(slot) for slot in population.candidates(MARK)}:
        faults.append(f"{len(candidates)} candidates in the report are not those of brute force")
    if len(report["accounts"]) != len(population):
        return [*faults, f"{len(report['accounts'])} accounts in the report"]
    wrong, total = 0, Decimal(0)
    rows = zip(population.balance.tolist(), population.quantity.tolist(), population.cost.tolist(), strict=True)
    for shown, (balance, quantity, cost) in zip(report["accounts"], rows, strict=True):
        equity = from_units(balance + quantity * int(MARK) - cost)
        total += equity
        maintenance = from_units(abs(quantity) * int(MARK)) * BTC_PERP.maintenance_rate
        wrong += Decimal(shown["equity"]) != equity or Decimal(shown["maintenance_margin"]) != maintenance
    if wrong or Decimal(report["totals"]["equity"]) != total:
        faults.append(f"{wrong} accounts of the report, or its total, are not those of brute force")
    return faults
