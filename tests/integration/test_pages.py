"""What both processes show of themselves: health, metrics under their fixed names, documentation without a network."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import httpx
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from tests.harness import System
from tests.integration.desk import Desk, expect, outcome

pytestmark = pytest.mark.asyncio(loop_scope="module")

# DESIGN section 5: what is true of the system is the watchdog's, what is true of requests the API's.
WATCHDOG_METRICS = {
    "plimsoll_accounts{state}",
    "plimsoll_candidates",
    "plimsoll_open_breaches",
    "plimsoll_liquidations_total",
    "plimsoll_recoveries_total",
    "plimsoll_equity_usdt",
    "plimsoll_used_margin_usdt",
    "plimsoll_maintenance_margin_usdt",
    "plimsoll_mark_price{symbol}",
    "plimsoll_mark_price_timestamp_seconds{symbol}",
    "plimsoll_sweeps_total{result,trigger}",
    "plimsoll_sweep_duration_seconds",
    "plimsoll_sweep_last_success_timestamp_seconds",
    "plimsoll_mark_to_record_seconds",
    "plimsoll_overdue_candidates",
    "plimsoll_outbox_entries",
    "plimsoll_outbox_oldest_age_seconds",
}
API_METRICS = {
    "plimsoll_trades_total{outcome,side}",
    "plimsoll_refusals_total{code}",
    "plimsoll_http_request_duration_seconds{method,route,status}",
}
PLAIN = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]*[1-9])?")
COUNTS_AND_AGES = {
    *("trade_id", "transfer_id", "id", "seq", "epoch", "mark_version", "version", "liquidation_id", "open_breach_id"),
    *(
        "swept_version",
        "swept_age_seconds",
        "ok",
        "candidate",
        "recovering",
        "negative_equity",
        "quarantined",
        "status",
    ),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def used(shared_system: System) -> Desk:
    """A system that has booked, refused, swept, breached and recovered."""
    desk = Desk(shared_system.client)
    await desk.mark("50000")
    await desk.deposit("alice", "30000.00000001")
    await desk.deposit("carol", "10000")
    await desk.sell("alice", "0.3", "50000.01")
    await desk.buy("carol", "1", "50000")
    assert outcome(await desk.trade("carol", "buy", "1", "50000")) == "insufficient_initial_margin"
    for price in ("44000", "50000", "44000.12345678"):
        await desk.sweep(price)
    return desk


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def watchdog_page(used: Desk, shared_system: System) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the watchdog's own page."""
    async with httpx.AsyncClient(base_url=shared_system.watchdogs[0].url, trust_env=False) as client:
        yield client


