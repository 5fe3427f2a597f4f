"""The timer's trigger: on the interval while the clock is steady, and one step from any clock to the next run."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from apscheduler.schedulers.asyncio import AsyncIOScheduler

from watchdog.schedule import NextInterval

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
TRIGGER = NextInterval(seconds=2, timezone=UTC)


@pytest.mark.parametrize(
    ("late", "expected"),
    [
        (timedelta(), timedelta(seconds=2)),
        (timedelta(seconds=1.999), timedelta(seconds=2)),
        (timedelta(seconds=2), timedelta(seconds=4)),
        (timedelta(seconds=-60), timedelta(seconds=2)),
        (timedelta(days=365), timedelta(days=365, seconds=2)),
    ],
)
def test_the_next_run_is_the_first_whole_interval_that_has_not_passed(late: timedelta, expected: timedelta) -> None:
    assert TRIGGER.get_next_fire_time(NOON, NOON + late) == NOON + expected


def test_a_clock_that_jumps_a_year_has_missed_one_run_and_not_fifteen_million() -> None:
    job = AsyncIOScheduler(timezone="UTC").add_job(print, TRIGGER)
    job.next_run_time = NOON
    assert job._get_run_times(NOON + timedelta(days=365)) == [NOON]
