"""F13, F14 and F15: messages are lost, or come in a flood, and sweeps take longer than their interval."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import psutil

from app import redis_client as keys
from app.redis_client import StateStore
from tests.faults.cell import Cell, until
from tests.faults.checker import check
from tests.faults.conftest import CellFactory
from tests.faults.journal import Row
from tests.faults.proxy import open_proxy
from tests.faults.watched import BREACHING_MARK, MARK, SteadyLoad, longest_gap, on_the_edge, recorded, sweeps

INTERVAL_SECONDS: Final = 1.0
RESUBSCRIBED_SECONDS_MAX: Final = 1.5
"""A second, and what a busy machine adds."""

ON_MARK: Final = 'plimsoll_sweeps_total{result="ok",trigger="mark"}'
ON_SUBSCRIBE: Final = 'plimsoll_sweeps_total{result="ok",trigger="subscribe"}'
MARKS_PER_SECOND: Final = 5_000
MARKS_PER_CALL: Final = 250
GROWTH_BYTES_MAX: Final = 24 * 2**20


async def _sweeps_at_rest(running: Cell, watchdog: str) -> float:
    """How many sweeps marks have caused, once those that were heard before are over."""
    count = -1.0
    while count != (count := await sweeps(running.http, watchdog, ON_MARK)):
        await asyncio.sleep(INTERVAL_SECONDS / 2)
    return count


async def test_a_breach_is_recorded_although_the_subscription_is_lost_or_every_message(
    cell: CellFactory, row: Callable[[str, str], Row], rounds: Callable[[int, int], int], seed: int
) -> None:
    result = row("F13", "the subscription, or every message, lost")
    running = await cell(apis=1)
    load = SteadyLoad(running, seed=seed, clients=4)
    await load.start()
    await load.acknowledged(100)
    async with open_proxy(unquote(urlsplit(running.stores.redis_url).path)) as proxy:
        watchdog = (await running.start("watchdog", redis_url=f"redis://127.0.0.1:{proxy.port}/0")).url
        for number in range(rounds(10, 3)):
            result.rounds += 1
            assert await load.set_mark(MARK)
            account = await on_the_edge(load)
            load.fault()
            if number % 2:
                proxy.become("deaf")
                before = await _sweeps_at_rest(running, watchdog)
                assert await load.set_mark(BREACHING_MARK)
            else:
                before = await sweeps(running.http, watchdog, ON_SUBSCRIBE)
                await running.client.client_kill_filter(_type="pubsub")
                killed = time.monotonic()
                assert await load.set_mark(BREACHING_MARK)
                await until(partial(_subscribed_again, running, watchdog, before), "no sweep after resubscribing")
                if time.monotonic() - killed > RESUBSCRIBED_SECONDS_MAX:
                    result.complain(f"the sweep after resubscribing came after {time.monotonic() - killed:.2f} s")
            result.recovered(await recorded(running, account))
            if number % 2 and await sweeps(running.http, watchdog, ON_MARK) != before:
                result.complain("a message got through: nothing was lost")
            proxy.become("pass")
        await load.set_mark(MARK)
        await load.stop()
        running.kill(running.watchdogs[0])
    if result.recovery_seconds > INTERVAL_SECONDS + 1:
        result.complain(f"a breach was recorded only after {result.recovery_seconds:.2f} s")
    await check(running, load, result)
    result.require_green()


async def _subscribed_again(running: Cell, watchdog: str, before: float) -> bool:
    return await sweeps(running.http, watchdog, ON_SUBSCRIBE) > before


async def test_in_a_flood_of_marks_the_newest_wins_and_is_swept_and_memory_is_flat(
    cell: CellFactory, row: Callable[[str, str], Row], rounds: Callable[[int, int], int], seed: int
) -> None:
    result = row("F14", "a flood of marks")
    running = await cell(apis=1, watchdogs=1)
    load = SteadyLoad(running, seed=seed, clients=2)
    await load.start()
    await load.acknowledged(100)
    account = await on_the_edge(load)
    watchdog = running.watchdogs[0]
    seconds = rounds(30, 4)
    result.rounds += 1
    load.fault()
    await _flood(running, 2.0, MARK)
    process = psutil.Process(watchdog.pid)
    before = process.memory_info().rss
    sent = await _flood(running, seconds, BREACHING_MARK)
    result.recovered(await recorded(running, account))
    grown = process.memory_info().rss - before
    version = int(await running.client.get(keys.MARK_VERSION) or 0)

    async def is_swept() -> bool:
        return int(await running.client.hget(keys.STATE_SWEPT, "version") or 0) >= version

    await until(is_swept, "the trailing mark is not swept", running.logs)
    assert await running.client.get(keys.mark_price_key("BTC-PERP")) == str(BREACHING_MARK).encode()
    result.what += f": {sent / seconds:,.0f}/s for {seconds} s, the watchdog grew by {grown / 2**20:.1f} MiB"
    if grown > GROWTH_BYTES_MAX:
        result.complain("the watchdog's memory is not flat")
    await load.set_mark(MARK)
    await load.stop()
    await check(running, load, result)
    result.require_green()


async def _flood(running: Cell, seconds: float, last: int) -> int:
    """Call the mark script ``MARKS_PER_SECOND`` times a second, as nobody else does; ``last`` is the last price."""
    store = StateStore(running.stores.redis_url, running.settings())
    client, symbol, sent, started = store.client, "BTC-PERP", 0, time.monotonic()
    await client.script_load(keys.MARK.text)
    while True:
        ending = time.monotonic() - started >= seconds
        price: Any
        accepted: Any
        price, (accepted, version) = (
            await client.get(keys.mark_price_key(symbol)),
            await client.hmget(keys.mark_key(symbol), "price", "version"),
        )
        number = int(version or 0)
        async with client.pipeline(transaction=False) as pipeline:
            for step in range(MARKS_PER_CALL):
                new = str(last if ending and step == MARKS_PER_CALL - 1 else MARK + step % 7).encode()
                pipeline.evalsha(
                    keys.MARK.sha,
                    5,
                    *(keys.STATE_EPOCH, keys.STATE_RUN_ID, keys.MARK_VERSION),
                    *(keys.mark_price_key(symbol), keys.mark_key(symbol)),
                    *(store.signature, symbol, price, accepted, number + step, new, keys.MARK_CHANNEL),
                )
                price = accepted = new
            answers = await pipeline.execute()
        assert all(answer[0] == b"ok" for answer in answers), answers[-1]
        sent += len(answers)
        if ending:
            await store.close()
            return sent
        await asyncio.sleep(max(0.0, started + sent / MARKS_PER_SECOND - time.monotonic()))


async def test_a_sweep_longer_than_its_interval_is_followed_at_once_and_counted(
    cell: CellFactory, row: Callable[[str, str], Row], rounds: Callable[[int, int], int], seed: int
) -> None:
    result = row("F15", "sweeps of 1.6 s, a loop blocked 2.5 s; interval 1 s")
    for effect, gap_max in (("sweep.slow=1.6", 2.4), ("loop.block=2.5@6", 4.0)):
        running = await cell(apis=1)
        watchdog = await running.start("watchdog", failpoints=effect)
        load = SteadyLoad(running, seed=seed, clients=2, name=effect.partition(".")[0])
        await load.start()
        await load.acknowledged(60)
        account = await on_the_edge(load)
        result.rounds += 1
        load.fault()
        gap = await longest_gap(running.http, watchdog.url, rounds(8, 6))
        late = await sweeps(running.http, watchdog.url, "plimsoll_sweeps_late_total{")
        if gap > gap_max:
            result.complain(f"{effect}: {gap:.2f} s without a sweep")
        if not late:
            result.complain(f"{effect}: nothing was counted late")
        assert await load.set_mark(BREACHING_MARK)
        result.recovered(await recorded(running, account))
        await load.set_mark(MARK)
        await load.stop()
        await check(running, load, result)
    result.require_green()