async def samples(client: httpx.AsyncClient) -> dict[str, list[Any]]:
    """The samples of ``/metrics`` by family, its labels with it: ``plimsoll_accounts{state}``."""
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    found: dict[str, list[Any]] = {}
    for family in text_string_to_metric_families(answer.text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        for sample in family.samples:
            labels = ",".join(sorted(set(sample.labels) - {"le"}))
            found.setdefault(f"{name}{{{labels}}}" if labels else name, []).append(sample)
    return found


async def test_the_watchdog_exports_every_metric_of_the_system_under_its_name(
    watchdog_page: httpx.AsyncClient,
) -> None:
    assert WATCHDOG_METRICS - (await samples(watchdog_page)).keys() == set()


async def test_the_api_exports_every_metric_of_requests_under_its_name(used: Desk) -> None:
    assert API_METRICS - (await samples(used.client)).keys() == set()


async def test_the_api_exports_no_metric_of_the_system_that_it_cannot_know(used: Desk) -> None:
    assert WATCHDOG_METRICS & (await samples(used.client)).keys() == set()


async def test_every_name_is_ours_and_total_marks_counters_only(used: Desk, watchdog_page: httpx.AsyncClient) -> None:
    for client in (used.client, watchdog_page):
        text = (await client.get("/metrics")).text
        for family in text_string_to_metric_families(text):
            assert family.name.startswith("plimsoll_")
            assert family.documentation
            assert family.type == "counter" or not family.name.endswith("_total")
            assert not any("account_id" in sample.labels for sample in family.samples)


async def test_the_gauges_say_what_the_report_says(used: Desk, watchdog_page: httpx.AsyncClient) -> None:
    await used.sweep("44000.12345678")
    totals = (await used.report())["totals"]
    found = await samples(watchdog_page)
    for gauge, name in (
        ("plimsoll_equity_usdt", "equity"),
        ("plimsoll_used_margin_usdt", "used_margin"),
        ("plimsoll_maintenance_margin_usdt", "maintenance_margin"),
    ):
        assert found[gauge][0].value == pytest.approx(float(totals[name]), rel=1e-12)
    assert {sample.labels["state"]: sample.value for sample in found["plimsoll_accounts{state}"]} == totals["accounts"]
    assert found["plimsoll_mark_price{symbol}"][0].value == 44000.12345678
    values = {
        name: found[name][0].value
        for name in ("plimsoll_candidates", "plimsoll_open_breaches", "plimsoll_overdue_candidates")
    }
    assert values == {
        "plimsoll_candidates": 1,
        "plimsoll_open_breaches": 1,
        "plimsoll_overdue_candidates": 0,
    }


async def test_the_counters_of_history_count_its_rows(used: Desk, watchdog_page: httpx.AsyncClient) -> None:
    found = await samples(watchdog_page)
    assert found["plimsoll_liquidations_total"][0].value == len(await used.rows("liquidations"))
    assert found["plimsoll_recoveries_total"][0].value == len(await used.rows("recoveries"))


async def test_the_api_counts_trades_by_side_and_outcome_and_refusals_by_code(used: Desk) -> None:
    found = await samples(used.client)
    trades = {
        (sample.labels["side"], sample.labels["outcome"]): sample.value
        for sample in found["plimsoll_trades_total{outcome,side}"]
    }
    assert trades["sell", "booked"] >= 1
    assert trades["buy", "booked"] >= 1
    assert trades["buy", "refused"] >= 1
    codes = {sample.labels["code"]: sample.value for sample in found["plimsoll_refusals_total{code}"]}
    assert codes["insufficient_initial_margin"] >= 1


async def test_requests_are_timed_by_route_and_never_by_path(used: Desk) -> None:
    await used.account("alice")
    await used.client.get("/positions/nobody-at-all")
    await used.client.get("/no/such/path")
    found = await samples(used.client)
    routes = {sample.labels["route"] for sample in found["plimsoll_http_request_duration_seconds{method,route,status}"]}
    assert {"/trade", "/positions/{account_id}"} <= routes
    assert not any("nobody" in route or "such" in route or "alice" in route for route in routes)


@pytest.mark.parametrize(
    "path", ["/", "/metric", "/metrics/more", "/health", "/health/", "/trade", "/docs", "/nothing"]
)
async def test_the_watchdog_answers_404_to_any_path_it_does_not_serve(
    watchdog_page: httpx.AsyncClient, path: str
) -> None:
    assert (await watchdog_page.get(path, follow_redirects=True)).status_code == 404


async def test_both_processes_are_live_and_ready(used: Desk, watchdog_page: httpx.AsyncClient) -> None:
    version = await used.sweep("44000.12345678")
    for client in (used.client, watchdog_page):
        assert expect(await client.get("/health/live"), 200)["status"] == "live"
        ready = expect(await client.get("/health/ready"), 200)
        assert (ready["status"], ready["missing"]) == ("ready", [])
        assert (ready["mark_version"], ready["swept_version"]) == (version, version)


async def test_the_report_of_a_system_that_sweeps_warns_of_nothing(used: Desk) -> None:
    report = await used.report()
    assert report["warning"] is None
    assert report["swept_age_seconds"] < 3


async def test_the_root_leads_to_the_documentation(used: Desk) -> None:
    answer = await used.client.get("/", follow_redirects=True)
    assert (answer.status_code, answer.url.path) == (200, "/docs")


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
async def test_the_documentation_refers_to_this_server_only_and_all_it_refers_to_is_there(
    used: Desk, page: str
) -> None:
    html = (await used.client.get(page)).text
    links = re.findall(r"""(?:src|href)=["']([^"']+)["']""", html)
    # Code runs offline as well: no other host is named anywhere in the page.
    assert re.findall(r"https?://[^\s\"'<>]+", html) == []
    assert len(links) >= 2
    for link in links:
        answer = await used.client.get(link)
        assert answer.status_code == 200, link
        assert len(answer.content) > 0


def examples(document: dict[str, Any]) -> dict[str, Any]:
    """The example body of each POST in the OpenAPI document."""
    found = {}
    for path, methods in document["paths"].items():
        if "post" in methods:
            schema = methods["post"]["requestBody"]["content"]["application/json"]["schema"]
            name = schema["$ref"].rpartition("/")[2]
            found[path] = document["components"]["schemas"][name]["example"]
    return found


async def test_the_examples_of_the_documentation_work_when_sent(used: Desk) -> None:
    document = expect(await used.client.get("/openapi.json"), 200)
    bodies = examples(document)
    order = ["/mark-price", "/accounts/{account_id}/deposit", "/trade", "/accounts/{account_id}/withdraw"]
    order += ["/halt", "/resume"]
    assert sorted(order) == sorted(bodies)
    for path in order:
        parameters = {
            parameter["name"]: parameter["schema"].get("examples", [None])[0] or parameter.get("example")
            for parameter in document["paths"][path]["post"].get("parameters", [])
        }
        answer = await used.client.post(path.format(**parameters), json=bodies[path])
        assert answer.is_success, f"{path}: {answer.text}"
    await used.mark("44000.12345678")


def numbers_that_are_no_text(document: Any, name: str = "") -> list[str]:  # noqa: ANN401 - JSON
    """The members of an answer whose value is a JSON number and neither a count nor an age."""
    if isinstance(document, dict):
        return [
            found
            for key, value in document.items()
            for found in numbers_that_are_no_text(value, "mark_age" if name == "mark_age_seconds" else key)
        ]
    if isinstance(document, list):
        return [found for item in document for found in numbers_that_are_no_text(item, name)]
    if isinstance(document, int | float) and not isinstance(document, bool):
        return [] if name in COUNTS_AND_AGES or name == "mark_age" else [f"{name}: {document}"]
    if isinstance(document, str):
        try:
            Decimal(document)
        except ArithmeticError:
            return []
        return [] if PLAIN.fullmatch(document) else [f"{name}: {document}"]
    return []


async def test_decimals_in_answers_are_strings_in_plain_notation(used: Desk) -> None:
    account = used.new_account()
    await used.mark("0.00000001")
    answers: list[Any] = [
        await used.deposit(account, "39999999999.99999999"),
        expect(await used.transfer("withdraw", account, "1E+2"), 201),
    ]
    await used.mark("44000")
    answers += [
        await used.buy(account, "0.000001", "44000"),
        await used.sell(account, "3", "44000"),
        expect(await used.trade(account, "sell", "1000", "44000"), 409),
        await used.account(account),
        await used.account("alice"),
        await used.report(),
        *[await used.rows(route) for route in ("trades", "transfers", "liquidations", "recoveries")],
    ]
    assert numbers_that_are_no_text(answers) == []
