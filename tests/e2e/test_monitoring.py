"""An operator's whole day: a quiet market, a crash, its dashboards, the runbooks, and a watchdog that is gone.

The tests of this file share one system and run in their order. `PLIMSOLL_PANELS_TABLE` names a file for the table of
panels, queries and values.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from tests.e2e.stack import DEPLOY, Stack, shell, whole_stack
from tests.replay_run import CRASH_OF_OCTOBER_2025
from watchdog.metrics import MARGIN_RATIO_BANDS

BURST: Final = "PlimsollLiquidationBurst"
FIRES_WITHIN_SECONDS: Final = 60
QUIET_UNTIL: Final = "2025-10-10T20:49:00"
"""The twenty minutes before the crash stay within 0.3 %."""

PANELS_TABLE: Final = os.environ.get("PLIMSOLL_PANELS_TABLE")
SHOWN_WITHIN_SECONDS: Final = 30.0
AGE_ROOM_SECONDS: Final = 15.0
"""A scrape's interval, and what a busy machine takes on top."""

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack() -> AsyncIterator[Stack]:
    """Everything, started once."""
    directory = Path(tempfile.mkdtemp(prefix="plimsoll-"))
    try:
        async with whole_stack(directory) as running:
            yield running
            sent = [(item.receiver, item.alert, item.document["status"]) for item in running.receiver.notifications]
            print("alerts sent:", *sent, sep="\n  ")  # noqa: T201 - for the reader of `pytest -s`
    finally:
        shutil.rmtree(directory)


async def replay(stack: Stack, *options: str) -> str:
    """Play the crash's file, or a part of it, into the system."""
    if not CRASH_OF_OCTOBER_2025.exists():
        pytest.skip(f"there is no {CRASH_OF_OCTOBER_2025}")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "app.cli", "replay", str(CRASH_OF_OCTOBER_2025), "--api", stack.system.apis[0].url),
        *options,
        env=stack.system.environment(api_key=stack.key),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


async def test_a_quiet_replay_pages_nobody(stack: Stack) -> None:
    await replay(stack, "--end", QUIET_UNTIL)
    # As long as an alert would take to come: two intervals, and the time Alertmanager gathers a group in.
    await asyncio.sleep(20)
    assert [item.document for item in stack.receiver.notifications if item.receiver == "page"] == []


async def test_the_crash_pages_once_within_a_minute(stack: Stack) -> None:
    started = time.monotonic()
    playing = asyncio.create_task(replay(stack, "--start", QUIET_UNTIL))
    try:
        await stack.until(
            lambda: bool(stack.receiver.fired(BURST)), "the burst alert", within_seconds=FIRES_WITHIN_SECONDS
        )
    finally:
        print(await playing)  # noqa: T201 - for the reader of `pytest -s`
    (page,) = stack.receiver.fired(BURST)
    print(f"the page came {page.received - started:.1f} s after the replay began")  # noqa: T201
    assert page.receiver == "page"
    (alert,) = page.document["alerts"]
    assert alert["labels"]["severity"] == "page"
    assert re.fullmatch(r"\d+ breaches opened within 5 minutes", alert["annotations"]["summary"])
    assert (DEPLOY.parent / alert["annotations"]["runbook"]).exists()


def band(account: dict[str, Any]) -> str | None:
    """The band of an account's margin ratio, as REST shows it."""
    if Decimal(account["maintenance_margin"]) == 0:
        return None
    if account["margin_ratio"] is None:
        return "above_1"
    ratio = Decimal(account["margin_ratio"])
    return next((name for name, end in MARGIN_RATIO_BANDS.items() if ratio <= Decimal(str(end))), "above_1")


