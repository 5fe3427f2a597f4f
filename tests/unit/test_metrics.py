"""The metrics: the names that are fixed, their units and labels, and the heartbeat."""

from __future__ import annotations

import re
import shutil
import subprocess
from datetime import UTC, datetime
from decimal import Decimal

import freezegun
import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

import app.metrics
import watchdog.metrics
from app.columns import INT64, Chunk, Marks, Totals
from app.contracts import BTC_PERP
from app.numbers import UNITS_PER_ONE
from tests.metrics_document import DOCUMENT, exported, replaced
from tests.unit.cast import BTC, NOON_US
from watchdog.metrics import MARGIN_RATIO_BANDS as BANDS
from watchdog.sweep import Swept

FIXED_FROM_THE_FIRST_DAY = {
    "plimsoll_accounts": {"state"},
    "plimsoll_candidates": set(),
    "plimsoll_open_breaches": set(),
    "plimsoll_liquidations_total": set(),
    "plimsoll_recoveries_total": set(),
    "plimsoll_equity_usdt": set(),
    "plimsoll_used_margin_usdt": set(),
    "plimsoll_maintenance_margin_usdt": set(),
    "plimsoll_mark_price": {"symbol"},
    "plimsoll_mark_price_timestamp_seconds": {"symbol"},
    "plimsoll_sweeps_total": {"trigger", "result"},
    "plimsoll_sweep_duration_seconds": set(),
    "plimsoll_sweep_last_success_timestamp_seconds": set(),
    "plimsoll_mark_to_record_seconds": set(),
    "plimsoll_overdue_candidates": set(),
    "plimsoll_outbox_entries": set(),
    "plimsoll_outbox_oldest_age_seconds": set(),
    "plimsoll_trades_total": {"side", "outcome"},
    "plimsoll_refusals_total": {"code"},
    "plimsoll_http_request_duration_seconds": {"route", "method", "status"},
}


def counted(liquidations: int | None, recoveries: int | None) -> list[Metric]:
    counters = watchdog.metrics.RedisCounters()
    counters.liquidations, counters.recoveries = liquidations, recoveries
    return list(counters.collect())


def test_every_name_that_is_fixed_is_exported_with_its_labels() -> None:
    labels = {name: set(metric.labels) for name, metric in exported().items()}
    assert {name: labels.get(name) for name in FIXED_FROM_THE_FIRST_DAY} == FIXED_FROM_THE_FIRST_DAY


def test_every_metric_that_is_exported_is_documented_and_no_other() -> None:
    if not DOCUMENT.exists():
        pytest.skip("not a whole checkout")
    document = DOCUMENT.read_text(encoding="utf-8")
    assert document == replaced(document), "make metrics-table writes the table again"


def test_promtool_finds_nothing_to_say_of_the_watchdogs_page() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    page = generate_latest(watchdog.metrics.REGISTRY) + generate_latest(app.metrics.REGISTRY)
    checked = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


def test_names_say_their_unit_and_only_counters_end_in_total() -> None:
    for registry in (app.metrics.REGISTRY, watchdog.metrics.REGISTRY):
        for metric in registry.collect():
            assert re.fullmatch(r"plimsoll_[a-z_]+", metric.name)
            assert not metric.name.endswith("_total")  # the exposition adds it, to counters
            assert metric.documentation.endswith(".")


def test_no_account_is_ever_a_label() -> None:
    assert {label for metric in exported().values() for label in metric.labels} == {
        "state", "band", "symbol", "trigger", "result", "side", "outcome", "code", "route", "method", "status",
        "reason", "invariant",
    }  # fmt: skip


def test_the_counters_of_history_are_absent_until_they_were_read() -> None:
    assert counted(None, None) == []
    assert [sample.value for metric in counted(5, 0) for sample in metric.samples] == [5, 0]


def test_the_counters_of_history_are_counters_in_the_exposition() -> None:
    registry = CollectorRegistry()
    counters = watchdog.metrics.RedisCounters()
    counters.liquidations, counters.recoveries = 5, 3
    registry.register(counters)
    values = {sample.name: (metric.type, sample.value) for metric in registry.collect() for sample in metric.samples}
    assert values == {"plimsoll_liquidations_total": ("counter", 5), "plimsoll_recoveries_total": ("counter", 3)}


