"""An API that is told to stop: first not ready, still answering on every connection, and only then gone."""

from __future__ import annotations

import asyncio
import signal
import time

import httpx

from tests.conftest import SystemFactory
from tests.harness import Process

DRAIN_SECONDS = 1.5
DEPOSIT = "/accounts/alice/deposit"


async def until_not_ready(api: Process) -> list[str]:
    """What is missing, as a load balancer is told, which opens a connection for each look."""
    while True:
        async with httpx.AsyncClient(base_url=api.url, trust_env=False) as balancer:
            answer = await balancer.get("/health/ready")
        if answer.status_code == 503:
            return list(answer.json()["missing"])
        await asyncio.sleep(0.02)


async def test_connections_old_and_new_are_answered_until_it_stops(system: SystemFactory) -> None:
    running = await system(watchdogs=0, drain_seconds=str(DRAIN_SECONDS))
    (api,) = running.apis
    first = await running.client.post(DEPOSIT, json={"amount": "1"})
    assert "connection" not in first.headers
    told = time.monotonic()
    api.send_signal(signal.SIGTERM)
    assert await until_not_ready(api) == ["draining"]
    kept = await running.client.post(DEPOSIT, json={"amount": "2"})
    assert (kept.status_code, kept.headers["connection"]) == (201, "close")
    new = await running.client.post(DEPOSIT, json={"amount": "4"})
    assert (new.status_code, new.json()["balance"], new.headers["connection"]) == (201, "7", "close")
    assert api.wait() == 0
    assert time.monotonic() - told >= DRAIN_SECONDS


async def test_a_second_signal_does_not_wait(system: SystemFactory) -> None:
    running = await system(watchdogs=0, drain_seconds="60")
    (api,) = running.apis
    api.send_signal(signal.SIGTERM)
    await until_not_ready(api)
    assert api.terminate() == 0


async def test_each_of_several_workers_drains(system: SystemFactory) -> None:
    running = await system(watchdogs=0, api_workers=2, drain_seconds=str(DRAIN_SECONDS))
    (api,) = running.apis
    async with httpx.AsyncClient(base_url=api.url, trust_env=False) as client:
        await client.post(DEPOSIT, json={"amount": "1"})
        api.send_signal(signal.SIGTERM)
        await until_not_ready(api)
        assert (await client.post(DEPOSIT, json={"amount": "2"})).json()["balance"] == "3"
    assert api.wait() == 0