async def all_rows(stack: Stack, route: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    cursor: dict[str, str] = {}
    while True:
        page = await stack.rest(route, limit="1000", **cursor)
        rows += page["items"]
        if page["next_cursor"] is None:
            return rows
        cursor = {"cursor": page["next_cursor"]}


async def what_rest_says(stack: Stack) -> dict[tuple[str, str], dict[str, float]]:
    """For each panel that REST knows the value of: that value, by what is left of the labels."""
    report = await stack.rest("/margin-report")
    liquidations, recoveries = await all_rows(stack, "/liquidations"), await all_rows(stack, "/recoveries")
    trades = await all_rows(stack, "/trades")
    totals, states = report["totals"], report["totals"]["accounts"]
    ready = (await stack.client.get(f"{stack.system.apis[0].url}/health/ready")).json()
    bands = Counter(filter(None, (band(account) for account in report["accounts"])))
    open_breaches = float(sum(row["recovered_at"] is None for row in liquidations))
    waiting = 0.0 if all(trade["id"] for trade in trades) and ready["missing"] == [] else math.nan
    by_side = Counter(trade["side"] for trade in trades)
    return {
        ("plimsoll-risk", "Candidates"): {"": len(report["liquidation_candidates"])},
        ("plimsoll-risk", "Open breaches"): {"": open_breaches},
        ("plimsoll-risk", "Overdue candidates"): {
            "": sum(account["open_breach_id"] is None for account in report["liquidation_candidates"])
        },
        ("plimsoll-risk", "Quarantined accounts"): {"": states["quarantined"]},
        ("plimsoll-risk", "Halted"): {"": float(report["halted"])},
        ("plimsoll-risk", "Breaches opened and ended, ever"): {"opened": len(liquidations), "ended": len(recoveries)},
        ("plimsoll-risk", "Mark price"): {symbol: float(price) for symbol, price in report["marks"].items()},
        ("plimsoll-risk", "Accounts by state"): {state: float(count) for state, count in states.items()},
        ("plimsoll-risk", "Accounts by margin ratio"): {
            name: float(bands[name]) for name in (*MARGIN_RATIO_BANDS, "above_1")
        },
        ("plimsoll-risk", "Equity and margins of all accounts"): {
            "equity": float(totals["equity"]),
            "used margin": float(totals["used_margin"]),
            "maintenance margin": float(totals["maintenance_margin"]),
        },
        ("plimsoll-risk", "Age of the marks"): dict(report["mark_age_seconds"]),
        ("plimsoll-watchdog", "Oldest last sweep"): {"": report["swept_age_seconds"]},
        ("plimsoll-watchdog", "State writable"): {"": float(ready["status"] == "ready")},
        ("plimsoll-history", "Rows that wait"): {"": waiting},
        ("plimsoll-history", "Outbox"): {"rows": waiting},
        ("plimsoll-api", "Trades booked"): {"": len(trades)},
        ("plimsoll-api", "Trades by outcome"): {f"{side} booked": float(count) for side, count in by_side.items()},
    }


AGES: Final = {("plimsoll-risk", "Age of the marks"), ("plimsoll-watchdog", "Oldest last sweep")}


def legend(target: dict[str, Any], labels: dict[str, str]) -> str:
    """The name of a series in its panel."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), target["legendFormat"])


async def shown(stack: Stack, panel: dict[str, Any]) -> dict[str, float]:
    """What a panel shows now, by the names in its legend."""
    values = {}
    for target in panel["targets"]:
        for series in await stack.query(target["expr"]):
            values[legend(target, series["metric"])] = float(series["value"][1])
    return values


def agree(expected: dict[str, float], found: dict[str, float], *, room: float) -> bool:
    """Whether every value that REST says is shown."""
    return all(
        name in found and math.isclose(found[name], value, rel_tol=1e-9, abs_tol=room)
        for name, value in expected.items()
    )


async def test_every_panel_shows_what_rest_says(stack: Stack) -> None:
    """After the crash: nothing trades, so both sides stand still, but for ages."""
    refused = await stack.post("/mark-price", {"symbol": "BTC-PERP", "price": "1"}, status=409)
    assert refused["code"] == "mark_price_jump"
    await stack.post("/halt", {"reason": "a dashboard has to show it"})
    for watchdog in stack.system.watchdogs:
        watchdog.send_signal(signal.SIGUSR1)  # check the invariants now
    expected = await what_rest_says(stack)
    assert expected["plimsoll-risk", "Breaches opened and ended, ever"]["opened"] > 10
    assert expected["plimsoll-risk", "Halted"] == {"": 1.0}
    rows = ["| dashboard | panel | query | value | REST says |", "| --- | --- | --- | --- | --- |"]
    for file in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            name = (file.stem, panel["title"])
            found, rest = await agreed(stack, panel, name, expected.pop(name, None))
            queries = "<br>".join(f"`{target['expr']}`".replace("|", "\\|") for target in panel["targets"])
            rows.append(f"| {name[0]} | {name[1]} | {queries} | {in_words(found)} | {in_words(rest)} |")
    assert expected == {}, "REST says it, and no panel of that name shows it"
    if PANELS_TABLE:
        Path(PANELS_TABLE).write_text("\n".join(rows) + "\n")
    await stack.post("/resume", {"reason": "the dashboard has shown it"})


async def agreed(
    stack: Stack, panel: dict[str, Any], name: tuple[str, str], expected: dict[str, float] | None
) -> tuple[dict[str, float], dict[str, float] | None]:
    """Wait until a panel shows what REST says; or shows anything, where REST says nothing of it."""
    deadline = time.monotonic() + SHOWN_WITHIN_SECONDS
    while True:
        found = await shown(stack, panel)
        if name in AGES:
            expected = (await what_rest_says(stack))[name]
        if expected is None and (found or "Empty" in panel["description"]):
            assert not any(math.isinf(value) for value in found.values()), (name, found)
            return found, None
        if expected is not None and agree(expected, found, room=AGE_ROOM_SECONDS if name in AGES else 0.0):
            return found, expected
        assert time.monotonic() < deadline, f"{name} shows {found}, REST says {expected}"
        await asyncio.sleep(0.5)


def in_words(values: dict[str, float] | None) -> str:
    """Names and values for the table."""
    if not values:
        return "" if values is None else "(no series)"
    return ", ".join(f"{name} {value:.6g}".strip() for name, value in values.items())


async def test_every_query_of_two_watchdogs_is_true_of_the_system(stack: Stack) -> None:
    """Each exports the counter, and what is queried is one number."""
    assert len(await stack.query("plimsoll_liquidations_total")) == 2
    ((_, value),) = [series["value"] for series in await stack.query("max(plimsoll_liquidations_total)")]
    assert int(value) == len(await all_rows(stack, "/liquidations"))


def blocks(runbook: Path) -> list[str]:
    """The shell blocks of a runbook, also those inside of lists."""
    found = re.findall(r"^( *)```sh\n(.*?)^ *```$", runbook.read_text(), re.MULTILINE | re.DOTALL)
    return ["\n".join(line.removeprefix(indent) for line in body.splitlines()) for indent, body in found]


RUNBOOKS: Final = sorted(file for file in (DEPLOY / "runbooks").glob("Plimsoll*.md"))


def operator(stack: Stack) -> dict[str, str]:
    """The variables that deploy/runbooks/README.md names."""
    return {
        **stack.system.environment(),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "API": stack.system.apis[0].url,
        "WATCHDOG": stack.system.watchdogs[0].url,
        "PROMETHEUS": stack.prometheus,
        "KEY": stack.key,
        "REDIS": shlex.join(stack.servers.redis.client_command()),
        "PSQL": shlex.join(stack.servers.postgres.client_command()),
        "SYMBOL": "BTC-PERP",
        "PRICE": "113000",
        "ACCOUNT": "replay-000",
        "BALANCE": "100000",
        "OPERATION_ID": "none-such",
        "ENTRY": "0-1",
    }


@pytest.mark.parametrize("runbook", RUNBOOKS, ids=lambda file: file.stem)
async def test_every_command_of_a_runbook_runs(stack: Stack, runbook: Path) -> None:
    missing = [program for program in ("curl", "jq") if shutil.which(program) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    found = blocks(runbook)
    assert found
    assert runbook.read_text().count("```sh") == len(found)
    for script in found:
        done = await asyncio.to_thread(shell, script, operator(stack))
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"


async def test_stopping_the_watchdogs_pages(stack: Stack) -> None:
    alert = "PlimsollWatchdogAbsent"
    assert stack.receiver.fired(alert) == []
    for watchdog in stack.system.watchdogs:
        await asyncio.to_thread(watchdog.terminate)
    await stack.until(lambda: bool(stack.receiver.fired(alert)), alert, within_seconds=FIRES_WITHIN_SECONDS)
    (page,) = stack.receiver.fired(alert)
    assert page.receiver == "page"
    assert len(stack.receiver.fired(BURST)) <= 1, "a burst is one page"