def test_the_exposition_can_be_parsed_and_holds_no_creation_times() -> None:
    text = app.metrics.exposition().decode()
    assert [family.name for family in text_string_to_metric_families(text)]
    assert "_created" not in text


def value_of(name: str, **labels: str) -> float | None:
    return watchdog.metrics.REGISTRY.get_sample_value(name, labels)


def test_the_gauges_show_what_a_sweep_found_and_when() -> None:
    swept = Swept(
        version=7,
        marks=Marks(prices={BTC: Decimal("48000.5")}, timestamps_us={BTC: NOON_US}, version=7, by_hand=()),
        accounts=10,
        states={"ok": 5, "candidate": 2, "recovering": 1, "negative_equity": 1, "quarantined": 1},
        open_breaches=3,
        overdue=1,
        totals=Totals(
            equity=Decimal("62995.25"),
            used_margin=Decimal(63_600),
            maintenance_margin=Decimal(31_800),
            long_notional=Decimal(0),
            short_notional=Decimal(0),
        ),
        chunks=[],
        quarantined={},
    )
    a_second_past_noon = datetime(2026, 1, 1, 12, 0, 1, tzinfo=UTC)
    with freezegun.freeze_time(a_second_past_noon):
        watchdog.metrics.show(swept)
    assert value_of("plimsoll_sweep_last_success_timestamp_seconds") == a_second_past_noon.timestamp()
    assert value_of("plimsoll_mark_price_timestamp_seconds", symbol=BTC) == NOON_US / 1_000_000
    assert value_of("plimsoll_mark_price", symbol=BTC) == 48_000.5
    assert value_of("plimsoll_candidates") == 2
    assert value_of("plimsoll_accounts", state="candidate") == 2
    assert value_of("plimsoll_accounts", state="negative_equity") == 1
    assert value_of("plimsoll_open_breaches") == 3
    assert value_of("plimsoll_overdue_candidates") == 1
    assert value_of("plimsoll_equity_usdt") == 62_995.25
    assert value_of("plimsoll_used_margin_usdt") == 63_600
    assert value_of("plimsoll_maintenance_margin_usdt") == 31_800


def test_the_bands_count_the_accounts_with_a_position_by_margin_ratio() -> None:
    # Each but the last two is long 1 BTC from 50,000, at 50,000: the maintenance margin is 5,000, equity the balance.
    balances = [40_000, 20_000, 19_999, 5_000, 4_999, -1, 40_000, 1_000]
    quantities = [1, 1, 1, 1, 1, 1, 1, 0]  # the seventh is in quarantine, the eighth is flat

    def column(values: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.array([value * UNITS_PER_ONE for value in values], dtype=INT64)

    chunk = Chunk(
        first_slot=0,
        balance=column(balances),
        breach=column([0] * 8),
        quantity={BTC: column(quantities)},
        cost={BTC: column([50_000 * quantity for quantity in quantities])},
        marks=Marks(prices={BTC: Decimal(50_000)}, timestamps_us={BTC: NOON_US}, version=1, by_hand=()),
    )
    swept = Swept(
        version=1,
        marks=chunk.marks,
        accounts=7,
        states={},
        open_breaches=0,
        overdue=0,
        totals=Totals(Decimal(0), Decimal(0), Decimal(0), Decimal(0), Decimal(0)),
        chunks=[chunk],
        quarantined={6: "quinn"},
    )
    watchdog.metrics.show_bands(swept, {BTC: BTC_PERP})
    shown = {band: value_of("plimsoll_margin_ratio_accounts", band=band) for band in (*BANDS, "above_1")}
    # 0.125 and 0.25; 0.25001; none; 1; 1.0002 and the negative one
    assert shown == {"0-0.25": 2, "0.25-0.5": 1, "0.5-0.75": 0, "0.75-1": 1, "above_1": 2}
