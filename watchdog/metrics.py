"""What the watchdog exports, and its own page for Prometheus and for whoever supervises it.

System-wide metrics are true of the system whichever of several watchdogs exports them, and are queried with ``max``.
The two counters of history live in Redis, counted by the script that records: neither a restart nor a first scrape
hides a burst.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from app.columns import SCREEN_BLOCK_ROWS, value_rows
from app.config import Settings
from app.contracts import Contract
from app.metrics import LATENCY_BUCKETS_SECONDS

if TYPE_CHECKING:
    from watchdog.sweep import Swept

REGISTRY: Final = CollectorRegistry()


SYSTEM_WIDE: Final = {"plimsoll_liquidations_total", "plimsoll_recoveries_total"}
"""The names of the metrics that are true of the system, whichever watchdog exports them."""


def _gauge(name: str, documentation: str, labels: tuple[str, ...] = ()) -> Gauge:
    """A gauge that is true of the system."""
    SYSTEM_WIDE.add(f"plimsoll_{name}")
    return Gauge(f"plimsoll_{name}", documentation, labels, registry=REGISTRY)


def _own_gauge(name: str, documentation: str) -> Gauge:
    """A gauge that tells of this watchdog alone."""
    return Gauge(f"plimsoll_{name}", documentation, registry=REGISTRY)


ACCOUNTS: Final = _gauge(
    "accounts",
    "Accounts in each state: ok, candidate, recovering, negative_equity, quarantined.",
    ("state",),
)
MARGIN_RATIO_ACCOUNTS: Final = _gauge(
    "margin_ratio_accounts",
    "Accounts with an open position by margin ratio, each band with its upper end; equity of zero or less is above_1.",
    ("band",),
)
CANDIDATES: Final = _gauge("candidates", "Accounts with an open position and equity below maintenance margin.")
OPEN_BREACHES: Final = _gauge("open_breaches", "Breaches that have not ended.")
EQUITY: Final = _gauge("equity_usdt", "Equity of all accounts.")
USED_MARGIN: Final = _gauge("used_margin_usdt", "Used margin of all accounts.")
MAINTENANCE_MARGIN: Final = _gauge("maintenance_margin_usdt", "Maintenance margin of all accounts.")
MARK_PRICE: Final = _gauge("mark_price", "The mark price in USDT.", ("symbol",))
MARK_TIMESTAMP: Final = _gauge("mark_price_timestamp_seconds", "When the mark was accepted, Unix time.", ("symbol",))
MARK_AGE_MAX: Final = _gauge(
    "mark_max_age_seconds", "PLIMSOLL_MARK_MAX_AGE_SECONDS: the age beyond which a mark is stale; +Inf where it is off."
)
OVERDUE: Final = _gauge("overdue_candidates", "Candidates whose breach the last sweep could not record.")
SWEEP_LAST_SUCCESS: Final = _own_gauge(
    "sweep_last_success_timestamp_seconds", "When a sweep last succeeded, Unix time; 0 before the first."
)
SWEEP_INTERVAL: Final = _own_gauge("sweep_interval_seconds", "PLIMSOLL_SWEEP_INTERVAL_SECONDS of this watchdog.")
STATE_WRITABLE: Final = _own_gauge(
    "state_writable", "1 while this watchdog's last sweep could write to Redis, 0 while it could not."
)
HALTED: Final = _gauge("halted", "1 while trading is halted, else 0.")
OUTBOX_ENTRIES: Final = _gauge("outbox_entries", "Rows of history that wait for Postgres.")
OUTBOX_OLDEST_AGE: Final = _gauge("outbox_oldest_age_seconds", "Age of the oldest row that waits for Postgres.")
DEAD_LETTER_ENTRIES: Final = _gauge(
    "dead_letter_entries", "Rows in outbox:dead, which Postgres cannot take and nobody has dealt with yet."
)

INVARIANTS: Final = ("conservation", "columns", "breaches")
INVARIANT_VIOLATIONS: Final = _gauge(
    "invariant_violations", "1 for an invariant that the last check found violated, else 0.", ("invariant",)
)
INVARIANTS_CHECKED: Final = _gauge(
    "invariants_checked_timestamp_seconds", "When the invariants were last checked, Unix time."
)

SWEEPS: Final = Counter(
    "plimsoll_sweeps",
    "Sweeps by what asked for them (timer, mark, subscribe, guard) and how they ended (ok, unavailable, failed).",
    ["trigger", "result"],
    registry=REGISTRY,
)
SWEEPS_LATE: Final = Counter(
    "plimsoll_sweeps_late",
    "Timer sweeps that came late: skipped (busy, missed), or made up for by the monotonic guard (guard).",
    ["reason"],
    registry=REGISTRY,
)
UNNOTED_CHANGES: Final = Counter(
    "plimsoll_unnoted_changes",
    "Rows of the columns that changed without a note, found by the timer's sweeps; every row was read again.",
    registry=REGISTRY,
)
SWEEP_DURATION: Final = Histogram(
    "plimsoll_sweep_duration_seconds",
    "From reading the first row to the last verdict recorded.",
    buckets=LATENCY_BUCKETS_SECONDS,
    registry=REGISTRY,
)
MARK_TO_RECORD: Final = Histogram(
    "plimsoll_mark_to_record_seconds",
    "From a mark's acceptance to the commit of a liquidation row it caused.",
    buckets=LATENCY_BUCKETS_SECONDS,
    registry=REGISTRY,
)


class RedisCounters(Collector):
    """The counters that the recording scripts keep in Redis, as last read."""

    def __init__(self) -> None:
        self.liquidations: int | None = None
        self.recoveries: int | None = None

    def collect(self) -> Iterator[Metric]:
        """Nothing until they were read once: an absent counter is no counter at zero."""
        if self.liquidations is not None:
            yield CounterMetricFamily(
                "plimsoll_liquidations", "Breaches opened, ever; kept in Redis.", value=self.liquidations
            )
        if self.recoveries is not None:
            yield CounterMetricFamily(
                "plimsoll_recoveries", "Breaches ended, ever; kept in Redis.", value=self.recoveries
            )


COUNTERS: Final = RedisCounters()
REGISTRY.register(COUNTERS)


MARGIN_RATIO_BANDS: Final = {"0-0.25": 0.25, "0.25-0.5": 0.5, "0.5-0.75": 0.75, "0.75-1": 1.0}
"""Upper ends; what lies above the last is the band ``above_1``."""


def show_settings(settings: Settings) -> None:
    """Set the gauges that alerts compare others with."""
    MARK_AGE_MAX.set(settings.mark_max_age_seconds or float("inf"))
    SWEEP_INTERVAL.set(settings.sweep_interval_seconds)


def show_bands(swept: Swept, contracts: Mapping[str, Contract]) -> None:
    """Set the gauges of the margin ratio's bands. In float64: they decide nothing.

    Not part of :func:`show`: for a million accounts it takes milliseconds, which a scrape has and a sweep has not. A
    scrape leaves it to a thread: rows that change meanwhile are counted in one band or another.
    """
    counts = dict.fromkeys([*MARGIN_RATIO_BANDS, "above_1"], 0)
    for block in (block for chunk in swept.chunks for block in chunk.pieces(SCREEN_BLOCK_ROWS)):
        counted = block.readable(swept.quarantined) & block.is_open() & ~block.is_unvalued()
        valued, _ = value_rows(block, contracts)
        equity, maintenance = valued.equity, valued.maintenance_margin
        above_last = int(np.count_nonzero(counted))
        for band, upper_end in MARGIN_RATIO_BANDS.items():
            above = int(np.count_nonzero(counted & (maintenance > upper_end * equity)))
            counts[band] += above_last - above
            above_last = above
        counts["above_1"] += above_last
    for band, count in counts.items():
        MARGIN_RATIO_ACCOUNTS.labels(band).set(count)


def show(swept: Swept) -> None:
    """Set the gauges to what a sweep found."""
    for state, count in swept.states.items():
        ACCOUNTS.labels(state).set(count)
    CANDIDATES.set(swept.states["candidate"])
    OPEN_BREACHES.set(swept.open_breaches)
    OVERDUE.set(swept.overdue)
    EQUITY.set(float(swept.totals.equity))
    USED_MARGIN.set(float(swept.totals.used_margin))
    MAINTENANCE_MARGIN.set(float(swept.totals.maintenance_margin))
    for symbol, price in swept.marks.prices.items():
        MARK_PRICE.labels(symbol).set(float(price))
        MARK_TIMESTAMP.labels(symbol).set(swept.marks.timestamps_us[symbol] / 1_000_000)
    SWEEP_LAST_SUCCESS.set_to_current_time()
