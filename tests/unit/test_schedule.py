"""The timer follows the wall clock, and the guard does not: a sweep comes although the clock was set back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import cast

import freezegun
import pytest
from apscheduler.events import EVENT_JOB_MAX_INSTANCES, EVENT_JOB_MISSED, JobEvent

from watchdog import metrics, schedule
from watchdog.sweep import Sweeper

INTERVAL_SECONDS = 0.05
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


class SweeperThatCounts:
    """Stands in for a sweeper: each sweep takes no time and is counted by what asked for it."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.running = False
        self.last_sign_of_life = time.monotonic()

    async def request(self, trigger: str) -> None:
        self.requests[trigger] += 1
        self.last_sign_of_life = asyncio.get_running_loop().time()

    async def wait_for(self, trigger: str, count: int) -> None:
        """Wait until ``trigger`` has asked ``count`` times."""
        async with asyncio.timeout(10):
            while self.requests[trigger] < count:
                await asyncio.sleep(0.005)


@pytest.fixture
async def sweeper() -> SweeperThatCounts:
    return SweeperThatCounts()


def as_sweeper(stand_in: SweeperThatCounts) -> Sweeper:
    return cast("Sweeper", stand_in)


async def nothing() -> None:
    """What is done after a sweep, where a test does not care."""


def late(reason: str) -> float:
    return metrics.REGISTRY.get_sample_value("plimsoll_sweeps_late_total", {"reason": reason}) or 0.0


async def test_the_timer_asks_for_a_sweep_every_interval_and_does_what_comes_after(sweeper: SweeperThatCounts) -> None:
    after: list[int] = []

    async def note() -> None:
        after.append(sweeper.requests["timer"])

    scheduler = schedule.start_timer(note, as_sweeper(sweeper), interval_seconds=INTERVAL_SECONDS)
    try:
        await sweeper.wait_for("timer", 3)
    finally:
        scheduler.shutdown(wait=False)
    assert after[:2] == [1, 2]


async def test_the_timer_never_runs_two_sweeps_at_once_and_counts_what_it_skipped(sweeper: SweeperThatCounts) -> None:
    release = asyncio.Event()
    busy_before = late("busy")
    scheduler = schedule.start_timer(release.wait, as_sweeper(sweeper), interval_seconds=INTERVAL_SECONDS)  # type: ignore[arg-type]
    try:
        await sweeper.wait_for("timer", 1)
        async with asyncio.timeout(10):
            while late("busy") < busy_before + 2:
                await asyncio.sleep(0.005)
        assert sweeper.requests["timer"] == 1
        release.set()
        await sweeper.wait_for("timer", 2)
    finally:
        scheduler.shutdown(wait=False)


async def test_after_the_clock_was_set_back_the_guard_asks_for_the_sweeps_that_the_timer_misses(
    sweeper: SweeperThatCounts,
) -> None:
    """APScheduler waits until the wall clock has caught up; the guard looks at the loop's clock, which no one sets."""
    guarded_before = late("guard")
    with freezegun.freeze_time(NOON, tick=True, real_asyncio=True, ignore=["watchdog"]) as clock:
        scheduler = schedule.start_timer(nothing, as_sweeper(sweeper), interval_seconds=INTERVAL_SECONDS)
        watching = asyncio.create_task(schedule.guard(as_sweeper(sweeper), interval_seconds=INTERVAL_SECONDS))
        try:
            await sweeper.wait_for("timer", 3)
            clock.move_to(NOON - timedelta(seconds=60))
            before = sweeper.requests.copy()
            await sweeper.wait_for("guard", before["guard"] + 3)
            # One run may have been under way when the clock was set back.
            assert sweeper.requests["timer"] <= before["timer"] + 1
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
            scheduler.shutdown(wait=False)
    assert late("guard") - guarded_before >= 3


async def test_the_guard_is_silent_while_sweeps_come(sweeper: SweeperThatCounts) -> None:
    watching = asyncio.create_task(schedule.guard(as_sweeper(sweeper), interval_seconds=2))
    for _ in range(30):
        await asyncio.sleep(0.02)
        await sweeper.request("timer")
    watching.cancel()
    assert sweeper.requests["guard"] == 0


async def test_the_guard_leaves_a_sweep_that_is_running_alone(sweeper: SweeperThatCounts) -> None:
    sweeper.running = True
    watching = asyncio.create_task(schedule.guard(as_sweeper(sweeper), interval_seconds=INTERVAL_SECONDS))
    await asyncio.sleep(5 * INTERVAL_SECONDS)
    assert sweeper.requests["guard"] == 0
    sweeper.running = False
    await sweeper.wait_for("guard", 1)
    watching.cancel()


@pytest.mark.parametrize(("code", "reason"), [(EVENT_JOB_MAX_INSTANCES, "busy"), (EVENT_JOB_MISSED, "missed")])
def test_a_run_that_was_skipped_is_counted_by_its_reason(code: int, reason: str) -> None:
    before = late(reason)
    schedule._count_skipped(JobEvent(code, "sweep", "default"))
    assert late(reason) == before + 1
