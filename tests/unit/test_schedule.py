"""The timer follows the wall clock, and the guard does not: a sweep comes although the clock was set back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
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
    """Stands in for a sweeper: each sweep takes no time, unless held up, and is counted by what asked for it."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.running = False
        self.last_sign_of_life = time.monotonic()
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def request(self, trigger: str) -> None:
        self.requests[trigger] += 1
        await self.may_end.wait()
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


@contextlib.asynccontextmanager
async def timer(sweeper: SweeperThatCounts, step: Callable[[], Awaitable[None]] = nothing) -> AsyncIterator[None]:
    """The timer and what follows its sweeps, running."""
    after_sweep = schedule.AfterSweep(step)
    following = asyncio.create_task(after_sweep.run())
    scheduler = schedule.start_timer(after_sweep, as_sweeper(sweeper), interval_seconds=INTERVAL_SECONDS)
    try:
        yield
    finally:
        scheduler.shutdown(wait=False)
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following


def late(reason: str) -> float:
    return metrics.REGISTRY.get_sample_value("plimsoll_sweeps_late_total", {"reason": reason}) or 0.0


async def test_the_timer_asks_for_a_sweep_every_interval_and_does_what_comes_after(sweeper: SweeperThatCounts) -> None:
    after: list[int] = []

    async def note() -> None:
        after.append(sweeper.requests["timer"])

    async with timer(sweeper, note):
        await sweeper.wait_for("timer", 4)
    assert after[:2] == [1, 2]


async def test_the_timer_never_runs_two_sweeps_at_once_and_counts_what_it_skipped(sweeper: SweeperThatCounts) -> None:
    sweeper.may_end.clear()
    busy_before = late("busy")
    async with timer(sweeper):
        await sweeper.wait_for("timer", 1)
        async with asyncio.timeout(10):
            while late("busy") < busy_before + 2:
                await asyncio.sleep(0.005)
        assert sweeper.requests["timer"] == 1
        sweeper.may_end.set()
        await sweeper.wait_for("timer", 2)


async def test_no_sweep_waits_for_what_follows_the_one_before(sweeper: SweeperThatCounts) -> None:
    """An audit took up to five seconds where the machine was busy; the timer skipped its sweeps meanwhile."""
    begun: list[int] = []
    may_end = asyncio.Event()

    async def audit() -> None:
        begun.append(sweeper.requests["timer"])
        await may_end.wait()

    busy_before = late("busy")
    async with timer(sweeper, audit):
        await sweeper.wait_for("timer", 5)
        assert begun == [1]
        assert late("busy") == busy_before
        # It begins again after a sweep that follows its end, not for each of those that came meanwhile.
        may_end.set()
        ended_at = sweeper.requests["timer"]
        await sweeper.wait_for("timer", ended_at + 3)
    assert begun[1] == ended_at + 1


async def test_what_follows_a_sweep_may_fail_and_is_done_again_after_the_next(sweeper: SweeperThatCounts) -> None:
    tries: list[int] = []

    async def fail() -> None:
        tries.append(sweeper.requests["timer"])
        raise RuntimeError("a mistake")

    async with timer(sweeper, fail):
        await sweeper.wait_for("timer", 4)
    assert tries[:2] == [1, 2]


async def test_after_the_clock_was_set_back_the_guard_asks_for_the_sweeps_that_the_timer_misses(
    sweeper: SweeperThatCounts,
) -> None:
    """APScheduler waits until the wall clock has caught up; the guard looks at the loop's clock, which no one sets."""
    guarded_before = late("guard")
    with freezegun.freeze_time(NOON, tick=True, real_asyncio=True, ignore=["watchdog"]) as clock:
        async with timer(sweeper):
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
