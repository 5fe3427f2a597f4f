"""What real processes write to their logs: one JSON line an event, with the request and the account in it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis.asyncio

from app.request_meter import is_request_id
from tests.conftest import SystemFactory
from tests.harness import Process, environment, free_port

BUY = {"account_id": "alice", "symbol": "BTC-PERP", "side": "buy", "quantity": "0.5", "price": "60000"}


def lines(process: Process) -> list[dict[str, Any]]:
    """Every line of a process's log. One that is not a JSON object fails the test."""
    return [json.loads(line) for line in process.log.read_text().splitlines()]


def of_request(process: Process, request_id: str) -> list[dict[str, Any]]:
    """The lines of one request. Its last is written after its answer is sent: only a stopped process has them all."""
    return [line for line in lines(process) if line.get("request_id") == request_id]


async def test_a_refusal_is_one_line_with_its_request_account_and_code_and_a_success_none(
    system: SystemFactory,
) -> None:
    running = await system(watchdogs=0)
    done = await running.client.post("/accounts/alice/deposit", json={"amount": "5"})
    await running.client.post("/mark-price", json={"symbol": "BTC-PERP", "price": "60000"})
    refused = await running.client.post("/trade", json=BUY, headers={"X-Request-ID": "order-17.a"})
    assert refused.headers["X-Request-ID"] == "order-17.a"
    await running.stop()
    assert of_request(running.apis[0], done.headers["X-Request-ID"]) == []
    (line,) = of_request(running.apis[0], "order-17.a")
    assert {name: line[name] for name in ("event", "level", "process", "method", "route", "status")} == {
        "event": "request", "level": "info", "process": "api", "method": "POST", "route": "/trade", "status": 409,
    }  # fmt: skip
    assert (line["account_id"], line["code"]) == ("alice", refused.json()["code"])
    assert 0 < line["milliseconds"] < 60_000


@pytest.mark.parametrize("access_log", ["all", "off"])
async def test_how_many_lines_requests_get_is_a_setting(access_log: str, system: SystemFactory) -> None:
    running = await system(watchdogs=0, access_log=access_log)
    done = await running.client.post("/accounts/alice/deposit", json={"amount": "5"})
    missing = await running.client.get("/positions/nobody")
    await running.stop()
    told = {
        answer.status_code: [line["account_id"] for line in of_request(running.apis[0], answer.headers["X-Request-ID"])]
        for answer in (done, missing)
    }
    expected = {"all": {201: ["alice"], 404: ["nobody"]}, "off": {201: [], 404: []}}
    assert told == expected[access_log]


async def test_a_request_id_that_could_forge_a_line_is_replaced(system: SystemFactory) -> None:
    running = await system(watchdogs=0)
    every_made = []
    for sent in ("two words", "x" * 65, 'a"b', "", "{id}"):
        answer = await running.client.get("/positions/nobody", headers={"X-Request-ID": sent})
        made = answer.headers["X-Request-ID"]
        assert made != sent
        assert is_request_id(made)
        every_made.append(made)
    await running.stop()
    assert [len(of_request(running.apis[0], made)) for made in every_made] == [1] * len(every_made)


async def test_a_line_from_deep_inside_carries_the_request_and_the_account(
    system: SystemFactory, redis_client: redis.asyncio.Redis
) -> None:
    running = await system(watchdogs=0)
    await running.client.post("/accounts/alice/deposit", json={"amount": "5"})
    await redis_client.set("account:alice:balance", "7")
    await running.client.post("/accounts/alice/deposit", json={"amount": "1"}, headers={"X-Request-ID": "by-hand"})
    await running.stop()
    adopted = [line for line in of_request(running.apis[0], "by-hand") if line["event"] == "adopted an edit by hand"]
    assert [line["account_id"] for line in adopted] == ["alice"]


async def test_a_store_that_does_not_answer_is_one_line_that_says_why(
    system: SystemFactory, postgres: asyncpg.Connection
) -> None:
    running = await system(watchdogs=0)
    await postgres.execute("ALTER TABLE trades RENAME TO gone")
    failed = await running.client.get("/trades?account_id=alice")
    assert failed.status_code == 503
    await running.stop()
    (line,) = of_request(running.apis[0], failed.headers["X-Request-ID"])
    assert (line["level"], line["status"], line["code"]) == ("warning", 503, "store_unavailable")
    assert line["account_id"] == "alice"
    assert '"trades" does not exist' in line["error"]


async def test_the_logs_of_both_processes_are_json_from_the_first_line_to_the_last(system: SystemFactory) -> None:
    running = await system(api_workers=2)
    await running.stop()
    for process in (*running.apis, *running.watchdogs):
        written = lines(process)
        assert written
        assert all({"event", "level", "process", "timestamp"} <= set(line) for line in written)


def refusal(command: list[str], variables: Mapping[str, str]) -> tuple[int, dict[str, Any]]:
    """The exit code of a process that does not start, and its only line at the level of an error or above."""
    finished = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=variables)
    said = [json.loads(line) for line in finished.stderr.splitlines()]
    (line,) = [line for line in said if line["level"] in {"error", "critical"}]
    assert finished.stdout == ""
    return finished.returncode, line


async def test_a_redis_that_would_lose_state_is_one_line_and_an_exit_code(
    system: SystemFactory, redis_client: redis.asyncio.Redis
) -> None:
    running = await system(api_workers=0, watchdogs=0)
    variables = running.environment(api_port=str(free_port()), watchdog_port=str(free_port()))
    await redis_client.config_set("appendonly", "no")
    try:
        refused = {
            process: await asyncio.to_thread(refusal, [sys.executable, "-m", "app.cli", process], variables)
            for process in ("api", "watchdog")
        }
    finally:
        await redis_client.config_set("appendonly", "yes")
    for process, (exit_code, line) in refused.items():
        assert exit_code != 0
        assert (line["event"], line["process"]) == ("the process does not start", process)
        assert line["code"] == "unsafe_redis"
        assert "appendonly is not yes" in line["reason"]


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "watchdog"],
        [str(Path(sys.executable).parent / "uvicorn"), "app.main:app", "--port", "0", "--log-level", "warning"],
    ],
    ids=["watchdog", "uvicorn"],
)
def test_a_contract_that_cannot_be_is_named_in_one_line(command: list[str]) -> None:
    contracts = json.dumps([{"symbol": "BTC-PERP", "price_band": "0.2"}])
    exit_code, line = refusal(command, environment({"PLIMSOLL_CONTRACTS": contracts}))
    assert exit_code != 0
    assert "PLIMSOLL_CONTRACTS" in line["reason"]


async def test_a_port_in_use_is_one_line(system: SystemFactory) -> None:
    running = await system(watchdogs=0)
    variables = running.environment(api_port=running.apis[0].url.rpartition(":")[2])
    exit_code, line = await asyncio.to_thread(refusal, [sys.executable, "-m", "app.cli", "api"], variables)
    assert exit_code != 0
    assert "address already in use" in line["event"]
