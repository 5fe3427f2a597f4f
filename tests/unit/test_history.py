"""Rows of history on their way to Postgres: exact times, and what the script stamped."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone

import freezegun
import pytest

from app.database import format_timestamp
from app.history import HistoryEntry, timestamp_of
from tests.unit.cast import NOON_US


@pytest.mark.parametrize(
    ("time_us", "text"),
    [
        (NOON_US - 1, "2026-01-01T11:59:59.999999Z"),
        (NOON_US, "2026-01-01T12:00:00.000000Z"),
        (NOON_US + 1, "2026-01-01T12:00:00.000001Z"),
        (0, "1970-01-01T00:00:00.000000Z"),
        # 2100-01-01T00:00:00.000001Z: as a float of seconds its last digit would be lost
        (4_102_444_800_000_001, "2100-01-01T00:00:00.000001Z"),
    ],
)
def test_a_time_keeps_each_microsecond(time_us: int, text: str) -> None:
    assert format_timestamp(timestamp_of(time_us)) == text


def test_a_time_is_shown_in_utc_whatever_its_zone() -> None:
    in_tokyo = datetime(2026, 1, 1, 21, tzinfo=timezone(timedelta(hours=9)))
    assert format_timestamp(in_tokyo) == "2026-01-01T12:00:00.000000Z"


def test_the_time_of_a_row_is_the_one_that_redis_stamped_and_not_this_machines() -> None:
    with freezegun.freeze_time("1999-12-31"):
        assert timestamp_of(NOON_US) == datetime(2026, 1, 1, 12, tzinfo=UTC)


def test_a_row_is_what_the_script_stamped_and_the_body_as_it_is() -> None:
    entry = HistoryEntry(
        id=41,
        kind="trade",
        account_id="alice",
        seq=3,
        epoch=2,
        time_us=NOON_US,
        body=b'{"price":"60000.10","quantity":"0.1"}',
    )
    assert json.loads(entry.row_json()) == {
        "id": 41,
        "account_id": "alice",
        "seq": 3,
        "epoch": 2,
        "timestamp": "2026-01-01T12:00:00.000000Z",
        "price": "60000.10",
        "quantity": "0.1",
    }
