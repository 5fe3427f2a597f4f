"""What the watchdog exports, and its own page for Prometheus and for whoever supervises it.

System-wide metrics are true of the system whichever of several watchdogs exports them, and are queried with ``max``.
The two counters of history live in Redis, counted by the script that records: neither a restart nor a first scrape
hides a burst.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from app.metrics import LATENCY_BUCKETS_SECONDS

if TYPE_CHECKING:
    from watchdog.sweep import Swept

REGISTRY: Final = CollectorRegistry()


def _gauge(name: str, documentation: str, labels: tuple[str, ...] = ()) -> Gauge:
    return Gauge(f"plimsoll_{name}", documentation, labels, registry=REGISTRY)


ACCOUNTS: Final = _gauge("accounts", "Accounts by state.", ("state",))
CANDIDATES: Final = _gauge("candidates", "Accounts with an open position and equity below maintenance margin.")
OPEN_BREACHES: Final = _gauge("open_breaches", "Breaches that have not ended.")
EQUITY: Final = _gauge("equity_usdt", "Equity of all accounts.")
USED_MARGIN: Final = _gauge("used_margin_usdt", "Used margin of all accounts.")
MAINTENANCE_MARGIN: Final = _gauge("maintenance_margin_usdt", "Maintenance margin of all accounts.")
MARK_PRICE: Final = _gauge("mark_price", "The mark price in USDT.", ("symbol",))
MARK_TIMESTAMP: Final = _gauge("mark_price_timestamp_seconds", "When the mark was accepted.", ("symbol",))
OVERDUE: Final = _gauge("overdue_candidates", "Candidates whose breach the last sweep could not record.")
SWEEP_LAST_SUCCESS: Final = _gauge("sweep_last_success_timestamp_seconds", "When a sweep last succeeded.")
OUTBOX_ENTRIES: Final = _gauge("outbox_entries", "Rows of history that wait for Postgres.")
OUTBOX_OLDEST_AGE: Final = _gauge("outbox_oldest_age_seconds", "Age of the oldest row that waits for Postgres.")

INVARIANTS: Final = ("conservation", "columns", "breaches")
INVARIANT_VIOLATIONS: Final = _gauge(
    "invariant_violations", "1 for an invariant that the last check found violated, else 0.", ("invariant",)
)
INVARIANTS_CHECKED: Final = _gauge("invariants_checked_timestamp_seconds", "When the invariants were last checked.")

SWEEPS: Final = Counter(
    "plimsoll_sweeps", "Sweeps by what asked for them and how they ended.", ["trigger", "result"], registry=REGISTRY
)
SWEEPS_LATE: Final = Counter(
    "plimsoll_sweeps_late",
    "Timer sweeps that came late: skipped by the scheduler, or made up for by the monotonic guard.",
    ["reason"],
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
            yield CounterMetricFamily("plimsoll_liquidations", "Breaches opened, ever.", value=self.liquidations)
        if self.recoveries is not None:
            yield CounterMetricFamily("plimsoll_recoveries", "Breaches ended, ever.", value=self.recoveries)


COUNTERS: Final = RedisCounters()
REGISTRY.register(COUNTERS)


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
